"""Drives a model along one trajectory: what each call runs, and the memory between calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from mediatorize.errors import UserError
from mediatorize.model.levels import holds
from mediatorize.model.memory import Memory
from mediatorize.model.schedule import Levels, with_memory

Model = Callable[..., Tensor]
"""A model, or what stands for it: called as `model(x, t, y, levels=..., memory=...)`."""


class Driver:
    """Calls a model as a schedule says, for one batch along one trajectory. A second trajectory needs a second driver."""

    def __init__(self, model: Model, calls: Sequence[Levels], rows: Sequence[int]) -> None:
        """
        Args:
            calls: levels of the whole trajectory's calls, in order.
            rows: of the same calls per sample: 2 where they are guided, else 1.
        """
        self.model, self.index = model, 0
        self.levels, self.watched = with_memory(calls, rows)
        needed = any(holds(level) for levels in self.levels for level in levels)
        self.memory = Memory(len(calls[0])) if needed else None

    def look(self, x: Tensor) -> None:
        """Is shown the solver's state before every call. A schedule does not go by it."""

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The model's output at the trajectory's next call: x (b, c, h, w), t (b,), y (b,), each conditional first where guided."""
        if self.index == len(self.levels):
            raise UserError(f"The schedule has {len(self.levels)} calls, and this is one more.", hint="Use a driver for each trajectory.")
        levels, watched = self.levels[self.index], self.watched[self.index]
        self.index += 1
        if self.memory is None:
            return self.model(x, t, y, levels=levels)
        self.memory.begin(watched)
        return self.model(x, t, y, levels=levels, memory=self.memory)
