"""What stages share at run time: a progress bar, facts about the machine, and versions."""

from __future__ import annotations

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
