"""Plans: with a solver's weights a plan is that solver, fits recover what they should, and a file gives back the same plan."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from torch import Tensor

import mediatorize as mz
from mediatorize.diffusion.plan import Bands, Plan, PlanCall, PlanError, Setting, factors, plans_from_text, plans_to_text, run_plan
from mediatorize.diffusion.planned import ModelDenoiser, sample_by_plan
from mediatorize.diffusion.process import TRAIN_STEPS, alphas_cumprod
from mediatorize.errors import UserError
from mediatorize.planning.fit import Batch, analytic, call_at, final_of, fit, fit_in_closed_loop, gauss_newton, middle, nested
from mediatorize.planning.path import FLOW, path_of
from mediatorize.planning.reference import Reference, adams_weights, calls_needed, solve
from mediatorize.planning.search import Wanted, model_rows, plain_setting, search
from mediatorize.randomness import gaussian, spread_labels
from mediatorize.store import InMemory

SHAPE = (1, 8, 8)


def noise_of(count: int, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


class Linear:
    """A linear ODE: the velocity is a fixed matrix times the state, as a model of the flow."""

    def __init__(self, size: int = 64, seed: int = 0, scale: float = 0.8) -> None:
        self.matrix = scale * torch.randn(size, size, generator=torch.Generator().manual_seed(seed)) / size**0.5
        self.rows_of_calls: list[int] = []

    def __call__(self, x: Tensor, t: float, uncond: bool, levels: Any, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        self.rows_of_calls.append(len(x) * (1 + uncond))
        velocity = (x.flatten(1) @ self.matrix.T).view_as(x) * (1 + 0.3 * math.sin(3 * t))
        return velocity, 0.5 * velocity if uncond else None


def batch_of(denoise: Any, wanted: Wanted, count: int, seed: int = 0, calls: int = 200) -> Batch:
    noise, rows = noise_of(count, wanted.shape, seed), torch.arange(count)
    reference = solve(denoise, plain_setting(wanted), wanted.path, lambda u: wanted.cfg_scale != 1, noise, rows, calls, keep=True)
    return Batch(noise=noise, rows=rows, reference=reference)


# --- bands ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8, 8), (4, 5, 7), (3, 2, 6, 10), (2, 3, 3)])
def test_bands_add_up_to_the_state_and_are_orthogonal(shape: tuple[int, ...]) -> None:
    x = noise_of(3, shape).double()
    bands = Bands((0.25, 0.5), shape)
    assert bands.transforms is not None
    bands.transforms = bands.transforms[0].double(), bands.transforms[1].double()
    z = bands.to(x)
    parts = [bands.back(z * (bands.index == b)) for b in range(bands.count)]
    assert torch.allclose(sum(parts), x, atol=1e-6)
    assert all(float((parts[a] * parts[b]).sum().abs() / x.square().sum()) < 1e-6 for a in range(3) for b in range(a))
    assert float((z.square().sum() / x.square().sum() - 1).abs()) < 1e-6


def test_a_constant_picture_is_in_the_lowest_band() -> None:
    bands = Bands((0.25, 0.5), (1, 6, 9))
    z = bands.to(torch.ones(1, 1, 6, 9))
    assert torch.allclose(z * (bands.index != 0), torch.zeros(1), atol=1e-5)


def test_one_band_takes_states_of_any_shape() -> None:
    wanted = Wanted(process="flow", shape=(6,), edges=())
    plan = analytic(wanted.plan([0.0, 0.5]), (6,))
    x = noise_of(2, (6,))
    assert run_plan(plan, lambda x, t, uncond, levels: (x, None), x).shape == x.shape


# --- features ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["noise", "data", "velocity"])
@pytest.mark.parametrize("feature", ["noise", "data", "velocity"])
def test_every_prediction_gives_every_feature(prediction: Any, feature: Any) -> None:
    data, noise = noise_of(2), noise_of(2, seed=1)
    signal, sigma = 0.6, 0.8
    all_three = {"noise": noise, "data": data, "velocity": data - noise}
    p, q = factors(feature, prediction, signal, sigma)
    assert torch.allclose(p * (signal * data + sigma * noise) + q * all_three[prediction], all_three[feature], atol=1e-5)


# --- solvers as plans ----------------------------------------------------------------------------------------------------------


def test_with_eulers_weights_a_plan_is_euler() -> None:
    model = tiny_model(family="sit", learn_sigma=False)
    wanted = Wanted(process="flow", shape=(4, 8, 8))
    plan = analytic(wanted.plan([k / 5 for k in range(5)]), wanted.shape, history=1)
    labels, noise = torch.tensor([1, 2, 3]), noise_of(3, wanted.shape)
    expected = mz.sample(model, labels, solver="euler", steps=5, noise=noise)
    assert torch.allclose(mz.sample(model, labels, plan=plan, noise=noise), expected, atol=1e-6 * float(expected.abs().max()))


def test_with_adams_bashforths_weights_a_plan_is_adams_bashforth() -> None:
    denoise, wanted = Linear(), Wanted(process="flow", shape=SHAPE)
    us, x = [0.0, 0.15, 0.45, 0.7], noise_of(3)
    plan = analytic(wanted.plan(us), SHAPE, history=2, last_order=2)
    batch = Batch(noise=x, rows=torch.arange(3), reference=Reference(*(torch.zeros(0),) * 3, x))
    state, before = x, []
    for k, (u, after) in enumerate(zip(us, [*us[1:], 1.0], strict=True)):
        before.append(denoise(state, u, False, None, batch.rows)[0])
        step, ratio = after - u, 0.0 if k == 0 else (after - u) / (u - us[k - 1]) / 2  # the textbook's variable-step form
        state = state + step * ((1 + ratio) * before[-1] - (ratio * before[-2] if k else 0))
    found = Bands((0.25, 0.5), SHAPE).back(final_of(denoise, plan, batch))
    assert torch.allclose(found, state, atol=1e-6 * float(state.abs().max()))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_with_its_weights_a_plan_is_dpm_solver(guidance: float) -> None:
    """DPM-Solver++ 2M as arXiv 2211.01095, algorithm 2, on predictions of the data, written out here."""
    model = tiny_model(family="dit")
    times = [999.0, 700.0, 400.0, 150.0, 20.0]
    path = path_of("ddpm")
    wanted = Wanted(process="ddpm", shape=(4, 8, 8), feature="data", cfg_scale=guidance, cfg_channels="all")
    us = [(lambda f: f[0] / sum(f))(path.factors(t)) for t in times]
    plan = analytic(wanted.plan(us), wanted.shape)
    labels, noise = torch.tensor([1, 2]), noise_of(2, wanted.shape)
    x, before, steps = noise, None, []
    kept = alphas_cumprod()
    for k, t in enumerate(times):
        signal, sigma = float(kept[int(t)].sqrt()), float((1 - kept[int(t)]).sqrt())
        cond, uncond = ModelDenoiser(model, labels)(x, t, True, None, torch.arange(2))
        data = (x - sigma * (uncond + guidance * (cond - uncond))) / signal
        if k == len(times) - 1:
            x = data
            break
        after = kept[int(times[k + 1])]
        signal2, sigma2 = float(after.sqrt()), float((1 - after).sqrt())
        h = math.log(signal2 / sigma2) - math.log(signal / sigma)
        r = None if before is None else steps[-1] / h
        combined = data if r is None else (1 + 1 / (2 * r)) * data - 1 / (2 * r) * before
        x = sigma2 / sigma * x - signal2 * math.expm1(-h) * combined
        before = data
        steps.append(h)
    found = mz.sample(model, labels, plan=plan, noise=noise)
    assert torch.allclose(found, x, atol=2e-5 * float(x.abs().max()))


def test_adams_weights_integrate_polynomials() -> None:
    places = [0.7, 0.4, 0.1]
    for power in range(3):
        found = sum(w * u**power for w, u in zip(adams_weights(places, 0.7, 1.0), places, strict=True))
        assert found == pytest.approx((1 - 0.7 ** (power + 1)) / (power + 1))


def test_ddpm_path_goes_through_the_steps_and_back() -> None:
    path, kept = path_of("ddpm"), alphas_cumprod()
    for t in (0, 1, 250, 998, TRAIN_STEPS - 1):
        signal, noise = path.factors(float(t))
        assert signal**2 == pytest.approx(float(kept[t]), rel=1e-9)
        assert noise**2 == pytest.approx(1 - float(kept[t]), rel=1e-7)
        assert path.time(signal / (signal + noise)) == pytest.approx(t, abs=1e-5)
    assert path.time(0.5) == pytest.approx(path.time(0.5 + 1e-9), abs=1e-3)


# --- calls ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", ["guided", "halves"])
def test_a_plan_calls_the_model_as_often_as_it_says(streams: Any) -> None:
    denoise = Linear()
    wanted = Wanted(process="flow", shape=SHAPE, cfg_scale=2.0, streams=streams)
    plan = wanted.plan([0.0, 0.3, 0.6, 0.8])
    if streams == "halves":
        plan = replace(plan, calls=tuple(replace(call, uncond=index % 2 == 0) for index, call in enumerate(plan.calls)))
    plan = analytic(plan, SHAPE)
    final_of(denoise, plan, Batch(noise=noise_of(3), rows=torch.arange(3), reference=Reference(*(torch.zeros(0),) * 3, noise_of(3))))
    assert denoise.rows_of_calls == [3 * rows for rows in plan.rows]
    assert plan.rows == ((2, 2, 2, 2) if streams == "guided" else (2, 1, 2, 1))


def test_halves_with_analytic_weights_are_guidance() -> None:
    denoise, us = Linear(), [0.0, 0.2, 0.5, 0.8]
    batch = Batch(noise=noise_of(3), rows=torch.arange(3), reference=Reference(*(torch.zeros(0),) * 3, noise_of(3)))
    ends = []
    for streams in ("guided", "halves"):
        wanted = Wanted(process="flow", shape=SHAPE, cfg_scale=2.5, streams=streams)  # type: ignore[arg-type]
        ends.append(final_of(denoise, analytic(wanted.plan(us), SHAPE), batch))
    assert torch.allclose(*ends, atol=1e-5)


def test_guidance_leaves_other_channels_alone() -> None:
    setting = plain_setting(Wanted(process="flow", shape=(4, 8, 8), cfg_scale=3.0, cfg_channels=2))
    cond, uncond = noise_of(2, (4, 8, 8)), noise_of(2, (4, 8, 8), 1)
    found = setting.bands.back(setting.features(torch.zeros_like(cond), cond, uncond, 0.5, 0.5)["c"])
    assert torch.allclose(found[:, :2], (uncond + 3 * (cond - uncond))[:, :2], atol=1e-5)
    assert torch.allclose(found[:, 2:], cond[:, 2:], atol=1e-5)


def test_calls_outside_the_interval_are_not_guided() -> None:
    wanted = Wanted(process="flow", shape=SHAPE, cfg_scale=2.0, cfg_interval=(0.0, 0.5))
    assert wanted.plan([0.0, 0.4, 0.6, 0.9]).rows == (1, 1, 2, 2)


# --- fits ----------------------------------------------------------------------------------------------------------------------


def test_on_a_linear_ode_of_few_directions_the_fit_is_exact() -> None:
    """The velocity is a number times the state in every band: a combination of state and output reaches the solution."""

    def denoise(x: Tensor, t: float, uncond: bool, levels: Any, rows: Tensor) -> tuple[Tensor, None]:
        return (0.7 + 0.5 * t) * x, None

    wanted = Wanted(process="flow", shape=SHAPE)
    batch, others = batch_of(denoise, wanted, 8, calls=400), batch_of(denoise, wanted, 8, seed=1, calls=400)
    plan = fit(denoise, wanted.plan([0.0, 0.5]), batch, 2)
    assert float(others.errors(final_of(denoise, plan, others)).max()) < 1e-4
    start = others.errors(final_of(denoise, analytic(wanted.plan([0.0, 0.5]), SHAPE), others))
    assert float(start.min()) > 1e-2


def test_with_the_analytic_solver_as_target_a_fit_returns_its_weights() -> None:
    denoise, wanted, us = Linear(), Wanted(process="flow", shape=SHAPE), [0.0, 0.3, 0.6, 0.85]
    expected = analytic(wanted.plan(us), SHAPE, history=2, last_order=1)
    noise, rows = noise_of(16), torch.arange(16)
    bands = Bands(wanted.edges, SHAPE)
    states, history, z = [bands.to(noise)], {}, bands.to(noise)
    setting = Setting.of(expected, SHAPE)
    for index, call in enumerate(expected.calls):
        history["c", index] = setting.features(z, *denoise(bands.back(z), call.t, False, None, rows), call.signal, call.noise)["c"]
        z = setting.update(torch.tensor(call.weights, dtype=torch.float32), [z, *(history[key] for key in call.features)])
        states.append(z)

    class Exactly(Reference):
        def at(self, u: float) -> Tensor:
            return states[[*us, 1.0].index(u)]

    batch = Batch(noise=noise, rows=rows, reference=Exactly(*(torch.zeros(0),) * 3, z))
    found, _ = fit_in_closed_loop(denoise, wanted.plan(us), batch, 2)
    for mine, theirs in zip(found.calls, expected.calls, strict=True):
        assert torch.allclose(torch.tensor(mine.weights), torch.tensor(theirs.weights), atol=1e-4)


def test_a_ridge_without_end_keeps_the_analytic_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mediatorize.planning.fit.RIDGES", (1e12,))
    denoise, wanted = Linear(), Wanted(process="flow", shape=SHAPE)
    bare = wanted.plan([0.0, 0.4, 0.7])
    found, _ = fit_in_closed_loop(denoise, bare, batch_of(denoise, wanted, 8), 2)
    for mine, theirs in zip(found.calls, analytic(bare, SHAPE).calls, strict=True):
        assert torch.allclose(torch.tensor(mine.weights), torch.tensor(theirs.weights), atol=1e-6)


def test_fits_and_gauss_newton_bring_other_samples_nearer() -> None:
    denoise, wanted = Linear(scale=1.5), Wanted(process="flow", shape=SHAPE)
    batch, others = batch_of(denoise, wanted, 16), batch_of(denoise, wanted, 16, seed=1)
    bare = wanted.plan([0.0, 0.25, 0.5, 0.75])
    fitted = fit(denoise, bare, batch, 3)
    refined, error = gauss_newton(denoise, fitted, FLOW, batch, others)
    errors = [middle(others.errors(final_of(denoise, plan, others))) for plan in (analytic(bare, SHAPE), fitted, refined)]
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] == error < errors[1]
    assert [call.u for call in refined.calls] != [call.u for call in fitted.calls]


def test_the_reference_asks_for_more_calls_where_it_has_not_converged() -> None:
    denoise, wanted = Linear(), Wanted(process="flow", shape=SHAPE)
    noise, rows = noise_of(4), torch.arange(4)

    def solved(calls: int) -> Tensor:
        return solve(denoise, plain_setting(wanted), FLOW, lambda u: False, noise, rows, calls).final

    calls, error = calls_needed(solved, 1e-3)
    exact = solved(4 * calls)
    assert error <= 1e-3
    assert float((solved(calls) - exact).norm() / exact.norm()) < 3 * error + 1e-6
    assert calls_needed(solved, 1e-7)[0] > calls


def test_a_reference_between_its_places_is_the_solution_there() -> None:
    denoise, wanted = Linear(), Wanted(process="flow", shape=SHAPE)
    coarse, fine = batch_of(denoise, wanted, 3, calls=60).reference, batch_of(denoise, wanted, 3, calls=600).reference
    for u in (0.0, 0.123, 0.5, 0.987, 1.0):
        assert torch.allclose(coarse.at(u), fine.at(u), atol=1e-3 * float(fine.final.abs().max()))


# --- the search ----------------------------------------------------------------------------------------------------------------


def test_weights_choices_and_figures_come_from_three_sets_of_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fitted sees the first set alone, what is chosen the first and the second; the third is run when all is decided."""
    from mediatorize.planning import search as searching

    denoise, wanted = Linear(), Wanted(process="flow", shape=SHAPE, samples=8, reported=6)
    noise = tuple(noise_of(count, seed=seed) for seed, count in enumerate((8, 8, 6)))
    seen: list[tuple[str, set[int]]] = []

    def watched(name: str, place: int) -> None:
        inner = getattr(searching, name)

        def call(*given: Any) -> Any:
            seen.append((name, {int(row) for batch in given if isinstance(batch, Batch) for row in batch.rows}))
            return inner(*given)

        monkeypatch.setattr(searching, name, call)

    for name in ("fit", "gauss_newton", "find"):
        watched(name, 0)
    found = search(denoise, wanted, [2, 3], noise)
    first, second = set(range(8)), set(range(8, 16))
    assert all(rows <= first for name, rows in seen if name == "fit")
    assert all(rows <= first | second for name, rows in seen)
    assert {count: each.reported.samples for count, each in found.found.items()} == {2: 6, 3: 6}
    assert found.found[2].fitted.samples == 8


def test_a_search_resumes_where_it_stopped() -> None:
    wanted = Wanted(process="flow", shape=SHAPE, samples=8, reported=4)
    noise = tuple(noise_of(count, seed=seed) for seed, count in enumerate((8, 8, 4)))
    store, calls = InMemory(), Linear()
    first = search(calls, wanted, [2, 3], noise, store=store)
    again = Linear()
    second = search(again, wanted, [2, 3], noise, store=store)
    assert second.plans == first.plans
    assert not again.rows_of_calls
    assert search(Linear(), wanted, [2, 3], noise).plans == first.plans


def test_a_search_costs_about_what_is_predicted() -> None:
    wanted = Wanted(process="flow", shape=SHAPE, samples=24, reported=24)
    noise = tuple(noise_of(24, seed=seed) for seed in range(3))
    denoise = Linear()
    found = search(denoise, wanted, [3, 4], noise)
    predicted = model_rows(wanted, [3, 4], found.reference_calls)
    assert 0.5 < sum(denoise.rows_of_calls) / predicted < 1.5


@pytest.mark.parametrize("calls", [[], [1], [4, 0]])
def test_fewer_than_two_calls_are_refused(calls: list[int]) -> None:
    noise = (noise_of(4),) * 3
    with pytest.raises(UserError, match="at least 2 calls"):
        search(Linear(), Wanted(process="flow", shape=SHAPE), calls, noise)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(UserError, match="0 samples are too few"):
        Wanted(process="flow", shape=SHAPE, samples=0)


def test_a_teacher_that_diverges_is_refused() -> None:
    def denoise(x: Tensor, t: float, uncond: bool, levels: Any, rows: Tensor) -> tuple[Tensor, None]:
        return x / 0, None

    with pytest.raises(UserError, match="not finite"):
        search(denoise, Wanted(process="flow", shape=SHAPE), [2], (noise_of(48),) * 3)


# --- files ---------------------------------------------------------------------------------------------------------------------


def fitted_plan() -> Plan:
    denoise, wanted = Linear(), Wanted(process="flow", shape=SHAPE)
    return fit(denoise, wanted.plan([0.0, 0.3, 0.7]), batch_of(denoise, wanted, 8), 3)


def test_a_plan_that_is_written_and_read_runs_the_same(tmp_path: Path) -> None:
    from mediatorize.formats.plans import load_plan, write_plans

    plan = replace(fitted_plan(), errors={"median": 0.01}, made_for={"weights": "abc"})
    write_plans(tmp_path / "plan.json", {3: plan})
    read = load_plan(tmp_path / "plan.json", calls=3)
    assert read == plan

    def evaluate(x: Tensor, t: float, uncond: bool, levels: Any) -> tuple[Tensor, None]:
        return torch.sin(3 * x + t), None

    assert torch.equal(run_plan(read, evaluate, noise_of(2)), run_plan(plan, evaluate, noise_of(2)))


def test_a_file_tells_which_plans_it_has(tmp_path: Path) -> None:
    from mediatorize.formats.plans import load_plan, write_plans

    plan = fitted_plan()
    write_plans(tmp_path / "plan.json", {3: plan})
    assert load_plan(tmp_path / "plan.json") == plan
    with pytest.raises(UserError, match=r"no plan of 5 calls; there are plans of 3.*calibrate --calls 5"):
        load_plan(tmp_path / "plan.json", calls=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "cut short"),
        (lambda text: "[]", "Not a plan file"),
        (lambda text: text.replace('"version": 1', '"version": 9'), "version 9"),
        (lambda text: text.replace('"signal"', '"sign"'), "Not a whole plan"),
        (lambda text: json.dumps({**json.loads(text), "plans": []}), "no plan in it"),
        (lambda text: text.replace("velocity", "speed"), "not known"),
    ],
)
def test_damaged_files_are_refused_in_one_line(change: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message) as raised:
        plans_from_text(change(plans_to_text({3: fitted_plan()})))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"features": (("c", 2),), "weights": (((1.0, 0.5),) * 3,)},  # an output that is not there yet
        {"weights": (((1.0,),),)},  # too few bands
        {"weights": (((float("nan"),),) * 3,)},
        {"signal": 0.0, "noise": 0.0},
    ],
)
def test_plans_that_cannot_run_are_refused(changes: dict[str, Any]) -> None:
    call = PlanCall(t=0.0, signal=0.0, noise=1.0, weights=(((1.0,),) * 3,))
    Plan(process="flow", calls=(call,), groups=((0,),))
    with pytest.raises(PlanError):
        Plan(process="flow", calls=(replace(call, **changes),), groups=((0,),))


def test_plans_of_other_models_are_refused() -> None:
    labels, noise = torch.tensor([1]), noise_of(1, (4, 8, 8))
    flow = analytic(Wanted(process="flow", shape=(4, 8, 8)).plan([0.0, 0.5]), (4, 8, 8))
    with pytest.raises(UserError, match="process 'flow'"):
        sample_by_plan(tiny_model(family="dit"), labels, flow, noise)
    with pytest.raises(UserError, match="1 channels, and this model has 4"):
        sample_by_plan(tiny_model(), labels, analytic(Wanted(process="flow", shape=SHAPE).plan([0.0, 0.5]), SHAPE), noise)
    guided = analytic(Wanted(process="flow", shape=(4, 8, 8), cfg_scale=2.0).plan([0.0, 0.5]), (4, 8, 8))
    with pytest.raises(UserError, match="no null class"):
        sample_by_plan(tiny_model(null_class=False), labels, guided, noise)
    with pytest.raises(UserError, match="cfg-scale is 2, not 4"):
        mz.sample(tiny_model(), labels, plan=guided, noise=noise, cfg_scale=4.0)
    with pytest.raises(UserError, match="so do solver, steps"):
        mz.sample(tiny_model(), labels, plan=flow, noise=noise, steps=4)


# --- a model -------------------------------------------------------------------------------------------------------------------


def test_batches_may_be_split_and_levels_are_heeded() -> None:
    from mediatorize.model.levels import MediatorSettings

    model = tiny_model(MediatorSettings((1, 4), local_rank=3, modulation_rank=2))
    wanted = Wanted(process="flow", shape=(4, 8, 8), cfg_scale=2.0)
    plan = analytic(wanted.plan([0.0, 0.4, 0.8]), wanted.shape)
    labels, noise = torch.arange(5), noise_of(5, wanted.shape)
    whole = mz.sample(model, labels, plan=plan, noise=noise)
    parts = [mz.sample(model, labels[part], plan=plan, noise=noise[part]) for part in (slice(2), slice(2, 5))]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-5)
    cheap = replace(plan, calls=tuple(replace(call, levels=(4, 1, "softmax")) for call in plan.calls))
    assert not torch.allclose(mz.sample(model, labels, plan=cheap, noise=noise), whole, atol=1e-3)


def test_nested_weights_are_what_a_plan_keeps() -> None:
    call = replace(call_at(FLOW, 0.25), weights=nested(torch.ones(1, 3, 1)))
    assert (call.t, call.signal, call.noise) == (0.25, 0.25, 0.75)
    assert Plan(process="flow", calls=(call,), groups=((0,),)).calls[0].u == 0.25


def test_search_beats_every_solver_on_a_small_model() -> None:
    """The whole way, in seconds: a random model, so that distances are large, and Euler with as many calls beside it."""
    model = tiny_model(family="sit", learn_sigma=False, channels=1)
    wanted = Wanted(process="flow", shape=(1, 8, 8), samples=16, reported=16, steps=1)
    noise = tuple(gaussian(seed, "initial noise", range(16), wanted.shape) for seed in range(3))
    labels = torch.cat([spread_labels(10, 16, seed) for seed in range(3)])

    def euler(calls: int, noise: Tensor, rows: Tensor) -> dict[str, Tensor]:
        return {"euler": mz.sample(model, labels[rows], solver="euler", steps=calls, noise=noise)}

    found = search(ModelDenoiser(model, labels), wanted, [4], noise, others=euler).found[4]
    assert found.reported.median < 0.5 * found.others["euler"].median
    assert found.reported.interval is not None
    assert found.reported.interval[0] <= found.reported.median <= found.reported.interval[1]


def test_with_halves_the_first_call_may_cost_half() -> None:
    """Where both halves agree at the first call, leaving one out there costs no error, and is chosen."""

    def denoise(x: Tensor, t: float, uncond: bool, levels: Any, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        velocity = (0.5 + t) * x + torch.sin(2 * x) * t
        return velocity, velocity * (1 - 0.5 * t) if uncond else None

    wanted = Wanted(process="flow", shape=SHAPE, cfg_scale=2.0, streams="halves", samples=16, reported=8, steps=0)
    noise = tuple(noise_of(count, seed=seed) for seed, count in enumerate((16, 10, 8)))
    assert search(denoise, wanted, [3], noise).found[3].plan.rows == (1, 2, 2)
