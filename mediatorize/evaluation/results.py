"""What an evaluation found, as plain figures. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mediatorize.model.levels import read_level, title
from mediatorize.model.schedule import Began

if TYPE_CHECKING:
    from mediatorize.diffusion.sampling import Sampler
    from mediatorize.planning.judge import Errors

RowKind = Literal["level", "schedule", "plan", "solver", "converged"]

OWN_SCHEDULE = "schedule"
"""The name of the row that runs at the model's own schedule."""


@dataclass(frozen=True, kw_only=True)
class RowResult:
    """The model sampled in one way, against the teacher (the first row) from the same noise."""

    level: str
    """A level as it is written, or the name of a schedule, a plan or a solver."""
    kind: RowKind
    flops: float
    """FLOPs of one sample, mean: all calls, guidance included. A multiply-add is two FLOPs."""
    macs: float
    relative_flops: float
    """Share of the teacher's FLOPs."""
    calls: int
    """Of the model, for one sample."""
    trajectory_error: float | None
    """|x_student - x_teacher| / |x_teacher| over all samples, at each model call, then the mean over calls; None where calls are others."""
    sample_error: float
    """The same ratio for the final samples."""
    errors_by_call: tuple[float, ...]
    converged: Errors | None = None
    """Of single samples, against the teacher's converged solution, where there is a row of it."""
    began: tuple[Began, ...] = ()
    """Of a step-wise rule: when its later stages began."""
    latency_ms: float | None = None
    """Time of one model call on `Timing.batch` samples: `relative_time` times softmax's median."""
    images_per_second: float | None = None
    """Model calls alone; the solver's own arithmetic and decoding do not count."""
    relative_time: float | None = None
    """All calls of a sample, over the teacher's: medians over pairs with softmax, weighted by how often the sampler makes such a call."""
    peak_bytes: int | None = None
    """Allocated on the CUDA device in a model call, weights included."""
    accuracy: float | None = None
    frechet_distance: float | None = None
    precision: float | None = None
    recall: float | None = None

    @property
    def title(self) -> str:
        """Its name in tables and pictures."""
        if self.kind == "level":
            return title(read_level(self.level))
        return f"{self.level} (step-wise rule)" if self.began else self.level


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How time was measured."""

    pairs: int
    batch: int
    """Samples per model call; with guidance the model sees twice as many rows."""
    softmax_ms: float
    control: float
    """Softmax beside itself: what a ratio of 1 looks like here."""
    control_quartiles: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `evaluation.comparison.compare` found. Under torchrun, processes other than the first draw samples and have no results."""

    results: tuple[RowResult, ...] = ()
    """The teacher first."""
    timing: Timing | None = None
    features: str | None = None
    """What judged the samples."""
    feature_width: int | None = None
    """How many features a sample has."""
    reference: str | None = None
    """What the samples were compared with."""
    distance_of_halves: float | None = None
    """Distance between two halves of the reference: compare other distances with it."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A comparison and all else that its report tells."""

    model: str
    """Where the model was loaded from."""
    name: str
    """Of its architecture."""
    out: Path
    """The folder of the report."""
    samples: int
    """Per row."""
    sampler: Sampler
    batch: int
    dtype: str
    processes: int
    vae: str | None
    command: str
    """The shell command that repeats it."""
    comparison: Comparison
    hardware: Mapping[str, Any]
    versions: Mapping[str, str]
    source: Mapping[str, str] | None
    """Of a bundle: the pretrained checkpoint that it was made from."""
    log: tuple[Mapping[str, Any], ...]
    """Of a bundle: what was done to it."""
    pictures: Mapping[str, str]
    """File in `out` -> what it shows."""
    arrays: tuple[str, ...]
    """Files in `out` for the ADM evaluator."""
    noise_levels: tuple[float, ...]
    """Of each model call: 1 is noise, 0 data."""
    about_plans: tuple[str, ...] = ()
    """What a user should know of the plans, or why they are left out."""

    @property
    def results(self) -> tuple[RowResult, ...]:
        return self.comparison.results


@dataclass(frozen=True, kw_only=True)
class SideResult:
    """One of several models without a teacher, by its samples from the same noise as the others'."""

    name: str
    flops: float
    """FLOPs of one sample: all calls, guidance included; of the step-wise rule the mean over samples."""
    relative_flops: float
    """Share of the first model's FLOPs."""
    accuracy: float | None
    frechet_distance: float
    precision: float | None
    recall: float | None


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """Models that have no teacher, judged against data."""

    name: str
    """Of the first model's architecture."""
    out: Path
    samples: int
    """Per model."""
    sampler: Sampler
    results: tuple[SideResult, ...]
    """In the order that the models were given, then the step-wise rule between them."""
    features: str
    """What judged the samples."""
    reference: str
    """What the samples were compared with."""
    distance_of_halves: float | None
    """Distance between two halves of the reference: compare other distances with it."""
    pictures: Mapping[str, str]
    """File in `out` -> what it shows."""
    command: str
    """The shell command that repeats it."""
    about_plans: tuple[str, ...] = ()
    """What a user should know of the plans, or why they are left out."""
