"""What one count of mediators owns in one layer (design 2): pooling, position terms, scales; and the cells that pooling starts from."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mediatorize.errors import UserError
from mediatorize.model import forms
from mediatorize.model.architecture import coarse_grid

if TYPE_CHECKING:
    from mediatorize.model.attention import MediatorAttention
    from mediatorize.model.levels import Space

SHARPNESS = 8.0
"""How much sharper than 1/sqrt(d) the assignment of tokens to mediators starts (design 2.2)."""


class MediatorLevel(nn.Module):
    """What one mediator count owns in one layer: pooling R, position terms B1 and B2, and two scales per head.

    R and the position terms live on a coarse grid (gh, gw) and are interpolated to the tokens at hand. R is stored as weights of a mean: a
    row that sums to 1 on the coarse grid sums to 1 on any token grid.
    """

    def __init__(self, mediators: int, width: int, heads: int, grid: tuple[int, int], space: Space) -> None:
        super().__init__()
        self.mediators = mediators
        unit = (width // heads) ** -0.5
        key_scale, query_scale = (unit, SHARPNESS * unit) if space == "queries" else (SHARPNESS * unit, unit)
        coarse = coarse_grid(grid)
        shape = (heads, mediators, *coarse)
        self.pool = nn.Parameter(grid_partition(mediators, coarse).view(1, mediators, *coarse).repeat(heads, 1, 1, 1))
        self.key_bias = nn.Parameter(torch.zeros(shape))
        self.query_bias = nn.Parameter(torch.zeros(shape))
        self.log_key_scale = nn.Parameter(torch.full((heads,), math.log(key_scale)))
        self.log_query_scale = nn.Parameter(torch.full((heads,), math.log(query_scale)))

    def forward(self, x: Tensor, layer: MediatorAttention) -> Tensor:
        """(b, n, c) -> (b, n, c) through `layer`'s projections, in the form that costs fewer FLOPs, and its local branch."""
        local = None if layer.local is None else layer.local(x, layer.grid)
        if forms.absorbed_is_cheaper(x.shape[1], x.shape[2], layer.heads, self.mediators):
            return layer.absorbed(x, self.mediators, onto=local)
        out = layer.plain(x, self.mediators)
        return out if local is None else out + local


def grid_partition(mediators: int, grid: tuple[int, int]) -> Tensor:
    """Average pooling of a (rows, columns) grid into any number of near-square cells: (mediators, rows * columns), rows sum to 1.

    The grid is cut into bands and each band into cells, of equal area throughout; cells may cut through tokens. Where `mediators` is
    a square that divides the grid this is ordinary average pooling. `mediators` = tokens gives the identity on square grids.
    """
    height, width = grid
    if mediators > height * width:
        raise UserError(f"{mediators} mediators do not fit {height * width} tokens ({height}x{width}).", hint="Pass smaller --levels.")
    bands = max(1, min(mediators, round(math.sqrt(mediators * height / width))))
    cells_of_band = [mediators // bands + (band < mediators % bands) for band in range(bands)]
    weights = []
    top = 0.0
    for cells in cells_of_band:
        bottom = top + height * cells / mediators
        rows = _overlap(top, bottom, height)
        for cell in range(cells):
            columns = _overlap(width * cell / cells, width * (cell + 1) / cells, width)
            weights.append(torch.outer(rows, columns).flatten())
        top = bottom
    partition = torch.stack(weights)
    return (partition / partition.sum(1, keepdim=True)).float()


def _overlap(start: float, stop: float, length: int) -> Tensor:
    """How much of each unit interval [i, i + 1) lies in [start, stop): (length,)."""
    edges = torch.arange(length, dtype=torch.float64)
    return ((edges + 1).clamp(max=stop) - edges.clamp(min=start)).clamp(min=0)
