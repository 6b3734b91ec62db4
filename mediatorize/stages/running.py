"""What stages share at run time: a progress bar, memory, facts about the machine, and versions."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mediatorize.version import VERSION

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm


def progress_bar(total: int, description: str, unit: str = "step", initial: int = 0) -> tqdm[Any]:
    """A progress bar on stderr; silent if stderr is not a terminal."""
    from tqdm import tqdm

    return tqdm(total=total, desc=description, unit=unit, initial=initial, disable=None, file=sys.stderr, dynamic_ncols=True)


KEPT = 1 << 30
"""Bytes that glibc keeps for later tensors, of what earlier ones freed."""


def keep_freed_memory() -> None:
    """Has glibc keep the memory of freed tensors, for a process that only computes.

    By itself it gives memory of large tensors back to the system, which then clears every page of the next one: a call of S/2 takes a
    third longer for it (docs/performance.md). Nothing happens under other C libraries.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # as malloc.h numbers them
        mallopt(trim_threshold, KEPT)
        mallopt(mmap_threshold, KEPT)


LIBRARIES = 3 << 28
"""Bytes of a process with torch and the other libraries on a CPU, before it has a model: measured."""


def process_bytes(tensors: int, device: torch.device) -> int:
    """Memory of a process whose tensors take so many bytes at most: with its libraries, and with what glibc keeps of freed tensors; of a
    GPU, the tensors alone."""
    if device.type != "cpu":
        return tensors
    return tensors + LIBRARIES + (min(tensors, KEPT) if sys.platform == "linux" else 0)


def hardware(device: torch.device) -> dict[str, Any]:
    """The hardware and the system of this machine."""
    import torch

    described = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type}
    return described | {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }


def _processor() -> str:
    """The processor's name, where the system tells."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of this package and of the packages that its figures depend on."""
    found = {name: version(name) for name in ("torch", "timm", "diffusers", "numpy", "scipy", "scikit-learn")}
    return {"python": platform.python_version(), "mediatorize": VERSION, **found}
