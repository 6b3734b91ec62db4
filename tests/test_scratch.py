"""Training from random weights on data alone: how weights begin, what a step computes, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import in_two_processes, official_state, tiny_model
from torch import Tensor

from mediatorize import UserError, load_model
from mediatorize.compression.distill import Distiller, training_loss
from mediatorize.compression.records import DistillSettings
from mediatorize.compression.training import DivergedError, TrainingPlan, train
from mediatorize.compression.trajectories import Samples, training_states
from mediatorize.diffusion.process import BETAS, variance_loss
from mediatorize.formats import bundle
from mediatorize.model.levels import SOFTMAX, MediatorSettings
from mediatorize.model.schedule import Schedule
from mediatorize.model.transformer import DiffusionTransformer, from_scratch, is_mediator
from mediatorize.report import conversion, training
from mediatorize.stages.calibrate import calibrate
from mediatorize.stages.convert import convert
from mediatorize.stages.evaluate import evaluate
from mediatorize.stages.export import export
from mediatorize.stages.finetune import finetune

PUBLISHED = MediatorSettings((1, 4), form="published", projection_rank=None)
ALONE: dict[str, Any] = {"teacher": "none", "train": "all", "data_weight": 1.0, "device": "cpu"}
QUICK: dict[str, Any] = ALONE | {"train_steps": 40, "batch": 6, "save_every": 20}


def state_of(path: Path) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in load_model(path).state_dict().items()}  # files are mapped, and replaced


def some_data(count: int = 7, seed: int = 0, channels: int = 1) -> Samples:
    random = torch.Generator().manual_seed(seed)
    return Samples(torch.rand(count, channels, 8, 8, generator=random), torch.arange(count) % 10)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A data set of 12 pictures of 8x8 on disk."""
    images = np.random.default_rng(0).integers(0, 256, size=(12, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "pictures.npz", arr_0=images, labels=np.arange(12) % 10)
    return tmp_path / "pictures.npz"


def begun(tmp_path: Path, name: str = "bundle", **changes: Any) -> Path:
    """A bundle of random weights, of a tiny model's sizes."""
    torch.save(official_state(tiny_model(channels=1)), tmp_path / "model.pt")
    options: dict[str, Any] = {"family": "sit", "num_heads": 3, "form": "published", "levels": (1, 4)}
    convert(str(tmp_path / "model.pt"), tmp_path / name, weights="random", **(options | changes))
    return tmp_path / name


# --- how weights begin ---------------------------------------------------------------------------------------------------------


def test_random_weights_begin_as_the_originals_do() -> None:
    arch = replace(tiny_model().arch, width=96, mlp_width=384)
    model = from_scratch(arch, PUBLISHED, seed=3)
    state = model.state_dict()
    qkv = state["blocks.1.attn.qkv.weight"]
    bound = math.sqrt(6 / (96 + 3 * 96))
    assert 0.98 * bound < qkv.abs().max() <= bound and not state["blocks.1.attn.qkv.bias"].any()
    assert all(not value.any() for name, value in state.items() if "adaLN" in name or name.startswith("final_layer.linear"))
    for name in ("y_embedder.embedding_table.weight", "t_embedder.mlp.0.weight"):
        assert float(state[name].std()) == pytest.approx(0.02, rel=0.1)
    terms = torch.cat([value.flatten() for name, value in state.items() if name.endswith("_bias")])
    assert float(terms.std()) == pytest.approx(0.02, rel=0.05) and float(terms.mean()) == pytest.approx(0, abs=1e-3)
    convolution = state["blocks.2.attn.mediator.levels.4.dwc.weight"]
    assert 0.3 < float(convolution.abs().max()) <= 1 / 3 and float(convolution.std()) == pytest.approx(1 / 3 / math.sqrt(3), rel=0.05)
    assert not any("mediator.qkv" in name or "mediator.proj" in name for name in state)  # shared with softmax
    assert not torch.equal(convolution, state["blocks.1.attn.mediator.levels.4.dwc.weight"])
    again, other = from_scratch(arch, PUBLISHED, seed=3).state_dict(), from_scratch(arch, PUBLISHED, seed=4).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in state.items())
    assert not torch.equal(qkv, other["blocks.1.attn.qkv.weight"])


def test_a_models_own_mediators_begin_so_too(tmp_path: Path) -> None:
    arch = replace(tiny_model().arch, mediators=4)
    state = from_scratch(arch, MediatorSettings((1,))).state_dict()
    assert float(state["blocks.0.attn.published.levels.4.an_bias"].std()) == pytest.approx(0.02, rel=0.25)
    assert 0.25 < float(state["blocks.0.attn.published.levels.4.dwc.weight"].abs().max()) <= 1 / 3


def test_a_bundle_begins_from_a_checkpoints_sizes_alone(tmp_path: Path) -> None:
    path = begun(tmp_path)
    config, state, given = bundle.read_config(path), state_of(path), official_state(tiny_model(channels=1))
    assert {name for name in state if not is_mediator(name)} == given.keys()
    assert not torch.equal(state["blocks.0.attn.qkv.weight"], given["blocks.0.attn.qkv.weight"])
    assert (config.source.file, config.source.weights, config.layer_errors) == ("model.pt", bundle.RANDOM, ())
    assert (config.settings.projection_rank, config.settings.modulation_rank, config.settings.mlp_widths) == (None, 0, ())
    card = (path / "README.md").read_text()
    assert "random weights, of the sizes of `model.pt`" in card and "bit for bit" not in card and "CC BY-NC" not in card
    assert not bundle.partial_folder(path).exists()
    for needs_a_teacher in (
        lambda: finetune(path, device="cpu"),
        lambda: calibrate(path, budget=0.9, device="cpu"),
        lambda: evaluate(str(path), tmp_path / "report", features="none", device="cpu"),
    ):
        with pytest.raises(UserError, match="never trained; it can teach nothing"):
            needs_a_teacher()
    assert not (tmp_path / "report").exists()


def test_a_published_size_needs_no_file(tmp_path: Path) -> None:
    planned = convert("SiT-S/2@256", tmp_path / "out", weights="random", form="published", levels=(4,), dry_run=True)
    text = conversion.words(planned)
    assert "5.49" in text and "projections shared with softmax" in text and "nothing is fitted" in text
    assert planned.plan.flops() == 0 and not (tmp_path / "out").exists()


# --- a step --------------------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_velocitys_squared_error() -> None:
    model = tiny_model(PUBLISHED, channels=1)
    data = some_data()
    states = training_states(model.arch, data, range(7), range(7), step=0, label_dropout=0.0, seed=5)
    noise = (states.x - states.t.view(-1, 1, 1, 1) * data.x) / (1 - states.t.view(-1, 1, 1, 1))
    for level in (4, SOFTMAX):
        expected = (model(states.x, states.t, states.y, levels=level) - (data.x - noise)).square().mean()
        found = training_loss(model, states, [level] * 3, DistillSettings(data_weight=0.5))
        torch.testing.assert_close(found, 0.5 * expected, rtol=1e-4, atol=1e-6)


def test_a_dits_loss_has_the_bound_of_its_variance() -> None:
    model = tiny_model(PUBLISHED, channels=1, family="dit")
    states = training_states(model.arch, some_data(), range(7), range(7), step=0, label_dropout=0.0, seed=5)
    noise, logits = model(states.x, states.t, states.y, levels=4).chunk(2, dim=1)
    assert states.truth is not None
    found = training_loss(model, states, [4] * 3, DistillSettings(data_weight=1.0))
    bound = variance_loss(noise, states.truth, logits, states.t)
    torch.testing.assert_close(found, (noise - states.truth).square().mean() + bound)

    kept = np.cumprod(1 - BETAS)

    def step_from(t: int, x: Tensor, eps: Tensor, deviation: Tensor | float) -> torch.distributions.Normal:
        return torch.distributions.Normal((x - BETAS[t] / math.sqrt(1 - kept[t]) * eps) / math.sqrt(1 - BETAS[t]), deviation)

    expected = []
    for row, t in enumerate(states.t.long().tolist()):
        small, large = math.log(BETAS[t] * (1 - kept[t - 1]) / (1 - kept[t])), math.log(BETAS[t])
        deviation = ((small + (logits[row] + 1) / 2 * (large - small)) / 2).exp().double()
        x, eps, own = (values[row].double() for values in (states.x, states.truth, noise))
        true = step_from(t, x, eps, torch.full_like(x, math.exp(small / 2)))
        expected.append(torch.distributions.kl_divergence(true, step_from(t, x, own, deviation)).mean() / math.log(2))
    assert min(states.t) >= 1
    torch.testing.assert_close(bound.double(), torch.stack(expected).mean(), rtol=1e-4, atol=1e-6)


def test_a_state_is_a_function_of_its_place() -> None:
    arch, data = tiny_model(channels=1).arch, some_data(400)
    whole = training_states(arch, data, range(400), range(800, 1200), step=2, label_dropout=0.1)
    part = training_states(arch, data, range(100, 150), range(900, 950), step=2, label_dropout=0.1)
    assert all(torch.equal(getattr(whole, name)[100:150], getattr(part, name)) for name in ("x", "t", "y", "output"))
    assert 20 < int((whole.y == arch.classes).sum()) < 60
    assert torch.equal(whole.y[whole.y < 10], data.y[whole.y < 10]) and data.y.max() == 9
    assert 0.45 < float(whole.t.mean()) < 0.55 and float(whole.t.min()) < 0.02 and float(whole.t.max()) > 0.98  # uniform


def test_adamw_steps_as_torchs_does_at_a_constant_rate() -> None:
    settings = DistillSettings(
        steps=20, batch=7, data_weight=1.0, train="all", teacher="none", levels=(4,), optimizer="adamw", rate="constant", warmup=0, clip=0.0
    )
    settings = replace(settings, learning_rate=1e-3)
    model, plain = tiny_model(PUBLISHED, channels=1), tiny_model(PUBLISHED, channels=1)
    distiller = Distiller(model, None, settings)
    own = {name: parameter.requires_grad_(True) for name, parameter in plain.named_parameters() if name != "pos_embed"}
    optimizer = torch.optim.AdamW(own.values(), lr=1e-3, weight_decay=0)
    for step in range(3):
        states = training_states(model.arch, some_data(), range(7), range(7 * step, 7 * step + 7), step=step, label_dropout=0.1)
        distiller.step(states, torch.ones(1))
        assert distiller.rate == 1e-3
        optimizer.zero_grad()
        training_loss(plain, states, [4] * 3, settings).backward()
        optimizer.step()
    for name, parameter in distiller.parameters.items():
        torch.testing.assert_close(parameter, own[name], rtol=1e-5, atol=1e-7)


def plan_of(model: DiffusionTransformer, **changes: Any) -> TrainingPlan:
    settings: dict[str, Any] = {"steps": 60, "batch": 5, "data_weight": 1.0, "train": "all", "teacher": "none", "ema": 0.9}
    return TrainingPlan.resolve(model.arch, distill=DistillSettings(**(settings | changes)))


def begun_model() -> DiffusionTransformer:
    return from_scratch(tiny_model(channels=1).arch, PUBLISHED)


def test_a_broken_training_ends_at_the_same_weights(tmp_path: Path) -> None:
    unbroken, again = begun_model(), begun_model()
    plan = plan_of(unbroken, optimizer="adamw", rate="constant", learning_rate=1e-2)
    whole = train(unbroken, plan, data=some_data(), save=lambda state: torch.save(state, tmp_path / "state.pt"), save_every=40)
    assert whole.losses[1] < whole.losses[0] and not whole.before and not whole.after
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["distiller"]["step"] == 40
    rest = train(again, plan, data=some_data(), state=state)
    assert rest == replace(whole, resumed_at=40)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in unbroken.state_dict().items())


def test_every_level_takes_its_turn() -> None:
    model = begun_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, plan_of(model, levels=(4,), steps=20), data=some_data())
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert any("levels.4." in name for name in moved) and not any("levels.1." in name for name in moved)
    train(model, plan_of(model, steps=20), data=some_data())
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items() if "levels.1." in name)


def test_divergence_is_said_without_a_teacher_too() -> None:
    model = begun_model()
    with pytest.raises(DivergedError, match="diverged at step"):
        train(model, plan_of(model, optimizer="adamw", rate="constant", learning_rate=30.0, clip=0.0, warmup=0), data=some_data())


# --- the stage -----------------------------------------------------------------------------------------------------------------


def test_a_baseline_is_trained_at_softmax_and_exported(pictures: Path, tmp_path: Path) -> None:
    path = begun(tmp_path)
    before = state_of(path)
    with pytest.raises(UserError, match="never trained"):
        export(path, tmp_path / "early", to="official")
    found = finetune(path, data=pictures, train_levels=(SOFTMAX,), **QUICK)
    after = state_of(path)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "blocks.0.attn.qkv.weight" in moved and "y_embedder.embedding_table.weight" in moved
    assert moved == {name for name in before if not is_mediator(name) and name != "pos_embed"}
    text = training.words(found)
    assert "at softmax and without a teacher" in text and "All weights were trained, without a teacher" in text
    losses = training.facts(found)["losses"]
    assert losses[1] < losses[0] and f"{losses[0]:.4f} at first and {losses[1]:.4f} at last" in text
    config = bundle.read_config(path)
    assert config.source.weights == bundle.TRAINED and config.finetuned is not None
    assert config.finetuned.settings.levels == (SOFTMAX,) and load_model(path).schedule is None
    export(path, tmp_path / "official", to="official")
    written = load_model(tmp_path / "official" / "model.pt", family="sit", num_heads=3)
    assert all(torch.equal(value, after[name]) for name, value in written.state_dict().items())


def test_a_bundle_trained_at_one_level_samples_at_it_and_is_exported(pictures: Path, tmp_path: Path) -> None:
    path = begun(tmp_path)
    how: dict[str, Any] = QUICK | {"ema": 0.9, "optimizer": "adamw", "rate": "constant", "learning_rate": 1e-3}
    finetune(path, data=pictures, train_levels=(4,), **how)
    model = load_model(path)
    assert model.schedule == Schedule((), ((4, 4, 4),))
    lines = [json.loads(line)["learning_rate"] for line in (path / "finetune.jsonl").read_text().splitlines()]
    assert lines == [pytest.approx(1e-3)] * 2
    card = (path / "README.md").read_text()
    assert "on data alone, 40 steps of 6 states, at m=4 and no other level" in card
    export(path, tmp_path / "published", to="attention-mediators", level=4)
    alone = load_model(tmp_path / "published" / "model.pt")
    x, t, y = torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([1, 10])
    torch.testing.assert_close(alone(x, t, y), model(x, t, y, levels=4), rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="never trained"):
        export(path, tmp_path / "official", to="official")
    with pytest.raises(UserError, match="very settings"):
        finetune(path, data=pictures, train_levels=(4,), **how)


def test_two_processes_train_as_one_does(pictures: Path, tmp_path: Path) -> None:
    path = begun(tmp_path)
    alone = tmp_path / "alone"
    shutil.copytree(path, alone)
    quick = QUICK | {"train_steps": 8, "batch": 5, "train_levels": (4,), "optimizer": "adamw", "learning_rate": 1e-3, "data": pictures}
    start = state_of(path)
    finetune(alone, **quick)
    in_two_processes("finetune", path, **quick)
    first, second = state_of(alone), state_of(path)
    for name in ("blocks.1.attn.qkv.weight", "final_layer.linear.weight", "blocks.0.attn.mediator.levels.4.dwc.weight"):
        assert float((first[name] - second[name]).norm()) < 1e-3 * float((first[name] - start[name]).norm()), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": None}, "the data are all there is to learn from.*--data PATH"),
        ({"data_weight": 0.0}, "the data are all there is to learn from"),
        ({"train": "mediators"}, r"not its mediators alone.*--train all"),
        ({"train_levels": (9,)}, "no level 9 to train.*can be 1, 4, softmax"),
        ({"feature_weight": 1.0}, "--feature-weight says nothing with --teacher none"),
        ({"trajectories": 3, "solver": "euler"}, "--trajectories, --solver says nothing with --teacher none"),
        ({"label_dropout": 1.0}, "--label-dropout 1.0 is no share"),
        ({"teacher": "softmax", "label_dropout": 0.2}, "--label-dropout says nothing with --teacher softmax"),
    ],
)
def test_bad_trainings_are_refused(change: dict[str, Any], message: str, pictures: Path, tmp_path: Path) -> None:
    path = begun(tmp_path)
    names = sorted(file.name for file in tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        finetune(path, **({"data": pictures} | QUICK | change))
    assert sorted(file.name for file in tmp_path.iterdir()) == names


def test_softmax_cannot_learn_from_itself(official_file: Callable[..., Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"family": "sit", "num_heads": 3, "levels": (1, 4), "cfg_scale": 1.0, "sampler_steps": 3, "device": "cpu"}
    convert(str(official_file()), tmp_path / "out", fit_steps=0, states=16, **options)
    with pytest.raises(UserError, match="softmax is the teacher, and cannot learn from itself"):
        finetune(tmp_path / "out", train_levels=(SOFTMAX,), device="cpu", dry_run=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fit_steps": 0}, "--fit-steps says nothing with --weights random: nothing is fitted then"),
        ({"states": 64, "solver": "euler"}, "--states, --solver says nothing"),
        ({"data": Path("data.npz")}, "--data says nothing"),
        ({"mlp_widths": (4,)}, "--weights random has none"),
        ({"levels": (3,)}, "3 mediators are no square"),
    ],
)
def test_bad_beginnings_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        begun(tmp_path, **change)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]
