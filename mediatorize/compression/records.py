"""Settings and results of the algorithms, as plain records that go to JSON and back. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mediatorize.model.levels import Level, read_part_level

Trained = Literal["mediators", "all"]
Weighting = Literal["sample", "even"]
Teacher = Literal["softmax", "none"]
"""What a model learns from: itself at level softmax, or data alone."""
Optimizer = Literal["muon", "adamw"]
Rate = Literal["cosine", "constant"]


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How layers are fitted, one by one."""

    steps: int = 500
    """Optimiser steps per layer; each trains every level. 0 leaves the mediators as initialised."""
    batch: int = 16
    """States per step."""
    learning_rate: float = 3e-3
    """Adam's peak rate, for weights of width 128; projections of a wider model use it times 128 / width."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """How a model is distilled, or trained on data alone. The result depends only on these settings, the weights and the states."""

    steps: int = 2000
    batch: int = 16
    """States per step, of all processes together."""
    learning_rate: float = 1.5e-3
    """Peak rate, for weights of width 128; a wider model uses it times 128 / width."""
    warmup: int = 50
    ema: float = 0.0
    """Decay of the averaged weights, which are kept in the end; 0 keeps the last weights."""
    feature_weight: float = 0.0
    """Weight of matching every block's output, beside the model's."""
    data_weight: float = 0.0
    """Loss weight of the error against the data's own targets, if there are data. Without a teacher it is the whole loss."""
    train: Trained = "mediators"
    levels: tuple[Level, ...] = ()
    """Levels that are trained; empty: all that were added."""
    teacher: Teacher = "softmax"
    label_dropout: float = 0.1
    """Without a teacher: the share of labels that are null, so that the model can be guided."""
    optimizer: Optimizer = "muon"
    """`muon`: Muon for matrices and NAdamW for all else. `adamw`: AdamW for all, without weight decay, at the same rate for any width."""
    rate: Rate = "cosine"
    """How the learning rate goes on after the warm-up."""
    accumulate: int = 1
    """Number of parts that every process splits its share of a batch into."""
    checkpointing: bool = False
    """Recompute a block's activations in the backward pass."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 leaves it as it is."""
    seed: int = 0

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> DistillSettings:
        return cls(**{**fields, "levels": tuple(fields.get("levels", ()))})


Errors = Mapping[Level, float]
"""A relative error by level."""


def errors_from_json(fields: Mapping[str, float]) -> dict[Level, float]:
    """Errors by level, whose keys JSON has turned into text."""
    return {read_part_level(level): error for level, error in fields.items()}


@dataclass(frozen=True)
class LayerErrors:
    """Relative error |added level - pretrained| / |pretrained| of a layer's attention, or of its MLP, on held-out states, by level."""

    layer: int
    before: Errors
    after: Errors

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> LayerErrors:
        return cls(int(fields["layer"]), errors_from_json(fields["before"]), errors_from_json(fields["after"]))


@dataclass(frozen=True)
class Distillation:
    """How a bundle was distilled last."""

    plan: Mapping[str, Any]
    """Everything that the result depends on, as given to the command; `distill` holds `DistillSettings`."""
    before: Errors
    """Relative error of the model's output by level; empty if it had no teacher."""
    after: Errors

    @property
    def settings(self) -> DistillSettings:
        return DistillSettings.from_json(self.plan["distill"])

    def to_json(self) -> dict[str, Any]:
        return {"plan": dict(self.plan), "before": dict(self.before), "after": dict(self.after)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Distillation:
        return cls(fields["plan"], errors_from_json(fields["before"]), errors_from_json(fields["after"]))
