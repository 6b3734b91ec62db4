"""Pictures: latents decoded, values turned to bytes, grids and arrays written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mediatorize.errors import UserError
from mediatorize.evaluation.features import as_bytes
from mediatorize.formats.tensors import write_beside

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


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """(b, 4, h, w) -> (b, 3, 8h, 8w) in [-1, 1]"""
    return vae.decode(latents / VAE_SCALE).sample


@torch.no_grad()
def encode(vae: Any, pixels: Tensor, noise: Tensor) -> Tensor:
    """(b, 3, 8h, 8w) in [-1, 1] -> (b, 4, h, w): drawn from the VAE's posterior with `noise` (b, 4, h, w)"""
    posterior = vae.encode(pixels).latent_dist
    return (posterior.mean + posterior.std * noise) * VAE_SCALE


def write_grid(path: Path, pixels: Pixels, columns: int, scale: int = 1) -> None:
    """A PNG of pictures in rows of `columns`, or of all where there are fewer; a white line of two pixels is around each."""
    from torchvision.utils import make_grid

    tiles = torch.from_numpy(pixels.repeat(scale, axis=1).repeat(scale, axis=2)).permute(0, 3, 1, 2)
    sheet = make_grid(tiles, nrow=columns, padding=2, pad_value=255)
    if len(tiles) == 1:  # make_grid leaves a single picture as it is
        sheet = F.pad(sheet, (2, 2, 2, 2), value=255)
    image = Image.fromarray(sheet[0].numpy() if pixels.shape[3] == 1 else sheet.permute(1, 2, 0).numpy())
    write_beside(path, lambda beside: image.save(beside, format="PNG"))


def write_arrays(path: Path, **arrays: NDArray[Any]) -> None:
    """An uncompressed `.npz`; `arr_0` is what the ADM evaluator reads."""

    def write(beside: Path) -> None:
        with beside.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    write_beside(path, write)
