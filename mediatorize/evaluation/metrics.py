"""Distances between sets of features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.float64]

NEIGHBOURS = 3
"""Whose distance is a sample's radius in precision and recall, as in the paper."""


@dataclass(frozen=True)
class Statistics:
    """The Gaussian fitted to a set of features: mean (f,) and covariance (f, f)."""

    mean: Features
    covariance: Features


def statistics_of(features: Features) -> Statistics:
    """Of (n, f)."""
    return Statistics(features.mean(0, dtype=np.float64), np.atleast_2d(np.cov(features, rowvar=False, dtype=np.float64)))


def frechet_distance(first: Features | Statistics, second: Features | Statistics) -> float:
    """Squared Frechet distance of the Gaussians fitted to two sets (arXiv 1706.08500), (n, f) and (k, f).

    |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)); the last trace is taken over the symmetric S1^(1/2) S2 S1^(1/2).
    """
    from scipy.linalg import eigh

    one, two = (each if isinstance(each, Statistics) else statistics_of(each) for each in (first, second))
    mean_gap = one.mean - two.mean
    values, vectors = eigh(one.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(eigh(root @ two.covariance @ root, eigvals_only=True).clip(0)).sum()
    return float(mean_gap @ mean_gap + np.trace(one.covariance) + np.trace(two.covariance) - 2 * cross)


def distance_of_halves(features: Features, splits: int = 10, seed: int = 0) -> float:
    """The mean distance between random halves of one set: what no sampler can be expected to beat at this sample size."""
    random = np.random.default_rng(seed)
    half = len(features) // 2
    distances = []
    for _ in range(splits):
        order = random.permutation(len(features))
        distances.append(frechet_distance(features[order[:half]], features[order[half:]]))
    return float(np.mean(distances))


def precision_and_recall(reference: Features, samples: Features, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """The share of samples among the reference and of the reference among the samples (arXiv 1904.06991): (n, f) and (k, f).

    A point is among a set if it is as near to any member as that member's k-th nearest neighbour in the set is.
    """
    return _share_among(samples, reference, neighbours), _share_among(reference, samples, neighbours)


def _share_among(points: Features, members: Features, neighbours: int) -> float:
    from sklearn.metrics import pairwise_distances_chunked
    from sklearn.neighbors import NearestNeighbors

    among = min(neighbours, len(members) - 1)
    radii = NearestNeighbors(n_neighbors=among, algorithm="brute").fit(members).kneighbors()[0][:, -1]
    chunks = pairwise_distances_chunked(points, members, reduce_func=lambda distances, start: (distances <= radii).any(1))
    return float(np.concatenate(list(chunks)).mean())
