"""Step-wise rules (arXiv 2408.05710, section 3.3) within a budget, by when they would switch on the teacher's trajectories. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mediatorize.model.levels import Level
from mediatorize.model.schedule import SwitchRule

MOST_FIRST = 24
"""How many values of `first` are tried; of more, so many evenly spread."""

MOST_RATIOS = 24
"""How many ratios a stage can have for one value of `first`."""

MOST_STAGES = 3
"""As in the paper."""

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
    """In the order in which they may be used. A rule has two or three of them."""
    changes: NDArray[np.float64]
    """(steps - 1, n): of each sample's latents, from the beginning of each step to that of the next."""
    errors: NDArray[np.float64]
    """(steps, levels)"""
    costs: NDArray[Any]
    """(steps, levels)"""

    def within(self, room: Any) -> list[Predicted]:
        """Rules that cost no more: the one of least predicted error for every value of `first` and for all levels that it can have.

        The best comes first. Of rules that do the same on these trajectories there is one.
        """
        best: dict[Any, tuple[float, float, _Group, int]] = {}
        for group in self._groups:
            fitting = np.flatnonzero(group.costs <= room)
            if not fitting.size:
                continue
            place = int(fitting[group.errors[fitting].argmin()])
            found = float(group.errors[place]), float(group.costs[place]), group, place
            for key in (group.first, group.places):
                best[key] = min(best.get(key, found), found, key=lambda each: each[0])
        rules: dict[Any, Predicted] = {}
        for error, cost, group, place in best.values():
            ratios, levels = group.ratios[place], tuple(self.levels[level] for level in group.places)
            rule = SwitchRule(levels=levels, ratios=ratios, first=group.first, measure="mean-absolute", per="sample")
            does = levels, begins(self.changes, group.first, ratios).tobytes()
            rules.setdefault(does, Predicted(rule=rule, error=error, cost=cost))
        return sorted(rules.values(), key=lambda each: each.error)

    def switches(self, rule: SwitchRule) -> list[list[int]]:
        """By sample, the step that each stage but the first begins with on the teacher's trajectories; -1: it never does."""
        at = begins(self.changes, rule.first, rule.ratios)
        return np.where(at < len(self.errors), at, -1).T.tolist()

    @property
    def range(self) -> tuple[float, float] | None:
        """The least and the largest cost of a rule that switches somewhere; None if there is no time to."""
        costs = [group.costs for group in self._groups]
        return (min(float(cost.min()) for cost in costs), max(float(cost.max()) for cost in costs)) if costs else None

    @cached_property
    def _groups(self) -> list[_Group]:
        steps, count = len(self.errors), len(self.levels)
        firsts = sorted({round(place) for place in np.linspace(1, steps - 3, min(steps - 3, MOST_FIRST))}) if steps > 3 else []
        tables = [np.concatenate([np.zeros((1, count)), np.cumsum(table, 0)]) for table in (self.errors, self.costs)]
        found = []
        for first in firsts:
            ratios = ratios_of(self.changes, first)
            at = begins(self.changes, first, ratios)  # (ratios, n)
            upto = [table[at].mean(1) for table in tables]  # (ratios, levels): the mean sample's, up to where the ratio ends a stage
            for later in range(1, MOST_STAGES):
                chosen = np.array(list(combinations(range(len(ratios)), later)), dtype=np.int64).reshape(-1, later)
                named = [tuple(ratios[place] for place in places) for places in chosen]
                for places in combinations(range(count), later + 1) if named else ():
                    sums = []
                    for table, ended in zip(tables, upto, strict=True):
                        total = np.full(len(chosen), table[-1, places[-1]])
                        for stage, (level, after) in enumerate(pairwise(places)):
                            total += ended[chosen[:, stage], level] - ended[chosen[:, stage], after]
                        sums.append(total)
                    found.append(_Group(first, places, named, *sums))
        return found


@dataclass(frozen=True)
class _Group:
    """Rules of the same levels and base."""

    first: int
    places: tuple[int, ...]
    """Of its levels among all."""
    ratios: Sequence[tuple[float, ...]]
    """Of every rule."""
    errors: NDArray[np.float64]
    costs: NDArray[np.float64]


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
