"""What torch leaves to its caller about devices."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """How long a call takes, until the device is done with it."""
    start = time.perf_counter()
    call()
    wait_for(device)
    return time.perf_counter() - start
