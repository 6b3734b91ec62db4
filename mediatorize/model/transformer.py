"""DiT, SiT and LightningDiT in one module, with the parameter names of the official checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from mediatorize.errors import UserError
from mediatorize.model.architecture import FREQUENCIES, Architecture
from mediatorize.model.attention import Rotary
from mediatorize.model.block import Block, Run, SwitchableAttention, call, modulate, token_norm, walk
from mediatorize.model.levels import SOFTMAX, Level, MediatorSettings, in_full, levels_per_layer, refuse_lacking
from mediatorize.model.mediators import PublishedLevel
from mediatorize.model.memory import Memory
from mediatorize.model.schedule import AnySchedule
from mediatorize.randomness import generator

MOST_GRAPHS = 256
"""Of one model's blocks, in `DiffusionTransformer.compile_blocks`: far more than there are ways to run a block."""


class TimestepEmbedder(nn.Module):
    """Sinusoids of the timestep, cosines first, through a two-layer MLP (DiT's models.py)."""

    def __init__(self, width: int, frequency_shift: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.frequency_shift = frequency_shift

    def forward(self, t: Tensor) -> Tensor:
        """(b,) -> (b, c)"""
        half = FREQUENCIES // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device) / (half - self.frequency_shift)
        angles = t.float().unsqueeze(1) * torch.exp(-math.log(10000) * exponents)
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.mlp(sinusoids.to(next(self.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """A row per class; where `null_class`, the last row stands for no class."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)

    def forward(self, labels: Tensor) -> Tensor:
        """(b,) integers -> (b, c)"""
        return self.embedding_table(labels)


class LastLayer(nn.Module):
    """Normalise, modulate, project every token to its patch."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.norm_final = token_norm(arch)
        self.linear = nn.Linear(arch.width, arch.last_rows)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(arch.width, 2 * arch.width))

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(conditioning).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiffusionTransformer(nn.Module):
    """A class-conditional DiT, SiT or LightningDiT whose attention layers can each run at any of their levels.

    Without mediators (`settings` None) its parameters are exactly those of an official checkpoint.
    """

    def __init__(self, arch: Architecture, settings: MediatorSettings | None = None) -> None:
        super().__init__()
        self.arch = arch
        self.settings: MediatorSettings | None = None
        self.schedule: AnySchedule | None = None
        self.x_embedder = PatchEmbed(arch.input_size, arch.patch, arch.channels, arch.width)
        self.t_embedder = TimestepEmbedder(arch.width, arch.frequency_shift)
        self.y_embedder = LabelEmbedder(arch.classes + arch.null_class, arch.width)
        self.pos_embed = nn.Parameter(torch.zeros(1, arch.tokens, arch.width), requires_grad=False)
        self.feat_rope = Rotary(arch.head_width, arch.grid) if arch.rotary else None
        self.blocks = nn.ModuleList(Block(arch, self.feat_rope) for _ in range(arch.depth))
        self.final_layer = LastLayer(arch)
        if settings is not None:
            self.add_mediators(settings)

    def layers(self) -> list[Block]:
        return [cast(Block, block) for block in self.blocks]

    def attention_layers(self) -> list[SwitchableAttention]:
        return [block.attn for block in self.layers()]

    def add_mediators(self, settings: MediatorSettings, seed: int = 0) -> None:
        """Gives the blocks of `settings.layers` mediator paths, which start from their own projections and MLPs.

        All else in a path depends on (seed, layer). Of a pruned model's settings, parts that are not kept are dropped.

        Raises:
            UserError: the model does not have one of the layers.
        """
        self.settings = settings.of_model(self.arch.depth)
        for index in self.settings.converted(self.arch.depth):
            self.layers()[index].add_mediators(self.arch, self.settings, partial(generator, seed, "layer", index))
        if self.settings.kept is not None:
            self.keep(self.settings)

    def keep(self, settings: MediatorSettings) -> None:
        """Drops the modules of all parts but those that are kept in `settings`, which are otherwise the model's own."""
        self.settings = settings.of_model(self.arch.depth)
        for index, block in enumerate(self.layers()):
            block.keep(self.settings.parts(index))

    def compile_blocks(self, **options: Any) -> None:
        """Compiles what blocks compute: one graph for every way that a block runs, which all blocks share, and every batch size.

        Graphs are made at the first call that needs them. Reading and writing memory, embedding and the last layer stay outside.

        Args:
            options: of `torch.compile`.
        """
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
        compute = torch.compile(Block.compute, **{"fullgraph": True, "dynamic": False, **options})
        for block in self.layers():
            block.compute = MethodType(compute, block)  # type: ignore[method-assign]

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        """(b,), (b,) -> (b, c): what every block is modulated by."""
        return self.t_embedder(t) + self.y_embedder(y)

    def embed(self, x: Tensor) -> Tensor:
        """(b, channels, height, width) -> (b, n, c): the first block's input."""
        return self.pos_embed + self.x_embedder(x)  # in this order the sum lies in memory as what blocks give, whose graphs it shares

    def forward(self, x: Tensor, t: Tensor, y: Tensor, levels: Level | Sequence[Level] = SOFTMAX, memory: Memory | None = None) -> Tensor:
        """The checkpoint's own prediction.

        Args:
            x: noisy latents (b, channels, height, width).
            t: (b,). DiT: 0 to 999, 999 is noise. SiT and LightningDiT: 0 to 1, 1 is data (REPA: 1 is noise).
            y: class labels (b,); `arch.classes` is the null class.
            levels: one level for the whole model, which is softmax in layers that conversion left alone; or one per layer.
            memory: of the trajectory that this call is a part of, for levels with a held rest. Without one these run as softmax.

        Returns:
            DiT with learned variance: noise and variance logits (b, 2 channels, height, width).
            SiT and LightningDiT: velocity (b, channels, height, width), data - noise (REPA: noise - data).
        """
        conditioning = self.condition(t, y)
        return self.finish(self.run_blocks(self.embed(x), conditioning, levels, memory=memory), conditioning)

    def walk(
        self,
        tokens: Tensor,
        conditioning: Tensor,
        levels: Level | Sequence[Level],
        run: Run = call,
        memory: Memory | None = None,
    ) -> Iterator[Tensor]:
        """The tokens (b, n, c) before every block, and after the last. `levels` as in `forward`."""
        blocks = self.layers()
        per_layer = levels_per_layer(levels, len(blocks), self.settings)
        if memory is None and self.settings is not None and self.settings.kept is not None:
            refuse_lacking(list(map(in_full, per_layer)), self.settings)
        return walk(blocks, tokens, conditioning, per_layer, run, None if memory is None else memory.blocks)

    def run_blocks(self, tokens: Tensor, conditioning: Tensor, levels: Level | Sequence[Level], memory: Memory | None = None) -> Tensor:
        """The tokens (b, n, c) after the last block, from those before the first."""
        for after in self.walk(tokens, conditioning, levels, memory=memory):
            tokens = after
        return tokens

    def finish(self, tokens: Tensor, conditioning: Tensor) -> Tensor:
        """(b, n, c) after the last block -> the model's output."""
        return self.unpatchify(self.final_layer(tokens, conditioning))

    def added(self) -> MediatorSettings:
        """What conversion added; an error where the model was never converted."""
        if self.settings is None:
            raise UserError("This model has no mediators, only level softmax.", hint="Run `mediatorize convert` first.")
        return self.settings

    @property
    def all_levels(self) -> tuple[Level, ...]:
        """Every level that the whole model can be asked for, in the order of their rank."""
        return (SOFTMAX,) if self.settings is None else self.settings.whole_model_levels(self.arch.depth)

    def mediator_parameters(self) -> dict[str, nn.Parameter]:
        """What conversion added to the pretrained weights, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if is_mediator(name)}

    def unpatchify(self, patches: Tensor) -> Tensor:
        """(b, n, p * p * rows) -> (b, output channels, height, width)"""
        arch = self.arch
        image = patches.unflatten(1, arch.grid).unflatten(3, (arch.patch, arch.patch, -1))
        image = image.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (b, channels, rows * p, columns * p)
        return image[:, : arch.output_channels]


def is_mediator(name: str) -> bool:
    """Whether a parameter of that name was added by conversion; all others are the pretrained ones."""
    return ".mediator." in name


def sincos_position_embedding(width: int, grid: tuple[int, int]) -> Tensor:
    """The fixed position embedding of DiT and SiT: (1, rows * columns, width).

    A quarter each of sin(column), cos(column), sin(row), cos(row), over geometric frequencies (MAE's, through DiT's models.py).
    """
    frequencies = 1 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    rows, columns = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) for size in grid), indexing="ij")
    angles = [position.flatten().outer(frequencies) for position in (columns, rows)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1).float().unsqueeze(0)


def initialise_from_scratch(model: DiffusionTransformer, seed: int) -> None:
    """DiT's initialisation (arXiv 2212.09748, section 3.2) for training a new model: adaLN-Zero, Xavier, sin-cos positions.

    A model's own mediators, if it has some, are drawn as `PublishedLevel.reset` says.

    Args:
        model: without added levels; `from_scratch` adds them.
    """
    draw = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear) or module is model.x_embedder.proj:
            nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1), generator=draw)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    embedders = [model.y_embedder.embedding_table.weight, *(p for p in model.t_embedder.parameters() if p.ndim == 2)]
    for weight in embedders:
        nn.init.normal_(weight, std=0.02, generator=draw)
    for name, parameter in model.named_parameters():
        if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
            nn.init.zeros_(parameter)
    _reset_published(model, draw)
    model.pos_embed.data.copy_(sincos_position_embedding(model.arch.width, model.arch.grid))


def from_scratch(arch: Architecture, settings: MediatorSettings, seed: int = 0) -> DiffusionTransformer:
    """A model of random weights with added levels, as the originals begin training: eval mode, float32, CPU."""
    model = DiffusionTransformer(arch)
    initialise_from_scratch(model, seed)
    model.add_mediators(settings, seed)
    for index in model.added().converted(arch.depth):
        _reset_published(model.attention_layers()[index].mediated(), generator(seed, "layer", index))
    return model.requires_grad_(False).eval()


def _reset_published(module: nn.Module, draw: torch.Generator) -> None:
    for level in module.modules():
        if isinstance(level, PublishedLevel):
            level.reset(draw)
