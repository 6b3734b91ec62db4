"""Bundles: what is written is what is loaded, bit for bit; a kill or a full disk leaves the old one or the new one, whole."""

from __future__ import annotations

import errno
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import model_inputs, official_state, randomise, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from mediatorize.compression.records import Distillation, LayerErrors
from mediatorize.diffusion.sampling import sample
from mediatorize.errors import UserError
from mediatorize.formats import bundle
from mediatorize.formats.loading import load_model
from mediatorize.model.levels import SOFTMAX, MediatorSettings
from mediatorize.model.schedule import Schedule
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.report.card import model_card

SETTINGS = MediatorSettings((1, 4), local_rank=3, modulation_rank=2, mlp="own")
SMALL = {"depth": 2, "width": 16, "heads": 2, "mlp_width": 32, "classes": 5, "grid": (2, 3)}
SCHEDULE = Schedule((0.25, 0.5), ((1, 4), (4, SOFTMAX), (1, 1)))


def small_model(seed: int = 0, **changes: Any) -> DiffusionTransformer:
    return tiny_model(SETTINGS, seed, **SMALL | changes)


def config_of(model: DiffusionTransformer) -> bundle.BundleConfig:
    assert model.settings is not None
    source = bundle.Origin(file="model.pt", format="official", weights="ema", sha256=bundle.hash_of_weights(model))
    errors = LayerErrors(0, before={1: 0.5, 4: 0.25}, after={1: 0.125, 4: 0.0625})
    distilled = Distillation({"distill": {"steps": 3, "batch": 2}}, before={1: 0.5, 4: 0.25}, after={1: 0.125, 4: 0.0625})
    return bundle.BundleConfig(model.arch, model.settings, source, (errors,), distilled)


def write(path: Path, model: DiffusionTransformer, *, schedule: Schedule | None = None, card: str = "card") -> Path:
    """A bundle at `path`, prepared beside and committed as conversion does."""
    partial = bundle.partial_folder(path)
    (partial / bundle.WORK_FOLDER).mkdir(parents=True)
    bundle.write_json(partial / bundle.WORK_FOLDER / "plan.json", {})
    bundle.write_bundle(partial, model, config_of(model), card)
    if schedule:
        bundle.write_json(partial / "schedule.json", schedule.to_json())
    bundle.commit(partial, path)
    return path


def assert_same_state(found: DiffusionTransformer, expected: DiffusionTransformer) -> None:
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def randomise_mediators(model: DiffusionTransformer) -> None:
    for layer in model.attention_layers():
        assert layer.mediator is not None
        randomise(layer.mediator, seed=9)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def refusal(path: Path) -> str:
    """What a bundle is refused with, after its path (whose words would match anything)."""
    with pytest.raises(UserError) as caught:
        load_model(path)
    assert str(path) in caught.value.message
    assert caught.value.hint
    return str(caught.value).replace(str(path), "")


# --- round trip ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "changes"),
    [
        ("queries", {}),
        ("keys", {"family": "dit", "frequency_shift": 1, "mlp_norm_eps": 1e-5}),
        ("queries", {"reversed_time": True, "learn_sigma": False}),
    ],
)
def test_bundle_loads_as_it_was_written(tmp_path: Path, space: Any, changes: dict[str, Any]) -> None:
    model = tiny_model(replace(SETTINGS, space=space), **SMALL | changes)
    loaded = load_model(write(tmp_path / "out", model))
    assert_same_state(loaded, model)
    assert (loaded.arch, loaded.settings, loaded.schedule) == (model.arch, model.settings, None)
    inputs = model_inputs(model)
    assert torch.equal(loaded(*inputs, levels=[4, 1]), model(*inputs, levels=[4, 1]))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not any(module.training for module in loaded.modules())


def test_softmax_of_a_bundle_is_the_original_bit_for_bit(tmp_path: Path, official_file: Callable[..., Path]) -> None:
    original = tiny_model()
    converted = load_model(official_file(), family="sit", num_heads=3)
    converted.add_mediators(SETTINGS)
    randomise_mediators(converted)
    loaded = load_model(write(tmp_path / "out", converted))
    inputs = model_inputs(original)
    assert torch.equal(loaded(*inputs), original(*inputs))
    assert not torch.allclose(loaded(*inputs, levels=4), original(*inputs), atol=1e-2)


def test_config_comes_back_as_it_was(tmp_path: Path) -> None:
    model = small_model()
    assert bundle.read_config(write(tmp_path / "out", model)) == config_of(model)


def test_card_can_be_written_again_from_the_config(tmp_path: Path) -> None:
    """Layer errors are per level, and JSON has no whole numbers for keys."""
    model = small_model()
    errors = tuple(LayerErrors(layer, before={1: 0.5, 4: 0.4}, after={1: 0.3, 4: 0.2}) for layer in range(2))
    config = replace(config_of(model), layer_errors=errors)
    bundle.write_bundle(tmp_path, model, config, model_card(config))
    card = (tmp_path / "README.md").read_text()
    assert model_card(bundle.read_config(tmp_path)) == card
    for part in ("its ema weights", "| m=4 |", "| 0.400 | 0.200 |", "3 steps of 2 states", "0.125 at m=1 (before: 0.500)"):
        assert part in card, part


def test_loading_maps_a_bundle_and_never_writes_it(tmp_path: Path) -> None:
    path = write(tmp_path / "out", small_model())
    before = contents(path)
    for parameter in load_model(path).parameters():
        parameter.data.add_(1)
    assert contents(path) == before


def test_a_bundle_is_told_from_other_folders(tmp_path: Path) -> None:
    path = write(tmp_path / "out", small_model())
    assert bundle.is_bundle(path)
    assert not bundle.is_bundle(path / "model.safetensors")
    assert not bundle.is_bundle(tmp_path)
    assert not bundle.is_bundle(tmp_path / "nowhere")
    for text in ("", "[]", "null", '"mediatorize"', '{"format": "other"}'):
        (path / "config.json").write_text(text)
        assert not bundle.is_bundle(path)


def test_bundle_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    monkeypatch.chdir(write(tmp_path / "out", model))
    assert_same_state(load_model("."), model)


# --- replacing and recovering --------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


def test_commit_over_a_bundle_leaves_exactly_the_new_one(tmp_path: Path) -> None:
    path, new = tmp_path / "out", small_model(seed=2)
    write(path, small_model(seed=1), schedule=SCHEDULE, card="old")
    bundle.append_log(path, "convert", {}, {})
    write(path, new, card="new")
    assert contents(path).keys() == {"model.safetensors", "config.json", "README.md"}
    assert (path / "README.md").read_text() == "new"
    assert_same_state(load_model(path), new)
    assert list(tmp_path.iterdir()) == [path]


def kill_at_rename(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    rename, count = Path.rename, iter(range(1, 10))

    def counted(self: Path, target: Path) -> Path:
        if next(count) == number:
            raise Killed
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", counted)


@pytest.mark.parametrize("load", [load_model, bundle.load_bundle])
@pytest.mark.parametrize("number", [1, 2])
def test_kill_at_either_rename_leaves_the_old_bundle_and_can_be_repeated(
    tmp_path: Path, number: int, load: Callable[[Path], DiffusionTransformer]
) -> None:
    path, old, new = tmp_path / "out", small_model(seed=1), small_model(seed=2)
    write(path, old)
    with pytest.MonkeyPatch.context() as patch:
        kill_at_rename(patch, number)
        with pytest.raises(Killed):
            write(path, new)
    assert path.exists() == (number == 1)
    assert_same_state(load(path), old)
    bundle.commit(bundle.partial_folder(path), path)
    assert_same_state(load(path), new)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("killed", [bundle.WORK_FOLDER, "out.replaced"])
def test_kill_before_the_old_bundle_is_deleted_leaves_the_new_one(tmp_path: Path, killed: str) -> None:
    path, new, newer = tmp_path / "out", small_model(seed=2), small_model(seed=3)
    write(path, small_model(seed=1))
    rmtree = shutil.rmtree
    with pytest.MonkeyPatch.context() as patch:

        def kill(folder: Path, ignore_errors: bool = False) -> None:
            if folder.name == killed:
                next(file for file in folder.iterdir()).unlink()
                raise Killed
            rmtree(folder, ignore_errors)

        patch.setattr(shutil, "rmtree", kill)
        with pytest.raises(Killed):
            write(path, new)
    assert_same_state(load_model(path), new)
    write(path, newer)
    assert_same_state(load_model(path), newer)
    assert list(tmp_path.iterdir()) == [path]
    assert contents(path).keys() == {"model.safetensors", "config.json", "README.md"}


def test_recover_changes_nothing_where_nothing_is_wrong(tmp_path: Path) -> None:
    path = write(tmp_path / "out", small_model())
    before = contents(path)
    bundle.recover(path)
    bundle.recover(tmp_path / "nowhere")
    assert contents(path) == before
    assert list(tmp_path.iterdir()) == [path]


# --- failing writes ------------------------------------------------------------------------------------------------------------


def test_failing_write_leaves_the_old_file_and_no_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "out", small_model(seed=1))
    before = contents(path)

    def fail(state: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        save_file(dict(list(state.items())[:3]), file, metadata)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bundle, "save_file", fail)
    model = small_model(seed=2)
    with pytest.raises(OSError, match="No space left"):
        bundle.write_bundle(path, model, config_of(model), "new card")
    assert contents(path) == before


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to let files grow beyond `size` bytes: as near to a full disk as a test can be."""
    resource = pytest.importorskip("resource")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_real_failure_to_write_is_an_error_of_the_system_and_leaves_the_old_file(tmp_path: Path) -> None:
    """safetensors has an exception of its own for it, which the command line would call unexpected."""
    path, model = write(tmp_path / "out", small_model(seed=1)), small_model(seed=2)
    before = contents(path)
    try:
        with largest_file(10_000), pytest.raises((OSError, UserError)):
            bundle.write_bundle(path, model, config_of(model), "new card")
    finally:
        assert contents(path) == before


# --- damage --------------------------------------------------------------------------------------------------------------------


def changed(*keys: str, to: Any) -> Callable[[dict[str, Any]], Any]:
    """Sets one field, however deep."""

    def change(config: dict[str, Any]) -> dict[str, Any]:
        inner = config
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = to
        return config

    return change


def dropped(*keys: str) -> Callable[[dict[str, Any]], Any]:
    def change(config: dict[str, Any]) -> dict[str, Any]:
        inner = config
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        return config

    return change


CONFIG_DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no version": dropped("version"),
    "no architecture": dropped("architecture"),
    "no source": dropped("source"),
    "no grid": dropped("architecture", "grid"),
    "no depth": dropped("architecture", "depth"),
    "no levels": dropped("mediators", "levels"),
    "another field": changed("architecture", "moe_experts", to=8),
    "architecture of text": changed("architecture", to="DiT-XL/2"),
    "architecture is a list": changed("architecture", to=[1]),
    "mediators are null": changed("mediators", to=None),
    "depth of text": changed("architecture", "depth", to="three"),
    "depth of a half": changed("architecture", "depth", to=2.5),
    "width of text": changed("architecture", "width", to="16"),
    "patches of nothing": changed("architecture", "patch", to=0),
    "no tokens": changed("architecture", "grid", to=[0, 3]),
    "one side": changed("architecture", "grid", to=[6]),
    "grid of a number": changed("architecture", "grid", to=6),
    "heads that do not divide": changed("architecture", "heads", to=3),
    "another family": changed("architecture", "family", to="unet"),
    "negative classes": changed("architecture", "classes", to=-3),
    "no channels": changed("architecture", "channels", to=0),
    "levels of text": changed("mediators", "levels", to=["one"]),
    "levels that descend": changed("mediators", "levels", to=[4, 1]),
    "another space": changed("mediators", "space", to="values"),
    "more levels": changed("mediators", "levels", to=[1, 4, 6]),
    "too many mediators": changed("mediators", "levels", to=[1, 4, 100]),
    "another rank": changed("mediators", "local_rank", to=4),
    "deeper": changed("architecture", "depth", to=3),
    "wider": changed("architecture", "mlp_width", to=33),
}


@pytest.mark.parametrize("damage", CONFIG_DAMAGE.values(), ids=CONFIG_DAMAGE.keys())
def test_damaged_config_is_refused(tmp_path: Path, damage: Callable[[dict[str, Any]], Any]) -> None:
    path = write(tmp_path / "out", small_model())
    file = path / "config.json"
    file.write_text(json.dumps(damage(json.loads(file.read_text()))))
    refusal(path)


def test_unknown_version_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = write(tmp_path / "out", small_model())
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 2}))
    message = refusal(path)
    assert "version 2" in message
    assert "Update" in message


@pytest.mark.parametrize("left", [0, 1, 30, 200, -3])
def test_truncated_config_is_refused(tmp_path: Path, left: int) -> None:
    path = write(tmp_path / "out", small_model())
    file = path / "config.json"
    file.write_text(file.read_text()[:left])
    assert "config" in refusal(path)


def test_random_damage_of_a_config_loads_or_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "out", small_model())
    file = path / "config.json"
    content = file.read_bytes()
    rng = random.Random(0)
    outcomes: dict[str, list[tuple[int, int]]] = {}
    for _ in range(120):
        position, value = rng.randrange(len(content)), rng.choice((rng.randrange(256), ord(rng.choice('0123456789.-",e'))))
        file.write_bytes(content[:position] + bytes([value]) + content[position + 1 :])
        try:
            load_model(path)
            result = "loads"
        except UserError:
            result = "refused"
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        outcomes.setdefault(result, []).append((position, value))
    assert outcomes.keys() == {"loads", "refused"}, {key: value for key, value in outcomes.items() if key not in ("loads", "refused")}


POOL = "blocks.1.attn.mediator.levels.4.pool"
STATE_DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "wrong shape": (lambda state: state | {POOL: torch.ones(2, 4, 2, 2)}, POOL),
    "missing": (lambda state: {name: value for name, value in state.items() if name != POOL}, POOL),
    "extra": (lambda state: state | {"blocks.1.attn.mediator.levels.9.pool": torch.ones(2)}, "levels.9.pool"),
    "nan": (lambda state: state | {POOL: torch.full((2, 4, 2, 3), torch.nan)}, POOL),
    "empty": (lambda _: {"nothing": torch.ones(1)}, "missing"),
}


@pytest.mark.parametrize(("damage", "named"), STATE_DAMAGE.values(), ids=STATE_DAMAGE.keys())
def test_weights_that_do_not_fit_the_config_are_refused_by_name(
    tmp_path: Path, damage: Callable[[dict[str, Tensor]], dict[str, Tensor]], named: str
) -> None:
    path = write(tmp_path / "out", small_model())
    state = {name: value.clone() for name, value in load_file(path / "model.safetensors").items()}
    save_file(damage(state), path / "model.safetensors")
    assert named in refusal(path)


def test_missing_or_truncated_weights_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "out", small_model())
    file = path / "model.safetensors"
    content = file.read_bytes()
    for left in (0, 5, 300, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:left])
        assert re.search("truncated|empty", refusal(path))
    file.unlink()
    assert "no model.safetensors" in refusal(path)


# --- schedule ------------------------------------------------------------------------------------------------------------------


def test_schedule_is_read_and_used(tmp_path: Path) -> None:
    model = small_model()
    loaded = load_model(write(tmp_path / "out", model, schedule=SCHEDULE))
    assert loaded.schedule == SCHEDULE
    assert [loaded.schedule.at(noise) for noise in (0, 0.2, 0.3, 0.9)] == [(1, 4), (1, 4), (4, SOFTMAX), (1, 1)]
    by_default, told, softmax = (sample(m, [1, 2], steps=3, schedule=s) for m, s in ((loaded, None), (model, SCHEDULE), (model, SOFTMAX)))
    assert torch.equal(by_default, told)
    assert not torch.allclose(by_default, softmax, atol=1e-3)


@pytest.mark.parametrize("depth", [1, 3])
def test_schedule_of_another_depth_is_refused(tmp_path: Path, depth: int) -> None:
    path = write(tmp_path / "out", small_model(), schedule=Schedule((), ((1,) * depth,)))
    assert f"{depth} layers" in refusal(path)


def test_schedule_of_levels_that_the_model_has_not_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "out", small_model(), schedule=Schedule((), ((1, 16),)))
    assert "16" in refusal(path)


PIECE = {"noise_from": 0.0, "noise_to": 1.0, "levels": [1, 4]}


SCHEDULE_DAMAGE = {
    "empty": "",
    "cut off": '{"pieces": [{"noise_',
    "no UTF-8": "\udcff",
    "null": "null",
    "list": "[]",
    "no pieces": "{}",
    "zero pieces": json.dumps({"pieces": []}),
    "pieces by name": json.dumps({"pieces": {}}),
    "piece of a number": json.dumps({"pieces": [1]}),
    "levels of text": json.dumps({"pieces": [PIECE | {"levels": "softmax"}]}),
    "levels of lists": json.dumps({"pieces": [PIECE | {"levels": [[1], [4]]}]}),
    "half a mediator": json.dumps({"pieces": [PIECE | {"levels": [1, 0.5]}]}),
    "two pieces at once": json.dumps({"pieces": [PIECE, PIECE]}),
    "edge of text": json.dumps({"pieces": [PIECE, PIECE | {"noise_from": "half"}]}),
    "piece of fewer layers": json.dumps({"pieces": [PIECE, PIECE | {"noise_from": 0.5, "levels": [1]}]}),
    "nothing from 0": json.dumps({"pieces": [PIECE | {"noise_from": 0.5}]}),
    "a gap": json.dumps({"pieces": [PIECE | {"noise_to": 0.3}, PIECE | {"noise_from": 0.5}]}),
}


@pytest.mark.parametrize("content", SCHEDULE_DAMAGE.values(), ids=SCHEDULE_DAMAGE.keys())
def test_damaged_schedule_is_refused(tmp_path: Path, content: str) -> None:
    path = write(tmp_path / "out", small_model())
    (path / "schedule.json").write_bytes(content.encode(errors="surrogateescape"))
    assert "schedule.json" in refusal(path)


# --- hash ----------------------------------------------------------------------------------------------------------------------


def test_hash_is_of_the_weights_whatever_they_are_stored_in(tmp_path: Path, official_file: Callable[..., Path]) -> None:
    model = tiny_model()
    state = official_state(model)
    save_file(state, tmp_path / "model.safetensors")
    wrapped = {f"module.{name}": value for name, value in state.items()}
    torch.save({"ema": wrapped, "model": official_state(tiny_model(seed=1))}, tmp_path / "training.pt")
    files = official_file(), tmp_path / "model.safetensors", tmp_path / "training.pt"
    from_files = [load_model(path, family="sit", num_heads=3) for path in files]
    converted = tiny_model()
    converted.add_mediators(SETTINGS)
    hashes = {bundle.hash_of_weights(one) for one in (model, *from_files, converted, load_model(write(tmp_path / "out", converted)))}
    assert len(hashes) == 1
    assert len(hashes.pop()) == 64


@pytest.mark.parametrize("name", ["pos_embed", "blocks.1.attn.qkv.weight", "final_layer.linear.bias"])
def test_hash_changes_with_any_weight(name: str) -> None:
    model = small_model()
    before = bundle.hash_of_weights(model)
    weight = model.state_dict()[name].view(-1)
    weight[-1] = torch.nextafter(weight[-1], torch.tensor(9.0))
    assert bundle.hash_of_weights(model) != before


def test_hash_ignores_mediators() -> None:
    model = small_model()
    before = bundle.hash_of_weights(model)
    randomise_mediators(model)
    assert bundle.hash_of_weights(model) == before


# --- log and work --------------------------------------------------------------------------------------------------------------


def test_log_grows_by_a_line(tmp_path: Path) -> None:
    bundle.append_log(tmp_path, "convert", {"out": Path("here"), "levels": (1, 4)}, {"seconds": 1.5})
    first = (tmp_path / "log.jsonl").read_text()
    bundle.append_log(tmp_path, "calibrate", {"budget": 0.75}, {})
    text = (tmp_path / "log.jsonl").read_text()
    assert text.startswith(first)
    entries = [json.loads(line) for line in text.splitlines()]
    assert [entry["command"] for entry in entries] == ["convert", "calibrate"]
    assert entries[0]["arguments"] == {"out": "here", "levels": [1, 4]}
    assert entries[0]["result"] == {"seconds": 1.5}
    assert entries[1]["versions"]["torch"] == torch.__version__


def test_failing_log_keeps_the_lines_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle.append_log(tmp_path, "convert", {}, {})
    before = contents(tmp_path)

    def fail(self: Path, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="No space left"):
        bundle.append_log(tmp_path, "calibrate", {}, {})
    assert contents(tmp_path) == before


def test_commit_drops_what_is_kept_of_the_work(tmp_path: Path) -> None:
    partial, path = tmp_path / "partial", tmp_path / "out"
    (partial / bundle.WORK_FOLDER).mkdir(parents=True)
    bundle.write_tensors(partial / bundle.WORK_FOLDER / "layer-000.safetensors", {"a": torch.ones(2)})
    (partial / "README.md").write_text("kept")
    bundle.commit(partial, path)
    assert [file.name for file in path.iterdir()] == ["README.md"]
    assert list(tmp_path.iterdir()) == [path]
