"""A model without the weights that its schedule never uses, for targets that write it."""

from __future__ import annotations

from dataclasses import replace

import torch

from mediatorize.errors import UserError
from mediatorize.export.contract import Subject
from mediatorize.model.schedule import patterns_of
from mediatorize.model.transformer import DiffusionTransformer


def pruned(subject: Subject) -> Subject:
    """The subject with only those parts of its layers that its model's schedule uses, at any number of steps; weights are shared.

    Raises:
        UserError: it has no schedule.
    """
    whole = subject.model
    if whole.schedule is None:
        raise UserError("The bundle has no schedule to prune to.", hint="Run `mediatorize calibrate` first, or pass --schedule FILE.")
    settings = subject.config.settings
    with torch.device("meta"):
        model = DiffusionTransformer(whole.arch, settings)
    model.load_state_dict(whole.state_dict(), assign=True)
    model.keep(settings.pruned_to(patterns_of(whole.schedule, settings)))
    model.schedule = whole.schedule
    return Subject(replace(subject.config, settings=model.added()), model.requires_grad_(False).eval())
