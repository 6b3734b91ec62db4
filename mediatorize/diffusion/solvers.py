"""Samplers: plain functions of one shape, which repeat the originals' (DiT's gaussian_diffusion.py, SiT's transport) with the same noise.

A solver calls `predict(x, t)`, the guided model, with `t` in the family's own time (DiT: timestep 0..999; SiT: 0 noise to 1 data), and
`draw(k)` for its k-th Gaussian noise. Times are Python numbers: nothing in a loop waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mediatorize.diffusion import process
from mediatorize.errors import UserError
from mediatorize.model.architecture import SOFTMAX, Architecture, Family, Level
from mediatorize.model.schedule import Schedule
from mediatorize.model.transformer import DiffusionTransformer

Predict = Callable[[Tensor, float], Tensor]
Draw = Callable[[int], Tensor]
Channels = int | Literal["all"]

SDE_LAST_STEP = 0.04
"""SiT's stochastic sampler covers this last stretch by one deterministic step."""


# --- DiT -----------------------------------------------------------------------------------------------------------------------


def respaced_timesteps(steps: int) -> list[int]:
    """`steps` timesteps of DiT's 1000, even from 0 to 999, ascending; summed up as DiT's respace.py does, or halves round otherwise."""
    if steps == 1:
        return [0]
    stride = (process.TRAIN_STEPS - 1) / (steps - 1)
    return [round(place) for place in accumulate([stride] * (steps - 1), initial=0.0)]


def ddpm(predict: Predict, x: Tensor, steps: int, draw: Draw) -> Tensor:
    """Ancestral sampling with the learned variance (arXiv 2102.09672, section 3.1) on respaced steps.

    The reverse step is the posterior of the respaced process; its log-variance runs between the posterior's and the prior's by the model's
    second half of channels. Without one, the prior's variance is used, as DiT does.
    """
    times = respaced_timesteps(steps)
    kept = process.alphas_cumprod()[times].numpy()
    kept_before = np.append(1.0, kept[:-1])
    betas = 1 - kept / kept_before
    posterior = betas * (1 - kept_before) / (1 - kept)
    from_data = (betas * np.sqrt(kept_before) / (1 - kept)).tolist()
    from_state = ((1 - kept_before) * np.sqrt(1 - betas) / (1 - kept)).tolist()
    channels = x.shape[1]
    for count, index in enumerate(reversed(range(steps))):
        output = predict(x, times[index])
        noise, logits = output[:, :channels], output[:, channels:]
        data = (x - (1 - kept[index]) ** 0.5 * noise) / kept[index] ** 0.5
        x = from_data[index] * data + from_state[index] * x
        if index > 0:
            share = (logits + 1) / 2 if logits.shape[1] else torch.ones_like(x)
            log_variance = share * math.log(betas[index]) + (1 - share) * math.log(posterior[index])
            x = x + torch.exp(log_variance / 2) * draw(count)
    return x


def ddim(predict: Predict, x: Tensor, steps: int, draw: Draw) -> Tensor:
    """Deterministic DDIM (arXiv 2010.02502, eq. 12 with sigma 0) on respaced steps."""
    times = respaced_timesteps(steps)
    kept = process.alphas_cumprod()[times].tolist()
    channels = x.shape[1]
    for index in reversed(range(steps)):
        noise = predict(x, times[index])[:, :channels]
        before = kept[index - 1] if index else 1.0
        data = (x - (1 - kept[index]) ** 0.5 * noise) / kept[index] ** 0.5
        x = before**0.5 * data + (1 - before) ** 0.5 * noise
    return x


def dpm_solver(predict: Predict, x: Tensor, steps: int, draw: Draw) -> Tensor:
    """DPM-Solver++ of second order, multistep (arXiv 2211.01095), by diffusers' scheduler."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler: Any = DPMSolverMultistepScheduler(
        num_train_timesteps=process.TRAIN_STEPS, trained_betas=process.BETAS, timestep_spacing="linspace"
    )
    scheduler.set_timesteps(steps)
    channels = x.shape[1]
    for timestep in scheduler.timesteps:
        x = scheduler.step(predict(x, int(timestep))[:, :channels], timestep, x, return_dict=False)[0]
    return x


# --- SiT -----------------------------------------------------------------------------------------------------------------------


def euler(predict: Predict, x: Tensor, steps: int, draw: Draw) -> Tensor:
    """x + dt v on an even grid from noise (0) to data (1)."""
    for t, after in pairwise(torch.linspace(0, 1, steps + 1).tolist()):
        x = x + (after - t) * predict(x, t)
    return x


def heun(predict: Predict, x: Tensor, steps: int, draw: Draw) -> Tensor:
    """Heun's second-order method on an even grid: two calls per step."""
    for t, after in pairwise(torch.linspace(0, 1, steps + 1).tolist()):
        first = predict(x, t)
        second = predict(x + (after - t) * first, after)
        x = x + (after - t) / 2 * (first + second)
    return x


def dopri5(predict: Predict, x: Tensor, steps: int, draw: Draw) -> Tensor:
    """SiT's default: adaptive Dormand-Prince to 1e-6 absolute and 1e-3 relative error. `steps` is not used: the error sets them.

    Tolerances are lists, as in SiT's integrators.py: torchdiffeq then computes step sizes in single precision.
    """
    from torchdiffeq import odeint

    ends = torch.tensor([0.0, 1.0], device=x.device)
    return odeint(lambda t, state: predict(state, float(t)), x, ends, method="dopri5", atol=[1e-6], rtol=[1e-3])[-1]


def sde(predict: Predict, x: Tensor, steps: int, draw: Draw) -> Tensor:
    """Euler-Maruyama on the reverse SDE with diffusion sigma_t = 1 - t, then one mean step over the last 0.04 (SiT's transport)."""

    def drift(x: Tensor, t: float) -> Tensor:  # velocity + sigma_t * score, where score = (t v - x) / (1 - t)
        v = predict(x, t)
        return v + (t * v - x)

    end = 1 - SDE_LAST_STEP
    for count, (t, after) in enumerate(pairwise(torch.linspace(0, end, steps).tolist())):
        dt = after - t
        x = x + dt * drift(x, t) + (2 * (1 - t) * dt) ** 0.5 * draw(count)
    return x + SDE_LAST_STEP * drift(x, end)


@dataclass(frozen=True)
class Solver:
    run: Callable[[Predict, Tensor, int, Draw], Tensor]
    family: Family
    default_steps: int
    adaptive: bool = False
    fewest: int = 1
    most: int | None = None
    """How many steps can be taken; None is as many as you like."""


SOLVERS: dict[str, Solver] = {
    "ddpm": Solver(ddpm, "dit", 250, most=process.TRAIN_STEPS),
    "ddim": Solver(ddim, "dit", 50, most=process.TRAIN_STEPS),
    "dpm-solver++": Solver(dpm_solver, "dit", 20, most=process.TRAIN_STEPS - 1),
    "euler": Solver(euler, "sit", 25),
    "heun": Solver(heun, "sit", 25),
    "dopri5": Solver(dopri5, "sit", 1, adaptive=True),
    "sde": Solver(sde, "sit", 250, fewest=2),
}
"""Samplers by name. To add one: a function (predict, x, steps, draw) -> x, and its family."""

DEFAULT_SOLVER: dict[Family, str] = {"dit": "ddim", "sit": "euler"}


def find_solver(arch: Architecture, name: str | None) -> Solver:
    """The solver of that name, or the family's default; an error where it is not for this family."""
    name = name or DEFAULT_SOLVER[arch.family]
    fitting = [known for known, solver in SOLVERS.items() if solver.family == arch.family]
    if name not in fitting:
        raise UserError(f"Solver {name!r} is not one for a {arch.family.upper()}.", hint=f"Choose among {', '.join(fitting)}.")
    return SOLVERS[name]


def refuse_steps(solver: Solver, steps: int) -> None:
    if steps < solver.fewest or (solver.most is not None and steps > solver.most):
        possible = f"at least {solver.fewest}" if solver.most is None else f"{solver.fewest} to {solver.most}"
        raise UserError(f"{steps} steps cannot be taken.", hint=f"Pass {possible}.")


def call_times(solver: Solver, steps: int) -> list[float]:
    """The times at which a solver calls the model, by running it on nothing."""
    times: list[float] = []

    def record(x: Tensor, t: float) -> Tensor:
        times.append(t)
        return torch.zeros_like(x)

    solver.run(record, torch.zeros(1, 1, 1, 1), steps, lambda count: torch.zeros(1, 1, 1, 1))
    return times


def call_noise_levels(arch: Architecture, solver: Solver, steps: int) -> list[float]:
    """The noise level in [0, 1] of every model call, as `sample` looks it up in a schedule."""
    own = [1 - t if arch.reversed_time else t for t in call_times(solver, steps)]
    return [float(process.noise_level(arch, torch.tensor(t))) for t in own]


def noise_for(seed: int, indices: Sequence[int], count: int, shape: Sequence[int]) -> Tensor:
    """Gaussian noise (len(indices), *shape), each sample's a function of (seed, its index, count) alone: batches and devices do not matter.

    `count` is -1 for the initial state and k for the k-th step's noise.
    """
    generators = []
    for index in indices:
        mixed = np.random.SeedSequence((seed, index, count + 1)).generate_state(1, np.uint64)[0]
        generators.append(torch.Generator().manual_seed(int(mixed)))
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])


@dataclass(frozen=True)
class GuidedModel:
    """What lies between a solver and its model: guidance, and the checkpoint's own time, sign and precision.

    A solver's `predict(x, t)` is `output(model(*inputs(x, t)))`.
    """

    model: DiffusionTransformer
    labels: Tensor
    """(b,), on the model's device."""
    cfg_scale: float = 1.0
    cfg_channels: Channels = 3
    whole: bool = False
    """Whether both halves of a guided batch go on to the solver: the originals' adaptive ones choose their steps by both."""

    def own_time(self, t: float) -> float:
        """A solver's time as the checkpoint's."""
        return 1 - t if self.model.arch.reversed_time else t

    def inputs(self, x: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor]:
        """The model's x, t and labels; guided, the batch twice, conditional first."""
        labels = self.labels
        x = x[: len(labels)]
        if self.cfg_scale != 1:
            x, labels = torch.cat([x, x]), torch.cat([labels, torch.full_like(labels, self.model.arch.classes)])
        times = torch.full((len(x),), self.own_time(t), device=x.device, dtype=torch.float32)
        return x.to(next(self.model.parameters()).dtype), times, labels  # only the model is in low precision

    def output(self, output: Tensor) -> Tensor:
        """What the solver is told, in float32, of what the model said."""
        output, arch = output.float(), self.model.arch
        if self.cfg_scale != 1:
            output = guide(output, self.cfg_scale, arch.channels if self.cfg_channels == "all" else min(self.cfg_channels, arch.channels))
            output = output if self.whole else output[: len(self.labels)]
        return process.velocity(arch, output) if arch.family == "sit" else output


@torch.no_grad()
def sample(
    model: DiffusionTransformer,
    labels: Tensor | Sequence[int],
    *,
    solver: str | None = None,
    steps: int | None = None,
    cfg_scale: float = 1.0,
    cfg_channels: Channels = 3,
    noise: Tensor | None = None,
    seed: int = 0,
    schedule: Schedule | Level | None = None,
    first_index: int = 0,
    observe: Callable[[Tensor, Tensor, Tensor], Any] | None = None,
) -> Tensor:
    """Samples one batch.

    Args:
        labels: (b,) class labels.
        solver: a name in `SOLVERS`; `None` takes ddim (DiT) or euler (SiT).
        steps: of the solver; euler, ddim and ddpm call the model once per step. `None` takes the solver's default.
        cfg_scale: classifier-free guidance; 1 is none, and costs half.
        cfg_channels: how many channels are guided. DiT and SiT guide the first 3, whatever there are; REPA and diffusers all.
        noise: the initial state (b, c, h, w); `None` draws it from `seed`.
        seed: of the initial and every step's noise; sample i of a batch has index `first_index` + i.
        schedule: a `Schedule`, one level for everything, or `None`: the model's own schedule where it has one, else softmax.
        observe: called before every model call with its x, t and labels, the guided batch in full.

    Returns:
        Latents (b, c, h, w), on the model's device.
    """
    arch = model.arch
    chosen = find_solver(arch, solver)
    steps = chosen.default_steps if steps is None else steps
    refuse_steps(chosen, steps)
    if seed < 0 or (cfg_channels != "all" and cfg_channels < 1):
        raise UserError(f"Seed {seed} or {cfg_channels} guided channels cannot be.", hint="Seeds are from 0, channels from 1 or all.")
    parameter = next(model.parameters())
    labels = torch.as_tensor(labels, device=parameter.device)
    guided = cfg_scale != 1
    refuse_unknown_labels(arch, labels, guided=guided)
    shape = (arch.channels, *arch.input_size)
    indices = range(first_index, first_index + len(labels))

    def draw(count: int) -> Tensor:
        return noise_for(seed, indices, count, shape).to(parameter.device)

    x = draw(-1) if noise is None else noise.to(parameter.device, torch.float32)
    if x.shape != (len(labels), *shape):
        raise UserError(f"Noise of shape {list(x.shape)} does not fit.", hint=f"It must be {[len(labels), *shape]}.")
    levels_at = _level_source(schedule if schedule is not None else model.schedule)

    guided_model = GuidedModel(model, labels, cfg_scale, cfg_channels, whole=chosen.adaptive)

    def predict(x: Tensor, t: float) -> Tensor:
        levels = levels_at(float(process.noise_level(arch, torch.tensor(guided_model.own_time(t)))))
        batch, times, batch_labels = guided_model.inputs(x, t)
        if observe is not None:
            observe(batch, times, batch_labels)
        return guided_model.output(model(batch, times, batch_labels, levels=levels))

    if guided and chosen.adaptive:
        x = torch.cat([x, x])  # the originals integrate both halves, and step sizes depend on both
    return chosen.run(predict, x, steps, draw)[: len(labels)]


def guide(output: Tensor, scale: float, channels: int) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598) of the first `channels` in both halves; the others stay as they are.

    (2b, c, h, w), conditional first, -> (2b, c, h, w)
    """
    conditional, unconditional = output[:, :channels].chunk(2)
    guided = unconditional + scale * (conditional - unconditional)
    return torch.cat([torch.cat([guided, guided]), output[:, channels:]], dim=1)


def rows_per_sample(cfg_scale: float) -> int:
    """Rows of a model call that one sample takes: guidance doubles them."""
    return 1 if cfg_scale == 1 else 2


def refuse_unknown_labels(arch: Architecture, labels: Tensor, *, guided: bool) -> None:
    highest = arch.classes if arch.null_class else arch.classes - 1
    if labels.ndim != 1 or not len(labels) or labels.is_floating_point():
        raise UserError(
            f"Labels of shape {list(labels.shape)} and type {labels.dtype} are no batch of classes.", hint="Pass (b,) integers."
        )
    if not 0 <= int(labels.min()) <= int(labels.max()) <= highest:
        raise UserError(f"Classes {sorted(set(labels.tolist()))} are not all known.", hint=f"This model knows 0 to {arch.classes - 1}.")
    if guided and not arch.null_class:
        raise UserError("This model has no null class, which guidance needs.", hint="Pass --cfg-scale 1.")


def _level_source(schedule: Schedule | Level | None) -> Callable[[float], Level | Sequence[Level]]:
    if isinstance(schedule, Schedule):
        return schedule.at
    level: Level = SOFTMAX if schedule is None else schedule
    return lambda noise_level: level
