"""The report of `mediatorize resize`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mediatorize.model.cost import forward_flops
from mediatorize.model.levels import SOFTMAX, Level, title
from mediatorize.report.tables import gmacs, text_table

if TYPE_CHECKING:
    from mediatorize.model.architecture import Architecture
    from mediatorize.stages.resize import Resized


def words(found: Resized) -> str:
    rows = [
        (title(level), gmacs(before), gmacs(after), f"{after / before:.2f}", f"{after / _costs(found, found.after)[SOFTMAX]:.1%}")
        for level, (before, after) in _both(found).items()
    ]
    what = "the checkpoint" if found.settings is None else "the bundle"
    lines = [
        f"{found.out}: {what} {found.after.name} for {_tokens(found.after)} tokens, before {_tokens(found.before)}",
        *([f"  its pretrained weights are those of {found.teacher}"] if found.teacher else []),
        "",
        text_table(("whole model at", "GMACs before", "GMACs now", "ratio", "of softmax's now"), rows),
        "",
        "Fine-tune it before use, then calibrate: weights and schedules were made for the other resolution.",
    ]
    return "\n".join(lines)


def facts(found: Resized) -> dict[str, Any]:
    return {
        "out": str(found.out),
        "name": found.after.name,
        "grid_before": list(found.before.grid),
        "grid": list(found.after.grid),
        "teacher": found.teacher,
        "flops": {str(level): {"before": before, "after": after} for level, (before, after) in _both(found).items()},
    }


def _both(found: Resized) -> dict[Level, tuple[int, int]]:
    """FLOPs of a forward before and after, by level."""
    before, after = _costs(found, found.before), _costs(found, found.after)
    return {level: (before[level], after[level]) for level in before}


def _costs(found: Resized, arch: Architecture) -> dict[Level, int]:
    levels = (SOFTMAX, *(found.settings.levels if found.settings else ()))
    return {level: forward_flops(arch, level, found.settings) for level in levels}


def _tokens(arch: Architecture) -> str:
    return f"{arch.grid[0]}x{arch.grid[1]}"
