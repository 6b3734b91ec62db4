"""Solvers: plain functions with one signature. Same noise, same results as the originals (DiT's gaussian_diffusion.py, SiT's transport).

A solver calls `predict(x, t)`, the guided model, with `t` in its process's time (a DDPM's timesteps 0..999; a flow's 0 noise to 1 data),
and `draw(k)` for its k-th Gaussian noise. Times are Python numbers, so no loop waits for the device. Importing the table of solvers
does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from mediatorize.diffusion.process import BETAS, TRAIN_STEPS, Process, alphas_cumprod, ddim_step, respaced_timesteps
from mediatorize.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    Predict = Callable[[Tensor, float], Tensor]
    Draw = Callable[[int], Tensor]

SDE_LAST_STEP = 0.04
"""SiT's stochastic sampler covers this last stretch by one deterministic step."""


# --- DiT -----------------------------------------------------------------------------------------------------------------------


def ddpm(predict: Predict, x: Tensor, steps: int, draw: Draw) -> Tensor:
    """Ancestral sampling with the learned variance (arXiv 2102.09672, section 3.1) on respaced steps.

    The reverse step is the posterior of the respaced process; its log-variance runs between the posterior's and the prior's by the model's
    second half of channels. Without one, the prior's variance is used, as DiT does.
    """
    import torch

    times = respaced_timesteps(steps)
    kept = alphas_cumprod()[times].numpy()
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
    kept = alphas_cumprod()[times].tolist()
    channels = x.shape[1]
    for index in reversed(range(steps)):
        noise = predict(x, times[index])[:, :channels]
        x = ddim_step(x, noise, kept[index], kept[index - 1] if index else 1.0)
    return x


def dpm_solver(predict: Predict, x: Tensor, steps: int, draw: Draw) -> Tensor:
    """DPM-Solver++ of second order, multistep (arXiv 2211.01095), by diffusers' scheduler."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler: Any = DPMSolverMultistepScheduler(num_train_timesteps=TRAIN_STEPS, trained_betas=BETAS, timestep_spacing="linspace")
    scheduler.set_timesteps(steps)
    channels = x.shape[1]
    for timestep in scheduler.timesteps:
        x = scheduler.step(predict(x, int(timestep))[:, :channels], timestep, x, return_dict=False)[0]
    return x


# --- SiT -----------------------------------------------------------------------------------------------------------------------


def flow_times(steps: int, shift: float) -> list[float]:
    """Times of a flow's steps from noise (0) to data (1): even ones u, warped to s u / (1 + (s - 1) u) (LightningDiT's transport).

    A shift s below 1 puts more steps where there is noise; 1 leaves them even.
    """
    import torch

    even = torch.linspace(0, 1, steps + 1)
    return even.tolist() if shift == 1 else (shift * even / (1 + (shift - 1) * even)).tolist()


def euler(predict: Predict, x: Tensor, steps: int, draw: Draw, shift: float = 1.0) -> Tensor:
    """x + dt v at `flow_times`."""
    for t, after in pairwise(flow_times(steps, shift)):
        x = x + (after - t) * predict(x, t)
    return x


def heun(predict: Predict, x: Tensor, steps: int, draw: Draw, shift: float = 1.0) -> Tensor:
    """Heun's second-order method at `flow_times`: two calls per step."""
    for t, after in pairwise(flow_times(steps, shift)):
        first = predict(x, t)
        second = predict(x + (after - t) * first, after)
        x = x + (after - t) / 2 * (first + second)
    return x


def unipc(predict: Predict, x: Tensor, steps: int, draw: Draw, shift: float = 1.0) -> Tensor:
    """UniPC of second order, multistep (arXiv 2302.04867), by diffusers' scheduler: one call per step, at `flow_times` to a thousandth."""
    from diffusers import UniPCMultistepScheduler

    scheduler: Any = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1 / shift)
    scheduler.set_timesteps(steps)
    for noise_level, timestep in zip(scheduler.sigmas.tolist(), scheduler.timesteps, strict=False):
        x = scheduler.step(-predict(x, 1 - noise_level), timestep, x, return_dict=False)[0]  # there a flow runs from data to noise
    return x


def dopri5(predict: Predict, x: Tensor, steps: int, draw: Draw) -> Tensor:
    """SiT's default: adaptive Dormand-Prince to 1e-6 absolute and 1e-3 relative error. `steps` is not used: the error sets them.

    Tolerances are lists, as in SiT's integrators.py: torchdiffeq then computes step sizes in single precision.
    """
    import torch
    from torchdiffeq import odeint

    ends = torch.tensor([0.0, 1.0], device=x.device)
    return odeint(lambda t, state: predict(state, float(t)), x, ends, method="dopri5", atol=[1e-6], rtol=[1e-3])[-1]


def sde(predict: Predict, x: Tensor, steps: int, draw: Draw) -> Tensor:
    """Euler-Maruyama on the reverse SDE with diffusion sigma_t = 1 - t, then one mean step over the last 0.04 (SiT's transport)."""
    import torch

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
    run: Callable[..., Tensor]
    """(predict, x, steps, draw) -> x; where it `shifts`, also with `shift`."""
    process: str
    """The name of the process whose models it samples."""
    default_steps: int
    adaptive: bool = False
    fewest: int = 1
    most: int | None = None
    """How many steps can be taken; None is as many as you like."""
    shifts: bool = False
    """Whether its steps can be warped towards noise or data."""
    stochastic: bool = False
    """Whether it draws noise in its steps."""
    calls_per_step: int = 1
    """Model calls in a step. The first one gets the latents that the step begins with."""


SOLVERS: dict[str, Solver] = {
    "ddpm": Solver(ddpm, "ddpm", 250, most=TRAIN_STEPS, stochastic=True),
    "ddim": Solver(ddim, "ddpm", 50, most=TRAIN_STEPS),
    "dpm-solver++": Solver(dpm_solver, "ddpm", 20, most=TRAIN_STEPS - 1),
    "euler": Solver(euler, "flow", 25, shifts=True),
    "heun": Solver(heun, "flow", 25, calls_per_step=2, shifts=True),
    "unipc": Solver(unipc, "flow", 10, shifts=True),
    "dopri5": Solver(dopri5, "flow", 1, adaptive=True),
    "sde": Solver(sde, "flow", 250, fewest=2, stochastic=True),
}
"""Solvers by name. To add one: a function (predict, x, steps, draw) -> x, and its process."""


def fixed_solvers(process: str) -> dict[str, Solver]:
    """Deterministic solvers of a process with fixed steps."""
    return {name: each for name, each in SOLVERS.items() if each.process == process and not each.adaptive and not each.stochastic}


def find_solver(process: Process, name: str | None) -> tuple[str, Solver]:
    """The solver of that name, or the process's default, with its name; an error if it samples another process."""
    name = name or process.default_solver
    fitting = [known for known, solver in SOLVERS.items() if solver.process == process.name]
    if name not in fitting:
        raise UserError(f"Solver {name!r} is not one for a {process.title}.", hint=f"Choose among {', '.join(fitting)}.")
    return name, SOLVERS[name]


def refuse_steps(solver: Solver, steps: int) -> None:
    if steps < solver.fewest or (solver.most is not None and steps > solver.most):
        possible = f"at least {solver.fewest}" if solver.most is None else f"{solver.fewest} to {solver.most}"
        raise UserError(f"{steps} steps cannot be taken.", hint=f"Pass {possible}.")
