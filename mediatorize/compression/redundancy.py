"""How redundant the interactions of queries and keys are. Mediator attention relies on this redundancy (arXiv 2408.05710)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mediatorize.compression.trajectories import teacher_states
from mediatorize.diffusion.process import process_of
from mediatorize.diffusion.sampling import Sampler
from mediatorize.model.block import SwitchableAttention
from mediatorize.model.levels import SOFTMAX
from mediatorize.model.transformer import DiffusionTransformer


@dataclass(frozen=True, kw_only=True)
class Redundancy:
    """Redundancy of every layer at every noise level: means over states."""

    noise_levels: tuple[float, ...]
    """Noise levels of the columns, from noise (1) to data (0)."""
    states: int
    effective_rank_of_heads: tuple[tuple[tuple[float, ...], ...], ...]
    """exp of the entropy of a matrix's normalised singular values (Roy and Vetterli, EUSIPCO 2007), from 1 to the number of tokens:
    layers x noise levels x heads."""
    errors: dict[int, tuple[tuple[float, ...], ...]]
    """By rank m: |A - A_m| / |A|, where A_m is the best approximation of rank m in the Frobenius norm (the truncated SVD).

    Attention through m mediators is a product of an n x m and an m x n matrix: it cannot come closer to A.
    """

    @property
    def effective_rank(self) -> tuple[tuple[float, ...], ...]:
        """The same, as means over heads: layers x noise levels."""
        return tuple(tuple(sum(heads) / len(heads) for heads in row) for row in self.effective_rank_of_heads)

    def early_and_late(self) -> list[tuple[float, float]]:
        """The effective rank of every layer in the noisy half of the calls, and in the other half."""
        half = len(self.noise_levels) // 2
        return [(sum(row[:half]) / half, sum(row[-half:]) / half) for row in self.effective_rank]


@torch.no_grad()
def attention_redundancy(
    model: DiffusionTransformer,
    ranks: Sequence[int],
    *,
    calls: int = 10,
    states_per_call: int = 4,
    seed: int = 0,
    on_step: Callable[[], object] | None = None,
) -> Redundancy:
    """Measures softmax attention along the model's own unguided trajectories of `calls` steps of its default sampler.

    Args:
        ranks: numbers of mediators; those of at least the number of tokens are left out, as they miss nothing.
        on_step: called after every model call of the sampler, then after every layer.
    """
    arch = model.arch
    device = next(model.parameters()).device
    sampler = Sampler.resolve(arch, steps=calls, seed=seed)
    states = teacher_states(model, states_per_call * len(sampler.times()), sampler, trajectories=states_per_call, on_call=on_step)
    levels, column = process_of(arch).noise_level(states.t).unique(return_inverse=True)
    column = len(levels) - 1 - column  # noise first
    kept = [rank for rank in ranks if rank < arch.tokens]
    condition = model.condition(states.t.to(device), states.y.to(device))
    effective: list[tuple[tuple[float, ...], ...]] = []
    errors: dict[int, list[tuple[float, ...]]] = {rank: [] for rank in kept}

    def by_column(values: Tensor) -> tuple[float, ...]:  # (s,) -> its mean at each noise level
        return tuple(float(values[column == index].mean()) for index in range(len(levels)))

    for block, tokens in zip(model.layers(), model.walk(model.embed(states.x.to(device)), condition, SOFTMAX), strict=False):
        inputs, _ = block.attention_input(tokens, condition)
        singular = torch.cat([torch.linalg.svdvals(attention_matrices(block.attn, one)).cpu() for one in inputs.split(1)])  # (s, h, n)
        ranks_of_heads = effective_rank(singular)  # (s, h)
        effective.append(tuple(tuple(ranks_of_heads[column == index].mean(0).tolist()) for index in range(len(levels))))
        for rank in kept:
            errors[rank].append(by_column(best_rank_error(singular, rank).mean(1)))
        if on_step is not None:
            on_step()
    return Redundancy(
        noise_levels=tuple(levels.flip(0).tolist()),
        states=len(states),
        effective_rank_of_heads=tuple(effective),
        errors={rank: tuple(values) for rank, values in errors.items()},
    )


def attention_matrices(layer: SwitchableAttention, x: Tensor) -> Tensor:
    """softmax(q k' / sqrt(d)) of the pretrained layer, in float32: (b, n, c) -> (b, h, n, n)"""
    q, k = layer.queries_and_keys(x)
    return (q.float() @ k.float().mT * layer.scale).softmax(-1)


def effective_rank(singular: Tensor) -> Tensor:
    """exp of the entropy of singular values (..., n) as shares of their sum: (...,)"""
    shares = singular / singular.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).exp()


def best_rank_error(singular: Tensor, rank: int) -> Tensor:
    """Relative Frobenius error of the best approximation of `rank`, by singular values (..., n) in descending order: (...,)"""
    squares = singular.double().square()
    return (squares[..., rank:].sum(-1) / squares.sum(-1)).sqrt()
