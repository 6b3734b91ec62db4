"""Conversion: fitted layers, the same result after a kill, nothing half-written, nothing overwritten."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import as_options, in_two_processes, model_inputs, tiny_model

from mediatorize import DiffusionTransformer, UserError, load_model
from mediatorize.compression import fit
from mediatorize.compression.conversion import JUDGED_STATES, STATES_PER_TRAJECTORY, convert_model
from mediatorize.compression.fit import fit_layers
from mediatorize.compression.initialise import CLUSTER_STATES, INITIALISERS
from mediatorize.compression.records import FitSettings
from mediatorize.compression.trajectories import States, teacher_states
from mediatorize.devices import World
from mediatorize.diffusion.sampling import Sampler
from mediatorize.formats import bundle
from mediatorize.model.levels import MediatorSettings
from mediatorize.report.conversion import facts, words
from mediatorize.stages.convert import convert
from mediatorize.stages.running import process_bytes
from mediatorize.store import InMemory

TEACHER = Path(__file__).parent.parent / "recipes" / "digits" / "sit.safetensors"
QUICK: dict[str, Any] = {
    "levels": (1, 4),
    "states": 48,
    "trajectories": 4,
    "fit_steps": 4,
    "batch": 8,
    "sampler_steps": 4,
    "device": "cpu",
    "family": "sit",
    "num_heads": 3,
}


FILES = ["README.md", "config.json", "log.jsonl", "model.safetensors"]
"""Of a bundle that was converted."""


def state_of(path: Path) -> dict[str, torch.Tensor]:
    return load_model(path).state_dict()


def states_of(model: DiffusionTransformer, count: int, steps: int, cfg_scale: float = 1.0, trajectories: int = 8) -> States:
    """States of the model's own trajectories."""
    sampler = Sampler.resolve(model.arch, steps=steps, cfg_scale=cfg_scale)
    return teacher_states(model, count, sampler, trajectories=trajectories)


def assert_same_state(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("space", ["queries", "keys"])
def test_fitting_lowers_the_error_of_every_layer_and_level(space: Any) -> None:
    model = load_model(TEACHER)
    states = states_of(model, 64, steps=8)
    model.add_mediators(MediatorSettings((1, 4), space=space, local_rank=8))
    reports = list(fit_layers(model, states, INITIALISERS["pool"], FitSettings(steps=80, batch=8)))
    assert [report.layer for report in reports] == [0, 1, 2, 3, 4, 5]
    for report in reports:
        for level in (1, 4):
            assert 0 < report.after[level] < 0.85 * report.before[level]


def test_fitting_leaves_the_pretrained_weights_alone() -> None:
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = states_of(model, 48, steps=4)
    model.add_mediators(MediatorSettings((4,)))
    list(fit_layers(model, states, INITIALISERS["pool"], FitSettings(steps=3, batch=8)))
    after = model.state_dict()
    assert_same_state(before, {name: after[name] for name in before})
    changed = [
        name for name in after if ".mediator.qkv.weight" in name and not torch.equal(after[name], after[name.replace(".mediator", "")])
    ]
    assert len(changed) == 3


@pytest.mark.parametrize("init", INITIALISERS)
def test_every_initialiser_gives_weights_of_a_mean(init: str) -> None:
    model = tiny_model(MediatorSettings((5,)), grid=(4, 6))
    inputs = torch.randn(12, 24, 48, generator=torch.Generator().manual_seed(0))
    pool = INITIALISERS[init](model.attention_layers()[0], inputs, 5, 3)
    assert pool.shape == (3, 5, 4, 6)
    assert (pool >= 0).all()
    torch.testing.assert_close(pool.sum((2, 3)), torch.ones(3, 5))


@pytest.mark.parametrize("init", ["cluster-keys", "cluster-queries"])
def test_clusters_group_positions_that_attend_alike(init: str) -> None:
    model = tiny_model(MediatorSettings((2,)))
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 10, 1, 48, generator=generator)
    is_left = torch.tensor([column < 2 for _ in range(4) for column in range(4)])
    inputs = torch.where(is_left.view(1, 16, 1), left, right) + 0.01 * torch.randn(10, 16, 48, generator=generator)
    pool = INITIALISERS[init](model.attention_layers()[0], inputs, 2, 0).flatten(2)
    for head in pool:
        sides = {tuple((mediator > 0).tolist()) for mediator in head}
        assert sides == {tuple(is_left.tolist()), tuple((~is_left).tolist())}


def test_states_come_evenly_from_the_trajectories_and_half_are_unconditional() -> None:
    states = states_of(tiny_model(), 64, steps=8, cfg_scale=2.0)
    assert states.t.unique(return_counts=True)[1].tolist() == [8] * 8
    assert 16 <= int((states.y == 10).sum()) <= 48
    again = states_of(tiny_model(), 64, steps=8, cfg_scale=2.0)
    assert torch.equal(states.x, again.x)
    unguided = states_of(tiny_model(null_class=False), 64, steps=8)
    assert int(unguided.y.max()) < 10


@pytest.mark.parametrize("family", ["dit", "sit"])
def test_level_softmax_of_a_bundle_is_the_checkpoint_bit_for_bit(family: Any, official_file: Callable[..., Path], tmp_path: Path) -> None:
    source = official_file(family=family)
    convert(str(source), tmp_path / "out", **(QUICK | {"family": family}))
    before, after = load_model(source, family=family, num_heads=3), load_model(tmp_path / "out")
    inputs = model_inputs(before)
    assert torch.equal(before(*inputs), after(*inputs))
    assert not torch.allclose(before(*inputs), after(*inputs, levels=1), atol=1e-3)


def test_the_same_command_gives_the_same_bundle(official_file: Callable[..., Path], tmp_path: Path) -> None:
    source = official_file()
    for name in ("one", "two"):
        convert(str(source), tmp_path / name, **QUICK)
    assert_same_state(state_of(tmp_path / "one"), state_of(tmp_path / "two"))


def test_a_killed_conversion_goes_on_to_the_same_weights(official_file: Callable[..., Path], tmp_path: Path) -> None:
    source = official_file()
    convert(str(source), tmp_path / "unbroken", **QUICK)
    slow_down = "import mediatorize.compression.fit as f, time; old = f.regress; f.regress = lambda *a: (old(*a), time.sleep(1))"
    program = f"{slow_down}; import sys; sys.argv = ['mediatorize', 'convert', *sys.argv[1:]]; from mediatorize.cli import main; main()"
    command = [sys.executable, "-c", program, str(source), str(tmp_path / "broken"), *as_options(QUICK)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    first_layer = tmp_path / "broken.partial" / bundle.WORK_FOLDER / "layer-000.safetensors"
    deadline = time.monotonic() + 120
    while not first_layer.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert first_layer.exists()
    assert not (tmp_path / "broken").exists()

    result = convert(str(source), tmp_path / "broken", **QUICK)
    assert 1 <= result.resumed_layers < 3
    assert_same_state(state_of(tmp_path / "unbroken"), state_of(tmp_path / "broken"))
    assert sorted(file.name for file in (tmp_path / "broken").iterdir()) == FILES
    assert not (tmp_path / "broken.partial").exists()


def test_two_processes_convert_as_one_does(official_file: Callable[..., Path], tmp_path: Path) -> None:
    """Each draws some of the trajectories and fits some of the layers; sums over batches of other sizes differ in their last bits."""
    source = official_file()
    convert(str(source), tmp_path / "alone", cfg_scale=2.0, **QUICK)
    printed = in_two_processes("convert", source, tmp_path / "two", cfg_scale=2.0, **QUICK)
    assert printed.count("Wrote") == 1
    alone, two = state_of(tmp_path / "alone"), state_of(tmp_path / "two")
    for name, value in alone.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert sorted(file.name for file in (tmp_path / "two").iterdir()) == FILES


def test_more_processes_than_trajectories_are_refused(official_file: Callable[..., Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("mediatorize.devices.processes", lambda device: nullcontext(World(0, 8, device)))
    with pytest.raises(UserError, match=r"8 processes cannot share 4 trajectories.*--trajectories"):
        convert(str(official_file()), tmp_path / "out", **QUICK)


def test_a_full_disk_in_mid_save_leaves_no_bundle_and_resumes(
    official_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = official_file()
    real = bundle.save_file

    def full(state: Any, path: Path, metadata: Any = None) -> None:
        if "model" in path.name:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))
        real(state, path, metadata)

    monkeypatch.setattr(bundle, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        convert(str(source), tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.partial").glob("*model*"))
    monkeypatch.undo()
    assert convert(str(source), tmp_path / "out", **QUICK).resumed_layers == 3


def test_an_unfinished_conversion_with_other_settings_is_refused(
    official_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = official_file()
    monkeypatch.setattr(bundle, "write_bundle", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert(str(source), tmp_path / "out", **QUICK)
    monkeypatch.undo()
    with pytest.raises(UserError, match="unfinished conversion with other settings"):
        convert(str(source), tmp_path / "out", **(QUICK | {"seed": 1}))
    assert convert(str(source), tmp_path / "out", **(QUICK | {"seed": 1}), force=True).resumed_layers == 0


def test_what_is_there_is_replaced_only_by_force(official_file: Callable[..., Path], tmp_path: Path) -> None:
    source = official_file()
    convert(str(source), tmp_path / "out", **QUICK)
    with pytest.raises(UserError, match="exists"):
        convert(str(source), tmp_path / "out", **QUICK)
    convert(str(source), tmp_path / "out", **(QUICK | {"levels": (2,)}), force=True)
    assert bundle.read_config(tmp_path / "out").settings.levels == (2,)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "out"]


def test_without_fitting_it_says_so_and_keeps_the_initial_errors(official_file: Callable[..., Path], tmp_path: Path) -> None:
    result = convert(str(official_file()), tmp_path / "out", **(QUICK | {"fit_steps": 0}))
    assert "Not fitted" in words(result)
    assert all(errors.before == errors.after for errors in result.errors)
    assert all(error > 0 for errors in result.errors for error in errors.before.values())
    state = state_of(tmp_path / "out")
    assert torch.equal(state["blocks.1.attn.mediator.qkv.bias"], state["blocks.1.attn.qkv.bias"])
    assert state["blocks.1.attn.mediator.qkv.down"].any() and not state["blocks.1.attn.mediator.qkv.up"].any()  # no change yet


@pytest.mark.parametrize("init", INITIALISERS)
def test_without_fitting_the_teacher_is_sampled_no_more_than_is_looked_at(
    init: str, official_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    forward = DiffusionTransformer.forward

    def counted(self: DiffusionTransformer, x: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        rows.append(len(x))
        return forward(self, x, *arguments, **named)

    monkeypatch.setattr(DiffusionTransformer, "forward", counted)
    many = QUICK | {"states": 1024, "trajectories": 32, "fit_steps": 0, "init": init}
    source = str(official_file())
    planned = convert(source, tmp_path / "out", **many, dry_run=True)
    assert not rows
    result = convert(source, tmp_path / "out", **many)
    taken = JUDGED_STATES + CLUSTER_STATES  # narrow MLPs look at as many as clusters do
    assert planned.plan == result.plan
    assert result.plan.states == taken
    assert f"Would take {taken} states" in words(planned)
    assert f"without fitting, {taken} states are enough" in words(planned)
    assert len(rows) == result.plan.calls()
    per_pass = 4 * 2 * -(-taken // STATES_PER_TRAJECTORY)  # calls, halves of a guided batch, samples
    assert sum(rows) == per_pass * -(-taken // per_pass) < 100 < 1024
    few = convert(source, tmp_path / "few", **(many | {"states": 16}))
    assert few.plan.states == 16
    assert "are enough" not in words(few)


def test_nothing_converted_is_said(official_file: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Nothing was converted"):
        convert(str(official_file()), tmp_path / "out", **(QUICK | {"levels": (16,)}))
    convert(str(official_file()), tmp_path / "out", **QUICK)
    with pytest.raises(UserError, match="is a bundle already; nothing was converted"):
        convert(str(tmp_path / "out"), tmp_path / "again", **QUICK)
    assert not (tmp_path / "again").exists()


def test_a_dry_run_writes_nothing_and_counts_what_would_be_added(official_file: Callable[..., Path], tmp_path: Path) -> None:
    source = official_file()
    planned = convert(str(source), tmp_path / "out", **QUICK, dry_run=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt"]
    convert(str(source), tmp_path / "out", **QUICK)
    added = sum(value.numel() for name, value in state_of(tmp_path / "out").items() if ".mediator." in name)
    assert planned.plan.added_parameters() == added
    assert planned.estimated_seconds is not None and planned.estimated_bytes == facts(planned)["estimated_bytes"]
    assert process_bytes(planned.plan.peak_bytes(), torch.device("cuda")) == planned.plan.peak_bytes() < (planned.estimated_bytes or 0)
    assert "would be written" in words(planned)
    assert facts(planned)["dry_run"]


def test_the_log_tells_what_was_done(official_file: Callable[..., Path], tmp_path: Path) -> None:
    convert(str(official_file()), tmp_path / "out", **QUICK)
    (line,) = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert entry["command"] == "convert"
    assert entry["arguments"]["fit"] == {"steps": 4, "batch": 8, "learning_rate": 3e-3, "seed": 0}
    assert entry["arguments"]["weights"] == bundle.hash_of_weights(load_model(tmp_path / "out"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": (0, 4)}, "0 is no level"),
        ({"levels": ("softmax", 4)}, "not distinct, ascending counts"),
        ({"levels": (4, 17)}, "do not fit 16 positions"),
        ({"solver": "ddim"}, "not one for a SIT"),
        ({"fit_steps": -1}, "--fit-steps -1 is too small"),
        ({"solver": "dopri5"}, "as many steps as it needs"),
        ({"states": 3}, "--states 3 is too small"),
        ({"local_rank": -1}, "is negative"),
    ],
)
def test_bad_plans_are_refused_before_any_work(
    change: dict[str, Any], message: str, official_file: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        convert(str(official_file()), tmp_path / "out", **(QUICK | change))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt"]


def test_guidance_without_a_null_class_is_refused(official_file: Callable[..., Path], tmp_path: Path) -> None:
    """The default guides: such a model is told to pass --cfg-scale 1."""
    source = str(official_file(null_class=False))
    options = QUICK | {"num_classes": 10}
    with pytest.raises(UserError, match=r"no null class.*--cfg-scale 1\."):
        convert(source, tmp_path / "out", **options)
    assert not (tmp_path / "out.partial").exists()
    assert convert(source, tmp_path / "out", **options, cfg_scale=1.0).plan.sampler.rows == 1
    assert load_model(tmp_path / "out").added().levels == (1, 4)


def test_force_replaces_bundles_only(official_file: Callable[..., Path], tmp_path: Path) -> None:
    source, precious = official_file(), tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("mine")
    for out in (precious, source):
        with pytest.raises(UserError, match="exists and is not a bundle"):
            convert(str(source), out, **QUICK, force=True)
    assert (precious / "thesis.txt").read_text() == "mine"


def test_a_kill_between_the_last_file_and_the_rename_keeps_the_fitted_layers(
    official_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = official_file()
    monkeypatch.setattr(bundle, "commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert(str(source), tmp_path / "out", **QUICK)
    monkeypatch.undo()
    assert convert(str(source), tmp_path / "out", **QUICK).resumed_layers == 3
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 1


def test_a_partial_folder_without_a_plan_is_begun_anew(official_file: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "layer-000.safetensors").write_text("of an older version")
    assert convert(str(official_file()), tmp_path / "out", **QUICK).resumed_layers == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == FILES


def test_a_block_whose_gate_is_shut_is_fitted_to_finite_weights() -> None:
    model = tiny_model()
    block = model.layers()[0]
    for parameter in block.adaLN_modulation.parameters():
        parameter.data.zero_()
    states = states_of(model, 48, steps=4)
    model.add_mediators(MediatorSettings((4,)))
    list(fit_layers(model, states, INITIALISERS["pool"], FitSettings(steps=3, batch=8)))
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_divergence_is_said_and_nothing_is_written(official_file: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Fitting layer 0 diverged"):
        convert(str(official_file()), tmp_path / "out", **(QUICK | {"learning_rate": 1e30}))
    assert not (tmp_path / "out").exists()


def test_any_seed_will_do(official_file: Callable[..., Path], tmp_path: Path) -> None:
    convert(str(official_file()), tmp_path / "out", **(QUICK | {"seed": 2**31}))
    model = load_model(tmp_path / "out")
    assert model.added().levels == (1, 4)
    assert not torch.equal(model(*model_inputs(model), levels=1), model(*model_inputs(model), levels=4))


# --- as a library --------------------------------------------------------------------------------------------------------------


def test_a_model_is_converted_without_a_folder_to_the_same_weights(official_file: Callable[..., Path], tmp_path: Path) -> None:
    source = official_file()
    told = convert(str(source), tmp_path / "out", **QUICK)
    model = load_model(source, family="sit", num_heads=3)
    states = states_of(model, 48, steps=4, cfg_scale=1.5, trajectories=4)
    settings = bundle.read_config(tmp_path / "out").settings
    errors = convert_model(model, states, settings, fit=FitSettings(steps=4, batch=8), store=InMemory())
    assert tuple(errors) == told.errors == bundle.read_config(tmp_path / "out").layer_errors
    assert_same_state(model.state_dict(), state_of(tmp_path / "out"))


def test_a_store_gives_back_what_was_fitted_and_errors_fall(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, fitting = MediatorSettings((1, 4), local_rank=8), FitSettings(steps=60, batch=8)
    first, second, third = tiny_model(), tiny_model(), tiny_model()
    states, store, steps = states_of(first, 64, steps=4), InMemory(), []
    errors = convert_model(first, states, settings, init="pool", fit=fitting, store=store, on_step=lambda: steps.append(1))
    assert len(steps) == 3 * 60
    for layer in errors:
        for level in settings.levels:
            assert 0 < layer.after[level] < layer.before[level]
    fitted = {name: value.clone() for name, value in first.state_dict().items()}
    for parameter in first.parameters():
        parameter.data.zero_()  # what is done to a model later does not reach the store
    monkeypatch.setattr(fit, "regress", lambda *_: pytest.fail("fitted again"))
    assert convert_model(second, states, settings, init="pool", fit=fitting, store=store) == errors
    assert_same_state(fitted, second.state_dict())
    monkeypatch.undo()
    assert convert_model(third, states, settings, init="pool", fit=fitting) == errors
    assert_same_state(fitted, third.state_dict())
