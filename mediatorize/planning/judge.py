"""How far samples are from the teacher's, sample by sample."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

FLIPPED = 0.5
"""A sample whose relative error is above this has flipped to another one."""

RESAMPLES = 1000
"""Of the bootstrap."""


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Relative errors |sample - teacher's| / |teacher's| of single samples, summed up."""

    samples: int
    median: float
    mean: float
    geometric: float
    """The geometric mean: what candidates are compared by. Samples that flip to another mode do not rule it."""
    flipped: float
    """The share of samples whose error is above `FLIPPED`."""
    share: float | None = None
    """Of a step-wise rule: what these samples cost, as a share of the softmax sampler's."""
    interval: tuple[float, float] | None = None
    """Of the median: 95% of bootstrap resamples (`with_interval`)."""

    @classmethod
    def of(cls, samples: Tensor, expected: Tensor) -> Errors:
        """Of samples (n, c, h, w)."""
        return cls.summed(relative_errors(samples, expected))

    @classmethod
    def summed(cls, errors: Tensor, share: float | None = None) -> Errors:
        """Of single samples' errors (n,)."""
        return cls(
            samples=len(errors),
            median=float(errors.median()),
            mean=float(errors.mean()),
            geometric=float(errors.clamp(min=1e-9).log().mean().exp()),
            flipped=float((errors > FLIPPED).float().mean()),
            share=share,
        )


def relative_errors(samples: Tensor, expected: Tensor) -> Tensor:
    """(n, c, h, w) each -> (n,): how far each sample is from the expected one, as a share of that one's norm."""
    return (samples - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1).clamp(min=1e-12)


def with_interval(errors: Tensor) -> Errors:
    """Of single samples' errors (n,), with the bootstrap interval of their median (always the same resamples)."""
    draw = torch.randint(0, len(errors), (RESAMPLES, len(errors)), generator=torch.Generator().manual_seed(0))
    medians = errors.double()[draw].median(dim=1).values.sort().values
    low, high = float(medians[RESAMPLES // 40]), float(medians[-1 - RESAMPLES // 40])
    return replace(Errors.summed(errors), interval=(low, high))
