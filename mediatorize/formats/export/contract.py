"""What an export target is, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mediatorize.diffusion import process
from mediatorize.formats.bundle import BundleConfig
from mediatorize.model.architecture import SOFTMAX, Architecture, Level
from mediatorize.model.transformer import DiffusionTransformer


@dataclass(frozen=True)
class Subject:
    """What is exported: a bundle's config and its model, its schedule with it."""

    config: BundleConfig
    model: DiffusionTransformer

    @property
    def arch(self) -> Architecture:
        return self.config.arch

    @property
    def levels(self) -> tuple[Level, ...]:
        return (SOFTMAX, *self.config.settings.levels)


@dataclass(frozen=True)
class Choices:
    """How it is exported. A target names those that it heeds; the others must be left as they are."""

    dtype: str = "float32"
    adapter: bool = False
    vae: Path | None = None
    level: Level | None = None


@dataclass(frozen=True)
class Case:
    """One model call that a written export is checked by."""

    name: str
    t: float
    """In the model's own time."""
    levels: Level | tuple[Level, ...]
    scheduled: bool = False
    """Whether the levels are those that the schedule has at `t`."""


@dataclass(frozen=True)
class Probe:
    """Inputs, the same for all cases: x (b, c, h, w), y (b,)."""

    x: Tensor
    y: Tensor
    cases: tuple[Case, ...]

    def times(self, case: Case) -> Tensor:
        return torch.full((len(self.x),), case.t)

    @torch.no_grad()
    def outputs(self, model: DiffusionTransformer) -> dict[str, Tensor]:
        """What `model` gives, by the name of the case."""
        return {case.name: model(self.x, self.times(case), self.y, levels=case.levels) for case in self.cases}


def probe_of(subject: Subject, seed: int = 0, batch: int = 2) -> Probe:
    """A case for every level, at a time of its own, and one for every piece of the schedule, in its middle."""
    arch, schedule = subject.arch, subject.model.schedule
    generator = torch.Generator().manual_seed(seed)

    def own_time(noise_level: float) -> float:
        return float(process.own_time(arch, torch.tensor(noise_level)))

    levels = subject.levels
    cases = [Case(f"level {level}", own_time((i + 1) / (len(levels) + 1)), level) for i, level in enumerate(levels)]
    if schedule is not None:
        for low, high in zip((0.0, *schedule.edges), (*schedule.edges, 1.0), strict=True):
            middle = (low + high) / 2
            cases.append(Case(f"schedule at noise level {middle:.4g}", own_time(middle), schedule.at(middle), scheduled=True))
    labels = torch.randint(arch.classes, (batch,), generator=generator)
    return Probe(torch.randn(batch, arch.channels, *arch.input_size, generator=generator), labels, tuple(cases))


@dataclass(frozen=True)
class Export:
    """A target of `mediatorize export`."""

    help: str
    write: Callable[[Path, Subject, Choices], None]
    """Writes its files into a folder."""
    outputs: Callable[[Path, Subject, Choices, Probe], Mapping[str, Tensor]]
    """Loads them as their user would, and gives the outputs of the probe's cases that they have."""
    usage: Callable[[Subject, Choices], str]
    """A few lines that use the folder, called DEST."""
    heeds: frozenset[str] = frozenset()
    """Names of `Choices` that make a difference."""
    reference: Callable[[Subject, Choices], DiffusionTransformer] = lambda subject, choices: subject.model
    """The model whose outputs it must repeat."""
