"""The search for a schedule (design 5): propose candidates from the error table, judge them by samples, keep the best within a budget.

A *budget* is a share of the softmax sampler's cost. A *candidate* is a choice of one level for every noise level and layer. Solvers propose
candidates by the errors that the table predicts. Errors of many layers do not quite add up, so samples from held-out noise then judge them.

    sampler = Sampler.resolve(model.arch, steps=25)
    found = search(model, sampler, [0.75], costs_of("flops", model, sampler))
    latents = sample(model, labels, steps=25, schedule=found.outcomes[0].schedule)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from mediatorize.compression.allocate import Choice, allocate, descend, latent_change_rule
from mediatorize.compression.costs import COSTS, Costs, median_seconds
from mediatorize.compression.sensitivity import (
    ErrorTable,
    Probes,
    cells_of,
    error_table,
    latent_changes,
    probe_all,
    products_of_call,
    spread_labels,
)
from mediatorize.compression.store import InMemory, Kept, Store
from mediatorize.diffusion.sampling import Sampler, sample_batch, sample_many
from mediatorize.model import cost as closed_form
from mediatorize.model.architecture import Architecture
from mediatorize.model.levels import SOFTMAX, Level, MediatorSettings, is_pretrained, title
from mediatorize.model.schedule import Schedule
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.randomness import gaussian, seed_for

Per = Literal["cell", "step"]
"""A level for every noise level and layer, or one per noise level for all layers."""

DIRECTIONS = 4
"""Random directions per trajectory along which the change of a sample is followed."""

PAIRS = 3
"""Batches by the schedule and by softmax that a latency is the median of."""

WHOLE, RULE, PER_STEP, PER_CELL = "one level throughout", "latent-change rule", "a level per step", "a level per step and layer"
"""Kinds of candidates."""


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
class Proposal:
    """A choice of levels, and where it comes from."""

    name: str
    kind: str
    """One of the kinds above."""
    choice: Choice
    """(cells, layers): indices into the table's options."""
    remeasured: bool = False
    """Whether errors were measured again, around an earlier candidate, to find it."""


@dataclass(frozen=True, kw_only=True)
class Candidate(Proposal):
    """A judged proposal, with its cost and its error."""

    share: float
    """Its cost, as a share of the softmax sampler's."""
    per_step: bool
    """Whether every noise level has one level for all layers."""
    predicted: dict[str, float]
    """Predicted sample error, for each way of adding up the errors of single cells (`ErrorTable.predicted`)."""
    measured: float | None = None
    """|sample - teacher's| / |teacher's| from held-out noise."""

    @property
    def error(self) -> float:
        return self.predicted["vectors"] if self.measured is None else self.measured


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
    schedule: Schedule
    solved_seconds: float
    """Time to propose candidates for this budget."""
    latency: Latency | None = None


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
    per: Per = "cell",
    trajectories: int = 32,
    verify: int = 64,
    rounds: int = 0,
    batch: int = 32,
    timed: bool = False,
    store: Store | None = None,
    progress: Progress = silent,
    facts: Mapping[str, Any] | None = None,
) -> Outcomes:
    """The schedules that change samples least within budgets.

    Args:
        model: converted, in eval mode.
        sampler: its seed decides all noise; the samples that errors are measured on and the held-out ones differ from what it samples.
        budgets: shares of softmax's cost, in (0, 1].
        costs: of this model and sampler (`costs_of`).
        per: "step" gives all layers of a noise level one level.
        trajectories: of the teacher, that the error table is measured on.
        verify: held-out samples that candidates are judged by; 0 trusts predictions.
        rounds: how many times errors are measured again around the best candidate.
        batch: samples at a time.
        timed: also time whole batches by the chosen schedules.
        store: keeps what is measured; one that outlasts the process resumes the search.
        facts: kept with the error table.

    Raises:
        UserError: not even the cheapest levels keep a budget.
    """
    begun = time.monotonic()
    store = InMemory() if store is None else store
    measuring, held_out = samplers(sampler)
    was_there = store.has("probes") and store.has("sensitivity")
    probes = teacher_probes(model, measuring, trajectories, batch, store, progress)
    table = teacher_table(model, measuring, probes, batch, store, progress, facts)
    table_seconds = None if was_there else time.monotonic() - begun

    judge = Judge(model, table, costs, held_out, verify, batch, store, progress)
    for option, level in enumerate(table.options):
        if not is_pretrained(level):
            judge.add(Proposal(name=title(level), kind=WHOLE, choice=np.full(costs.cells.shape[:2], option)))
    changes = changes_of_cells(probes, measuring.noise_levels(model.arch))
    solved = {}
    for budget in budgets:
        begun, room = time.monotonic(), costs.room(budget)
        proposals = solutions(table, changes, costs, room, per)
        solved[budget] = time.monotonic() - begun
        for proposal in proposals:
            judge.add(replace(proposal, name=f"{proposal.name}, {budget:.2%}"))
        for turn in range(rounds):
            present = judge.best(budget, per).choice
            nearby = table_around(model, measuring, probes, table, present, batch, progress)
            again = _descend(nearby, costs, room, present, per, apart=True)
            kind = PER_STEP if per == "step" else PER_CELL
            judge.add(Proposal(name=f"measured again {turn + 1}, {budget:.2%}", kind=kind, choice=again, remeasured=True))

    outcomes = []
    for budget in budgets:
        best = judge.best(budget, per)
        schedule = table.schedule(best.choice)
        latency = latency_of(model, sampler, schedule, float(costs.of(best.choice)), batch) if timed else None
        found = Outcome(budget=budget, chosen=best, schedule=schedule, solved_seconds=solved[budget], latency=latency)
        outcomes.append(found)
    return Outcomes(outcomes=tuple(outcomes), candidates=tuple(judge.candidates), table=table, table_seconds=table_seconds)


def samplers(sampler: Sampler) -> tuple[Sampler, Sampler]:
    """The sampler whose trajectories errors are measured on, and the held-out one: `sampler` with seeds that nobody else draws from."""
    measuring, held_out = (seed_for(sampler.seed, purpose) for purpose in ("calibration", "held-out calibration"))
    return replace(sampler, seed=measuring), replace(sampler, seed=held_out)


def costs_of(unit: str, model: DiffusionTransformer, sampler: Sampler, batch: int = 32) -> Costs:
    """What the sampler costs by the levels that are chosen, in a unit of `COSTS`."""
    cells, place = cells_of(sampler.noise_levels(model.arch))
    calls = [place.count(cell) for cell in range(len(cells))]
    return COSTS[unit].measure(model, model.added(), calls, sampler.rows, batch)


def flops_of_search(
    arch: Architecture, settings: MediatorSettings, sampler: Sampler, trajectories: int, verify: int, budgets: int, rounds: int
) -> float:
    """Roughly: probes (a backward counts as two forwards and runs the call again), the table, and whole samples of candidates."""
    rows = len(sampler.times()) * sampler.rows
    table = 1 + len(settings.levels) * (arch.depth + 1) / (2 * arch.depth)
    forwards = trajectories * (1 + 3 * DIRECTIONS + table * (1 + rounds * budgets))
    candidates = 1 + len(settings.levels) + (4 + rounds) * budgets
    return rows * (forwards + candidates * verify) * closed_form.forward_flops(arch)


# --- measuring errors ----------------------------------------------------------------------------------------------------------


def teacher_probes(
    model: DiffusionTransformer, sampler: Sampler, trajectories: int, batch: int, store: Store, progress: Progress = silent
) -> Probes:
    """The teacher's trajectories and what moves their ends."""

    def make() -> Kept:
        calls = -(-trajectories // batch) * len(sampler.times())
        with progress(calls, "sampling the teacher", "call") as bar:
            return Kept(vars(probe_all(model, trajectories, sampler, DIRECTIONS, batch, bar.update)))

    return Probes(**store.once("probes", make).tensors)


def teacher_table(
    model: DiffusionTransformer,
    sampler: Sampler,
    probes: Probes,
    batch: int,
    store: Store,
    progress: Progress = silent,
    facts: Mapping[str, Any] | None = None,
) -> ErrorTable:
    """The error table around the teacher. Each call is kept as soon as it is measured; the pretrained level changes nothing."""
    options = model.added().all_levels
    added = [level for level in options if not is_pretrained(level)]
    times = sampler.times()

    def of_call(call: int) -> Kept:
        return Kept({"products": products_of_call(model, sampler, probes, call, times[call], added, batch)})

    def make() -> Kept:
        parts = []
        with progress(len(times), "measuring errors", "call") as bar:
            for call in range(len(times)):
                parts.append(store.once(f"call-{call:04d}", partial(of_call, call)).tensors["products"])
                bar.update()
        return Kept({"products": torch.stack(parts), "sample_squares": _squares(probes)}, facts or {})

    kept = store.once("sensitivity", make).tensors
    store.drop("call-*")
    measured = kept["products"]  # (calls, layers, added levels, n, k)
    products = measured.new_zeros(*measured.shape[:2], len(options), *measured.shape[3:])
    products[:, :, [options.index(level) for level in added]] = measured
    return error_table(products, kept["sample_squares"], sampler.noise_levels(model.arch), options)


def table_around(
    model: DiffusionTransformer,
    sampler: Sampler,
    probes: Probes,
    table: ErrorTable,
    choice: Choice,
    batch: int,
    progress: Progress = silent,
) -> ErrorTable:
    """`table`, its changes of single cells measured again where all others are at `choice`."""
    noise_levels = sampler.noise_levels(model.arch)
    _, place = cells_of(noise_levels)
    parts = []
    with progress(len(place), "measuring again", "call") as bar:
        for call, t in enumerate(sampler.times()):
            levels = [table.options[option] for option in choice[place[call]]]
            parts.append(products_of_call(model, sampler, probes, call, t, table.options, batch, levels))
            bar.update()
    return table.around(choice, error_table(torch.stack(parts), _squares(probes), noise_levels, table.options))


def _squares(probes: Probes) -> Tensor:
    """(n,) squared norms of the samples."""
    return probes.samples.flatten(1).square().sum(1)


def changes_of_cells(probes: Probes, noise_levels: Sequence[float]) -> list[float]:
    """Mean absolute change of the latents from each cell's first call to the next cell's."""
    cells, place = cells_of(noise_levels)
    return latent_changes(probes.states[[place.index(cell) for cell in range(len(cells))]])


# --- candidates ----------------------------------------------------------------------------------------------------------------


def solutions(table: ErrorTable, changes: Sequence[float], costs: Costs, room: float, per: Per) -> list[Proposal]:
    """Choices within a budget, by several ways of adding up errors. With one level per step, and by the paper's rule, in any case.

    Args:
        changes: of the latents, for every cell.
        room: what the attention layers may cost.
    """
    squares = table.squares()
    found = []
    if per == "cell":
        start = allocate(squares, costs.cells, room)
        found = [
            Proposal(name="sum of squares", kind=PER_CELL, choice=start),
            Proposal(name="sum of vectors per layer", kind=PER_CELL, choice=_descend(table, costs, room, start, per, apart=True)),
            Proposal(name="sum of vectors", kind=PER_CELL, choice=_descend(table, costs, room, start, per, apart=False)),
        ]
    steps = allocate(squares, costs.cells, room, per_step=True)
    found += [
        Proposal(name="per step, sum of squares", kind=PER_STEP, choice=steps),
        Proposal(name="per step, sum of vectors", kind=PER_STEP, choice=_descend(table, costs, room, steps, "step", apart=True)),
    ]
    rule = latent_change_rule(changes, squares, costs.cells, room)
    return found if rule is None else [*found, Proposal(name=RULE, kind=RULE, choice=rule)]


def _descend(table: ErrorTable, costs: Costs, room: float, start: Choice, per: Per, *, apart: bool) -> Choice:
    return descend(table.products, costs.cells, room, start, apart=apart, per_step=per == "step")


class Judge:
    """Measures the errors of candidates. Errors that the store has for the same number of held-out samples are not measured again."""

    def __init__(
        self,
        model: DiffusionTransformer,
        table: ErrorTable,
        costs: Costs,
        sampler: Sampler,
        samples: int,
        batch: int,
        store: Store,
        progress: Progress = silent,
    ) -> None:
        self.model, self.table, self.costs, self.sampler = model, table, costs, sampler
        self.samples, self.batch, self.store, self.progress = samples, batch, store, progress
        self.labels = spread_labels(model.arch.classes, samples, sampler.seed)
        self.candidates: list[Candidate] = []

    def add(self, proposal: Proposal) -> None:
        """Judges a choice of levels, unless one like it of that kind is there."""
        choice, kind = proposal.choice, proposal.kind
        if any(kind == candidate.kind and np.array_equal(choice, candidate.choice) for candidate in self.candidates):
            return
        judged = Candidate(
            **vars(proposal),
            share=float(self.costs.of(choice) / self.costs.softmax),
            per_step=bool((choice == choice[:, :1]).all()),
            predicted=self.table.predicted(choice),
            measured=self.error(proposal.name, choice) if self.samples else None,
        )
        self.candidates.append(judged)

    def error(self, name: str, choice: Choice) -> float:
        """|sample - teacher's| / |teacher's| of the held-out samples."""
        key = " ".join(",".join(map(str, row)) for row in choice.tolist())  # places may have two digits: commas keep them apart

        def measure() -> float:
            teacher = self._teacher
            return float((self._sample(name, self.table.schedule(choice)) - teacher).norm() / teacher.norm())

        return self.store.number(f"candidates-{self.samples}", key, measure)

    def best(self, budget: float, per: Per) -> Candidate:
        """The candidate of least error within a budget; of a smaller budget's too, should they be better."""
        most = self.costs.room(budget) + self.costs.rest
        fitting = [c for c in self.candidates if self.costs.of(c.choice) <= most and (per == "cell" or c.per_step)]
        return min(fitting, key=lambda candidate: (candidate.error, candidate.share))

    @cached_property
    def _teacher(self) -> Tensor:
        return self._sample("held-out teacher", SOFTMAX)

    def _sample(self, description: str, schedule: Schedule | Level) -> Tensor:
        with self.progress(len(self.labels), description, "sample") as bar:
            return sample_many(self.model, self.labels, self.sampler, schedule, self.batch, bar.update)


def latency_of(model: DiffusionTransformer, sampler: Sampler, schedule: Schedule, predicted: float, batch: int) -> Latency:
    """Times whole batches, by the schedule and by softmax in turn, so that other load hits both."""
    where = next(model.parameters()).device
    labels = torch.zeros(batch, dtype=torch.long)
    noise = gaussian(sampler.seed, "initial noise", range(batch), (model.arch.channels, *model.arch.input_size))
    levels: tuple[Schedule | Level, ...] = (schedule, SOFTMAX)
    times = [
        [median_seconds(partial(sample_batch, model, labels, sampler, level, noise=noise), where, 1) for level in levels]
        for _ in range(PAIRS)
    ]
    measured, softmax = (statistics.median(column) for column in zip(*times, strict=True))
    return Latency(batch=batch, predicted=predicted, measured=measured, measured_softmax=softmax)
