"""Calibration states: what the teacher meets along its own sampling trajectories, or noised data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mediatorize.diffusion.process import TRAIN_STEPS, noised, own_time
from mediatorize.diffusion.solvers import Channels, call_times, find_solver, rows_per_sample, sample
from mediatorize.model.architecture import SOFTMAX, Architecture
from mediatorize.model.transformer import DiffusionTransformer


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
    *,
    solver: str | None = None,
    steps: int | None = None,
    cfg_scale: float = 1.5,
    cfg_channels: Channels = 3,
    trajectories: int = 32,
    seed: int = 0,
    on_call: Callable[[], None] | None = None,
) -> States:
    """`count` states of the teacher (level softmax), spread evenly over its sampler's calls, of random classes, in random order.

    Args:
        trajectories: how many samples are drawn at once; as many times as it takes for no state to be used twice.
        cfg_scale: guidance; half of the states are then unconditional. Without a null class nothing is guided.
        on_call: called after every model call.
    """
    chosen = find_solver(model.arch, solver)
    steps = chosen.default_steps if steps is None else steps
    cfg_scale = cfg_scale if model.arch.null_class else 1.0
    calls = len(call_times(chosen, steps))
    batches = batches_for(count, calls, trajectories, cfg_scale)
    wanted = torch.linspace(0, batches * calls, count + 1, dtype=torch.float64)[:-1].long().bincount(minlength=batches * calls)
    generator = torch.Generator().manual_seed(seed)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    call = 0

    def keep(x: Tensor, t: Tensor, y: Tensor) -> None:
        nonlocal call
        rows = torch.randperm(len(t), generator=generator)[: int(wanted[call])]
        kept.append((x.cpu()[rows], t.cpu()[rows], y.cpu()[rows]))
        call += 1
        if on_call is not None:
            on_call()

    for index in range(batches):
        labels = torch.randint(0, model.arch.classes, (trajectories,), generator=generator)
        sample(
            model,
            labels,
            solver=solver,
            steps=steps,
            cfg_scale=cfg_scale,
            cfg_channels=cfg_channels,
            seed=seed,
            schedule=SOFTMAX,
            first_index=index * trajectories,
            observe=keep,
        )
    order = torch.randperm(count, generator=generator)
    x, t, y = (torch.cat(parts)[order] for parts in zip(*kept, strict=True))
    return States(x, t, y)


def batches_for(count: int, calls: int, trajectories: int, cfg_scale: float) -> int:
    """How many times `trajectories` samples are drawn, so that no state is used twice."""
    return -(-count // (calls * trajectories * rows_per_sample(cfg_scale)))


class DataSet(Protocol):
    """Clean data of a model, wherever they come from."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
        """Data (b, c, h, w) in the model's scale and labels (b,)."""


def data_states(
    arch: Architecture,
    data: DataSet,
    count: int,
    *,
    cfg_scale: float = 1.5,
    seed: int = 0,
    read_at_once: int = 64,
    on_read: Callable[[int], None] | None = None,
) -> States:
    """`count` states of noised data at times drawn evenly, in random order; no item is used twice before all are used once.

    Times are DiT's whole timesteps 0..999, or a SiT's noise levels in [0, 1], as each is trained. The same seed gives the same states.

    Args:
        cfg_scale: guidance that will be sampled with: unless it is 1, or there is no null class, half of the labels are null.
        on_read: called with the number of items read.
    """
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-count // len(data))
    indices = torch.cat([torch.randperm(len(data), generator=generator) for _ in range(rounds)])[:count]
    clean, labels = [], []
    for part in indices.split(read_at_once):
        x, y = data.read(part.tolist(), seed)
        clean.append(x)
        labels.append(y)
        if on_read is not None:
            on_read(len(part))
    x, y = torch.cat(clean), torch.cat(labels)
    if arch.family == "dit":
        t = torch.randint(0, TRAIN_STEPS, (count,), generator=generator).float()
    else:
        t = own_time(arch, torch.rand(count, generator=generator))
    if cfg_scale != 1 and arch.null_class:
        y[torch.randperm(count, generator=generator)[: count // 2]] = arch.classes
    return States(noised(arch, x, torch.randn(x.shape, generator=generator), t), t, y)
