"""Mediator attention: the projections that a layer's added levels share, and the two forms of running them (design 2).

Axes: b batch, n tokens, c width, h heads, d head width, m mediators.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import flop_registry

from mediatorize.errors import UserError
from mediatorize.model.architecture import NormKind
from mediatorize.model.forms import change_in_weight
from mediatorize.model.levels import Level, MediatorSettings, kind_of
from mediatorize.model.mediators import MediatorLevel, PublishedLevel

flop_registry.setdefault(torch.ops.aten.baddbmm_, flop_registry[torch.ops.aten.baddbmm])
"""torch's counter knows the product, but not in place, where it saves a copy of the layer's output."""


def rotary_tables(head_width: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions (arXiv 2104.09864) on a grid, (n, d) each: pairs of channels turn together.

    The first half of a head turns by the row, the second by the column, at frequencies 10000^(-2i / (d/2)) (EVA-02, as in LightningDiT).
    """
    half = head_width // 2
    frequencies = 10000 ** -(torch.arange(0, half, 2, dtype=torch.float64) / half)
    rows, columns = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) for size in grid), indexing="ij")
    angles = torch.cat([place.flatten().outer(frequencies).repeat_interleave(2, dim=1) for place in (rows, columns)], dim=1)
    return angles.cos().float(), angles.sin().float()


class Rotary(nn.Module):
    """Turns queries or keys by their row and column. The whole model has one; its tables have LightningDiT's names."""

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, head_width: int, grid: tuple[int, int]) -> None:
        super().__init__()
        cosines, sines = rotary_tables(head_width, grid)
        self.register_buffer("freqs_cos", cosines)
        self.register_buffer("freqs_sin", sines)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, n, d) -> (b, h, n, d)"""
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * self.freqs_cos + torch.stack([-second, first], dim=-1).flatten(-2) * self.freqs_sin


class HeadNorm(nn.Module):
    """What queries or keys go through in softmax attention before they meet: a norm of every head, a rotation, or both."""

    def __init__(self, head_width: int, norm: NormKind | None, rotary: Rotary | None) -> None:
        super().__init__()
        self.norm, self.rotary = norm, (rotary,)  # in a tuple, where torch does not register it
        if norm is not None:
            self.weight = nn.Parameter(torch.ones(head_width))
        if norm == "layer":
            self.bias = nn.Parameter(torch.zeros(head_width))

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, n, d) -> (b, h, n, d)"""
        (rotary,) = self.rotary
        if self.norm == "rms":
            x = F.rms_norm(x, x.shape[-1:], self.weight, 1e-6)
        elif self.norm == "layer":
            x = F.layer_norm(x, x.shape[-1:], self.weight, self.bias, 1e-5)
        return x if rotary is None else rotary(x)


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
        """(b, n, c) -> (b, n, c) over a token grid of (rows, columns).

        The permutations leave channels last, also in a batch of one, so that nothing is copied.
        """
        y = self.down(x).unflatten(1, grid).permute(0, 3, 1, 2)
        return self.up(self.depthwise(y).permute(0, 2, 3, 1).flatten(1, 2))


class SharedLinear(nn.Module):
    """A pretrained linear layer that belongs to another module, and is not among this one's parameters."""

    def __init__(self, pretrained: nn.Linear) -> None:
        super().__init__()
        self.pretrained = (pretrained,)  # in a tuple, where torch does not register it

    @property
    def weight(self) -> Tensor:
        return self.pretrained[0].weight

    @property
    def bias(self) -> Tensor:
        return self.pretrained[0].bias

    def forward(self, x: Tensor) -> Tensor:
        return self.pretrained[0](x)


class ChangedLinear(nn.Module):
    """A pretrained linear layer with a low-rank change and a bias of its own (LoRA, arXiv 2106.09685). Starts as the pretrained one.

    The pretrained layer belongs to another module, and is not among this one's parameters.
    """

    def __init__(self, pretrained: nn.Linear, rank: int) -> None:
        super().__init__()
        self.pretrained = (pretrained,)  # in a tuple, where torch does not register it
        self.down = nn.Parameter(torch.zeros(rank, pretrained.in_features))
        self.up = nn.Parameter(torch.zeros(pretrained.out_features, rank))
        self.bias = nn.Parameter(torch.zeros(pretrained.out_features))

    def reset(self, generator: torch.Generator) -> None:
        """Draws `down` anew, uniform in +-1/sqrt(inputs); `up` stays zero."""
        bound = self.down.shape[1] ** -0.5
        nn.init.uniform_(self.down, -bound, bound, generator=generator)
        self.bias.data.copy_(self.pretrained[0].bias)

    @property
    def weight(self) -> Tensor:
        """The changed weight, as a matrix of its own."""
        return self.pretrained[0].weight + self.up @ self.down

    def without_bias(self, x: Tensor) -> Tensor:
        """(b, n, inputs) -> (b, n, outputs), by the changed weight where to make it costs no more than the change of n tokens."""
        (pretrained,) = self.pretrained
        if change_in_weight(x.shape[-2], pretrained.in_features, pretrained.out_features):
            return F.linear(x, self.weight)
        return F.linear(x, pretrained.weight) + F.linear(F.linear(x, self.down), self.up)

    def forward(self, x: Tensor) -> Tensor:
        return self.without_bias(x) + self.bias


class _Heads:
    """One of a layer's projections, head by head, where a head's matrix W is (d, c): products of few rows with it and its transpose."""

    def __init__(self, weight: Tensor, up: Tensor | None = None, down: Tensor | None = None) -> None:
        """
        Args:
            weight: (h, d, c).
            up, down: of a low-rank change, (h, d, r), and (r, c) for all heads.
        """
        self.weight, self.up, self.down = weight, up, down

    def onto(self, x: Tensor, bias: Tensor) -> Tensor:
        """x W' + bias: (h, rows, c) -> (h, rows, d)"""
        y = torch.baddbmm(bias, x, self.weight.mT)
        return y if self.up is None or self.down is None else torch.baddbmm(y, x @ self.down.mT, self.up.mT)

    def back(self, t: Tensor, bias: Tensor | None = None) -> Tensor:
        """t W + bias: (h, rows, d) -> (h, rows, c)"""
        y = torch.bmm(t, self.weight) if bias is None else torch.baddbmm(bias, t, self.weight)
        if self.up is None or self.down is None:
            return y
        return torch.addmm(y.flatten(0, 1), torch.bmm(t, self.up).flatten(0, 1), self.down).view_as(y)


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

    A model's rotary positions are left out: R, B1 and B2 stand for them. (A rotation between T and every key could not be absorbed.)
    Where a model normalises queries and keys, the plain form runs, T is pooled from normalised ones, and they are rotated as in softmax
    attention.

    `form="published"` is the paper's own: R is average pooling, so that mediators are averages of queries, s1 = s2 = 1/sqrt(d), queries are
    assigned by dot product (without |T|^2 / 2), and a depthwise convolution of v is added before the output projection.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        grid: tuple[int, int],
        settings: MediatorSettings,
        pretrained: tuple[nn.Linear, nn.Linear] | None = None,
        norms: tuple[HeadNorm, HeadNorm] | None = None,
    ) -> None:
        """
        Args:
            pretrained: the projections, qkv and output, that `settings.projection_rank` is about.
            norms: of the pretrained layer's queries and keys. With them only the plain form runs.
        """
        super().__init__()
        self.norms = (norms,)  # in a tuple, where torch does not register them: they belong to the pretrained layer
        self.heads, self.grid, self.settings = heads, grid, settings
        self.qkv: nn.Linear | ChangedLinear | SharedLinear
        self.proj: nn.Linear | ChangedLinear | SharedLinear
        if pretrained is not None and settings.projection_rank is None:
            self.qkv, self.proj = map(SharedLinear, pretrained)
        elif pretrained is not None and settings.projection_rank:
            self.qkv, self.proj = (ChangedLinear(layer, settings.projection_rank) for layer in pretrained)
        else:
            self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.levels = nn.ModuleDict()
        for level in settings.levels:
            module = kind_of(level).module
            assert module is not None, "settings hold added levels alone"
            self.levels[str(level)] = module(level, width, heads, grid, settings)
        self.local = LocalBranch(width, settings.local_rank) if settings.local_rank else None

    def level(self, level: Level) -> nn.Module:
        """What the layer owns at one of its levels alone."""
        if str(level) not in self.levels:
            raise UserError(f"This model has no level {level}.", hint=f"It has {', '.join(map(str, self.settings.all_levels))}.")
        return self.levels[str(level)]

    def count(self, mediators: int) -> MediatorLevel:
        """The same of a count of mediators."""
        return self.level(mediators)  # type: ignore[return-value]

    def forward(self, x: Tensor, level: Level) -> Tensor:
        """(b, n, c) -> (b, n, c) at one of the added levels."""
        return self.level(level)(x, self)

    def absorbed(self, x: Tensor, mediators: int, onto: Tensor | None = None) -> Tensor:
        """The absorbed form (design 2.1): every product with all n tokens has h * m rows, never c. `onto` (b, n, c) is added to in place.

        Rows of products with weights are (m, b) within a head, so that every sample's (h*m, c) matrix is a strided view of them: two copies
        in all, of what comes out of products over tokens.
        """
        b, _, c = x.shape
        h, d, m = self.heads, c // self.heads, mediators
        level = self.count(m)
        wq, wk, wv, wo = self.by_heads()
        bq, bk, bv = self.qkv.bias.view(3, h, 1, d)
        w, bias = (wq, bq) if self.settings.space == "queries" else (wk, bk)

        def by_head(y: Tensor) -> Tensor:  # (b, h*m, c) -> (h, m*b, c)
            return y.transpose(0, 1).reshape(h, m * b, c)

        def by_sample(y: Tensor) -> Tensor:  # (h, m*b, c) -> (b, h*m, c)
            return y.view(h * m, b, -1).transpose(0, 1)

        pool, key_bias, query_bias = level.on_tokens(self.grid)  # (h*m, n) each
        pooled = torch.bmm(pool.expand(b, -1, -1), x)  # (b, h*m, c)
        t = w.onto(by_head(pooled), bias)  # (h, m*b, d)
        key_scale, query_scale = level.scales()

        scores = torch.baddbmm(key_bias, by_sample(wk.back(t * key_scale)), x.mT)  # (b, h*m, n)
        mixed = torch.bmm(scores.softmax(-1), x)  # (b, h*m, c)
        u = wv.onto(by_head(mixed), bv)  # (h, m*b, d)
        # Every head's assignment sums to 1, so that an h-th of the output's bias in each head's values is the whole of it in the end.
        values = by_sample(wo.back(u, self.proj.bias / h))  # (b, h*m, c)

        offset = (t * (bq - t / 2) if self.settings.space == "queries" else t * bq).sum(-1, keepdim=True) * query_scale
        queries = by_sample(wq.back(t * query_scale))  # (b, h*m, c)
        scores = torch.baddbmm(query_bias, queries, x.mT).add_(by_sample(offset))  # (b, h*m, n)
        assigned = scores.unflatten(1, (h, m)).softmax(2).flatten(1, 2).mT  # (b, n, h*m)
        if onto is None:
            return torch.bmm(assigned, values)
        return onto.baddbmm_(assigned.to(onto.dtype), values.to(onto.dtype))  # autocast leaves products in place alone

    def by_heads(self) -> tuple[_Heads, _Heads, _Heads, _Heads]:
        """The projections of queries, keys, values and output, head by head."""
        h = self.heads
        if isinstance(self.qkv, ChangedLinear) and isinstance(self.proj, ChangedLinear):
            (qkv,), (proj,) = self.qkv.pretrained, self.proj.pretrained
            rank, c = self.qkv.down.shape
            ups = self.qkv.up.view(3, h, c // h, rank)
            q, k, v = (_Heads(weight, up, self.qkv.down) for weight, up in zip(qkv.weight.view(3, h, c // h, c), ups, strict=True))
            out_down = self.proj.down.view(rank, h, c // h).permute(1, 2, 0)  # (h, d, r)
            return q, k, v, _Heads(proj.weight.view(c, h, c // h).permute(1, 2, 0), out_down, self.proj.up.mT)
        c = self.proj.weight.shape[0]
        q, k, v = map(_Heads, self.qkv.weight.view(3, h, c // h, c))
        return q, k, v, _Heads(self.proj.weight.view(c, h, c // h).permute(1, 2, 0))  # (h, d, c)

    def plain(self, x: Tensor, mediators: int) -> Tensor:
        """The published order of operations: q, k and v for every token first."""
        b, n, c = x.shape
        h, d, m = self.heads, c // self.heads, mediators
        level: MediatorLevel | PublishedLevel = self.count(m)
        (head_norms,) = self.norms
        qkv = self.qkv.without_bias(x) if isinstance(self.qkv, ChangedLinear) else F.linear(x, self.qkv.weight)
        q, k, v = qkv.view(b, n, 3, h, d).permute(2, 0, 3, 1, 4)  # (b, h, n, d) each
        bq, bk, bv = self.qkv.bias.view(3, h, 1, d)
        pool, key_bias, query_bias = (y.view(h, m, n) for y in level.on_tokens(self.grid))
        key_scale, query_scale = level.scales()

        in_queries = self.settings.space == "queries"
        if head_norms is not None:
            q, k = head_norms[0](q + bq), head_norms[1](k + bk)
            bq, bk = torch.zeros_like(bq), torch.zeros_like(bk)
        t = pool @ (q if in_queries else k) + (bq if in_queries else bk)  # (b, h, m, d)
        u = (t * key_scale @ k.mT + key_bias).softmax(-1) @ v + bv  # (b, h, m, d)
        by_distance = in_queries and self.settings.form != "published"
        norms = t.square().sum(-1).unsqueeze(-2) / 2 if by_distance else 0  # (b, h, 1, m)
        assigned = (((q + bq) @ t.mT - norms) * query_scale + query_bias.mT).softmax(-1)  # (b, h, n, m)
        out = (assigned @ u).transpose(1, 2).reshape(b, n, c)
        beside = level.beside(v + bv, self.grid)
        return self.proj(out if beside is None else out + beside)
