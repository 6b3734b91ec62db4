"""The teacher's own solution: its ODE with so many calls that a plan's error is not the reference's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mediatorize.diffusion.plan import Setting
from mediatorize.errors import UserError
from mediatorize.planning.judge import relative_errors
from mediatorize.planning.path import Path

ORDER = 3
"""Of the Adams-Bashforth method that solves the teacher's ODE. Networks are not smooth enough in time for a higher one to pay."""
FEWEST_CALLS, MOST_CALLS = 60, 640
CHECKED_CALLS = 40
"""The check begins with these and half as many, then doubles them."""
TOLERANCE = 5e-4
"""Median relative error that the reference may have, by its own check."""


class Denoiser(Protocol):
    """A model as the algorithms see it: a black box that is called with states, a time, and whose rows those are."""

    def __call__(self, x: Tensor, t: float, uncond: bool, levels: Any, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Outputs (b, c, ...) of the conditional and, where asked for, of the unconditional half, float32, in the solver's terms.

        Args:
            x: states (b, c, ...).
            t: the solver's time.
            rows: (b,) which sample's conditioning each state has.
        """


def adams_weights(places: Sequence[float], start: float, stop: float) -> list[float]:
    """Weights of velocities at `places`, whose interpolating polynomial is integrated from `start` to `stop` (Adams-Bashforth)."""
    count, length = len(places), stop - start
    powers = np.vander((np.asarray(places) - start) / length, count, increasing=True).T
    weights: list[float] = (length * np.linalg.solve(powers, 1 / np.arange(1, count + 1))).tolist()
    return weights


def cosine_grid(path: Path, calls: int) -> list[float]:
    """`calls` + 1 places from the path's start to its end, close together at both."""
    return [path.start + (path.end - path.start) * (1 - math.cos(math.pi * k / calls)) / 2 for k in range(calls + 1)]


@dataclass(frozen=True)
class Reference:
    """Solutions from some noises, with their states on the way. States are coefficients, as in `diffusion.plan`."""

    u: Tensor
    """(m,) float64, ascending; m is 0 where the way was not kept."""
    z: Tensor
    """(m, n, c, ...) states."""
    velocity: Tensor
    """(m, n, c, ...) of the same."""
    final: Tensor
    """(n, c, ...) the data."""

    def at(self, u: float) -> Tensor:
        """The states at any place (n, c, ...): cubic Hermite between the nearest two; the data at 1."""
        if u >= 1:
            return self.final
        k = int(torch.searchsorted(self.u, u, right=True).clamp(1, len(self.u) - 1)) - 1
        left, right = float(self.u[k]), float(self.u[k + 1])
        length, s = right - left, (u - left) / (right - left)
        return (
            (1 + 2 * s) * (1 - s) ** 2 * self.z[k]
            + s * (1 - s) ** 2 * length * self.velocity[k]
            + s**2 * (3 - 2 * s) * self.z[k + 1]
            + s**2 * (s - 1) * length * self.velocity[k + 1]
        )

    def first(self, count: int) -> Reference:
        """Of the first `count` samples."""
        if not len(self.u):
            return Reference(self.u, self.z, self.velocity, self.final[:count])
        return Reference(self.u, self.z[:, :count], self.velocity[:, :count], self.final[:count])


@torch.no_grad()
def solve(
    denoise: Denoiser,
    setting: Setting,
    path: Path,
    guided: Callable[[float], bool],
    noise: Tensor,
    rows: Tensor,
    calls: int,
    on_call: Callable[[], object] | None = None,
    keep: bool = False,
) -> Reference:
    """Integrates dz/du = velocity by an Adams-Bashforth method on a cosine grid; states are kept in float64 between calls.

    Args:
        setting: with velocities as features, guided.
        guided: whether guidance holds at a place u.
        noise: (n, c, ...); rows: (n,).
        keep: the states on the way, too, which a fit needs.

    Raises:
        UserError: it diverges.
    """
    places = cosine_grid(path, calls)
    z = setting.bands.to(noise.float() / sum(path.factors(path.time(places[0])))).double()
    states: list[Tensor] = []
    velocities: list[Tensor] = []
    recent: list[Tensor] = []
    for k, u in enumerate(places):
        last = k == calls
        if not (last and path.end >= 1):  # else u is the data itself, where the model is not called
            t = path.time(u)
            signal, sigma = path.factors(t)
            halves = denoise(setting.bands.back(z.float()) * (signal + sigma), t, guided(u), None, rows)
            recent = [*recent[1 - ORDER :], setting.features(z.float(), *halves, signal, sigma)["c"]]
            if on_call is not None:
                on_call()
        if keep:
            states.append(z.float())
            velocities.append(recent[-1])
        if last and path.end >= 1:
            break
        own = recent[-1:] if last else recent
        weights = adams_weights(places[k - len(own) + 1 : k + 1], u, 1.0 if last else places[k + 1])
        z = z + sum(w * v.double() for w, v in zip(weights, own, strict=True))
    if not z.isfinite().all():
        raise UserError("The teacher's samples are not finite.", hint="Try --dtype float32 or less guidance; check the checkpoint.")
    way = (torch.tensor(places, dtype=torch.float64), torch.stack(states), torch.stack(velocities)) if keep else (z.new_zeros(0),) * 3
    return Reference(*way, z.float())


def calls_needed(solved: Callable[[int], Tensor], tolerance: float = TOLERANCE) -> tuple[int, float]:
    """How many calls a reference needs, and the median relative error that it then has, by Richardson's extrapolation.

    Solutions with n, 2n and 4n calls tell the order at which they converge, and so how far the last of them is from the limit.

    Args:
        solved: number of calls -> data (n, c, ...) of a few samples.
    """
    calls = CHECKED_CALLS
    before, last = solved(calls // 2), solved(calls)
    change = float(relative_errors(before, last).median())
    while True:
        after = solved(2 * calls)
        smaller = float(relative_errors(last, after).median())
        order = min(max(math.log2(max(change, 1e-12) / max(smaller, 1e-12)), 1.0), float(ORDER))
        error = smaller / (2**order - 1)
        calls, last, change = 2 * calls, after, smaller
        if error <= tolerance:  # fewer calls may do
            fewer = max(FEWEST_CALLS, math.ceil(calls * (error / tolerance) ** (1 / order)))
            return fewer, error * (calls / fewer) ** order
        if calls >= MOST_CALLS:
            return calls, error
