"""Samplers: equal to the original code, to diffusers, to torchdiffeq and to processes whose solution is known; what `sample` promises."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import tiny_model
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torchdiffeq import odeint

import mediatorize
from mediatorize import MediatorSettings, Schedule, UserError, sample
from mediatorize.diffusion import sampling, solvers
from mediatorize.diffusion.process import alphas_cumprod, noised, process_of
from mediatorize.diffusion.sampling import Sampler, draw_noise
from mediatorize.diffusion.solvers import SOLVERS
from mediatorize.model.architecture import Architecture
from mediatorize.model.levels import Level
from mediatorize.model.transformer import DiffusionTransformer

if TYPE_CHECKING:
    from mediatorize.diffusion.solvers import Predict

GOLDEN = Path(__file__).parent / "golden"
SETTINGS = MediatorSettings((1, 4))

GOLDEN_RUNS: dict[str, tuple[str, int]] = {
    "ddpm10": ("ddpm", 10),
    "ddpm10_cfg": ("ddpm", 10),
    "ddpm27": ("ddpm", 27),
    "ddpm27_cfg": ("ddpm", 27),
    "ddim10": ("ddim", 10),
    "ddim10_cfg": ("ddim", 10),
    "ddim50": ("ddim", 50),
    "euler10": ("euler", 10),
    "euler10_cfg": ("euler", 10),
    "heun10": ("heun", 10),
    "dopri5": ("dopri5", 1),
    "dopri5_cfg": ("dopri5", 1),
    "sde20": ("sde", 20),
    "sde20_cfg": ("sde", 20),
}
"""Solver and steps of every sample in the golden files."""

NUMPY_2 = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
"""diffusers' multistep scheduler makes numpy arrays of tensors in a way that numpy 2 wants changed."""

FAMILY_OF = {"ddpm": "dit", "flow": "sit"}
"""By process."""

ARCHES = {"dit": {"family": "dit"}, "sit": {"family": "sit"}, "repa": {"family": "sit", "reversed_time": True}}


def arch(kind: str) -> Architecture:
    return tiny_model(depth=1, **ARCHES[kind]).arch


def golden(family: str) -> tuple[DiffusionTransformer, dict[str, Tensor], dict[str, str]]:
    """A model with a golden file's weights, the file's tensors, and its metadata: what the original code did with them."""
    file = GOLDEN / f"{family}.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    return mediatorize.load_model(file, family=family, num_heads=3), load_file(file), metadata  # type: ignore[arg-type]


def predictor(model: DiffusionTransformer, labels: Tensor, calls: list[float] | None = None) -> Predict:
    """The bare model as a solver calls it."""

    def predict(x: Tensor, t: float) -> Tensor:
        if calls is not None:
            calls.append(t)
        return model(x, torch.full((len(x),), float(t)), labels)

    return predict


def random_draw(shape: Sequence[int]) -> Callable[[int], Tensor]:
    return lambda count: torch.randn(tuple(shape), generator=torch.Generator().manual_seed(100 + count))


def no_draw(count: int) -> Tensor:
    raise AssertionError("a deterministic solver drew noise")


def record_calls(model: DiffusionTransformer, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, Tensor, Any]]:
    """x, t, y and levels of every call of the model from here on."""
    calls: list[tuple[Tensor, Tensor, Tensor, Any]] = []
    forward = model.forward

    def recording(x: Tensor, t: Tensor, y: Tensor, levels: Level | Sequence[Level] = "softmax") -> Tensor:
        calls.append((x, t, y, levels))
        return forward(x, t, y, levels)

    monkeypatch.setattr(model, "forward", recording)
    return calls


# --- parity ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", GOLDEN_RUNS)
def test_samples_and_call_times_equal_the_original_code(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    solver, steps = GOLDEN_RUNS[run]
    model, stored, metadata = golden(FAMILY_OF[SOLVERS[solver].process])
    monkeypatch.setattr(sampling, "draw_noise", lambda seed, samples, shape, device, count: stored["step_noise"][count])
    times: list[float] = []
    samples = sample(
        model,
        stored["labels"],
        solver=solver,
        steps=steps,
        cfg_scale=float(metadata["cfg_scale"]) if run.endswith("_cfg") else 1.0,
        noise=stored["noise"],
        observe=lambda x, t, y: times.append(float(t[0])),
    )
    # An adaptive solver's steps hang on the rounding of the machine's products; it promises 1e-3 a step.
    adaptive = SOLVERS[solver].adaptive
    torch.testing.assert_close(samples, stored[run], rtol=0, atol=2e-3 if adaptive else 1e-4)
    original = json.loads(metadata["model_t"])[run]
    original = original[::2] if solver == "sde" else original  # the original calls once for the velocity and once for the score
    assert times == pytest.approx(original, abs=0.1 if adaptive else 1e-5)


@pytest.mark.parametrize("run", [run for run, (solver, _) in GOLDEN_RUNS.items() if not SOLVERS[solver].adaptive])
def test_call_times_foretell_the_calls(run: str) -> None:
    solver, steps = GOLDEN_RUNS[run]
    with safe_open(GOLDEN / f"{FAMILY_OF[SOLVERS[solver].process]}.safetensors", "pt") as opened:
        original = json.loads(opened.metadata()["model_t"])[run]
    original = original[::2] if solver == "sde" else original
    assert Sampler(solver=solver, steps=steps).times() == pytest.approx(original, abs=1e-6)


@pytest.mark.parametrize("steps", [2, 21, 23, 27, 250, 999, 1000])
def test_timesteps_are_rounded_sums_of_strides(steps: int) -> None:
    """As in DiT's respace.py: at 21 and 23 steps, among others, rounded products of the stride differ."""
    place, expected = 0.0, []
    for _ in range(steps):
        expected.append(round(place))
        place += 999 / (steps - 1)
    assert solvers.respaced_timesteps(steps) == expected
    assert (expected[0], expected[-1]) == (0, 999)


@pytest.mark.parametrize("steps", [10, 27, 50])
@pytest.mark.parametrize("variance", ["learned_range", "fixed_large"])
def test_ddpm_equals_diffusers_scheduler(variance: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, stored, _ = golden("dit")
    shape = stored["noise"].shape
    draw = random_draw(shape)
    channels = slice(None) if variance == "learned_range" else slice(4)
    predict = predictor(model, stored["labels"])
    ours = SOLVERS["ddpm"].run(lambda x, t: predict(x, t)[:, channels], stored["noise"], steps, draw)

    scheduler = DDPMScheduler(beta_schedule="linear", variance_type=variance, timestep_spacing="linspace", clip_sample=False)
    scheduler.set_timesteps(steps)
    theirs = stored["noise"]
    for count, timestep in enumerate(scheduler.timesteps):
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, count=count, **kwargs: draw(count))
        theirs = scheduler.step(predict(theirs, timestep)[:, channels], timestep, theirs).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@NUMPY_2
@pytest.mark.parametrize("steps", [5, 20])
def test_dpm_solver_equals_diffusers_scheduler(steps: int) -> None:
    model, stored, _ = golden("dit")
    predict = predictor(model, stored["labels"])
    calls: list[float] = []
    ours = SOLVERS["dpm-solver++"].run(predictor(model, stored["labels"], calls), stored["noise"], steps, no_draw)

    scheduler = DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    scheduler.set_timesteps(steps)
    theirs = stored["noise"]
    for timestep in scheduler.timesteps:
        theirs = scheduler.step(predict(theirs, timestep)[:, :4], timestep, theirs).prev_sample
    assert calls == scheduler.timesteps.tolist()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("solver", "method"), [("euler", "euler"), ("heun", "heun2")])
def test_euler_and_heun_equal_torchdiffeq(solver: str, method: str) -> None:
    model, stored, _ = golden("sit")
    predict = predictor(model, stored["labels"])
    ours = SOLVERS[solver].run(predict, stored["noise"], 7, no_draw)
    theirs = odeint(lambda t, x: predict(x, float(t)), stored["noise"], torch.linspace(0, 1, 8), method=method)[-1]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


# --- known solutions: data that is Gaussian with standard deviation SPREAD ---------------------------------------------------------

SPREAD = 0.5


def state_variance(t: int) -> float:
    """Of a DiT's state at timestep t."""
    kept = float(alphas_cumprod()[t])
    return kept * SPREAD**2 + 1 - kept


def gaussian_noise_prediction(x: Tensor, t: float) -> Tensor:
    """The exact DiT for that data: E[noise | x_t]."""
    return float(1 - alphas_cumprod()[int(t)]) ** 0.5 * x / state_variance(int(t))


def gaussian_velocity(x: Tensor, t: float) -> Tensor:
    """The exact SiT for that data: E[data - noise | x_t]."""
    return (t * SPREAD**2 - (1 - t)) * x / (t**2 * SPREAD**2 + (1 - t) ** 2)


def flow_errors(solver: str, steps: Sequence[int]) -> list[float]:
    """How far the solver ends from the exact solution, which scales every state as its standard deviation."""
    dit = SOLVERS[solver].process == "ddpm"
    predict, exact = (gaussian_noise_prediction, SPREAD / state_variance(999) ** 0.5) if dit else (gaussian_velocity, SPREAD)
    return [abs(float(SOLVERS[solver].run(predict, torch.ones(1, 1, 1, 1), count, no_draw)) - exact) for count in steps]


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("euler", 1), ("heun", 2)])
def test_deterministic_solvers_converge_to_the_exact_flow_at_their_order(solver: str, order: int) -> None:
    errors = flow_errors(solver, (25, 50, 100))
    assert errors[-1] < 0.02
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


@NUMPY_2
def test_unipc_converges_to_the_exact_flow_in_fewer_steps_than_euler() -> None:
    errors = flow_errors("unipc", (8, 16, 32))
    assert errors == sorted(errors, reverse=True)
    for steps, error in zip((8, 16, 32), errors, strict=True):
        assert error < 0.3 * flow_errors("euler", (steps,))[0]


@NUMPY_2
@pytest.mark.parametrize("shift", [1.0, 0.3])
def test_unipc_calls_the_model_once_a_step_where_euler_does(shift: float) -> None:
    calls: dict[str, list[float]] = {"unipc": [], "euler": []}
    for solver, times in calls.items():

        def record(x: Tensor, t: float, times: list[float] = times) -> Tensor:
            times.append(t)
            return gaussian_velocity(x, t)

        SOLVERS[solver].run(record, torch.ones(1, 1, 1, 1), 8, no_draw, shift=shift)
    assert calls["unipc"] == pytest.approx(calls["euler"], abs=2e-3)


@NUMPY_2
def test_dpm_solver_converges_to_the_exact_flow_in_fewer_steps_than_ddim() -> None:
    errors = flow_errors("dpm-solver++", (5, 10, 20, 40))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2 * flow_errors("ddim", (40,))[0]


@pytest.mark.parametrize("steps", [3, 10])
def test_ddpm_with_the_optimal_variance_samples_the_data_exactly_in_any_number_of_steps(steps: int) -> None:
    """Gaussian data makes every reverse step Gaussian, with a variance between the two that the model chooses from."""
    times = solvers.respaced_timesteps(steps)

    def predict(x: Tensor, t: float) -> Tensor:
        before = times[max(times.index(int(t)) - 1, 0)]
        kept, kept_before = (float(alphas_cumprod()[time]) for time in (int(t), before))
        beta = 1 - kept / kept_before
        posterior = beta * (1 - kept_before) / (1 - kept)
        optimal = state_variance(before) - (kept / kept_before) * state_variance(before) ** 2 / state_variance(int(t))
        logit = 2 * math.log(optimal / posterior) / math.log(beta / posterior) - 1 if beta else 0.0
        return torch.cat([gaussian_noise_prediction(x, t), torch.full_like(x, logit)], dim=1)

    shape = (1, 1, 200, 200)
    start = state_variance(999) ** 0.5 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    end = SOLVERS["ddpm"].run(predict, start, steps, random_draw(shape))
    assert float(end.mean()) == pytest.approx(0, abs=0.01)
    assert float(end.std()) == pytest.approx(SPREAD, rel=0.015)


def test_sde_samples_the_data_and_forgets_where_it_began_at_its_rate_of_diffusion() -> None:
    """The reverse SDE is linear here: its end keeps exp(-integral of (1 - t) / variance of x_t) of the correlation with its start."""
    shape = (1, 1, 200, 200)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    end = SOLVERS["sde"].run(gaussian_velocity, start, 250, random_draw(shape))
    t = torch.linspace(0, 1, 10001)
    kept = math.exp(-float(torch.trapezoid((1 - t) / (t**2 * SPREAD**2 + (1 - t) ** 2), t)))
    assert float(end.mean()) == pytest.approx(0, abs=0.01)
    assert float(end.std()) == pytest.approx(SPREAD, rel=0.02)
    assert float(torch.corrcoef(torch.stack([start.flatten(), end.flatten()]))[0, 1]) == pytest.approx(kept, abs=0.02)


# --- what sample() promises ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "solver"), [("dit", "ddpm"), ("sit", "sde"), ("dit", "ddim"), ("sit", "euler"), ("sit", "unipc")])
def test_a_batch_equals_its_parts_sampled_apart(family: str, solver: str) -> None:
    model = tiny_model(family=family, depth=1)
    labels = [3, 1, 4, 1, 5]
    options: dict[str, Any] = {"solver": solver, "steps": 4, "seed": 7, "cfg_scale": 1.5}
    together = sample(model, labels, **options)
    apart = torch.cat([sample(model, labels[:2], **options), sample(model, labels[2:], first_index=2, **options)])
    torch.testing.assert_close(together, apart, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(together[1], together[3])  # the same class twice is not the same sample


@pytest.mark.parametrize(("family", "solver"), [("dit", "ddpm"), ("sit", "sde"), ("sit", "euler")])
def test_the_seed_decides_the_samples(family: str, solver: str) -> None:
    model = tiny_model(family=family, depth=1)
    first, again, other = (sample(model, [1, 2], solver=solver, steps=4, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize(("family", "solver", "random"), [("dit", "ddpm", True), ("sit", "sde", True), ("dit", "ddim", False)])
def test_the_seed_decides_the_steps_of_stochastic_solvers_alone(family: str, solver: str, random: bool) -> None:
    model = tiny_model(family=family, depth=1)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    first, other = (sample(model, [1, 2], solver=solver, steps=4, noise=noise, seed=seed) for seed in (0, 1))
    assert torch.equal(first, other) != random


def noise_for(seed: int, samples: Sequence[int], count: int) -> Tensor:
    """What a sampler of that seed draws for its step `count`, or for the initial state at -1."""
    return draw_noise(seed, samples, (4, 8, 8), torch.device("cpu"), count)


def test_noise_is_a_function_of_seed_index_and_count_alone() -> None:
    noise = noise_for(0, [3, 4, 3], 5)
    assert torch.equal(noise[0], noise[2])
    assert torch.equal(noise[1:2], noise_for(0, [4], 5))
    others = [noise_for(*position) for position in ((0, [4], 5), (0, [5], 5), (0, [4], 4), (1, [4], 5), (0, [4], -1))]
    for index, other in enumerate(others):
        assert not any(torch.allclose(other, earlier) for earlier in others[:index])


def test_the_initial_state_is_the_seeds_noise() -> None:
    model = tiny_model(depth=1)
    noise = noise_for(3, range(10, 12), -1)
    assert torch.equal(sample(model, [1, 2], steps=3, seed=3, first_index=10), sample(model, [1, 2], steps=3, noise=noise))


@pytest.mark.parametrize(("family", "default", "steps"), [("dit", "ddim", 50), ("sit", "euler", 25)])
def test_the_default_solver_takes_its_default_steps(family: str, default: str, steps: int) -> None:
    model = tiny_model(family=family, depth=1)
    calls: list[Tensor] = []
    samples = sample(model, [1], observe=lambda x, t, y: calls.append(t))
    assert len(calls) == steps
    assert torch.equal(samples, sample(model, [1], solver=default, steps=steps))


@pytest.mark.parametrize(("cfg_scale", "doubled"), [(1.0, False), (1.5, True), (0.0, True)])
def test_only_guidance_doubles_the_batch(cfg_scale: float, doubled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(depth=1)
    calls = record_calls(model, monkeypatch)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    sample(model, [1, 2], solver="heun", steps=2, cfg_scale=cfg_scale, observe=lambda *inputs: seen.append(inputs))
    assert len(seen) == len(calls) == 4
    for (x, t, y), call in zip(seen, calls, strict=True):
        assert x is call[0]
        assert t is call[1]
        assert y is call[2]
        assert y.tolist() == ([1, 2, 10, 10] if doubled else [1, 2])
        assert len(x) == len(t) == len(y)
        assert torch.equal(x[:2], x[-2:])


def test_guidance_moves_the_first_channels_of_both_halves_alone() -> None:
    output = torch.randn(6, 8, 2, 2, generator=torch.Generator().manual_seed(0))
    conditional, unconditional = output.chunk(2)
    for scale in (0.0, 1.0, 2.5):
        guided = sampling.guide(output, scale, 3)
        expected = (1 - scale) * unconditional[:, :3] + scale * conditional[:, :3]
        torch.testing.assert_close(guided[:, :3], torch.cat([expected, expected]))
        assert torch.equal(guided[:, 3:], output[:, 3:])


def test_all_guided_channels_are_the_channels_of_the_state() -> None:
    model = tiny_model(family="dit", depth=1)
    options: dict[str, Any] = {"solver": "ddpm", "steps": 4, "cfg_scale": 2.0}
    every, four, five, three = (sample(model, [1, 2], cfg_channels=channels, **options) for channels in ("all", 4, 5, 3))
    assert torch.equal(every, four)
    assert torch.equal(every, five)
    assert not torch.allclose(every[:, 3], three[:, 3])


@pytest.mark.parametrize("solver", ["euler", "heun", "unipc", "dopri5", "sde"])
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_a_model_in_reversed_time_gives_the_same_samples(solver: str, cfg_scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, mirror = tiny_model(depth=1), tiny_model(depth=1, reversed_time=True)
    monkeypatch.setattr(mirror, "forward", lambda x, t, y, levels: -model(x, 1 - t, y, levels))
    options: dict[str, Any] = {"solver": solver, "steps": 4, "cfg_scale": cfg_scale}
    bound = 1e-3 if SOLVERS[solver].adaptive else 1e-4  # an adaptive solver's steps hang on rounding
    torch.testing.assert_close(sample(mirror, [1, 2], **options), sample(model, [1, 2], **options), rtol=bound, atol=bound)


@pytest.mark.parametrize(
    ("kind", "solver", "noise_levels"),
    [
        ("sit", "euler", [1, 0.75, 0.5, 0.25]),
        ("repa", "euler", [1, 0.75, 0.5, 0.25]),
        ("sit", "heun", [1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0]),
        ("sit", "sde", [1, 0.68, 0.36, 0.04]),
        ("dit", "ddim", [1, 2 / 3, 1 / 3, 0]),
        ("dit", "ddpm", [1, 2 / 3, 1 / 3, 0]),
    ],
)
def test_a_schedule_sets_the_levels_of_every_call_by_its_noise(
    kind: str, solver: str, noise_levels: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(SETTINGS, **ARCHES[kind])
    early, late = (4, 1, "softmax"), ("softmax", "softmax", 4)
    calls = record_calls(model, monkeypatch)
    sample(model, [1], solver=solver, steps=4, schedule=Schedule((0.45,), (late, early)))
    seen = [float(process_of(model.arch).noise_level(t)) for _, t, _, _ in calls]
    assert seen == pytest.approx(noise_levels, abs=1e-6)
    assert [levels for *_, levels in calls] == [early if level > 0.45 else late for level in noise_levels]


def test_an_edge_between_two_calls_is_where_the_levels_change() -> None:
    """Two pieces that meet between two steps give what the two levels give by hand."""
    model = tiny_model(SETTINGS)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 2])
    x = noise
    for t, level in ((0.0, 1), (0.25, 1), (0.5, 4), (0.75, 4)):
        x = x + 0.25 * model(x, torch.full((2,), t), labels, levels=level)
    scheduled = sample(model, labels, solver="euler", steps=4, noise=noise, schedule=Schedule((0.6,), ((4,) * 3, (1,) * 3)))
    torch.testing.assert_close(scheduled, x)


def test_the_models_own_schedule_holds_unless_another_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(SETTINGS)
    calls = record_calls(model, monkeypatch)

    def levels_of(schedule: Schedule | Level | None) -> Any:
        calls.clear()
        sample(model, [1], steps=1, schedule=schedule)
        return calls[0][3]

    assert levels_of(None) == ("softmax",) * 3
    model.schedule = Schedule((), ((1, 4, 1),))
    assert levels_of(None) == (1, 4, 1)
    assert levels_of(4) == (4,) * 3
    assert levels_of("softmax") == ("softmax",) * 3
    assert levels_of(Schedule((), ((4, 4, 1),))) == (4, 4, 1)


def test_sampling_leaves_no_gradient_graph() -> None:
    model = tiny_model(depth=1).requires_grad_(True)
    for solver in ("euler", "dopri5", "sde"):
        samples = sample(model, [1], solver=solver, steps=3)
        assert not samples.requires_grad
        assert samples.grad_fn is None
    assert all(parameter.grad is None for parameter in model.parameters())


# --- refusals --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "solver", "message"),
    [
        ("dit", "euler", r"^Solver 'euler' is not one for a DIT\. Choose among ddpm, ddim, dpm-solver\+\+\.$"),
        ("sit", "ddim", r"^Solver 'ddim' is not one for a SIT\. Choose among euler, heun, unipc, dopri5, sde\.$"),
        ("sit", "euller", r"^Solver 'euller' is not one for a SIT\. Choose among euler, heun, unipc, dopri5, sde\.$"),
    ],
)
def test_a_solver_of_the_other_family_is_refused(family: str, solver: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample(tiny_model(family=family, depth=1), [1], solver=solver)


@pytest.mark.parametrize(("family", "solver", "steps"), [("dit", "ddpm", 0), ("sit", "euler", 0), ("sit", None, -3), ("dit", "ddpm", 1001)])
def test_steps_that_cannot_be_taken_are_refused(family: str, solver: str | None, steps: int) -> None:
    with pytest.raises(UserError, match=rf"^{steps} steps cannot be taken\. Pass {'1 to 1000' if family == 'dit' else 'at least 1'}\.$"):
        sample(tiny_model(family=family, depth=1), [1], solver=solver, steps=steps)


@NUMPY_2
@pytest.mark.parametrize("steps", [999, 1000, 1500])
def test_dpm_solver_with_more_steps_than_it_can_take_is_refused_rather_than_not_finite(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family="dit", depth=1)
    monkeypatch.setattr(model, "forward", lambda x, t, y, levels: torch.cat([x, x], dim=1))
    try:
        samples = sample(model, [1], solver="dpm-solver++", steps=steps)
    except UserError as refusal:
        assert steps >= 1000
        assert f"{steps} steps cannot be taken." in refusal.message
    else:
        assert samples.isfinite().all()


@pytest.mark.parametrize(
    ("labels", "null_class", "message"),
    [
        ([1, 11], True, r"^Classes \[1, 11\] are not all known\. This model knows 0 to 9\.$"),
        ([-1], True, r"^Classes \[-1\] are not all known\. This model knows 0 to 9\.$"),
        ([10], False, r"^Classes \[10\] are not all known\. This model knows 0 to 9\.$"),
    ],
)
def test_unknown_classes_are_refused(labels: list[int], null_class: bool, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample(tiny_model(depth=1, null_class=null_class), labels)


def test_the_null_class_can_be_sampled() -> None:
    model = tiny_model(depth=1)
    unguided = sample(model, [10], steps=3)
    torch.testing.assert_close(sample(model, [1], steps=3, cfg_scale=0.0, cfg_channels="all"), unguided)


def test_guidance_without_a_null_class_is_refused() -> None:
    with pytest.raises(UserError, match=r"^This model has no null class, which guidance needs\. Pass --cfg-scale 1\.$"):
        sample(tiny_model(depth=1, null_class=False), [1], cfg_scale=1.5)


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (2, 3, 8, 8), (2, 4, 8, 6), (4, 8, 8)])
def test_noise_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"^Noise of shape \[.*\] does not fit\. It must be \[2, 4, 8, 8\]\.$") as refusal:
        sample(tiny_model(depth=1), [1, 2], noise=torch.zeros(shape))
    assert str(list(shape)) in refusal.value.message


# --- the process -----------------------------------------------------------------------------------------------------------------


def data_noise_and_times() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 5, 4, 8, 8, generator=generator, dtype=torch.float64)
    return data, noise, torch.tensor([0.01, 0.2, 0.5, 0.7, 0.99], dtype=torch.float64)


@pytest.mark.parametrize("kind", ["sit", "repa"])
def test_flows_run_from_data_at_noise_level_0_to_noise_at_1(kind: str) -> None:
    data, noise, _ = data_noise_and_times()
    for level, expected in ((0.0, data), (1.0, noise)):
        t = process_of(arch(kind)).time_at(torch.full((5,), level))
        assert torch.equal(noised(process_of(arch(kind)), data, noise, t), expected)


def test_ddpm_runs_from_nearly_data_at_noise_level_0_to_nearly_noise_at_1() -> None:
    data, noise, _ = data_noise_and_times()
    for level, expected in ((0.0, data), (1.0, noise)):
        t = process_of(arch("dit")).time_at(torch.full((5,), level))
        assert float((noised(process_of(arch("dit")), data, noise, t) - expected).std()) < 0.02


@pytest.mark.parametrize(("kind", "data_time"), [("dit", 0.0), ("sit", 1.0), ("repa", 0.0)])
def test_own_time_is_the_inverse_of_noise_level(kind: str, data_time: float) -> None:
    levels = torch.linspace(0, 1, 11, dtype=torch.float64)
    times = process_of(arch(kind)).time_at(levels)
    torch.testing.assert_close(process_of(arch(kind)).noise_level(times), levels)
    assert float(times[0]) == data_time
    assert float(times[-1]) == {"dit": 999.0, "sit": 0.0, "repa": 1.0}[kind]


@pytest.mark.parametrize("kind", ["sit", "repa"])
def test_a_flows_target_is_the_rate_at_which_the_state_moves(kind: str) -> None:
    data, noise, times = data_noise_and_times()
    ahead, behind = (noised(process_of(arch(kind)), data, noise, times + step) for step in (1e-4, -1e-4))
    torch.testing.assert_close((ahead - behind) / 2e-4, process_of(arch(kind)).target(data, noise))


@pytest.mark.parametrize("kind", ["sit", "repa"])
def test_velocity_of_a_flows_target_points_from_noise_to_data(kind: str) -> None:
    data, noise, _ = data_noise_and_times()
    torch.testing.assert_close(process_of(arch(kind)).told_to_solver(process_of(arch(kind)).target(data, noise)), data - noise)


def test_a_dits_state_equals_diffusers_and_its_target_is_the_noise_in_it() -> None:
    data, noise, _ = data_noise_and_times()
    times = torch.tensor([0, 1, 500, 998, 999])
    state = noised(process_of(arch("dit")), data, noise, times)
    scheduler = DDPMScheduler(beta_schedule="linear")
    torch.testing.assert_close(state, scheduler.add_noise(data, noise, times), rtol=0, atol=1e-4)
    for index, t in enumerate(times):
        recovered = scheduler.step(process_of(arch("dit")).target(data, noise)[index], t, state[index]).pred_original_sample
        if t < 900:
            torch.testing.assert_close(recovered, data[index].clamp(-1, 1), rtol=0, atol=1e-3)


def test_signal_and_noise_of_a_ddpm_keep_the_variance() -> None:
    signal, noise = process_of(arch("dit")).signal_and_noise(torch.arange(1000))
    torch.testing.assert_close(signal**2 + noise**2, torch.ones(1000, dtype=torch.float64))
    assert (noise.diff() > 0).all()
    torch.testing.assert_close((signal**2).float(), DDPMScheduler(beta_schedule="linear").alphas_cumprod, rtol=1e-4, atol=1e-7)
