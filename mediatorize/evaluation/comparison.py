"""Compares the teacher with every other way to run its model, from the same noise: trajectories, samples, features and time.

The first row is the teacher. Samples are made and kept in parts, one for each row and batch. A part depends on the model, the sampler and
its place alone, so any process can make any part, and parts that exist are not made again.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mediatorize.devices import ALONE, World
from mediatorize.diffusion.plan import Plan
from mediatorize.diffusion.planned import ModelDenoiser, plan_flops, refuse_other_plan, sample_by_plan
from mediatorize.diffusion.process import process_of
from mediatorize.diffusion.sampling import (
    Sampler,
    driver_of,
    first_state,
    flops_by_rule,
    on_the_cpu,
    refuse_unknown_level,
    sample_batch,
    sample_part,
)
from mediatorize.diffusion.solvers import fixed_solvers
from mediatorize.diffusion.switching import Switcher
from mediatorize.errors import UserError
from mediatorize.evaluation.features import Extractor, Pictures, Reference, as_bytes, as_images, judge
from mediatorize.evaluation.metrics import Features, distance_of_halves, statistics_of
from mediatorize.evaluation.results import OWN_SCHEDULE, Comparison, RowKind, RowResult, Timing
from mediatorize.evaluation.timing import paired_time, peak_bytes
from mediatorize.model.cost import forward_flops
from mediatorize.model.levels import SOFTMAX, Level, holds, in_order, is_pretrained, levels_per_layer
from mediatorize.model.schedule import AnySchedule, Levels, RuleSchedule
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.planning.judge import relative_errors, with_interval
from mediatorize.planning.reference import FEWEST_CALLS
from mediatorize.planning.search import Wanted, converged
from mediatorize.randomness import gaussian

Decode = Callable[[Tensor], Pictures]
"""Samples (b, c, h, w) -> pictures (b, height, width, channels)"""


class Bar(Protocol):
    def update(self, n: int, /) -> object: ...


class Progress(Protocol):
    def __call__(self, total: int, description: str, unit: str, initial: int = 0) -> AbstractContextManager[Bar]:
        """A bar of `total` units of work, of which `initial` are done."""


class _NoBar:
    def update(self, n: int, /) -> None:
        pass


def no_progress(total: int, description: str, unit: str, initial: int = 0) -> AbstractContextManager[Bar]:
    """Shows nothing."""
    return nullcontext(_NoBar())


# --- what is compared ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One way to sample the model."""

    name: str
    levels: AnySchedule | Level = SOFTMAX
    plan: Plan | None = None
    """In place of the comparison's sampler."""
    sampler: Sampler | None = None
    """Of the pretrained model, in place of the comparison's."""
    converged: int | None = None
    """Calls of the pretrained model's own solution."""

    @property
    def kind(self) -> RowKind:
        if self.plan is not None or self.sampler is not None or self.converged is not None:
            return "plan" if self.plan is not None else "solver" if self.sampler is not None else "converged"
        return "level" if isinstance(self.levels, int | str) else "schedule"

    @property
    def key(self) -> str:
        """A name of its own for what it does, whatever it is called, which a file can have."""
        does: Any = self.plan or self.sampler or (None if self.kind == "level" else self.levels)
        if does is not None and self.converged is None:
            return f"{self.kind}-{hashlib.sha256(json.dumps(does.to_json()).encode()).hexdigest()[:12]}"
        return f"converged-{self.converged}" if self.converged else str(self.levels)

    @property
    def file_name(self) -> str:
        """What a file of its own is called, for people."""
        name = f"level-{self.name}" if self.kind == "level" else self.name
        return "-".join(name.replace("/", " ").replace(",", " ").split())


def rows_of(
    model: DiffusionTransformer,
    sampler: Sampler,
    levels: Sequence[Level] | None = None,
    schedules: Mapping[str, AnySchedule] | None = None,
    plans: Mapping[int, Plan] | None = None,
) -> list[Row]:
    """The teacher; with plans its converged solution, the plans, and solvers of as many calls; the model's own schedule where it has one,
    other schedules by name, then levels from the dearest.

    The model's own has the name that it is given among the others.

    Args:
        sampler: of the comparison.
        levels: None is all that were added to the model.
    """
    added = model.settings.levels if model.settings else ()
    rows = [Row(SOFTMAX, SOFTMAX)]
    if plans:
        calls = max(int(plan.made_for.get("reference", {}).get("calls", FEWEST_CALLS)) for plan in plans.values())
        rows.append(Row("converged teacher", converged=calls))
    for count, plan in sorted((plans or {}).items(), reverse=True):
        refuse_other_plan(model.arch, plan)
        rows.append(Row(f"plan of {count} calls", plan=plan))
        multistep = [name for name, how in fixed_solvers(plan.process).items() if how.calls_per_step == 1]
        rows += [Row(f"{name}, {count} calls", sampler=replace(sampler, solver=name, steps=count)) for name in multistep]
    named = schedules or {}
    rows += [Row(OWN_SCHEDULE, model.schedule)] if model.schedule is not None and model.schedule not in named.values() else []
    rows += [Row(name, schedule) for name, schedule in named.items()]
    for level in reversed(in_order(added if levels is None else levels)):
        refuse_unknown_level(model, level)
        rows += [] if is_pretrained(level) else [Row(str(level), level)]
    return rows


# --- where samples are kept ----------------------------------------------------------------------------------------------------


class Parts(Protocol):
    """Keeps parts of samples, each some named arrays. A part's name has one `/`, after the row's key."""

    def has(self, name: str) -> bool: ...

    def write(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> None: ...

    def read(self, name: str, array: str) -> NDArray[Any]: ...


class InMemoryParts:
    """`Parts` that last as long as the process does: for notebooks and tests."""

    def __init__(self) -> None:
        self.parts: dict[str, Mapping[str, NDArray[Any]]] = {}

    def has(self, name: str) -> bool:
        return name in self.parts

    def write(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.parts[name] = arrays

    def read(self, name: str, array: str) -> NDArray[Any]:
        return self.parts[name][array]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The samples of every row: sample i of a row is of class `labels[i]`, from noise (seed, i)."""

    rows: Sequence[Row]
    """The teacher first, as `rows_of` gives them."""
    labels: Tensor
    """(n,), at least two."""
    batch: int = 128
    """Samples at a time."""
    parts: Parts = field(default_factory=InMemoryParts)
    decode: Decode | None = None
    """Turns samples into pictures; None if samples are pictures already."""

    def firsts(self) -> range:
        """Index of each part's first sample."""
        return range(0, len(self.labels), self.batch)

    def labels_at(self, first: int) -> Tensor:
        return self.labels[first : first + self.batch]

    def name(self, row: Row, first: int) -> str:
        return f"{row.key}/{first:07d}-{len(self.labels_at(first))}"

    def has(self, row: Row, first: int) -> bool:
        return self.parts.has(self.name(row, first))

    def write(self, row: Row, first: int, samples: Tensor, **more: Tensor) -> None:
        """Keeps a part: samples (b, c, h, w) and what else is known of them, on the CPU, and the decoded pictures."""
        pictures = {} if self.decode is None else {"pixels": self.decode(samples)}
        named = {name: values.numpy() for name, values in more.items()}
        self.parts.write(self.name(row, first), {"samples": samples.numpy(), **named, **pictures})

    def read(self, row: Row, array: str) -> Iterator[NDArray[Any]]:
        """An array of every part of a row, in order."""
        return (self.parts.read(self.name(row, first), array) for first in self.firsts())

    def pictures(self, row: Row) -> Iterator[Pictures]:
        """The pictures of every part of a row, in order: decoded ones, else the samples as bytes."""
        if self.decode is not None:
            return self.read(row, "pixels")
        return (as_bytes(torch.from_numpy(samples)) for samples in self.read(row, "samples"))

    def states(self, row: Row) -> Pictures:
        """Sample 0 of a row after each of `shown_calls`, as pictures."""
        states = torch.from_numpy(self.parts.read(self.name(row, 0), "states"))
        return as_bytes(states) if self.decode is None else self.decode(states)


MOST_STATES = 25
"""So many states of sample 0 are kept for pictures of its trajectory."""


def shown_calls(calls: int) -> list[int]:
    """The model calls, from 0, after which states are kept: all, or every k-th so that they are at most `MOST_STATES`; always the last."""
    every = -(-calls // MOST_STATES)
    return list(range((calls - 1) % every, calls, every))


# --- the comparison ------------------------------------------------------------------------------------------------------------


def compare(
    model: DiffusionTransformer,
    samples: Samples,
    sampler: Sampler,
    *,
    extractor: Extractor | None = None,
    reference: Reference | None = None,
    pairs: int = 0,
    timing_batch: int = 32,
    world: World = ALONE,
    progress: Progress = no_progress,
) -> Comparison:
    """Draws what is missing of the samples, and judges every row by its distance from the teacher, its cost and its samples' quality.

    Args:
        extractor: gives features and class scores; None judges no quality.
        reference: what features are compared with; None is the extractor's own reference, else the teacher's samples.
        pairs: timed model calls per row, each beside one of softmax; 0 measures no time.
        timing_batch: samples in a timed model call.
        world: processes that share the drawing; they see the same `samples.parts`.

    Raises:
        UserError: the sampler has no fixed cost, samples are not finite, or the reference is of other features.
    """
    refuse_adaptive(sampler)
    draw(model, samples, sampler, world, progress)
    world.barrier()
    if not world.is_first:
        return Comparison()
    flops = [_flops(model, samples, row, sampler) for row in samples.rows]
    goal = next((_samples_of(samples, row) for row in samples.rows if row.kind == "converged"), None)
    calls = [_count_calls(model, row, sampler) for row in samples.rows]
    results = [_distance(samples, *each, flops[0], goal) for each in zip(samples.rows, flops, calls, strict=True)]
    found = Comparison(results=tuple(results))
    if extractor is not None:
        found = _with_quality(found, samples, extractor, reference, progress)
    if pairs:
        found = _with_time(found, model, samples.rows, sampler, pairs, min(timing_batch, len(samples.labels)), progress)
    return found


def refuse_adaptive(sampler: Sampler) -> None:
    """What costs are compared of has fixed steps."""
    if sampler.how.adaptive:
        raise UserError(f"{sampler.solver} has no fixed cost to compare.", hint="Choose a solver with fixed steps.")


def _flops(model: DiffusionTransformer, samples: Samples, row: Row, sampler: Sampler) -> float:
    """FLOPs of one sample; by a rule, what its samples spent on average."""
    if row.plan is not None:
        return plan_flops(model.arch, row.plan, model.settings)
    if row.converged is not None:
        return float(sum(_wanted(model, sampler).rows_of_reference(row.converged)) * forward_flops(model.arch))
    sampler = row.sampler or sampler
    if isinstance(row.levels, RuleSchedule):
        rule, switches = row.levels.rule, torch.from_numpy(np.concatenate(list(samples.read(row, "switches"))))
        return flops_by_rule(rule, [model] * len(rule.levels), sampler, switches) / len(switches)
    flops = sampler.flops(model.arch, row.levels, model.settings)
    assert flops is not None, "the solver's steps are fixed"
    return flops


def _wanted(model: DiffusionTransformer, sampler: Sampler) -> Wanted:
    """What the teacher's own solution is of."""
    arch = model.arch
    guidance: dict[str, Any] = {name: getattr(sampler, name) for name in ("cfg_scale", "cfg_channels", "cfg_interval")}
    return Wanted(process=process_of(arch).name, shape=(arch.channels, *arch.input_size), **guidance)


def _count_calls(model: DiffusionTransformer, row: Row, sampler: Sampler) -> int:
    """Model calls for one sample."""
    if row.plan is not None:
        return len(row.plan.calls)
    if row.converged is not None:
        return len(_wanted(model, sampler).rows_of_reference(row.converged))
    return len((row.sampler or sampler).times())


def calls_of_sample_0(model: DiffusionTransformer, samples: Samples, row: Row, sampler: Sampler) -> list[Levels]:
    """What the model calls of sample 0 ran, once it is drawn."""
    calls = sampler.calls(model.arch, row.levels, model.settings)
    if isinstance(row.levels, RuleSchedule):
        rule, begins = row.levels.rule, next(samples.read(row, "switches"))[0].tolist()
        stages = rule.stages_of_calls(begins, len(calls), sampler.how.calls_per_step)
        return [tuple(levels_per_layer(rule.levels[stage], model.arch.depth, model.settings)) for stage in stages]
    return calls


def draw(model: DiffusionTransformer, samples: Samples, sampler: Sampler, world: World = ALONE, progress: Progress = no_progress) -> None:
    """Draws this process's share of the parts that are not there yet.

    Beside its samples, a part of what makes the teacher's calls holds a square for every sample and call: of the teacher |x|^2, of a
    student |x - teacher's x|^2. By a step-wise rule it also holds when every sample switched. The first part also holds states of sample 0
    (`Samples.states`).
    """
    teacher = samples.rows[0]
    mine = samples.firsts()[world.rank :: world.size]
    count = sum(len(samples.labels_at(first)) for first in mine)
    there = sum(len(samples.labels_at(first)) for first in mine for row in samples.rows if samples.has(row, first))
    with progress(count * len(samples.rows), f"sampling {len(samples.rows)} rows", "sample", there) as bar:
        for first in mine:
            missing = [row for row in samples.rows if not samples.has(row, first)]
            if not missing:
                continue
            labels = samples.labels_at(first)
            beside = any(row.kind in ("level", "schedule") for row in missing)
            of_teacher = _follow(model, labels, first, sampler, teacher, lambda x, call: x) if beside else None
            for row in missing:
                if of_teacher is None or row.kind not in ("level", "schedule"):
                    samples.write(row, first, _sampled_otherwise(model, labels, first, sampler, row))
                    bar.update(len(labels))
                    continue
                if row is teacher:
                    own, squares = of_teacher, [_squares(x) for x in of_teacher.kept]
                else:
                    own = _follow(model, labels, first, sampler, row, partial(_squares_apart, of_teacher.kept))
                    squares = own.kept
                samples.write(row, first, own.latents, squares=torch.stack(squares, 1).cpu(), **own.known)
                bar.update(len(labels))


def _sampled_otherwise(model: DiffusionTransformer, labels: Tensor, first: int, sampler: Sampler, row: Row) -> Tensor:
    """A batch of samples by a plan, another solver, or the teacher's own solution, on the CPU."""
    if row.sampler is not None:
        return sample_part(model, labels, row.sampler, SOFTMAX, first)
    labels, noise = first_state(model, labels, sampler.seed, first)
    if row.plan is not None:
        return on_the_cpu(sample_by_plan(model, labels, row.plan, noise))
    assert row.converged is not None, "there are no other kinds of rows"
    return on_the_cpu(converged(ModelDenoiser(model, labels, 2 * len(labels)), _wanted(model, sampler), noise, row.converged))


@dataclass(frozen=True)
class _Followed:
    """A batch of samples, on the CPU, and what is known of their trajectories."""

    latents: Tensor
    kept: list[Tensor]
    """Of every model call, on the model's device."""
    known: dict[str, Tensor]
    """By the name of a part's array: when a rule switched, and states of sample 0."""


def _follow(
    model: DiffusionTransformer, labels: Tensor, first: int, sampler: Sampler, row: Row, keep: Callable[[Tensor, int], Tensor]
) -> _Followed:
    """A batch of samples, and what `keep` makes of their state at every model call."""
    kept: list[Tensor] = []
    states: list[Tensor] = []  # of sample 0

    def observe(x: Tensor, t: Tensor, y: Tensor) -> None:
        kept.append(keep(x[: len(labels)], len(kept)))
        if first == 0:
            states.append(x[0].float().cpu())

    drive = driver_of(model, sampler, row.levels, len(labels))
    latents = sample_part(model, labels, sampler, row.levels, first, observe, drive)
    known = {"switches": drive.switches} if isinstance(drive, Switcher) else {}
    if first == 0:
        after = [*states[1:], latents[0]]  # a call sees the state that the call before left
        known["states"] = torch.stack([after[call] for call in shown_calls(len(after))])
    return _Followed(latents, kept, known)


def _squares_apart(trajectory: list[Tensor], x: Tensor, call: int) -> Tensor:
    return _squares(x - trajectory[call])


def _squares(x: Tensor) -> Tensor:
    """(b, c, h, w) -> sums of squares (b,)"""
    return x.float().square().flatten(1).sum(1)


def _samples_of(samples: Samples, row: Row) -> Tensor:
    """(n, c, h, w)"""
    return torch.from_numpy(np.concatenate(list(samples.read(row, "samples"))))


def _distance(samples: Samples, row: Row, flops: float, calls: int, teacher_flops: float, goal: Tensor | None) -> RowResult:
    """A row's cost, and how far its trajectories and its samples are from the teacher's.

    Args:
        goal: the teacher's converged samples (n, c, h, w).
    """
    teacher, by_call = samples.rows[0], np.zeros(0)
    if row.kind in ("level", "schedule"):
        sizes = sum(squares.sum(0, dtype=np.float64) for squares in samples.read(teacher, "squares"))  # (calls,)
        apart = np.zeros_like(sizes)
        if row is not teacher:
            apart = sum(squares.sum(0, dtype=np.float64) for squares in samples.read(row, "squares"))
        by_call = np.sqrt(apart / sizes)
    return RowResult(
        level=row.name,
        kind=row.kind,
        flops=flops,
        macs=flops / 2,
        relative_flops=flops / teacher_flops,
        calls=calls,
        trajectory_error=float(by_call.mean()) if len(by_call) else None,
        sample_error=_sample_error(samples, row),
        errors_by_call=tuple(by_call.tolist()),
        converged=None if goal is None else with_interval(relative_errors(_samples_of(samples, row), goal)),
        began=row.levels.began(np.concatenate(list(samples.read(row, "switches"))).tolist())
        if isinstance(row.levels, RuleSchedule)
        else (),
    )


def _sample_error(samples: Samples, row: Row) -> float:
    apart = size = 0.0
    for student, expected in zip(samples.read(row, "samples"), samples.read(samples.rows[0], "samples"), strict=True):
        apart += float(np.square(student.astype(np.float64) - expected).sum())
        size += float(np.square(expected.astype(np.float64)).sum())
    return (apart / size) ** 0.5


def _with_quality(found: Comparison, samples: Samples, extractor: Extractor, reference: Reference | None, progress: Progress) -> Comparison:
    """Adds what features tell of each row."""
    if reference is None and extractor.own_reference is not None:
        reference = extractor.own_reference()
    halves = distance_of_halves(reference.features) if reference is not None and reference.features is not None else None
    judged = []
    for row, result in zip(samples.rows, found.results, strict=True):
        features, scores = features_of(samples, row, extractor, progress)
        if reference is None:  # at the first row, the teacher's
            reference = Reference("the teacher's own samples", statistics_of(features), features)
        judged.append(replace(result, **vars(judge(features, scores, samples.labels.numpy(), reference))))
    assert reference is not None  # there is a teacher
    return replace(
        found,
        results=tuple(judged),
        features=extractor.name,
        feature_width=len(reference.statistics.mean),
        reference=reference.name,
        distance_of_halves=halves,
    )


def features_of(samples: Samples, row: Row, extractor: Extractor, progress: Progress) -> tuple[Features, Features | None]:
    """Features (n, f) and class scores (n, classes) of a row's samples."""
    if extractor.of_bytes:
        images = (as_images(pictures) for pictures in samples.pictures(row))
    else:
        images = (torch.from_numpy(values) for values in samples.read(row, "samples"))
    found = []
    with progress(len(samples.labels), f"judging {row.name}", "picture") as bar:
        for part in images:
            found.append(extractor.extract(part))
            bar.update(len(part))
    features = np.concatenate([features for features, _ in found])
    scores = [scores for _, scores in found if scores is not None]
    return features, np.concatenate(scores) if scores else None


@torch.inference_mode()
def _with_time(
    found: Comparison, model: DiffusionTransformer, rows: Sequence[Row], sampler: Sampler, pairs: int, batch: int, progress: Progress
) -> Comparison:
    """Adds time and memory of model calls.

    A schedule's are over the different calls that it makes, time by how often it makes each.
    """
    arch, parameter = model.arch, next(model.parameters())
    device, count = parameter.device, batch * sampler.rows
    x = gaussian(sampler.seed, "initial noise", range(count), (arch.channels, *arch.input_size)).to(device, parameter.dtype)
    t = process_of(arch).time_at(torch.full((count,), 0.5, device=device))
    y = torch.arange(count, device=device) % arch.classes

    def call(levels: tuple[Level, ...], rows: int) -> Callable[[], Tensor]:
        return lambda: model(x[: batch * rows], t[: batch * rows], y[: batch * rows], levels=levels)

    def calls_of(row: Row) -> Counter[tuple[Levels, int]]:
        """How often a row makes each kind of call; empty where calls rest on others, or on the samples."""
        depth = arch.depth
        if row.plan is not None:
            own = [tuple(levels_per_layer(SOFTMAX, depth, None)) if one.levels is None else one.levels for one in row.plan.calls]
            return Counter(zip(own, row.plan.rows, strict=True))
        if row.converged is not None:
            full: Levels = (SOFTMAX,) * depth
            return Counter((full, rows) for rows in _wanted(model, sampler).rows_of_reference(row.converged))
        how = row.sampler or sampler
        levels = how.calls(arch, row.levels, model.settings)
        if isinstance(row.levels, RuleSchedule) or any(holds(level) for own in levels for level in own):
            return Counter()
        return Counter(zip(levels, how.rows_of_calls(arch), strict=True))

    wanted = [calls_of(row) for row in rows]
    teacher_calls = sum(wanted[0].values())
    softmax = (next(iter(wanted[0]))[0], sampler.rows)  # the teacher runs every layer and call so
    ratios = {softmax: 1.0}
    memory = {softmax: peak_bytes(call(*softmax), device)}
    with progress(len({one for counts in wanted for one in counts} | {softmax}), "timing", "call") as bar:
        control = paired_time(call(*softmax), call(*softmax), pairs, device)
        bar.update(1)
        for counts in wanted:
            for one in (one for one in counts if one not in ratios):
                # The mean over a schedule's calls evens out what a few pairs of each leave uncertain.
                ratios[one] = paired_time(call(*one), call(*softmax), max(3, -(-pairs // len(counts))), device).ratio
                memory[one] = peak_bytes(call(*one), device)
                bar.update(1)
    noise = gaussian(sampler.seed, "initial noise", range(batch), (arch.channels, *arch.input_size))

    def whole_sampler(levels: AnySchedule | Level) -> Callable[[], Tensor]:
        return lambda: sample_batch(model, y[:batch], sampler, levels, noise=noise)

    timed = []
    teacher = sum(ratios[one] * times for one, times in wanted[0].items())  # of a sample
    for row, counts, result in zip(rows, wanted, found.results, strict=True):
        if counts:
            ratio = sum(ratios[one] * times for one, times in counts.items()) / teacher
        else:  # calls that rest on others are timed with them, and a rule with its looks at the samples
            ratio = paired_time(whole_sampler(row.levels), whole_sampler(SOFTMAX), max(3, -(-pairs // teacher_calls)), device).ratio
        whole = ratio * teacher * control.reference_seconds  # of a batch
        peaks = [peak for one in counts if (peak := memory[one]) is not None]
        timed.append(
            replace(
                result,
                relative_time=ratio,
                latency_ms=1000 * whole / result.calls,
                images_per_second=batch / whole,
                peak_bytes=max(peaks) if peaks else None,
            )
        )
    timing = Timing(
        pairs=pairs,
        batch=batch,
        softmax_ms=1000 * control.reference_seconds,
        control=control.ratio,
        control_quartiles=control.quartiles,
    )
    return replace(found, results=tuple(timed), timing=timing)
