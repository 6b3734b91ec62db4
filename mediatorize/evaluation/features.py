"""Samples are judged by their features, and by class scores if the extractor gives them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mediatorize.errors import UserError
from mediatorize.evaluation.digits import digit_classifier, digit_images
from mediatorize.evaluation.metrics import Features, Statistics, frechet_distance, precision_and_recall, statistics_of

Extract = Callable[[Tensor], tuple[Features, Features | None]]
"""Images (b, channels, h, w) in [-1, 1] -> features (b, f) and class scores (b, classes), None where it has none."""

Pictures = NDArray[np.uint8]
"""(n, height, width, channels)"""


@dataclass(frozen=True)
class Reference:
    """What samples are compared with."""

    name: str
    statistics: Statistics
    features: Features | None
    """(n, f), where its pictures are there."""


@dataclass(frozen=True, kw_only=True)
class Extractor:
    name: str
    extract: Extract
    of_bytes: bool = True
    """Whether it looks at pictures as they are stored, rounded to bytes, rather than at the samples."""
    is_inception: bool = False
    own_reference: Callable[[], Reference] | None = None
    """Makes the default reference; None means the teacher's own samples."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    frechet_distance: float
    precision: float | None
    recall: float | None
    accuracy: float | None


def digits_extractor() -> Extractor:
    """The classifier of real digits, trained when it is first needed; compares with the real digits."""

    def extract(images: Tensor) -> tuple[Features, Features | None]:
        classifier = digit_classifier()
        features = classifier.features(images[:, :1])  # a reference may hold grey as three channels
        return features, classifier.scores(features)

    def real_digits() -> Reference:
        real, _ = extract(digit_images()[0])
        return Reference("the real digits", statistics_of(real), real)

    return Extractor(name="the digits classifier", extract=extract, of_bytes=False, own_reference=real_digits)


def inception_extractor(network: Callable[[Tensor], Tensor], name: str, device: torch.device) -> Extractor:
    """FID's Inception (`evaluation.inception`), which is on `device`."""

    def extract(images: Tensor) -> tuple[Features, Features | None]:
        pictures = images.expand(-1, 3, -1, -1).to(device)
        with torch.no_grad():
            return network(pictures).cpu().numpy(), None

    return Extractor(name=f"FID's Inception ({name})", extract=extract, is_inception=True)


def network_extractor(network: Callable[[Tensor], Any], name: str, device: torch.device, source: str = "") -> Extractor:
    """Any network on `device`: images (b, channels, h, w) in [-1, 1] -> features (b, f), or a pair of features and class scores.

    Args:
        source: what error messages call it; its name if empty.
    """
    source = source or name

    def extract(images: Tensor) -> tuple[Features, Features | None]:
        try:
            with torch.no_grad():
                output = network(images.to(device))
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{source}: does not take {list(images.shape)} float32 images ({reason}).",
                hint="Export it with a dynamic batch, for pictures of this size and these channels.",
            ) from error
        features, scores = (*output, None)[:2] if isinstance(output, tuple | list) else (output, None)
        if not isinstance(features, Tensor) or len(features) != len(images):
            raise UserError(f"{source}: does not give one row of features per image.", hint="Return (b, f), or (b, f) and (b, classes).")
        return features.flatten(1).double().cpu().numpy(), None if scores is None else scores.double().cpu().numpy()

    return Extractor(name=name, extract=extract)


def as_images(pictures: Pictures) -> Tensor:
    """(b, h, w, c) bytes -> (b, c, h, w) in [-1, 1]"""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def as_bytes(images: Tensor) -> Pictures:
    """(b, c, h, w) in [-1, 1] -> (b, h, w, c) bytes: the inverse, rounded."""
    scaled = ((images.float() + 1) * 127.5).round().clamp(0, 255)
    return scaled.permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()


def reference_of(name: str, pictures: Pictures, extractor: Extractor, *, stored: Statistics | None = None, batch: int = 128) -> Reference:
    """What samples are compared with, from pictures.

    Args:
        stored: statistics of the pictures' features by some network. They are used with FID's Inception alone, whose they are by
            convention; any other extractor looks at the pictures.
        batch: pictures at a time.
    """
    images = (as_images(pictures[first : first + batch]) for first in range(0, len(pictures), batch))
    features = np.concatenate([extractor.extract(part)[0] for part in images])
    return Reference(name, stored if stored is not None and extractor.is_inception else statistics_of(features), features)


def judge(features: Features, scores: Features | None, labels: NDArray[np.int64], reference: Reference) -> Quality:
    """Quality of samples by their features (n, f), scores (n, classes) and meant labels (n,)."""
    width, expected = features.shape[1], len(reference.statistics.mean)
    if width != expected:
        raise UserError(
            f"{reference.name}: its statistics are of {expected} features, samples have {width}.", hint="They must be of the same network."
        )
    precision, recall = (None, None) if reference.features is None else precision_and_recall(reference.features, features)
    return Quality(
        frechet_distance=frechet_distance(features, reference.statistics),
        precision=precision,
        recall=recall,
        accuracy=None if scores is None else float((scores.argmax(1) == labels).mean()),
    )
