"""Levels: the ways in which one attention layer can run, kind by kind, and the settings of what conversion adds. No torch here.

A *level* is one such way: `"softmax"` is the pretrained layer, bit for bit; a whole number is a count of mediators. What a kind of level is
called, its rank, its FLOPs, its parameters and its module are one entry of `KINDS`; no other file tells one kind from another.

A level may also say how a whole block runs, its attention and its MLP apart: `"softmax|1/8"` has an MLP of an eighth of the hidden width;
`"hold+4|full"` adds to 4 mediators what they left out of the attention at the last model call that computed it. `parts_of` takes such a
level apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

from mediatorize.errors import UserError
from mediatorize.model import forms
from mediatorize.model.architecture import Architecture, coarse_grid

if TYPE_CHECKING:
    from torch import nn

Level = int | str
Space = Literal["queries", "keys"]
MlpOwner = Literal["own", "shared"]
Form = Literal["learned", "published"]
"""How mediators are made and met. learned: pooled by learned weights, queries assigned by distance, projections absorbed where that is
cheaper. published: as in arXiv 2408.05710 and its code."""

SOFTMAX = "softmax"
"""The level at which a layer is the pretrained one, bit for bit."""

FULL, OWN = "full", "own"
"""Levels of an MLP: the pretrained one, and the one of added levels (`MediatorSettings.mlp`)."""

MODULATION = "modulation"
"""Beside levels of attention and MLPs, a part that a block can have: the change of its modulation at added levels."""

HELD = "hold+"
"""How a level of the attention begins that adds what its mediators left out at the last call that computed softmax attention."""

PRETRAINED_PARTS: tuple[Level, ...] = (SOFTMAX, FULL)
"""Parts of a layer to which nothing was added."""


@dataclass(frozen=True)
class MediatorSettings:
    """What conversion adds to blocks, and to which of them (design 2)."""

    levels: tuple[Level, ...]
    """Levels beside softmax that converted layers can run at, in the order of their rank."""
    space: Space = "queries"
    """Which of the model's projections makes mediators out of pooled tokens."""
    local_rank: int = 0
    """Rank of the local branch; 0 leaves it out."""
    modulation_rank: int = 0
    """Rank of the change that a block's modulation makes at the added levels; 0 leaves it out."""
    mlp: MlpOwner = "shared"
    """Whether the added levels share every block's MLP with softmax, or have their own: the same FLOPs, and as many weights again."""
    projection_rank: int | None = 0
    """Rank of the change that the added levels make to the pretrained projections; 0: they have copies; None: they run the pretrained."""
    mlp_widths: tuple[int, ...] = ()
    """Narrow MLPs beside every block's: 8 is one of an eighth of the hidden width. In descending order; each is a part of the next."""
    form: Form = "learned"
    layers: tuple[int, ...] | None = None
    """The converted layers, counted from 0, in ascending order; None: all. The others have softmax alone, and nothing is added to them."""
    kept: tuple[tuple[Level, ...], ...] | None = None
    """Of a pruned model, the parts that each layer still has, pretrained ones among them (`all_parts`); None: every layer has all."""

    def __post_init__(self) -> None:
        added = self.levels and all(is_level(level) and kind_of(level).module is not None for level in self.levels)
        if not added or list(self.levels) != in_order(self.levels):
            raise UserError(
                f"Levels {list(self.levels)} are not distinct, ascending counts of at least 1.",
                hint="Pass for instance --levels 1,4,16, without softmax, which is always there.",
            )
        if self.space not in ("queries", "keys"):
            raise UserError(f"Mediators cannot come from {self.space!r}.", hint="Choose queries or keys.")
        if self.mlp not in ("own", "shared"):
            raise UserError(f"MLPs cannot be {self.mlp!r}.", hint="Choose own or shared.")
        if any(width < 2 for width in self.mlp_widths) or list(self.mlp_widths) != sorted(set(self.mlp_widths), reverse=True):
            raise UserError(
                f"MLP widths {list(self.mlp_widths)} are not distinct, descending shares of at least 2.", hint="Pass for instance 8,4."
            )
        if (rank := min(self.local_rank, self.modulation_rank, self.projection_rank or 0)) < 0:
            raise UserError(f"A rank of {rank} is negative.", hint="Pass 0 to leave a part out.")
        if self.layers is not None and not self.layers:
            raise UserError(
                "The set of layers to convert is empty.", hint="Pass for instance --layers 0-3, or leave it out to convert all."
            )
        if self.layers is not None and (list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0):
            raise UserError(
                f"Layers {list(self.layers)} are not distinct, ascending numbers from 0.", hint="Pass for instance --layers 0-3."
            )
        if self.form == "published":
            self._refuse_unpublished()
        for layer, kept in enumerate(self.kept or ()):
            if unknown := [part for part in kept if part not in self.all_parts(layer)]:
                raise UserError(f"Layer {layer} cannot have kept {unknown[0]}.", hint="Export it again.")

    def _refuse_unpublished(self) -> None:
        for level in self.levels:
            count = kind_of(level).mediators(level)
            if count != math.isqrt(count) ** 2:
                raise UserError(f"{count} mediators are no square, as the published form needs.", hint="Pass for instance --levels 4,16.")
        if self.space != "queries":
            raise UserError("In the published form mediators come from queries.", hint="Leave --mediators-from out.")
        if self.local_rank:
            raise UserError("The published form has a convolution in place of the local branch.", hint="Leave --local-rank out.")

    @property
    def all_levels(self) -> tuple[Level, ...]:
        """Every level that a layer of such a model can run at, in the order of their rank: softmax is the last."""
        return tuple(in_order([*self.levels, SOFTMAX]))

    @property
    def mlp_levels(self) -> tuple[Level, ...]:
        """Levels of the narrow MLPs, the narrowest first."""
        return tuple(f"1/{width}" for width in self.mlp_widths)

    def of_model(self, depth: int) -> MediatorSettings:
        """The same for a model of `depth` layers: a set of all of them is left out.

        Raises:
            UserError: the model does not have one of the layers.
        """
        if self.layers is not None and self.layers[-1] >= depth:
            raise UserError(f"The model has no layer {self.layers[-1]}.", hint=f"Its layers are 0 to {depth - 1}.")
        if self.kept is not None and len(self.kept) != depth:
            raise UserError(f"Parts of {len(self.kept)} layers are said to be kept, the model has {depth}.", hint="Export it again.")
        return replace(self, layers=None) if self.layers == tuple(range(depth)) else self

    def converted(self, depth: int) -> tuple[int, ...]:
        """The converted layers of a model of `depth` layers."""
        return tuple(range(depth)) if self.layers is None else self.layers

    def level_of(self, layer: int, level: Level) -> Level:
        """How a layer runs where the whole model is asked for a level: so, or in a layer without added levels as the pretrained layer."""
        return level if self.converts(layer) else SOFTMAX

    def converts(self, layer: int) -> bool:
        return self.layers is None or layer in self.layers

    @property
    def whole(self) -> MediatorSettings:
        """The same of the model before it was pruned."""
        return replace(self, kept=None)

    def all_parts(self, layer: int) -> tuple[Level, ...]:
        """Every part that a layer has that was not pruned: levels of its attention and of its MLP, and `MODULATION`."""
        if not self.converts(layer):
            return PRETRAINED_PARTS
        changed, own = (MODULATION,) * bool(self.modulation_rank), (OWN,) * (self.mlp == "own")
        return (*self.all_levels, *changed, FULL, *own, *self.mlp_levels)

    def parts(self, layer: int) -> tuple[Level, ...]:
        """Every part that a layer has."""
        return self.all_parts(layer) if self.kept is None else self.kept[layer]

    def whole_model_levels(self, depth: int) -> tuple[Level, ...]:
        """Levels that a model of `depth` layers can run at in all of them, in the order of their rank."""
        everywhere = {level: tuple(self.level_of(layer, level) for layer in range(depth)) for level in self.all_levels}
        return tuple(level for level, levels in everywhere.items() if _lacking(levels, self) is None)

    def pruned_to(self, patterns: Iterable[Sequence[Level]]) -> MediatorSettings:
        """The same of a model that keeps the parts alone which these levels, one per layer, need."""
        needed = [
            {part for level in set(of_layer) for part in needs(level, layer, self)}
            for layer, of_layer in enumerate(zip(*patterns, strict=True))
        ]
        return replace(self, kept=tuple(tuple(part for part in self.parts(layer) if part in some) for layer, some in enumerate(needed)))

    def to_json(self) -> dict[str, Any]:
        return {name: _as_lists(value) for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> MediatorSettings:
        return cls(**{name: _as_tuples(value) for name, value in content.items()})


def _as_lists(value: Any) -> Any:
    return [_as_lists(item) for item in value] if isinstance(value, tuple) else value


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of level."""

    looks: str
    """How such a level is written, for messages."""
    read: Callable[[object], Level | None]
    """The level that a value from the command line or from JSON stands for; None if it stands for none of this kind."""
    rank: Callable[[Level], float]
    """Where a level stands among the others: a larger one does more of what softmax attention does."""
    title: Callable[[Level], str]
    """Its name in tables and pictures."""
    flops: Callable[[Architecture, Level, MediatorSettings | None], int]
    """Of one attention layer on one sample."""
    parameters: Callable[[Architecture, Level, MediatorSettings], int]
    """Of the module below."""
    module: Callable[[Level, int, int, tuple[int, int], MediatorSettings], nn.Module] | None
    """(level, width, heads, grid, settings) -> what a layer owns at this level alone, called as `module(x, layer)` with x (b, n, c) and the
    layer's `MediatorAttention`, which holds the projections that all levels share. None: the pretrained layer runs."""
    mediators: Callable[[Level], int] = lambda level: 0
    """Its mediators per head; 0 if it has none."""


def _read_count(value: object) -> Level | None:
    text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
    return int(text) if text.isascii() and text.isdigit() and int(text) > 0 else None


def _mediator_flops(arch: Architecture, level: Level, settings: MediatorSettings | None) -> int:
    sizes = (arch.tokens, arch.width, arch.heads, int(level))
    rank = (settings.projection_rank or 0) if settings else 0
    if settings and settings.form == "published":
        return forms.published_flops(*sizes) + forms.plain_change_flops(arch.tokens, arch.width, rank)
    if not arch.qk_norm and forms.absorbed_is_cheaper(*sizes):
        product = forms.absorbed_flops(*sizes) + forms.absorbed_change_flops(arch.width, arch.heads, int(level), rank)
    else:
        product = forms.plain_flops(*sizes) + forms.plain_change_flops(arch.tokens, arch.width, rank)
    local = forms.local_flops(arch.tokens, arch.width, settings.local_rank if settings else 0)
    return product + forms.interpolation_flops(arch.grid, arch.heads, int(level)) + local


def _mediator_parameters(arch: Architecture, level: Level, settings: MediatorSettings) -> int:
    if settings.form == "published":
        return forms.published_parameters(arch.width, arch.heads, arch.grid, int(level))
    rows, columns = coarse_grid(arch.grid)
    return 3 * arch.heads * int(level) * rows * columns + 2 * arch.heads


def _mediator_module(level: Level, width: int, heads: int, grid: tuple[int, int], settings: MediatorSettings) -> nn.Module:
    from mediatorize.model.mediators import MediatorLevel, PublishedLevel

    if settings.form == "published":
        return PublishedLevel(int(level), width, heads, grid)
    return MediatorLevel(int(level), width, heads, grid, settings.space)


@dataclass(frozen=True)
class Parts:
    """How a block's attention and its MLP run in one model call."""

    attention: Level
    mlp: Level
    held: bool = False
    """Whether to the attention is added what its mediators left out at the last call that computed softmax attention."""

    @property
    def level(self) -> Level:
        """The level that says so."""
        if not self.held and self.mlp == _mlp_beside(self.attention):
            return self.attention
        return f"{HELD if self.held else ''}{self.attention}|{self.mlp}"


def _mlp_beside(attention: Level) -> Level:
    """The MLP of a block whose level names its attention alone."""
    return FULL if attention == SOFTMAX else OWN


def _read_share(value: object) -> Level | None:
    """A narrow MLP's level: 1/8."""
    text = str(value)
    share = text.removeprefix("1/")
    return text if text != share and share.isascii() and share.isdigit() and int(share) > 1 else None


def _read_attention(value: object) -> Level | None:
    """A level of the attention alone."""
    found = (kind.read(value) for name, kind in KINDS.items() if name != "block")
    return next((level for level in found if level is not None), None)


def _read_mlp(value: object) -> Level | None:
    return str(value) if value in (FULL, OWN) else _read_share(value)


def _read_parts(value: object) -> Parts | None:
    if not isinstance(value, str) or "|" not in value:
        return None
    first, _, second = value.partition("|")
    held = first.startswith(HELD)
    attention, mlp = _read_attention(first.removeprefix(HELD)), _read_mlp(second)
    return None if attention is None or mlp is None or (held and attention == SOFTMAX) else Parts(attention, mlp, held)


def _read_block(value: object) -> Level | None:
    return None if (parts := _read_parts(value)) is None else parts.level


def _block_rank(level: Level) -> float:
    parts = parts_of(level)
    return parts.held - 1 / (1 + kind_of(parts.attention).rank(parts.attention))


def _block_flops(arch: Architecture, level: Level, settings: MediatorSettings | None) -> int:
    runs = parts_of(level).attention
    return kind_of(runs).flops(arch, runs, settings)


KINDS: dict[str, Kind] = {
    "softmax": Kind(
        looks=SOFTMAX,
        read=lambda value: SOFTMAX if value == SOFTMAX else None,
        rank=lambda level: float("inf"),
        title=str,
        flops=lambda arch, level, settings: forms.pretrained_flops(arch),
        parameters=lambda arch, level, settings: 0,
        module=None,
    ),
    "mediators": Kind(
        looks="a count of mediators",
        read=_read_count,
        rank=float,
        title=lambda level: f"m={level}",
        flops=_mediator_flops,
        parameters=_mediator_parameters,
        module=_mediator_module,
        mediators=int,
    ),
    "block": Kind(
        looks="an attention with an MLP (softmax|1/8 or hold+4|full)",
        read=_read_block,
        rank=_block_rank,
        title=str,
        flops=_block_flops,
        parameters=lambda arch, level, settings: 0,
        module=None,
    ),
}
"""Kinds of level by name. To add one: an entry here, and the module that it names."""


@lru_cache(maxsize=4096)
def parts_of(level: Level) -> Parts:
    """How a block's attention and MLP run at a level."""
    if (parts := _read_parts(level)) is not None:
        return parts
    return Parts(level, _mlp_beside(level))


def holds(level: Level) -> bool:
    """Whether a level needs what an earlier call left."""
    return parts_of(level).held


@lru_cache(maxsize=4096)
def in_full(level: Level) -> Level:
    """A level as a block runs it that remembers nothing: softmax attention in place of mediators and a held rest."""
    parts = parts_of(level)
    return Parts(SOFTMAX, parts.mlp).level if parts.held else level


def changes_modulation(level: Level) -> bool:
    """Whether a block at a level uses the low-rank change of its modulation: its attention runs bare, at an added level."""
    parts = parts_of(level)
    return not parts.held and parts.attention != SOFTMAX


def needs(level: Level, layer: int, settings: MediatorSettings | None) -> tuple[Level, ...]:
    """The parts that a layer must have to run at a level.

    Args:
        settings: what was added to the model; None: nothing.
    """
    parts = parts_of(level)
    added = settings if settings is not None and settings.converts(layer) else None
    changed = added is not None and added.modulation_rank and changes_modulation(level)
    mlp = FULL if parts.mlp == OWN and (added is None or added.mlp == "shared") else parts.mlp
    before = [SOFTMAX] if parts.held else []  # the call whose rest is held, or this one where there is none
    return (parts.attention, *before, *([MODULATION] if changed else []), mlp)


def mlp_share(level: Level) -> int:
    """The part of the hidden width that an MLP has at its level: 8 for 1/8, 1 for the whole."""
    return 1 if level in (FULL, OWN) else int(str(level).removeprefix("1/"))


def _all_looks() -> str:
    *most, last = (kind.looks for kind in KINDS.values())
    return f"{', '.join(most)} or {last}"


def read_level(value: object) -> Level:
    """The level that a value from the command line or from JSON stands for."""
    for kind in KINDS.values():
        if (level := kind.read(value)) is not None:
            return level
    raise UserError(f"{value!r} is no level.", hint=f"Levels are {_all_looks()}.")


def read_part_level(value: object) -> Level:
    """The level of an attention layer or of a narrow MLP that a value from JSON stands for."""
    return str(value) if _read_share(value) else read_level(value)


def is_level(value: object) -> bool:
    """Whether a value is a level as it stands."""
    return any(kind.read(value) == value for kind in KINDS.values() if not isinstance(value, bool))


def kind_of(level: Level) -> Kind:
    """The kind that a level is of."""
    for kind in KINDS.values():
        if kind.read(level) == level:
            return kind
    raise UserError(f"{level!r} is no level.", hint=f"Levels are {_all_looks()}.")


def is_pretrained(level: Level) -> bool:
    """Whether a layer at this level is the pretrained one."""
    return level == SOFTMAX


def in_order(levels: Iterable[Level]) -> list[Level]:
    """Distinct levels in the order of their rank; of equal rank, narrow MLPs first, then by name. The same in every process."""

    def place(level: Level) -> tuple[float, int, str]:
        return kind_of(level).rank(level), -mlp_share(parts_of(level).mlp), str(level)

    return sorted(set(levels), key=place)


def title(level: Level) -> str:
    """A level's name in tables and pictures."""
    return f"MLP {level}" if _read_share(level) else kind_of(level).title(level)


def most_mediators(levels: Iterable[Level]) -> int:
    """The largest count of mediators per head among levels."""
    return max(kind_of(level).mediators(level) for level in levels)


def levels_per_layer(levels: Level | Sequence[Level], depth: int, settings: MediatorSettings | None) -> list[Level]:
    """One level for each of `depth` layers, from one for the whole model or one each.

    One for the whole model is softmax in layers that conversion left alone.

    Args:
        settings: what was added to the model.

    Raises:
        UserError: of one level each, the number is wrong, or a converted model's layer does not have its level. Of one for all, a layer of
            a pruned model does not have it.
    """
    if isinstance(levels, int | str):
        everywhere = [levels if settings is None else settings.level_of(layer, levels) for layer in range(depth)]
        if settings is not None and settings.kept is not None:
            refuse_lacking(everywhere, settings)
        return everywhere
    if len(levels) != depth:
        raise UserError(f"{len(levels)} levels were given for {depth} layers.", hint="Pass one level, or one per layer.")
    if settings is not None:
        refuse_lacking(levels, settings)
    return list(levels)


def refuse_lacking(levels: Sequence[Level], settings: MediatorSettings | None, hint: str = "") -> None:
    """Refuses levels, one per layer, of which a layer does not have one, or does not have mediators or a narrow MLP that it names.

    Args:
        settings: what was added to the model; None: nothing.
        hint: what to do next; empty: the message says what the layer has.
    """
    if (found := _lacking(tuple(levels), settings)) is None:
        return
    layer, lacking, there = found
    what = "change of its modulation" if lacking == MODULATION else f"level {lacking}"
    if settings is not None and settings.kept is not None:
        hint = f"It was pruned to {', '.join(map(str, there))}. Take the whole bundle, or export it again with --prune --schedule."
    shown = [part for part in there if part not in (MODULATION, FULL, OWN)]
    raise UserError(f"Layer {layer} has no {what}.", hint=hint or f"It has {', '.join(map(str, shown))}.")


@lru_cache(maxsize=4096)
def _lacking(levels: tuple[Level, ...], settings: MediatorSettings | None) -> tuple[int, Level, tuple[Level, ...]] | None:
    """The first layer that lacks a part, which part, and what it has. Kept, as every model call asks."""
    for layer, level in enumerate(levels):
        there = PRETRAINED_PARTS if settings is None else settings.parts(layer)
        if (lacking := next((part for part in needs(level, layer, settings) if part not in there), None)) is not None:
            return layer, lacking, there
    return None


def read_layers(text: str) -> tuple[int, ...]:
    """A set of layers, ascending, from numbers and ranges: `0-3,8` is layers 0, 1, 2, 3 and 8.

    Raises:
        UserError: an item is neither a number nor an ascending range.
    """
    found: set[int] = set()
    for item in text.split(",") if text.strip() else ():
        first, dash, last = (part.strip() for part in item.partition("-"))
        if not all(number.isascii() and number.isdigit() for number in ((first, last) if dash else (first,))):
            raise UserError(f"{item.strip()!r} is neither a layer nor a range of layers.", hint="Pass for instance 0-3 or 0,2,5.")
        if dash and int(last) < int(first):
            raise UserError(f"The range of layers {item.strip()} descends.", hint=f"Pass {last}-{first}.")
        found |= set(range(int(first), int(last or first) + 1))
    return tuple(sorted(found))


def layers_in_short(layers: Sequence[int]) -> str:
    """Ascending layers as numbers and ranges, as `read_layers` reads them."""
    runs = [[layer for _, layer in run] for _, run in groupby(enumerate(layers), lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
