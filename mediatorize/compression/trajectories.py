"""Calibration states: inputs of the teacher's model calls along its own sampling trajectories, or noised data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from mediatorize.devices import ALONE, World
from mediatorize.diffusion.process import noised, process_of
from mediatorize.diffusion.sampling import Sampler, refuse_guidance, sample_batch
from mediatorize.model.architecture import Architecture
from mediatorize.model.levels import SOFTMAX
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.randomness import generator, seed_for


@dataclass(frozen=True)
class States:
    """Inputs of model calls: noisy latents (s, c, h, w), times (s,) and labels (s,), on the CPU."""

    x: Tensor
    t: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.t)


def teacher_states(
    model: DiffusionTransformer,
    count: int,
    sampler: Sampler,
    *,
    trajectories: int = 32,
    world: World = ALONE,
    on_call: Callable[[], object] | None = None,
) -> States:
    """`count` states of the teacher (level softmax), spread evenly over its sampler's calls, of random classes, in random order.

    Args:
        sampler: if it guides, half of the states are unconditional.
        trajectories: how many samples are drawn at once; as many times as it takes for no state to be used twice.
        world: the processes that share the drawing, each of its own samples; all get all states.
        on_call: called after every model call.
    """
    rows_of_calls = sampler.rows_of_calls(model.arch)
    calls = len(rows_of_calls)
    batches = batches_for(count, calls, trajectories, sampler)
    wanted = torch.linspace(0, batches * calls, count + 1, dtype=torch.float64)[:-1].long().bincount(minlength=batches * calls)
    mine, random = world.share(trajectories), generator(sampler.seed, "states")
    kept: list[tuple[Tensor, ...]] = []
    drawn = 0
    for index in range(batches):
        labels = torch.randint(0, model.arch.classes, (trajectories,), generator=random)
        places = []  # in this process's part of each call, and among all states
        for rows, most in zip(rows_of_calls, wanted[index * calls : (index + 1) * calls].tolist(), strict=True):
            chosen = torch.randperm(rows * trajectories, generator=random)[:most]
            sample, half = chosen % trajectories, chosen // trajectories
            own = (sample >= mine.start) & (sample < mine.stop)
            local = half[own] * world.count(trajectories) + sample[own] - mine.start
            places.append((local, torch.arange(drawn, drawn + len(chosen))[own]))
            drawn += len(chosen)
        left = iter(places)

        def keep(x: Tensor, t: Tensor, y: Tensor, left: Iterator[tuple[Tensor, Tensor]] = left) -> None:
            rows, place = next(left)
            kept.append((x.cpu()[rows], t.cpu()[rows], y.cpu()[rows], place))
            if on_call is not None:
                on_call()

        sample_batch(model, labels[mine], sampler, SOFTMAX, first_index=index * trajectories + mine.start, observe=keep)
    x, t, y, place = (world.gather(torch.cat(parts)) for parts in zip(*kept, strict=True))
    order = place.argsort()[torch.randperm(count, generator=random)]
    return States(x[order], t[order], y[order])


@dataclass(frozen=True)
class Samples:
    """Finished samples of a model (s, c, h, w) and their labels (s,), used as a data set."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def read(self, indices: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
        return self.x[list(indices)], self.y[list(indices)]


@dataclass(frozen=True)
class Targets:
    """Inputs of model calls and the teacher's outputs: x (s, c, h, w), t (s,), y (s,), output (s, rows, h, w)."""

    x: Tensor
    t: Tensor
    y: Tensor
    output: Tensor
    truth: Tensor | None = None
    """The data's own targets (s, c, h, w), if there are data."""
    weight: Tensor | None = None
    """How much an error counts (s,); None is 1 for all."""

    def __len__(self) -> int:
        return len(self.t)

    def at(self, index: Tensor) -> Targets:
        """The states at `index` (b,)."""
        return self.map(lambda values: values[index])

    def to(self, device: torch.device) -> Targets:
        return self.map(lambda values: values.to(device))

    def map(self, change: Callable[[Tensor], Tensor]) -> Targets:
        """`change` of every tensor that is there."""
        truth, weight = (None if values is None else change(values) for values in (self.truth, self.weight))
        return Targets(change(self.x), change(self.t), change(self.y), change(self.output), truth, weight)


def teacher_targets(teacher: DiffusionTransformer, labels: Tensor, sampler: Sampler, first_index: int = 0) -> tuple[Targets, Samples]:
    """Every call of the teacher (level softmax) while it samples `labels`, sample after sample, and what it sampled.

    Sampling with the teacher already computes the targets, so they are free.
    """
    kept: list[tuple[Tensor, ...]] = []

    def keep(module: object, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        kept.append(tuple(values.detach().cpu() for values in (*inputs, output)))

    hook = teacher.register_forward_hook(keep)
    try:
        samples = sample_batch(teacher, labels, sampler, SOFTMAX, first_index=first_index)
    finally:
        hook.remove()
    by_call = (torch.stack(parts) for parts in zip(*kept, strict=True))  # (calls, halves * samples, ...)
    targets = Targets(*(values.unflatten(1, (-1, len(labels))).movedim(2, 0).flatten(0, 2) for values in by_call))
    return targets, Samples(samples.float().cpu(), labels.cpu())


def batches_for(count: int, calls: int, trajectories: int, sampler: Sampler) -> int:
    """How many times `trajectories` samples are drawn, so that no state is used twice."""
    return -(-count // (calls * trajectories * sampler.rows))


class DataSet(Protocol):
    """Clean data for a model, from any source."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
        """Data (b, c, h, w) in the model's scale and labels (b,)."""


def data_states(
    arch: Architecture,
    data: DataSet,
    count: int,
    *,
    cfg_scale: float,
    seed: int = 0,
    read_at_once: int = 64,
    on_read: Callable[[int], object] | None = None,
) -> tuple[States, Tensor]:
    """`count` states of noised data at times drawn evenly, in random order, and what a model is trained to predict at them (s, c, h, w).

    No item is used twice before all are used once.

    Times are those that the model's process is trained at. The same seed gives the same states.

    Args:
        cfg_scale: guidance that will be sampled with: unless it is 1, half of the labels are null.
        on_read: called with the number of items read.
    """
    refuse_guidance(arch, cfg_scale)
    process, random = process_of(arch), generator(seed, "states")
    rounds = -(-count // len(data))
    indices = torch.cat([torch.randperm(len(data), generator=random) for _ in range(rounds)])[:count]
    clean, labels = [], []
    for part in indices.split(read_at_once):
        x, y = data.read(part.tolist(), seed)
        clean.append(x)
        labels.append(y)
        if on_read is not None:
            on_read(len(part))
    x, y = torch.cat(clean), torch.cat(labels)
    t = process.training_times(count, random)
    if cfg_scale != 1:
        y[torch.randperm(count, generator=random)[: count // 2]] = arch.classes
    noise = torch.randn(x.shape, generator=random)
    return States(noised(process, x, noise, t), t, y), process.target(x, noise)


def training_states(
    arch: Architecture, data: DataSet, items: Sequence[int], places: Sequence[int], *, step: int, label_dropout: float, seed: int = 0
) -> Targets:
    """Noised data as the originals train on them: a state of each of `items`, and what a model is to predict there, without a teacher.

    Args:
        places: of the states in the whole training. A state's time, noise and dropped label are a function of (seed, place) alone.
        step: of the training; what the data draw for an item (flipped or not) is a function of (seed, step, item).
        label_dropout: probability that a label is replaced by the null class.
    """
    process = process_of(arch)
    x, y = data.read(items, seed_for(seed, "training step", step))
    times, noises = [], []
    for row, place in enumerate(places):
        random = generator(seed, "training state", place)
        times.append(process.training_times(1, random))
        noises.append(torch.randn(x.shape[1:], generator=random))
        if torch.rand(1, generator=random) < label_dropout:
            y[row] = arch.classes
    t, noise = torch.cat(times), torch.stack(noises)
    target = process.target(x, noise)
    return Targets(noised(process, x, noise, t), t, y, target, target)


@torch.no_grad()
def data_targets(
    teacher: DiffusionTransformer,
    data: DataSet,
    count: int,
    *,
    cfg_scale: float,
    seed: int = 0,
    batch: int = 64,
    part: slice = slice(None),
) -> Targets:
    """What the teacher answers, and the data say, at `count` states of noised data (`data_states`), or at a part of them."""
    states, truth = data_states(teacher.arch, data, count, cfg_scale=cfg_scale, seed=seed)
    own = Targets(states.x[part], states.t[part], states.y[part], truth[part], truth[part])
    device = next(teacher.parameters()).device
    rows = (own.at(index).to(device) for index in torch.arange(len(own)).split(batch))
    return replace(own, output=torch.cat([teacher(row.x, row.t, row.y).float().cpu() for row in rows]))
