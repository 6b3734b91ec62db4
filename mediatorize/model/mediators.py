"""What one count of mediators owns in one layer (design 2): pooling, position terms, scales; and the cells that pooling starts from."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mediatorize.errors import UserError
from mediatorize.model import forms
from mediatorize.model.architecture import PUBLISHED_GRID, coarse_grid

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
        if layer.norms == (None,) and forms.absorbed_is_cheaper(x.shape[1], x.shape[2], layer.heads, self.mediators):
            return layer.absorbed(x, self.mediators, onto=local)
        out = layer.plain(x, self.mediators)
        return out if local is None else out + local

    def scales(self) -> tuple[Tensor, Tensor]:
        """Of the keys' and of the queries' scores, (h, 1, 1) each."""
        return self.log_key_scale.exp().view(-1, 1, 1), self.log_query_scale.exp().view(-1, 1, 1)

    def on_tokens(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """R, B1 and B2 on a token grid, (h*m, n) each."""
        maps: tuple[Tensor, ...] = (self.pool, self.key_bias, self.query_bias)
        coarse = (self.pool.shape[2], self.pool.shape[3])
        if coarse == grid:
            pool, key_bias, query_bias = (y.flatten(2).flatten(0, 1) for y in maps)
            return pool, key_bias, query_bias
        rows, columns = (_interpolation(size, fine, self.pool) for size, fine in zip(coarse, grid, strict=True))
        maps = (self.pool / torch.outer(rows.sum(1), columns.sum(1)), *maps[1:])
        pool, key_bias, query_bias = (rows.mT @ torch.stack(maps) @ columns).flatten(3).flatten(1, 2)
        return pool, key_bias, query_bias

    def beside(self, values: Tensor, grid: tuple[int, int]) -> Tensor | None:
        """Nothing is added to what queries get."""
        return None


class PublishedLevel(nn.Module):
    """What one mediator count owns in one layer in the published form: position terms and a convolution of the values.

    Mediators are average-pooled queries on a square grid. Position terms are the sum of a bilinearly interpolated 7x7 map and of a term per
    row and per column of tokens. Names and shapes are those of the original code (`models.py` of LeapLabTHU/Attention-Mediators).
    """

    def __init__(self, mediators: int, width: int, heads: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.mediators, self.side, self.unit = mediators, math.isqrt(mediators), (width // heads) ** -0.5
        rows, columns = grid
        self.an_bias = nn.Parameter(torch.zeros(heads, mediators, PUBLISHED_GRID, PUBLISHED_GRID))
        self.na_bias = nn.Parameter(torch.zeros(heads, mediators, PUBLISHED_GRID, PUBLISHED_GRID))
        self.ah_bias = nn.Parameter(torch.zeros(1, heads, mediators, rows, 1))
        self.aw_bias = nn.Parameter(torch.zeros(1, heads, mediators, 1, columns))
        self.ha_bias = nn.Parameter(torch.zeros(1, heads, rows, 1, mediators))
        self.wa_bias = nn.Parameter(torch.zeros(1, heads, 1, columns, mediators))
        self.dwc = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width)
        nn.init.zeros_(self.dwc.weight)
        nn.init.zeros_(self.dwc.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, layer: MediatorAttention) -> Tensor:
        """(b, n, c) -> (b, n, c) through `layer`'s projections, in the published order of operations."""
        return layer.plain(x, self.mediators)

    def reset(self, generator: torch.Generator) -> None:
        """Draws everything anew for training from random weights, as the original code does: position terms from a normal distribution of
        deviation 0.02, cut at +-2; the convolution uniform in +-1/sqrt(inputs)."""
        for terms in (self.an_bias, self.na_bias, self.ah_bias, self.aw_bias, self.ha_bias, self.wa_bias):
            nn.init.trunc_normal_(terms, std=0.02, generator=generator)
        bound = self.dwc.weight[0].numel() ** -0.5
        for parameter in self.dwc.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def scales(self) -> tuple[float, float]:
        """Of the keys' and of the queries' scores: 1/sqrt(d)."""
        return self.unit, self.unit

    def on_tokens(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Average pooling R and position terms B1 and B2 on a token grid, (h*m, n) each."""
        heads, m = self.an_bias.shape[:2]
        n = grid[0] * grid[1]
        lines = (torch.eye(size, device=self.an_bias.device, dtype=self.an_bias.dtype) for size in grid)
        rows, columns = (F.adaptive_avg_pool1d(line.unsqueeze(0), self.side)[0].mT for line in lines)  # (side, size) each
        pool = torch.kron(rows, columns).repeat(heads, 1)
        to_keys, to_queries = (F.interpolate(map, size=grid, mode="bilinear") for map in (self.an_bias, self.na_bias))  # (h, m, *grid)
        to_keys = to_keys + self.ah_bias[0] + self.aw_bias[0]
        to_queries = to_queries + (self.ha_bias + self.wa_bias)[0].permute(0, 3, 1, 2)
        return pool, to_keys.reshape(heads * m, n), to_queries.reshape(heads * m, n)

    def beside(self, values: Tensor, grid: tuple[int, int]) -> Tensor:
        """A depthwise 3x3 convolution of the values (b, h, n, d), which is added to what queries get: (b, n, c)."""
        over_grid = values.permute(0, 1, 3, 2).flatten(1, 2).unflatten(2, grid)  # (b, c, rows, columns)
        return self.dwc(over_grid).flatten(2).mT


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


def _interpolation(coarse: int, fine: int, like: Tensor) -> Tensor:
    """Linear interpolation from `coarse` to `fine` points as a matrix (coarse, fine); bilinear is one on each side."""
    unit = torch.eye(coarse, device=like.device, dtype=like.dtype).unsqueeze(0)
    return F.interpolate(unit, size=fine, mode="linear", align_corners=False)[0]
