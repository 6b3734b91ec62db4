"""What an evaluation found, as plain figures."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RowResult:
    """The model at one level or schedule, against the teacher (level softmax) from the same noise."""

    level: str
    """A mediator count, `softmax`, or the name of a schedule."""
    flops: float
    """Of one sample: all calls, guidance included. A multiply-add counts two."""
    macs: float
    relative_flops: float
    """Of the teacher's, with the same sampler."""
    trajectory_error: float
    """|x_student - x_teacher| / |x_teacher| over all samples, at each model call, then the mean over calls."""
    sample_error: float
    """The same of the final samples."""
    errors_by_call: tuple[float, ...]
    latency_ms: float | None = None
    """Of one model call on `timing["batch"]` samples: `relative_time` times softmax's median."""
    images_per_second: float | None = None
    """Model calls alone; the solver's own arithmetic and decoding do not count."""
    relative_time: float | None = None
    """Medians over pairs with softmax, weighted by how often the sampler makes such a call."""
    peak_bytes: int | None = None
    """Allocated on the CUDA device in a model call, weights included."""
    accuracy: float | None = None
    frechet_distance: float | None = None
    precision: float | None = None
    recall: float | None = None


@dataclass(frozen=True)
class Timing:
    """How time was measured."""

    pairs: int
    batch: int
    """Samples per model call; with guidance the model sees twice as many rows."""
    softmax_ms: float
    control: float
    """Softmax beside itself: what a ratio of 1 looks like here."""
    control_quartiles: tuple[float, float]


@dataclass(frozen=True)
class Evaluation:
    model: str
    name: str
    out: Path
    samples: int
    sampling: dict[str, Any]
    command: str
    results: tuple[RowResult, ...]
    """The teacher first."""
    timing: Timing | None
    features: str | None
    """What judged the samples."""
    reference: str | None
    """What they were compared with."""
    distance_of_halves: float | None
    """Of the reference: what distances are to be read against."""
    hardware: dict[str, Any]
    versions: dict[str, str]
    source: dict[str, Any] | None
    """Of a bundle: the pretrained file that it was made from."""
    log: tuple[dict[str, Any], ...]
    """Of a bundle: what was done to it."""
    notes: tuple[str, ...]
    pictures: dict[str, str]
    """File in `out` -> what it shows."""
    arrays: tuple[str, ...] = ()
    """Files in `out` for the ADM evaluator."""
    noise_levels: tuple[float, ...] = field(default=())
    """Of each model call: 1 is noise, 0 data."""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "out": str(self.out)}
