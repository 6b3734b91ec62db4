"""The report of `mediatorize sample`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mediatorize.model.levels import title

if TYPE_CHECKING:
    from mediatorize.model.schedule import SwitchRule
    from mediatorize.stages.sample import Sampled


def words(found: Sampled) -> str:
    level = "of the schedule" if found.level is None else title(found.level)
    how = f"by the step-wise rule ({', then '.join(found.stages)})" if found.stages else f"at level {level}"
    text = f"{found.out}: {found.count} samples of {found.name} {how} in {found.seconds:.1f} s"
    if found.flops is not None and found.softmax_flops is not None:
        cost = f"{found.flops / 1e9:.1f} GFLOPs ({found.flops / 2e9:.1f} GMACs), {found.flops / found.softmax_flops:.1%} of softmax's"
        text = f"{text}; {cost}"
    return "\n".join([text, *(_switched(found, stage) for stage in range(1, len(found.stages)))])


def _switched(found: Sampled, stage: int) -> str:
    """When a stage of the rule began: steps count from 1."""
    steps = [row[stage - 1] + 1 for row in found.switches if row[stage - 1] >= 0]
    began = f"from step {min(steps)}" + (f" to {max(steps)}" if max(steps) > min(steps) else "") if steps else "never"
    return f"  {found.stages[stage]}: began {began}, in {len(steps)} of {found.count} samples"


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
        "seconds": found.seconds,
        "flops": found.flops,
        "softmax_flops": found.softmax_flops,
        "stages": list(found.stages),
        "switches": [list(row) for row in found.switches],
    }
