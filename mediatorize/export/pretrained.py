"""The pretrained model inside a converted one, for targets that write it or leave it out."""

from __future__ import annotations

import torch

from mediatorize.errors import UserError
from mediatorize.export.contract import Subject
from mediatorize.formats.bundle import RANDOM, hash_of_weights
from mediatorize.model.transformer import DiffusionTransformer


def pretrained_part(model: DiffusionTransformer) -> DiffusionTransformer:
    """The softmax model inside a converted one, its weights shared."""
    with torch.device("meta"):
        base = DiffusionTransformer(model.arch)
    state = model.state_dict()
    base.load_state_dict({name: state[name] for name in base.state_dict()}, assign=True)
    return base.requires_grad_(False).eval()


def refuse_changed_base(subject: Subject) -> None:
    """What is said to hold or to need the pretrained weights must do so."""
    source = subject.config.source
    if source.weights == RANDOM:
        raise UserError("The bundle's level softmax began from random weights and was never trained.", hint="Export the level that was.")
    if hash_of_weights(pretrained_part(subject.model)) != source.sha256:
        raise UserError(
            f"The bundle's softmax weights are no longer those of {source.file}.", hint="Export it as safetensors, without --adapter."
        )
