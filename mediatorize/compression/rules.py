"""Step-wise rules (arXiv 2408.05710, section 3.3) within a budget, by when they would switch on the teacher's trajectories. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mediatorize.model.levels import Level
from mediatorize.model.schedule import SwitchRule

MOST_FIRST = 24
"""How many values of `first` are tried; of more, so many evenly spread."""

MOST_RATIOS, MOST_COMBINATIONS = 24, 5000
"""How many ratios a stage can have, and how many combinations of them are tried at most, for one value of `first`."""

ABOVE_ALL = 1.05
"""A ratio at which every sample switches at the first check: so many times the largest change there."""


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """A rule, and what it would do if its samples' latents changed as the teacher's do."""

    rule: SwitchRule
    error: float
    """Summed over steps, mean over samples."""
    cost: float
    """Mean over samples."""


@dataclass(frozen=True)
class Rules:
    """Every rule that differs from others on the teacher's trajectories, or enough of them, evenly spread."""

    levels: Sequence[Level]
    """In the order in which they may be used. A rule leaves some out."""
    changes: NDArray[np.float64]
    """(steps - 1, n): of each sample's latents, from the beginning of each step to that of the next."""
    errors: NDArray[np.float64]
    """(steps, levels)"""
    costs: NDArray[Any]
    """(steps, levels)"""

    @property
    def steps(self) -> int:
        return len(self.errors)

    @property
    def range(self) -> tuple[float, float] | None:
        """The least and the largest cost of a rule that switches somewhere; None if there is no time to."""
        costs = [cost for _, _, _, cost in self._by_first()]
        return (min(float(cost.min()) for cost in costs), max(float(cost.max()) for cost in costs)) if costs else None

    def within(self, room: Any) -> list[Predicted]:
        """For every value of `first` and every first level the rule of least predicted error that costs no more, the best first."""
        found: dict[tuple[Any, ...], Predicted] = {}
        for first, stages, error, cost in self._by_first():
            fitting = np.flatnonzero(cost <= room)
            if not fitting.size:
                continue
            best = fitting[error[fitting].argmin()]
            levels, ratios = stages(int(best))
            rule = SwitchRule(levels=levels, ratios=ratios, first=first, measure="mean-absolute", per="sample")
            does = (levels, begins(self.changes, first, ratios).tobytes())
            found.setdefault(does, Predicted(rule=rule, error=float(error[best]), cost=float(cost[best])))
        return sorted(found.values(), key=lambda each: each.error)

    def _by_first(self) -> Iterator[tuple[int, Any, NDArray[np.float64], NDArray[np.float64]]]:
        """By `first` and first level: what gives a combination's levels and ratios, and all combinations' errors and costs."""
        highest = self.steps - 3
        firsts = sorted({round(place) for place in np.linspace(1, highest, min(highest, MOST_FIRST))}) if highest > 0 else []
        tables = [np.concatenate([np.zeros((1, len(self.levels))), np.cumsum(table, 0)]) for table in (self.errors, self.costs)]
        for first in firsts:
            ratios = ratios_of(self.changes, first)
            at = begins(self.changes, first, ratios)  # (ratios, n)
            for start in range(len(self.levels) - 1):
                later = len(self.levels) - 1 - start
                kept = _evenly(len(ratios), later)
                chosen = np.array(list(combinations_with_replacement(range(len(kept) + 1), later)))  # the last place: never
                chosen = chosen[chosen[:, 0] < len(kept)]  # a rule switches at least once
                sums = []
                for table in tables:
                    upto = np.concatenate([table[at[kept]].mean(1), table[-1:]])  # (kept + 1, levels)
                    total = np.full(len(chosen), table[-1, -1] - table[0, -1])
                    for stage in range(later):  # level `stage` runs up to where the next begins, in place of the next
                        level = start + stage
                        total += upto[chosen[:, stage], level] - upto[chosen[:, stage], level + 1]
                    sums.append(total)

                def stages(
                    row: int, start: int = start, kept: Sequence[int] = kept, chosen: Any = chosen, ratios: Any = ratios
                ) -> tuple[tuple[Level, ...], tuple[float, ...]]:
                    return self._stages(start, [None if place == len(kept) else float(ratios[kept[place]]) for place in chosen[row]])

                yield first, stages, sums[0], sums[1]

    def _stages(self, start: int, ratios: Sequence[float | None]) -> tuple[tuple[Level, ...], tuple[float, ...]]:
        """Levels and ratios without stages that never begin (None), or end as soon as they begin."""
        levels, kept = [self.levels[start]], list[float]()
        for level, ratio in zip(self.levels[start + 1 :], ratios, strict=True):
            if ratio is None:
                break
            if kept and kept[-1] == ratio:
                levels[-1] = level
            else:
                levels.append(level)
                kept.append(ratio)
        return tuple(levels), tuple(kept)


def begins(changes: ArrayLike, first: int, ratios: Sequence[float]) -> NDArray[np.int64]:
    """The step, from 0, with which a stage of each ratio begins in each sample: (ratios, n); the number of steps where it never does.

    Args:
        changes: (steps - 1, n), as in `Rules`.
    """
    lowest = _lowest(np.asarray(changes), first)
    waits = np.stack([(lowest >= ratio).sum(0) for ratio in ratios]) if len(ratios) else np.zeros((0, lowest.shape[1]), dtype=np.int64)
    return first + 2 + waits


def ratios_of(changes: NDArray[np.float64], first: int) -> list[float]:
    """Ratios, descending, each in the middle between two of the samples' changes, so that it switches in a place of its own."""
    lowest = _lowest(changes, first)
    values = np.unique(lowest)
    middles = (values[1:] + values[:-1]) / 2
    places = np.linspace(len(middles) - 1, 0, min(len(middles), MOST_RATIOS - 1)).round().astype(int)
    rounded = dict.fromkeys(float(f"{ratio:.4g}") for ratio in (ABOVE_ALL * float(values[-1]), *middles[places].tolist()))
    return [ratio for ratio in rounded if ratio > 0]


def _lowest(changes: NDArray[np.float64], first: int) -> NDArray[np.float64]:
    """(checks, n): the lowest change so far, as a share of the base, at every check of the rule; the first step's is not looked at."""
    base = changes[1 : first + 1].mean(0)
    return np.minimum.accumulate(changes[first + 1 :] / np.maximum(base, 1e-30), axis=0)


def _evenly(ratios: int, later: int) -> list[int]:
    """Places of ratios, all or evenly spread, so that there are not too many combinations for so many stages."""
    count = ratios
    while count > 1 and math.comb(count + later, later) > MOST_COMBINATIONS:
        count -= 1
    return sorted({round(place) for place in np.linspace(0, ratios - 1, count)})
