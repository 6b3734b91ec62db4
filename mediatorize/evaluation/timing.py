"""Time and memory of calls, measured in pairs in one process: a machine's speed drifts, the ratio of a pair does not."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from mediatorize.devices import seconds, wait_for
from mediatorize.model.levels import Level
from mediatorize.model.transformer import DiffusionTransformer

Call = Callable[[], object]


@dataclass(frozen=True)
class PairedTime:
    """A call beside its reference."""

    ratio: float
    """The median of call / reference over pairs."""
    quartiles: tuple[float, float]
    """Of the ratios."""
    reference_seconds: float
    """The reference's median."""


def paired_time(call: Call, reference: Call, pairs: int, device: torch.device) -> PairedTime:
    """Runs the two in turn, first one and then the other first, after one warm-up each.

    `torch.utils.benchmark.Timer` is not used: it warms up by two calls before every timed one, which triples the work and keeps the two
    calls of a pair apart.

    Raises:
        ValueError: fewer than two pairs.
    """
    if pairs < 2:
        raise ValueError("a ratio needs at least two pairs")
    for warm_up in (call, reference):
        warm_up()
    wait_for(device)
    times = []
    for pair in range(pairs):
        if pair % 2:
            times.append((seconds(call, device), seconds(reference, device)))
        else:
            behind = seconds(reference, device)
            times.append((seconds(call, device), behind))
    ratios = [a / b for a, b in times]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return PairedTime(middle, (low, high), statistics.median(b for _, b in times))


def model_call(model: DiffusionTransformer, batch: int, level: Level) -> Call:
    """A whole model call on random latents, with every layer at a level.

    Args:
        batch: rows of the call.
    """
    arch, weight = model.arch, next(model.parameters())
    draw = torch.Generator().manual_seed(0)
    inputs = (
        torch.randn(batch, arch.channels, *arch.input_size, generator=draw).to(weight),
        torch.full((batch,), 0.5, device=weight.device),
        torch.zeros(batch, dtype=torch.long, device=weight.device),
    )
    return partial(model, *inputs, level)


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """The most that torch had allocated on a CUDA device during a call, weights included; None elsewhere, where it is not known."""
    if device.type != "cuda":
        return None
    wait_for(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    wait_for(device)
    return int(torch.cuda.max_memory_allocated(device))
