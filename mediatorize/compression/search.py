"""The search for a schedule (design 5): propose candidates from the error table, judge them by samples, keep the best within a budget.

A *budget* is a share of the softmax sampler's cost. A *candidate* is a schedule: which model calls are computed, what stands in for the
others, and the levels of layers in computed calls. Solvers propose candidates by the errors that the table predicts. Samples from one set
of noise then judge them, and the search goes on from the best. Samples from another set of noise say what the chosen one and its baselines
are worth.

    sampler = Sampler.resolve(model.arch, steps=25)
    found = search(model, sampler, [0.4], costs_of("flops", model, sampler))
    latents = sample(model, labels, steps=25, schedule=found.outcomes[0].schedule)
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from itertools import groupby, pairwise, product
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mediatorize.compression.allocate import Choice, allocate, descend, joint_error
from mediatorize.compression.costs import COSTS, KINDS_OF_SAVING, Costs, bare_levels, median_seconds
from mediatorize.compression.paths import MEASURES, WINDOW, ForecastTable, bases, best_path, mean_square, neighbours, refined, uniform_path
from mediatorize.compression.rules import Rules
from mediatorize.compression.sensitivity import (
    ErrorTable,
    Probes,
    Products,
    Surrogates,
    adjoint_products,
    cells_of,
    error_table,
    forecast_table,
    latent_changes,
    peak_bytes_of_products,
    probe,
    shares,
    spread_labels,
)
from mediatorize.compression.store import InMemory, Kept, Store
from mediatorize.devices import ALONE, World
from mediatorize.diffusion.sampling import Drive, Sampler, driver_of, patterns, sample_batch, sample_many
from mediatorize.diffusion.switching import Switcher
from mediatorize.errors import UserError
from mediatorize.model import cost as closed_form
from mediatorize.model.architecture import Architecture
from mediatorize.model.levels import (
    LINEAR,
    ORDERS,
    SOFTMAX,
    Level,
    MediatorSettings,
    Part,
    Parts,
    is_pretrained,
    levels_per_layer,
    parts_of,
    title,
)
from mediatorize.model.schedule import AnySchedule, Call, CallSchedule, RuleSchedule, Schedule, SwitchRule, polynomial_weights
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.randomness import gaussian, seed_for

Per = Literal["cell", "step"]
"""A level for every noise level and layer, or one per noise level for all layers."""

DIRECTIONS = 4
"""Random directions per trajectory along which the change of a sample is followed."""

PAIRS = 3
"""Batches by the schedule and by softmax that a latency is the median of."""

EVALUATIONS = 8
"""How many times, for each budget, the best path so far is changed and measured again, unless more or fewer are asked for."""

AT_FIRST_SIGHT, FEWEST_TO_SPLIT, FINALISTS = 4, 16, 3
"""At first sight candidates are judged by one sample in four, where there are sixteen; then the best three for a budget by all."""

FAR = 10.0
"""What is predicted to err so many times as much as the best of a budget is not sampled, unless it is a baseline."""

MOST_OF_A_KIND = {"computed and forecast calls": 2, "forecasts of the model's output": 2, "forecasts of the guidance": 2}
"""Of these kinds so many are sampled for a budget, those of least predicted error, before the best is improved."""

MOST_RULES, MOST_TRIED = 1, 3
"""How many step-wise rules are judged for a budget, and how many are run on the trajectories to see whether they keep it."""

RULES_ALONE = 5
"""So many times as many where a rule is what was asked for."""

CATCHES_UP = 1.25
"""A path whose error is so many times the best one's is not improved. Moves of single calls seldom gain a tenth."""

SAMPLED, REPORTED = 12, 3
"""Roughly how many candidates a budget has at first sight, and in the report: for what a search will take."""

FLIPPED = 0.5
"""A sample whose relative error is above this has flipped to another one."""

WHOLE, RULE, PER_STEP, PER_CELL = "one level throughout", "latent-change rule", "a level per step", "a level per step and layer"
FEWER, UNIFORM, OUTPUTS, PATH = "fewer steps", "uniform forecasts", "forecasts of the model's output", "computed and forecast calls"
MIXED, DIFFERENCE = "forecasts with levels and surrogates", "forecasts of the guidance"
"""Kinds of candidates."""

NAMES = {UNIFORM: "uniform", OUTPUTS: "output, computed", PATH: "computed", MIXED: "with surrogates, computed"}
"""What candidates of a kind are called, before their computed calls."""

BASELINES = (WHOLE, FEWER, UNIFORM)
"""What one could do without a search."""


# --- progress ------------------------------------------------------------------------------------------------------------------


class Bar(Protocol):
    def update(self, n: int = 1) -> object:
        """Told of `n` units that are done."""


class NoBar:
    """Shows nothing."""

    def update(self, n: int = 1) -> None: ...


Progress = Callable[[int, str, str], AbstractContextManager[Bar]]
"""(units in all, what is done, what a unit is) -> a context that gives a bar."""


def silent(total: int, description: str, unit: str) -> AbstractContextManager[Bar]:
    """No progress is shown."""
    return nullcontext(NoBar())


# --- what is found -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Relative errors |sample - teacher's| / |teacher's| of single samples, summed up."""

    samples: int
    median: float
    mean: float
    geometric: float
    """The geometric mean: what candidates are compared by. Samples that flip to another mode do not rule it."""
    flipped: float
    """The share of samples whose error is above `FLIPPED`."""
    share: float | None = None
    """Of a step-wise rule: what these samples cost, as a share of the softmax sampler's."""

    @classmethod
    def of(cls, samples: Tensor, expected: Tensor) -> Errors:
        """Of samples (n, c, h, w)."""
        return cls.summed(relative_errors(samples, expected))

    @classmethod
    def summed(cls, errors: Tensor, share: float | None = None) -> Errors:
        """Of single samples' errors (n,)."""
        return cls(
            samples=len(errors),
            median=float(errors.median()),
            mean=float(errors.mean()),
            geometric=float(errors.clamp(min=1e-9).log().mean().exp()),
            flipped=float((errors > FLIPPED).float().mean()),
            share=share,
        )


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


def relative_errors(samples: Tensor, expected: Tensor) -> Tensor:
    """(n, c, h, w) each -> (n,): how far each sample is from the expected one, as a share of that one's norm."""
    return (samples - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1).clamp(min=1e-12)


def within(share: float, budget: float) -> bool:
    """Whether a share of softmax's cost keeps a budget, to rounding."""
    return share <= budget + 1e-12


@dataclass(frozen=True, kw_only=True)
class Candidate(Proposal):
    """A judged proposal, with its cost and its error."""

    share: float
    """Its cost, as a share of the softmax sampler's; a rule's is what it spent on the trajectories that it was tuned on."""
    measured: Errors | None = None
    """On the noise that the search judges by; None: it was not sampled."""

    @property
    def error(self) -> float:
        """The measured one where there is one."""
        return super().error if self.measured is None else self.measured.geometric

    def keeps(self, budget: float) -> bool:
        """Whether it costs no more; a rule also where it was judged, as a few trajectories alone can mislead."""
        judged = None if self.measured is None else self.measured.share
        return within(max(self.share, judged or 0.0), budget)


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Seconds of sampling one batch: predicted from single layers, and measured end to end."""

    batch: int
    predicted: float
    measured: float
    measured_softmax: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was chosen for one budget."""

    budget: float
    chosen: Candidate
    reported: Mapping[str, Errors]
    """Errors on noise that no choice was made by, by the name of the candidate: of the chosen one and of its baselines."""
    baselines: tuple[Candidate, ...]
    """The best of every kind of baseline within the budget."""
    solved_seconds: float
    """Time to propose candidates for this budget."""
    patterns: int | None
    """In how many ways blocks run by the schedule (`sampling.patterns`)."""
    latency: Latency | None = None

    @property
    def schedule(self) -> AnySchedule:
        return self.chosen.schedule


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """What a search found."""

    outcomes: tuple[Outcome, ...]
    """One per budget, in the order in which they were asked for."""
    candidates: tuple[Candidate, ...]
    table: ErrorTable
    table_seconds: float | None = None
    """Time to measure the error table; None if the store had it."""


# --- the search ----------------------------------------------------------------------------------------------------------------


def search(
    model: DiffusionTransformer,
    sampler: Sampler,
    budgets: Sequence[float],
    costs: Costs,
    *,
    kinds: Collection[str] = tuple(KINDS_OF_SAVING),
    per: Per = "cell",
    by_rule: bool = False,
    trajectories: int = 8,
    verify: int = 32,
    evaluations: int = EVALUATIONS,
    seconds: float | None = None,
    most_memory: float | None = None,
    most_patterns: int | None = None,
    batch: int = 32,
    timed: bool = False,
    store: Store | None = None,
    world: World = ALONE,
    progress: Progress = silent,
    facts: Mapping[str, Any] | None = None,
) -> Outcomes:
    """The schedules that change samples least within budgets.

    Args:
        model: converted, in eval mode.
        sampler: its seed decides all noise; the samples that errors are measured on differ from what it samples.
        budgets: shares of softmax's cost, in (0, 1].
        costs: of this model and sampler (`costs_of`).
        kinds: what may be spent less by: names in `KINDS_OF_SAVING`.
        per: "step" gives all layers of a noise level one level of mediators.
        by_rule: choose the best step-wise rule; the other candidates are for comparison.
        trajectories: of the teacher, that the error table is measured on.
        verify: samples that candidates are judged by; 0 trusts predictions.
        evaluations: for each budget, how many changes of the best candidate are measured.
        seconds: for each budget, the time after which no more are.
        most_memory: numbers per sample that a schedule may keep for its forecasts.
        most_patterns: ways that a schedule may run blocks in, each of which is compiled by itself. Rules are left out.
        batch: samples at a time.
        timed: also time whole batches by the chosen schedules.
        store: keeps what is measured; one that outlasts the process resumes the search.
        world: the processes that share the trajectories, the samples and the store (`stages.work.SharedWork`); all find the same.
        facts: kept with the error table.

    Raises:
        UserError: not even the cheapest schedule, or rule, keeps a budget.
    """
    begun = time.monotonic()
    store = InMemory() if store is None else store
    was_there = store.has("probes") and store.has("sensitivity")
    tables = measured_tables(model, samplers(sampler)[0], trajectories, batch, store, world, progress, facts)
    table_seconds = None if was_there else time.monotonic() - begun

    judge = Judge(model, costs, samplers(sampler)[1], verify, batch, store, world, progress)
    tuner = Tuner(model, costs, samplers(sampler)[0], trajectories, batch, store, world, progress)
    proposer = Proposer(model, sampler, costs, tables, kinds, per, most_memory, most_patterns)
    for level in model.added().levels:
        whole = proposer.whole(level)
        judge.add(whole, judge.samples if costs.share(whole.schedule) <= max(budgets) else judge.few)
    solved = {}
    for budget in budgets:
        begun = time.monotonic()
        proposals = list(proposer.within(budget))
        solved[budget] = time.monotonic() - begun
        least = min((proposal.error for proposal in proposals), default=float("inf"))
        far = float("inf") if by_rule else FAR * least
        if set(kinds) - {"forecasts"} and most_patterns is None:
            proposals += tuner.rules(proposer, budget, far, RULES_ALONE if by_rule else 1)
        judge.consider(proposals, budget, far)
        if by_rule:
            refuse_without_rule(judge, proposer, budget)
        if verify and "forecasts" in kinds:
            judge.improve(proposer, budget, evaluations, seconds)

    reporter = Judge(model, costs, samplers(sampler)[2], verify, batch, store, world, progress, at_once=True)
    outcomes = []
    for budget in budgets:
        best = judge.best(budget, per, kinds, by_rule)
        baselines = judge.baselines(budget)
        reported = {candidate.name: reporter.errors(candidate, verify) for candidate in (best, *baselines)} if verify else {}
        told: dict[str, Any] = {"reported": reported, "baselines": baselines, "solved_seconds": solved[budget]}
        told |= {"patterns": patterns(model, replace(sampler, steps=best.steps), best.schedule)}
        latency = latency_of(model, sampler, best, float(best.share * costs.softmax) * batch, batch) if timed else None
        outcomes.append(Outcome(budget=budget, chosen=best, latency=latency, **told))
    return Outcomes(outcomes=tuple(outcomes), candidates=tuple(judge.candidates), table=tables.errors, table_seconds=table_seconds)


def samplers(sampler: Sampler) -> tuple[Sampler, Sampler, Sampler]:
    """The sampler whose trajectories errors are measured on, the one that judges, and the one that reports: each with a seed of its own."""
    purposes = ("calibration", "held-out calibration", "reported calibration")
    measuring, judging, reporting = (replace(sampler, seed=seed_for(sampler.seed, purpose)) for purpose in purposes)
    return measuring, judging, reporting


def costs_of(unit: str, model: DiffusionTransformer, sampler: Sampler, batch: int = 32) -> Costs:
    """What the sampler costs by its schedule, in a unit of `COSTS`."""
    settings = model.added()
    return Costs(
        call=COSTS[unit].measure(model, settings, sampler.rows, batch),
        rows=tuple(sampler.rows_of_calls(model.arch)),
        noise_levels=tuple(sampler.noise_levels(model.arch)),
        depth=model.arch.depth,
        settings=settings,
    )


def surrogates_of(settings: MediatorSettings, kinds: Collection[str]) -> Surrogates:
    """What may stand in for sub-layers of converted layers in forecast calls."""
    if "forecasts" not in kinds:
        return Surrogates()
    return Surrogates(settings.levels if "mediators" in kinds else (), settings.mlp_levels if "mlps" in kinds else ())


def flops_of_search(
    arch: Architecture,
    settings: MediatorSettings,
    sampler: Sampler,
    *,
    trajectories: int,
    verify: int,
    budgets: Sequence[float],
    evaluations: int,
    by_rule: bool = False,
) -> float:
    """Roughly: probes (a walk back runs the call again), the table, rules, and whole samples of candidates. A backward counts as one
    forward: no weight has a gradient."""
    rows = sum(sampler.rows_of_calls(arch))
    converted = len(settings.converted(arch.depth)) / arch.depth
    tried = MOST_TRIED * RULES_ALONE if by_rule else 0
    table = 1 + DIRECTIONS + len(bare_levels(settings, KINDS_OF_SAVING)) / 2 * converted
    forwards = trajectories * (2 + DIRECTIONS + table + tried * sum(budgets))
    first = few_of(verify) / max(1, verify)
    of_budget = SAMPLED * first + FINALISTS * (1 - first) + evaluations * (first + (1 - first) / 4) + REPORTED
    samples = 2 + len(settings.levels) * first + of_budget * sum(budgets)
    return rows * (forwards + samples * verify) * closed_form.forward_flops(arch)


def peak_bytes_of_search(arch: Architecture, settings: MediatorSettings, sampler: Sampler, *, trajectories: int, batch: int) -> int:
    """Roughly the most memory that a search takes at a time, in float32: the model, and the pass back through one call (`in_parts`)."""
    rows = sampler.rows * min(trajectories, max(1, batch // sampler.rows))
    surrogates = surrogates_of(settings, KINDS_OF_SAVING)
    return 4 * closed_form.count_parameters(arch, settings) + peak_bytes_of_products(arch, settings, rows, DIRECTIONS, surrogates, WINDOW)


# --- measuring errors ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Tables:
    """What is known of a sampler's errors before anything is sampled with a schedule."""

    errors: ErrorTable
    """Of levels in computed calls."""
    calls: ForecastTable
    """Of forecasts of whole calls."""
    outputs: ForecastTable
    """Of forecasts of the model's output."""
    products: Products
    norms: Tensor
    """(n,) of the teacher's samples."""
    changes: Tensor
    """Of each sample's latents, from the beginning of each step to that of the next: (steps - 1, n)."""


def teacher_probes(
    model: DiffusionTransformer,
    sampler: Sampler,
    trajectories: int,
    batch: int,
    store: Store,
    world: World = ALONE,
    progress: Progress = silent,
) -> Probes:
    """The teacher's trajectories and what moves their ends."""
    labels = spread_labels(model.arch.classes, trajectories, sampler.seed)

    def of_part(rows: Tensor, on_call: Callable[[], object]) -> Probes:
        return probe(model, labels[rows], sampler, DIRECTIONS, int(rows[0]), on_call)

    def make() -> Kept:
        what, calls = "sampling the teacher", len(sampler.times())
        return Kept(vars(in_parts(Probes, "probes", of_part, trajectories, batch, calls, store, world, progress, what)))

    probes = Probes(**store.once("probes", make).tensors)
    store.drop("probes-*")
    return probes


Measured = TypeVar("Measured", Probes, Products)


def in_parts(
    kind: type[Measured],
    name: str,
    measure: Callable[[Tensor, Callable[[], object]], Measured],
    trajectories: int,
    batch: int,
    calls: int,
    store: Store,
    world: World,
    progress: Progress,
    what: str,
) -> Measured:
    """Something of all trajectories, measured part by part. Each part is kept as soon as it is measured; processes share them.

    Args:
        measure: takes the numbers of a part's trajectories, and what is called after each of its `calls` model calls.
        batch: the most trajectories of a part. There are at least as many parts as processes, where there are as many trajectories.
        what: is being done, for the progress bar.
    """
    parts = torch.arange(trajectories).tensor_split(max(-(-trajectories // batch), min(trajectories, world.size)))
    with progress(len(parts[world.rank :: world.size]) * calls, what, "call") as bar:

        def of_part(rows: Tensor) -> Kept:
            return Kept(vars(measure(rows, bar.update)))

        # Names say what is in a part: work that other processes, or another batch, left may be cut differently.
        makes = {f"{name}-{int(rows[0]):05d}-{len(rows):05d}": partial(of_part, rows) for rows in parts}
        return kind.joined([kind(**kept.tensors) for kept in store.each(makes)])


def measured_tables(
    model: DiffusionTransformer,
    sampler: Sampler,
    trajectories: int,
    batch: int,
    store: Store,
    world: World = ALONE,
    progress: Progress = silent,
    facts: Mapping[str, Any] | None = None,
) -> Tables:
    """The tables around the teacher. Every batch of trajectories is kept as soon as it is measured."""
    probes = teacher_probes(model, sampler, trajectories, batch, store, world, progress)
    settings, noise_levels = model.added(), sampler.noise_levels(model.arch)
    options = bare_levels(settings, KINDS_OF_SAVING)
    added = [level for level in options if not is_pretrained(level)]
    surrogates = surrogates_of(settings, KINDS_OF_SAVING)

    def of_part(rows: Tensor, on_call: Callable[[], object]) -> Products:
        return adjoint_products(model, sampler, probes, rows, added, surrogates, WINDOW, on_call)

    def make() -> Kept:
        at_once, what, calls = max(1, batch // sampler.rows), "measuring errors", len(noise_levels)
        found = in_parts(Products, "part", of_part, trajectories, at_once, calls, store, world, progress, what)
        return Kept(vars(found), facts or {})

    products = Products(**store.once("sensitivity", make).tensors)
    store.drop("part-*")
    levels = products.levels.new_zeros(*products.levels.shape[:2], len(options), *products.levels.shape[3:])
    levels[:, :, [options.index(level) for level in added]] = products.levels
    norms = probes.samples.flatten(1).norm(dim=1)
    return Tables(
        errors=error_table(levels, norms, noise_levels, options),
        calls=forecast_table(products.outputs.sum((2, 3, 4)), norms, noise_levels),
        outputs=forecast_table(products.model_outputs.sum(2), norms, noise_levels),
        products=replace(products, levels=levels),
        norms=norms,
        changes=latent_changes(probes.states[:: sampler.how.calls_per_step]),
    )


# --- candidates ----------------------------------------------------------------------------------------------------------------


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


class Tuner:
    """Runs step-wise rules on the trajectories that tables are of, to see what they really spend there."""

    def __init__(
        self,
        model: DiffusionTransformer,
        costs: Costs,
        sampler: Sampler,
        samples: int,
        batch: int,
        store: Store,
        world: World = ALONE,
        progress: Progress = silent,
    ) -> None:
        self.model, self.costs, self.sampler, self.batch = model, costs, sampler, batch
        self.store, self.world, self.progress = store, world, progress
        self.labels = spread_labels(model.arch.classes, samples, sampler.seed)

    def rules(self, proposer: Proposer, budget: float, far: float, times: int = 1) -> list[Proposal]:
        """The most promising rules that keep a budget.

        By the teacher's trajectories one knows about when a rule switches. The student's differ: where all that were tried spend more, the
        next ones are of less, by as much as those were over.

        Args:
            far: a predicted error. Where the best rule's is above it, that rule is not run: it switches as on the teacher's trajectories.
            times: so many times as many are tried and found.
        """
        room, found, tried = self.costs.room(budget), list[Proposal](), set[SwitchRule]()
        for best in proposer.rules.within(room)[:1]:
            proposal = proposer.by_rule(best.rule, proposer.rules.switches(best.rule))
            if proposal.error > far:
                return [replace(proposal, name=f"{proposal.name}, for {budget:.2%}")]
        while len(found) < MOST_RULES * times and len(tried) < MOST_TRIED * times:
            rules = [each for each in proposer.rules.within(room) if each.rule not in tried][: MOST_RULES * times]
            if not rules:
                break
            over: list[float] = []
            for each in rules[: MOST_TRIED * times - len(tried)]:
                tried.add(each.rule)
                switches = self.switches(each.rule)
                spent = self.costs.by_rule(each.rule, switches, self.sampler.how.calls_per_step)
                over.append(spent - each.cost)
                if spent <= self.costs.room(budget):
                    proposal = proposer.by_rule(each.rule, switches)
                    found.append(replace(proposal, name=f"{proposal.name}, for {budget:.2%}"))
            room = min(room, self.costs.room(budget) - max(0.0, min(over)))
        return found[: MOST_RULES * times]

    def switches(self, rule: SwitchRule) -> list[list[int]]:
        """By sample, the step that each stage but the first began with; -1: it never did."""

        def make() -> Kept:
            schedule = RuleSchedule(rule, Schedule((), ((rule.levels[0],) * self.model.arch.depth,)))
            with self.progress(self.world.count(len(self.labels)), "tuning the rule", "sample") as bar:
                switches = sample_by(self.model, self.labels, self.sampler, schedule, self.batch, self.world, bar.update)[1]
            return Kept({"switches": torch.tensor(switches)})

        key = hashlib.sha256(repr(rule).encode()).hexdigest()[:16]
        return self.store.once(f"rule-{key}", make).tensors["switches"].tolist()


def sample_by(
    model: DiffusionTransformer,
    labels: Tensor,
    sampler: Sampler,
    schedule: AnySchedule | Level,
    batch: int,
    world: World,
    on_samples: Callable[[int], object],
    first_index: int = 0,
) -> tuple[Tensor, list[list[int]]]:
    """`sample_many`, and where the schedule is a rule, the step that each stage but the first began with, by sample. Processes share the
    samples; all get all."""
    drives: list[Drive] = []

    def drive_of(count: int) -> Drive:
        drives.append(driver_of(model, sampler, schedule, count))
        return drives[-1]

    mine = world.share(len(labels))
    latents = torch.zeros(0, model.arch.channels, *model.arch.input_size)  # where there are more processes than samples
    if world.count(len(labels)):
        latents = sample_many(model, labels[mine], sampler, schedule, batch, on_samples, drive_of, first_index + mine.start)
    if not isinstance(schedule, RuleSchedule):
        return world.gather(latents), []
    none = torch.zeros(0, len(schedule.rule.ratios), dtype=torch.long)
    switches = torch.cat([none, *(drive.switches for drive in drives if isinstance(drive, Switcher))])
    return world.gather(latents), world.gather(switches).tolist()


def few_of(samples: int) -> int:
    """How many of so many samples candidates are judged by at first sight."""
    return samples if samples < FEWEST_TO_SPLIT else samples // AT_FIRST_SIGHT


def refuse_without_rule(judge: Judge, proposer: Proposer, budget: float) -> None:
    """An error where no rule keeps a budget: it says what rules can reach."""
    if any(candidate.kind == RULE and within(candidate.share, budget) for candidate in judge.candidates):
        return
    reach = proposer.rules.range
    if reach is None:
        raise UserError(f"In {proposer.sampler.steps} steps there is no time for a rule to switch.", hint="Pass --steps 4 or more.")
    least, most = (float(cost / proposer.costs.softmax) for cost in reach)
    raise UserError(
        f"No rule was found for a budget of {budget:.1%}: on these trajectories rules spend {least:.1%} to {most:.1%}.",
        hint="Pass a larger --budget, or leave --rule out.",
    )


class Judge:
    """Measures the errors of candidates on one set of noise. What the store has for as many samples is not measured again.

    At first sight a candidate is judged by one sample in `AT_FIRST_SIGHT`; only those that look best are judged by the others too.
    """

    def __init__(
        self,
        model: DiffusionTransformer,
        costs: Costs,
        sampler: Sampler,
        samples: int,
        batch: int,
        store: Store,
        world: World = ALONE,
        progress: Progress = silent,
        at_once: bool = False,
    ) -> None:
        """
        Args:
            at_once: judge by all samples in one go, with no first sight.
        """
        self.model, self.costs, self.sampler = model, costs, sampler
        self.samples, self.batch, self.store, self.world, self.progress = samples, batch, store, world, progress
        self.few = samples if at_once else few_of(samples)
        self.labels = spread_labels(model.arch.classes, samples, sampler.seed)
        self.candidates: list[Candidate] = []

    def consider(self, proposals: Sequence[Proposal], budget: float, far: float) -> None:
        """Judges proposals for a budget at first sight, by few samples, and then the best of them by all.

        Args:
            far: a predicted error. What is above it is not sampled, unless it is a baseline.
        """
        sampled: list[Proposal] = []
        for proposal in sorted(proposals, key=lambda each: each.error):
            alike = sum(each.kind == proposal.kind for each in sampled)
            near = proposal.error <= far and alike < MOST_OF_A_KIND.get(proposal.kind, len(proposals))
            sampled += [proposal] if near or proposal.kind in BASELINES else []
        seen = [self.add(proposal, self.few if proposal in sampled else 0) for proposal in proposals]
        judged = [candidate for candidate in seen if candidate.measured is not None]
        for candidate in sorted(judged, key=lambda candidate: (not candidate.keeps(budget), candidate.error))[:FINALISTS]:
            self.add(candidate, self.samples)

    def add(self, proposal: Proposal, samples: int) -> Candidate:
        """Judges a proposal by the first so many samples, unless one that does the same was judged by as many."""
        alike = [c for c in self.candidates if c.kind == proposal.kind and c.schedule == proposal.schedule]
        for candidate in alike:
            if samples <= (0 if candidate.measured is None else candidate.measured.samples):
                return candidate
            self.candidates.remove(candidate)
        costs = costs_with(self.costs, self.model.arch, replace(self.sampler, steps=proposal.steps))
        judged = Candidate(
            **{each.name: getattr(proposal, each.name) for each in fields(Proposal)},
            share=float(self._spent(proposal.schedule, proposal.switches, costs) / self.costs.softmax),
            measured=self.errors(proposal, samples) if samples else None,
        )
        self.candidates.append(judged)
        return judged

    def errors(self, proposal: Proposal, samples: int) -> Errors:
        """Of the first so many samples by the proposal's schedule, against the teacher's from the same noise."""
        content = json.dumps([proposal.steps, proposal.schedule.to_json()])
        key = hashlib.sha256(content.encode()).hexdigest()[:16]
        errors, shares = list[float](), list[float]()
        for rows in filter(None, (range(self.few), range(self.few, samples))):
            group = f"errors-{rows.start}-{rows.stop}-{self.sampler.seed}"
            known = self.store.numbers(group, key, partial(self._measure, proposal, rows))
            errors += known[: len(rows)]
            shares += known[len(rows) :]
        return Errors.summed(torch.tensor(errors, dtype=torch.float64), statistics.fmean(shares) if shares else None)

    def _measure(self, proposal: Proposal, rows: range) -> list[float]:
        """Errors of samples by a proposal's schedule; after them, of a rule's, their costs as shares of the softmax sampler's."""
        drawn, switches = self._sample(proposal.name, proposal.schedule, proposal.steps, rows)
        softmax = self.costs.softmax
        shares = [float(self._spent(proposal.schedule, [each], self.costs) / softmax) for each in switches]
        return [*relative_errors(drawn, self._teacher[rows.start : rows.stop]).tolist(), *shares]

    def _spent(self, schedule: AnySchedule, switches: Sequence[Sequence[int]], costs: Costs) -> Any:
        """What a schedule costs; a rule, where its samples switched so."""
        if isinstance(schedule, RuleSchedule):
            return costs.by_rule(schedule.rule, switches, self.sampler.how.calls_per_step)
        return costs.of(schedule)

    def improve(self, proposer: Proposer, budget: float, evaluations: int, seconds: float | None) -> None:
        """Goes on from the best path within a budget: one computed call at a time moves, and what measures better is kept.

        Nothing is done where another kind is so far ahead that no path will catch up.
        """
        room, begun = self.costs.room(budget), time.monotonic()
        paths = [c for c in self.candidates if c.path and c.kind != UNIFORM and c.keeps(budget) and self._whole(c)]
        if not paths:
            return
        best, seen = min(paths, key=lambda candidate: candidate.error), {candidate.path for candidate in paths}
        if best.error > CATCHES_UP * min(c.error for c in self.candidates if c.keeps(budget) and self._whole(c)):
            return
        for _ in range(evaluations):
            if seconds is not None and self.world.as_first(time.monotonic() - begun) > seconds:
                return
            near = [path for path in proposer.neighbours(best, room) if path not in seen]
            if not near:
                return
            seen.add(near[0])
            moved = proposer.along(best.kind, near[0], room)
            if self.costs.of(moved.schedule) > room or not proposer.allows(moved.schedule):
                continue
            named = replace(moved, name=f"{moved.name}, moved, for {budget:.2%}")
            if self.add(named, self.few).error < self.errors(best, self.few).geometric:
                best = min(best, self.add(named, self.samples), key=lambda candidate: candidate.error)

    def best(self, budget: float, per: Per = "cell", kinds: Collection[str] = tuple(KINDS_OF_SAVING), by_rule: bool = False) -> Candidate:
        """The candidate of least error within a budget, or the rule; of a smaller budget's too, should they be better."""
        whole = [c for c in self.candidates if self._whole(c) and (c.kind == RULE or not by_rule)]
        fitting = [c for c in whole if c.keeps(budget)]
        if by_rule and not fitting:  # those that keep it where they were tuned
            fitting = [c for c in whole if within(c.share, budget)]
        if "mediators" not in kinds:
            fitting = [c for c in fitting if c.kind != WHOLE]
        if per == "step":
            fitting = [c for c in fitting if c.kind not in (PER_CELL, MIXED)]
        if "forecasts" not in kinds:  # what is asked for is a schedule of this sampler
            fitting = [c for c in fitting if c.kind != FEWER] or fitting
        if not fitting:
            raise UserError(f"No schedule was found for a budget of {budget:.2%}.", hint="Pass a larger --budget, or more --kinds.")
        return min(fitting, key=lambda candidate: (candidate.error, candidate.share))

    def _whole(self, candidate: Candidate) -> bool:
        """Whether it was judged by all samples, not at first sight alone."""
        return self.samples == (0 if candidate.measured is None else candidate.measured.samples)

    def baselines(self, budget: float) -> tuple[Candidate, ...]:
        """The best candidate within a budget of every kind of baseline that has one."""
        found = []
        for kind in BASELINES:
            fitting = [c for c in self.candidates if c.kind == kind and c.keeps(budget)]
            found += [min(fitting, key=lambda candidate: candidate.error)] if fitting else []
        return tuple(found)

    @cached_property
    def _teacher(self) -> Tensor:
        return self._sample("held-out teacher", SOFTMAX, self.sampler.steps, range(self.samples))[0]

    def _sample(self, description: str, schedule: AnySchedule | Level, steps: int, rows: range) -> tuple[Tensor, list[list[int]]]:
        """Samples (n, c, h, w) of those numbers, and when each switched, where the schedule is a rule."""
        how, labels = replace(self.sampler, steps=steps), self.labels[rows.start : rows.stop]
        with self.progress(self.world.count(len(rows)), description, "sample") as bar:
            return sample_by(self.model, labels, how, schedule, self.batch, self.world, bar.update, rows.start)


def latency_of(model: DiffusionTransformer, sampler: Sampler, candidate: Candidate, predicted: float, batch: int) -> Latency:
    """Times whole batches, by the schedule and by softmax in turn, so that other load hits both."""
    where = next(model.parameters()).device
    labels = torch.zeros(batch, dtype=torch.long)
    noise = gaussian(sampler.seed, "initial noise", range(batch), (model.arch.channels, *model.arch.input_size))
    runs: tuple[tuple[Sampler, AnySchedule | Level], ...] = (
        (replace(sampler, steps=candidate.steps), candidate.schedule),
        (sampler, SOFTMAX),
    )
    times = [
        [median_seconds(partial(sample_batch, model, labels, how, levels, noise=noise), where, 1) for how, levels in runs]
        for _ in range(PAIRS)
    ]
    measured, softmax = (statistics.median(column) for column in zip(*times, strict=True))
    return Latency(batch=batch, predicted=predicted, measured=measured, measured_softmax=softmax)
