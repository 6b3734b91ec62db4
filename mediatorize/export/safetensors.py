"""Export as safetensors: one file with all weights, or an adapter with those alone that the pretrained checkpoint does not have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mediatorize.devices import DTYPES
from mediatorize.errors import UserError
from mediatorize.export.contract import Choices, Probe, Subject
from mediatorize.export.pretrained import pretrained_part, refuse_changed_base
from mediatorize.formats.adapter import ADAPTER_FILE, ADAPTER_FORMAT, apply_adapter
from mediatorize.formats.bundle import load_bundle, save_tensors, write_json
from mediatorize.formats.plans import PLAN_NAME, write_plans
from mediatorize.formats.tensors import write_beside
from mediatorize.model.transformer import DiffusionTransformer

MODEL_FILE = "model.safetensors"


def write(folder: Path, subject: Subject, choices: Choices) -> None:
    """One file with everything, or with `adapter` with what was added; `config.json` and the schedule beside it."""
    if choices.adapter:
        refuse_changed_base(subject)
    kept = stored_weights(subject, choices)
    config = subject.config.to_json()
    if choices.adapter:
        config |= {"format": ADAPTER_FORMAT}
    write_beside(folder / (ADAPTER_FILE if choices.adapter else MODEL_FILE), lambda path: save_tensors(kept, path, {"format": "pt"}))
    write_json(folder / "config.json", config)
    if subject.model.schedule is not None:
        write_json(folder / "schedule.json", subject.model.schedule.to_json())
    if subject.plans:
        write_plans(folder / PLAN_NAME, subject.plans)


def stored_weights(subject: Subject, choices: Choices) -> dict[str, Tensor]:
    """The weights that are written, in the type that they are written in.

    Raises:
        UserError: one does not fit the type.
    """
    kept = {name: value.to(DTYPES[choices.dtype]).contiguous() for name, value in _stored(subject, choices).items()}
    if overflown := [name for name, value in kept.items() if not value.isfinite().all()]:
        raise UserError(f"{overflown[0]} does not fit {choices.dtype}.", hint="Pass --dtype bfloat16 or float32.")
    return kept


def outputs(folder: Path, subject: Subject, choices: Choices, probe: Probe) -> Mapping[str, Tensor]:
    if not choices.adapter:
        return probe.outputs(load_bundle(folder))
    return probe.outputs(apply_adapter(pretrained_part(subject.model), folder))


def reference(subject: Subject, choices: Choices) -> DiffusionTransformer:
    """The model with the stored weights rounded to what they are stored in."""
    if choices.dtype == "float32":
        return subject.model
    with torch.device("meta"):
        model = DiffusionTransformer(subject.arch, subject.config.settings)
    stored = {name: value.to(DTYPES[choices.dtype]).float() for name, value in _stored(subject, choices).items()}
    model.load_state_dict(subject.model.state_dict() | stored, assign=True)
    model.schedule = subject.model.schedule
    return model.requires_grad_(False).eval()


def usage(subject: Subject, choices: Choices) -> str:
    base = f'"{subject.config.source.file}", adapter="DEST"' if choices.adapter else '"DEST"'
    levels = subject.levels
    asked = f"\nout = model(x, t, y, levels={json.dumps(levels[-1])})  # or one level for all layers" if levels else ""
    how = f', plan=mediatorize.load_plan("DEST"))  # {max(subject.plans)} calls' if subject.plans else ")  # its schedule where it has one"
    return f"""```python
import mediatorize
model = mediatorize.load_model({base})
latents = mediatorize.sample(model, [0, 1, 2, 3]{how}{asked}
```"""


def _stored(subject: Subject, choices: Choices) -> dict[str, Tensor]:
    """The weights that are written: all, or those that the pretrained model does not have."""
    base = pretrained_part(subject.model).state_dict() if choices.adapter else {}
    return {name: value for name, value in subject.model.state_dict().items() if name not in base}
