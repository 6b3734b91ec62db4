"""Distillation: what a step computes, the same weights after a kill and over several processes, softmax left as it is."""

from __future__ import annotations

import inspect
import json
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
from conftest import as_options, in_two_processes, official_state, tiny_model
from torch import nn

from mediatorize import UserError, load_model, sample
from mediatorize.compression import muon
from mediatorize.compression.distill import (
    Distiller,
    distillation_loss,
    forward_with_features,
    levels_of_step,
    mean_squares,
    optimizer_bytes,
    output_errors,
    saved_bytes,
)
from mediatorize.compression.records import DistillSettings
from mediatorize.compression.sensitivity import Effects
from mediatorize.compression.training import (
    HELD_OUT_SAMPLES,
    DivergedError,
    Finetuning,
    Training,
    TrainingPlan,
    batch_rows,
    measured_effects,
    train,
    trajectory_targets,
)
from mediatorize.compression.trajectories import Targets, data_targets, teacher_targets
from mediatorize.devices import World
from mediatorize.diffusion.sampling import Sampler
from mediatorize.formats import bundle
from mediatorize.formats.data import open_data
from mediatorize.model.levels import SOFTMAX, Level, MediatorSettings
from mediatorize.model.schedule import Schedule
from mediatorize.model.transformer import DiffusionTransformer, is_mediator
from mediatorize.report.training import facts, words
from mediatorize.stages.convert import convert
from mediatorize.stages.finetune import finetune
from mediatorize.stages.work import STATE_FILE

SETTINGS = MediatorSettings((1, 4), local_rank=12, modulation_rank=12, mlp="own", mlp_widths=(8, 4))
QUICK: dict[str, Any] = {
    "train_steps": 80,
    "batch": 6,
    "trajectories": 4,
    "renoised": 1,
    "sampler_steps": 3,
    "save_every": 20,
    "device": "cpu",
    "cfg_scales": (1.0, 1.5),
}


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    """A small bundle of a tiny random SiT."""
    return converted_in(tmp_path)


def converted_in(folder: Path, **changes: Any) -> Path:
    """A small bundle of a tiny random model."""
    model = tiny_model(**changes)
    torch.save(official_state(model), folder / "model.pt")
    plan: dict[str, Any] = {"states": 24, "trajectories": 4, "fit_steps": 2, "batch": 8, "sampler_steps": 3, "device": "cpu"}
    plan |= {"family": model.arch.family, "num_heads": 3, "num_classes": 10, "cfg_scale": 1.5 if model.arch.null_class else 1.0}
    convert(str(folder / "model.pt"), folder / "bundle", levels=(1, 4), mlp="own", projection_rank=0, **plan)
    return folder / "bundle"


def targets(model: DiffusionTransformer, samples: int = 4, first_index: int = 0) -> Targets:
    sampler = Sampler.resolve(model.arch, steps=3, cfg_scale=1.5)
    return teacher_targets(model, torch.arange(first_index, first_index + samples) % 10, sampler, first_index)[0]


def state_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in load_model(path).state_dict().items()}  # files are mapped, and replaced


def trained(report: Finetuning) -> Training:
    """What was done, where it was no dry run."""
    assert report.training is not None
    return report.training


def held_out_errors(model: DiffusionTransformer, teacher: DiffusionTransformer, plan: TrainingPlan) -> dict[Level, float]:
    """The errors on held-out trajectories of the teacher, written out."""
    states = trajectory_targets(teacher, plan.first_sampler("held-out training"), HELD_OUT_SAMPLES, 0, World(0, 1, torch.device("cpu")))
    size = states.output[:, : model.arch.channels].norm()
    gaps = {level: model(states.x, states.t, states.y, levels=level) - states.output for level in (1, 4)}
    return {level: float(gap[:, : model.arch.channels].norm() / size) for level, gap in gaps.items()}


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
    rest = targets(model, 3, first_index=2)
    for name in ("x", "t", "y", "output"):
        value = getattr(whole, name)
        torch.testing.assert_close(torch.cat([getattr(first, name), getattr(rest, name)]), value, rtol=1e-4, atol=1e-5)


def test_finished_samples_are_what_the_sampler_gives() -> None:
    model = tiny_model()
    labels = torch.arange(4)
    _, finished = teacher_targets(model, labels, Sampler.resolve(model.arch, steps=3, cfg_scale=1.5, seed=7))
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
    distill = DistillSettings(steps=23, batch=6)
    plan = TrainingPlan.resolve(arch, distill=distill, trajectories=4, renoised=0, steps=3, cfg_scales=(1.0, 1.5))
    rounds = list(plan.rounds())
    assert [step for span in rounds for step in span] == list(range(23))
    assert [len(span) for span in rounds] == [2, 4, 2, 4, 2, 4, 2, 3]


def test_a_plan_goes_to_json_and_back() -> None:
    plan = TrainingPlan.resolve(tiny_model().arch, distill=DistillSettings(seed=3), cfg_scales=(1.5, 1.0, 1.5), cfg_channels="all")
    assert plan.cfg_scales == (1.5, 1.0)
    assert TrainingPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert TrainingPlan.from_json(plan.fingerprint("start")) == plan
    assert plan.fingerprint("start")["start"] == "start"


def test_the_stages_defaults_are_the_plans() -> None:
    arch = tiny_model().arch
    stage = {name: parameter.default for name, parameter in inspect.signature(finetune).parameters.items()}
    plan = TrainingPlan.resolve(arch)
    names = ("trajectories", "reuse", "renoised", "cfg_scales", "cfg_channels", "weighting")
    assert {name: stage[name] for name in names} == {name: getattr(plan, name) for name in names}
    renamed = {"steps": "train_steps", "levels": "train_levels"}
    assert {name: stage[renamed.get(name, name)] for name in vars(plan.distill)} == vars(plan.distill)
    assert stage["save_every"] == inspect.signature(train).parameters["save_every"].default


# --- a step --------------------------------------------------------------------------------------------------------------------


def test_levels_of_steps_hold_both_ends_and_mixtures() -> None:
    drawn = [levels_of_step(MediatorSettings((1, 4, 16)), 5, seed=0, step=step) for step in range(400)]
    assert drawn[0::4] == [[1] * 5] * 100
    assert drawn[1::4] == [[16] * 5] * 100
    assert all(len(set(levels)) == 1 for levels in drawn[2::4])
    assert {levels[0] for levels in drawn[2::4]} == {1, 4, 16}
    assert any(set(levels) == {1, 4, 16, SOFTMAX} for levels in drawn[3::4])
    assert all(set(levels_of_step(MediatorSettings((2,)), 1, seed=0, step=step)) == {2} for step in range(40))
    assert drawn == [levels_of_step(MediatorSettings((1, 4, 16)), 5, seed=0, step=step) for step in range(400)]


def test_the_forward_with_features_is_the_models_own() -> None:
    model = tiny_model(SETTINGS)
    states = targets(model)
    levels: list[Level] = [1, SOFTMAX, 4]
    for checkpointing in (False, True):
        output, features = forward_with_features(model, states.x, states.t, states.y, levels, checkpointing)
        assert torch.equal(output, model(states.x, states.t, states.y, levels=levels))
        tokens, conditioning = model.embed(states.x), model.condition(states.t, states.y)
        for block, level, feature in zip(model.layers(), levels, features, strict=True):
            tokens = block(tokens, conditioning, level)
            assert torch.equal(tokens, feature)


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
    expected = parameter.detach().clone()
    for step in range(6):
        distiller.step(states, mean_squares(states.output, 4))
        decay = min(0.5, (1 + step) / (10 + step)) if step else 0.0  # diffusers starts from the weights after the first step
        expected = decay * expected + (1 - decay) * parameter.detach()
    last = parameter.detach().clone()
    distiller.finish()
    assert (last - expected).abs().max() > 1e-5
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family", ["dit", "sit"])
def test_output_errors_are_those_of_the_prediction_alone(family: Any) -> None:
    model = tiny_model(SETTINGS, family=family)
    states = targets(model)
    size = states.output[:, :4].norm()
    expected = {level: float((model(states.x, states.t, states.y, levels=level) - states.output)[:, :4].norm() / size) for level in (1, 4)}
    for batch in (5, len(states)):
        assert output_errors(model, states, batch) == pytest.approx(expected, rel=1e-4)


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
    assert sum(kept.values()) == predicted
    assert saved_bytes(arch, SETTINGS, DistillSettings(checkpointing=True), len(states)) < predicted / 3


@pytest.mark.parametrize("how", [{}, {"optimizer": "adamw"}, {"ema": 0.9}])
def test_optimizer_bytes_are_those_after_a_step(how: dict[str, Any]) -> None:
    model, settings = tiny_model(SETTINGS), DistillSettings(**how)
    distiller, states = Distiller(model, model, settings), targets(model, 2)
    for parameter in distiller.parameters.values():
        parameter.grad = torch.ones_like(parameter)  # a step leaves some without, in turn
    for optimizer in distiller.optimizers:
        optimizer.step()
    distiller.step(states, mean_squares(states.output, 4))
    moments = [moment for each in distiller.optimizers for state in each.state.values() for moment in state.values()]
    averages = [] if distiller.average is None else distiller.average.shadow_params
    numbers = sum(moment.numel() for moment in (*moments, *averages) if torch.is_tensor(moment) and moment.ndim)
    gradients = sum(parameter.numel() for parameter in distiller.parameters.values())
    assert optimizer_bytes(model.arch, SETTINGS, settings) == 4 * (numbers + gradients)


# --- the loop, without a bundle --------------------------------------------------------------------------------------------------


def quick_plan(model: DiffusionTransformer, steps: int = 80, **changes: Any) -> TrainingPlan:
    """The plan of `QUICK`."""
    distill = DistillSettings(steps=steps, batch=6, **{name: changes.pop(name) for name in ("learning_rate", "ema") if name in changes})
    return TrainingPlan.resolve(model.arch, distill=distill, trajectories=4, renoised=1, steps=3, cfg_scales=(1.0, 1.5), **changes)


def test_a_model_is_trained_in_a_notebook_as_by_the_stage(converted: Path) -> None:
    model = load_model(converted)
    model.load_state_dict(state_of(converted))  # the bundle's file, which is mapped, is replaced below
    model.schedule = Schedule((), ((1, 4, SOFTMAX),))
    plan = quick_plan(model)
    done, losses = [], []
    training = train(model, plan, on_step=lambda: done.append(1), on_loss=lambda step, loss, rate: losses.append((step, loss, rate)))
    assert len(done) == 80
    assert model.schedule is None  # it was made for the weights before
    for level in (1, 4):
        assert training.after[level] < 0.8 * training.before[level]
    found = finetune(converted, **QUICK)
    assert found.plan == plan
    assert found.training == training
    assert_same_state(model.state_dict(), state_of(converted))
    lines = [json.loads(line) for line in (converted / "finetune.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"], line["learning_rate"]) for line in lines] == losses


def test_a_training_goes_on_from_a_saved_state(tmp_path: Path) -> None:
    unbroken, again = tiny_model(SETTINGS), tiny_model(SETTINGS)
    plan = quick_plan(unbroken, ema=0.9)
    saved: list[int] = []

    def save(state: Any) -> None:
        saved.append(state["distiller"]["step"])
        torch.save(state, tmp_path / f"{saved[-1]}.pt")

    whole = train(unbroken, plan, save=save, save_every=30)
    assert saved == [40, 80]  # at reports of the loss, every 20 steps
    assert whole.resumed_at == 0
    rest = train(again, plan, state=torch.load(tmp_path / "40.pt", weights_only=True))
    assert rest == replace(whole, resumed_at=40)
    assert_same_state(unbroken.state_dict(), again.state_dict())
    last = torch.load(tmp_path / "80.pt", weights_only=True)["distiller"]
    averages = dict(zip(last["weights"], last["average"]["shadow_params"], strict=True))
    assert_same_state(averages, {name: unbroken.state_dict()[name] for name in averages})
    assert not any(parameter.requires_grad for parameter in unbroken.parameters())


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> list[Targets]:
    """The batches of all steps that are taken."""
    batches: list[Targets] = []
    step = Distiller.step

    def observed(self: Distiller, states: Targets, *rest: Any) -> torch.Tensor:
        batches.append(states)
        return step(self, states, *rest)

    monkeypatch.setattr(Distiller, "step", observed)
    return batches


@pytest.mark.parametrize("train_what", ["mediators", "all"])
def test_the_teacher_is_the_model_as_it_was(train_what: Any, trained_on: list[Targets]) -> None:
    model, teacher = tiny_model(SETTINGS), tiny_model(SETTINGS)
    plan = quick_plan(model, steps=12)
    train(model, replace(plan, distill=replace(plan.distill, train=train_what, learning_rate=0.01)))
    assert [len(span) for span in plan.rounds()] == [4, 8]  # the second is drawn when the model has moved
    for states in trained_on:
        torch.testing.assert_close(teacher(states.x, states.t, states.y), states.output, rtol=1e-4, atol=1e-5)
    last = trained_on[-1]
    moved = model(last.x, last.t, last.y) - last.output
    assert (float(moved.abs().max()) > 0.01) == (train_what == "all")


@pytest.mark.parametrize("family", ["dit", "sit"])
def test_errors_count_by_how_far_they_move_a_sample(family: Any, trained_on: list[Targets]) -> None:
    def noise_level(states: Targets) -> torch.Tensor:
        return states.t / 999 if family == "dit" else 1 - states.t

    model = tiny_model(SETTINGS, family=family)
    plan = quick_plan(model, steps=4)
    measured = measured_effects(model, plan)
    assert sum(measured.values) / len(measured.values) == pytest.approx(1)
    assert max(measured.values) > 1.01 * min(measured.values)
    for effects in (None, Effects((0.0, 1.0), (0.5, 1.5))):
        trained_on.clear()
        train(tiny_model(SETTINGS, family=family), plan, effects=effects)
        for states in trained_on:
            assert states.weight is not None
            expected = measured.at(noise_level(states)) if effects is None else 0.5 + noise_level(states)
            torch.testing.assert_close(states.weight, expected)
    trained_on.clear()
    train(tiny_model(SETTINGS, family=family), replace(plan, weighting="even"))
    assert [states.weight for states in trained_on] == [None] * 4


def test_a_diverging_training_stops() -> None:
    model = tiny_model(SETTINGS)
    with pytest.raises(DivergedError, match=r"diverged at step \d+ \(loss .*, at first .*--learning-rate than 50") as caught:
        train(model, quick_plan(model, learning_rate=50.0), save=lambda state: None, save_every=20)
    assert caught.value.saved_at % 20 == 0 and caught.value.saved_at < 80


def test_a_plan_of_data_needs_data() -> None:
    model = tiny_model(SETTINGS)
    with pytest.raises(UserError, match="there are none"):
        train(model, replace(quick_plan(model), data={"name": "pictures"}))


def test_guidance_needs_a_null_class(tmp_path: Path) -> None:
    path = converted_in(tmp_path, null_class=False)
    with pytest.raises(UserError, match=r"no null class.*--cfg-scales 1\."):
        finetune(path, **QUICK)
    assert finetune(path, **{**QUICK, "train_steps": 4, "cfg_scales": (1.0,)}).plan.cfg_scales == (1.0,)


# --- the stage -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["dit", "sit"])
def test_training_lowers_the_error_of_every_level_and_keeps_softmax(family: Any, tmp_path: Path) -> None:
    out = converted_in(tmp_path, family=family)
    before = state_of(out)
    report = finetune(out, **QUICK)
    training = trained(report)
    for level in (1, 4):
        assert training.after[level] < 0.8 * training.before[level]
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
    assert held_out_errors(model, model, report.plan) == pytest.approx(training.after, rel=1e-4)
    distilled = bundle.read_config(out).finetuned
    assert distilled is not None
    assert (distilled.before, distilled.after, distilled.settings) == (training.before, training.after, report.plan.distill)
    lines = [json.loads(line) for line in (out / "finetune.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 40, 60, 80]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert not bundle.beside(out, "finetune").exists()
    assert not (out / bundle.WORK_FOLDER).exists()
    assert [line["command"] for line in bundle.read_log(out)] == ["convert", "finetune"]
    told = facts(report)
    assert json.loads(json.dumps(told)) == bundle.read_log(out)[-1]["result"]
    assert list(told) == [
        *("bundle", "dry_run", "trained_parameters", "plan", "before", "after", "losses"),
        *("seconds", "resumed_at", "estimated_seconds", "peak_bytes", "notes"),
    ]
    table = [line.split() for line in words(report).splitlines()]
    assert all([f"m={level}", f"{training.before[level]:.4f}", f"{training.after[level]:.4f}"] in table for level in (1, 4))


def state_file_of(path: Path) -> Path:
    """Where an unfinished training of a bundle keeps its state."""
    return bundle.beside(path, "finetune") / bundle.WORK_FOLDER / STATE_FILE


def test_a_killed_training_goes_on_to_the_same_weights(converted: Path, tmp_path: Path) -> None:
    unbroken = tmp_path / "unbroken"
    shutil.copytree(converted, unbroken)
    finetune(unbroken, **QUICK, ema=0.9)
    state_file = state_file_of(converted)
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
    assert 0 < trained(report).resumed_at < 80
    assert_same_state(state_of(unbroken), state_of(converted))
    steps = [json.loads(line)["step"] for line in (converted / "finetune.jsonl").read_text().splitlines()]
    assert steps == [20, 40, 60, 80]


def test_a_kill_after_the_last_step_loses_nothing(converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unbroken, quick = tmp_path / "unbroken", {**QUICK, "train_steps": 40}
    shutil.copytree(converted, unbroken)
    finetune(unbroken, **quick)
    before = state_of(converted)
    monkeypatch.setattr(bundle, "commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        finetune(converted, **quick)
    monkeypatch.undo()
    assert_same_state(before, state_of(converted))
    assert trained(finetune(converted, **quick)).resumed_at == 40
    assert_same_state(state_of(unbroken), state_of(converted))
    assert (converted / "finetune.jsonl").read_text() == (unbroken / "finetune.jsonl").read_text()
    assert [line["command"] for line in bundle.read_log(converted)] == ["convert", "finetune"]


def test_a_failed_save_leaves_the_last_one(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saves: list[int] = []

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
    assert torch.load(state_file_of(converted), weights_only=True)["distiller"]["step"] == saves[0] == 20
    assert trained(finetune(converted, **QUICK)).resumed_at == 20


def test_two_processes_train_as_one_does(converted: Path, tmp_path: Path) -> None:
    """Sums over processes are in another order, which moves outputs by 1e-6 to 1e-5 of what training does."""
    alone = tmp_path / "alone"
    shutil.copytree(converted, alone)
    quick = {**QUICK, "train_steps": 8, "batch": 5, "trajectories": 3}  # whose parts differ in size
    start = tiny_model(SETTINGS)
    start.load_state_dict(state_of(converted))
    finetune(alone, **quick)
    in_two_processes("finetune", converted, **quick)
    first, second = load_model(alone), load_model(converted)
    states = targets(first)
    for level in (1, 4):  # weights may differ more where outputs do not depend on them
        was, one, two = (model(states.x, states.t, states.y, levels=level) for model in (start, first, second))
        assert float((one - two).norm()) < 2e-5 * float((one - was).norm())


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
    assert "12 items, fast-DiT" in words(report)
    losses = [json.loads(line)["loss"] for line in (converted / "finetune.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    with pytest.raises(UserError, match="there are none"):
        finetune(converted, **QUICK, data_weight=0.5)


def test_training_all_moves_softmax_and_says_so(converted: Path) -> None:
    before, teacher = state_of(converted), tiny_model(SETTINGS)
    teacher.load_state_dict(before)
    report = finetune(converted, **QUICK, train="all")
    assert "softmax moved" in words(report)
    after, student = state_of(converted), load_model(converted)
    still = {name for name in before if not is_mediator(name) and torch.equal(before[name], after[name])}
    assert still == {"pos_embed"}
    states = targets(teacher)
    moved = student(states.x, states.t, states.y) - states.output
    assert 0.001 < float(moved.norm() / states.output.norm()) < 1
    assert held_out_errors(student, teacher, report.plan) == pytest.approx(trained(report).after, rel=1e-4)  # of the model as it was
    assert "is that model, bit for bit" not in (converted / "README.md").read_text()


def test_divergence_is_said_and_the_bundle_is_kept(converted: Path) -> None:
    before = state_of(converted)
    with pytest.raises(UserError, match="diverged at step") as caught:
        finetune(converted, **QUICK, learning_rate=50.0)
    assert_same_state(before, state_of(converted))
    message = str(caught.value)
    assert message.startswith(f"{converted}: ")
    assert "The bundle is as it was" in message and str(state_file_of(converted)) in message
    assert message.endswith("Pass a smaller --learning-rate than 50, and --force to begin anew.")


def test_a_finished_training_is_not_repeated_by_mistake(converted: Path) -> None:
    plan = finetune(converted, **{**QUICK, "train_steps": 4}).plan
    model = tiny_model(SETTINGS)
    model.load_state_dict(state_of(converted))
    with pytest.raises(UserError, match="very settings"):
        finetune(converted, **{**QUICK, "train_steps": 4})
    assert_same_state(model.state_dict(), state_of(converted))
    forced = finetune(converted, **{**QUICK, "train_steps": 4}, force=True)
    assert forced.training == train(model, plan)  # it goes on from there
    assert_same_state(model.state_dict(), state_of(converted))


def test_an_unfinished_training_with_other_settings_is_refused(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Distiller, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        finetune(converted, **QUICK)
    monkeypatch.undo()
    with pytest.raises(UserError, match="unfinished fine-tuning with other settings"):
        finetune(converted, **{**QUICK, "seed": 5})
    assert trained(finetune(converted, **QUICK)).resumed_at == 80


def test_a_schedule_does_not_outlive_the_weights_it_was_made_for(converted: Path) -> None:
    levels = [[1, 4, "softmax"]]
    (converted / "schedule.json").write_text(json.dumps({"pieces": [{"noise_from": 0.0, "noise_to": 1.0, "levels": levels[0]}]}))
    report = finetune(converted, **{**QUICK, "train_steps": 4})
    assert not (converted / "schedule.json").exists()
    assert "calibrate" in words(report)
    assert load_model(converted).schedule is None


def test_a_dry_run_writes_nothing(converted: Path) -> None:
    names = sorted(file.name for file in converted.parent.iterdir())
    report = finetune(converted, **QUICK, dry_run=True)
    assert report.training is None and report.estimate is not None
    peak = report.estimate.peak_bytes
    assert list(peak) == [1, 4, 16, 64] and 0 < peak[1] < peak[4] < peak[16] < peak[64]
    assert (facts(report)["dry_run"], facts(report)["peak_bytes"], facts(report)["after"]) == (True, peak, None)
    assert "GiB" in words(report)
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
