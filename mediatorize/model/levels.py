"""Levels: the ways in which one attention layer can run, kind by kind, and the settings of what conversion adds. No torch here.

A *level* is one such way: `"softmax"` is the pretrained layer, bit for bit; a whole number is a count of mediators. What a kind of level is
called, its rank, its FLOPs, its parameters and its module are one entry of `KINDS`; no other file tells one kind from another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from mediatorize.errors import UserError
from mediatorize.model import forms
from mediatorize.model.architecture import Architecture, coarse_grid

if TYPE_CHECKING:
    from torch import nn

Level = int | str
Space = Literal["queries", "keys"]
MlpOwner = Literal["own", "shared"]

SOFTMAX = "softmax"
"""The level at which a layer is the pretrained one, bit for bit."""


@dataclass(frozen=True)
class MediatorSettings:
    """What conversion adds to every block (design 2)."""

    levels: tuple[Level, ...]
    """Levels beside softmax that every layer can run at, in the order of their rank."""
    space: Space = "queries"
    """Which of the model's projections makes mediators out of pooled tokens."""
    local_rank: int = 0
    """Rank of the local branch; 0 leaves it out."""
    modulation_rank: int = 0
    """Rank of the change that a block's modulation makes at the added levels; 0 leaves it out."""
    mlp: MlpOwner = "shared"
    """Whether the added levels share every block's MLP with softmax, or have their own: the same FLOPs, and as many weights again."""

    def __post_init__(self) -> None:
        added = self.levels and all(is_level(level) and not is_pretrained(level) for level in self.levels)
        if not added or list(self.levels) != in_order(self.levels):
            raise UserError(
                f"Levels {list(self.levels)} are not distinct, ascending counts of at least 1.",
                hint="Pass for instance --levels 1,4,16, without softmax, which is always there.",
            )
        if self.space not in ("queries", "keys"):
            raise UserError(f"Mediators cannot come from {self.space!r}.", hint="Choose queries or keys.")
        if self.mlp not in ("own", "shared"):
            raise UserError(f"MLPs cannot be {self.mlp!r}.", hint="Choose own or shared.")
        if min(self.local_rank, self.modulation_rank) < 0:
            raise UserError(f"A rank of {min(self.local_rank, self.modulation_rank)} is negative.", hint="Pass 0 to leave a part out.")

    @property
    def all_levels(self) -> tuple[Level, ...]:
        """Every level that a layer of such a model can run at, in the order of their rank: softmax is the last."""
        return tuple(in_order([*self.levels, SOFTMAX]))

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"levels": list(self.levels)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> MediatorSettings:
        return cls(**(fields | {"levels": tuple(fields["levels"])}))


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
    parameters: Callable[[Architecture, Level], int]
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
    product = forms.absorbed_flops(*sizes) if forms.absorbed_is_cheaper(*sizes) else forms.plain_flops(*sizes)
    local = forms.local_flops(arch.tokens, arch.width, settings.local_rank if settings else 0)
    return product + forms.interpolation_flops(arch.grid, arch.heads, int(level)) + local


def _mediator_parameters(arch: Architecture, level: Level) -> int:
    rows, columns = coarse_grid(arch.grid)
    return 3 * arch.heads * int(level) * rows * columns + 2 * arch.heads


def _mediator_module(level: Level, width: int, heads: int, grid: tuple[int, int], settings: MediatorSettings) -> nn.Module:
    from mediatorize.model.mediators import MediatorLevel

    return MediatorLevel(int(level), width, heads, grid, settings.space)


KINDS: dict[str, Kind] = {
    "softmax": Kind(
        looks=SOFTMAX,
        read=lambda value: SOFTMAX if value == SOFTMAX else None,
        rank=lambda level: float("inf"),
        title=str,
        flops=lambda arch, level, settings: forms.softmax_flops(arch.tokens, arch.width),
        parameters=lambda arch, level: 0,
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
}
"""Kinds of level by name. To add one: an entry here, and the module that it names."""


def read_level(value: object) -> Level:
    """The level that a value from the command line or from JSON stands for."""
    for kind in KINDS.values():
        if (level := kind.read(value)) is not None:
            return level
    raise UserError(f"{value!r} is no level.", hint=f"Levels are {' or '.join(kind.looks for kind in KINDS.values())}.")


def is_level(value: object) -> bool:
    """Whether a value is a level as it stands."""
    return any(kind.read(value) == value for kind in KINDS.values() if not isinstance(value, bool))


def kind_of(level: Level) -> Kind:
    """The kind that a level is of."""
    for kind in KINDS.values():
        if kind.read(level) == level:
            return kind
    raise UserError(f"{level!r} is no level.", hint=f"Levels are {' or '.join(kind.looks for kind in KINDS.values())}.")


def is_pretrained(level: Level) -> bool:
    """Whether a layer at this level is the pretrained one."""
    return kind_of(level).module is None


def in_order(levels: Iterable[Level]) -> list[Level]:
    """Distinct levels in the order of their rank."""
    return sorted(set(levels), key=lambda level: kind_of(level).rank(level))


def title(level: Level) -> str:
    """A level's name in tables and pictures."""
    return kind_of(level).title(level)


def most_mediators(levels: Iterable[Level]) -> int:
    """The largest count of mediators per head among levels."""
    return max(kind_of(level).mediators(level) for level in levels)


def levels_per_layer(levels: Level | Sequence[Level], depth: int) -> list[Level]:
    """One level for each of `depth` layers, from one for all or one each."""
    if isinstance(levels, int | str):
        return [levels] * depth
    if len(levels) != depth:
        raise UserError(f"{len(levels)} levels were given for {depth} layers.", hint="Pass one level, or one per layer.")
    return list(levels)
