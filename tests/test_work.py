"""The resumable store: what is made once stays, whatever kills the process; a folder belongs to one plan."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mediatorize.devices import ALONE, World
from mediatorize.errors import UserError
from mediatorize.stages.work import PLAN_FILE, STATE_FILE, SharedWork, Work
from mediatorize.store import InMemory, Kept, Store

PLAN: dict[str, Any] = {"levels": [1, "softmax"], "seed": 0, "of": {"file": "model.pt"}}
OTHER = PLAN | {"seed": 1}
CPU = torch.device("cpu")


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


def refuse(before: dict[str, Any]) -> UserError:
    return UserError(f"unfinished work of seed {before['seed']}.", hint="Pass --force.")


def opened(folder: Path, plan: dict[str, Any] = PLAN, *, force: bool = False, world: World = ALONE) -> Work:
    return Work.open(folder, plan, force=force, refusal=refuse, world=world)


def never() -> Any:
    raise AssertionError("made again")


def layer(value: float) -> Callable[[], Kept]:
    return lambda: Kept({"a": torch.full((2, 3), value).T, "b": torch.zeros(0)}, {"before": {"1": value}, "name": "layer"})


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# --- made once -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "folder", "shared folder"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "memory":
        return InMemory()
    work = opened(tmp_path / "work")
    return work if request.param == "folder" else SharedWork(work, ALONE)


def test_what_was_made_is_not_made_again(store: Store) -> None:
    assert not store.has("layer-000")
    first = store.once("layer-000", layer(0.5))
    assert store.has("layer-000")
    assert not store.has("layer-001")
    again = store.once("layer-000", never)
    assert again.facts == first.facts == {"before": {"1": 0.5}, "name": "layer"}
    assert again.tensors.keys() == first.tensors.keys() == {"a", "b"}
    for name, value in first.tensors.items():
        assert torch.equal(again.tensors[name], value)


def test_numbers_of_a_group_are_made_once_each(store: Store) -> None:
    assert store.numbers("distances", "0.5", lambda: [0.1]) == [0.1]
    assert store.numbers("distances", "0.25", lambda: [1 / 3]) == [1 / 3]
    assert store.numbers("errors", "0.5", lambda: [7.0]) == [7.0]
    assert [store.numbers("distances", key, never) for key in ("0.5", "0.25")] == [[0.1], [1 / 3]]


def test_what_is_dropped_is_made_again_and_nothing_else(store: Store) -> None:
    for name in ("call-000", "call-001", "states"):
        store.once(name, layer(1))
    store.drop("call-*")
    assert [store.has(name) for name in ("call-000", "call-001", "states")] == [False, False, True]
    assert float(store.once("call-001", layer(2)).tensors["a"][0, 0]) == 2
    store.once("states", never)


def test_something_that_failed_was_not_made(store: Store) -> None:
    with pytest.raises(AssertionError):
        store.once("layer-000", never)
    assert not store.has("layer-000")
    assert store.once("layer-000", layer(3)).facts["before"] == {"1": 3}


# --- one plan ------------------------------------------------------------------------------------------------------------------


def test_the_same_plan_goes_on(tmp_path: Path) -> None:
    layers = {index: layer(index / 2)() for index in (0, 11)}
    work = opened(tmp_path / "deep" / "work")
    for index, kept in layers.items():
        work.once(f"layer-{index:03d}", lambda kept=kept: kept)
    work.numbers("distances", "schedule", lambda: [0.25])
    work.save_state({"step": 3})
    before = contents(work.folder)

    after = opened(tmp_path / "deep" / "work", {key: PLAN[key] for key in reversed(PLAN)})
    assert contents(after.folder) == before
    for index, kept in layers.items():
        found = after.once(f"layer-{index:03d}", never)
        assert found.facts == kept.facts
        assert found.tensors.keys() == kept.tensors.keys()
        assert all(torch.equal(found.tensors[name], value) for name, value in kept.tensors.items())
    assert after.numbers("distances", "schedule", never) == [0.25]
    assert after.state(CPU) == {"step": 3}


def test_another_plan_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    work = opened(tmp_path / "work")
    work.once("layer-000", layer(1))
    before = contents(work.folder)
    with pytest.raises(UserError, match="unfinished work of seed 0"):
        opened(tmp_path / "work", OTHER)
    assert contents(work.folder) == before
    opened(tmp_path / "work").once("layer-000", never)


@pytest.mark.parametrize("how", ["by force", "where nothing is lost"])
def test_another_plan_replaces_all_of_it(how: str, tmp_path: Path) -> None:
    work = opened(tmp_path / "work")
    work.once("layer-000", layer(1))
    work.numbers("distances", "schedule", lambda: [0.25])
    work.save_state({"step": 3})
    other = Work.open(tmp_path / "work", OTHER, force=how == "by force", refusal=refuse if how == "by force" else lambda before: None)
    assert contents(other.folder).keys() == {PLAN_FILE}
    assert other.state(CPU) is None
    assert not other.has("layer-000")
    assert other.numbers("distances", "schedule", lambda: [0.5]) == [0.5]
    with pytest.raises(UserError, match="unfinished work of seed 1"):
        opened(tmp_path / "work")


@pytest.mark.parametrize("force", [False, True])
def test_foreign_files_are_never_dropped(force: bool, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds files that are not mediatorize's work"):
        opened(folder, force=force)
    assert contents(folder) == {"thesis.tex": b"years of work"}


def test_an_empty_folder_is_taken_and_so_is_one_of_a_kill_before_the_plan(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert contents(opened(tmp_path / "empty").folder).keys() == {PLAN_FILE}
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / f".{PLAN_FILE}.saving").write_text('{"lev')
    assert contents(opened(tmp_path / "killed").folder).keys() == {PLAN_FILE}


# --- kills ---------------------------------------------------------------------------------------------------------------------

STEPS = ["open", "chmod", "replace"]
"""What saving calls, in turn; a kill comes before each."""


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_in_mid_save_leaves_the_old_or_nothing(step: str, tmp_path: Path) -> None:
    work = opened(tmp_path / "work")
    work.save_state({"step": 1, "x": torch.ones(3)})
    work.numbers("distances", "a", lambda: [1.0])
    before = contents(work.folder)

    def kill(*arguments: Any, **options: Any) -> Any:
        raise Killed

    saves: list[Callable[[], Any]] = [
        lambda: work.save_state({"step": 2, "x": torch.zeros(3)}),
        lambda: work.numbers("distances", "b", lambda: [2.0]),
        lambda: work.once("layer-000", layer(1)),
    ]
    for save in saves:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, step, kill)
            patch.setattr(Path, "unlink", kill)  # the end of a process tidies nothing up
            with pytest.raises(Killed):
                save()
    found = contents(work.folder)
    assert {name: found[name] for name in before} == before
    assert all(name.startswith(".") for name in found.keys() - before.keys())

    again = opened(tmp_path / "work")
    assert again.state(CPU)["step"] == 1
    assert not again.has("layer-000")
    assert again.numbers("distances", "a", never) == [1]
    again.once("layer-000", layer(2))
    again.save_state({"step": 2})
    assert opened(tmp_path / "work").state(CPU) == {"step": 2}
    assert not [file for file in work.folder.iterdir() if file.name.startswith(f".{STATE_FILE}")]


SAVING = """
import sys
from itertools import count
from pathlib import Path
import torch
from mediatorize.stages.work import Work
work = Work.open(Path(sys.argv[1]), {}, force=False, refusal=lambda before: None)
for step in count():
    work.save_state({"step": step, "x": torch.full((50_000,), step)})
    print(step, flush=True)
"""


def test_a_process_that_is_killed_leaves_a_whole_state(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    last = -1
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", SAVING, folder], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(20):
            last = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        process.communicate()
        state = Work.open(folder, {}, force=False, refusal=lambda before: None).state(CPU)
        assert state["step"] >= last
        assert state["x"].unique().tolist() == [state["step"]]


# --- several processes ---------------------------------------------------------------------------------------------------------


class Meeting(World):
    """A process that is a thread of this one: its barrier is theirs."""

    def __init__(self, rank: int, size: int, met: threading.Barrier) -> None:
        super().__init__(rank, size, CPU)
        object.__setattr__(self, "met", met)

    def barrier(self) -> None:
        self.met.wait(timeout=30)  # type: ignore[attr-defined]


@pytest.mark.parametrize("late", [0, 1])
def test_all_processes_have_read_before_the_first_replaces_and_none_goes_on_before_it_has(late: int, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    opened(folder).once("layer-000", layer(1))
    before = contents(folder)
    met, asked, seen = threading.Barrier(2), {}, {}

    def join(rank: int) -> None:
        def refusal(plan: dict[str, Any]) -> None:
            asked[rank] = plan

        work = Work.open(folder, OTHER, force=False, refusal=refusal, world=Meeting(rank, 2, met))
        seen[rank] = contents(work.folder)

    threads = {rank: threading.Thread(target=join, args=(rank,)) for rank in (0, 1)}
    threads[1 - late].start()
    while not met.n_waiting:
        assert threads[1 - late].is_alive()
    assert contents(folder) == before, "replaced before all have read what was there"
    threads[late].start()
    for thread in threads.values():
        thread.join()
    assert asked == {0: PLAN, 1: PLAN}
    assert seen[0] == seen[1] == contents(folder)
    assert contents(folder).keys() == {PLAN_FILE}


def test_processes_other_than_the_first_write_nothing_when_they_open(tmp_path: Path) -> None:
    alone = Meeting(1, 2, threading.Barrier(1))
    opened(tmp_path / "work", world=alone)
    assert not (tmp_path / "work").exists()
    opened(tmp_path / "work", world=Meeting(0, 2, threading.Barrier(1)))
    kept: dict[str, Tensor] = dict(opened(tmp_path / "work", world=alone).once("layer-000", layer(1)).tensors)
    assert torch.equal(kept["a"], layer(1)().tensors["a"])
