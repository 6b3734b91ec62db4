"""A store keeps the results of algorithms, so that they are not made again. The caller passes it in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Kept:
    """A result: tensors, and facts as JSON keeps them."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)


class Store(Protocol):
    def has(self, name: str) -> bool:
        """Whether something of that name has been made."""

    def once(self, name: str, make: Callable[[], Kept]) -> Kept:
        """What `make` gives, made at the first call for that name and remembered ever after."""

    def numbers(self, group: str, key: str, make: Callable[[], list[float]]) -> list[float]:
        """The same for a few numbers, one of many lists of a group."""

    def each(self, makes: Mapping[str, Callable[[], Kept]]) -> list[Kept]:
        """`once` for every name. Processes that share a store share these out among themselves."""

    def drop(self, pattern: str) -> None:
        """Forgets what has names of a pattern, such as `call-*`."""


class InMemory:
    """A `Store` that lasts as long as the process does: for notebooks and tests."""

    def __init__(self) -> None:
        self.things: dict[str, Kept] = {}
        self.lists: dict[tuple[str, str], list[float]] = {}

    def has(self, name: str) -> bool:
        return name in self.things

    def once(self, name: str, make: Callable[[], Kept]) -> Kept:
        if name not in self.things:
            self.things[name] = make()
        return self.things[name]

    def numbers(self, group: str, key: str, make: Callable[[], list[float]]) -> list[float]:
        if (group, key) not in self.lists:
            self.lists[group, key] = make()
        return self.lists[group, key]

    def each(self, makes: Mapping[str, Callable[[], Kept]]) -> list[Kept]:
        return [self.once(name, make) for name, make in makes.items()]

    def drop(self, pattern: str) -> None:
        from fnmatch import fnmatch

        self.things = {name: kept for name, kept in self.things.items() if not fnmatch(name, pattern)}
