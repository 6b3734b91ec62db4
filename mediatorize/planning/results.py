"""What commands found of plans, as records. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mediatorize.diffusion.plan import Plan
    from mediatorize.model.architecture import Architecture
    from mediatorize.planning.search import Plans, Wanted


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What `calibrate --calls` did, or with `dry_run` would do."""

    model: Path
    out: Path
    arch: Architecture
    wanted: Wanted
    calls: tuple[int, ...]
    reference_steps: int
    dtype: str
    plans: Plans | None = None
    """None after a dry run."""
    shares: Mapping[int, float] = field(default_factory=dict)
    """FLOPs of each plan, as a share of `reference_steps` calls in full."""
    seconds: float = 0.0
    model_rows: int = 0
    """After a dry run only: about how many rows of model calls the search takes, both halves of guidance counted."""
    estimated_seconds: float | None = None
    estimated_bytes: int | None = None
    """After a dry run only: memory of the process, or of the GPU."""


@dataclass(frozen=True)
class InspectedPlans:
    """What `inspect` found in a plan file."""

    file: Path
    plans: Mapping[int, Plan]


@dataclass(frozen=True, kw_only=True)
class ExportedScheduler:
    """What `export --to scheduler` wrote."""

    out: Path
    calls: tuple[int, ...]
    difference: float
    """The largest one between samples by the plan and by the scheduler, as a share of the largest value."""
    usage: str
