"""The one resumable store: a folder of work in progress. Work with the same plan resumes. Work with another plan is refused or replaced.
Results that exist are not made again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mediatorize.devices import ALONE, World
from mediatorize.errors import UserError
from mediatorize.formats.bundle import read_tensors, write_json, write_tensors
from mediatorize.formats.tensors import write_beside
from mediatorize.store import Kept

PLAN_FILE = "plan.json"
STATE_FILE = "state.pt"


class Work:
    """A folder whose content depends on its plan alone. A `Store` for the algorithms."""

    def __init__(self, folder: Path, plan: Mapping[str, Any]) -> None:
        self.folder, self.plan = folder, plan

    @classmethod
    def open(
        cls,
        folder: Path,
        plan: Mapping[str, Any],
        *,
        force: bool,
        refusal: Callable[[dict[str, Any]], UserError | None],
        world: World = ALONE,
    ) -> Work:
        """Opens the folder. Keeps its content if that has this plan; otherwise empties it.

        Args:
            plan: everything that the results depend on, as JSON keeps it.
            force: replace work of another plan.
            refusal: takes another plan that is found there; returns the error to raise, or None to replace that plan's work.
            world: processes that share the folder; the first one makes it.
        """
        file = folder / PLAN_FILE
        before = json.loads(file.read_text()) if file.exists() else None
        world.barrier()  # all have read before one writes
        if before != plan:
            if before is not None and not force and (error := refusal(before)) is not None:
                raise error
            if world.is_first:
                if before is None and folder.exists() and any(not file.name.startswith(".") for file in folder.iterdir()):
                    raise UserError(f"{folder}: holds files that are not mediatorize's work.", hint="Name another folder.")
                _empty(folder)
                write_json(file, plan)
        world.barrier()
        return cls(folder, plan)

    def has(self, name: str) -> bool:
        """Whether something of that name has been made."""
        return (self.folder / f"{name}.safetensors").exists()

    def once(self, name: str, make: Callable[[], Kept]) -> Kept:
        """The result of `make`. The first call for a name makes and saves it; later calls read its file."""
        if self.has(name):
            return self.read(name)
        kept = make()
        write_tensors(self.folder / f"{name}.safetensors", kept.tensors, kept.facts)
        return kept

    def read(self, name: str) -> Kept:
        """What was made under that name."""
        return Kept(*read_tensors(self.folder / f"{name}.safetensors"))

    def numbers(self, group: str, key: str, make: Callable[[], list[float]]) -> list[float]:
        """The same for a few numbers. All lists of a group share one file."""
        known = self._lists(group)
        if key not in known:
            known[key] = make()
            write_json(self.folder / f"{group}.json", known)
        return known[key]

    def known(self, group: str, key: str) -> list[float] | None:
        """Numbers, if they have been made."""
        return self._lists(group).get(key)

    def _lists(self, group: str) -> dict[str, list[float]]:
        file = self.folder / f"{group}.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def each(self, makes: Mapping[str, Callable[[], Kept]]) -> list[Kept]:
        """`once` for every name."""
        return [self.once(name, make) for name, make in makes.items()]

    def drop(self, pattern: str) -> None:
        """Deletes results whose names match a pattern, such as `call-*`."""
        for file in self.folder.glob(f"{pattern}.safetensors"):
            file.unlink()

    def state(self, device: torch.device) -> Any:
        """The training state that was saved last; None if there is none."""
        file = self.folder / STATE_FILE
        return torch.load(file, map_location=device, weights_only=True) if file.exists() else None

    def save_state(self, state: Any) -> None:
        write_beside(self.folder / STATE_FILE, lambda file: torch.save(state, file))


class SharedWork:
    """A `Work` for several processes, which all make the same calls in the same order. What is not there they make together, and the first
    keeps it; what `each` is asked for is made by one process each."""

    def __init__(self, work: Work, world: World) -> None:
        self.work, self.world = work, world

    def has(self, name: str) -> bool:
        return self.world.as_first(self.world.is_first and self.work.has(name))  # others may not see the file yet

    def once(self, name: str, make: Callable[[], Kept]) -> Kept:
        if self.has(name):
            return self.work.read(name)
        kept = make()
        if self.world.is_first:
            self.work.once(name, lambda: kept)
        self.world.barrier()
        return kept if self.world.is_first else self.work.read(name)  # all have the first's

    def numbers(self, group: str, key: str, make: Callable[[], list[float]]) -> list[float]:
        known = self.world.as_first(self.work.known(group, key) if self.world.is_first else None)
        if known is None:
            known = made = self.world.as_first(make())
            if self.world.is_first:
                self.work.numbers(group, key, lambda: made)
        return known

    def each(self, makes: Mapping[str, Callable[[], Kept]]) -> list[Kept]:
        for name in list(makes)[self.world.rank :: self.world.size]:
            self.work.once(name, makes[name])
        self.world.barrier()
        return [self.work.read(name) for name in makes]

    def drop(self, pattern: str) -> None:
        self.world.barrier()  # all have read
        if self.world.is_first:
            self.work.drop(pattern)


def _empty(folder: Path) -> None:
    """Empties a folder and deletes its plan last: after a kill, the files that are left still have their plan."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == PLAN_FILE):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
