"""Memory of a trajectory: what sub-layers gave at the model calls that were computed, and forecasts of what they give at others.

For a sub-layer (the attention or the MLP of a block) with output y before its gate, and a cheap surrogate M of it, or none:

    computed call a:  r_a = y_a - M(x_a) is remembered
    forecast call k:  y_k ~ M(x_k) + p(k), where p is the polynomial through the last computed calls' r

Whoever drives the model owns one memory per trajectory (`diffusion.driver`), says where on the trajectory the call at hand stands, and
passes it in. Modules keep nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mediatorize.errors import UserError
from mediatorize.model.levels import Level, Part
from mediatorize.model.schedule import Watched, polynomial_weights


@dataclass
class Series:
    """The last values of one sequence, and where they were computed."""

    places: list[float] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def add(self, place: float, value: Tensor, keep: int) -> None:
        """Remembers a value, and the `keep` last in all. A second one at the same place takes the first one's place."""
        if self.places and self.places[-1] == place:
            self.places.pop()
            self.values.pop()
        self.places.append(place)
        self.values.append(value)
        del self.places[:-keep], self.values[:-keep]

    def at(self, place: float, order: int) -> Tensor:
        """The value at a place, from as many of the last values as the order needs or as there are."""
        if not self.values:
            raise UserError("A forecast needs a model call that was computed before it.", hint="Begin a trajectory with a computed call.")
        count = min(order + 1, len(self.values))
        if count == 1:
            return self.values[-1]
        weights = polynomial_weights(self.places[-count:], place)
        if count == 2:  # both weights add up to 1: read and written once
            return torch.lerp(self.values[-1], self.values[-2], weights[0])
        total = self.values[-1] * weights[-1]
        for value, weight in zip(self.values[-count:-1], weights[:-1], strict=True):
            total = torch.add(total, value, alpha=weight)
        return total


@dataclass
class Where:
    """Where a trajectory stands. Parts of a memory share it, and not the memory: without a cycle, tensors are freed with the memory."""

    place: float
    """Of the model call at hand, on the axis of the polynomials."""
    keep: int
    """How many values of a sequence are remembered."""


@dataclass
class SubLayerMemory:
    """Of one attention or MLP."""

    where: Where
    watched: tuple[Level, ...] = ()
    """Surrogates whose outputs a computed call must leave in memory, for later forecasts."""
    outputs: Series = field(default_factory=Series)
    surrogates: dict[Level, Series] = field(default_factory=dict)

    def remember(self, output: Tensor, surrogates: Mapping[Level, Tensor]) -> None:
        """Keeps a computed output (b, n, c), and those of the watched surrogates on the same input."""
        place, keep = self.where.place, self.where.keep
        self.outputs.add(place, output, keep)
        for level in [level for level in self.surrogates if level not in surrogates]:
            del self.surrogates[level]
        for level, value in surrogates.items():
            self.surrogates.setdefault(level, Series()).add(place, output - value, keep)

    def recall(self, part: Part, like: Tensor) -> Tensor | None:
        """What is forecast of the output at the call at hand: what a surrogate leaves out, or all. (b, n, c), as the tokens `like`.

        None where the part is computed.

        Raises:
            UserError: nothing was remembered, or it was for another batch.
        """
        if part.order is None:
            return None
        series = self.outputs if part.runs is None else self.surrogates.get(part.runs, Series())
        found = series.at(self.where.place, part.order)
        if found.shape != like.shape:
            raise UserError(
                f"This memory is of a batch {list(found.shape)}, the call of {list(like.shape)}.",
                hint="Use one memory per trajectory and batch.",
            )
        return found


@dataclass
class BlockMemory:
    attention: SubLayerMemory
    mlp: SubLayerMemory


class Memory:
    """What a model's sub-layers gave along one trajectory of a batch.

    Before every model call, `begin` says where the call stands. Two numbers per token, channel and sub-layer for linear forecasts; as many
    again for a surrogate.
    """

    def __init__(self, depth: int, order: int = 1) -> None:
        """
        Args:
            depth: blocks of the model.
            order: the highest order of the forecasts to come.
        """
        self.where = Where(0.0, order + 1)
        self.blocks = [BlockMemory(SubLayerMemory(self.where), SubLayerMemory(self.where)) for _ in range(depth)]

    def begin(self, place: float, watched: Sequence[Watched] | None = None) -> None:
        """Says where on the trajectory the next model call stands.

        Args:
            place: on the axis of the polynomials: which of the sampler's times it is.
            watched: for every block, surrogates of the attention and of the MLP that the call must leave in memory; None is none.
        """
        self.where.place = place
        for index, block in enumerate(self.blocks):
            block.attention.watched, block.mlp.watched = ((), ()) if watched is None else watched[index]
