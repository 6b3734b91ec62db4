"""A transformer block and its parts, and the one walk over a model's blocks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, cast

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from mediatorize.errors import UserError
from mediatorize.model.architecture import Architecture, NormKind
from mediatorize.model.attention import ChangedLinear, HeadNorm, MediatorAttention, Rotary
from mediatorize.model.levels import (
    FULL,
    MODULATION,
    OWN,
    SOFTMAX,
    Level,
    MediatorSettings,
    changes_modulation,
    in_full,
    is_pretrained,
    parts_of,
)
from mediatorize.model.memory import AttentionMemory
from mediatorize.model.mlp import NarrowMlp, block_mlp


def scaled_onto(base: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    """base + scale x: (b, n or 1, c), (b, c), (b, n, c) -> (b, n, c).

    On a CPU `torch.addcmul` takes longer than two operations of which the second is in place.
    """
    scale = scale.unsqueeze(1)
    if x.device.type != "cpu":
        return torch.addcmul(base, scale, x)
    y = x * scale
    return y.add_(base) if y.dtype == base.dtype else y + base  # under autocast they differ


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(b, n, c) with shift and scale (b, c): adaptive layer norm's affine part."""
    return scaled_onto(shift.unsqueeze(1), 1 + scale, x)


def token_norm(arch: Architecture, eps: float = 1e-6) -> nn.Module:
    """The norm of tokens before a sub-layer or the last layer."""
    return nn.RMSNorm(arch.width, eps=eps) if arch.norm == "rms" else nn.LayerNorm(arch.width, elementwise_affine=False, eps=eps)


class SwitchableAttention(Attention):
    """timm's attention, as DiT, SiT and LightningDiT use it, that can run at any of its mediator levels instead.

    Until `add_mediators` is called it has the pretrained layer's parameters and only level `softmax`. That stands for the pretrained layer,
    also where the pretrained one has mediators itself.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        grid: tuple[int, int],
        mediators: int = 0,
        norm: NormKind | None = None,
        rotary: Rotary | None = None,
    ) -> None:
        """
        Args:
            mediators: of the pretrained layer, in the published form; 0: it is softmax attention.
            norm: of its queries and keys; None: they have none.
            rotary: turns them by their positions; it belongs to the whole model.
        """
        super().__init__(width, num_heads=heads, qkv_bias=True)
        self.grid, self.mediators = grid, mediators
        if norm is not None or rotary is not None:
            self.q_norm, self.k_norm = HeadNorm(width // heads, norm, rotary), HeadNorm(width // heads, norm, rotary)
        self.normalised = norm is not None
        self.published: MediatorAttention | None = None
        if mediators:
            settings = MediatorSettings((mediators,), form="published", projection_rank=None)
            self.published = MediatorAttention(width, heads, grid, settings, (self.qkv, self.proj))
        self.mediator: MediatorAttention | None = None

    def add_mediators(self, settings: MediatorSettings, draw: torch.Generator | None = None) -> MediatorAttention:
        """Gives the layer a mediator path that starts from its own projections. `draw` is of what starts at random."""
        width = self.qkv.in_features
        norms = (cast(HeadNorm, self.q_norm), cast(HeadNorm, self.k_norm)) if self.normalised else None
        mediator = MediatorAttention(width, self.num_heads, self.grid, settings, (self.qkv, self.proj), norms)
        if not self.qkv.weight.is_meta:
            if mediator.local is not None:
                mediator.local.reset(draw or torch.Generator().manual_seed(0))
            for own, pretrained in ((mediator.qkv, self.qkv), (mediator.proj, self.proj)):
                if isinstance(own, ChangedLinear):
                    own.reset(draw or torch.Generator().manual_seed(0))
                elif isinstance(own, nn.Linear):
                    own.load_state_dict(pretrained.state_dict())
        mediator = mediator.to(device=self.qkv.weight.device, dtype=self.qkv.weight.dtype)
        self.mediator = mediator.train(self.training)
        return mediator

    def keep(self, parts: Collection[Level]) -> None:
        """Drops what none of the kept levels of attention runs: pretrained projections stay where mediators read them."""
        mediator = self.mediator
        if mediator is not None:
            for level in [level for level in mediator.levels if level not in map(str, parts)]:
                del mediator.levels[level]
            if not mediator.levels:
                self.mediator = mediator = None
        if SOFTMAX in parts:
            return
        self.published = None
        if mediator is None or isinstance(mediator.qkv, nn.Linear):
            del self.qkv, self.proj
        elif isinstance(mediator.qkv, ChangedLinear):  # which has a bias of its own
            self.qkv.register_parameter("bias", None)
            self.proj.register_parameter("bias", None)

    def forward(self, x: Tensor, level: Level = SOFTMAX) -> Tensor:  # type: ignore[override]
        """(b, n, c) -> (b, n, c). Level `softmax` is the pretrained layer: timm's own forward on the pretrained weights."""
        if is_pretrained(level):
            return super().forward(x) if self.published is None else self.published(x, self.mediators)
        return self.mediated()(x, level)

    def queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(b, n, c) -> the pretrained layer's queries and keys as they meet in softmax attention, (b, h, n, d) each."""
        q, k, _ = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.q_norm(q), self.k_norm(k)

    def mediated(self) -> MediatorAttention:
        """The mediator path; an error where the model was never converted."""
        if self.mediator is None:
            raise UserError("This model has no mediators, only level softmax.", hint="Run `mediatorize convert` first.")
        return self.mediator


class ModulationUpdate(nn.Module):
    """A low-rank change of a block's modulation at mediator levels (LoRA, arXiv 2106.09685). Starts as zero."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, 6 * width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def reset(self, generator: torch.Generator) -> None:
        """Draws `down` anew, uniform in +-1/sqrt(inputs); `up` stays zero."""
        bound = self.down.in_features**-0.5
        nn.init.uniform_(self.down.weight, -bound, bound, generator=generator)

    def forward(self, conditioning: Tensor) -> Tensor:
        """(b, c), as the pretrained modulation gets it -> (b, 6c)"""
        return self.up(self.down(F.silu(conditioning)))


class BlockMediator(nn.Module):
    """What a block has of its own at mediator levels, beside its attention: a change of the modulation, its MLP, and narrow MLPs."""

    def __init__(self, arch: Architecture, settings: MediatorSettings) -> None:
        super().__init__()
        self.modulation = ModulationUpdate(arch.width, settings.modulation_rank) if settings.modulation_rank else None
        self.mlp = block_mlp(arch) if settings.mlp == "own" else None
        self.narrow = NarrowMlp(arch, settings.mlp_widths) if settings.mlp_widths else None

    def keep(self, parts: Collection[Level]) -> None:
        """Drops all but the kept parts."""
        if MODULATION not in parts:
            self.modulation = None
        if OWN not in parts:
            self.mlp = None
        if self.narrow is not None and any(f"1/{share}" in parts for share in self.narrow.biases):
            self.narrow.keep(parts)
        else:
            self.narrow = None


class Block(nn.Module):
    """Attention and MLP, each normalised, modulated and gated by the conditioning (adaLN-Zero)."""

    def __init__(self, arch: Architecture, rotary: Rotary | None = None) -> None:
        super().__init__()
        self.norm1 = token_norm(arch)
        self.attn = SwitchableAttention(
            arch.width, arch.heads, arch.grid, arch.mediators, arch.norm if arch.qk_norm else None, rotary if arch.rotary else None
        )
        self.norm2 = token_norm(arch, arch.mlp_norm_eps)
        self.mlp = block_mlp(arch)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(arch.width, 6 * arch.width))
        self.mediator: BlockMediator | None = None

    def add_mediators(self, arch: Architecture, settings: MediatorSettings, draw: Callable[[], torch.Generator]) -> None:
        """Adds the mediator path, which starts from the block's own projections and MLP.

        Args:
            draw: gives the generator of each part that starts at random.
        """
        self.attn.add_mediators(settings, draw())
        if not (settings.modulation_rank or settings.mlp == "own" or settings.mlp_widths):
            return
        weight = self.attn.qkv.weight
        update = BlockMediator(arch, settings)
        if not weight.is_meta:
            if update.modulation is not None:
                update.modulation.reset(draw())
            if update.mlp is not None:
                update.mlp.load_state_dict(self.mlp.state_dict())
            if update.narrow is not None:
                update.narrow.start_from(self.mlp)
        self.mediator = update.to(device=weight.device, dtype=weight.dtype).train(self.training)

    def keep(self, parts: Collection[Level]) -> None:
        """Drops the modules of all parts but the kept ones (`MediatorSettings.kept`). The block cannot run at levels that need others."""
        self.attn.keep(parts)
        if self.mediator is not None:
            self.mediator.keep(parts)
        if FULL not in parts:
            del self.mlp

    def modulation(self, conditioning: Tensor, changed: bool = False) -> tuple[Tensor, ...]:
        """(b, c) -> shift, scale and gate (b, c) each of the attention, then of the MLP; `changed`: as at mediator levels."""
        vectors = self.adaLN_modulation(conditioning)
        if changed and self.mediator is not None and self.mediator.modulation is not None:
            vectors = vectors + self.mediator.modulation(conditioning)
        return vectors.chunk(6, dim=1)

    def attention_input(self, x: Tensor, conditioning: Tensor) -> tuple[Tensor, Tensor]:
        """What the attention layer gets in the pretrained block (b, n, c), and the gate that its output passes (b, 1, c)."""
        shift, scale, gate = self.modulation(conditioning)[:3]
        return modulate(self.norm1(x), shift, scale), gate.unsqueeze(1)

    def mlp_input(self, x: Tensor, conditioning: Tensor) -> tuple[Tensor, Tensor]:
        """What the MLP gets in the pretrained block (b, n, c), and the gate that its output passes (b, 1, c)."""
        inputs, gate = self.attention_input(x, conditioning)
        shift, scale, mlp_gate = self.modulation(conditioning)[3:]
        return modulate(self.norm2(x + gate * self.attn(inputs, SOFTMAX)), shift, scale), mlp_gate.unsqueeze(1)

    def forward(self, hidden_states: Tensor, conditioning: Tensor, level: Level, memory: AttentionMemory | None = None) -> Tensor:
        """(b, n, c), (b, c) -> (b, n, c). Without a memory softmax attention runs in place of mediators and a held rest.

        diffusers' hooks and cache-dit find blocks by the name `hidden_states`.
        """
        if memory is None:
            level = in_full(level)
        parts, changed = parts_of(level), changes_modulation(level)
        rest = memory.recall(parts.attention, hidden_states) if memory is not None and parts.held else None
        watched = memory.watched if memory is not None and parts.attention == SOFTMAX else ()
        tokens, left = self.compute(hidden_states, conditioning, parts.attention, parts.mlp, changed, rest, watched)
        if memory is not None and parts.attention == SOFTMAX:
            memory.remember(dict(zip(watched, left, strict=True)))
        return tokens

    def compute(
        self,
        x: Tensor,
        conditioning: Tensor,
        attention: Level,
        mlp: Level,
        changed: bool,
        rest: Tensor | None = None,
        watched: tuple[Level, ...] = (),
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What `forward` computes between reading and writing memory: the part that is compiled, one graph for each way of running it.

        Args:
            x: tokens (b, n, c).
            conditioning: (b, c).
            changed: whether the modulation is changed as at mediator levels.
            rest: what the mediators leave out of the attention (b, n, c).
            watched: mediators that run beside softmax attention.

        Returns:
            The tokens, and what the watched mediators leave out.
        """
        vectors = self.modulation(conditioning, changed)
        inputs = self._modulated(x, vectors)
        y = self.attn(inputs, attention)
        left = tuple(y - self.attn(inputs, level) for level in watched)
        return self._transformed(scaled_onto(x, vectors[2], y if rest is None else y + rest), vectors, mlp), left

    def at_levels(self, x: Tensor, conditioning: Tensor, levels: Sequence[Level]) -> Iterator[Tensor]:
        """(b, n, c) -> what `forward` gives at each level. Levels that differ in the MLP alone share their attention's output."""
        known: dict[Any, tuple[Tensor, tuple[Tensor, ...]]] = {}
        for level in levels:
            parts, changed = parts_of(level), changes_modulation(level)
            shared = parts.attention, changed
            if shared not in known:
                vectors = self.modulation(conditioning, changed)
                known[shared] = scaled_onto(x, vectors[2], self.attn(self._modulated(x, vectors), parts.attention)), vectors
            yield self._transformed(*known[shared], parts.mlp)

    def _modulated(self, x: Tensor, vectors: tuple[Tensor, ...]) -> Tensor:
        """What the attention gets (b, n, c)."""
        shift, scale, *_ = vectors
        return modulate(self.norm1(x), shift, scale)

    def _transformed(self, x: Tensor, vectors: tuple[Tensor, ...], level: Level) -> Tensor:
        """The tokens after the MLP."""
        *_, shift, scale, gate = vectors
        return scaled_onto(x, gate, self.run_mlp(modulate(self.norm2(x), shift, scale), level))

    def run_mlp(self, x: Tensor, level: Level) -> Tensor:
        """(b, n, c) -> (b, n, c) at a level of the MLP."""
        if level == FULL or (level == OWN and (self.mediator is None or self.mediator.mlp is None)):
            return self.mlp(x)
        if level == OWN and self.mediator is not None and self.mediator.mlp is not None:
            return self.mediator.mlp(x)
        if self.mediator is None or self.mediator.narrow is None:
            raise UserError("This model has no narrow MLPs.", hint="Run `mediatorize convert` with --mlp-widths.")
        return self.mediator.narrow(x, level)


Run = Callable[[Block, Tensor, Tensor, Level], Tensor]
"""How a block is run: (block, tokens (b, n, c), conditioning (b, c), level) -> tokens."""


def call(block: Block, tokens: Tensor, conditioning: Tensor, level: Level) -> Tensor:
    return block(tokens, conditioning, level)


def walk(
    blocks: Sequence[Block],
    tokens: Tensor,
    conditioning: Tensor,
    levels: Sequence[Level],
    run: Run = call,
    memories: Sequence[AttentionMemory] | None = None,
) -> Iterator[Tensor]:
    """The tokens (b, n, c) before every block, and after the last. A block is run only when what comes after it is asked for.

    Args:
        levels: one for each block.
        run: runs a block, as for recomputed activations or in batches; of no account with memories.
        memories: one for each block, of what its attention left at earlier calls.
    """
    yield tokens
    for index, (block, level) in enumerate(zip(blocks, levels, strict=True)):
        tokens = run(block, tokens, conditioning, level) if memories is None else block(tokens, conditioning, level, memories[index])
        yield tokens
