"""One object per diffusion process says what a model's input and output mean: noising, target, noise level, times, output for solvers.

Times are in the checkpoint's own unit, except solver times: a DDPM's timesteps 0..999, or a flow's 0..1 from noise to data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mediatorize.model.architecture import Architecture, Family

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TRAIN_STEPS = 1000
BETAS = np.linspace(1e-4, 0.02, TRAIN_STEPS)
"""Noise variances of DiT's training process, per step."""


def alphas_cumprod() -> Tensor:
    """The share of the data's variance that is left at each of DiT's timesteps: (1000,) float64."""
    import torch  # here, so that tables of solvers are read without it

    return torch.from_numpy(np.cumprod(1 - BETAS))


def respaced_timesteps(steps: int) -> list[int]:
    """`steps` timesteps of DiT's 1000, even from 0 to 999, ascending; summed up as DiT's respace.py does, or halves round otherwise."""
    if steps == 1:
        return [0]
    stride = (TRAIN_STEPS - 1) / (steps - 1)
    return [round(place) for place in accumulate([stride] * (steps - 1), initial=0.0)]


def ddim_step(x: Tensor, noise: Tensor, kept: float, kept_after: float) -> Tensor:
    """A state of a DDPM at its next time, by DDIM (arXiv 2010.02502, eq. 12 with sigma 0).

    Args:
        x, noise: the state and the noise predicted in it (b, c, h, w).
        kept, kept_after: the share of the data's variance (`alphas_cumprod`) at the state's time and at the next; 1 is data.
    """
    data = (x - (1 - kept) ** 0.5 * noise) / kept**0.5
    return kept_after**0.5 * data + (1 - kept_after) ** 0.5 * noise


class Process(Protocol):
    """How data become noise, and what a model of that process predicts."""

    @property
    def name(self) -> str:
        """What solvers of this process are listed under."""

    @property
    def title(self) -> str:
        """What its models are called, for messages."""

    @property
    def default_solver(self) -> str: ...

    @property
    def time_in_words(self) -> str:
        """What a model's time is, for people who call it themselves."""

    @property
    def noise_level_in_words(self) -> str:
        """The noise level as a formula of the time t."""

    def signal_and_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of data and noise in the state at time `t` (b,)."""

    def target(self, data: Tensor, noise: Tensor) -> Tensor:
        """What the model is trained to predict (without DiT's variance rows)."""

    def told_to_solver(self, output: Tensor) -> Tensor:
        """The model's output as solvers take it."""

    def noise_level(self, t: Tensor) -> Tensor:
        """A time as a share in [0, 1]: 0 is data, 1 is noise."""

    def time_at(self, noise_level: Tensor) -> Tensor:
        """The inverse of `noise_level`; a DDPM's is not rounded to a step."""

    def own_time(self, t: float) -> float:
        """A solver's time as the checkpoint's."""

    def training_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Times (count,) as the originals draw them in training."""

    def training_loss(self, output: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """What the originals train a model by: of its output (b, rows, h, w) against `target` (b, c, h, w) at times t (b,)."""


@dataclass(frozen=True)
class DDPM:
    """1000 steps, linear betas from 1e-4 to 0.02, predicts the noise (arXiv 2006.11239, 2212.09748). Solvers use the checkpoint's times."""

    name = "ddpm"
    title = "DIT"
    default_solver = "ddim"
    time_in_words = "0 to 999, 999 is noise"
    noise_level_in_words = "t / 999"

    def signal_and_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        kept = alphas_cumprod().to(t.device)[t.long()]
        return kept.sqrt(), (1 - kept).sqrt()

    def target(self, data: Tensor, noise: Tensor) -> Tensor:
        return noise

    def told_to_solver(self, output: Tensor) -> Tensor:
        return output

    def noise_level(self, t: Tensor) -> Tensor:
        return t / (TRAIN_STEPS - 1)

    def time_at(self, noise_level: Tensor) -> Tensor:
        return noise_level * (TRAIN_STEPS - 1)

    def own_time(self, t: float) -> float:
        return t

    def training_times(self, count: int, generator: torch.Generator) -> Tensor:
        import torch

        return torch.randint(0, TRAIN_STEPS, (count,), generator=generator).float()

    def training_loss(self, output: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """Squared error of the noise and, where the model has variance rows, `variance_loss` of them."""
        noise, *logits = output.split(target.shape[1], dim=1)
        error = (noise - target).square().mean()
        return error + variance_loss(noise.detach(), target, logits[0], t) if logits else error


@dataclass(frozen=True)
class LinearFlow:
    """x_t = t data + (1 - t) noise, predicts the velocity data - noise (arXiv 2401.08740)."""

    reversed_time: bool = False
    """REPA's convention: t = 1 is noise, and the output is noise - data."""

    name = "flow"
    title = "SIT"
    default_solver = "euler"

    @property
    def time_in_words(self) -> str:
        return f"0 to 1, 1 is {'noise' if self.reversed_time else 'data'}"

    @property
    def noise_level_in_words(self) -> str:
        return "t" if self.reversed_time else "1 - t"

    def signal_and_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        share = self.noise_level(t)
        return 1 - share, share

    def target(self, data: Tensor, noise: Tensor) -> Tensor:
        return noise - data if self.reversed_time else data - noise

    def told_to_solver(self, output: Tensor) -> Tensor:
        return -output if self.reversed_time else output

    def noise_level(self, t: Tensor) -> Tensor:
        return t if self.reversed_time else 1 - t

    def time_at(self, noise_level: Tensor) -> Tensor:
        return noise_level if self.reversed_time else 1 - noise_level

    def own_time(self, t: float) -> float:
        return 1 - t if self.reversed_time else t

    def training_times(self, count: int, generator: torch.Generator) -> Tensor:
        import torch

        return self.time_at(torch.rand(count, generator=generator))

    def training_loss(self, output: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """Squared error of the velocity."""
        return (output - target).square().mean()


PROCESSES: dict[Family, Callable[[Architecture], Process]] = {
    "dit": lambda arch: DDPM(),
    "sit": lambda arch: LinearFlow(arch.reversed_time),
    "lightningdit": lambda arch: LinearFlow(arch.reversed_time),
}
"""The process of every family."""


def process_of(arch: Architecture) -> Process:
    """What the inputs and outputs of a model of that architecture mean."""
    return PROCESSES[arch.family](arch)


def noised(process: Process, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The state at time `t` (b,) of `data` and `noise` (b, c, h, w)."""
    data_scale, noise_scale = (s.to(data.dtype).view(-1, 1, 1, 1) for s in process.signal_and_noise(t))
    return data_scale * data + noise_scale * noise


def variance_loss(predicted: Tensor, noise: Tensor, logits: Tensor, t: Tensor) -> Tensor:
    """KL of a DiT's reverse step from the true one, in bits, as a function of its variance (arXiv 2102.09672, eq. 15, 16).

    At t = 0 the true step has no variance, and that of t = 1 stands in. (The original has the likelihood of the data there.)

    Args:
        predicted: the model's noise (b, c, h, w), without a gradient, as the mean is not to learn from this.
        logits: the model's variance rows (b, c, h, w), from -1 (the smallest variance) to 1 (the largest).
        t: timesteps (b,).
    """
    import torch

    betas, kept = torch.from_numpy(BETAS), alphas_cumprod()
    kept_before = torch.cat([kept.new_ones(1), kept[:-1]])
    posterior = betas * (1 - kept_before) / (1 - kept)
    posterior[0] = posterior[1]

    def at(values: Tensor) -> Tensor:
        return values.to(t.device)[t.long()].to(predicted.dtype).view(-1, 1, 1, 1)

    log_small, log_large = at(posterior.log()), at(betas.log())
    log_variance = log_small + (logits + 1) / 2 * (log_large - log_small)
    gap = at(betas / ((1 - betas) * (1 - kept)).sqrt()) * (predicted - noise)  # of the two steps' means
    kl = (log_variance - log_small - 1 + (log_small - log_variance).exp() + gap.square() * (-log_variance).exp()) / 2
    return kl.mean() / math.log(2)
