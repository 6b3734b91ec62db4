"""A level for every (noise level, layer), independent of any sampler's steps. No torch here."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mediatorize.errors import UserError
from mediatorize.model.levels import Level, kind_of


@dataclass(frozen=True)
class Schedule:
    """Piecewise constant in the noise level (0 data, 1 noise): `levels[i]` from `edges[i - 1]` (or 0) up to `edges[i]` (or 1)."""

    edges: tuple[float, ...]
    levels: tuple[tuple[Level, ...], ...]
    """For every piece, one level per layer."""

    def __post_init__(self) -> None:
        if len(self.levels) != len(self.edges) + 1:
            raise UserError(f"A schedule of {len(self.levels)} pieces has {len(self.edges)} inner edges.", hint="It needs one fewer.")
        if any(not low < high for low, high in pairwise((0.0, *self.edges, 1.0))):
            raise UserError(f"Schedule edges {list(self.edges)} do not ascend between 0 and 1.", hint="Check schedule.json.")
        if len({len(piece) for piece in self.levels}) != 1:
            raise UserError("Schedule pieces differ in their number of layers.", hint="Check schedule.json.")
        for level in (level for piece in self.levels for level in piece):
            kind_of(level)  # refuses what is none

    @property
    def depth(self) -> int:
        """How many layers it is for."""
        return len(self.levels[0])

    @property
    def used(self) -> set[Level]:
        """Every level that some layer runs at somewhere."""
        return {level for piece in self.levels for level in piece}

    def at(self, noise_level: float) -> tuple[Level, ...]:
        """The level of every layer at a noise level in [0, 1]."""
        return self.levels[bisect_right(self.edges, noise_level)]

    def to_json(self) -> dict[str, Any]:
        bounds = pairwise((0.0, *self.edges, 1.0))
        return {
            "pieces": [
                {"noise_from": low, "noise_to": high, "levels": list(levels)}
                for (low, high), levels in zip(bounds, self.levels, strict=True)
            ]
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Schedule:
        try:
            pieces = content["pieces"]
            starts, stops = [piece["noise_from"] for piece in pieces], [piece["noise_to"] for piece in pieces]
            if [*starts, 1.0] != [0.0, *stops]:
                raise UserError("Schedule pieces do not follow one another from 0 to 1.", hint="Check schedule.json.")
            return cls(tuple(starts[1:]), tuple(tuple(piece["levels"]) for piece in pieces))
        except (KeyError, TypeError) as error:
            raise UserError("Not a schedule: it needs pieces of noise_from, noise_to and levels.", hint="Check schedule.json.") from error
