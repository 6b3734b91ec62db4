"""Distances between sets of features."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.float64]


def frechet_distance(first: Features, second: Features) -> float:
    """Squared Frechet distance of the Gaussians fitted to two sets (arXiv 1706.08500), (n, f) and (k, f).

    |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)); the last trace is taken over the symmetric S1^(1/2) S2 S1^(1/2).
    """
    from scipy.linalg import eigh

    mean_gap = first.mean(0) - second.mean(0)
    cov1, cov2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    values, vectors = eigh(cov1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(eigh(root @ cov2 @ root, eigvals_only=True).clip(0)).sum()
    return float(mean_gap @ mean_gap + np.trace(cov1) + np.trace(cov2) - 2 * cross)


def distance_of_halves(features: Features, splits: int = 10, seed: int = 0) -> float:
    """The mean distance between random halves of one set: what no sampler can be expected to beat at this sample size."""
    random = np.random.default_rng(seed)
    half = len(features) // 2
    distances = []
    for _ in range(splits):
        order = random.permutation(len(features))
        distances.append(frechet_distance(features[order[:half]], features[order[half:]]))
    return float(np.mean(distances))
