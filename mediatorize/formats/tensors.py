"""Tensors in files: listed without reading them, mapped when used, checked in a stream. Nothing in a pickle is executed."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mediatorize.errors import UserError

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes lie."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""

    @property
    def bytes(self) -> int:
        if 0 in self.shape:
            return 0
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize

    @property
    def is_weight(self) -> bool:
        """Whether it can be one: floating-point and not empty."""
        return self.dtype.is_floating_point and 0 not in self.shape

    def mapped(self, file: np.ndarray | None = None) -> Tensor:
        """The tensor, memory-mapped and copied on write: pages are read from the file when they are touched.

        `file` is the whole file as `map_file` gives it, for many tensors to share.
        """
        whole = map_file(self.path) if file is None else file
        return self._view(whole[self.offset : self.offset + self.bytes])

    def read(self) -> Tensor:
        """The tensor in memory of its own, which goes when it does."""
        return self._view(np.fromfile(self.path, dtype=np.uint8, count=self.bytes, offset=self.offset))

    def _view(self, raw: np.ndarray) -> Tensor:
        if self.offset % self.dtype.itemsize:
            raw = raw.copy()
        return torch.from_numpy(raw).view(self.dtype).as_strided(self.shape, self.stride)


def map_file(path: Path) -> np.ndarray:
    """The bytes of a file, memory-mapped and copied on write."""
    return np.memmap(path, mode="c", dtype=np.uint8)


@dataclass(frozen=True)
class Weight:
    """A model's weight: one stored tensor, or several that are joined along their first axis."""

    parts: tuple[StoredTensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0].shape
        return (sum(part.shape[0] for part in self.parts), *first[1:]) if len(self.parts) > 1 else first


def load_weights(weights: Mapping[str, Weight]) -> dict[str, Tensor]:
    """All weights in float32, none sharing memory; memory-mapped where they can be, one mapping per file."""
    parts = sorted((part for weight in weights.values() for part in weight.parts), key=lambda part: (part.path, part.offset))
    files = {path: map_file(path) for path in {part.path for part in parts}}
    shared, ends = set(), dict.fromkeys(files, 0)
    for part in parts:
        if part.offset < ends[part.path]:
            shared.add(part)
        ends[part.path] = max(ends[part.path], part.offset + part.bytes)
    loaded = {}
    for name, weight in weights.items():
        tensors = [part.read() if part in shared else part.mapped(files[part.path]) for part in weight.parts]
        loaded[name] = (torch.cat(tensors) if len(tensors) > 1 else tensors[0]).float()
    return loaded


def read_safetensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a safetensors file and its metadata, from the header alone, which safetensors itself has checked."""
    try:
        with safe_open(path, framework="pt") as checked:
            metadata = checked.metadata() or {}
    except SafetensorError as error:
        _refuse_what_is_no_checkpoint(path)
        raise UserError(
            f"{path}: not a whole safetensors file ({error}).", hint="It may be truncated: download or copy it again."
        ) from error
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise UserError(f"{path}: {name} is of type {entry['dtype']}.", hint="Weights must be float64, float32, bfloat16 or float16.")
        shape = tuple(entry["shape"])
        offset = 8 + length + entry["data_offsets"][0]
        tensors[name] = StoredTensor(path, SAFETENSORS_DTYPES[entry["dtype"]], shape, _contiguous_stride(shape), offset)
    return tensors, metadata


def read_pickle(path: Path) -> Any:
    """What `torch.save` wrote, with a `StoredTensor` for every tensor.

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
        with torch.serialization.safe_globals([argparse.Namespace]), FakeTensorMode():
            content = torch.load(path, weights_only=True)
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
        return _locate(content, path, path.stat().st_size)
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


def _locate(content: Any, path: Path, file_size: int) -> Any:
    """`content` with every fake tensor replaced by where its bytes are."""
    if isinstance(content, dict):
        return {key: _locate(value, path, file_size) for key, value in content.items()}
    if isinstance(content, FakeTensor):
        start = content.untyped_storage()._checkpoint_offset
        if start is None:
            raise UserError(f"{path}: holds a tensor without stored bytes.", hint="Save the weights from the CPU or a GPU.")
        offset = start + int(content.storage_offset()) * content.dtype.itemsize
        stored = StoredTensor(path, content.dtype, tuple(content.shape), content.stride(), offset)
        if offset + stored.bytes > file_size:
            raise UserError(f"{path}: the file ends before its tensors do.", hint="Download or copy it again.")
        return stored
    return content


def _contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def refuse_non_finite(weights: Iterable[tuple[str, Weight]]) -> None:
    """Reads every weight once, one at a time, and refuses what is not finite in float32 by the name of the first that has any."""
    for name, weight in weights:
        for part in weight.parts:
            values = part.read().float()
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
