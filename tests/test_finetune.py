"""Distillation: what a step computes, the same weights after a kill and over several processes, softmax left as it is."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.optim
import torch
from conftest import official_state, tiny_model
from torch import nn

from mediatorize import UserError, load_model, sample
from mediatorize.compression import muon
from mediatorize.compression.distill import (
    Distiller,
    DistillSettings,
    distillation_loss,
    forward_with_features,
    levels_of_step,
    mean_squares,
    output_errors,
    saved_bytes,
)
from mediatorize.compression.trajectories import Targets, data_targets, teacher_targets
from mediatorize.formats import bundle
from mediatorize.formats.latents import open_data
from mediatorize.model.architecture import SOFTMAX, MediatorSettings
from mediatorize.model.transformer import DiffusionTransformer, is_mediator
from mediatorize.stages.convert import convert
from mediatorize.stages.finetune import Plan, batch_rows, finetune

SETTINGS = MediatorSettings((1, 4), local_rank=12, modulation_rank=12, mlp="own")
QUICK: dict[str, Any] = {
    "train_steps": 80,
    "batch": 6,
    "trajectories": 4,
    "renoised": 1,
    "steps": 3,
    "save_every": 20,
    "device": "cpu",
    "cfg_scales": (1.0, 1.5),
}


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    """A small bundle of a tiny random SiT."""
    torch.save(official_state(tiny_model()), tmp_path / "model.pt")
    plan: dict[str, Any] = {"states": 24, "trajectories": 4, "fit_steps": 2, "batch": 8, "steps": 3, "device": "cpu"}
    convert(str(tmp_path / "model.pt"), tmp_path / "bundle", levels=(1, 4), family="sit", num_heads=3, **plan)
    return tmp_path / "bundle"


def targets(model: DiffusionTransformer, samples: int = 4, cfg_scale: float = 1.5, **options: Any) -> Targets:
    return teacher_targets(model, torch.arange(samples) % 10, steps=3, cfg_scale=cfg_scale, **options)[0]


def state_of(path: Path) -> dict[str, torch.Tensor]:
    return load_model(path).state_dict()


def assert_same_state(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], atol: float = 0.0) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=atol, msg=name)


# --- states --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["dit", "sit"])
def test_targets_are_what_the_teacher_answers(family: Any) -> None:
    model = tiny_model(SETTINGS, family=family)
    states = targets(model)
    assert len(states) == 4 * 3 * 2
    assert (states.y == model.arch.classes).sum() == 12
    torch.testing.assert_close(model(states.x, states.t, states.y), states.output, rtol=1e-5, atol=1e-5)


def test_targets_of_parts_join_to_those_of_all_samples() -> None:
    model = tiny_model()
    whole, first = targets(model, 5), targets(model, 2)
    rest, _ = teacher_targets(model, torch.arange(2, 5), steps=3, cfg_scale=1.5, first_index=2)
    for name in ("x", "t", "y", "output"):
        value = getattr(whole, name)
        torch.testing.assert_close(torch.cat([getattr(first, name), getattr(rest, name)]), value, rtol=1e-4, atol=1e-5)


def test_finished_samples_are_what_the_sampler_gives() -> None:
    model = tiny_model()
    labels = torch.arange(4)
    _, finished = teacher_targets(model, labels, steps=3, cfg_scale=1.5, seed=7)
    torch.testing.assert_close(finished.x, sample(model, labels, steps=3, cfg_scale=1.5, seed=7))
    again = data_targets(model, finished, 40, cfg_scale=1.5, seed=1)
    assert (again.y == model.arch.classes).sum() == 20
    torch.testing.assert_close(model(again.x, again.t, again.y), again.output, rtol=1e-5, atol=1e-5)


def test_every_state_of_a_round_is_used_equally_often() -> None:
    rows = torch.cat([batch_rows(10, 4, seed=0, round_index=3, step=step) for step in range(5)])
    assert rows.bincount(minlength=10).tolist() == [2] * 10
    assert sorted(rows[:10].tolist()) == list(range(10))
    assert rows[:10].tolist() != rows[10:].tolist()


def test_rounds_cover_every_step_once() -> None:
    arch = tiny_model().arch
    plan = Plan(DistillSettings(steps=23, batch=6), 4, 1, 0, "euler", 3, (1.0, 1.5), 3, "float32")
    rounds = list(plan.rounds(arch))
    assert [step for span in rounds for step in span] == list(range(23))
    assert [len(span) for span in rounds] == [2, 4, 2, 4, 2, 4, 2, 3]


# --- a step --------------------------------------------------------------------------------------------------------------------


def test_levels_of_steps_hold_both_ends_and_mixtures() -> None:
    drawn = [levels_of_step((1, 4, 16), 5, seed=0, step=step) for step in range(400)]
    assert drawn[0::4] == [[1] * 5] * 100
    assert drawn[1::4] == [[16] * 5] * 100
    assert all(len(set(levels)) == 1 for levels in drawn[2::4])
    assert {levels[0] for levels in drawn[2::4]} == {1, 4, 16}
    assert any(set(levels) == {1, 4, 16, SOFTMAX} for levels in drawn[3::4])
    assert all(set(levels_of_step((2,), 1, seed=0, step=step)) == {2} for step in range(40))
    assert drawn == [levels_of_step((1, 4, 16), 5, seed=0, step=step) for step in range(400)]


def test_the_forward_with_features_is_the_models_own() -> None:
    model = tiny_model(SETTINGS)
    states = targets(model)
    levels = [1, SOFTMAX, 4]
    for checkpointing in (False, True):
        output, features = forward_with_features(model, states.x, states.t, states.y, levels, checkpointing)
        assert torch.equal(output, model(states.x, states.t, states.y, levels=levels))
        assert len(features) == 3


def test_the_loss_is_nought_at_softmax_and_one_for_an_answer_of_nought() -> None:
    model = tiny_model(SETTINGS, family="dit")
    states = targets(model)
    sizes = mean_squares(states.output, 4)
    settings = DistillSettings(feature_weight=1.0)
    assert float(distillation_loss(model, model, states, sizes, [SOFTMAX] * 3, settings)) < 1e-9
    for parameter in model.final_layer.linear.parameters():
        parameter.zero_()
    plain = distillation_loss(model, model, states, sizes, [SOFTMAX] * 3, DistillSettings())
    assert float(plain) == pytest.approx(2.0, rel=1e-5)  # one each for the prediction and the variance rows


@pytest.mark.parametrize("changes", [{"accumulate": 3}, {"checkpointing": True}])
def test_saving_memory_changes_a_step_by_rounding_only(changes: dict[str, Any]) -> None:
    results = []
    for settings in (DistillSettings(steps=4), DistillSettings(steps=4, **changes)):
        model = tiny_model(SETTINGS)
        states = targets(model)
        distiller = Distiller(model, model, settings)
        distiller.step(states, mean_squares(states.output, 4))
        results.append(torch.cat([p.grad.flatten() for p in distiller.parameters.values() if p.grad is not None]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_a_states_error_counts_by_its_weight() -> None:
    model = tiny_model(SETTINGS)
    states = targets(model, 2)
    sizes = mean_squares(states.output, 4)
    weight = torch.rand(len(states), generator=torch.Generator().manual_seed(0))

    def loss(part: Targets) -> torch.Tensor:
        return distillation_loss(model, model, part, sizes, [4] * 3, DistillSettings())

    alone = torch.stack([loss(states.at(torch.tensor([index]))) for index in range(len(states))])
    torch.testing.assert_close(loss(replace(states, weight=weight)), (alone * weight).mean())
    torch.testing.assert_close(loss(states), alone.mean())


@pytest.mark.parametrize("stacked", [1, 2**20])
def test_stacked_matrices_step_as_timms_muon_steps_them_one_by_one(stacked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "STACKED_NUMBERS", stacked)
    shapes = [(12, 32), (12, 32), (48, 16), (24, 24), (12, 32)]
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    mine, theirs = ([nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
    optimizers = muon.StackedMuon(mine, 0.02), timm.optim.Muon(theirs, 0.02, nesterov=True, ns_steps=3)
    for _ in range(3):
        for own, other in zip(mine[:-1], theirs[:-1], strict=True):  # the last has no gradient
            own.grad = other.grad = torch.randn(own.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()
    for own, other, before in zip(mine, theirs, start, strict=True):
        assert (own - other).norm().item() <= 0.01 * (other - before).norm().item()  # iterations are in bfloat16
    assert torch.equal(mine[-1], start[-1]) and not torch.equal(mine[0], start[0])


def test_averaged_weights_are_what_is_kept() -> None:
    model = tiny_model(SETTINGS)
    states = targets(model)
    distiller = Distiller(model, model, DistillSettings(steps=6, ema=0.5))
    name = "blocks.0.attn.mediator.qkv.weight"
    parameter = distiller.parameters[name]
    expected = parameter.clone()
    for step in range(6):
        distiller.step(states, mean_squares(states.output, 4))
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * parameter
    last = parameter.clone()
    distiller.finish()
    assert not torch.equal(last, parameter)
    torch.testing.assert_close(parameter.data, expected.data, rtol=0.2, atol=1e-4)


def test_saved_bytes_are_those_that_autograd_keeps() -> None:
    arch, settings = tiny_model().arch, DistillSettings()
    model = tiny_model(SETTINGS)
    for parameter in model.mediator_parameters().values():
        parameter.requires_grad_(True)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    states = targets(model, 2)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = distillation_loss(model, model, states, mean_squares(states.output, 4), [4] * 3, settings)
    assert loss.requires_grad
    predicted = saved_bytes(arch, SETTINGS, settings, len(states))
    assert sum(kept.values()) == pytest.approx(predicted, rel=0.1)
    assert saved_bytes(arch, SETTINGS, DistillSettings(checkpointing=True), len(states)) < predicted / 3


# --- the stage -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["dit", "sit"])
def test_training_lowers_the_error_of_every_level_and_keeps_softmax(family: Any, tmp_path: Path) -> None:
    torch.save(official_state(tiny_model(family=family)), tmp_path / "model.pt")
    plan: dict[str, Any] = {"states": 24, "trajectories": 4, "fit_steps": 2, "batch": 8, "steps": 3, "device": "cpu"}
    out = tmp_path / "bundle"
    convert(str(tmp_path / "model.pt"), out, levels=(1, 4), family=family, num_heads=3, **plan)
    before = {name: value.clone() for name, value in state_of(out).items()}
    report = finetune(out, **QUICK)
    assert report.before is not None and report.after is not None
    for level in (1, 4):
        assert report.after[level] < 0.8 * report.before[level]
    after = state_of(out)
    pretrained = {name for name in before if not is_mediator(name)}
    assert_same_state({name: before[name] for name in pretrained}, {name: after[name] for name in pretrained})
    changed = [name for name in before if is_mediator(name) and not torch.equal(before[name], after[name])]
    assert {part for name in changed for part in ("mediator.modulation", "mediator.mlp", "attn.mediator") if part in name} == {
        "mediator.modulation",
        "mediator.mlp",
        "attn.mediator",
    }
    model = load_model(out)
    states = targets(model, 8, cfg_scale=1.0, seed=99)
    assert output_errors(model, states, 8).keys() == {1, 4}
    assert bundle.read_config(out).finetuned is not None
    lines = [json.loads(line) for line in (out / "finetune.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 40, 60, 80]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert not bundle.beside(out, "finetune").exists()
    assert not (out / bundle.TRAINING_FILE).exists()
    assert [json.loads(line)["command"] for line in (out / "log.jsonl").read_text().splitlines()] == ["convert", "finetune"]


def as_options(arguments: dict[str, Any]) -> list[str]:
    texts = {name: ",".join(map(str, value)) if isinstance(value, tuple) else value for name, value in arguments.items()}
    return [f"--{name.replace('_', '-')}={value}" for name, value in texts.items()]


def test_a_killed_training_goes_on_to_the_same_weights(converted: Path, tmp_path: Path) -> None:
    unbroken = tmp_path / "unbroken"
    shutil.copytree(converted, unbroken)
    finetune(unbroken, **QUICK, ema=0.9)
    state_file = bundle.beside(converted, "finetune") / bundle.TRAINING_FILE
    command = [
        sys.executable,
        "-c",
        "from mediatorize.cli import main; main()",
        "finetune",
        str(converted),
        *as_options(QUICK),
        "--ema=0.9",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not state_file.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state_file.exists()
    report = finetune(converted, **QUICK, ema=0.9)
    assert 0 < report.resumed_at < 80
    assert_same_state(state_of(unbroken), state_of(converted))
    steps = [json.loads(line)["step"] for line in (converted / "finetune.jsonl").read_text().splitlines()]
    assert steps == [20, 40, 60, 80]


def test_weighing_errors_by_the_sample_changes_the_training(converted: Path, tmp_path: Path) -> None:
    even = tmp_path / "even"
    shutil.copytree(converted, even)
    quick = {**QUICK, "train_steps": 4}
    finetune(converted, **quick)
    finetune(even, **quick, weighting="even")
    name = "blocks.1.mediator.mlp.fc1.weight"
    assert not torch.equal(state_of(converted)[name], state_of(even)[name])


def test_a_failed_save_leaves_the_last_one(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saves = []

    def save(state: Any, path: Path) -> None:
        if saves:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))
        saves.append(state["distiller"]["step"])
        real(state, path)

    real = torch.save
    before = state_of(converted)
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="No space"):
        finetune(converted, **QUICK)
    monkeypatch.undo()
    assert_same_state(before, state_of(converted))
    folder = bundle.beside(converted, "finetune")
    assert torch.load(folder / bundle.TRAINING_FILE, weights_only=True)["distiller"]["step"] == saves[0] == 20
    assert finetune(converted, **QUICK).resumed_at == 20


def test_two_processes_train_as_one_does(converted: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(converted, alone)
    quick = {**QUICK, "train_steps": 8}
    start = tiny_model(SETTINGS)
    start.load_state_dict(state_of(converted))
    finetune(alone, **quick)
    script = tmp_path / "train.py"
    script.write_text("from mediatorize.cli import main\nmain()\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), "finetune", str(converted)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *as_options(quick)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    first, second = load_model(alone), load_model(converted)
    states = targets(first)
    for level in (1, 4):  # weights may differ more where outputs do not depend on them
        was, one, two = (model(states.x, states.t, states.y, levels=level) for model in (start, first, second))
        assert float((one - two).norm()) < 0.002 * float((one - was).norm())


def test_data_are_what_is_trained_on(converted: Path, tmp_path: Path) -> None:
    folders = tmp_path / "imagenet256_features", tmp_path / "imagenet256_labels"
    for folder in folders:
        folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(12):
        np.save(folders[0] / f"{index}.npy", random.normal(size=(1, 4, 8, 8)).astype(np.float32))
        np.save(folders[1] / f"{index}.npy", np.array([index % 10]))
    model = load_model(converted)
    states = data_targets(model, open_data(tmp_path, model.arch), 20, cfg_scale=1.5, batch=7)
    torch.testing.assert_close(model(states.x, states.t, states.y), states.output, rtol=1e-5, atol=1e-5)
    assert states.truth is not None
    sizes = mean_squares(states.output, 4)
    plain, with_data = (distillation_loss(model, model, states, sizes, [4] * 3, DistillSettings(data_weight=w)) for w in (0.0, 2.0))
    gap = (model(states.x, states.t, states.y, levels=4) - states.truth).square().mean() / sizes[0]
    torch.testing.assert_close(with_data - plain, 2 * gap, rtol=1e-4, atol=1e-6)
    report = finetune(converted, **{**QUICK, "train_steps": 40}, data=tmp_path, data_weight=0.5)
    assert "12 items, fast-DiT" in str(report)
    losses = [json.loads(line)["loss"] for line in (converted / "finetune.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    with pytest.raises(UserError, match="there are none"):
        finetune(converted, **QUICK, data_weight=0.5)


def test_training_all_moves_softmax_and_says_so(converted: Path) -> None:
    before = state_of(converted)
    report = finetune(converted, **QUICK, train="all")
    assert "softmax moved" in str(report)
    after = state_of(converted)
    assert not torch.equal(before["blocks.1.mlp.fc1.weight"], after["blocks.1.mlp.fc1.weight"])
    assert torch.equal(before["pos_embed"], after["pos_embed"])
    assert "is that model, bit for bit" not in (converted / "README.md").read_text()


def test_divergence_is_said_and_the_bundle_is_kept(converted: Path) -> None:
    before = state_of(converted)
    with pytest.raises(UserError, match="diverged at step"):
        finetune(converted, **QUICK, learning_rate=50.0)
    assert_same_state(before, state_of(converted))


def test_a_finished_training_is_not_repeated_by_mistake(converted: Path) -> None:
    finetune(converted, **{**QUICK, "train_steps": 4})
    first = state_of(converted)
    with pytest.raises(UserError, match="very settings"):
        finetune(converted, **{**QUICK, "train_steps": 4})
    finetune(converted, **{**QUICK, "train_steps": 4}, force=True)
    assert not torch.equal(first["blocks.0.attn.mediator.qkv.weight"], state_of(converted)["blocks.0.attn.mediator.qkv.weight"])


def test_an_unfinished_training_with_other_settings_is_refused(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Distiller, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        finetune(converted, **QUICK)
    monkeypatch.undo()
    with pytest.raises(UserError, match="unfinished fine-tuning with other settings"):
        finetune(converted, **{**QUICK, "seed": 5})
    assert finetune(converted, **QUICK).resumed_at > 0


def test_a_schedule_does_not_outlive_the_weights_it_was_made_for(converted: Path) -> None:
    levels = [[1, 4, "softmax"]]
    (converted / "schedule.json").write_text(json.dumps({"pieces": [{"noise_from": 0.0, "noise_to": 1.0, "levels": levels[0]}]}))
    report = finetune(converted, **{**QUICK, "train_steps": 4})
    assert not (converted / "schedule.json").exists()
    assert "calibrate" in str(report)


def test_a_dry_run_writes_nothing(converted: Path) -> None:
    names = sorted(file.name for file in converted.parent.iterdir())
    report = finetune(converted, **QUICK, dry_run=True)
    assert report.peak_bytes is not None and report.peak_bytes[64] > report.peak_bytes[1] > 0
    assert "GiB" in str(report)
    assert sorted(file.name for file in converted.parent.iterdir()) == names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_steps": 0}, "train-steps 0"),
        ({"learning_rate": 0.0}, "trains nothing"),
        ({"ema": 1.0}, "no decay"),
        ({"feature_weight": -1.0}, "negative"),
        ({"solver": "dopri5"}, "fixed number"),
        ({"solver": "ddim"}, "not one for a SIT"),
        ({"reuse": 0}, "reuse 0"),
    ],
)
def test_bad_plans_are_refused(converted: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        finetune(converted, **{**QUICK, **change})


def test_only_a_bundle_can_be_trained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no bundle"):
        finetune(tmp_path, **QUICK)
