"""Devices, and the processes that torchrun starts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from mediatorize.errors import UserError
from mediatorize.torchrun import started_by_torchrun

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


LONGEST_WAIT = timedelta(days=1)
"""That one process waits for another, whose layers or samples may take long. Where one fails, torchrun ends the others at once."""


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA, then Apple's, then the CPU; a named one must be there. Each process of torchrun takes a GPU."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise UserError(f"No {name} device is here.", hint="Pass --device cpu.")
    if name == "cuda" and started_by_torchrun():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device(name)


def refuse_uncompilable(device: torch.device) -> None:
    """Refuses what `torch.compile` would, but in one line and before any work: the CPU needs a C++ compiler, CUDA Triton."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    if device.type == "cuda" and not has_triton():
        raise UserError("Compiling for this GPU needs Triton, which does not work here.", hint="Leave --compile out.")
    if device.type == "cpu":
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise UserError("Compiling for the CPU needs a C++ compiler.", hint="Install g++, or leave --compile out.") from None


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


def measured_flops_per_second(device: torch.device, width: int, tokens: int) -> float:
    """How fast this device multiplies matrices of a model's sizes, measured for about a fifth of a second."""
    x, weight = torch.randn(4 * tokens, width, device=device), torch.randn(width, 3 * width, device=device)

    for duration in (0.1, 0.2):  # the first is a warm-up
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < duration:
            x @ weight
            wait_for(device)
            count += 1
    return count * 2 * x.numel() * weight.shape[1] / (time.perf_counter() - start)


Told = TypeVar("Told")


@dataclass(frozen=True)
class World:
    """This process among `size`; alone where torchrun did not start it."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's part of `count` things in order; parts differ by one at most."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def count(self, count: int) -> int:
        """How many things this process's part has."""
        mine = self.share(count)
        return mine.stop - mine.start

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def as_first(self, value: Told) -> Told:
        """The first process's value, everywhere."""
        if self.size == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told, 0, device=self.device)
        return told[0]

    def gather(self, part: Tensor) -> Tensor:
        """All processes' parts, joined along the first axis, on the CPU everywhere; parts may differ in length."""
        if self.size == 1:
            return part.cpu()
        lengths = [torch.zeros(1, dtype=torch.long, device=self.device) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(part)], device=self.device))
        longest = max(int(length) for length in lengths)
        padded = part.new_zeros((longest, *part.shape[1:]), device=self.device)
        padded[: len(part)] = part.to(self.device)
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return torch.cat([each[: int(length)].cpu() for each, length in zip(parts, lengths, strict=True)])

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its sum over processes, by one message for all."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))


ALONE = World(0, 1, torch.device("cpu"))
"""One process. It has nothing to tell to another, so that its device does not matter."""


@contextmanager
def processes(device: torch.device) -> Iterator[World]:
    """Joins the processes that torchrun started (nccl on CUDA, gloo elsewhere), or is alone."""
    if not started_by_torchrun():
        yield World(0, 1, device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=LONGEST_WAIT)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()
