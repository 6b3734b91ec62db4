"""Attention that can run as pretrained softmax attention or through a few mediator tokens (design 2).

Axes: b batch, n tokens, c width, h heads, d head width, m mediators.
"""

from __future__ import annotations

import math

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import flop_registry

from mediatorize.errors import UserError
from mediatorize.model import cost
from mediatorize.model.architecture import SOFTMAX, Level, MediatorSettings, coarse_grid

flop_registry.setdefault(torch.ops.aten.baddbmm_, flop_registry[torch.ops.aten.baddbmm])
"""torch's counter knows the product, but not in place, where it saves a copy of the layer's output."""

SHARPNESS = 8.0
"""How much sharper than 1/sqrt(d) the assignment of tokens to mediators starts (design 2.2)."""


class MediatorLevel(nn.Module):
    """What one mediator count owns in one layer: pooling R, position terms B1 and B2, and two scales per head.

    R and the position terms live on a coarse grid (gh, gw) and are interpolated to the tokens at hand. R is stored as weights of a mean: a
    row that sums to 1 on the coarse grid sums to 1 on any token grid.
    """

    def __init__(self, mediators: int, heads: int, grid: tuple[int, int], key_scale: float, query_scale: float) -> None:
        super().__init__()
        shape = (heads, mediators, *grid)
        self.pool = nn.Parameter(grid_partition(mediators, grid).view(1, mediators, *grid).repeat(heads, 1, 1, 1))
        self.key_bias = nn.Parameter(torch.zeros(shape))
        self.query_bias = nn.Parameter(torch.zeros(shape))
        self.log_key_scale = nn.Parameter(torch.full((heads,), math.log(key_scale)))
        self.log_query_scale = nn.Parameter(torch.full((heads,), math.log(query_scale)))


class LocalBranch(nn.Module):
    """`up(depthwise3x3(down(x)))`: neighbours that a handful of mediators cannot tell apart. Starts as zero."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.depthwise = nn.Conv2d(rank, rank, kernel_size=3, padding=1, groups=rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def reset(self, generator: torch.Generator) -> None:
        """Draws `down` and the convolution anew, uniform in +-1/sqrt(inputs); `up` stays zero."""
        for weight in (self.down.weight, self.depthwise.weight):
            bound = weight[0].numel() ** -0.5
            nn.init.uniform_(weight, -bound, bound, generator=generator)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(b, n, c) -> (b, n, c) over a token grid of (rows, columns)."""
        y = self.down(x).mT.unflatten(2, grid)
        return self.up(self.depthwise(y).flatten(2).mT)


class MediatorAttention(nn.Module):
    """Mediator attention (arXiv 2408.05710, section 3) in absorbed or plain form; both compute the same function.

    Per head, with pooled tokens R x and x the layer's input:

        T   = (R x) W + b                              W, b: query projection, or key projection for `space="keys"`
        S1  = softmax over n of (T k' s1 + B1)
        S2  = softmax over m of ((q T' - |T|^2 / 2) s2 + B2)
        out = S2 (S1 v)                                then all heads through the output projection

    Departures from the paper: mediators are a learned pooling of the input rather than an average of the queries; queries are
    assigned by distance (without the |T|^2 / 2 in key space, where T stands for keys); a low-rank local branch stands for the
    convolution on v; q, k and v are absorbed into the mediators, so that no projection runs on all n tokens.
    """

    def __init__(self, width: int, heads: int, grid: tuple[int, int], settings: MediatorSettings) -> None:
        super().__init__()
        self.heads, self.grid, self.settings = heads, grid, settings
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        unit = (width // heads) ** -0.5
        scales = (unit, SHARPNESS * unit) if settings.space == "queries" else (SHARPNESS * unit, unit)
        self.levels = nn.ModuleDict({str(m): MediatorLevel(m, heads, coarse_grid(grid), *scales) for m in settings.levels})
        self.local = LocalBranch(width, settings.local_rank) if settings.local_rank else None

    def level(self, mediators: int) -> MediatorLevel:
        try:
            return self.levels[str(mediators)]  # type: ignore[return-value]
        except KeyError:
            have = ", ".join([*self.levels, SOFTMAX])
            raise UserError(f"No level has {mediators} mediators.", hint=f"This model has {have}.") from None

    def forward(self, x: Tensor, mediators: int) -> Tensor:
        """(b, n, c) -> (b, n, c) with `mediators` per head, in the form that costs fewer FLOPs."""
        local = None if self.local is None else self.local(x, self.grid)
        if cost.absorbed_is_cheaper(x.shape[1], x.shape[2], self.heads, mediators):
            return self.absorbed(x, mediators, onto=local)
        out = self.plain(x, mediators)
        return out if local is None else out + local

    def absorbed(self, x: Tensor, mediators: int, onto: Tensor | None = None) -> Tensor:
        """The absorbed form (design 2.1): every product with all n tokens has h * m rows, never c. `onto` (b, n, c) is added to in place.

        Rows of products with weights are (m, b) within a head, so that every sample's (h*m, c) matrix is a strided view of them: two copies
        in all, of what comes out of products over tokens.
        """
        b, _, c = x.shape
        h, d, m = self.heads, c // self.heads, mediators
        level = self.level(m)
        wq, wk, wv = self.qkv.weight.view(3, h, d, c)
        bq, bk, bv = self.qkv.bias.view(3, h, 1, d)
        wo = self.proj.weight.view(c, h, d).permute(1, 2, 0)  # (h, d, c)
        w, bias = (wq, bq) if self.settings.space == "queries" else (wk, bk)

        def by_head(y: Tensor) -> Tensor:  # (b, h*m, c) -> (h, m*b, c)
            return y.transpose(0, 1).reshape(h, m * b, c)

        def by_sample(y: Tensor) -> Tensor:  # (h, m*b, c) -> (b, h*m, c)
            return y.view(h * m, b, -1).transpose(0, 1)

        pool, key_bias, query_bias = self.on_tokens(level)  # (h*m, n) each
        pooled = torch.bmm(pool.expand(b, -1, -1), x)  # (b, h*m, c)
        t = torch.baddbmm(bias, by_head(pooled), w.mT)  # (h, m*b, d)
        key_scale, query_scale = (s.exp().view(h, 1, 1) for s in (level.log_key_scale, level.log_query_scale))

        scores = torch.baddbmm(key_bias, by_sample(torch.bmm(t * key_scale, wk)), x.mT)  # (b, h*m, n)
        mixed = torch.bmm(scores.softmax(-1), x)  # (b, h*m, c)
        u = torch.baddbmm(bv, by_head(mixed), wv.mT)  # (h, m*b, d)
        # Every head's assignment sums to 1, so that an h-th of the output's bias in each head's values is the whole of it in the end.
        values = by_sample(torch.baddbmm(self.proj.bias / h, u, wo))  # (b, h*m, c)

        offset = (t * (bq - t / 2) if self.settings.space == "queries" else t * bq).sum(-1, keepdim=True) * query_scale
        queries = by_sample(torch.bmm(t * query_scale, wq))  # (b, h*m, c)
        scores = torch.baddbmm(query_bias, queries, x.mT).add_(by_sample(offset))  # (b, h*m, n)
        assigned = scores.unflatten(1, (h, m)).softmax(2).flatten(1, 2).mT  # (b, n, h*m)
        if onto is None:
            return torch.bmm(assigned, values)
        return onto.baddbmm_(assigned.to(onto.dtype), values.to(onto.dtype))  # autocast leaves products in place alone

    def plain(self, x: Tensor, mediators: int) -> Tensor:
        """The published order of operations: q, k and v for every token first."""
        b, n, c = x.shape
        h, d, m = self.heads, c // self.heads, mediators
        level = self.level(m)
        q, k, v = F.linear(x, self.qkv.weight).view(b, n, 3, h, d).permute(2, 0, 3, 1, 4)  # (b, h, n, d) each
        bq, bk, bv = self.qkv.bias.view(3, h, 1, d)
        pool, key_bias, query_bias = (y.view(h, m, n) for y in self.on_tokens(level))
        key_scale, query_scale = (s.exp().view(h, 1, 1) for s in (level.log_key_scale, level.log_query_scale))

        in_queries = self.settings.space == "queries"
        t = pool @ (q if in_queries else k) + (bq if in_queries else bk)  # (b, h, m, d)
        u = (t * key_scale @ k.mT + key_bias).softmax(-1) @ v + bv  # (b, h, m, d)
        norms = t.square().sum(-1).unsqueeze(-2) / 2 if in_queries else 0  # (b, h, 1, m)
        assigned = (((q + bq) @ t.mT - norms) * query_scale + query_bias.mT).softmax(-1)  # (b, h, n, m)
        return self.proj((assigned @ u).transpose(1, 2).reshape(b, n, c))

    def on_tokens(self, level: MediatorLevel) -> tuple[Tensor, Tensor, Tensor]:
        """R, B1 and B2 of a level on this model's tokens, (h*m, n) each."""
        coarse = coarse_grid(self.grid)
        maps: tuple[Tensor, ...] = (level.pool, level.key_bias, level.query_bias)
        if coarse == self.grid:
            pool, key_bias, query_bias = (y.flatten(2).flatten(0, 1) for y in maps)
            return pool, key_bias, query_bias
        rows, columns = (_interpolation(size, fine, level.pool) for size, fine in zip(coarse, self.grid, strict=True))
        maps = (level.pool / torch.outer(rows.sum(1), columns.sum(1)), *maps[1:])
        pool, key_bias, query_bias = (rows.mT @ torch.stack(maps) @ columns).flatten(3).flatten(1, 2)
        return pool, key_bias, query_bias


class SwitchableAttention(Attention):
    """timm's attention, as DiT and SiT use it, that can run at any of its mediator levels instead.

    Until `add_mediators` is called it has the pretrained layer's parameters and names, and only level `softmax`.
    """

    def __init__(self, width: int, heads: int, grid: tuple[int, int]) -> None:
        super().__init__(width, num_heads=heads, qkv_bias=True)
        self.grid = grid
        self.mediator: MediatorAttention | None = None

    def add_mediators(self, settings: MediatorSettings, seed: int = 0) -> MediatorAttention:
        """Gives the layer a mediator path that starts from a copy of its own projections. `seed` is of the local branch."""
        width = self.qkv.in_features
        mediator = MediatorAttention(width, self.num_heads, self.grid, settings)
        if not self.qkv.weight.is_meta:
            if mediator.local is not None:
                mediator.local.reset(torch.Generator().manual_seed(seed))
            mediator.qkv.load_state_dict(self.qkv.state_dict())
            mediator.proj.load_state_dict(self.proj.state_dict())
        mediator = mediator.to(device=self.qkv.weight.device, dtype=self.qkv.weight.dtype)
        self.mediator = mediator.train(self.training)
        return mediator

    def forward(self, x: Tensor, level: Level = SOFTMAX) -> Tensor:  # type: ignore[override]
        """(b, n, c) -> (b, n, c). Level `softmax` is timm's own forward on the pretrained weights."""
        if level == SOFTMAX:
            return super().forward(x)
        return self.mediated()(x, level)

    def mediated(self) -> MediatorAttention:
        """The mediator path; an error where the model was never converted."""
        if self.mediator is None:
            raise UserError("This model has no mediators, only level softmax.", hint="Run `mediatorize convert` first.")
        return self.mediator


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


def _interpolation(coarse: int, fine: int, like: Tensor) -> Tensor:
    """Linear interpolation from `coarse` to `fine` points as a matrix (coarse, fine); bilinear is one on each side."""
    unit = torch.eye(coarse, device=like.device, dtype=like.dtype).unsqueeze(0)
    return F.interpolate(unit, size=fine, mode="linear", align_corners=False)[0]


def _overlap(start: float, stop: float, length: int) -> Tensor:
    """How much of each unit interval [i, i + 1) lies in [start, stop): (length,)."""
    edges = torch.arange(length, dtype=torch.float64)
    return ((edges + 1).clamp(max=stop) - edges.clamp(min=start)).clamp(min=0)
