"""What a sampler costs by the level of every cell: FLOPs in closed form, or seconds measured on this device."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from mediatorize.compression.allocate import Choice, total
from mediatorize.devices import seconds
from mediatorize.model import cost
from mediatorize.model.architecture import SOFTMAX, Architecture, Level, MediatorSettings
from mediatorize.model.transformer import DiffusionTransformer

CostKind = Literal["flops", "latency"]

TIMINGS = 5
"""A latency is the median of this many."""


@dataclass(frozen=True)
class Costs:
    """Of a whole sampler: FLOPs of one sample, whole numbers, or seconds of one batch."""

    kind: CostKind
    cells: NDArray[Any]
    """(cells, layers, options): what a layer's level decides. Softmax is the last option."""
    rest: int | float
    """Everything else."""

    @property
    def softmax(self) -> Any:
        return self.rest + self.cells[:, :, -1].sum().item()

    @property
    def least(self) -> float:
        """The smallest share of softmax's cost that can be reached."""
        return float((self.rest + self.cells.min(2).sum().item()) / self.softmax)

    def of(self, choice: Choice) -> Any:
        return self.rest + total(self.cells, choice)

    def room(self, share: float) -> Any:
        """What the attention layers may cost for the whole to keep a share of softmax's cost."""
        whole = share * self.softmax
        return (math.floor(whole) if self.kind == "flops" else whole) - self.rest


def flops_costs(arch: Architecture, settings: MediatorSettings, calls: Sequence[int], rows: int) -> Costs:
    """`calls` are of each cell, `rows` of a model call per sample: guidance makes them two."""
    options: list[Level] = [*settings.levels, SOFTMAX]
    one = np.array([cost.layer_flops(arch, level, settings) for level in options], dtype=np.int64)
    times = np.asarray(calls, dtype=np.int64) * rows
    rest = cost.forward_flops(arch) - arch.depth * int(one[-1])
    return Costs("flops", np.tile(times[:, None, None] * one, (1, arch.depth, 1)), rest * int(times.sum()))


@torch.no_grad()
def latency_costs(model: DiffusionTransformer, settings: MediatorSettings, calls: Sequence[int], rows: int) -> Costs:
    """Seconds of model calls of `rows` rows, on the model's device and in its precision.

    Every layer is timed at every level. Layers have one shape, so that their times differ by chance alone: a level's time is the median
    over layers, lest the solver choose by chance.
    """
    arch, parameter = model.arch, next(model.parameters())
    options: list[Level] = [*settings.levels, SOFTMAX]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(rows, arch.tokens, arch.width, generator=generator).to(parameter)
    layers = model.attention_layers()
    one = [statistics.median(median_seconds(lambda: layer(tokens, level), tokens.device) for layer in layers) for level in options]  # noqa: B023
    x = torch.randn(rows, arch.channels, *arch.input_size, generator=generator).to(parameter)
    t, y = torch.full((rows,), 0.5, device=x.device), torch.zeros(rows, dtype=torch.long, device=x.device)
    rest = max(0.0, median_seconds(lambda: model(x, t, y), x.device) - arch.depth * one[-1])
    times = np.asarray(calls, dtype=np.float64)
    return Costs("latency", np.tile(times[:, None, None] * np.array(one), (1, arch.depth, 1)), rest * float(times.sum()))


def median_seconds(call: Callable[[], object], device: torch.device, times: int = TIMINGS) -> float:
    """The median time of a call, after one to warm up."""
    return statistics.median([seconds(call, device) for _ in range(times + 1)][1:])
