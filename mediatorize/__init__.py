"""Compresses pretrained diffusion transformers into mediator form (arXiv 2408.05710)."""

from mediatorize.diffusion.solvers import sample
from mediatorize.errors import UserError
from mediatorize.formats.loading import load_model
from mediatorize.model.architecture import Architecture, MediatorSettings
from mediatorize.model.schedule import Schedule
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.version import VERSION

__version__ = VERSION
__all__ = ["Architecture", "DiffusionTransformer", "MediatorSettings", "Schedule", "UserError", "load_model", "sample"]
