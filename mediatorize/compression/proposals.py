"""Proposals of schedules within a budget, by what the error tables predict (design 5). Nothing is sampled here.

A *budget* is a share of the softmax sampler's cost. A proposal says which model calls are computed, what stands in for the others, and the
levels of layers in computed calls. A *path* is the computed calls of a proposal, in order.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import groupby, pairwise, product
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mediatorize.compression.allocate import Choice, allocate, descend, joint_error
from mediatorize.compression.costs import KINDS_OF_SAVING, Costs, bare_levels
from mediatorize.compression.paths import MEASURES, bases, best_path, mean_square, neighbours, refined, uniform_path
from mediatorize.compression.rules import Rules
from mediatorize.compression.sensitivity import cells_of, forecast_table, shares
from mediatorize.compression.tables import Tables, surrogates_of
from mediatorize.diffusion.sampling import Sampler, patterns
from mediatorize.model.architecture import Architecture
from mediatorize.model.levels import LINEAR, ORDERS, SOFTMAX, Level, Part, Parts, levels_per_layer, parts_of, title
from mediatorize.model.schedule import AnySchedule, Call, CallSchedule, RuleSchedule, Schedule, SwitchRule, polynomial_weights
from mediatorize.model.transformer import DiffusionTransformer

Per = Literal["cell", "step"]
"""A level for every noise level and layer, or one per noise level for all layers."""

WHOLE, RULE, PER_STEP, PER_CELL = "one level throughout", "latent-change rule", "a level per step", "a level per step and layer"
FEWER, UNIFORM, OUTPUTS, PATH = "fewer steps", "uniform forecasts", "forecasts of the model's output", "computed and forecast calls"
MIXED, DIFFERENCE = "forecasts with levels and surrogates", "forecasts of the guidance"
"""Kinds of candidates."""

NAMES = {UNIFORM: "uniform", OUTPUTS: "output, computed", PATH: "computed", MIXED: "with surrogates, computed"}
"""What candidates of a kind are called, before their computed calls."""

BASELINES = (WHOLE, FEWER, UNIFORM)
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
    path: tuple[int, ...] = ()
    """The computed calls, where others are forecast."""
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

    def __init__(
        self,
        model: DiffusionTransformer,
        sampler: Sampler,
        costs: Costs,
        tables: Tables,
        kinds: Collection[str],
        per: Per = "cell",
        most_memory: float | None = None,
        most_patterns: int | None = None,
    ) -> None:
        self.model, self.sampler, self.costs, self.tables, self.kinds, self.per = model, sampler, costs, tables, kinds, per
        self.most_memory, self.most_patterns = most_memory, most_patterns
        self.noise_levels = tuple(sampler.noise_levels(model.arch))
        self.settings, self.depth = model.added(), model.arch.depth
        self.calls = len(self.noise_levels)

    def within(self, budget: float) -> Iterator[Proposal]:
        """Proposals for a budget, baselines among them."""
        room, named = self.costs.room(budget), f", for {budget:.2%}"
        found: list[Proposal] = []
        if (fewer := self.fewer_steps(room)) is not None:
            found.append(fewer)
        if set(self.kinds) - {"forecasts"}:
            found += self.levels(room)
        if "forecasts" in self.kinds:
            found += self.paths(room)
        for proposal in found:
            if self.allows(proposal.schedule):
                yield replace(proposal, name=proposal.name + named)

    def allows(self, schedule: AnySchedule) -> bool:
        """Whether a schedule keeps the limits of memory and of patterns."""
        sampler, most = self.sampler, self.most_memory
        kept = 0 if most is None else sampler.memory_numbers(self.model.arch, schedule, self.settings)
        return (most is None or kept <= most) and not self._too_many_patterns(schedule)

    def _too_many_patterns(self, schedule: AnySchedule) -> bool:
        return self.most_patterns is not None and (patterns(self.model, self.sampler, schedule) or 0) > self.most_patterns

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
                noise_levels = tuple(other.noise_levels(self.model.arch))
                schedule = CallSchedule(noise_levels, (Call((SOFTMAX,) * self.depth),) * len(noise_levels))
                return Proposal(name=f"{steps} steps", kind=FEWER, schedule=schedule, steps=steps)
        return None

    # levels in computed calls alone

    def levels(self, room: Any, without: frozenset[Level] = frozenset()) -> list[Proposal]:
        """Levels by noise level and layer, and by step.

        Where forecasts may not be used, errors are added up in several more ways: those take long, and do not come near forecasts.

        Args:
            without: levels that may not be used.
        """
        alone = "forecasts" not in self.kinds
        table, squares = self.tables.errors, self.tables.errors.squares()
        cells, place = cells_of(self.noise_levels)
        usable = set(bare_levels(self.settings, self.kinds)) - without
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
        chosen: list[tuple[str, str, Choice]] = []
        if self.per == "cell":
            start = allocate(squares, costs, left)
            chosen.append(("sum of squares", PER_CELL, start))
            ways = (("sum of vectors per layer", True), ("sum of vectors", False))
            chosen += [(name, PER_CELL, descend(products, costs, left, start, apart=apart)) for name, apart in ways if alone]
        steps = allocate(squares, costs, left, per_step=True)
        chosen.append(("per step, sum of squares", PER_STEP, steps))
        if alone:
            chosen.append(("per step, sum of vectors", PER_STEP, descend(products, costs, left, steps, apart=True, per_step=True)))
        how: dict[str, Any] = {"steps": self.sampler.steps}
        layers = np.arange(self.depth)
        kept = [(name, kind, np.where(offered[layers, choice], choice, softmax)) for name, kind, choice in chosen]
        proposals = [
            Proposal(name=name, kind=kind, schedule=table.schedule(choice), predicted=table.predicted(choice), **how)
            for name, kind, choice in kept
        ]
        if not any(self._too_many_patterns(proposal.schedule) for proposal in proposals):
            return proposals
        rarest = _rarest(table.options[option] for _, _, choice in kept for option in choice.flat)
        fewer = [] if rarest is None else self.levels(room, without | {rarest})
        return [proposal for proposal in proposals if self.allows(proposal.schedule)] + fewer

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

    # computed and forecast calls

    def paths(self, room: Any) -> list[Proposal]:
        """Computed calls in several places, uniform ones and forecasts of the model's output among them."""
        found: list[Proposal] = []
        if (uniform := self._largest(room, partial(uniform_path, self.calls))) is not None:
            found.append(self.along(UNIFORM, uniform, room))
        for kind, table in ((PATH, self.tables.calls), (OUTPUTS, self.tables.outputs)):
            seen: set[tuple[int, ...]] = set()
            for measure in MEASURES.values():
                errors = table.errors(measure)
                for lead in (1, 2, 3) if kind == PATH else (1,):
                    errors[1:lead] = np.inf  # the first calls are computed
                    path = self._largest(room, partial(best_path, errors), kind)
                    if path is not None:
                        seen |= {path, refined(table, path, mean_square)} if lead == 1 else {path}
            found += [self.along(kind, path, room) for path in sorted(seen) if self._fits(kind, path, room)]
        if min(self.costs.rows) == 2:
            found += self._guidance(room)
        if len(self.kinds) > 1:
            found += [self.along(MIXED, path, room) for path in self._other_counts(room)]
        return [proposal for proposal in found if self.costs.of(proposal.schedule) <= room]

    def along(self, kind: str, path: tuple[int, ...], room: Any) -> Proposal:
        """A proposal of a kind with these computed calls."""
        how: dict[str, Any] = {"kind": kind, "steps": self.sampler.steps, "path": path}
        table = self.tables.outputs if kind == OUTPUTS else self.tables.calls
        name = f"{NAMES[kind]} {_in_short(path)}"
        if kind == MIXED:
            return self._filled(path, room, name, how)
        predicted = {"vectors": mean_square(table.joint(path)) ** 0.5} if table.reaches(path) else {}
        return Proposal(name=name, schedule=self._plain(kind, path), predicted=predicted, **how)

    def neighbours(self, candidate: Proposal, room: Any) -> list[tuple[int, ...]]:
        """Paths near a candidate's, within the budget, the most promising first."""
        table = self.tables.outputs if candidate.kind == OUTPUTS else self.tables.calls
        plain = OUTPUTS if candidate.kind == OUTPUTS else PATH
        near = [path for path in neighbours(candidate.path, self.calls) if table.reaches(path)]
        near = [path for path in near if candidate.kind == MIXED or self._fits(plain, path, room)]
        return sorted(near, key=lambda path: mean_square(table.joint(path)))

    def _plain(self, kind: str, path: Sequence[int]) -> CallSchedule:
        resting: tuple[Level, ...] = () if kind == OUTPUTS else (LINEAR,) * self.depth
        computed = set(path)
        calls = tuple(Call((SOFTMAX,) * self.depth if call in computed else resting) for call in range(self.calls))
        return CallSchedule(self.noise_levels, calls)

    def _fits(self, kind: str, path: Sequence[int], room: Any) -> bool:
        return bool(self.costs.of(self._plain(kind, path)) <= room)

    def _largest(self, room: Any, path_of: Callable[[int], tuple[int, ...] | None], kind: str = PATH) -> tuple[int, ...] | None:
        """The path of most computed calls within the budget."""
        for count in range(self._most(room), 0, -1):
            path = path_of(count)
            if path is not None and self._fits(kind, path, room):
                return path
        return None

    def _most(self, room: Any) -> int:
        """At least as many computed calls as fit."""
        least_rows = min(self.costs.rows)
        one = (self.costs.call.rest + self.depth * self.costs.call.block(SOFTMAX)) * least_rows
        return min(self.calls - 1, int(room / one))

    # the unconditional half apart

    def _guidance(self, room: Any) -> list[Proposal]:
        """More computed calls than fit, some of which compute the conditional half alone: the halves' difference is forecast there.

        Where the whole call is forecast, each half rests on its own computed calls. Halves are dropped one at a time, each time the one
        whose loss does least.
        """
        norms, noise_levels = self.tables.norms, self.noise_levels
        halves = [forecast_table(self.tables.products.outputs.sum((2, 3))[:, :, side], norms, noise_levels) for side in (0, 1)]
        difference = forecast_table(self.tables.products.differences, norms, noise_levels)
        places = difference.places
        errors = self.tables.calls.errors(mean_square)
        most = len(self._largest(room, partial(best_path, errors)) or (0,))
        found = []
        for count in sorted({most + 1, most + max(2, most // 4), most + max(3, most // 2)}):
            path = best_path(errors, count) if count < self.calls else None
            if path is None:
                continue
            path = refined(self.tables.calls, path, mean_square)
            both = list(path)

            def joint(both: Sequence[int], path: tuple[int, ...] = path) -> float:
                if not all(table.reaches(known) for table, known in ((halves[0], path), (halves[1], both), (difference, both))):
                    return float("inf")
                resting, own = bases(path, places), bases(both, places)
                total = np.zeros(difference.products.shape[2:])
                for call, basis in resting.items():
                    total += halves[0].effect(call, basis) + halves[1].effect(call, own[call])
                for call in set(path) - set(both):
                    total -= difference.effect(call, own[call])
                return mean_square(total)

            while len(both) > 1 and self.costs.of(self._halved(path, both)) > room:
                without = [[call for call in both if call != dropped] for dropped in both[1:]]
                both = min(without, key=joint)
            schedule = self._halved(path, both)
            if self.costs.of(schedule) <= room and joint(both) < float("inf"):
                name = f"computed {_in_short(path)}, of which {len(path) - len(both)} without the unconditional half"
                how: dict[str, Any] = {"kind": DIFFERENCE, "steps": self.sampler.steps, "predicted": {"vectors": joint(both) ** 0.5}}
                found.append(Proposal(name=name, schedule=schedule, **how))
        return found

    def _halved(self, path: Sequence[int], both: Sequence[int]) -> CallSchedule:
        """Computed calls of a path, without the unconditional half where it is not in `both`."""
        whole, resting = (SOFTMAX,) * self.depth, (LINEAR,) * self.depth
        calls = [Call(resting) if call not in path else Call(whole, None if call in both else ()) for call in range(self.calls)]
        return CallSchedule(self.noise_levels, tuple(calls))

    # levels and surrogates between computed calls

    def _other_counts(self, room: Any) -> list[tuple[int, ...]]:
        """Paths with as many computed calls as fit, with one fewer, which leaves room for surrogates, and with one or two more, which must
        then run at cheaper levels."""
        errors = self.tables.calls.errors(mean_square)
        most = len(self._largest(room, partial(best_path, errors)) or (0,))
        counts = [count for count in range(most - 1, most + 3) if 1 <= count < self.calls]
        paths = [path for count in counts if (path := best_path(errors, count)) is not None]
        return list(dict.fromkeys(refined(self.tables.calls, path, mean_square) for path in paths))

    def _filled(
        self, path: tuple[int, ...], room: Any, name: str, how: dict[str, Any], without: frozenset[Level] = frozenset()
    ) -> Proposal:
        """Levels at the computed calls and surrogates at the others, by an exact allocation under what the budget leaves.

        Squares of errors are added up: with as many options as these, few probes would let vectors cancel that do not.

        Args:
            without: levels that may not be used.
        """
        options, products = self._options(path)
        computed = set(path)
        plain_places = options[0].index(LINEAR), options[1].index(SOFTMAX)
        usable = [
            [plain if level in without else place for place, level in enumerate(levels)]
            for levels, plain in zip(options, plain_places, strict=True)
        ]
        options = [options[0][place] for place in usable[0]], [options[1][place] for place in usable[1]]
        products = np.stack([row[:, usable[call in computed]] for call, row in enumerate(products)])
        plain = Proposal(name=name, schedule=self._plain(PATH, path), **how)
        resting, bare = (
            [[self.costs.call.block(self.settings.level_of(layer, level)) for level in levels] for layer in range(self.depth)]
            for levels in options
        )  # (layers, options)
        one: NDArray[Any] = np.array([bare if call in computed else resting for call in range(self.calls)])
        costs = one * np.array(self.costs.rows)[:, None, None]
        left = room - sum(self.costs.rows) * self.costs.call.rest
        squares = np.square(products).sum(-1)
        for _ in range(8):
            if costs.min(2).sum() > left:
                return plain
            choice = allocate(squares, costs, left)
            schedule = self._chosen(choice, options, computed)
            over = self.costs.of(schedule) - room
            if over <= 0 and self._too_many_patterns(schedule):
                rarest = _rarest(options[call in computed][option] for call, row in enumerate(choice) for option in row)
                return plain if rarest is None else self._filled(path, room, name, how, without | {rarest})
            if over <= 0:
                error = joint_error(products, choice) ** 0.5
                return replace(plain, schedule=schedule, predicted={"vectors": error})
            left -= over  # surrogates run at computed calls too, which no cell counts
        return plain

    def _chosen(self, choice: Choice, options: tuple[list[Level], list[Level]], computed: Collection[int]) -> CallSchedule:
        calls = []
        for call, row in enumerate(choice):
            names = options[call in computed]
            calls.append(Call(tuple(self.settings.level_of(layer, names[option]) for layer, option in enumerate(row))))
        return CallSchedule(self.noise_levels, tuple(calls))

    def _options(self, path: tuple[int, ...]) -> tuple[tuple[list[Level], list[Level]], NDArray[np.float64]]:
        """Levels at forecast calls and at computed ones, as many of each, and what they do: (calls, layers, options, n * k).

        In a layer that is not converted they do what `MediatorSettings.level_of` makes of them.
        """
        found, norms, places = self.tables.products, self.tables.norms, self.tables.calls.places
        all_surrogates, surrogates = (surrogates_of(self.settings, kinds) for kinds in (KINDS_OF_SAVING, self.kinds))
        converted = list(self.settings.converted(self.depth))
        resting = [
            Parts(Part(attention, ORDERS[LINEAR]), Part(mlp, ORDERS[LINEAR])).level
            for attention, mlp in product((None, *surrogates.attention), (None, *surrogates.mlp))
        ]
        bare = bare_levels(self.settings, self.kinds)
        size = max(len(resting), len(bare))
        options = (resting + resting[:1] * (size - len(resting)), bare + [SOFTMAX] * (size - len(bare)))
        of_levels = {level: index for index, level in enumerate(self.tables.errors.options)}
        of_surrogates = {level: index for index, level in enumerate([*all_surrogates.attention, *all_surrogates.mlp])}
        outputs, stand_ins = shares(found.outputs, norms).sum(-3), shares(found.surrogates, norms).sum(-3)  # halves add up
        whole = torch.zeros(self.calls, self.depth, size, *outputs.shape[-2:], dtype=torch.float64)
        resting_on = bases(path, places)
        for call in range(self.calls):
            if call not in resting_on:
                levels = shares(found.levels[call], norms)
                for place, level in enumerate(options[1]):
                    whole[call, :, place] += levels[:, of_levels[level]]
                continue
            basis = resting_on[call]
            weights = polynomial_weights([places[index] for index in basis], places[call])
            for weight, index in zip(weights, basis, strict=True):  # a forecast repeats what a level does to the calls that it rests on
                for place, level in enumerate(options[1]):
                    parts = parts_of(level)
                    for side, runs in enumerate((parts.attention.runs, parts.mlp.runs)):
                        if runs in of_surrogates:
                            change = stand_ins[call, call - index, :, of_surrogates[runs]] - outputs[call, call - index, :, side]
                            whole[index, converted, place] += weight * change[converted]

            def left_out(values: Tensor) -> Tensor:  # (back, layers, parts, n, k) -> (layers, parts, n, k)
                return sum(weight * values[call - index] for weight, index in zip(weights, basis, strict=True)) - values[0]  # noqa: B023

            rest, gained = left_out(outputs[call]), left_out(stand_ins[call])
            for place, (attention, mlp) in enumerate(product((None, *surrogates.attention), (None, *surrogates.mlp))):
                effect = rest.sum(1)
                for surrogate in (attention, mlp):
                    if surrogate is not None:
                        effect = effect - gained[:, of_surrogates[surrogate]]
                whole[call, :, place] = effect
            whole[call, :, len(resting) :] = whole[call, :, :1]
        return options, (whole.flatten(3) / (whole.shape[-2] * whole.shape[-1]) ** 0.5).numpy()


def _rarest(levels: Iterable[Level]) -> Level | None:
    """The level that is there least often, the pretrained one and the plain forecast aside."""
    counts = Counter(level for level in levels if level not in (SOFTMAX, LINEAR))
    return min(counts, key=lambda level: counts[level], default=None)


def _in_short(path: Sequence[int]) -> str:
    """The computed calls as steps of the same length: `1 +4x3 +5` is 1, 5, 9, 13, 18."""
    parts, steps = [str(path[0] + 1)], [after - before for before, after in pairwise(path)]
    for step, those in groupby(steps):
        count = len(list(those))
        parts.append(f"+{step}" + (f"x{count}" if count > 1 else ""))
    return " ".join(parts)


def costs_with(costs: Costs, arch: Architecture, sampler: Sampler) -> Costs:
    """The costs of another sampler of the same model, per call as before."""
    return replace(costs, rows=tuple(sampler.rows_of_calls(arch)), noise_levels=tuple(sampler.noise_levels(arch)))
