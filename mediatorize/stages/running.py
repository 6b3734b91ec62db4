"""What stages share at run time: a device, a progress bar, a table in text, what the machine is."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mediatorize.devices import wait_for
from mediatorize.errors import UserError
from mediatorize.report.tables import gmacs as gmacs
from mediatorize.report.tables import text_table as text_table
from mediatorize.version import VERSION


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA, then Apple's, then the CPU; a named one must be there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise UserError(f"No {name} device is here.", hint="Pass --device cpu.")
    return torch.device(name)


def pick_dtype(name: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def progress_bar(total: int, description: str, unit: str = "step", initial: int = 0) -> tqdm[Any]:
    """On stderr; silent where that is no terminal."""
    return tqdm(total=total, desc=description, unit=unit, initial=initial, disable=None, file=sys.stderr, dynamic_ncols=True)


def measured_flops_per_second(device: torch.device, width: int, tokens: int) -> float:
    """How fast this device multiplies matrices of a model's sizes, measured for about a fifth of a second."""
    x, weight = torch.randn(4 * tokens, width, device=device), torch.randn(width, 3 * width, device=device)

    for seconds in (0.1, 0.2):  # the first is a warm-up
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            x @ weight
            wait_for(device)
            count += 1
    return count * 2 * x.numel() * weight.shape[1] / (time.perf_counter() - start)


def hardware(device: torch.device) -> dict[str, Any]:
    """What this machine computes with."""
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
    """Of this package and of what its figures depend on."""
    found = {name: version(name) for name in ("torch", "timm", "diffusers", "numpy", "scipy", "scikit-learn")}
    return {"python": platform.python_version(), "mediatorize": VERSION, **found}


def refuse_below(values: Mapping[str, int], least: int) -> None:
    for name, value in values.items():
        if value < least:
            raise UserError(f"--{name} {value} is too small.", hint=f"Pass at least {least}.")


def seconds_in_words(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
