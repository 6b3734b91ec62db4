"""FLOPs of every part and level in closed form; one multiply-add is two FLOPs (design 2.1). No torch here.

Counted as `torch.utils.flop_counter` does: matrix products and convolutions, not element-wise work, norms or softmax. The papers'
"Gflops" of DiT and SiT are multiply-adds (MACs), half of these.
"""

from __future__ import annotations

from collections.abc import Sequence

from mediatorize.model.architecture import FREQUENCIES, SOFTMAX, Architecture, Level, MediatorSettings, coarse_grid, levels_per_layer


def softmax_flops(tokens: int, width: int) -> int:
    """One softmax attention layer: q, k, v and output projections, then QK' and AV."""
    return 8 * tokens * width**2 + 4 * tokens**2 * width


def absorbed_flops(tokens: int, width: int, heads: int, mediators: int) -> int:
    """One absorbed mediator layer: five products of all tokens with all heads' mediators, five of the mediators with weights."""
    return 10 * tokens * heads * mediators * width + 10 * mediators * width**2


def plain_flops(tokens: int, width: int, heads: int, mediators: int) -> int:
    """One mediator layer in the published order: four projections of all tokens, five products of tokens with mediators."""
    return 8 * tokens * width**2 + 10 * tokens * mediators * width


def local_flops(tokens: int, width: int, rank: int) -> int:
    """The local branch: down, depthwise 3x3, up."""
    return 4 * tokens * width * rank + 18 * tokens * rank


def interpolation_flops(grid: tuple[int, int], heads: int, mediators: int) -> int:
    """R, B1 and B2 from their coarse grid to the tokens', where the two differ. Once per call, but counted for each sample."""
    coarse = coarse_grid(grid)
    if coarse == grid:
        return 0
    return 3 * heads * mediators * 2 * grid[0] * coarse[1] * (coarse[0] + grid[1])


def modulation_update_flops(arch: Architecture, level: Level, settings: MediatorSettings | None) -> int:
    """The low-rank change of a block's six modulation vectors at mediator levels; once per sample."""
    return 14 * arch.width * settings.modulation_rank if settings and level != SOFTMAX else 0


def absorbed_is_cheaper(tokens: int, width: int, heads: int, mediators: int) -> bool:
    return absorbed_flops(tokens, width, heads, mediators) <= plain_flops(tokens, width, heads, mediators)


def attention_flops(arch: Architecture, level: Level, settings: MediatorSettings | None = None) -> int:
    """One attention layer of `arch` at `level`, in the form that runs."""
    if level == SOFTMAX:
        return softmax_flops(arch.tokens, arch.width)
    sizes = (arch.tokens, arch.width, arch.heads, level)
    mediator = absorbed_flops(*sizes) if absorbed_is_cheaper(*sizes) else plain_flops(*sizes)
    local = local_flops(arch.tokens, arch.width, settings.local_rank if settings else 0)
    return mediator + interpolation_flops(arch.grid, arch.heads, level) + local


def layer_flops(arch: Architecture, level: Level, settings: MediatorSettings | None = None) -> int:
    """All of a layer's cost that depends on its level: the attention, and the modulation's change at mediator levels."""
    return attention_flops(arch, level, settings) + modulation_update_flops(arch, level, settings)


def forward_flops_by_part(
    arch: Architecture, levels: Level | Sequence[Level] = SOFTMAX, settings: MediatorSettings | None = None
) -> dict[str, int]:
    """FLOPs of one forward on one sample, by part."""
    tokens, width, depth = arch.tokens, arch.width, arch.depth
    per_layer = levels_per_layer(levels, depth)
    updates = sum(modulation_update_flops(arch, level, settings) for level in per_layer)
    return {
        "patch embedding": 2 * tokens * width * arch.channels * arch.patch**2,
        "timestep embedding": 2 * FREQUENCIES * width + 2 * width**2,
        "attention": sum(attention_flops(arch, level, settings) for level in per_layer),
        "mlp": depth * 4 * tokens * width * arch.mlp_width,
        "modulation": depth * 12 * width**2 + 4 * width**2 + updates,
        "last layer": 2 * tokens * width * arch.last_rows,
    }


def forward_flops(arch: Architecture, levels: Level | Sequence[Level] = SOFTMAX, settings: MediatorSettings | None = None) -> int:
    """FLOPs of one forward on one sample."""
    return sum(forward_flops_by_part(arch, levels, settings).values())
