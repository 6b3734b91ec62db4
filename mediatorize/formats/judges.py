"""What judges samples, on disk: networks that give features, and what samples are compared with. Nothing is downloaded."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mediatorize.errors import UserError
from mediatorize.evaluation import digits, fashion
from mediatorize.evaluation.features import Extractor, Reference, digits_extractor, inception_extractor, network_extractor, reference_of
from mediatorize.evaluation.metrics import Statistics, statistics_of
from mediatorize.formats.tensors import read_safetensors
from mediatorize.model.architecture import Architecture


def refuse_unfit(
    model: str, arch: Architecture, features: str, inception: Path | None, reference: Path | None, vae: Path | None, npz: bool
) -> None:
    """Refuses, before anything is sampled, what cannot judge this model's samples.

    Args:
        model: where it was loaded from, for messages.
        npz: whether pictures are to be written as an array.
    """
    own = JUDGES[features].pictures if features in JUDGES and inception is None else None
    if own is not None and (arch.channels, arch.input_size, arch.classes) != (1, (own.side, own.side), 10):
        raise UserError(
            f"{model}: the {features} classifier judges {own.side}x{own.side} {own.of}, not {arch.name}.", hint="Pass --features none."
        )
    has_pictures = arch.channels in (1, 3) or vae is not None
    if vae is not None and arch.channels in (1, 3):
        raise UserError(f"{model}: makes pixels, which no VAE decodes.", hint="Leave --vae out.")
    if not has_pictures and (npz or inception is not None or features != "none"):
        raise UserError(f"{model}: makes latents of {arch.channels} channels, which are no pictures.", hint="Pass --vae PATH.")
    if reference is not None and features == "none" and inception is None:
        raise UserError("--reference is of no use with --features none.", hint="Pass --inception-weights or --features.")
    for path in (inception, reference):
        if path is not None and not path.is_file():
            raise UserError(f"{path}: no such file.", hint="Nothing is downloaded: give a file on disk.")


FASHION = Path(__file__).with_name("fashion.safetensors")
"""The weights of the fashion classifier, and `reference`: its features (n, 64) of Fashion-MNIST's test set: recipes/fashion/train.py."""


def open_fashion(device: torch.device) -> Extractor:
    """The classifier of Fashion-MNIST; compares with the real products of the test set, whose features are in its file.

    Raises:
        UserError: its file is not there, or damaged.
    """
    if not FASHION.is_file():
        raise UserError(
            f"{FASHION}: no such file; the fashion classifier comes with mediatorize.",
            hint=f"In the repository, run python -m recipes.fashion.train classifier --out {FASHION}",
        )
    stored = {name: tensor.read() for name, tensor in read_safetensors(FASHION)[0].items()}
    real = stored.pop("reference").double().numpy()
    network = fashion.FashionClassifier()
    network.load_state_dict(stored)
    extractor = network_extractor(network.eval().to(device), "the fashion classifier", device)
    return replace(extractor, own_reference=lambda: Reference("the real products", statistics_of(real), real))


@dataclass(frozen=True)
class GreyPictures:
    """Square grey pictures of ten classes."""

    side: int
    """In pixels."""
    of: str
    """What they show, for messages."""


@dataclass(frozen=True)
class Judge:
    """What judges samples, by name."""

    open: Callable[[torch.device], Extractor | None]
    pictures: GreyPictures | None = None
    """What it is for; None if it is for any pictures."""


JUDGES: dict[str, Judge] = {
    "digits": Judge(lambda device: digits_extractor(), GreyPictures(digits.SIDE, "digits")),
    "fashion": Judge(open_fashion, GreyPictures(fashion.SIDE, "products")),
    "none": Judge(lambda device: None),
}
"""What `--features` can name beside a file. To add one: a function that gives an `Extractor`, and an entry."""


def open_extractor(features: str, inception_weights: Path | None, device: torch.device) -> Extractor | None:
    """What judges samples: FID's Inception where its weights are given, else a judge by name, or a program of torch.export."""
    if inception_weights is not None:
        from mediatorize.evaluation.inception import load_inception

        return inception_extractor(load_inception(inception_weights).to(device), inception_weights.name, device)
    return JUDGES[features].open(device) if features in JUDGES else read_program(Path(features), device)


def read_program(path: Path, device: torch.device) -> Extractor:
    """A torch.export program: images (b, channels, h, w) in [-1, 1] -> features, or a pair of features and class scores."""
    if not path.is_file():
        raise UserError(f"{path}: no such file.", hint=f"Pass --features {', '.join(JUDGES)} or a .pt2 file of torch.export.")
    try:
        network: Any = torch.export.load(path).module().to(device)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a program of torch.export ({reason}).", hint="Save one with torch.export.save.") from error
    return network_extractor(network, path.name, device, source=str(path))


def read_reference(path: Path, extractor: Extractor, batch: int) -> Reference:
    """A `.npz` of statistics (mu, sigma), of pictures (arr_0, uint8 (n, h, w, c)), or both, as ADM's reference batches are."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:  # np.load leaves a broken file open
            pictures = arrays["arr_0"] if "arr_0" in arrays.files else None
            stored = Statistics(arrays["mu"], arrays["sigma"]) if {"mu", "sigma"} <= set(arrays.files) else None
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a .npz that can be read ({error}).", hint="Copy or download it again.") from error
    if pictures is None:
        if stored is None:
            raise UserError(f"{path}: has neither mu and sigma nor arr_0.", hint="A reference holds statistics or pictures.")
        return Reference(path.name, stored, None)
    if pictures.dtype != np.uint8 or pictures.ndim != 4:
        raise UserError(f"{path}: arr_0 is {pictures.dtype} {list(pictures.shape)}.", hint="Pictures are uint8 (n, h, w, channels).")
    return reference_of(path.name, pictures, extractor, stored=stored, batch=batch)
