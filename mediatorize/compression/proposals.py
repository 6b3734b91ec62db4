"""Proposals of schedules within a budget, by what the error table predicts. Nothing is sampled here.

A *budget* is a share of the softmax sampler's cost. A proposal says at which levels layers run.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from mediatorize.compression.costs import Costs, bare_levels
from mediatorize.compression.rules import Rules
from mediatorize.compression.sensitivity import cells_of
from mediatorize.compression.tables import Tables
from mediatorize.diffusion.sampling import Sampler
from mediatorize.model.architecture import Architecture
from mediatorize.model.levels import SOFTMAX, Level, levels_per_layer, title
from mediatorize.model.schedule import AnySchedule, RuleSchedule, Schedule, SwitchRule
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.planning.allocate import Choice, allocate, descend

WHOLE, RULE, PER_STEP, PER_CELL = "one level throughout", "latent-change rule", "a level per step", "a level per step and layer"
FEWER = "fewer steps"
"""Kinds of candidates."""

BASELINES = (WHOLE, FEWER)
"""What one could do without a search."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A schedule, and where it comes from."""

    name: str
    kind: str
    """One of the kinds above."""
    schedule: AnySchedule
    steps: int
    """Of the sampler it is for: fewer than asked for, where that is what it does."""
    predicted: Mapping[str, float] = field(default_factory=dict)
    """Predicted sample error, by ways of adding up the errors of single changes; "vectors" adds them as they point."""
    switches: tuple[tuple[int, ...], ...] = ()
    """Of a step-wise rule: by sample of the trajectories that it was tuned on, the step, from 0, that each later stage began with; -1: it
    never did."""

    @property
    def error(self) -> float:
        """What is known of it: the predicted one; infinite where there is no prediction."""
        return self.predicted.get("vectors", float("inf"))


class Proposer:
    """Schedules within a budget, by what the tables predict."""

    def __init__(self, model: DiffusionTransformer, sampler: Sampler, costs: Costs, tables: Tables, kinds: Collection[str]) -> None:
        self.model, self.sampler, self.costs, self.tables, self.kinds = model, sampler, costs, tables, kinds
        self.noise_levels = tuple(sampler.noise_levels(model.arch))
        self.settings, self.depth = model.added(), model.arch.depth
        self.calls = len(self.noise_levels)

    def within(self, budget: float) -> Iterator[Proposal]:
        """Proposals for a budget, baselines among them."""
        room, named = self.costs.room(budget), f", for {budget:.2%}"
        fewer = self.fewer_steps(room)
        for proposal in [*([] if fewer is None else [fewer]), *self.levels(room)]:
            yield replace(proposal, name=proposal.name + named)

    def whole(self, level: Level) -> Proposal:
        """One level throughout."""
        choice = np.full((len(self.tables.errors.noise_levels), self.depth), self.tables.errors.options.index(level))
        schedule = Schedule((), (tuple(levels_per_layer(level, self.depth, self.settings)),))
        predicted = self.tables.errors.predicted(choice)
        return Proposal(name=title(level), kind=WHOLE, schedule=schedule, steps=self.sampler.steps, predicted=predicted)

    def fewer_steps(self, room: Any) -> Proposal | None:
        """The teacher with as many steps as the budget allows."""
        how = self.sampler.how
        for steps in range(self.sampler.steps - 1, how.fewest - 1, -1):
            other = replace(self.sampler, steps=steps)
            if costs_with(self.costs, self.model.arch, other).softmax <= room:
                schedule = Schedule((), ((SOFTMAX,) * self.depth,))
                return Proposal(name=f"{steps} steps", kind=FEWER, schedule=schedule, steps=steps)
        return None

    def levels(self, room: Any) -> list[Proposal]:
        """Levels by noise level and layer, and by step; errors are added up in several ways."""
        table = self.tables.errors
        cells, place = cells_of(self.noise_levels)
        usable = set(bare_levels(self.settings, self.kinds))
        softmax = table.options.index(SOFTMAX)
        offered = np.tile([level in usable for level in table.options], (self.depth, 1))  # (layers, options)
        offered[[layer for layer in range(self.depth) if not self.settings.converts(layer)]] = False
        one = np.array([self.costs.call.block(level) for level in table.options])
        rows = np.zeros(len(cells), dtype=np.int64)
        np.add.at(rows, place, self.costs.rows)
        costs = rows[:, None, None] * np.where(offered, one, one[softmax])
        left = room - int(rows.sum()) * self.costs.call.rest
        if costs.min(2).sum() > left:
            return []
        products = np.where(offered[..., None], table.products, 0.0)  # what is not offered does as softmax, whose cost it has
        squares = np.square(products).sum(-1)
        start, steps = allocate(squares, costs, left), allocate(squares, costs, left, per_step=True)
        chosen: list[tuple[str, str, Choice]] = [
            ("sum of squares", PER_CELL, start),
            ("sum of vectors per layer", PER_CELL, descend(products, costs, left, start, apart=True)),
            ("sum of vectors", PER_CELL, descend(products, costs, left, start, apart=False)),
            ("per step, sum of squares", PER_STEP, steps),
            ("per step, sum of vectors", PER_STEP, descend(products, costs, left, steps, apart=True, per_step=True)),
        ]
        layers = np.arange(self.depth)
        kept = [(name, kind, np.where(offered[layers, choice], choice, softmax)) for name, kind, choice in chosen]
        how: dict[str, Any] = {"steps": self.sampler.steps}
        return [
            Proposal(name=name, kind=kind, schedule=table.schedule(choice), predicted=table.predicted(choice), **how)
            for name, kind, choice in kept
        ]

    # step-wise rules

    @cached_property
    def rules(self) -> Rules:
        """Of levels of whole blocks, by what the tables predict. A noise level's error is shared evenly by its calls."""
        table, levels = self.tables.errors, bare_levels(self.settings, self.kinds)
        _, place = cells_of(self.noise_levels)
        options = [table.options.index(level) for level in levels]
        errors = table.squares().sum(1)[:, options] / np.array(table.calls)[:, None]  # (cells, levels), of one call
        per_layer = [levels_per_layer(level, self.depth, self.settings) for level in levels]
        one = np.array([self.costs.call.rest + sum(map(self.costs.call.block, each)) for each in per_layer])
        begun = range(0, self.calls, self.sampler.how.calls_per_step)  # the first call of every step
        return Rules(
            levels=levels,
            changes=self.tables.changes.numpy(),
            errors=np.add.reduceat(errors[place], begun),
            costs=np.add.reduceat(np.array(self.costs.rows)[:, None] * one, begun),
        )

    def by_rule(self, rule: SwitchRule, switches: Sequence[Sequence[int]]) -> Proposal:
        """A rule as a proposal, from when it switched."""
        table, per_step = self.tables.errors, self.sampler.how.calls_per_step
        late = [[begin if begin >= 0 else self.calls for begin in begins] for begins in switches]
        median = [int(statistics.median_low(column)) for column in zip(*late, strict=True)]
        stages = rule.stages_of_calls(median, self.calls, per_step)
        _, place = cells_of(self.noise_levels)
        choice = np.zeros((len(table.noise_levels), self.depth), dtype=np.int64)
        for cell, stage in zip(place, stages, strict=True):
            choice[cell] = [table.options.index(level) for level in levels_per_layer(rule.levels[stage], self.depth, self.settings)]
        ratios = ",".join(f"{ratio:g}" for ratio in rule.ratios)
        return Proposal(
            name=f"first {rule.first}, ratios {ratios}: {', '.join(map(title, rule.levels))}",
            kind=RULE,
            schedule=RuleSchedule(rule, table.schedule(choice)),
            steps=self.sampler.steps,
            predicted=table.predicted(choice),
            switches=tuple(map(tuple, switches)),
        )


def costs_with(costs: Costs, arch: Architecture, sampler: Sampler) -> Costs:
    """The costs of another sampler of the same model, per call as before."""
    return replace(costs, rows=tuple(sampler.rows_of_calls(arch)), noise_levels=tuple(sampler.noise_levels(arch)))
