"""FLOPs and parameters of a model in closed form; one multiply-add is two FLOPs. No torch here.

Counted as `torch.utils.flop_counter` does: matrix products and convolutions, not element-wise work, norms or softmax. The papers'
"Gflops" of DiT and SiT are multiply-adds (MACs), half of these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mediatorize.model.architecture import FREQUENCIES, MLPS, Architecture, coarse_grid
from mediatorize.model.forms import published_parameters
from mediatorize.model.levels import (
    SOFTMAX,
    Level,
    MediatorSettings,
    changes_modulation,
    kind_of,
    levels_per_layer,
    mlp_share,
    most_mediators,
    parts_of,
)
from mediatorize.model.schedule import Levels, with_memory


def attention_flops(arch: Architecture, level: Level, settings: MediatorSettings | None = None) -> int:
    """One attention layer of `arch` at `level`, in the form that runs."""
    return kind_of(level).flops(arch, level, settings)


def mlp_flops(arch: Architecture, level: Level) -> int:
    """One MLP of `arch`, of a block at `level`."""
    return 2 * (MLPS[arch.mlp].rows + 1) * arch.tokens * arch.width * (arch.mlp_width // mlp_share(parts_of(level).mlp))


def modulation_flops(arch: Architecture, level: Level, settings: MediatorSettings | None) -> int:
    """A block's six modulation vectors, once per sample; at the added levels also their low-rank change."""
    changed = changes_modulation(level)
    return 12 * arch.width**2 + (14 * arch.width * settings.modulation_rank if settings and changed else 0)


def block_flops(arch: Architecture, level: Level, settings: MediatorSettings | None = None) -> int:
    """One whole block."""
    return attention_flops(arch, level, settings) + mlp_flops(arch, level) + modulation_flops(arch, level, settings)


def forward_flops_by_part(
    arch: Architecture, levels: Level | Sequence[Level] = SOFTMAX, settings: MediatorSettings | None = None
) -> dict[str, int]:
    """FLOPs of one forward on one sample, by part."""
    tokens, width = arch.tokens, arch.width
    per_layer = levels_per_layer(levels, arch.depth, settings)
    return {
        "patch embedding": 2 * tokens * width * arch.channels * arch.patch**2,
        "timestep embedding": 2 * FREQUENCIES * width + 2 * width**2,
        "attention": sum(attention_flops(arch, level, settings) for level in per_layer),
        "mlp": sum(mlp_flops(arch, level) for level in per_layer),
        "modulation": sum(modulation_flops(arch, level, settings) for level in per_layer) + 4 * width**2,
        "last layer": 2 * tokens * width * arch.last_rows,
    }


def calls_flops(arch: Architecture, calls: Sequence[Levels], rows: Sequence[int], settings: MediatorSettings | None = None) -> int:
    """FLOPs of one sample's model calls, with the mediators whose rests later calls hold.

    Args:
        rows: of each call per sample: 2 where it is guided, else 1.
    """
    total = 0
    for levels, watched, count in zip(*with_memory(calls, rows), rows, strict=True):
        beside = sum(attention_flops(arch, level, settings) for layer in watched for level in layer)
        total += count * (forward_flops(arch, levels, settings) + beside)
    return total


def forward_flops(arch: Architecture, levels: Level | Sequence[Level] = SOFTMAX, settings: MediatorSettings | None = None) -> int:
    """FLOPs of one forward on one sample."""
    return sum(forward_flops_by_part(arch, levels, settings).values())


@dataclass(frozen=True, kw_only=True)
class Reachable:
    """Cost of a model at one resolution. FLOPs are for one forward pass on one sample; one multiply-add is two FLOPs."""

    arch: Architecture
    flops: int
    """With every layer at softmax."""
    relative: Mapping[Level, float]
    """FLOPs with every converted layer at one level, as a share of softmax's. Levels that do not fit the resolution are left out."""


def reachable(arch: Architecture, settings: MediatorSettings) -> tuple[Reachable, ...]:
    """What the levels of `settings` would save at half the resolution of `arch`, at its own, and at twice it."""
    found = []
    for scale in (0.5, 1, 2):
        grid = int(arch.grid[0] * scale), int(arch.grid[1] * scale)
        if min(grid) < 2:
            continue
        scaled, softmax = replace(arch, grid=grid), forward_flops(replace(arch, grid=grid))
        cells = math.prod(coarse_grid(grid))
        fitting = [level for level in settings.levels if most_mediators([level]) <= cells]
        relative = {level: forward_flops(scaled, level, settings) / softmax for level in fitting}
        found.append(Reachable(arch=scaled, flops=softmax, relative=relative))
    return tuple(found)


def count_parameters(arch: Architecture, settings: MediatorSettings | None = None) -> int:
    """Parameters of a model, its position embedding included as the published counts do; with `settings` also what is added."""
    width = arch.width
    embedders = _linear(arch.channels * arch.patch**2, width) + _linear(FREQUENCIES, width) + _linear(width, width)
    embedders += (arch.classes + arch.null_class + arch.tokens) * width
    block = _linear(width, 3 * width) + _linear(width, width) + _mlp_parameters(arch) + _linear(width, 6 * width)
    block += published_parameters(width, arch.heads, arch.grid, arch.mediators) if arch.mediators else 0
    block += (2 if arch.norm == "rms" else 4) * arch.head_width if arch.qk_norm else 0
    last = _linear(width, arch.last_rows) + _linear(width, 2 * width)
    if arch.norm == "rms":
        block, last = block + 2 * width, last + width
    added = added_parameters(arch, settings) if settings else 0
    return embedders + arch.depth * block + last + added


def added_parameters(arch: Architecture, settings: MediatorSettings) -> int:
    """Parameters that conversion adds to a model."""
    width, local, update = arch.width, settings.local_rank, settings.modulation_rank
    rank, block = settings.projection_rank, 0
    if rank is not None:
        block = 6 * width * rank + 4 * width if rank else _linear(width, 3 * width) + _linear(width, width)
    block += sum(kind_of(level).parameters(arch, level, settings) for level in settings.levels)
    block += 2 * width * local + 9 * local
    block += width * update + _linear(update, 6 * width) if update else 0
    block += _mlp_parameters(arch) if settings.mlp == "own" else 0
    if settings.mlp_widths:
        hidden = arch.mlp_width // settings.mlp_widths[-1]
        block += MLPS[arch.mlp].rows * _linear(width, hidden) + hidden * width + width * len(settings.mlp_widths)
    return len(settings.converted(arch.depth)) * block


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _mlp_parameters(arch: Architecture) -> int:
    return _linear(arch.width, MLPS[arch.mlp].rows * arch.mlp_width) + _linear(arch.mlp_width, arch.width)
