"""Whether what was written is the model: it is loaded back, and its outputs are compared at every level and piece of the schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mediatorize.diffusion.process import process_of
from mediatorize.diffusion.sampling import Sampler, sample_batch
from mediatorize.errors import UserError
from mediatorize.export.contract import Case, Choices, Export, Probe, Subject
from mediatorize.model.schedule import Schedule
from mediatorize.model.transformer import DiffusionTransformer

TOLERANCE = 1e-4
"""Of an output's largest value: how far a loaded export may be from the model."""


SAMPLES, SAMPLE_STEPS = 4, 10
"""How many samples a rounded export is judged by, and the solver's steps that make them."""


@dataclass(frozen=True, kw_only=True)
class SamplesApart:
    """How far samples are from those of the model whose weights were not rounded: |sample - its| / |its|, from the same noise."""

    solver: str
    steps: int
    count: int
    mean: float
    largest: float


@dataclass(frozen=True, kw_only=True)
class Verification:
    """How far a written export is from the model."""

    differences: Mapping[str, float]
    """Largest difference to the model's output, as a share of its largest value, by what was called."""
    rounding: float
    """The same between the model and its weights rounded to the exported type."""
    samples: SamplesApart | None = None
    """The same of samples, where weights were rounded."""

    @property
    def largest(self) -> float:
        return max(self.differences.values())


def probe_of(subject: Subject, seed: int = 0, batch: int = 2) -> Probe:
    """A case for every level, at a time of its own, and one for every piece of the schedule, in its middle.

    A step-wise rule switches between the levels.
    """
    arch, schedule = subject.arch, subject.model.schedule
    generator = torch.Generator().manual_seed(seed)

    def time_at(noise_level: float) -> float:
        return float(process_of(arch).time_at(torch.tensor(noise_level)))

    levels = subject.levels
    cases = [Case(name=f"level {level}", t=time_at((i + 1) / (len(levels) + 1)), levels=level) for i, level in enumerate(levels)]
    if isinstance(schedule, Schedule):
        for low, high in zip((0.0, *schedule.edges), (*schedule.edges, 1.0), strict=True):
            middle = (low + high) / 2
            name = f"schedule at noise level {middle:.4g}"
            cases.append(Case(name=name, t=time_at(middle), levels=schedule.at(middle), scheduled=True))
    labels = torch.randint(arch.classes, (batch,), generator=generator)
    return Probe(torch.randn(batch, arch.channels, *arch.input_size, generator=generator), labels, tuple(cases))


def verify(folder: Path, export: Export, subject: Subject, choices: Choices, bundled: DiffusionTransformer) -> Verification:
    """Loads a written export and compares it with the model.

    Args:
        bundled: the bundle's whole model; the subject's may be pruned.

    Raises:
        UserError: the outputs are not the model's.
    """
    probe = probe_of(subject)
    found = export.target.outputs(folder, subject, choices, probe)
    probe = replace(probe, cases=tuple(case for case in probe.cases if case.name in found))
    exact = probe.outputs(bundled)
    expected = exact if choices.dtype == "float32" else probe.outputs(export.reference(subject, choices))
    assert found.keys() == expected.keys()
    assert found
    differences = {name: _apart(found[name], expected[name]) for name in expected}
    for name, difference in differences.items():
        if not difference <= TOLERANCE:
            raise UserError(f"The export is not the model: outputs at {name} differ by {difference:.1e}.", hint="Please report it.")
    rounded = None if choices.dtype == "float32" else compare_samples(export.reference(subject, choices), bundled, subject)
    return Verification(differences=differences, rounding=max(_apart(expected[name], exact[name]) for name in exact), samples=rounded)


def compare_samples(rounded: DiffusionTransformer, exact: DiffusionTransformer, subject: Subject) -> SamplesApart:
    """Samples both models from the same noise, by their schedule or, where they have none, at softmax."""
    arch = subject.arch
    sampler = Sampler.resolve(arch, steps=SAMPLE_STEPS)
    labels = torch.arange(SAMPLES) % arch.classes
    one, other = (sample_batch(model, labels, sampler).flatten(1) for model in (rounded, exact))
    errors = (one - other).norm(dim=1) / other.norm(dim=1)
    return SamplesApart(solver=sampler.solver, steps=sampler.steps, count=SAMPLES, mean=float(errors.mean()), largest=float(errors.max()))


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())
