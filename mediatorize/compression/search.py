"""The search for a schedule of levels: propose candidates from the error table, judge them by samples, keep the best within a budget.

A *budget* is a share of the softmax sampler's cost. A *candidate* is a schedule: the levels of layers in every model call. Solvers propose
candidates by the errors that the table predicts. Samples from one set of noise then judge them. Samples from another set of noise say what
the chosen one and its baselines are worth.

    sampler = Sampler.resolve(model.arch, steps=25)
    found = search(model, sampler, [0.8], costs_of("flops", model, sampler))
    latents = sample(model, labels, steps=25, schedule=found.outcomes[0].schedule)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from mediatorize.compression.costs import COSTS, KINDS_OF_SAVING, Costs, bare_levels, median_seconds
from mediatorize.compression.judging import FINALISTS, MOST_TRIED, Candidate, Draws, Errors, Judge, Tuner, few_of, within
from mediatorize.compression.proposals import RULE, Proposer
from mediatorize.compression.sensitivity import ErrorTable, peak_bytes_of_products
from mediatorize.compression.tables import DIRECTIONS, measured_tables
from mediatorize.devices import ALONE, World
from mediatorize.diffusion.sampling import Sampler, sample_batch
from mediatorize.errors import UserError
from mediatorize.model import cost as closed_form
from mediatorize.model.architecture import Architecture
from mediatorize.model.levels import SOFTMAX, Level, MediatorSettings
from mediatorize.model.schedule import AnySchedule
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.progress import Progress, silent
from mediatorize.randomness import gaussian, seed_for
from mediatorize.store import InMemory, Store

PAIRS = 3
"""Batches by the schedule and by softmax that a latency is the median of."""

FAR = 10.0
"""What is predicted to err so many times as much as the best of a budget is not sampled, unless it is a baseline."""

RULES_ALONE = 5
"""So many times as many where a rule is what was asked for."""

SAMPLED, REPORTED = 12, 3
"""Roughly how many candidates a budget has at first sight, and in the report: for what a search will take."""


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


def search(
    model: DiffusionTransformer,
    sampler: Sampler,
    budgets: Sequence[float],
    costs: Costs,
    *,
    kinds: Collection[str] = tuple(KINDS_OF_SAVING),
    by_rule: bool = False,
    trajectories: int = 8,
    verify: int = 32,
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
        by_rule: choose the best step-wise rule; the other candidates are for comparison.
        trajectories: of the teacher, that the error table is measured on.
        verify: samples that candidates are judged by; 0 trusts predictions.
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
    measuring, judging, reporting = samplers(sampler)
    tables = measured_tables(model, measuring, trajectories, batch, store, world, progress, facts)
    table_seconds = None if was_there else time.monotonic() - begun

    judge = Judge(Draws(model, judging, verify, batch, world, progress), costs, store)
    tuner = Tuner(Draws(model, measuring, trajectories, batch, world, progress), costs, store)
    proposer = Proposer(model, sampler, costs, tables, kinds)
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
        proposals += tuner.rules(proposer, budget, far, RULES_ALONE if by_rule else 1)
        judge.consider(proposals, budget, far)
        if by_rule:
            refuse_without_rule(judge, proposer, budget)

    reporter = Judge(Draws(model, reporting, verify, batch, world, progress), costs, store, at_once=True)
    outcomes = []
    for budget in budgets:
        best = judge.best(budget, kinds, by_rule)
        baselines = judge.baselines(budget)
        reported = {candidate.name: reporter.errors(candidate, verify) for candidate in (best, *baselines)} if verify else {}
        told: dict[str, Any] = {"reported": reported, "baselines": baselines, "solved_seconds": solved[budget]}
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


def flops_of_search(
    arch: Architecture,
    settings: MediatorSettings,
    sampler: Sampler,
    *,
    trajectories: int,
    verify: int,
    budgets: Sequence[float],
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
    of_budget = SAMPLED * first + FINALISTS * (1 - first) + REPORTED
    samples = 2 + len(settings.levels) * first + of_budget * sum(budgets)
    return rows * (forwards + samples * verify) * closed_form.forward_flops(arch)


def peak_bytes_of_search(arch: Architecture, settings: MediatorSettings, sampler: Sampler, *, trajectories: int, batch: int) -> int:
    """Roughly the most memory that a search takes at a time, in float32: the model, and the pass back through one call (`in_parts`)."""
    rows = sampler.rows * min(trajectories, max(1, batch // sampler.rows))
    return 4 * closed_form.count_parameters(arch, settings) + peak_bytes_of_products(arch, settings, rows, DIRECTIONS)


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
