"""What stages share at run time: a device, a progress bar, a table in text."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from mediatorize.errors import UserError


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

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        elif device.type == "mps":
            torch.mps.synchronize()

    for seconds in (0.1, 0.2):  # the first is a warm-up
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            x @ weight
            wait()
            count += 1
    return count * 2 * x.numel() * weight.shape[1] / (time.perf_counter() - start)


def refuse_below(values: Mapping[str, int], least: int) -> None:
    for name, value in values.items():
        if value < least:
            raise UserError(f"--{name} {value} is too small.", hint=f"Pass at least {least}.")


def text_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        first, *others = zip(row, widths, strict=True)
        lines.append("  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip())
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def gmacs(flops: float) -> str:
    """Billions of multiply-adds, two decimals or, of a small number, three digits."""
    return f"{flops / 2e9:.2f}" if flops >= 2e9 else f"{flops / 2e9:.3g}"


def seconds_in_words(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
