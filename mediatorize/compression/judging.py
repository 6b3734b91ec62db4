"""Candidates: proposals that are judged by samples from one set of noise (design 5). Step-wise rules are run, to see what they cost."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from mediatorize.compression.costs import KINDS_OF_SAVING, Costs
from mediatorize.compression.proposals import BASELINES, FEWER, RULE, WHOLE, Proposal, Proposer, costs_with
from mediatorize.devices import ALONE, World
from mediatorize.diffusion.sampling import Drive, Sampler, driver_of, sample_many
from mediatorize.diffusion.switching import Switcher
from mediatorize.errors import UserError
from mediatorize.model.levels import SOFTMAX, Level
from mediatorize.model.schedule import AnySchedule, RuleSchedule, Schedule, SwitchRule
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.planning.judge import Errors, relative_errors
from mediatorize.progress import Progress, silent
from mediatorize.randomness import spread_labels
from mediatorize.store import Kept, Store

AT_FIRST_SIGHT, FEWEST_TO_SPLIT, FINALISTS = 4, 16, 3
"""At first sight candidates are judged by one sample in four, where there are sixteen; then the best three for a budget by all."""

MOST_RULES, MOST_TRIED = 1, 3
"""How many step-wise rules are judged for a budget, and how many are run on the trajectories to see whether they keep it."""


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


@dataclass(frozen=True)
class Draws:
    """Samples of a model from one set of noise, which processes share."""

    model: DiffusionTransformer
    sampler: Sampler
    count: int
    batch: int
    """Samples at a time."""
    world: World = ALONE
    progress: Progress = silent

    @cached_property
    def labels(self) -> Tensor:
        """(count,)"""
        return spread_labels(self.model.arch.classes, self.count, self.sampler.seed)

    def by(self, schedule: AnySchedule | Level, steps: int, rows: range, description: str) -> tuple[Tensor, list[list[int]]]:
        """Samples (n, c, h, w) of those numbers, and when each switched, where the schedule is a rule."""
        how, labels = replace(self.sampler, steps=steps), self.labels[rows.start : rows.stop]
        with self.progress(self.world.count(len(rows)), description, "sample") as bar:
            return sample_by(self.model, labels, how, schedule, self.batch, self.world, bar.update, rows.start)


class Tuner:
    """Runs step-wise rules on the trajectories that tables are of, to see what they really spend there."""

    def __init__(self, draws: Draws, costs: Costs, store: Store) -> None:
        self.draws, self.costs, self.store = draws, costs, store

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
                spent = self.costs.by_rule(each.rule, switches, self.draws.sampler.how.calls_per_step)
                over.append(spent - each.cost)
                if spent <= self.costs.room(budget):
                    proposal = proposer.by_rule(each.rule, switches)
                    found.append(replace(proposal, name=f"{proposal.name}, for {budget:.2%}"))
            room = min(room, self.costs.room(budget) - max(0.0, min(over)))
        return found[: MOST_RULES * times]

    def switches(self, rule: SwitchRule) -> list[list[int]]:
        """By sample, the step that each stage but the first began with; -1: it never did."""

        def make() -> Kept:
            draws = self.draws
            schedule = RuleSchedule(rule, Schedule((), ((rule.levels[0],) * draws.model.arch.depth,)))
            switches = draws.by(schedule, draws.sampler.steps, range(draws.count), "tuning the rule")[1]
            return Kept({"switches": torch.tensor(switches)})

        key = hashlib.sha256(repr(rule).encode()).hexdigest()[:16]
        return self.store.once(f"rule-{key}", make).tensors["switches"].tolist()


def few_of(samples: int) -> int:
    """How many of so many samples candidates are judged by at first sight."""
    return samples if samples < FEWEST_TO_SPLIT else samples // AT_FIRST_SIGHT


class Judge:
    """Measures the errors of candidates on one set of noise. What the store has for as many samples is not measured again.

    At first sight a candidate is judged by one sample in `AT_FIRST_SIGHT`; only those that look best are judged by the others too.
    """

    def __init__(self, draws: Draws, costs: Costs, store: Store, at_once: bool = False) -> None:
        """
        Args:
            at_once: judge by all samples in one go, with no first sight.
        """
        self.draws, self.costs, self.store = draws, costs, store
        self.sampler, self.samples = draws.sampler, draws.count
        self.few = self.samples if at_once else few_of(self.samples)
        self.candidates: list[Candidate] = []

    def consider(self, proposals: Sequence[Proposal], budget: float, far: float) -> None:
        """Judges proposals for a budget at first sight, by few samples, and then the best of them by all.

        Args:
            far: a predicted error. What is above it is not sampled, unless it is a baseline.
        """
        seen = [self.add(each, self.few if each.error <= far or each.kind in BASELINES else 0) for each in proposals]
        judged = [candidate for candidate in seen if candidate.measured is not None]
        for candidate in sorted(judged, key=lambda candidate: (not candidate.keeps(budget), candidate.error))[:FINALISTS]:
            self.add(candidate, self.samples)

    def add(self, proposal: Proposal, samples: int) -> Candidate:
        """Judges a proposal by the first so many samples, unless one that does the same was judged by as many."""
        what = proposal.kind, proposal.steps, proposal.schedule
        alike = [c for c in self.candidates if (c.kind, c.steps, c.schedule) == what]
        for candidate in alike:
            if samples <= (0 if candidate.measured is None else candidate.measured.samples):
                return candidate
            self.candidates.remove(candidate)
        costs = costs_with(self.costs, self.draws.model.arch, replace(self.sampler, steps=proposal.steps))
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
        drawn, switches = self.draws.by(proposal.schedule, proposal.steps, rows, proposal.name)
        softmax = self.costs.softmax
        shares = [float(self._spent(proposal.schedule, [each], self.costs) / softmax) for each in switches]
        return [*relative_errors(drawn, self._teacher[rows.start : rows.stop]).tolist(), *shares]

    def _spent(self, schedule: AnySchedule, switches: Sequence[Sequence[int]], costs: Costs) -> Any:
        """What a schedule costs; a rule, where its samples switched so."""
        if isinstance(schedule, RuleSchedule):
            return costs.by_rule(schedule.rule, switches, self.sampler.how.calls_per_step)
        return costs.of(schedule)

    def best(self, budget: float, kinds: Collection[str] = tuple(KINDS_OF_SAVING), by_rule: bool = False) -> Candidate:
        """The candidate of least error within a budget, or the rule; of a smaller budget's too, should they be better."""
        whole = [c for c in self.candidates if self._whole(c) and (c.kind == RULE or not by_rule)]
        fitting = [c for c in whole if c.keeps(budget)]
        if by_rule and not fitting:  # those that keep it where they were tuned
            fitting = [c for c in whole if within(c.share, budget)]
        if "mediators" not in kinds:
            fitting = [c for c in fitting if c.kind != WHOLE]
        fitting = [c for c in fitting if c.kind != FEWER] or fitting  # what is asked for is a schedule of this sampler
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
        return self.draws.by(SOFTMAX, self.sampler.steps, range(self.samples), "held-out teacher")[0]
