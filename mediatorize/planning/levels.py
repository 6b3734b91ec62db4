"""Levels within a plan: more calls, some of whose layers run at cheaper levels, for the price of fewer calls in full."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mediatorize.diffusion.plan import Plan
from mediatorize.planning.allocate import allocate

MORE_CALLS = (1.25, 1.5)
"""So many times as many calls are tried for one price."""


@dataclass(frozen=True, kw_only=True)
class LevelTable:
    """What levels of layers do to the samples of a plan whose calls all run in full, to first order, and what they cost."""

    options: tuple[tuple[int | str, ...], ...]
    """By layer."""
    squares: NDArray[np.float64]
    """(calls, layers, options): squared relative errors of samples, if one layer of one call runs so."""
    costs: NDArray[Any]
    """The same shape: of a layer in a call of one sample, both halves of guidance counted, in FLOPs or seconds."""
    rest: float
    """Of all else in the plan's calls."""

    @property
    def in_full(self) -> float:
        """What the plan costs with every layer at the last option, softmax."""
        return float(self.rest + self.costs[:, :, -1].sum())


Measure = Callable[[Plan], LevelTable]


def counts_for(calls: int) -> list[int]:
    """Numbers of calls that are tried for the price of `calls` in full."""
    return sorted({math.ceil(factor * calls) for factor in MORE_CALLS} - {calls})


def with_levels(plan: Plan, table: LevelTable, room: float) -> Plan | None:
    """The plan with the levels of least predicted error that it can have for a price; None where it cannot have it so cheap.

    Squares of errors add up over calls and layers; the choice is exact (`allocate`).
    """
    left = room - table.rest
    if table.costs.min(2).sum() > left:
        return None
    choice = allocate(table.squares, table.costs, left)
    named = [tuple(own[option] for own, option in zip(table.options, row, strict=True)) for row in choice]
    return replace(plan, calls=tuple(replace(call, levels=levels) for call, levels in zip(plan.calls, named, strict=True)))
