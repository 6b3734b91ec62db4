"""FLOPs of one attention layer in each form it can take (design 2); one multiply-add is two FLOPs. No torch here.

Counted as `torch.utils.flop_counter` does: matrix products and convolutions, not element-wise work, norms or softmax.
"""

from __future__ import annotations

from mediatorize.model.architecture import PUBLISHED_GRID, Architecture, coarse_grid


def softmax_flops(tokens: int, width: int) -> int:
    """One softmax attention layer: q, k, v and output projections, then QK' and AV."""
    return 8 * tokens * width**2 + 4 * tokens**2 * width


def pretrained_flops(arch: Architecture) -> int:
    """One attention layer of the checkpoint itself: softmax attention, or mediator attention in the published form."""
    if arch.mediators:
        return published_flops(arch.tokens, arch.width, arch.heads, arch.mediators)
    return softmax_flops(arch.tokens, arch.width)


def absorbed_flops(tokens: int, width: int, heads: int, mediators: int) -> int:
    """One absorbed mediator layer: five products of all tokens with all heads' mediators, five of the mediators with weights."""
    return 10 * tokens * heads * mediators * width + 10 * mediators * width**2


def plain_flops(tokens: int, width: int, heads: int, mediators: int) -> int:
    """One mediator layer in the published order: four projections of all tokens, five products of tokens with mediators."""
    return 8 * tokens * width**2 + 10 * tokens * mediators * width


def published_flops(tokens: int, width: int, heads: int, mediators: int) -> int:
    """One layer of the published form: the same, and a depthwise 3x3 convolution of the values."""
    return plain_flops(tokens, width, heads, mediators) + 18 * tokens * width


def published_parameters(width: int, heads: int, grid: tuple[int, int], mediators: int) -> int:
    """What one count of mediators has of its own in the published form: position terms and the convolution."""
    return 2 * heads * mediators * (PUBLISHED_GRID**2 + sum(grid)) + 10 * width


def absorbed_change_flops(width: int, heads: int, mediators: int, rank: int) -> int:
    """What a low-rank change of the projections adds to the absorbed form: of mediators alone."""
    return 10 * heads * mediators * rank * (width + width // heads)


def change_in_weight(tokens: int, inputs: int, outputs: int) -> bool:
    """Whether adding a low-rank change to a weight costs no more than applying it to the tokens of one sample."""
    return inputs * outputs <= tokens * (inputs + outputs)


def plain_change_flops(tokens: int, width: int, rank: int) -> int:
    """The same to the published order: of all tokens, or of the weights. These are changed once per call, but counted for each sample."""
    total = 0
    for outputs in (3 * width, width):  # q, k, v; output
        added = change_in_weight(tokens, width, outputs)
        total += 2 * rank * (width * outputs if added else tokens * (width + outputs))
    return total


def absorbed_is_cheaper(tokens: int, width: int, heads: int, mediators: int) -> bool:
    """Whether the absorbed form costs no more. It needs scores that are linear in the input: a layer that normalises queries and keys
    runs the published order."""
    return absorbed_flops(tokens, width, heads, mediators) <= plain_flops(tokens, width, heads, mediators)


def local_flops(tokens: int, width: int, rank: int) -> int:
    """The local branch: down, depthwise 3x3, up."""
    return 4 * tokens * width * rank + 18 * tokens * rank


def interpolation_flops(grid: tuple[int, int], heads: int, mediators: int) -> int:
    """R, B1 and B2 from their coarse grid to the tokens', where the two differ. Once per call, but counted for each sample."""
    coarse = coarse_grid(grid)
    if coarse == grid:
        return 0
    return 3 * heads * mediators * 2 * grid[0] * coarse[1] * (coarse[0] + grid[1])
