"""Every random number of the project is a function of (seed, purpose, index): batches, devices and resumed runs do not change it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


def _spread(*words: int) -> int:
    """64 well-mixed bits of a few whole numbers."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


PURPOSES: dict[str, Callable[..., int]] = {
    # of one sample
    "initial noise": lambda seed, sample: _spread(seed, sample, 0),
    "step noise": lambda seed, sample, step: _spread(seed, sample, step + 1),
    "direction": lambda seed, sample, direction: _spread(seed, sample, 1_000_001 + direction),
    "data item": lambda seed, item: _spread(seed, item, 0, 1),
    "training state": lambda seed, place: _spread(seed, place, 0, 3),
    # of one layer or training step
    "layer": lambda seed, layer: seed * 1_000_003 + layer,
    "narrow MLP": lambda seed, layer: _spread(seed, layer, 0, 2),
    "levels": lambda seed, step: seed * 1_000_003 + step,
    "training step": lambda seed, step: seed * 1_000_003 + step,
    "order": lambda seed, rounds, sweep: (seed * 1_000_003 + rounds) * 1_009 + sweep,
    # seeds of whole samplers, whose samples nobody else draws
    "states": lambda seed: seed,
    "round": lambda seed, rounds: seed + 1 + rounds,
    "held-out training": lambda seed: 2**31,
    "effects": lambda seed: 2**31 + 1,
    "calibration": lambda seed: 2**33 + 2 * seed,
    "held-out calibration": lambda seed: 2**33 + 2 * seed + 1,
    "reported calibration": lambda seed: 2**34 + seed,
}
"""What randomness is for -> (seed, index) -> the seed of a generator. An index is whole numbers: of a sample, a step, a layer, a round."""


def seed_for(seed: int, purpose: str, *index: int) -> int:
    """The seed of the randomness for one purpose, for what is itself seeded by a number: a sampler, scikit-learn."""
    return PURPOSES[purpose](seed, *index)


def generator(seed: int, purpose: str, *index: int) -> torch.Generator:
    """A generator of its own on the CPU for (seed, purpose, index)."""
    return torch.Generator().manual_seed(seed_for(seed, purpose, *index))


def gaussian(seed: int, purpose: str, samples: Sequence[int], shape: Sequence[int], *index: int) -> Tensor:
    """Gaussian noise (len(samples), *shape); each sample's depends on (seed, purpose, its number, index) alone."""
    return torch.stack([torch.randn(tuple(shape), generator=generator(seed, purpose, sample, *index)) for sample in samples])


def spread_labels(classes: int, count: int, seed: int) -> Tensor:
    """(count,) classes in random order, none again before all others."""
    order = torch.randperm(classes, generator=generator(seed, "states"))
    return order.repeat(-(-count // classes))[:count]
