"""Calibration: the error table is what full forwards give, costs are what `sample` states, and nothing is measured twice or lost."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model
from PIL import Image
from torch import Tensor

from mediatorize.compression import sensitivity
from mediatorize.compression.costs import flops_costs, latency_costs
from mediatorize.compression.sensitivity import (
    Effects,
    Sampler,
    cells_of,
    effects_on_samples,
    error_table,
    output_changes,
    probe,
    products_of_call,
)
from mediatorize.diffusion.solvers import GuidedModel, call_noise_levels, call_times, find_solver, sample
from mediatorize.errors import UserError
from mediatorize.formats import bundle as bundles
from mediatorize.model import cost
from mediatorize.model.architecture import SOFTMAX, Level, MediatorSettings
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.stages import calibrate as stage
from mediatorize.stages.calibrate import calibrate, read_schedule_for
from mediatorize.stages.sample import Sampling, sampling_flops

SETTINGS = MediatorSettings((1, 4), local_rank=3, modulation_rank=2)
OPTIONS: list[Level] = [1, 4, SOFTMAX]
NUMPY_2 = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")

SAMPLERS = [("dit", "ddim"), ("dit", "ddpm"), ("dit", "dpm-solver++"), ("sit", "euler"), ("sit", "heun"), ("sit", "sde")]
QUICK: dict[str, Any] = {"steps": 4, "trajectories": 3, "verify": 3, "batch": 2, "device": "cpu"}


def model_of(family: str = "sit", **changes: Any) -> DiffusionTransformer:
    """Mediators cheaper than softmax, and errors neither nil nor all."""
    return tiny_model(SETTINGS, family=family, channels=1, learn_sigma=family == "dit", **changes)


@pytest.fixture
def bundle(tmp_path: Path) -> Callable[..., Path]:
    def write(model: DiffusionTransformer | None = None, name: str = "bundle") -> Path:
        model = model_of() if model is None else model
        assert model.settings is not None
        path = tmp_path / name
        path.mkdir()
        source = {"file": "model.pt", "format": "official", "weights": "", "sha256": "0" * 64}
        bundles.write_bundle(path, model, bundles.BundleConfig(model.arch, model.settings, source, []), "card")
        bundles.append_log(path, "convert", {}, {})
        return path

    return write


def without_times(path: Path) -> dict[str, bytes]:
    """What a calibration leaves, but for its log."""
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file() and f.name != bundles.LOG_FILE}


# --- the error table -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
@pytest.mark.parametrize("family", ["dit", "sit"])
@pytest.mark.parametrize("around", [None, [4, SOFTMAX, 1]])
def test_changes_equal_whole_forwards(family: str, cfg_scale: float, around: list[Level] | None) -> None:
    model = model_of(family)
    guided = GuidedModel(model, torch.tensor([1, 5]), cfg_scale, 3)
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), 0.4 if family == "sit" else 400
    changes = output_changes(model, guided, x, t, OPTIONS, around)
    teacher = guided.output(model(*guided.inputs(x, t)))
    for layer in range(3):
        for place, option in enumerate(OPTIONS):
            levels = list(around or [SOFTMAX] * 3)
            levels[layer] = option
            expected = guided.output(model(*guided.inputs(x, t), levels=levels)) - teacher
            torch.testing.assert_close(changes[layer, place], expected, rtol=1e-4, atol=2e-5)
            assert expected.norm() > 1e-2 or levels == [SOFTMAX] * 3


@NUMPY_2
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
@pytest.mark.parametrize(("family", "solver"), SAMPLERS)
def test_probes_are_the_samplers_trajectories_and_its_derivative(family: str, solver: str, cfg_scale: float) -> None:
    """A small change of one call's output moves the sample as the probe's gradients say."""
    model = model_of(family)
    sampler = Sampler(solver, 4, cfg_scale, 3, seed=5)
    labels = torch.tensor([2, 7])
    probes = probe(model, labels, sampler, 2, first_index=1)
    states: list[Tensor] = []
    how: dict[str, Any] = {"solver": solver, "steps": 4, "cfg_scale": cfg_scale, "seed": 5, "first_index": 1, "schedule": SOFTMAX}
    expected = sample(model, labels, observe=lambda x, t, y: states.append(x[:2]), **how)
    torch.testing.assert_close(probes.samples, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(probes.states, torch.stack(states), rtol=1e-4, atol=1e-5)

    generator = torch.Generator().manual_seed(1)
    call, calls = 1, 0
    bump = torch.randn(probes.gradients.shape[2:], generator=generator) * 1e-3

    def moved(module: Any, inputs: Any, output: Tensor) -> Tensor | None:
        nonlocal calls
        calls += 1
        return output + (torch.cat([bump, bump]) if cfg_scale != 1 else bump) if calls == call + 1 else None

    with model.register_forward_hook(moved):
        after = sample(model, labels, **how)
    for k in range(2):
        toward = sensitivity.noise_for(5, [1, 2], sensitivity.FIRST_DIRECTION + k, (1, 8, 8))
        found = ((after - expected) * toward).flatten(1).sum(1)
        torch.testing.assert_close(found, (probes.gradients[call, k] * bump).flatten(1).sum(1), rtol=0.05, atol=2e-4)


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
@pytest.mark.parametrize(("family", "solver"), [("dit", "ddim"), ("sit", "euler"), ("sit", "heun"), ("sit", "sde")])
def test_effects_are_what_a_part_of_the_students_change_does_to_the_sample(family: str, solver: str, cfg_scale: float) -> None:
    model, labels = model_of(family), torch.tensor([2, 7, 1])
    sampler = Sampler(solver, 4, cfg_scale, 3, seed=5)
    noise_levels, times = call_noise_levels(model.arch, find_solver(model.arch, solver), 4), call_times(find_solver(model.arch, solver), 4)
    effects = effects_on_samples(model, sampler, probe(model, labels, sampler, 100), times, noise_levels, [4], batch=2)

    part = 1e-2
    cells, place = cells_of(noise_levels)
    expected = torch.zeros(len(cells))
    guided = GuidedModel(model, labels, cfg_scale, 3)
    how: dict[str, Any] = {"solver": solver, "steps": 4, "cfg_scale": cfg_scale, "seed": 5, "schedule": SOFTMAX}
    teacher = sample(model, labels, **how)
    for call in range(len(times)):
        outputs: list[Tensor] = []

        def moved(module: Any, inputs: Any, output: Tensor, call: int = call, outputs: list[Tensor] = outputs) -> Tensor | None:
            outputs.append(output)
            if len(outputs) != call + 1:
                return None
            change = model.forward(*inputs, levels=4) - output
            outputs.append(change)
            return output + part * change

        with model.register_forward_hook(moved):
            sample_moved = sample(model, labels, **how)
        changed = guided.output(outputs[call + 1])[:, :1].square().sum()
        expected[place[call]] += (sample_moved - teacher).square().sum() / part**2 / changed
    order = torch.tensor(cells).argsort()
    passed = torch.tensor(cells)[order].diff(prepend=torch.zeros(1))
    passed[passed == 0] = passed[1]
    density = expected[order].sqrt() / passed
    torch.testing.assert_close(effects.at(torch.tensor(cells)[order]), density / density.mean(), rtol=0.15, atol=0.01)
    assert list(effects.noise_levels) == sorted(cells)


def test_effects_lie_between_their_neighbours_and_are_even_where_nothing_changes() -> None:
    effects = Effects((0.2, 0.6), (1.0, 3.0))
    assert effects.at(torch.tensor([0.0, 0.2, 0.3, 0.6, 1.0])).tolist() == pytest.approx([1, 1, 1.5, 3, 3])
    model, sampler, labels = model_of(), Sampler("euler", 3, seed=5), torch.tensor([2, 7])
    times = call_times(find_solver(model.arch, "euler"), 3)
    same = effects_on_samples(model, sampler, probe(model, labels, sampler, 1), times, [1 - t for t in times], [SOFTMAX], batch=2)
    assert same.values == (1.0, 1.0, 1.0)
    dit, once = model_of("dit"), Sampler("ddim", 1, seed=5)  # its one call is at the data themselves
    assert effects_on_samples(dit, once, probe(dit, labels, once, 1), [0.0], [0.0], [4], batch=2).values == (1.0,)


def test_the_table_predicts_the_error_of_small_changes() -> None:
    """Mediators next to softmax: the error of whole schedules is the predicted one, changes of calls added as vectors."""
    model = model_of()
    for layer in model.attention_layers():  # a weak attention: what levels differ by is small beside the rest
        layer.proj.weight.data *= 0.05
        layer.mediated().proj.weight.data *= 0.05
    sampler = Sampler("heun", 3, 1.0, 3, seed=5)
    labels = torch.arange(4)
    probes = probe(model, labels, sampler, 48)
    solver = find_solver(model.arch, "heun")
    noise_levels = call_noise_levels(model.arch, solver, 3)
    products = torch.stack([products_of_call(model, sampler, probes, i, t, OPTIONS, 3) for i, t in enumerate(call_times(solver, 3))])
    table = error_table(products, probes.samples.flatten(1).square().sum(1), noise_levels, OPTIONS)
    assert table.products.shape == (4, 3, 3, 4 * 48)
    assert table.calls == (1, 2, 2, 1)
    random_choices = np.random.default_rng(0)
    for _ in range(3):
        choice = random_choices.integers(0, 3, (4, 3))
        found = sample(model, labels, solver="heun", steps=3, seed=5, schedule=table.schedule(choice))
        error = float((found - probes.samples).norm() / probes.samples.norm())
        assert table.predicted(choice)["vectors"] == pytest.approx(error, rel=0.25)
    around = products_of_call(model, sampler, probes, 0, 0.0, OPTIONS, 3, around=[SOFTMAX] * 3)
    torch.testing.assert_close(around, products[0], rtol=1e-3, atol=1e-6)


# --- costs and schedules -------------------------------------------------------------------------------------------------------


@NUMPY_2
@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
@pytest.mark.parametrize(("family", "solver"), SAMPLERS)
def test_costs_are_sums_over_calls_and_what_sample_states(family: str, solver: str, cfg_scale: float) -> None:
    model = model_of(family)
    arch = model.arch
    chosen = find_solver(arch, solver)
    for steps in (4, 7):
        noise_levels = call_noise_levels(arch, chosen, steps)
        cells, place = cells_of(noise_levels)
        counts = [place.count(cell) for cell in range(len(cells))]
        rows = 1 if cfg_scale == 1 else 2
        costs = flops_costs(arch, SETTINGS, counts, rows)
        products = torch.randn(len(noise_levels), 3, 3, 2, 1)
        table = error_table(products, torch.ones(2), noise_levels, OPTIONS)
        choice = np.random.default_rng(steps).integers(0, 3, (len(cells), 3))
        by_calls = sum(rows * cost.forward_flops(arch, [OPTIONS[o] for o in choice[cell]], SETTINGS) for cell in place)
        sampling, schedule = Sampling(solver, steps, cfg_scale), table.schedule(choice)
        assert costs.of(choice) == by_calls == sampling_flops(arch, sampling, schedule, SETTINGS)
        assert costs.softmax == sampling_flops(arch, sampling, SOFTMAX, None)
        seen = levels_of_calls(model, solver=solver, steps=steps, cfg_scale=cfg_scale, schedule=schedule)
        assert seen == [tuple(OPTIONS[o] for o in choice[cell]) for cell in place]


def levels_of_calls(model: DiffusionTransformer, **how: Any) -> list[tuple[Level, ...]]:
    """The levels that `sample` calls the model with."""
    seen: list[tuple[Level, ...]] = []
    hook = model.register_forward_pre_hook(lambda module, inputs, named: seen.append(tuple(named["levels"])), with_kwargs=True)
    sample(model, [1], **how)
    hook.remove()
    return seen


def test_latency_costs_have_the_softmax_forward_as_their_whole() -> None:
    costs = latency_costs(model_of(), SETTINGS, [1, 2], rows=2)
    assert costs.cells.shape == (2, 3, 3)
    assert (costs.cells > 0).all()
    assert np.allclose(costs.cells[1], 2 * costs.cells[0])
    assert 0 < costs.least <= 1


# --- the command ---------------------------------------------------------------------------------------------------------------


@NUMPY_2
@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
@pytest.mark.parametrize(("family", "solver"), SAMPLERS)
def test_a_schedule_within_the_budget_for_every_sampler(bundle: Callable[..., Path], family: str, solver: str, cfg_scale: float) -> None:
    path = bundle(model_of(family))
    report = calibrate(path, budget=0.9, solver=solver, cfg_scale=cfg_scale, **QUICK)
    model = bundles.load_bundle(path)
    assert model.schedule is not None
    sampling = Sampling(solver, 4, cfg_scale)
    whole = sampling_flops(model.arch, sampling, SOFTMAX, None)
    spent = sampling_flops(model.arch, sampling, model.schedule, SETTINGS)
    assert whole
    assert spent
    assert spent <= 0.9 * whole
    (outcome,) = report.outcomes
    assert outcome.chosen.share == pytest.approx(spent / whole)
    fitting = [candidate for candidate in report.candidates if candidate.share <= 0.9]
    assert outcome.chosen.measured == min(candidate.measured for candidate in fitting if candidate.measured is not None)
    # It works at other steps too, and its cost is stated there.
    other = sampling_flops(model.arch, replace(sampling, steps=9), model.schedule, SETTINGS)
    assert other
    assert sample(model, [1, 2], solver=solver, steps=9, cfg_scale=cfg_scale).isfinite().all()


def test_the_measured_error_is_that_of_whole_samples_from_held_out_noise(bundle: Callable[..., Path]) -> None:
    path = bundle()
    report = calibrate(path, budget=0.9, **QUICK)
    (outcome,) = report.outcomes
    model = bundles.load_bundle(path)
    seed = stage.HELD_OUT_SEED
    labels = stage.spread_labels(10, 3, seed)
    assert len(set(stage.spread_labels(10, 10, seed).tolist())) == 10
    teacher, student = (sample(model, labels, steps=4, seed=seed, schedule=level) for level in (SOFTMAX, None))
    assert outcome.chosen.measured == pytest.approx(float((student - teacher).norm() / teacher.norm()), rel=1e-4)
    assert outcome.chosen.measured > 0
    assert report.sampler.seed != seed


def test_one_schedule_per_budget_the_wanted_one_in_use(bundle: Callable[..., Path]) -> None:
    path = bundle()
    report = calibrate(path, budget="90%", budgets=("0.95", 0.985), **QUICK)
    assert sorted(file.name for file in (path / "schedules").iterdir()) == ["0.90.json", "0.95.json", "0.985.json"]
    assert (path / "schedule.json").read_text() == (path / "schedules" / "0.90.json").read_text()
    errors = {outcome.budget: outcome.chosen.measured or 0 for outcome in report.outcomes}
    assert errors[0.9] >= errors[0.95] >= errors[0.985]
    content = json.loads((path / "schedule.json").read_text())
    assert content["budget"] == 0.9
    assert content["relative_cost"] <= 0.9
    assert content["calibrated_for"] == {"solver": "euler", "steps": 4, "cfg_scale": 1.0, "cfg_channels": 3}
    assert read_schedule_for(path, 0.95).to_json() == {"pieces": json.loads((path / "schedules" / "0.95.json").read_text())["pieces"]}
    with pytest.raises(UserError, match=r"no schedule for 0\.5 \(0\.90, 0\.95, 0\.985\)"):
        read_schedule_for(path, 0.5)
    for name in ("schedule-0.90.png", "sensitivity.png", "candidates.png"):
        with Image.open(path / "calibration" / name) as picture:
            assert min(picture.size) > 200
    text = str(report)
    assert "predicted error" in text
    assert "warning: never finetuned" in text
    assert "m = 4" in text
    assert json.loads(json.dumps(report.to_json()))["schedules"][0]["measured_error"] == errors[0.9]
    assert json.loads((path / bundles.LOG_FILE).read_text().splitlines()[-1])["command"] == "calibrate"


def test_another_budget_measures_nothing_again(bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = bundle()
    first = calibrate(path, budget=0.9, **QUICK)
    assert first.table_seconds is not None

    def never(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(stage, "probe_all", never)
    monkeypatch.setattr(stage, "products_of_call", never)
    second = calibrate(path, budget=0.95, **QUICK)
    assert second.table_seconds is None
    assert second.outcomes[0].solved_seconds < 5
    assert [line for line in str(second).splitlines() if "was there from before" in line]
    monkeypatch.setattr(stage, "sample_many", never)  # whole samples of the same schedules neither
    again = calibrate(path, budgets=(0.9,), force=True, **QUICK)
    assert again.outcomes[0].chosen.measured == first.outcomes[0].chosen.measured


def test_one_level_per_step(bundle: Callable[..., Path]) -> None:
    path = bundle()
    calibrate(path, budget=0.9, per="step", **QUICK)
    model = bundles.load_bundle(path)
    assert model.schedule is not None
    assert all(len(set(piece)) == 1 for piece in model.schedule.levels)


def test_latency_is_solved_for_and_measured(bundle: Callable[..., Path]) -> None:
    path = bundle()
    report = calibrate(path, budget=1.0, cost="latency", **QUICK)
    assert (path / "schedules" / "latency-1.00.json").exists()
    took = report.outcomes[0].latency
    assert took is not None
    assert min(took.predicted, took.measured, took.measured_softmax) > 0
    assert "predicted" in str(report).splitlines()[-2]


def test_measuring_again_around_the_schedule_gives_a_candidate(bundle: Callable[..., Path]) -> None:
    report = calibrate(bundle(), budget=0.9, rounds=1, **QUICK)
    assert any(candidate.name.startswith(("measured again", "sum of")) for candidate in report.candidates)
    assert report.outcomes[0].chosen.share <= 0.9


def test_the_prediction_is_trusted_without_held_out_samples(bundle: Callable[..., Path]) -> None:
    report = calibrate(bundle(), budget=0.9, **QUICK | {"verify": 0})
    assert all(candidate.measured is None for candidate in report.candidates)
    assert json.loads((report.bundle / "schedule.json").read_text())["measured_error"] is None


@pytest.mark.parametrize("kill_at", [1, 2, 4, 8, 12, -3, -2, -1])
def test_a_killed_calibration_goes_on_and_ends_the_same(bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, kill_at: int) -> None:
    """Killed as it writes its n-th file, then the same command: nothing half-written, and every file as without the kill."""
    whole, broken = bundle(name="whole"), bundle(name="broken")
    quick = QUICK | {"verify": 1}
    writes = 0
    write_beside = bundles.write_beside

    def counted(path: Path, write: Any, stop: int | None = None) -> None:
        nonlocal writes
        writes += 1
        if writes == stop:
            raise KeyboardInterrupt
        write_beside(path, write)

    before = without_times(broken)
    with monkeypatch.context() as patched:
        patched.setattr(bundles, "write_beside", counted)
        calibrate(whole, budget=0.9, **quick)
        stop = kill_at if kill_at > 0 else writes + 1 + kill_at
        writes = 0
        patched.setattr(bundles, "write_beside", lambda path, write: counted(path, write, stop))
        with pytest.raises(KeyboardInterrupt):
            calibrate(broken, budget=0.9, **quick)
    assert before.items() <= without_times(broken).items()
    calibrate(broken, budget=0.9, **quick)
    assert without_times(broken) == without_times(whole)


def test_finished_calls_are_not_measured_again_after_a_kill(bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = bundle()
    measured: list[int] = []

    def until(count: int) -> Callable[..., Tensor]:
        def measure(model: Any, sampler: Any, probes: Any, call: int, *rest: Any) -> Tensor:
            if len(measured) == count:
                raise KeyboardInterrupt
            measured.append(call)
            return products_of_call(model, sampler, probes, call, *rest)

        return measure

    monkeypatch.setattr(stage, "products_of_call", until(2))
    with pytest.raises(KeyboardInterrupt):
        calibrate(path, budget=0.9, **QUICK)
    assert not (path / "schedule.json").exists()
    monkeypatch.setattr(stage, "products_of_call", until(99))
    monkeypatch.setattr(stage, "probe_all", None)
    calibrate(path, budget=0.9, **QUICK)
    assert measured == [0, 1, 2, 3]
    assert not list((path / "calibration").glob("call-*"))


def test_other_weights_are_measured_anew_and_another_sampler_only_by_force(bundle: Callable[..., Path]) -> None:
    path = bundle()
    calibrate(path, budget=0.9, **QUICK)
    with pytest.raises(UserError, match=r"is for euler, 4 steps, guidance 1\.0, 3 trajectories"):
        calibrate(path, budget=0.95, **QUICK | {"steps": 5})
    calibrate(path, budget=0.95, **QUICK | {"steps": 5, "force": True})
    assert json.loads((path / "schedule.json").read_text())["calibrated_for"]["steps"] == 5
    model = bundles.load_bundle(path)
    for layer in model.attention_layers():
        layer.mediated().proj.weight.data = layer.mediated().proj.weight.data * 1.5
    bundles.write_bundle(path, model, bundles.read_config(path), "card")
    bundles.append_log(path, "finetune", {}, {})
    report = calibrate(path, budget=0.97, **QUICK)
    assert report.table_seconds is not None
    assert report.notes == ()


# --- refusals ------------------------------------------------------------------------------------------------------------------


def test_a_budget_out_of_reach_says_what_can_be_reached_and_what_would_widen_it(bundle: Callable[..., Path]) -> None:
    path = bundle()
    least = cost.forward_flops(model_of().arch, 1, SETTINGS) / cost.forward_flops(model_of().arch)
    with pytest.raises(UserError) as caught:
        calibrate(path, budgets=(0.9, 0.3), **QUICK)
    assert caught.value.message == f"{path}: can go down to {least:.1%} of softmax's FLOPs with levels 1, 4; you asked for 30.0%."
    assert "smaller --local-rank" in caught.value.hint
    assert "smaller --levels" not in caught.value.hint  # 1 is the smallest
    assert "higher resolution" in caught.value.hint
    assert not (path / "calibration").exists()
    coarse = bundle(tiny_model(MediatorSettings((4,), local_rank=0)), name="coarse")
    with pytest.raises(UserError, match="smaller --levels"):
        calibrate(coarse, budget=0.3, **QUICK)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "No budget"),
        ({"budget": "lots"}, "'lots' is no budget"),
        ({"budget": 75.0}, "75.0 is no share"),
        ({"budget": "0%"}, "0% is no share"),
        ({"budget": 0.9, "solver": "dopri5"}, "as many steps as it needs"),
        ({"budget": 0.9, "solver": "ddim"}, "not one for a SIT"),
        ({"budget": 0.9, "trajectories": 0}, "--trajectories 0"),
        ({"budget": 0.9, "verify": -1}, "--verify -1"),
        ({"budget": 0.9, "steps": 0}, "0 steps"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(bundle: Callable[..., Path], arguments: dict[str, Any], message: str) -> None:
    path = bundle()
    before = without_times(path)
    with pytest.raises(UserError, match=message):
        calibrate(path, **{"device": "cpu", **arguments})
    assert without_times(path) == before


def test_guidance_without_a_null_class_and_folders_that_are_no_bundle_are_refused(bundle: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no null class"):
        calibrate(bundle(model_of(null_class=False)), budget=0.9, cfg_scale=2.0, **QUICK)
    with pytest.raises(UserError, match="is no bundle"):
        calibrate(tmp_path / "nowhere", budget=0.9)


def test_a_schedule_is_replaced_only_by_force_and_a_dry_run_writes_nothing(bundle: Callable[..., Path]) -> None:
    path = bundle()
    before = without_times(path)
    dry = calibrate(path, budget=0.9, dry_run=True, **QUICK)
    assert dry.estimated_seconds
    assert "Nothing was written" in str(dry)
    assert without_times(path) == before
    calibrate(path, budget=0.9, **QUICK)
    with pytest.raises(UserError, match=r"0\.90\.json: exists"):
        calibrate(path, budget="90%", **QUICK)
    calibrate(path, budget=0.9, force=True, **QUICK)


def test_the_same_seed_gives_the_same_schedule_and_another_seed_other_trajectories(bundle: Callable[..., Path]) -> None:
    first, second, third = (bundle(name=name) for name in ("first", "second", "third"))
    for path, seed in ((first, 3), (second, 3), (third, 4)):
        random.seed(seed * 7 + 1)  # global generators do not matter
        torch.manual_seed(len(path.name))
        calibrate(path, budget=0.9, seed=seed, **QUICK)
    assert without_times(first) == without_times(second)
    table = "calibration/sensitivity.safetensors"
    assert without_times(first)[table] != without_times(third)[table]
