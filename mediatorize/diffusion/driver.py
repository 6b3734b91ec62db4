"""Drives a model along one trajectory: what each call runs, and the memory between calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mediatorize.errors import UserError
from mediatorize.model.block import way_of_running
from mediatorize.model.levels import Level
from mediatorize.model.memory import Memory, Series
from mediatorize.model.schedule import Call, highest_order, is_computed, places_of, streams_of, watched_surrogates

Model = Callable[..., Tensor]
"""A model, or what stands for it: called as `model(x, t, y, levels=..., memory=...)`."""


class Driver:
    """Calls a model as a schedule says, for one batch along one trajectory. A second trajectory needs a second driver.

    A guided call has two halves (streams), conditional and unconditional. They are one call of the model where both run the same, else two.
    """

    def __init__(
        self, model: Model, depth: int, calls: Sequence[Call], noise_levels: Sequence[float], rows: Sequence[int], batch: int
    ) -> None:
        """
        Args:
            depth: blocks of the model.
            calls: of the whole trajectory, in order.
            noise_levels: of the same calls. Polynomials run over the number of a call's noise level among the distinct ones.
            rows: of the same calls per sample: 2 where they are guided, else 1.
            batch: samples.
        """
        self.model, self.rows, self.batch, self.index = model, rows, batch, 0
        self.places = places_of(noise_levels)
        halves = streams_of(calls, rows)
        forecast = any(not is_computed(levels) for levels in halves[0])
        self.apart = any(call.unconditional is not None for call in calls) or (forecast and len(set(rows)) > 1)
        self.streams = [_Stream(levels, depth, self.places) for levels in (halves if self.apart else halves[:1])]

    def ways(self) -> set[tuple[object, ...]]:
        """The ways that blocks run along the trajectory, as `DiffusionTransformer.compile_blocks` tells them apart: a graph for each."""
        found: set[tuple[object, ...]] = set()
        for stream in self.streams:
            for index, rows in enumerate(self.rows):
                found |= {(1 if self.apart else rows, *way) for way in stream.ways(index)}
        return found

    def look(self, x: Tensor) -> None:
        """Is shown the solver's state before every call. A schedule does not go by it."""

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The model's output at the trajectory's next call: x (b, c, h, w), t (b,), y (b,), each conditional first where guided."""
        if self.index == len(self.places):
            raise UserError(f"The schedule has {len(self.places)} calls, and this is one more.", hint="Use a driver for each trajectory.")
        index, place = self.index, self.places[self.index]
        self.index += 1
        first = self.streams[0]
        if not self.apart:
            return first.run(self.model, index, place, x, t, y)
        one = slice(self.batch)
        conditional = first.run(self.model, index, place, x[one], t[one], y[one])
        if len(x) == self.batch:
            return conditional
        other = slice(self.batch, None)
        return torch.cat([conditional, self.streams[1].run(self.model, index, place, x[other], t[other], y[other], conditional)])


class _Stream:
    """One half of a guided call, or all of a call."""

    def __init__(self, levels: list[tuple[Level, ...]], depth: int, places: Sequence[float]) -> None:
        self.levels = levels
        self.watched = watched_surrogates(levels, depth, places)
        self.memory = Memory(depth, highest_order(levels))
        self.outputs = Series()
        self.last_forecast = max((index for index, own in enumerate(levels) if own and not is_computed(own)), default=-1)
        self.last_output = max((index for index, own in enumerate(levels) if not own), default=-1)

    def ways(self, index: int) -> list[tuple[object, ...]]:
        """How blocks run that compute something at a call."""
        levels = self.levels[index]
        watched = self.watched[index] if index <= self.last_forecast else [None] * len(levels)
        found = (way_of_running(level, own) for level, own in zip(levels, watched if levels else [], strict=True))
        return [way for way in found if way is not None]

    def run(self, model: Model, index: int, place: float, x: Tensor, t: Tensor, y: Tensor, base: Tensor | None = None) -> Tensor:
        """The output, of which the part over `base` is forecast where the model is not called."""
        levels = self.levels[index]
        if not levels:
            rest = self.outputs.at(place, 1)
            return rest if base is None else base + rest
        if index <= self.last_forecast:
            self.memory.begin(place, self.watched[index])
            output = model(x, t, y, levels=levels, memory=self.memory)
        else:  # nothing is forecast from here on
            output = model(x, t, y, levels=levels)
        if index < self.last_output and is_computed(levels):
            self.outputs.add(place, output if base is None else output - base, 2)
        return output
