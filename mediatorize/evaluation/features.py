"""What samples are judged by: features, and class scores where there are any. Nothing is downloaded."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mediatorize.errors import UserError
from mediatorize.evaluation.digits import digit_classifier
from mediatorize.evaluation.metrics import Features, Statistics, frechet_distance, precision_and_recall, statistics_of

Extract = Callable[[Tensor], tuple[Features, Features | None]]
"""Images (b, channels, h, w) in [-1, 1] -> features (b, f) and class scores (b, classes), None where it has none."""


@dataclass(frozen=True)
class Extractor:
    name: str
    extract: Extract
    of_bytes: bool = True
    """Whether it looks at pictures as they are stored, rounded to bytes, rather than at the samples."""
    is_inception: bool = False


@dataclass(frozen=True)
class Reference:
    """What samples are compared with."""

    name: str
    statistics: Statistics
    features: Features | None
    """(n, f), where its pictures are there."""


@dataclass(frozen=True)
class Quality:
    frechet_distance: float
    precision: float | None
    recall: float | None
    accuracy: float | None


def digits_extractor() -> Extractor:
    """The classifier of real digits, trained when it is first needed."""

    def extract(images: Tensor) -> tuple[Features, Features | None]:
        classifier = digit_classifier()
        features = classifier.features(images[:, :1])  # a reference may hold grey as three channels
        return features, classifier.scores(features)

    return Extractor("the digits classifier", extract, of_bytes=False)


def inception_extractor(path: Path, device: torch.device) -> Extractor:
    """FID's Inception with weights on disk."""
    from mediatorize.evaluation.inception import load_inception

    network = load_inception(path).to(device)

    def extract(images: Tensor) -> tuple[Features, Features | None]:
        pictures = images.expand(-1, 3, -1, -1).to(device)
        with torch.no_grad():
            return network(pictures).cpu().numpy(), None

    return Extractor(f"FID's Inception ({path.name})", extract, is_inception=True)


def program_extractor(path: Path, device: torch.device) -> Extractor:
    """A torch.export program: images (b, channels, h, w) in [-1, 1] -> features, or a pair of features and class scores."""
    if not path.is_file():
        raise UserError(f"{path}: no such file.", hint="Pass --features digits, none or a .pt2 file of torch.export.")
    try:
        network: Any = torch.export.load(path).module().to(device)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a program of torch.export ({reason}).", hint="Save one with torch.export.save.") from error

    def extract(images: Tensor) -> tuple[Features, Features | None]:
        try:
            with torch.no_grad():
                output = network(images.to(device))
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{path}: does not take {list(images.shape)} float32 images ({reason}).",
                hint="Export it with a dynamic batch, for pictures of this size and these channels.",
            ) from error
        features, scores = (*output, None)[:2] if isinstance(output, tuple | list) else (output, None)
        if not isinstance(features, Tensor) or len(features) != len(images):
            raise UserError(f"{path}: does not give one row of features per image.", hint="Return (b, f), or (b, f) and (b, classes).")
        return features.flatten(1).double().cpu().numpy(), None if scores is None else scores.double().cpu().numpy()

    return Extractor(path.name, extract)


def extract_all(extractor: Extractor, pictures: NDArray[np.uint8], batch: int) -> Features:
    """Features of (n, h, w, c) bytes."""
    parts = [extractor.extract(as_images(pictures[first : first + batch]))[0] for first in range(0, len(pictures), batch)]
    return np.concatenate(parts)


def as_images(pictures: NDArray[np.uint8]) -> Tensor:
    """(b, h, w, c) bytes -> (b, c, h, w) in [-1, 1]"""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def read_reference(path: Path, extractor: Extractor, batch: int) -> Reference:
    """A `.npz` of statistics (mu, sigma), of pictures (arr_0, uint8 (n, h, w, c)), or both, as ADM's reference batches are.

    Statistics are of some network's features. Where both are there they are used with FID's Inception, whose they are by convention; any
    other extractor looks at the pictures.
    """
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            held = set(arrays.files)
            pictures = arrays["arr_0"] if "arr_0" in held else None
            stored = Statistics(arrays["mu"], arrays["sigma"]) if {"mu", "sigma"} <= held else None
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a .npz that can be read ({error}).", hint="Copy or download it again.") from error
    if pictures is None and stored is None:
        raise UserError(f"{path}: has neither mu and sigma nor arr_0.", hint="A reference holds statistics or pictures.")
    features = None
    if pictures is not None:
        if pictures.dtype != np.uint8 or pictures.ndim != 4:
            raise UserError(f"{path}: arr_0 is {pictures.dtype} {list(pictures.shape)}.", hint="Pictures are uint8 (n, h, w, channels).")
        features = extract_all(extractor, pictures, batch)
    use_stored = stored is not None and (features is None or extractor.is_inception)
    return Reference(path.name, stored if use_stored and stored is not None else statistics_of(np.asarray(features)), features)


def judge(features: Features, scores: Features | None, labels: NDArray[np.int64], reference: Reference) -> Quality:
    """Quality of samples by their features (n, f), scores (n, classes) and meant labels (n,)."""
    width, expected = features.shape[1], len(reference.statistics.mean)
    if width != expected:
        raise UserError(
            f"{reference.name}: its statistics are of {expected} features, samples have {width}.", hint="They must be of the same network."
        )
    precision, recall = (None, None) if reference.features is None else precision_and_recall(reference.features, features)
    accuracy = None if scores is None else float((scores.argmax(1) == labels).mean())
    return Quality(frechet_distance(features, reference.statistics), precision, recall, accuracy)
