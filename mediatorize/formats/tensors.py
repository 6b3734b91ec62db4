"""Tensors in files: memory-mapped when they are listed, read when they are used. Nothing in a pickle is executed."""

from __future__ import annotations

import argparse
import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mediatorize.errors import UserError

SAFETENSORS_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    path: Path
    mapped: Tensor
    """Memory-mapped and copied on write: its pages are read from the file when they are touched."""

    @property
    def dtype(self) -> torch.dtype:
        return self.mapped.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.mapped.shape)

    @property
    def is_weight(self) -> bool:
        """Whether it can be one: floating-point and not empty."""
        return self.dtype.is_floating_point and 0 not in self.shape

    def read(self) -> Tensor:
        """The tensor in memory of its own, which goes when it does."""
        return self.mapped.clone()


@dataclass(frozen=True)
class Weight:
    """A model's weight: one stored tensor, or several that are joined along their first axis."""

    parts: tuple[StoredTensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0].shape
        return (sum(part.shape[0] for part in self.parts), *first[1:]) if len(self.parts) > 1 else first


def load_weights(weights: Mapping[str, Weight]) -> dict[str, Tensor]:
    """All weights in float32, none sharing memory; memory-mapped where they can be."""
    loaded: dict[str, Tensor] = {}
    storages = set()
    for name, weight in weights.items():
        parts = [part.mapped for part in weight.parts]
        tensor = (torch.cat(parts) if len(parts) > 1 else parts[0]).float()
        storage = tensor.untyped_storage().data_ptr()
        shared, unaligned = storage in storages, storage % tensor.itemsize
        loaded[name] = tensor.clone() if shared or unaligned else tensor
        storages.add(storage)
    return loaded


def read_safetensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a safetensors file and its metadata. No tensor is read."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: StoredTensor(path, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - it is no dict
            metadata = file.metadata() or {}
    except SafetensorError as error:
        _refuse_what_is_no_checkpoint(path)
        raise UserError(
            f"{path}: not a whole safetensors file ({error}).", hint="It may be truncated: download or copy it again."
        ) from error
    for name, stored in tensors.items():
        if stored.dtype not in SAFETENSORS_DTYPES:
            raise UserError(f"{path}: {name} is of type {stored.dtype}.", hint="Weights must be float64, float32, bfloat16 or float16.")
    return tensors, metadata


def read_pickle(path: Path) -> Any:
    """What `torch.save` wrote, with a `StoredTensor` for every tensor. No tensor is read.

    Only tensors, plain containers, numbers, strings and `argparse.Namespace` are accepted; anything else is refused by name, unexecuted.
    """
    if not zipfile.is_zipfile(path):
        _refuse_what_is_no_checkpoint(path)
        raise UserError(
            f"{path}: neither safetensors nor a torch zip archive.",
            hint="If it is a pickle from before torch 1.6 that you trust, load it and `torch.save` it again.",
        )
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise UserError(f"{path}: the archive was compressed again.", hint="Take the original file.")
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except UserError:
        raise
    except Exception as error:
        message = str(error)
        if found := re.search(r"GLOBAL ([\w.]+)", message):
            raise UserError(
                f"{path}: its pickle asks to load {found[1]}, which weights do not need.",
                hint="It was not executed. Save the state dict alone, if you trust the file.",
            ) from error
        if "weights_only" in message.lower() or "WeightsUnpickler" in message:
            reason = message.splitlines()[-1].strip() or "refused"
            raise UserError(f"{path}: its pickle is not one of weights ({reason}).", hint="It was not executed.") from error
        raise UserError(
            f"{path}: cannot be read as a torch checkpoint ({message.splitlines()[0] if message else type(error).__name__}).",
            hint="It may be damaged: download or copy it again.",
        ) from error
    try:
        return _stored(content, path)
    except RecursionError as error:
        raise UserError(f"{path}: its containers hold themselves.", hint="Save a state dict.") from error


def _refuse_what_is_no_checkpoint(path: Path) -> None:
    """Names what people have in place of weights; says nothing of anything else."""
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise UserError(f"{path}: the file is empty.", hint="Download or copy it again.")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a Git LFS pointer, not the weights.", hint="Run `git lfs pull`.")
    if start.lstrip()[:1] == b"<":
        raise UserError(f"{path}: a web page, not weights.", hint="Download the file itself.")
    if start.startswith(b"PK"):
        where = "is a torch archive" if zipfile.is_zipfile(path) else "the archive is cut off"
        raise UserError(f"{path}: {where}.", hint="Name it .pt." if zipfile.is_zipfile(path) else "Download or copy it again.")
    if start[8:9] == b"{" and path.suffix != ".safetensors":
        raise UserError(f"{path}: seems to be safetensors.", hint="Name it .safetensors.")


def _stored(content: Any, path: Path) -> Any:
    """`content` with a `StoredTensor` for every tensor."""
    if isinstance(content, dict):
        return {key: _stored(value, path) for key, value in content.items()}
    if isinstance(content, Tensor):
        if content.is_meta or content.is_nested or content.layout != torch.strided:
            raise UserError(f"{path}: holds a tensor without plain stored bytes.", hint="Save the weights from the CPU or a GPU.")
        return StoredTensor(path, content.detach())
    return content


def refuse_non_finite(weights: Iterable[tuple[str, Weight]]) -> None:
    """Reads every weight once, one at a time, and refuses what is not finite in float32 by the name of the first that has any."""
    for name, weight in weights:
        for part in weight.parts:
            values = part.mapped.float()
            # A finite sum has finite terms, and is faster than looking at each.
            if not values.sum().isfinite() and (bad := int((~values.isfinite()).sum())):
                raise UserError(
                    f"{part.path}: {name} has {bad} value{'s' * (bad != 1)} that are NaN or infinite.",
                    hint="The checkpoint is broken: take another, or other --weights.",
                )


def write_beside(path: Path, write: Any) -> None:
    """Calls `write(temporary path)`, flushes what it wrote to disk and renames it to `path`: a kill leaves the old file or the new."""
    beside = path.with_name(f".{path.name}.saving")
    mask = os.umask(0)
    os.umask(mask)
    try:
        write(beside)
        beside.chmod(0o666 & ~mask)  # safetensors writes for the owner alone
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def own_copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with memory of their own: of a view, `torch.save` would write all that it is a view of."""
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}
