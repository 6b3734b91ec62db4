"""Compresses pretrained diffusion transformers into mediator form (arXiv 2408.05710)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mediatorize.version import VERSION

if TYPE_CHECKING:
    from mediatorize.diffusion.plan import Plan
    from mediatorize.diffusion.sampling import sample
    from mediatorize.errors import UserError
    from mediatorize.formats.loading import load_model
    from mediatorize.formats.plans import load_plan
    from mediatorize.model.architecture import Architecture
    from mediatorize.model.levels import MediatorSettings
    from mediatorize.model.schedule import Schedule
    from mediatorize.model.transformer import DiffusionTransformer
    from mediatorize.stages.plans import calibrate

__version__ = VERSION
__all__ = [
    "Architecture",
    "DiffusionTransformer",
    "MediatorSettings",
    "Plan",
    "Schedule",
    "UserError",
    "calibrate",
    "load_model",
    "load_plan",
    "sample",
]

_HOMES = {
    "Architecture": "model.architecture",
    "DiffusionTransformer": "model.transformer",
    "MediatorSettings": "model.levels",
    "Plan": "diffusion.plan",
    "Schedule": "model.schedule",
    "UserError": "errors",
    "calibrate": "stages.plans",
    "load_model": "formats.loading",
    "load_plan": "formats.plans",
    "sample": "diffusion.sampling",
}
"""Where each public name is defined; it is imported when it is first asked for, so that the command line starts without torch."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"mediatorize.{_HOMES[name]}"), name)
