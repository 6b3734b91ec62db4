"""The report of `mediatorize sample`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mediatorize.model.levels import title
from mediatorize.model.schedule import Began

if TYPE_CHECKING:
    from mediatorize.model.schedule import SwitchRule
    from mediatorize.stages.sample import Sampled


def words(found: Sampled) -> str:
    if found.plan is not None:
        return "\n".join([_by_plan(found), *(f"warning: {warning}" for warning in found.warnings)])
    level = "of the schedule" if found.level is None else title(found.level)
    how = f"by the step-wise rule ({', then '.join(found.stages)})" if found.stages else f"at level {level}"
    text = f"{found.out}: {found.count} samples of {found.name} {how} in {found.seconds:.1f} s"
    if found.flops is not None and found.softmax_flops is not None:
        cost = f"{found.flops / 1e9:.1f} GFLOPs ({found.flops / 2e9:.1f} GMACs), {found.flops / found.softmax_flops:.1%} of softmax's"
        text = f"{text}; {cost}"
    return "\n".join([text, *began_in_words(Began.of(found.stages, found.switches), found.count)])


def _by_plan(found: Sampled) -> str:
    assert found.flops is not None and found.softmax_flops is not None, "a plan has a fixed number of calls"
    return (
        f"{found.out}: {found.count} samples of {found.name} by the plan {found.plan}, in {found.seconds:.1f} s; "
        f"{found.flops / 1e9:.1f} GFLOPs ({found.flops / 2e9:.1f} GMACs), {found.flops / found.softmax_flops:.1%} of 50 steps'"
    )


def began_in_words(began: Sequence[Began], samples: int) -> list[str]:
    """When the later stages of a step-wise rule began, a line each."""
    lines = []
    for each in began:
        when = "never" if each.first is None else f"from step {each.first}"
        when += f" to {each.last}, median {each.median}" if each.first != each.last else ""
        lines.append(f"  {each.stage}: began {when}, in {each.samples} of {samples} samples")
    return lines


def rule_in_words(rule: SwitchRule) -> str:
    """A step-wise rule as `sample` would be told it."""
    ratios = ",".join(f"{ratio:g}" for ratio in rule.ratios)
    together = "each sample alone" if rule.per == "sample" else "a batch together"
    return f"{', then '.join(map(title, rule.levels))}; first {rule.first}, ratios {ratios}, {rule.measure} changes, {together}"


def facts(found: Sampled) -> dict[str, Any]:
    return {
        "out": str(found.out),
        "count": found.count,
        "name": found.name,
        "level": "of the schedule" if found.level is None else str(found.level),
        "plan": found.plan,
        "warnings": list(found.warnings),
        "seconds": found.seconds,
        "flops": found.flops,
        "softmax_flops": found.softmax_flops,
        "stages": list(found.stages),
        "switches": [list(row) for row in found.switches],
    }
