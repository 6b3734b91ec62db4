"""Tiny, randomised models: every block alive, so that nothing hides behind adaLN-zero."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mediatorize.model.architecture import Architecture
from mediatorize.model.levels import MediatorSettings
from mediatorize.model.transformer import DiffusionTransformer, sincos_position_embedding

torch.set_num_threads(1)  # tests run in a process for every core
os.environ["OMP_NUM_THREADS"] = "1"  # so do processes that tests start

TINY = Architecture(
    family="sit",
    depth=3,
    width=48,
    heads=3,
    patch=2,
    channels=4,
    grid=(4, 4),
    classes=10,
    null_class=True,
    learn_sigma=True,
    mlp_width=192,
)


def randomise(model: torch.nn.Module, seed: int = 0, std: float = 0.12) -> None:
    """Every parameter a normal number, pooling matrices kept as weights of a mean."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * std
        keeps = name.endswith("pool") or "log_" in name
        parameter.data = parameter.data + noise * 0.1 if keeps else noise


def tiny_model(settings: MediatorSettings | None = None, seed: int = 0, **changes: Any) -> DiffusionTransformer:
    """A randomised model of `TINY` with some fields changed; deterministic."""
    arch = dataclasses.replace(TINY, **changes)
    model = DiffusionTransformer(arch, settings)
    randomise(model, seed)
    model.pos_embed.data = sincos_position_embedding(arch.width, arch.grid)
    return model.eval().requires_grad_(False)


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((result - expected).abs().max() / expected.abs().max())


def official_state(model: DiffusionTransformer) -> dict[str, torch.Tensor]:
    """The weights under their official names, as `torch.save` of an original model would hold them."""
    return {name: value.clone() for name, value in model.state_dict().items() if ".mediator." not in name}


def as_options(given: dict[str, Any]) -> list[str]:
    """Arguments of a stage as they are written on the command line."""
    spelled = {name: ",".join(map(str, value)) if isinstance(value, tuple) else value for name, value in given.items()}
    return [f"--{name.replace('_', '-')}={value}" for name, value in spelled.items()]


def in_two_processes(command: str, *arguments: str | Path, **options: Any) -> str:
    """Runs a command under torchrun. Returns what it printed."""
    run = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "mediatorize", command]
    done = subprocess.run(
        [sys.executable, "-m", *run, *map(str, arguments), *as_options(options)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def model_inputs(model: DiffusionTransformer, batch: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, t and y for a batch, the last label null."""
    generator = torch.Generator().manual_seed(seed)
    arch = model.arch
    x = torch.randn(batch, arch.channels, *arch.input_size, generator=generator)
    t = torch.rand(batch, generator=generator) * (999 if arch.family == "dit" else 1)
    y = torch.randint(0, arch.classes, (batch,), generator=generator)
    y[-1] = arch.classes
    return x, t, y


@pytest.fixture
def official_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a tiny official checkpoint and gives its path."""

    def write(name: str = "model.pt", **changes: Any) -> Path:
        path = tmp_path / name
        torch.save(official_state(tiny_model(**changes)), path)
        return path

    return write
