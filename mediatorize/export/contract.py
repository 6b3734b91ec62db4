"""What an export target is, and what it is given. No torch at import: the command line reads the table of targets to start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from mediatorize.model.levels import SOFTMAX, Level

if TYPE_CHECKING:
    from torch import Tensor

    from mediatorize.diffusion.plan import Plan
    from mediatorize.formats.bundle import BundleConfig
    from mediatorize.model.architecture import Architecture
    from mediatorize.model.transformer import DiffusionTransformer


@dataclass(frozen=True)
class Subject:
    """What is exported: a bundle's config and its model, its schedule with it, and its plans."""

    config: BundleConfig
    model: DiffusionTransformer
    plans: Mapping[int, Plan] = field(default_factory=dict)
    """By their number of calls; none where a level or another schedule was asked for."""

    @property
    def arch(self) -> Architecture:
        return self.config.arch

    @property
    def levels(self) -> tuple[Level, ...]:
        """Levels that the whole model can be asked for, the pretrained one first."""
        there = self.config.settings.whole_model_levels(self.arch.depth)
        return tuple(level for level in (SOFTMAX, *self.config.settings.levels) if level in there)


@dataclass(frozen=True, kw_only=True)
class Choices:
    """How it is exported. A target names those that it heeds; the others must be left as they are."""

    dtype: str = "float32"
    adapter: bool = False
    vae: Path | None = None
    level: Level | None = None
    schedule: Path | None = None
    prune: bool = False


@dataclass(frozen=True, kw_only=True)
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
        """(b,)"""
        return self.x.new_full((len(self.x),), case.t)

    def outputs(self, model: DiffusionTransformer) -> dict[str, Tensor]:
        """What `model` gives, by the name of the case."""
        import torch

        with torch.no_grad():
            return {case.name: model(self.x, self.times(case), self.y, levels=case.levels) for case in self.cases}


class Target(Protocol):
    """What the module of a target defines. It may also define `reference(subject, choices)`: the model whose outputs the export must
    repeat, where that is not the bundle's own."""

    def write(self, folder: Path, subject: Subject, choices: Choices) -> None:
        """Writes its files into a folder."""

    def outputs(self, folder: Path, subject: Subject, choices: Choices, probe: Probe) -> Mapping[str, Tensor]:
        """Loads them as their user would, and gives the outputs of the probe's cases that they have."""

    def usage(self, subject: Subject, choices: Choices) -> str:
        """A few lines that use the folder, called DEST."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """An entry in the table of targets. Its module is imported when the target is used, not before."""

    module: str
    """The module that is its `Target`."""
    help: str = ""
    """What is written, in a few words, for `--help`."""
    heeds: frozenset[str] = frozenset()
    """Names of `Choices` that make a difference."""
    carries_plans: bool = False
    """Whether a bundle's plans travel with it; with diffusers, those that a scheduler can run."""
    level_later: bool = False
    """Whether its user can choose a level later."""

    @property
    def target(self) -> Target:
        return cast(Target, import_module(self.module))

    def reference(self, subject: Subject, choices: Choices) -> DiffusionTransformer:
        """The model whose outputs it must repeat."""
        own = getattr(self.target, "reference", None)
        return subject.model if own is None else own(subject, choices)
