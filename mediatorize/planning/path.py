"""The way from noise to data: how far a state is (u), at which time a model is asked there, and with which factors of data and noise.

u = signal / (signal + noise) runs from about 0 to 1 for every process. With z = x / (signal + noise), dz/du = data - noise: in these
coordinates a DDPM is a linear flow (arXiv 2208.13753 and 2403.03206 use the same change of variables).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from mediatorize.diffusion.process import BETAS, TRAIN_STEPS
from mediatorize.errors import UserError


@dataclass(frozen=True)
class Path:
    """One process's way. The last call of any plan is before `end`; from there one step leads to data (u = 1)."""

    start: float
    """u of pure noise."""
    end: float
    """The largest u at which the model can be called; 1 where that is the data itself."""
    time: Callable[[float], float]
    """u -> the solver's time."""
    factors: Callable[[float], tuple[float, float]]
    """The solver's time -> signal, noise."""


@cache
def ddpm_path() -> Path:
    """DiT's process between its 1000 steps: the logarithm of the data's share is a cubic spline through them (arXiv 2006.11239)."""
    from scipy.interpolate import CubicSpline
    from scipy.optimize import brentq

    log_kept = CubicSpline(np.arange(-1, TRAIN_STEPS), np.concatenate([[0.0], np.log1p(-BETAS).cumsum()]))

    def factors(t: float) -> tuple[float, float]:
        kept = float(log_kept(t))
        return math.exp(kept / 2), math.sqrt(-math.expm1(kept))

    def how_far(t: float) -> float:
        signal, noise = factors(t)
        return signal / (signal + noise)

    last = float(TRAIN_STEPS - 1)
    start, end = how_far(last), how_far(0.0)

    def time(u: float) -> float:
        if u <= start or u >= end:
            return last if u <= start else 0.0
        return float(brentq(lambda t: how_far(t) - u, 0.0, last, xtol=1e-9))

    return Path(start, end, time, factors)


FLOW = Path(0.0, 1.0, lambda u: u, lambda t: (t, 1 - t))
"""The linear flow of SiT: x = t data + (1 - t) noise."""


def path_of(process: str) -> Path:
    """The way of a process by its name."""
    if process == "ddpm":
        return ddpm_path()
    if process == "flow":
        return FLOW
    raise UserError(f"No plans are known for the process {process!r}.", hint="Plans are for ddpm and flow.")
