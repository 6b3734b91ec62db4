"""What the model's input and output mean: how data is noised, what is predicted, how far along a time is.

DiT (`family="dit"`): 1000-step DDPM, linear betas from 1e-4 to 0.02, predicts the noise (arXiv 2006.11239, 2212.09748).
SiT (`family="sit"`): x_t = t data + (1 - t) noise, predicts the velocity data - noise (arXiv 2401.08740); REPA's runs t and v backwards.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mediatorize.model.architecture import Architecture

TRAIN_STEPS = 1000
BETAS = np.linspace(1e-4, 0.02, TRAIN_STEPS)
"""Noise variances of DiT's training process, per step."""


def alphas_cumprod() -> Tensor:
    """The share of the data's variance that is left at each of DiT's timesteps: (1000,) float64."""
    return torch.from_numpy(np.cumprod(1 - BETAS))


def noised(arch: Architecture, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The state at time `t` (b,), in the checkpoint's own time, of `data` and `noise` (b, c, h, w)."""
    data_scale, noise_scale = (s.to(data.dtype).view(-1, 1, 1, 1) for s in signal_and_noise(arch, t))
    return data_scale * data + noise_scale * noise


def signal_and_noise(arch: Architecture, t: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of data and noise in the state at time `t` (b,)."""
    if arch.family == "dit":
        kept = alphas_cumprod().to(t.device)[t.long()]
        return kept.sqrt(), (1 - kept).sqrt()
    share = noise_level(arch, t)
    return 1 - share, share


def target(arch: Architecture, data: Tensor, noise: Tensor) -> Tensor:
    """What the model is trained to predict (without DiT's variance rows)."""
    if arch.family == "dit":
        return noise
    return noise - data if arch.reversed_time else data - noise


def velocity(arch: Architecture, output: Tensor) -> Tensor:
    """A SiT's output as data - noise."""
    return -output if arch.reversed_time else output


def noise_level(arch: Architecture, t: Tensor) -> Tensor:
    """The checkpoint's own time as a share in [0, 1]: 0 is data, 1 is noise."""
    if arch.family == "dit":
        return t / (TRAIN_STEPS - 1)
    return t if arch.reversed_time else 1 - t


def own_time(arch: Architecture, level: Tensor) -> Tensor:
    """The inverse of `noise_level`; DiT's is not rounded to a step."""
    if arch.family == "dit":
        return level * (TRAIN_STEPS - 1)
    return level if arch.reversed_time else 1 - level
