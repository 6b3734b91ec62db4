"""Calibration: the error table is what full forwards give, costs are what `sample` states, and nothing is measured twice or lost."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import in_two_processes, official_state, tiny_model
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from mediatorize import devices
from mediatorize.compression import judging, tables
from mediatorize.compression import search as searching
from mediatorize.compression.costs import COSTS, CallCosts, Unit, flops_costs
from mediatorize.compression.judging import MOST_RULES, Draws, Errors, Judge
from mediatorize.compression.proposals import BASELINES, FEWER, PER_CELL, PER_STEP, RULE, WHOLE, Proposal
from mediatorize.compression.search import Outcomes, costs_of, search
from mediatorize.compression.sensitivity import (
    Effects,
    ErrorTable,
    Products,
    adjoint_products,
    cells_of,
    effects_on_samples,
    error_table,
    probe,
)
from mediatorize.compression.tables import measured_tables
from mediatorize.diffusion.sampling import GuidedModel, Sampler, driver_of, flops_by_rule, sample, sample_batch, sample_many
from mediatorize.diffusion.switching import Switcher
from mediatorize.errors import UserError
from mediatorize.formats import bundle as bundles
from mediatorize.model import cost
from mediatorize.model.block import SwitchableAttention
from mediatorize.model.levels import KINDS, SOFTMAX, Level, MediatorSettings, parts_of, title
from mediatorize.model.schedule import RuleSchedule, Schedule
from mediatorize.model.transformer import DiffusionTransformer, LastLayer
from mediatorize.randomness import gaussian, seed_for, spread_labels
from mediatorize.report import evaluation
from mediatorize.report.calibration import facts, words
from mediatorize.report.sampling import began_in_words
from mediatorize.stages.calibrate import Calibration, calibrate
from mediatorize.stages.evaluate import evaluate
from mediatorize.stages.sample import sample as sample_stage
from mediatorize.store import InMemory

SETTINGS = MediatorSettings((1, 4), local_rank=3, modulation_rank=2)
OPTIONS: list[Level] = [1, 4, SOFTMAX]
NUMPY_2 = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")

SAMPLERS = [("dit", "ddim"), ("dit", "ddpm"), ("dit", "dpm-solver++"), ("sit", "euler"), ("sit", "heun"), ("sit", "sde")]
QUICK: dict[str, Any] = {"kinds": ("mediators",), "steps": 4, "trajectories": 3, "verify": 3, "batch": 2, "device": "cpu"}


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
        source = bundles.Origin("model.pt", "official", "", "0" * 64)
        bundles.write_bundle(path, model, bundles.BundleConfig(model.arch, model.settings, source), "card")
        bundles.append_log(path, "convert", {}, {})
        return path

    return write


def found_by(result: Calibration) -> Outcomes:
    assert result.found is not None
    return result.found


def without_times(path: Path) -> dict[str, bytes]:
    """What a calibration leaves, but for its log."""
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file() and f.name != bundles.LOG_FILE}


# --- the error table -----------------------------------------------------------------------------------------------------------


def weak_attention(family: str) -> DiffusionTransformer:
    """A model of which attention is a small part, so that what levels differ by is small beside the rest."""
    model = tiny_model(replace(SETTINGS, mlp_widths=(4,)), family=family, channels=1, learn_sigma=family == "dit")
    for block in model.layers():
        narrow = block.mediator
        assert narrow is not None
        assert narrow.narrow is not None
        assert narrow.modulation is not None
        parts = (block.attn.proj, block.attn.mediated().proj, block.mlp.fc2, narrow.narrow.fc2, narrow.modulation.up)
        for parameter in [parameter for part in parts for parameter in part.parameters()] + [*narrow.narrow.biases.values()]:
            parameter.data *= 0.01
    return model


@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
@pytest.mark.parametrize(("family", "solver"), [("dit", "ddim"), ("sit", "euler"), ("sit", "heun")])
def test_adjoints_give_the_effect_of_a_small_change_in_one_layer(family: str, solver: str, cfg_scale: float) -> None:
    """<gradient at the block's output, its change> is what a whole forward with that level does along the sample's gradient."""
    model = weak_attention(family)
    sampler, labels = Sampler(solver=solver, steps=3, cfg_scale=cfg_scale, seed=5), torch.tensor([1, 5])
    probes = probe(model, labels, sampler, 3)
    levels: list[Level] = [1, 4, "softmax|1/4", "4|1/4"]
    found = adjoint_products(model, sampler, probes, torch.arange(2), levels)
    guided = GuidedModel(model, labels, sampler)
    for call, t in enumerate(sampler.times()):
        inputs = guided.inputs(probes.states[call], t)
        teacher = guided.output(model(*inputs))
        for layer in range(3):
            for place, level in enumerate(levels):
                change = guided.output(model(*inputs, levels=[level if index == layer else SOFTMAX for index in range(3)])) - teacher
                expected = torch.einsum("nchw,knchw->nk", change, probes.gradients[call])
                assert expected.norm() > 0 or not probes.gradients[call].any()
                torch.testing.assert_close(
                    found.levels[call, layer, place], expected, rtol=0.1, atol=0.05 * float(expected.abs().max()) + 1e-7
                )


@pytest.mark.parametrize(("family", "solver"), [("dit", "ddim"), ("sit", "heun")])
def test_calls_outside_the_guidance_interval_have_no_unconditional_half_to_change(family: str, solver: str) -> None:
    model, labels = weak_attention(family), torch.tensor([1, 5])
    sampler = Sampler(solver=solver, steps=6, cfg_scale=2.0, cfg_interval=(0.3, 0.75), seed=5)
    probes = probe(model, labels, sampler, 3)
    found = adjoint_products(model, sampler, probes, torch.arange(2), [1])
    rows = sampler.rows_of_calls(model.arch)
    assert {1, 2} == set(rows)
    guided = GuidedModel(model, labels, sampler)
    for call, (t, own) in enumerate(zip(sampler.times(), rows, strict=True)):
        inputs = guided.inputs(probes.states[call], t)
        assert len(inputs[0]) == 2 * own
        change = guided.output(model(*inputs, levels=[SOFTMAX, 1, SOFTMAX])) - guided.output(model(*inputs))
        expected = torch.einsum("nchw,knchw->nk", change, probes.gradients[call])
        assert expected.norm() > 0 or not probes.gradients[call].any()
        torch.testing.assert_close(found.levels[call, 1, 0], expected, rtol=0.1, atol=0.1 * float(expected.abs().max()) + 1e-7)


def test_a_schedule_for_guidance_on_an_interval_is_found_and_counts_its_rows(bundle: Callable[..., Path]) -> None:
    path = bundle()
    how: dict[str, Any] = {"cfg_scale": 2.0, "cfg_interval": (0.3, 0.75)}
    report = calibrate(path, budget=0.75, **QUICK | {"steps": 8, **how})
    (outcome,) = found_by(report).outcomes
    model = bundles.load_bundle(path)
    sampler = Sampler.resolve(model.arch, steps=8, **how)
    spent, whole = (sampler.flops(model.arch, schedule, model.settings) for schedule in (outcome.schedule, SOFTMAX))
    assert spent is not None and whole is not None
    assert spent / whole == pytest.approx(outcome.chosen.share)
    assert outcome.chosen.share <= 0.75
    assert sample(model, [1, 2], steps=8, **how).isfinite().all()


@NUMPY_2
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
@pytest.mark.parametrize(("family", "solver"), SAMPLERS)
def test_probes_are_the_samplers_trajectories_and_its_derivative(family: str, solver: str, cfg_scale: float) -> None:
    """A small change of one call's output moves the sample as the probe's gradients say."""
    model = model_of(family)
    sampler = Sampler(solver=solver, steps=4, cfg_scale=cfg_scale, seed=5)
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
        toward = gaussian(5, "direction", [1, 2], (1, 8, 8), k)
        found = ((after - expected) * toward).flatten(1).sum(1)
        torch.testing.assert_close(found, (probes.gradients[call, k] * bump).flatten(1).sum(1), rtol=0.05, atol=2e-4)


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
@pytest.mark.parametrize(("family", "solver"), [("dit", "ddim"), ("sit", "euler"), ("sit", "heun"), ("sit", "sde")])
def test_effects_are_what_a_part_of_the_students_change_does_to_the_sample(family: str, solver: str, cfg_scale: float) -> None:
    model, labels = model_of(family), torch.tensor([2, 7, 1])
    sampler = Sampler(solver=solver, steps=4, cfg_scale=cfg_scale, seed=5)
    effects = effects_on_samples(model, sampler, probe(model, labels, sampler, 100), [4], batch=2)

    part = 1e-2
    cells, place = cells_of(sampler.noise_levels(model.arch))
    expected = torch.zeros(len(cells))
    guided = GuidedModel(model, labels, sampler)
    how: dict[str, Any] = {"solver": solver, "steps": 4, "cfg_scale": cfg_scale, "seed": 5, "schedule": SOFTMAX}
    teacher = sample(model, labels, **how)
    for call in range(len(place)):
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
    model, sampler, labels = model_of(), Sampler(solver="euler", steps=3, seed=5), torch.tensor([2, 7])
    same = effects_on_samples(model, sampler, probe(model, labels, sampler, 1), [SOFTMAX], batch=2)
    assert same.values == (1.0, 1.0, 1.0)
    dit, once = model_of("dit"), Sampler(solver="ddim", steps=1, seed=5)  # its one call is at the data themselves
    assert effects_on_samples(dit, once, probe(dit, labels, once, 1), [4], batch=2).values == (1.0,)


def test_the_table_predicts_the_error_of_small_changes() -> None:
    """Mediators next to softmax: the error of whole schedules is the predicted one, changes of calls added as vectors."""
    model = model_of()
    for layer in model.attention_layers():  # a weak attention: what levels differ by is small beside the rest
        layer.proj.weight.data *= 0.05
        layer.mediated().proj.weight.data *= 0.05
    sampler = Sampler(solver="heun", steps=3, seed=5)
    labels = torch.arange(4)
    probes = probe(model, labels, sampler, 48)
    added: list[Level] = [1, 4]
    found = adjoint_products(model, sampler, probes, torch.arange(4), added).levels
    products = torch.cat([found, torch.zeros_like(found[:, :, :1])], dim=2)
    table = error_table(products, probes.samples.flatten(1).norm(dim=1), sampler.noise_levels(model.arch), OPTIONS)
    assert table.products.shape == (4, 3, 3, 4 * 48)
    assert table.calls == (1, 2, 2, 1)
    random_choices = np.random.default_rng(0)
    for _ in range(3):
        choice = random_choices.integers(0, 3, (4, 3))
        samples = sample(model, labels, solver="heun", steps=3, seed=5, schedule=table.schedule(choice))
        errors = (samples - probes.samples).flatten(1).norm(dim=1) / probes.samples.flatten(1).norm(dim=1)
        assert table.predicted(choice)["vectors"] == pytest.approx(float(errors.square().mean().sqrt()), rel=0.25)


# --- costs and schedules -------------------------------------------------------------------------------------------------------


@NUMPY_2
@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
@pytest.mark.parametrize(("family", "solver"), SAMPLERS)
def test_costs_are_sums_over_calls_and_what_sample_states(family: str, solver: str, cfg_scale: float) -> None:
    model = model_of(family)
    arch = model.arch
    for steps in (4, 7):
        sampler = Sampler.resolve(arch, solver=solver, steps=steps, cfg_scale=cfg_scale)
        noise_levels = sampler.noise_levels(arch)
        cells, place = cells_of(noise_levels)
        rows = 1 if cfg_scale == 1 else 2
        costs = costs_of("flops", model, sampler)
        products = torch.randn(len(noise_levels), 3, 3, 2, 1)
        table = error_table(products, torch.ones(2), noise_levels, OPTIONS)
        choice = np.random.default_rng(steps).integers(0, 3, (len(cells), 3))
        by_calls = sum(rows * cost.forward_flops(arch, [OPTIONS[o] for o in choice[cell]], SETTINGS) for cell in place)
        schedule = table.schedule(choice)
        assert costs.of(schedule) == by_calls == sampler.flops(arch, schedule, SETTINGS)
        assert costs.softmax == sampler.flops(arch, SOFTMAX, None)
        seen = levels_of_calls(model, solver=solver, steps=steps, cfg_scale=cfg_scale, schedule=schedule)
        assert seen == [tuple(OPTIONS[o] for o in choice[cell]) for cell in place]
        holding = Schedule((0.5,), (("hold+4|full", 1, "hold+1|full"), (SOFTMAX, 4, "hold+1|full")))
        assert costs.of(holding) == sampler.flops(arch, holding, SETTINGS) < costs.softmax


def levels_of_calls(model: DiffusionTransformer, **how: Any) -> list[tuple[Level, ...]]:
    """The levels that `sample` calls the model with."""
    seen: list[tuple[Level, ...]] = []
    hook = model.register_forward_pre_hook(lambda module, inputs, named: seen.append(tuple(named["levels"])), with_kwargs=True)
    sample(model, [1], **how)
    hook.remove()
    return seen


@dataclass
class Clock:
    """A clock that only attention layers and the last layer move on, by what they are said to take."""

    now: float = 0.0
    layer_seconds: dict[Level, float] = field(default_factory=lambda: {1: 1.0, 4: 8.0, SOFTMAX: 5.0})
    last_seconds: float = 2.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    attend, finish = SwitchableAttention.forward, LastLayer.forward

    def attention(self: SwitchableAttention, x: Tensor, level: Level = SOFTMAX) -> Tensor:
        clock.now += clock.layer_seconds[level]
        return attend(self, x, level)

    def last_layer(self: LastLayer, x: Tensor, conditioning: Tensor) -> Tensor:
        clock.now += clock.last_seconds
        return finish(self, x, conditioning)

    monkeypatch.setattr(SwitchableAttention, "forward", attention)
    monkeypatch.setattr(LastLayer, "forward", last_layer)
    monkeypatch.setattr(devices.time, "perf_counter", lambda: clock.now)
    return clock


def test_latency_costs_are_the_layers_times_and_have_the_softmax_forward_as_their_whole(clock: Clock) -> None:
    model = model_of()
    sampler = Sampler.resolve(model.arch, steps=4)
    costs = costs_of("latency", model, sampler, batch=2)
    assert [costs.call.block(level) * 2 for level in OPTIONS] == [1.0, 8.0, 5.0]  # of a row of two
    assert costs.softmax * 2 == 4 * (3 * 5 + 2)
    assert costs.least(["mediators"]) == pytest.approx((3 * 1 + 2) / (3 * 5 + 2))
    holding = Schedule((), (("hold+1|full",) * 3,))  # its first call runs softmax attention, and mediators beside it
    assert costs.of(holding) * 2 == pytest.approx((3 * (5 + 1) + 2) + 3 * (3 * 1 + 2))
    clock.layer_seconds = {1: 8.0, 4: 9.0, SOFTMAX: 5.0}
    assert costs_of("latency", model, sampler).least(["mediators"]) == 1


def test_a_cost_is_one_entry_of_the_table(bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing asks for the name of a unit: one that is added has its own files, words and budgets."""

    def attention_alone(*arguments: Any) -> CallCosts:
        return replace(flops_costs(*arguments), rest=0)

    monkeypatch.setitem(COSTS, "attention", Unit("attention", attention_alone, prefix="attention-"))
    path = bundle()
    report = calibrate(path, budget=0.8, cost="attention", **QUICK)
    assert [file.name for file in (path / "schedules").iterdir()] == ["attention-0.80.json"]
    assert "of softmax's attention" in words(report)
    schedule = json.loads((path / "schedule.json").read_text())
    assert schedule["cost"] == "attention"
    assert schedule["relative_cost"] <= 0.8
    with pytest.raises(UserError, match=r"of softmax's attention with mediators and levels m=1, m=4; you asked for 1\.0%"):
        calibrate(path, budget=0.01, cost="attention", **QUICK)


def test_softmax_may_have_any_place_among_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(model: DiffusionTransformer) -> ErrorTable:
        return measured_tables(model, Sampler.resolve(model.arch, steps=2), 2, 2, InMemory()).errors

    table = measured(model_of())
    monkeypatch.setitem(KINDS, "softmax", replace(KINDS["softmax"], rank=lambda level: 2.0))
    changed = measured(model_of())
    assert (table.options, changed.options) == ((1, 4, SOFTMAX), (1, SOFTMAX, 4))
    assert np.array_equal(changed.products, table.products[:, :, [0, 2, 1]])


# --- the search ----------------------------------------------------------------------------------------------------------------


def test_a_notebook_finds_the_schedule_of_the_command(bundle: Callable[..., Path]) -> None:
    path, store = bundle(), InMemory()
    model = bundles.load_bundle(path)
    sampler = Sampler.resolve(model.arch, steps=4)
    how: dict[str, Any] = {"trajectories": 3, "verify": 3, "batch": 2}
    found = search(model, sampler, [0.9, 0.95], costs_of("flops", model, sampler), store=store, **how)
    report = calibrate(path, budgets=(0.9, 0.95), **QUICK)
    assert [outcome.schedule for outcome in found.outcomes] == [outcome.schedule for outcome in found_by(report).outcomes]
    assert [judged.measured for judged in found.candidates] == [judged.measured for judged in found_by(report).candidates]
    assert np.array_equal(found.table.products, found_by(report).table.products)
    assert found.table_seconds is not None
    again = search(model, sampler, [0.9], costs_of("flops", model, sampler), store=store, **how)
    assert again.table_seconds is None
    assert again.outcomes[0].schedule == found.outcomes[0].schedule


def test_schedules_among_ten_levels_and_more_are_told_apart() -> None:
    """Levels (2, 1, 11) and (11, 2, 1) have the same digits."""
    model = tiny_model(MediatorSettings(tuple(range(1, 12))), channels=1, learn_sigma=False)
    sampler = Sampler.resolve(model.arch, steps=2, seed=7)
    judge = Judge(Draws(model, sampler, count=2, batch=2), costs_of("flops", model, sampler), InMemory())
    schedules = Schedule((), ((2, 1, 11),)), Schedule((), ((11, 2, 1),))
    for name, schedule in zip("ab", schedules, strict=True):
        judge.add(Proposal(name=name, kind=WHOLE, schedule=schedule, steps=2), 2)
    labels = spread_labels(10, 2, 7)
    teacher = sample(model, labels, steps=2, seed=7, schedule=SOFTMAX)
    for judged, schedule in zip(judge.candidates, schedules, strict=True):
        errors = (sample(model, labels, steps=2, seed=7, schedule=schedule) - teacher).flatten(1).norm(dim=1)
        errors = errors / teacher.flatten(1).norm(dim=1)
        assert judged.measured is not None
        assert judged.measured.mean == pytest.approx(float(errors.mean()), rel=1e-5)
        assert judged.measured.geometric == pytest.approx(float(errors.prod() ** 0.5), rel=1e-5)
        assert judged.measured.flipped == float((errors > 0.5).float().mean())
    assert judge.candidates[0].measured != judge.candidates[1].measured


def test_one_flipped_sample_does_not_rule_what_candidates_are_compared_by() -> None:
    teacher = torch.ones(11, 1, 2, 2)
    steady, flips = teacher * 1.02, torch.cat([teacher[:10] * 1.01, -teacher[10:]])
    one, other = Errors.of(steady, teacher), Errors.of(flips, teacher)
    assert one.mean < other.mean
    assert other.geometric < one.geometric
    assert (other.flipped, one.flipped) == (pytest.approx(1 / 11), 0)


def test_baselines_are_among_the_candidates_and_the_best_is_kept_be_it_one(bundle: Callable[..., Path]) -> None:
    report = calibrate(bundle(), budgets=(0.9, 0.75), **QUICK | {"steps": 6})
    for outcome in found_by(report).outcomes:
        fitting = [c for c in found_by(report).candidates if c.share <= outcome.budget and c.measured is not None]
        assert {FEWER, WHOLE, PER_STEP, PER_CELL} <= {candidate.kind for candidate in fitting}
        assert outcome.chosen.error == min(candidate.error for candidate in fitting if candidate.kind != FEWER)
        assert [candidate.kind for candidate in outcome.baselines] == [WHOLE, FEWER]
        assert outcome.reported.keys() == {outcome.chosen.name, *(candidate.name for candidate in outcome.baselines)}
    text = words(report)
    assert "baselines' medians: " in text
    assert "flipped" in text


def test_a_report_tells_what_was_kept_and_the_baselines_of_the_weights_at_hand(bundle: Callable[..., Path], tmp_path: Path) -> None:
    path = bundle()
    calibrate(path, budget=0.8, **QUICK)
    again = calibrate(path, budgets=(0.8, 0.75), **QUICK, force=True)
    how: dict[str, Any] = {"samples": 2, "steps": 4, "levels": (), "features": "none", "pairs": 0, "device": "cpu"}
    evaluate(str(path), tmp_path / "out", **how)
    assert (tmp_path / "out" / "candidates.png").read_bytes() == (path / "calibration" / "candidates.png").read_bytes()
    text = (tmp_path / "out" / "report.md").read_text()
    (told,) = re.findall(r"\| schedule or baseline \|.*\n\|-.*\n((?:\|.*\n)+)", text)  # nothing of the first calibration
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in told.splitlines()]
    expected = []
    for outcome in found_by(again).outcomes:
        others = [c for c in outcome.baselines if c.name != outcome.chosen.name]
        names = [(f"{outcome.budget:.2f}.json", outcome.chosen.kind), *((c.kind, "baseline") for c in others)]
        for (name, what), candidate in zip(names, [outcome.chosen, *others], strict=True):
            errors = outcome.reported[candidate.name]
            shown = f"{errors.median:.4f}", f"{errors.mean:.4f}", f"{errors.flipped:.0%}"
            expected.append([name, f"{outcome.budget:.2%}", f"{candidate.share:.2%}", *shown, what])
    assert rows == expected
    assert ["fewer steps", "baseline"] in [[row[0], row[-1]] for row in rows]
    bundles.append_log(path, "finetune", {}, {})  # the schedules are of weights that are gone
    evaluate(str(path), tmp_path / "later", **how)
    assert "schedule or baseline" not in (tmp_path / "later" / "report.md").read_text()


def test_the_teacher_with_fewer_steps_is_what_sample_gives(bundle: Callable[..., Path]) -> None:
    path = bundle()
    report = calibrate(path, budget=0.75, **QUICK)
    (fewer,) = (candidate for candidate in found_by(report).candidates if candidate.kind == FEWER)
    model = bundles.load_bundle(path)
    seed = 2**33 + 1
    labels = spread_labels(10, 3, seed)
    teacher, student = (sample(model, labels, steps=steps, seed=seed, schedule=SOFTMAX) for steps in (4, fewer.steps))
    assert (fewer.steps, fewer.share) == (3, 0.75)
    assert fewer.measured is not None
    measured, expected = fewer.measured, Errors.of(student, teacher)
    for name in ("samples", "median", "mean", "geometric", "flipped"):
        assert getattr(measured, name) == pytest.approx(getattr(expected, name), rel=1e-4)
    assert measured.share is None  # it is no rule


NARROW = MediatorSettings((1, 4), mlp_widths=(8, 4))


@pytest.mark.parametrize(("kinds", "budget"), [(("mediators",), 0.75), (("mlps",), 0.55), (("mediators", "mlps"), 0.35)], ids=str)
def test_kinds_restrict_what_is_used(bundle: Callable[..., Path], kinds: tuple[str, ...], budget: float) -> None:
    how = QUICK | {"steps": 10, "kinds": kinds}
    report = calibrate(bundle(tiny_model(NARROW, channels=1, learn_sigma=False)), budget=budget, **how)
    chosen = found_by(report).outcomes[0].chosen
    assert chosen.share <= budget
    parts = [parts_of(level) for level in chosen.schedule.used]
    assert ("mediators" in kinds) == any(each.attention != SOFTMAX for each in parts)
    assert ("mlps" in kinds) == any(each.mlp not in ("full", "own") for each in parts)
    others = [c for c in found_by(report).candidates if c.kind not in (WHOLE, FEWER)]  # levels of mediators are judged whole anyhow
    assert others
    for each in (parts_of(level) for candidate in others for level in candidate.schedule.used):
        assert "mediators" in kinds or each.attention == SOFTMAX
        assert "mlps" in kinds or each.mlp in ("full", "own")


def test_narrow_mlps_that_are_not_there_are_refused(bundle: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="no narrow MLPs"):
        calibrate(bundle(), budget=0.9, **QUICK | {"kinds": ("mlps",)})


@pytest.mark.parametrize(
    ("kinds", "level"), [(("mediators",), 1), (("mlps",), "softmax|1/8"), (("mediators", "mlps"), "1|1/8")], ids=lambda value: str(value)
)
def test_what_kinds_can_reach_is_what_their_cheapest_level_costs(bundle: Callable[..., Path], kinds: tuple[str, ...], level: Level) -> None:
    path = bundle(tiny_model(NARROW, channels=1, learn_sigma=False))
    arch = bundles.read_config(path).arch
    least = cost.forward_flops(arch, level, NARROW) / cost.forward_flops(arch)
    assert calibrate(path, budget=0.99, **QUICK | {"kinds": kinds}, dry_run=True).costs.least(kinds) == pytest.approx(least)
    with pytest.raises(UserError, match="can go down to"):
        calibrate(path, budget=least - 0.01, **QUICK | {"kinds": kinds})


def test_only_what_looks_best_at_first_sight_is_judged_by_all_samples(bundle: Callable[..., Path]) -> None:
    report = calibrate(bundle(), budget=0.75, **QUICK | {"steps": 6, "verify": 16})
    candidates = found_by(report).candidates
    counts = {c.measured.samples for c in candidates if c.measured}
    assert counts == {4, 16}
    (outcome,) = found_by(report).outcomes
    assert outcome.chosen.measured is not None
    assert outcome.chosen.measured.samples == 16
    assert all(errors.samples == 16 for errors in outcome.reported.values())
    assert "Errors are of 16 samples, or of 4" in words(report)


def test_no_sample_of_a_candidate_is_drawn_twice(bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was judged at first sight is judged by the other samples later, and the errors are those of all in one go."""
    drawn: list[tuple[str, int]] = []
    sample_by = judging.sample_by

    def counted(model: Any, labels: Tensor, sampler: Sampler, schedule: Any, batch: int, world: Any, on: Any, first: int = 0) -> Any:
        what = f"{sampler.seed} {sampler.steps} {schedule if isinstance(schedule, str) else schedule.to_json()}"
        drawn.extend((what, first + place) for place in range(len(labels)))
        return sample_by(model, labels, sampler, schedule, batch, world, on, first)

    monkeypatch.setattr(judging, "sample_by", counted)
    path = bundle()
    report = calibrate(path, budget=0.75, **QUICK | {"steps": 6, "verify": 16})
    assert len(drawn) == len(set(drawn)) > 100
    (best,) = (outcome.chosen for outcome in found_by(report).outcomes)
    model, seed = bundles.load_bundle(path), 2**33 + 1
    labels = spread_labels(10, 16, seed)
    student, teacher = (sample(model, labels, steps=6, seed=seed, schedule=schedule) for schedule in (best.schedule, SOFTMAX))
    assert best.measured is not None
    assert best.measured.geometric == pytest.approx(Errors.of(student, teacher).geometric, rel=1e-4)


def test_what_is_predicted_to_be_far_behind_is_not_sampled_but_baselines_are(
    bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "FAR", 0.0)
    report = calibrate(bundle(), budget=0.9, **QUICK | {"steps": 8, "solver": "sde"})
    found = found_by(report)
    sampled = {candidate.kind for candidate in found.candidates if candidate.measured}
    assert sampled <= set(BASELINES)
    assert {candidate.kind for candidate in found.candidates} >= {PER_CELL, PER_STEP, RULE, FEWER, WHOLE}
    assert found.outcomes[0].chosen.kind in BASELINES
    assert not list((report.bundle / "calibration").glob("rule-*"))  # nor is it run on the trajectories
    far = sum(candidate.measured is None for candidate in found.candidates)
    assert f"{far} more were not sampled" in words(report)


def test_narrow_mlps_save_by_themselves(bundle: Callable[..., Path]) -> None:
    settings = MediatorSettings((4,), mlp_widths=(8, 4))
    path = bundle(tiny_model(settings, channels=1, learn_sigma=False))
    report = calibrate(path, budget=0.7, **QUICK | {"kinds": ("mlps",)})
    schedule = found_by(report).outcomes[0].schedule
    assert schedule.used <= {SOFTMAX, "softmax|1/8", "softmax|1/4"}
    assert schedule.used != {SOFTMAX}
    assert "MLP 1/8, MLP 1/4" in words(report)
    model = bundles.load_bundle(path)
    whole = sample(model, [1, 2], steps=4, schedule=SOFTMAX)
    assert not torch.equal(sample(model, [1, 2], steps=4), whole)


# --- the command ---------------------------------------------------------------------------------------------------------------


@NUMPY_2
@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
@pytest.mark.parametrize(("family", "solver"), SAMPLERS)
def test_a_schedule_within_the_budget_for_every_sampler(bundle: Callable[..., Path], family: str, solver: str, cfg_scale: float) -> None:
    path = bundle(model_of(family))
    report = calibrate(path, budget=0.9, solver=solver, cfg_scale=cfg_scale, **QUICK)
    model = bundles.load_bundle(path)
    assert model.schedule is not None
    sampler = Sampler.resolve(model.arch, solver=solver, steps=4, cfg_scale=cfg_scale)
    whole = sampler.flops(model.arch, SOFTMAX, None)
    (outcome,) = found_by(report).outcomes
    sampler = replace(sampler, steps=outcome.chosen.steps)
    spent = sampler.flops(model.arch, model.schedule, SETTINGS)
    assert whole
    assert spent
    assert spent <= 0.9 * whole
    assert outcome.chosen.share == pytest.approx(spent / whole)
    fitting = [candidate for candidate in found_by(report).candidates if candidate.share <= 0.9]
    assert outcome.chosen.error == min(candidate.error for candidate in fitting if candidate.kind != FEWER)
    # It works at other steps too, and its cost is stated there.
    assert replace(sampler, steps=9).flops(model.arch, model.schedule, SETTINGS)
    assert sample(model, [1, 2], solver=solver, steps=9, cfg_scale=cfg_scale).isfinite().all()


def test_the_measured_error_is_that_of_whole_samples_from_held_out_noise(bundle: Callable[..., Path]) -> None:
    path = bundle()
    report = calibrate(path, budget=0.9, **QUICK)
    (outcome,) = found_by(report).outcomes
    model = bundles.load_bundle(path)
    seed = 2**33 + 1
    labels = spread_labels(10, 3, seed)
    assert len(set(spread_labels(10, 10, seed).tolist())) == 10
    teacher, student = (sample(model, labels, steps=4, seed=seed, schedule=level) for level in (SOFTMAX, None))
    assert outcome.chosen.steps == 4
    assert outcome.chosen.measured is not None
    assert outcome.chosen.measured.mean == pytest.approx(Errors.of(student, teacher).mean, rel=1e-4)
    assert outcome.chosen.measured.mean > 0
    assert report.sampler.seed == 2**33


def test_one_schedule_per_budget_the_wanted_one_in_use(bundle: Callable[..., Path]) -> None:
    path = bundle()
    report = calibrate(path, budget="90%", budgets=("0.95", 0.985), **QUICK)
    assert sorted(file.name for file in (path / "schedules").iterdir()) == ["0.90.json", "0.95.json", "0.985.json"]
    assert (path / "schedule.json").read_text() == (path / "schedules" / "0.90.json").read_text()
    errors = {outcome.budget: outcome.chosen.error for outcome in found_by(report).outcomes}
    assert errors[0.9] >= errors[0.95] >= errors[0.985]
    content = json.loads((path / "schedule.json").read_text())
    assert content["budget"] == 0.9
    assert content["relative_cost"] <= 0.9
    how = {"solver": "euler", "steps": 4, "cfg_scale": 1.0, "cfg_channels": 3, "cfg_interval": [0.0, 1.0]}
    assert content["calibrated_for"] == how | {"timestep_shift": 1.0, "seed": None}
    for outcome in found_by(report).outcomes:
        assert bundles.read_schedule_file(report.files[outcome.budget], model_of().arch, SETTINGS) == outcome.schedule
    for name in ("schedule-0.90.png", "sensitivity.png", "candidates.png"):
        with Image.open(path / "calibration" / name) as picture:
            assert min(picture.size) > 200
    text = words(report)
    assert "predicted" in text
    assert "warning: never finetuned" in text
    assert "m=4" in text
    assert json.loads(json.dumps(facts(report)))["schedules"][0]["measured_error"]["geometric"] == errors[0.9]
    assert json.loads((path / bundles.LOG_FILE).read_text().splitlines()[-1])["command"] == "calibrate"


def test_another_budget_measures_nothing_again(bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = bundle()
    first = calibrate(path, budget=0.9, **QUICK)
    assert found_by(first).table_seconds is not None

    def never(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(tables, "probe", never)
    monkeypatch.setattr(tables, "adjoint_products", never)
    second = calibrate(path, budget=0.95, **QUICK)
    assert found_by(second).table_seconds is None
    assert found_by(second).outcomes[0].solved_seconds < 5
    assert [line for line in words(second).splitlines() if "was there from before" in line]
    monkeypatch.setattr(judging, "sample_many", never)  # whole samples of the same schedules neither
    again = calibrate(path, budgets=(0.9,), force=True, **QUICK)
    assert found_by(again).outcomes[0].chosen.measured == found_by(first).outcomes[0].chosen.measured


def test_some_candidates_have_one_level_for_all_layers_of_a_step(bundle: Callable[..., Path]) -> None:
    report = calibrate(bundle(), budget=0.9, **QUICK)
    kinds = {kind: [c.schedule for c in found_by(report).candidates if c.kind == kind] for kind in (PER_STEP, PER_CELL)}
    alike = {kind: [len(set(pattern)) == 1 for own in schedules for pattern in own.patterns] for kind, schedules in kinds.items()}
    assert alike[PER_STEP] and all(alike[PER_STEP])
    assert alike[PER_CELL] and not all(alike[PER_CELL])


def test_latency_is_solved_for_and_measured(bundle: Callable[..., Path], clock: Clock) -> None:
    """Level 4 is the slowest here: time decides, and whole batches take what single layers predict."""
    path = bundle()
    report = calibrate(path, budget=0.6, cost="latency", **QUICK)
    assert (path / "schedules" / "latency-0.60.json").exists()
    (outcome,) = found_by(report).outcomes
    took = outcome.latency
    assert took is not None
    assert took.measured_softmax == 4 * (3 * 5 + 2)
    assert took.measured == pytest.approx(took.predicted)
    assert took.measured <= 0.6 * took.measured_softmax
    assert outcome.chosen.share == pytest.approx(took.measured / took.measured_softmax)
    assert outcome.schedule.used == {1, SOFTMAX}
    assert "predicted" in words(report).splitlines()[-2]


def test_the_prediction_is_trusted_without_held_out_samples(bundle: Callable[..., Path]) -> None:
    report = calibrate(bundle(), budget=0.9, **QUICK | {"verify": 0})
    assert all(candidate.measured is None for candidate in found_by(report).candidates)
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


def test_two_processes_calibrate_as_one_does(bundle: Callable[..., Path]) -> None:
    """Each follows some of the trajectories. Of the one sample, the first process has none."""
    alone, two = bundle(name="alone"), bundle(name="two")
    quick = QUICK | {"verify": 1}
    calibrate(alone, budgets=(0.9, 0.75), **quick)
    printed = in_two_processes("calibrate", two, budgets=(0.9, 0.75), **quick)
    assert printed.count("The whole command took") == 1
    first, second = without_times(alone), without_times(two)
    assert first.keys() == second.keys()
    for name in ("schedule.json", "schedules/0.90.json", "schedules/0.75.json"):
        schedules = [json.loads(files[name]) for files in (first, second)]
        assert schedules[0]["pieces"] == schedules[1]["pieces"]
    (judged, reported) = (name for name in first if Path(name).name.startswith("errors-"))
    for name in (judged, reported):
        errors = [json.loads(files[name]) for files in (first, second)]
        assert errors[0].keys() == errors[1].keys()
        for key, values in errors[0].items():
            assert errors[1][key] == pytest.approx(values, rel=1e-4, abs=1e-6)
    tables = [load_file(path / "calibration" / "sensitivity.safetensors") for path in (alone, two)]
    for name, values in tables[0].items():
        torch.testing.assert_close(tables[1][name], values, rtol=1e-3, atol=1e-5, msg=name)


def test_times_are_measured_by_one_process_alone(bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"processes that disturb each other.*--cost latency in one process"):
        calibrate(bundle(), budget=0.9, cost="latency", **QUICK)


def test_finished_trajectories_are_not_measured_again_after_a_kill(bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = bundle()
    measured: list[list[int]] = []

    def until(count: int) -> Callable[..., Products]:
        def measure(model: Any, sampler: Any, probes: Any, rows: Tensor, *rest: Any) -> Products:
            if len(measured) == count:
                raise KeyboardInterrupt
            measured.append(rows.tolist())
            return adjoint_products(model, sampler, probes, rows, *rest)

        return measure

    monkeypatch.setattr(tables, "adjoint_products", until(1))
    with pytest.raises(KeyboardInterrupt):
        calibrate(path, budget=0.9, **QUICK)
    assert not (path / "schedule.json").exists()
    monkeypatch.setattr(tables, "adjoint_products", until(99))
    monkeypatch.setattr(tables, "probe", None)
    calibrate(path, budget=0.9, **QUICK)
    assert measured == [[0, 1], [2]]
    assert not list((path / "calibration").glob("part-*"))


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
    assert found_by(report).table_seconds is not None
    assert report.notes == ()


# --- refusals ------------------------------------------------------------------------------------------------------------------


def test_a_budget_out_of_reach_says_what_can_be_reached_and_what_would_widen_it(bundle: Callable[..., Path]) -> None:
    path = bundle()
    least = cost.forward_flops(model_of().arch, 1, SETTINGS) / cost.forward_flops(model_of().arch)
    with pytest.raises(UserError) as caught:
        calibrate(path, budgets=(0.9, 0.3), **QUICK)
    text = f"{path}: can go down to {least:.1%} of softmax's FLOPs with mediators and levels m=1, m=4; you asked for 30.0%."
    assert caught.value.message == text
    assert "leave --kinds out" in caught.value.hint
    assert "smaller --levels" not in caught.value.hint  # 1 is the smallest
    assert not (path / "calibration").exists()
    coarse = bundle(tiny_model(MediatorSettings((4,), local_rank=0)), name="coarse")
    with pytest.raises(UserError, match="smaller --levels"):
        calibrate(coarse, budget=0.3, **QUICK)
    with pytest.raises(UserError, match=r"you asked for 1\.0%\..* Or ask for 70\.8%"):
        calibrate(path, budget=0.01, **QUICK)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no budget was given"),
        ({"budget": "lots"}, "'lots' is no budget"),
        ({"budget": 75.0}, "75.0 is no share"),
        ({"budget": "0%"}, "0% is no share"),
        ({"budget": 0.9, "solver": "dopri5"}, "as many steps as it needs"),
        ({"budget": 0.9, "solver": "ddim"}, "not one for a SIT"),
        ({"budget": 0.9, "trajectories": 0}, "--trajectories 0"),
        ({"budget": 0.9, "verify": -1}, "--verify -1"),
        ({"budget": 0.9, "steps": 0}, "0 steps"),
        ({"budget": 0.9, "cfg_interval": (0.7, 0.2)}, "No noise level is in the interval"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(bundle: Callable[..., Path], arguments: dict[str, Any], message: str) -> None:
    path = bundle()
    before = without_times(path)
    with pytest.raises(UserError, match=message):
        calibrate(path, **{"device": "cpu", "kinds": ("mediators",), **arguments})
    assert without_times(path) == before


def test_guidance_without_a_null_class_and_files_that_are_not_there_are_refused(bundle: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no null class"):
        calibrate(bundle(model_of(null_class=False)), budget=0.9, cfg_scale=2.0, **QUICK)
    with pytest.raises(UserError, match="no such file or folder"):
        calibrate(tmp_path / "nowhere", budget=0.9)
    torch.save(official_state(tiny_model()), tmp_path / "model.pt")
    with pytest.raises(UserError, match="is no bundle"):
        calibrate(tmp_path / "model.pt", budget=0.9, kinds=("mediators",))


def test_a_schedule_is_replaced_only_by_force_and_a_dry_run_writes_nothing(bundle: Callable[..., Path]) -> None:
    path = bundle()
    before = without_times(path)
    dry = calibrate(path, budget=0.9, dry_run=True, **QUICK)
    assert dry.estimated_seconds
    wider = calibrate(path, budget=0.9, dry_run=True, **QUICK | {"batch": 3})
    assert dry.estimated_bytes and wider.estimated_bytes and dry.estimated_bytes < wider.estimated_bytes
    assert re.search(r"up to \d\.\d GiB\. Nothing was written", words(dry))
    assert without_times(path) == before
    calibrate(path, budget=0.9, **QUICK)
    with pytest.raises(UserError, match=r"0\.90\.json: exists"):
        calibrate(path, budget="90%", **QUICK)
    calibrate(path, budget=0.9, force=True, **QUICK)


def test_a_schedule_of_another_family_depth_or_bundle_is_refused(bundle: Callable[..., Path]) -> None:
    narrow = bundle(tiny_model(MediatorSettings((4,), mlp_widths=(8, 4)), channels=1, learn_sigma=False), name="narrow")
    calibrate(narrow, budget=0.7, **QUICK | {"kinds": ("mlps",)})
    others = {
        "was calibrated for euler, which does not sample a DIT": model_of("dit"),
        "is for 3 layers, the model has 2": model_of(depth=2),
        "schedule.json: Layer 0 has no level 1/.* Calibrate again": model_of(),
    }
    for number, (message, model) in enumerate(others.items()):
        other = bundle(model, name=str(number))
        (other / "schedule.json").write_text((narrow / "schedule.json").read_text())
        with pytest.raises(UserError, match=message):
            bundles.load_bundle(other)


def test_the_same_seed_gives_the_same_schedule_and_another_seed_other_trajectories(bundle: Callable[..., Path]) -> None:
    first, second, third = (bundle(name=name) for name in ("first", "second", "third"))
    for path, seed in ((first, 3), (second, 3), (third, 4)):
        random.seed(seed * 7 + 1)  # global generators do not matter
        torch.manual_seed(len(path.name))
        calibrate(path, budget=0.9, seed=seed, **QUICK)
    assert without_times(first) == without_times(second)
    table = "calibration/sensitivity.safetensors"
    assert without_times(first)[table] != without_times(third)[table]


# --- the step-wise rule --------------------------------------------------------------------------------------------------------

BY_RULE: dict[str, Any] = QUICK | {"steps": 12, "solver": "sde", "rule": "latent-change"}


def test_a_rule_keeps_its_budget_by_what_it_really_spends_where_it_was_tuned(bundle: Callable[..., Path]) -> None:
    path = bundle()
    report = calibrate(path, budget=0.85, **BY_RULE)
    (outcome,) = found_by(report).outcomes
    schedule, model = outcome.schedule, bundles.load_bundle(path)
    assert isinstance(schedule, RuleSchedule)
    assert model.schedule == schedule
    assert [file.name for file in (path / "schedules").iterdir()] == ["rule-0.85.json"]

    labels = spread_labels(model.arch.classes, 3, report.sampler.seed)
    drive = driver_of(model, report.sampler, schedule, 3)
    assert isinstance(drive, Switcher)
    sample_batch(model, labels, report.sampler, drive=drive)  # together; it was tuned two at a time
    assert tuple(map(tuple, drive.switches.tolist())) == outcome.chosen.switches
    assert (drive.switches >= schedule.rule.earliest).any()
    spent = flops_by_rule(schedule.rule, [model] * len(schedule.rule.levels), report.sampler, drive.switches)
    whole = report.sampler.flops(model.arch, SOFTMAX, None)
    assert whole is not None
    assert outcome.chosen.share == pytest.approx(spent / whole / 3)
    assert outcome.chosen.share <= 0.85

    held_out = replace(report.sampler, seed=seed_for(0, "reported calibration"))
    labels = spread_labels(model.arch.classes, 3, held_out.seed)
    drawn = [sample_many(model, labels, held_out, levels, 2) for levels in (schedule, SOFTMAX)]
    own = outcome.reported[outcome.chosen.name]
    assert own.median == pytest.approx(Errors.of(*drawn).median)
    told, found = words(report), facts(report)["schedules"][0]
    assert "beside it, " in told
    assert f"{own.share:.2%} of softmax's FLOPs" in told
    assert all(line in told for line in began_in_words(schedule.began(outcome.chosen.switches), 3))
    assert found["rule"] == schedule.to_json()["rule"]
    assert [each["stage"] for each in found["switched"]] == [title(level) for level in schedule.rule.levels[1:]]
    with pytest.raises(UserError, match=r"rule-0\.85\.json: exists"):
        calibrate(path, budget=0.85, **BY_RULE)


def test_what_a_rule_spends_is_told_wherever_it_samples(bundle: Callable[..., Path], tmp_path: Path) -> None:
    path = bundle()
    calibrate(path, budget=0.85, **BY_RULE)
    model = bundles.load_bundle(path)
    assert isinstance(model.schedule, RuleSchedule)
    how: dict[str, Any] = {"steps": 12, "solver": "sde", "device": "cpu", "batch": 4}
    drawn = sample_stage(str(path), out=tmp_path / "a.npz", **how)
    assert drawn.stages == tuple(map(title, model.schedule.rule.levels))
    found = evaluate(str(path), tmp_path / "report", features="none", samples=10, pairs=2, timing_batch=2, **how)
    row = found.comparison.results[1]
    assert row.flops == drawn.flops / 10  # of the same samples
    assert row.began == model.schedule.began(drawn.switches)
    assert row.relative_time is not None
    assert "schedule (step-wise rule)" in evaluation.words(found)
    assert evaluation.rules(found)[0] in (tmp_path / "report" / "report.md").read_text()

    fixed = tmp_path / "fixed.json"
    fixed.write_text(json.dumps(Schedule((), ((4,) * 3,)).to_json()))
    other = sample_stage(str(path), out=tmp_path / "b.npz", schedule=fixed, **how)
    same = sample_stage(str(path), out=tmp_path / "c.npz", level=4, **how)
    assert other.flops == same.flops != drawn.flops
    assert (tmp_path / "b.npz").read_bytes() == (tmp_path / "c.npz").read_bytes()
    again = sample_stage(str(path), out=tmp_path / "d.npz", schedule=path / "schedules" / "rule-0.85.json", **how)
    assert again.switches == drawn.switches
    for more in ({"level": 4}, {"switch": "mean-absolute"}):
        with pytest.raises(UserError, match="--schedule says what runs"):
            sample_stage(str(path), out=tmp_path / "e.npz", schedule=fixed, **how, **more)  # type: ignore[arg-type]


def test_the_rule_competes_in_every_table_and_is_tried_once(bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = bundle()
    report = calibrate(path, budget=0.9, **QUICK | {"steps": 8, "solver": "sde"})
    rules = [candidate for candidate in found_by(report).candidates if candidate.kind == RULE]
    assert 0 < len(rules) <= MOST_RULES
    assert all(isinstance(rule.schedule, RuleSchedule) and rule.share <= 0.9 for rule in rules)
    (row,) = [line for line in words(report).splitlines() if line.startswith(RULE)]
    assert "first " in row
    assert all(candidate.kind == RULE for candidate in found_by(report).candidates if isinstance(candidate.schedule, RuleSchedule))
    monkeypatch.setattr(judging, "sample_by", None)
    repeated = calibrate(path, budget=0.9, force=True, **QUICK | {"steps": 8, "solver": "sde"})
    assert [c.measured for c in found_by(repeated).candidates] == [c.measured for c in found_by(report).candidates]


def test_heun_switches_between_steps_and_a_guided_rule_counts_its_rows(bundle: Callable[..., Path]) -> None:
    path = bundle()
    how: dict[str, Any] = {"solver": "heun", "cfg_scale": 2.0, "cfg_interval": (0.2, 0.9), "steps": 7}
    report = calibrate(path, budget=0.9, rule="latent-change", **QUICK | how)
    (outcome,) = found_by(report).outcomes
    assert isinstance(outcome.schedule, RuleSchedule)
    model, switches = bundles.load_bundle(path), torch.tensor(outcome.chosen.switches)
    spent = flops_by_rule(outcome.schedule.rule, [model] * len(outcome.schedule.rule.levels), report.sampler, switches)
    whole = report.sampler.flops(model.arch, SOFTMAX, None)
    assert whole is not None
    assert outcome.chosen.share == pytest.approx(spent / whole / 3)
    assert outcome.chosen.share <= 0.9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solver": "dopri5"}, "a rule needs a fixed number"),
        ({"budget": 0.1}, r"can go down to .* with mediators"),
        ({"steps": 3}, "In 3 steps there is no time for a rule to switch"),
    ],
)
def test_rules_that_cannot_be_found_are_refused(bundle: Callable[..., Path], changes: dict[str, Any], message: str) -> None:
    path = bundle()
    with pytest.raises(UserError, match=message) as caught:
        calibrate(path, **{"budget": 0.9} | BY_RULE | changes)
    assert str(path) in caught.value.message or "dopri5" in caught.value.message
    assert "\n" not in caught.value.message
    assert not (path / "schedule.json").exists() and not (path / "schedules").exists()


def test_a_budget_that_no_rule_reaches_says_what_rules_reach(bundle: Callable[..., Path]) -> None:
    """Just above the cheapest level, which a rule leaves at some step."""
    path = bundle()
    least = cost.forward_flops(model_of().arch, 1, SETTINGS) / cost.forward_flops(model_of().arch)
    with pytest.raises(UserError, match=r"No rule was found for a budget of .*: on these trajectories rules spend \d") as caught:
        calibrate(path, budget=least + 1e-4, **BY_RULE)
    assert str(path) in caught.value.message
    assert not (path / "schedule.json").exists()
