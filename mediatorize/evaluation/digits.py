"""scikit-learn's handwritten digits as 16x16 pictures, and a classifier of them: real data that ships with a dependency."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mediatorize.evaluation.metrics import frechet_distance

if TYPE_CHECKING:
    from sklearn.neural_network import MLPClassifier

SIDE = 16


def digit_images() -> tuple[Tensor, Tensor]:
    """All 1,797 digits, upsampled bicubically from 8x8: (1797, 1, 16, 16) in [-1, 1], and their labels (1797,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    large = F.interpolate(small, size=(SIDE, SIDE), mode="bicubic", align_corners=False).clamp(0, 1)
    return large * 2 - 1, torch.from_numpy(digits.target).long()


@dataclass(frozen=True)
class DigitClassifier:
    """A two-layer perceptron; its 64 hidden units are the features that distances are measured in."""

    model: MLPClassifier

    def features(self, images: Tensor) -> NDArray[np.float64]:
        """(n, 1, 16, 16) in [-1, 1] -> (n, 64)"""
        flat = images.clamp(-1, 1).flatten(1).double().numpy()
        return np.maximum(flat @ self.model.coefs_[0] + self.model.intercepts_[0], 0)

    def scores(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n, 64) -> (n, 10), the highest at the class that is seen."""
        return features @ self.model.coefs_[1] + self.model.intercepts_[1]

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """The share of images that are recognised as what they were meant to be."""
        return float((self.scores(self.features(images)).argmax(1) == labels.numpy()).mean())


@cache
def digit_classifier() -> DigitClassifier:
    """Trained anew from a fixed seed, on all real digits; takes about two seconds."""
    from sklearn.neural_network import MLPClassifier

    images, labels = digit_images()
    model = MLPClassifier(hidden_layer_sizes=(64,), alpha=1e-2, max_iter=400, tol=1e-3, random_state=0)
    return DigitClassifier(model.fit(images.flatten(1).double().numpy(), labels.numpy()))


def distance_to_digits(images: Tensor) -> float:
    """Frechet distance of pictures (n, 1, 16, 16) in [-1, 1] to all real digits, in the classifier's features."""
    classifier = digit_classifier()
    return frechet_distance(classifier.features(images), classifier.features(digit_images()[0]))
