"""Pictures: latents decoded, values turned to bytes, grids and arrays written."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from mediatorize.errors import UserError
from mediatorize.evaluation.features import as_bytes
from mediatorize.formats.tensors import write_beside
from mediatorize.model.architecture import Architecture

VAE_SCALE = 0.18215
"""What latents of the SD VAE were multiplied by for DiT and SiT."""

Pixels = NDArray[np.uint8]
"""(n, height, width, channels)"""


def to_pixels(values: Tensor) -> Pixels:
    """(n, c, h, w) in [-1, 1] -> bytes (n, h, w, c)."""
    return as_bytes(values)


def load_vae(path: Path, device: torch.device) -> Any:
    """A diffusers `AutoencoderKL` folder, or a pipeline's folder that holds one; never downloaded."""
    from diffusers import AutoencoderKL

    folder = path / "vae" if (path / "vae").is_dir() else path
    if not (folder / "config.json").exists():
        raise UserError(f"{path}: no VAE (no config.json).", hint="Pass a folder of stabilityai/sd-vae-ft-ema or -mse on disk.")
    try:
        vae = AutoencoderKL.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: not a VAE of diffusers ({str(error).splitlines()[0]}).", hint="Copy the folder again.") from error
    return vae.to(device).eval()


def refuse_unknown_scale(arch: Architecture) -> None:
    """Refuses a model of which nothing says in what scale it takes a VAE's latents."""
    if not arch.latent_std and arch.channels != 4:
        raise UserError(
            f"{arch.name} works on normalised latents of {arch.channels} channels, and nothing here holds their mean and deviation.",
            hint="Convert it with --latent-stats latents_stats.pt, and use the bundle.",
        )


def scale_of_latents(arch: Architecture, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (c, 1, 1) of a VAE's latents z: the model works on (z - mean) / std. 0 and 1 / 0.18215 for the SD VAE."""
    mean, std = arch.latent_mean or (0.0,), arch.latent_std or (1 / VAE_SCALE,)
    return like.new_tensor(mean).view(-1, 1, 1), like.new_tensor(std).view(-1, 1, 1)


@torch.no_grad()
def decode(vae: Any, latents: Tensor, arch: Architecture) -> Tensor:
    """Latents (b, c, h, w) of a model -> (b, 3, height, width) in [-1, 1]"""
    mean, std = scale_of_latents(arch, latents)
    return vae.decode(latents * std + mean).sample


@torch.no_grad()
def encode(vae: Any, pixels: Tensor, noise: Tensor, arch: Architecture) -> Tensor:
    """(b, 3, height, width) in [-1, 1] -> latents (b, c, h, w) of a model: drawn from the VAE's posterior with `noise` (b, c, h, w)"""
    posterior = vae.encode(pixels).latent_dist
    mean, std = scale_of_latents(arch, noise)
    return (posterior.mean + posterior.std * noise - mean) / std


IMAGENET_CLASSES = 1000
"""A model of so many classes is taken to know ImageNet's, in their usual order."""


def class_names(labels: Sequence[int], classes: int) -> list[str]:
    """What people call the classes of pictures: the number, and the name where the model knows ImageNet's classes (timm has the names).

    Args:
        labels: of the pictures; `classes` itself is the null class.
        classes: how many the model knows.
    """
    if classes != IMAGENET_CLASSES:
        return ["no class" if label == classes else str(label) for label in labels]
    from timm.data import ImageNetInfo

    known = ImageNetInfo()
    return ["no class" if label == classes else f"{label} {known.index_to_description(label).split(',')[0]}" for label in labels]


def write_grid(path: Path, pixels: Pixels, columns: int, scale: int = 1, captions: Sequence[str] = ()) -> None:
    """A PNG of pictures in rows of `columns`, or of all where there are fewer; a white line of two pixels is around each.

    Args:
        scale: each pixel becomes a square of so many.
        captions: one line under each picture, shortened to its width, but only once where neighbours in a row share it; none: no lines.
    """
    from torchvision.utils import make_grid

    large = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    if captions:
        lines = ["" if place % columns and before == own else own for place, (before, own) in enumerate(pairwise(["", *captions]))]
        strips = np.stack([_caption(line, large.shape[2]) for line in lines])  # (n, height, width, 1)
        large = np.concatenate([large, strips.repeat(large.shape[3], axis=3)], axis=1)
    tiles = torch.from_numpy(large).permute(0, 3, 1, 2)
    sheet = make_grid(tiles, nrow=columns, padding=2, pad_value=255)
    if len(tiles) == 1:  # make_grid leaves a single picture as it is
        sheet = F.pad(sheet, (2, 2, 2, 2), value=255)
    image = Image.fromarray(sheet[0].numpy() if pixels.shape[3] == 1 else sheet.permute(1, 2, 0).numpy())
    write_beside(path, lambda beside: image.save(beside, format="PNG"))


def _caption(text: str, width: int) -> Pixels:
    """A line of text as a white strip (height, width, 1)."""
    size = min(max(width // 14, 11), 16)  # pixels
    font = ImageFont.load_default(size)
    shown = text
    while shown and font.getlength(shown) > width:
        shown = f"{shown.rstrip('…')[:-1]}…" if len(shown) > 2 else ""
    strip = Image.new("L", (width, size + 4), 255)
    ImageDraw.Draw(strip).text((width / 2, size / 2 + 1), shown, fill=40, font=font, anchor="mm")
    return np.asarray(strip)[..., None]


def write_arrays(path: Path, **arrays: NDArray[Any]) -> None:
    """An uncompressed `.npz`; `arr_0` is what the ADM evaluator reads."""

    def write(beside: Path) -> None:
        with beside.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    write_beside(path, write)
