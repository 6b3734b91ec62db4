"""The report of `mediatorize calibrate --calls`, and of `mediatorize inspect PLAN`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mediatorize.model.levels import SOFTMAX, title
from mediatorize.report.tables import seconds_in_words, text_table

if TYPE_CHECKING:
    from mediatorize.diffusion.plan import Plan
    from mediatorize.planning.judge import Errors
    from mediatorize.planning.results import Planned


def as_json(content: Any) -> Any:
    """Content as a JSON file gives it back."""
    return json.loads(json.dumps(content, default=str))


def words(result: Planned) -> str:
    wanted, found = result.wanted, result.plans
    guidance = "no guidance" if wanted.cfg_scale == 1 else f"guidance {wanted.cfg_scale:g}"
    head = f"{result.arch.name}: plans of {', '.join(map(str, result.calls))} model calls; {guidance}, {result.dtype}"
    if found is None:
        return "\n".join(
            [
                head,
                f"Would fit on {wanted.sizes[0]} samples, choose on {wanted.sizes[1]}, and measure on {wanted.sizes[2]}, by about "
                f"{result.model_rows:,} model calls of one row. This would take about "
                f"{seconds_in_words(result.estimated_seconds or 0.0)} at this device's rate, and up to "
                f"{(result.estimated_bytes or 0) / 2**30:.1f} GiB. Nothing was written.",
            ]
        )
    rows = []
    for count, each in found.found.items():
        low, high = each.reported.interval or (0.0, 0.0)
        name, best = min(each.others.items(), key=lambda item: item[1].median)
        rows.append(
            (
                str(len(each.plan.calls)),
                f"{result.shares[count]:.1%}",
                f"{each.reported.median:.4f}",
                f"{low:.4f}-{high:.4f}",
                f"{each.reported.mean:.4f}",
                f"{each.reported.flipped:.0%}",
                f"{best.median:.4f} ({name})",
            )
        )
    header = ("calls", f"FLOPs of {result.reference_steps}", "median error", "95% interval", "mean", "flipped", "best other solver")
    samples = wanted.sizes[2]
    lines = [head, "", text_table(header, rows)]
    lines += [f"{name} with {result.reference_steps} steps: median error {errors.median:.4f}." for name, errors in found.many.items()]
    lines.append(
        "Error means |sample - teacher's| / |teacher's| of one sample. The teacher's is its converged solution, of "
        f"{found.reference_calls} calls, itself {found.reference_error:.1g} from its limit. The other solver has as many calls. Medians "
        f"are of {samples} samples that nothing was fitted to or chosen by."
    )
    if not found.reference_is_enough:
        lines.append("warning: the reference errs by more than a tenth of the best plan's error, so that this error is not exact.")
    lines += [*_about_levels(result), *_same_calls(result), ""]
    for each in found.found.values():
        stages = ", ".join(f"{name} {error:.4f}" for name, error in each.stages.items())
        lines.append(
            f"{len(each.plan.calls)} calls, what each stage brought (geometric mean of the samples that choices are made by): {stages}"
        )
        beaten = [name for name, errors in each.others.items() if errors.median < each.reported.median]
        lines += [f"  warning: {', '.join(beaten)} is nearer to the teacher with as many calls"] if beaten else []
    lines.append("")
    default = result.out.parent == result.model
    lines.append(f"Wrote {result.out} in {seconds_in_words(result.seconds)}. Sample by it:")
    plan = "" if default else f" --plan {result.out}"
    lines.append(f"  mediatorize sample {result.model}{plan} --calls {max(found.plans)} --out grid.png")
    return "\n".join(lines)


def _about_levels(result: Planned) -> list[str]:
    """What runs below softmax in a plan, where something does."""
    told = []
    for each in result.plans.found.values() if result.plans else ():
        levels = Counter(level for call in each.plan.calls for level in call.levels or ())
        if cheaper := [f"{count} at {title(level)}" for level, count in levels.items() if level != SOFTMAX]:
            told.append(f"{len(each.plan.calls)} calls: of their {levels.total()} layers, {', '.join(cheaper)}.")
    return told


def _same_calls(result: Planned) -> list[str]:
    """Of several prices whose best plan has as many calls, a file keeps the dearest one's."""
    counts = Counter(len(each.plan.calls) for each in result.plans.found.values()) if result.plans else Counter[int]()
    return [
        f"warning: {times} budgets have a plan of {calls} calls; the file has the dearest one."
        for calls, times in counts.items()
        if times > 1
    ]


def facts(result: Planned) -> dict[str, Any]:
    found = result.plans
    head: dict[str, Any] = {
        "model": str(result.model),
        "out": str(result.out),
        "name": result.arch.name,
        "calls": list(result.calls),
        "reference_steps": result.reference_steps,
        "dtype": result.dtype,
        "samples": list(result.wanted.sizes),
    }
    if found is None:
        predicted = {"model_rows": result.model_rows, "seconds": result.estimated_seconds, "bytes": result.estimated_bytes}
        return head | {"dry_run": predicted}
    plans = [
        {
            "calls": len(each.plan.calls),
            "share": result.shares[count],
            "error": _errors(each.reported),
            "fitted": _errors(each.fitted),
            "stages": dict(each.stages),
            "others": {name: _errors(errors) for name, errors in each.others.items()},
        }
        for count, each in found.found.items()
    ]
    reference = {"calls": found.reference_calls, "error": found.reference_error}
    many = {name: _errors(errors) for name, errors in found.many.items()}
    return head | {"plans": plans, "many": many, "reference": reference, "seconds": result.seconds}


def _errors(errors: Errors) -> dict[str, Any]:
    told = {"median": errors.median, "mean": errors.mean, "geometric": errors.geometric, "flipped": errors.flipped}
    return told | {"samples": errors.samples, "interval": None if errors.interval is None else list(errors.interval)}


def plan_words(file: Path, plans: Mapping[int, Plan]) -> str:
    """What is in a plan file."""
    rows = []
    for count, plan in plans.items():
        levels = {level for call in plan.calls for level in call.levels or ("softmax",)}
        rows.append(
            (
                str(count),
                str(sum(plan.rows)),
                f"{plan.errors['median']:.4f}" if "median" in plan.errors else "-",
                "none" if plan.cfg_scale == 1 else f"{plan.cfg_scale:g}",
                plan.streams,
                ", ".join(map(str, sorted(levels, key=str))),
                " ".join(f"{call.t:.4g}" for call in plan.calls),
            )
        )
    first = next(iter(plans.values()))
    made = first.made_for
    table = text_table(("calls", "rows", "median error", "guidance", "features", "levels", "times"), rows)
    weights = f"weights {str(made['weights'])[:12]}, {made['dtype']}" if "weights" in made else "no record of the weights"
    channels = sum(map(len, first.groups))
    return f"{file}: plans for a model of process {first.process}, {channels} channels; {weights}\n\n{table}"


def plan_facts(plans: Mapping[int, Plan]) -> list[dict[str, Any]]:
    """The same for machines: everything but the weights of updates."""
    told = []
    for plan in plans.values():
        content = plan.to_json()
        for call in content["calls"]:
            del call["weights"]
        told.append(content)
    return told
