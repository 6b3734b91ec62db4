"""The report of `mediatorize sample`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mediatorize.model.levels import title

if TYPE_CHECKING:
    from mediatorize.stages.sample import Sampled


def words(found: Sampled) -> str:
    level = "of the schedule" if found.level is None else title(found.level)
    text = f"{found.out}: {found.count} samples of {found.name} at level {level} in {found.seconds:.1f} s"
    if found.flops is None or found.softmax_flops is None:
        return text
    return f"{text}; {found.flops / 1e9:.1f} GFLOPs ({found.flops / 2e9:.1f} GMACs), {found.flops / found.softmax_flops:.1%} of softmax's"


def facts(found: Sampled) -> dict[str, Any]:
    return {
        "out": str(found.out),
        "count": found.count,
        "name": found.name,
        "level": "of the schedule" if found.level is None else str(found.level),
        "seconds": found.seconds,
        "flops": found.flops,
        "softmax_flops": found.softmax_flops,
    }
