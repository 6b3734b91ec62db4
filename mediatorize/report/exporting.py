"""The report of `mediatorize export`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mediatorize.planning.results import ExportedScheduler

if TYPE_CHECKING:
    from mediatorize.stages.export import Exported


def words(result: Exported | ExportedScheduler) -> str:
    if isinstance(result, ExportedScheduler):
        calls = ", ".join(map(str, result.calls))
        apart = f"its samples differ from the plans' by {result.difference:.1g} of their largest value"
        return f"{result.out}: a diffusers scheduler with plans of {calls} calls; {apart}.\n\n{result.usage}"
    lines = [f"{result.out}: {result.name}, exported to {result.target} ({result.bytes / 2**20:.1f} MiB)", checks(result)]
    if result.pruned is not None:
        share = result.pruned.parameters / result.pruned.of
        lines.append(f"Pruned to its schedule, {share:.1%} of the bundle's parameters are left. Gone: {result.pruned.without}.")
    if result.plans:
        lines.append(f"Plans of {', '.join(map(str, result.plans))} calls travel with it.")
    lines += [f"The plan of {calls} calls stays behind: {why}." for calls, why in result.left.items()]
    if result.runs_softmax and not result.plans:
        lines.append("The export has no schedule and runs at softmax until a level is chosen. Calibrate before export, or pass --level.")
    lines.append(f"{result.out / 'README.md'} says how to use it.")
    return "\n".join(lines)


def facts(result: Exported | ExportedScheduler) -> dict[str, Any]:
    if isinstance(result, ExportedScheduler):
        return {"out": str(result.out), "target": "scheduler", "calls": list(result.calls), "largest_difference": result.difference}
    return {
        "out": str(result.out),
        "name": result.name,
        "target": result.target,
        "differences": dict(result.verified.differences),
        "rounding": result.verified.rounding,
        "dtype": result.dtype,
        "has_schedule": result.has_schedule,
        "runs_softmax": result.runs_softmax,
        "plans": list(result.plans),
        "plans_left": {str(calls): why for calls, why in result.left.items()},
        "pruned": None if result.pruned is None else vars(result.pruned),
        "samples": None if result.verified.samples is None else vars(result.verified.samples),
        "bytes": result.bytes,
        "largest_difference": result.verified.largest,
    }


def checks(result: Exported) -> str:
    """What the written files were compared with, and how much their outputs differ."""
    verified, rounded = result.verified, result.dtype != "float32"
    model = f"the bundle's model with its weights rounded to {result.dtype}" if rounded else "the bundle's model"
    apart = f"differ by at most {verified.largest:.1e} of their largest value" if verified.largest else "are the same, bit for bit"
    text = f"Loaded back and compared with {model} at {', '.join(verified.differences)}: outputs {apart}."
    if verified.samples is None:
        return text
    samples = verified.samples
    apart = f"by {samples.mean:.1e} of their norm (mean; at most {samples.largest:.1e})"
    return (
        f"{text} Rounding itself changes them by up to {verified.rounding:.1e}. "
        f"{samples.count} samples of {samples.steps} {samples.solver} "
        f"steps differ from those of the unrounded model, from the same noise, {apart}."
    )
