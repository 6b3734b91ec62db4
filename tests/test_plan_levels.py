"""Plans beyond a checkpoint: levels within them, bundles that carry them, and judges that take them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import relative_error, tiny_model

import mediatorize as mz
from mediatorize.compression.costs import COSTS
from mediatorize.devices import ALONE
from mediatorize.diffusion.plan import Plan
from mediatorize.diffusion.planned import plan_flops, sample_by_plan
from mediatorize.diffusion.sampling import GuidedModel, PlanSampler, first_state
from mediatorize.export import pipelines, scheduler
from mediatorize.export.contract import Subject
from mediatorize.formats import bundle as bundles
from mediatorize.formats.plans import read_plans, write_plans
from mediatorize.model.cost import forward_flops
from mediatorize.model.levels import SOFTMAX, MediatorSettings
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.planning.fit import analytic
from mediatorize.planning.levels import LevelTable, counts_for, with_levels
from mediatorize.report import plans as told
from mediatorize.stages.calibrate import calibrate
from mediatorize.stages.compare import compare
from mediatorize.stages.export import export
from mediatorize.stages.plans import level_table, wanted_of
from mediatorize.stages.sample import sample as sample_stage

SETTINGS = MediatorSettings((1, 4), local_rank=3)
LABELS = torch.tensor([1, 5, 7])


def model_of(family: str = "sit", **changes: Any) -> DiffusionTransformer:
    """Mediators in two of three layers, of attention that is a small part of the rest."""
    model = tiny_model(replace(SETTINGS, layers=(0, 2)), family=family, channels=1, learn_sigma=family == "dit", **changes)
    for block in model.layers():
        for parameter in [*block.attn.proj.parameters(), *([] if block.attn.mediator is None else block.attn.mediated().proj.parameters())]:
            parameter.data *= 0.01
    return model


def plan_for(model: DiffusionTransformer, calls: int = 3, cfg_scale: float = 1.0) -> Plan:
    wanted = wanted_of(model.arch, {"cfg_scale": cfg_scale})
    return analytic(wanted.plan(wanted.times(calls, 1.0, 1.4)), wanted.shape)


def bundle_at(path: Path, model: DiffusionTransformer, *plans: Plan) -> Path:
    assert model.settings is not None
    path.mkdir()
    config = bundles.BundleConfig(model.arch, model.settings, bundles.Origin("model.pt", "official", "", "0" * 64))
    bundles.write_bundle(path, model, config, "card")
    bundles.append_log(path, "convert", {}, {})
    if plans:
        write_plans(path / "plan.json", {len(plan.calls): plan for plan in plans})
    return path


# --- levels --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
@pytest.mark.parametrize("family", ["sit", "dit"])
def test_a_plan_in_a_samplers_place_samples_the_same(family: str, cfg_scale: float) -> None:
    model = model_of(family)
    plan = plan_for(model, cfg_scale=cfg_scale)
    sampler = PlanSampler.of(plan, seed=3)
    labels, noise = first_state(model, LABELS, 3)
    guided = GuidedModel(model, labels, sampler)
    with torch.no_grad():
        found = sampler.run(lambda x, t: guided.output(model(*guided.inputs(x, t))), noise, lambda count: noise)
    assert relative_error(found, sample_by_plan(model, labels, plan, noise)) < 1e-5
    assert sampler.rows_of_calls(model.arch) == [1 if cfg_scale == 1 else 2] * 3


@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
@pytest.mark.parametrize("family", ["sit", "dit"])
def test_the_table_says_what_a_level_in_one_call_and_layer_does_to_samples(family: str, cfg_scale: float) -> None:
    model, count = model_of(family), 8
    plan = plan_for(model, cfg_scale=cfg_scale)
    labels, noise = first_state(model, torch.arange(count) % 10, 3)
    call_costs = COSTS["flops"].measure(model, model.added(), 1, 1)
    table = level_table(model, labels, 3, call_costs, 6, ALONE, plan)
    expected = sample_by_plan(model, labels, plan, noise)
    found, predicted = [], []
    for call, layer, option in itertools.product(range(3), (0, 2), (0, 1)):
        levels = [SOFTMAX, SOFTMAX, SOFTMAX]
        levels[layer] = table.options[layer][option]  # type: ignore[call-overload]
        calls = list(plan.calls)
        calls[call] = replace(calls[call], levels=tuple(levels))
        changed = sample_by_plan(model, labels, replace(plan, calls=tuple(calls)), noise) - expected
        found.append(float((changed.flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).square().mean()))
        predicted.append(float(table.squares[call, layer, option]))
    ratios = np.log(np.array(predicted) / np.array(found))
    assert abs(ratios.mean()) < 0.4  # four random directions stand for all
    assert ratios.std() < 0.6
    assert table.options[1] == (SOFTMAX,) * 3
    assert not table.squares[:, 1].any()
    full = call_costs.rest + 3 * call_costs.block(SOFTMAX)
    assert table.rest + table.costs[:, :, -1].sum() == full * sum(plan.rows) == plan_flops(model.arch, plan, model.settings)


@pytest.mark.parametrize("seed", range(5))
def test_levels_are_the_best_of_all_that_keep_the_price(seed: int) -> None:
    random = np.random.default_rng(seed)
    squares = random.random((3, 2, 3))
    squares[:, :, 2] = 0
    costs = np.sort(random.integers(1, 20, (3, 2, 3)), axis=2)
    table = LevelTable(options=((1, 4, SOFTMAX),) * 2, squares=squares, costs=costs, rest=7)
    plan = plan_for(model_of())
    room = 7 + int(costs.min(2).sum() + costs.max(2).sum()) // 2
    found = with_levels(plan, table, room)
    assert found is not None
    choice = [[table.options[0].index(level) for level in call.levels or ()] for call in found.calls]

    def price_and_error(options: Any) -> tuple[int, float]:
        picked = np.array(options).reshape(3, 2)
        calls, layers = np.indices((3, 2))
        return 7 + int(costs[calls, layers, picked].sum()), float(squares[calls, layers, picked].sum())

    every = (price_and_error(options) for options in itertools.product(range(3), repeat=6))
    price, error = price_and_error(choice)
    assert price <= room
    assert error == pytest.approx(min(error for price, error in every if price <= room))


def test_with_room_for_softmax_everything_runs_in_full_and_with_too_little_nothing_is_found() -> None:
    costs = np.tile([2, 3, 5], (3, 3, 1))
    table = LevelTable(options=((1, 4, SOFTMAX),) * 3, squares=costs.max() - costs.astype(float), costs=costs, rest=10)
    plan = plan_for(model_of())
    whole = with_levels(plan, table, 10 + 45)
    assert whole is not None
    assert {level for call in whole.calls for level in call.levels or ()} == {SOFTMAX}
    assert with_levels(plan, table, 10 + 17) is None
    assert with_levels(plan, table, 10 + 18) is not None


def test_more_calls_are_tried_for_one_price() -> None:
    assert counts_for(4) == [5, 6]
    assert counts_for(8) == [10, 12]
    assert 2 not in counts_for(2)


@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
def test_a_plan_with_levels_calls_the_model_at_them(cfg_scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    plan = plan_for(model, cfg_scale=cfg_scale)
    levels: list[Any] = [(1, SOFTMAX, 4), None, (SOFTMAX, SOFTMAX, 1)]
    mixed = replace(plan, calls=tuple(replace(call, levels=own) for call, own in zip(plan.calls, levels, strict=True)))
    seen: list[Any] = []
    real = DiffusionTransformer.forward

    def forward(self: DiffusionTransformer, x: Any, t: Any, y: Any, levels: Any = SOFTMAX, memory: Any = None) -> Any:
        seen.append((levels, len(x)))
        return real(self, x, t, y, levels, memory)

    monkeypatch.setattr(DiffusionTransformer, "forward", forward)
    mz.sample(model, LABELS, plan=mixed)
    rows = 1 if cfg_scale == 1 else 2
    assert seen == [((1, SOFTMAX, 4), 3 * rows), (SOFTMAX, 3 * rows), ((SOFTMAX, SOFTMAX, 1), 3 * rows)]
    spent = sum(forward_flops(model.arch, own or SOFTMAX, model.settings) for own in levels) * rows
    assert plan_flops(model.arch, mixed, model.settings) == spent


def test_a_budget_of_a_bundle_tries_levels_and_a_number_of_calls_does_not(tmp_path: Path) -> None:
    tiny = tiny_model(MediatorSettings((1,)), learn_sigma=False, channels=1, grid=(8, 8), depth=2)
    path = bundle_at(tmp_path / "bundle", tiny)
    quick: dict[str, Any] = {"samples": 4, "verify": 2, "device": "cpu"}
    by_budget = calibrate(path, budget=0.08, **quick)
    (found,) = by_budget.plans.found.values()  # type: ignore[union-attr]
    assert "5 calls at cheaper levels" in found.stages
    (plan,) = read_plans(path / "plan.json").values()
    model = mz.load_model(path)
    share = plan_flops(model.arch, plan, model.settings) / (50 * forward_flops(model.arch))
    assert share <= 4 / 50 + 1e-9
    assert told.facts(by_budget)["plans"][0]["share"] == pytest.approx(share)  # type: ignore[arg-type]
    tried = {name: error for name, error in found.stages.items() if name.endswith("levels")}
    full = [error for name, error in found.stages.items() if name not in tried][-1]
    assert (len(plan.calls) > 4) == (min(tried.values()) < full)
    by_calls = calibrate(path, calls=(4,), force=True, **quick)
    assert not any("levels" in name for name in by_calls.plans.found[4].stages)  # type: ignore[union-attr]


def test_sample_warns_where_the_weights_of_a_plans_levels_have_changed(tmp_path: Path) -> None:
    model = model_of()
    plan = plan_for(model)
    added = bundles.hash_of_tensors({name: value.data for name, value in model.mediator_parameters().items()})
    mixed = replace(plan, calls=(replace(plan.calls[0], levels=(4, SOFTMAX, 4)), *plan.calls[1:]), made_for={"added": added})
    path = bundle_at(tmp_path / "bundle", model, mixed)
    same = sample_stage(str(path), out=tmp_path / "a.png", classes=(1,), device="cpu")
    assert same.warnings == ()
    for parameter in model.mediator_parameters().values():
        parameter.data += 0.01
    other = bundle_at(tmp_path / "other", model, mixed)
    changed = sample_stage(str(other), out=tmp_path / "b.png", classes=(1,), device="cpu")
    assert changed.warnings == ("the weights of the levels have changed since the plan was fitted: run `mediatorize calibrate` again",)


# --- exports -------------------------------------------------------------------------------------------------------------------


def test_an_exported_pipeline_samples_by_the_bundles_plan(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    model = model_of("dit")
    plans = [plan_for(model, calls, cfg_scale=2.5) for calls in (3, 5)]
    path = bundle_at(tmp_path / "bundle", model, *plans)
    result = export(path, tmp_path / "out", to="diffusers")
    assert result.plans == (3, 5)  # type: ignore[union-attr]
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    labels, noise = first_state(model, LABELS, 0)
    for plan, how in ((plans[1], {}), (plans[0], {"num_inference_steps": 3, "guidance_scale": 2.5})):
        found = pipe(labels.tolist(), latents=noise, output_type="latent", **how).images
        assert relative_error(found, mz.sample(model, labels, plan=plan, noise=noise)) < 1e-5
    with pytest.raises(ValueError, match=r"The plan is for guidance 2\.5: leave guidance_scale out"):
        pipe(labels.tolist(), guidance_scale=4.0)
    with pytest.raises(ValueError, match="There is no plan of 7 calls: pass num_inference_steps of 3, 5"):
        pipe(labels.tolist(), num_inference_steps=7)


@pytest.mark.parametrize("to", ["safetensors", "torch-export"])
def test_plans_travel_with_other_exports(to: str, tmp_path: Path) -> None:
    model = model_of()
    path = bundle_at(tmp_path / "bundle", model, plan_for(model))
    export(path, tmp_path / "out", to=to)
    assert (tmp_path / "out" / "plan.json").read_bytes() == (path / "plan.json").read_bytes()


def test_plans_stay_behind_where_another_level_is_asked_for(tmp_path: Path) -> None:
    model = model_of()
    path = bundle_at(tmp_path / "bundle", model, plan_for(model))
    result = export(path, tmp_path / "out", to="diffusers", level=4)
    assert result.plans == ()  # type: ignore[union-attr]
    assert not list((tmp_path / "out").rglob(f"{scheduler.CODE}.py"))


def test_a_plan_with_levels_stays_behind_in_a_pipeline() -> None:
    model = model_of()
    plan = plan_for(model)
    mixed = replace(plan, calls=(replace(plan.calls[0], levels=(4, SOFTMAX, 4)), *plan.calls[1:]))
    assert scheduler.travels({3: plan})
    assert not scheduler.travels({3: plan, 4: mixed})
    assert not scheduler.travels({})
    assert pipelines.suits_stock_pipeline(model.arch, None) is False
    assert Subject(None, model).plans == {}  # type: ignore[arg-type]


# --- compare -------------------------------------------------------------------------------------------------------------------


def test_compare_has_a_row_for_every_plan_of_the_first_model(tmp_path: Path) -> None:
    from mediatorize.evaluation.digits import digit_classifier

    model = tiny_model(SETTINGS, family="sit", learn_sigma=False, channels=1, grid=(8, 8))
    plans = [plan_for(model, calls) for calls in (2, 4)]
    path = bundle_at(tmp_path / "bundle", model, *plans)
    found = compare(str(path), tmp_path / "out", samples=12, steps=8, batch=5, device="cpu")
    assert found is not None
    assert [row.name for row in found.results] == ["bundle", "bundle, plan of 4 calls", "bundle, plan of 2 calls"]
    assert [row.relative_flops for row in found.results] == [1, 0.5, 0.25]
    labels = torch.arange(12) % 10
    drawn = mz.sample(model, labels, plan=plans[1], seed=0)
    assert found.results[1].accuracy == pytest.approx(digit_classifier().accuracy(drawn, labels))
