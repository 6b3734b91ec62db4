"""`mediatorize sample`: pictures from a bundle or a checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from mediatorize.diffusion.solvers import Channels, call_noise_levels, find_solver, rows_per_sample
from mediatorize.diffusion.solvers import sample as sample_batch
from mediatorize.errors import UserError
from mediatorize.formats.images import Pixels, decode, load_vae, to_pixels, write_arrays, write_grid
from mediatorize.formats.loading import load_model
from mediatorize.model import cost
from mediatorize.model.architecture import SOFTMAX, Architecture, Level, MediatorSettings, levels_per_layer
from mediatorize.model.schedule import Schedule
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.stages.options import (
    BatchOption,
    ChannelsOption,
    ClassesOption,
    DeviceOption,
    DtypeOption,
    FamilyOption,
    ForceOption,
    GuidanceOption,
    HeadsOption,
    Option,
    SeedOption,
    SolverOption,
    StepsOption,
    VaeOption,
    WeightsOption,
)
from mediatorize.stages.running import pick_device, pick_dtype, progress_bar, refuse_below


@dataclass(frozen=True)
class Sampling:
    """How pictures are made: everything that `sample_many` needs beside a model and labels."""

    solver: str | None = None
    steps: int | None = None
    cfg_scale: float = 1.0
    cfg_channels: Channels = 3
    seed: int = 0
    batch: int = 64


@dataclass(frozen=True)
class SampleReport:
    out: Path
    count: int
    name: str
    level: str
    seconds: float
    flops: float | None
    """Of all samples, guidance included; unknown for an adaptive solver."""
    softmax_flops: float | None

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "out": str(self.out)}

    def __str__(self) -> str:
        text = f"{self.out}: {self.count} samples of {self.name} at level {self.level} in {self.seconds:.1f} s"
        if self.flops is None or self.softmax_flops is None:
            return text
        return f"{text}; {self.flops / 1e9:.1f} GFLOPs ({self.flops / 2e9:.1f} GMACs), {self.flops / self.softmax_flops:.1%} of softmax's"


def sample(
    model: Annotated[str, Option("a bundle or a pretrained checkpoint")],
    *,
    out: Annotated[Path, Option("a .png for a grid, a .npz for an array: arr_0 uint8 for the ADM evaluator, or latents without --vae")],
    classes: Annotated[tuple[int, ...] | None, Option("class numbers, such as 207,360; default: every class in turn, up to ten")] = None,
    per_class: Annotated[int, Option("samples of each class")] = 1,
    level: Annotated[
        Level | None, Option("a mediator count or softmax, for all layers and steps; default: the bundle's schedule, else softmax")
    ] = None,
    solver: SolverOption = None,
    steps: StepsOption = None,
    cfg_scale: GuidanceOption = 1.0,
    cfg_channels: ChannelsOption = 3,
    seed: SeedOption = 0,
    batch: BatchOption = 64,
    vae: VaeOption = None,
    family: FamilyOption = None,
    num_heads: HeadsOption = None,
    num_classes: ClassesOption = None,
    weights: WeightsOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    force: ForceOption = False,
) -> SampleReport:
    """Samples pictures. The same seed gives the same pictures, in batches of any size (dopri5 alone chooses its steps by batch)."""
    refuse_bad_output(out, force)
    refuse_below({"per-class": per_class, "batch": batch}, 1)
    loaded = load_model(model, family=family, num_heads=num_heads, num_classes=num_classes, weights=weights)
    arch = loaded.arch
    refuse_unknown_level(loaded, level)
    as_pixels = vae is not None or arch.channels in (1, 3)
    if out.suffix == ".png" and not as_pixels:
        raise UserError(
            f"{model}: makes latents of {arch.channels} channels.", hint="Pass --vae PATH, or --out something.npz for the latents."
        )
    where = pick_device(device)
    decoder = load_vae(vae, where) if vae else None
    loaded = loaded.to(device=where, dtype=pick_dtype(dtype))

    chosen = classes or tuple(range(min(arch.classes, 10)))
    labels = torch.tensor(chosen).repeat_interleave(per_class)
    sampling = Sampling(solver, steps, cfg_scale, cfg_channels, seed, batch)
    start = time.monotonic()
    latents = sample_many(loaded, labels, sampling, level, "sampling")
    seconds = time.monotonic() - start
    if not as_pixels:
        write_arrays(out, latents=latents.numpy(), labels=labels.numpy())
    else:
        pixels = to_pixels(latents) if decoder is None else decode_many(decoder, latents, where)
    if as_pixels and out.suffix == ".npz":
        write_arrays(out, arr_0=pixels.repeat(3, -1) if pixels.shape[-1] == 1 else pixels, labels=labels.numpy())
    elif as_pixels:
        write_grid(out, pixels, grid_columns(len(pixels), per_class), scale=max(1, 64 // pixels.shape[1]))
    spent = sampling_flops(arch, sampling, level if level is not None else loaded.schedule, loaded.settings)
    all_softmax = sampling_flops(arch, sampling, SOFTMAX, None)
    shown = str(level) if level is not None else "of the schedule" if loaded.schedule else SOFTMAX
    return SampleReport(
        out,
        len(labels),
        arch.name,
        shown,
        seconds,
        None if spent is None else spent * len(labels),
        None if all_softmax is None else all_softmax * len(labels),
    )


def decode_many(decoder: Any, latents: Tensor, device: torch.device) -> Pixels:
    """Any number of latents (n, c, h, w) as bytes; pictures are never all in memory as floats."""
    parts = []
    with progress_bar(len(latents), "decoding", "picture") as bar:
        for part in latents.split(8):
            parts.append(to_pixels(decode(decoder, part.to(device))))
            bar.update(len(part))
    return np.concatenate(parts)


def sample_many(
    model: DiffusionTransformer, labels: Tensor, sampling: Sampling, level: Schedule | Level | None, description: str
) -> Tensor:
    """Any number of samples, in batches, on the CPU in float32: (n, c, h, w)."""
    parts = []
    with progress_bar(len(labels), description, "sample") as bar:
        for first in range(0, len(labels), sampling.batch):
            part = labels[first : first + sampling.batch]
            parts.append(sample_part(model, part, first, sampling, level))
            bar.update(len(part))
    return torch.cat(parts)


def sample_part(
    model: DiffusionTransformer,
    labels: Tensor,
    first: int,
    sampling: Sampling,
    level: Schedule | Level | None,
    observe: Callable[[Tensor, Tensor, Tensor], Any] | None = None,
) -> Tensor:
    """One batch, whose samples have indices from `first`, on the CPU in float32; refuses what is not finite."""
    latents = sample_batch(
        model,
        labels,
        solver=sampling.solver,
        steps=sampling.steps,
        cfg_scale=sampling.cfg_scale,
        cfg_channels=sampling.cfg_channels,
        seed=sampling.seed,
        schedule=level,
        first_index=first,
        observe=observe,
    )
    if not latents.isfinite().all():
        raise UserError("The samples are not finite.", hint="Try --dtype float32, more steps or less guidance.")
    return latents.float().cpu()


def refuse_unknown_level(model: DiffusionTransformer, level: Level | None) -> None:
    levels = (*(model.settings.levels if model.settings else ()), SOFTMAX)
    if level is not None and level not in levels:
        raise UserError(f"This model has no level {level}.", hint=f"It has {', '.join(map(str, levels))}.")


def sampling_flops(
    arch: Architecture, sampling: Sampling, level: Schedule | Level | None, settings: MediatorSettings | None
) -> float | None:
    """FLOPs of one sample, all calls and guidance included; None where an adaptive solver decides."""
    if find_solver(arch, sampling.solver).adaptive:
        return None
    total = sum(float(cost.forward_flops(arch, levels, settings)) for levels in levels_of_calls(arch, sampling, level))
    return total * rows_per_sample(sampling.cfg_scale)


def levels_of_calls(arch: Architecture, sampling: Sampling, level: Schedule | Level | None) -> list[tuple[Level, ...]]:
    """The level of every layer, for each model call of a sampler with fixed steps."""
    solver = find_solver(arch, sampling.solver)
    found = []
    for at in call_noise_levels(arch, solver, sampling.steps or solver.default_steps):
        levels = level.at(at) if isinstance(level, Schedule) else SOFTMAX if level is None else level
        found.append(tuple(levels_per_layer(levels, arch.depth)))
    return found


def refuse_bad_output(out: Path, force: bool) -> None:
    if out.suffix not in (".png", ".npz"):
        raise UserError(f"{out}: neither .png nor .npz.", hint="Name a .png for a grid or a .npz for an array.")
    if out.exists() and not force:
        raise UserError(f"{out}: exists.", hint="Pass --force to replace it, or another path.")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out}: its folder does not exist.", hint=f"Make {out.parent} first.")


def grid_columns(count: int, per_class: int) -> int:
    """A row per class where there are several of each; else rows of ten, or a square of more than a hundred."""
    return per_class if 1 < per_class <= 16 else min(count, max(10, math.isqrt(count)))
