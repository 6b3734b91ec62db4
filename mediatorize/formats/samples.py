"""Samples on disk: parts as they are drawn, and whole sets as the ADM evaluator takes them."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mediatorize.errors import UserError
from mediatorize.formats.images import Pixels, decode, refuse_unknown_scale, to_pixels, write_arrays
from mediatorize.formats.tensors import write_beside
from mediatorize.model.architecture import Architecture

DECODED_AT_A_TIME = 8


@dataclass(frozen=True)
class SampleFiles:
    """Parts of samples in a folder, an `.npz` each: the `Parts` of `evaluation.comparison`."""

    folder: Path

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.npz"

    def has(self, name: str) -> bool:
        return self.file(name).exists()

    def write(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.file(name).parent.mkdir(exist_ok=True)
        write_arrays(self.file(name), **arrays)

    def read(self, name: str, array: str) -> NDArray[Any]:
        file = self.file(name)
        try:
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:  # np.load leaves a broken file open
                return arrays[array]
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{file}: is not there or not whole ({error}).",
                hint="Delete it and run the same command again; with torchrun, all nodes must share the folder.",
            ) from error


def decoder_of(vae: Any, device: torch.device, arch: Architecture) -> Callable[[Tensor], Pixels]:
    """A model's latents (b, c, h, w) on any device -> bytes (b, height, width, 3), by a VAE that is moved to `device`.

    Raises:
        UserError: nothing says in what scale the model takes latents.
    """
    refuse_unknown_scale(arch)
    vae = vae.to(device)
    return lambda latents: np.concatenate([to_pixels(decode(vae, few.to(device), arch)) for few in latents.split(DECODED_AT_A_TIME)])


def write_adm_array(path: Path, count: int, parts: Iterable[Pixels]) -> None:
    """Writes `count` pictures, a part at a time, as the ADM evaluator takes them: arr_0, uint8 (n, h, w, 3), in an uncompressed .npz."""
    parts = iter(parts)
    first = next(parts)

    def write(beside: Path) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, *first.shape[1:3], 3)}
        with zipfile.ZipFile(beside, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for pictures in chain([first], parts):
                file.write((pictures.repeat(3, -1) if pictures.shape[-1] == 1 else pictures).tobytes())

    write_beside(path, write)
