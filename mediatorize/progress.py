"""How long work tells its progress, whoever shows it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Bar(Protocol):
    def update(self, n: int = 1) -> object:
        """Told of `n` units that are done."""


class NoBar:
    """Shows nothing."""

    def update(self, n: int = 1) -> None: ...


Progress = Callable[[int, str, str], AbstractContextManager[Bar]]
"""(units in all, what is done, what a unit is) -> a context that gives a bar."""


def silent(total: int, description: str, unit: str) -> AbstractContextManager[Bar]:
    """No progress is shown."""
    return nullcontext(NoBar())
