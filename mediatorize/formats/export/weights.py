"""Exports of weights alone: safetensors, an adapter to the pretrained checkpoint, the official `.pt`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mediatorize.errors import UserError, about
from mediatorize.formats.bundle import (
    BundleConfig,
    hash_of_weights,
    load_bundle,
    read_config,
    read_schedule,
    save_tensors,
    write_json,
)
from mediatorize.formats.checkpoint import Hints, open_checkpoint
from mediatorize.formats.export.contract import Choices, Probe, Subject
from mediatorize.formats.tensors import Weight, read_safetensors, refuse_non_finite, write_beside
from mediatorize.model.architecture import SOFTMAX
from mediatorize.model.transformer import DiffusionTransformer

ADAPTER_FORMAT = "mediatorize-adapter"
ADAPTER_FILE = "adapter.safetensors"
MODEL_FILE = "model.safetensors"
OFFICIAL_FILE = "model.pt"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    if hash_of_weights(pretrained_part(subject.model)) != source["sha256"]:
        raise UserError(
            f"The bundle's softmax weights are no longer those of {source['file']}.", hint="Export it as safetensors, without --adapter."
        )


def _schedule_beside(folder: Path, model: DiffusionTransformer) -> None:
    if model.schedule is not None:
        write_json(folder / "schedule.json", model.schedule.to_json())


# --- safetensors ---------------------------------------------------------------------------------------------------------------


def write_safetensors(folder: Path, subject: Subject, choices: Choices) -> None:
    """One file with everything, or with `adapter` with what was added; `config.json` beside it."""
    if choices.adapter:
        refuse_changed_base(subject)
    dtype = DTYPES[choices.dtype]
    kept = {name: value.to(dtype).contiguous() for name, value in _stored(subject, choices).items()}
    if overflown := [name for name, value in kept.items() if not value.isfinite().all()]:
        raise UserError(f"{overflown[0]} does not fit {choices.dtype}.", hint="Pass --dtype bfloat16 or float32.")
    config = subject.config.to_json()
    if choices.adapter:
        config |= {"format": ADAPTER_FORMAT}
    write_beside(folder / (ADAPTER_FILE if choices.adapter else MODEL_FILE), lambda path: save_tensors(kept, path, {"format": "pt"}))
    write_json(folder / "config.json", config)
    _schedule_beside(folder, subject.model)


def _stored(subject: Subject, choices: Choices) -> dict[str, Tensor]:
    """The weights that are written: all, or those that the pretrained model does not have."""
    base = pretrained_part(subject.model).state_dict() if choices.adapter else {}
    return {name: value for name, value in subject.model.state_dict().items() if name not in base}


def rounded(subject: Subject, choices: Choices) -> DiffusionTransformer:
    """The model with those weights rounded to what they are stored in."""
    if choices.dtype == "float32":
        return subject.model
    with torch.device("meta"):
        model = DiffusionTransformer(subject.arch, subject.config.settings)
    stored = {name: value.to(DTYPES[choices.dtype]).float() for name, value in _stored(subject, choices).items()}
    model.load_state_dict(subject.model.state_dict() | stored, assign=True)
    model.schedule = subject.model.schedule
    return model.requires_grad_(False).eval()


def safetensors_outputs(folder: Path, subject: Subject, choices: Choices, probe: Probe) -> Mapping[str, Tensor]:
    if not choices.adapter:
        return probe.outputs(load_bundle(folder))
    return probe.outputs(apply_adapter(pretrained_part(subject.model), folder))


def safetensors_usage(subject: Subject, choices: Choices) -> str:
    base = f'"{subject.config.source["file"]}", adapter="DEST"' if choices.adapter else '"DEST"'
    return f"""```python
import mediatorize
model = mediatorize.load_model({base})
latents = mediatorize.sample(model, [0, 1, 2, 3])  # its schedule where it has one
out = model(x, t, y, levels={subject.config.settings.levels[-1]})  # or one level for all layers
```"""


def apply_adapter(base: DiffusionTransformer, folder: Path) -> DiffusionTransformer:
    """The pretrained model `base` with the mediators and the schedule of an adapter: eval mode, float32.

    Raises:
        UserError: the folder is no whole adapter, or is one of another checkpoint (by the hash of its weights).
    """
    config = _adapter_config(folder)
    if base.settings is not None:
        raise UserError(f"{folder}: is for a pretrained checkpoint, and this model has mediators already.", hint="Load it without adapter.")
    found, needed = hash_of_weights(base), config.source["sha256"]
    if found != needed or base.arch != config.arch:
        what = f"its weights hash to {needed[:12]}, these to {found[:12]}" if found != needed else "same weights, another architecture"
        raise UserError(f"{folder}: belongs to another base ({what}).", hint=f"Load it on {config.source['file']}, which it was made from.")
    file = folder / ADAPTER_FILE
    stored = read_safetensors(file)[0]
    refuse_non_finite((name, Weight((tensor,))) for name, tensor in stored.items())
    state = base.state_dict() | {name: tensor.read().float() for name, tensor in stored.items()}
    with about(folder), torch.device("meta"):
        model = DiffusionTransformer(config.arch, config.settings)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    if wrong := next((name for name in {**expected, **shapes} if expected.get(name) != shapes.get(name)), None):
        raise UserError(
            f"{file}: {wrong} is {shapes.get(wrong, 'missing')} where config.json says {expected.get(wrong, 'nothing')}.",
            hint="Export it again, or copy it again.",
        )
    model.load_state_dict(state, assign=True)
    model.schedule = read_schedule(folder, config)
    return model.requires_grad_(False).eval()


def _adapter_config(folder: Path) -> BundleConfig:
    try:
        kind = json.loads((folder / "config.json").read_text())["format"]
    except (OSError, ValueError, KeyError, TypeError):
        kind = None
    if kind != ADAPTER_FORMAT or not (folder / ADAPTER_FILE).exists():
        raise UserError(f"{folder}: is no adapter.", hint="Pass a folder that `mediatorize export --to safetensors --adapter` wrote.")
    return read_config(folder)


# --- official ------------------------------------------------------------------------------------------------------------------


def write_official(folder: Path, subject: Subject, choices: Choices) -> None:
    """The pretrained weights under their official names, as `torch.save` of an official model's state dict."""
    arch = subject.arch
    if arch.frequency_shift or arch.reversed_time or arch.mlp_norm_eps != 1e-6:
        whose = "REPA's SiT, whose time runs the other way" if arch.reversed_time else "diffusers' DiT, whose timestep frequencies differ"
        raise UserError(
            f"The weights are of {whose}: the official code would compute something else with them.",
            hint="Export to diffusers or safetensors.",
        )
    refuse_changed_base(subject)
    state = pretrained_part(subject.model).state_dict()
    torch.save({name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}, folder / OFFICIAL_FILE)


def official_outputs(folder: Path, subject: Subject, choices: Choices, probe: Probe) -> Mapping[str, Tensor]:
    """Softmax's outputs; the weights must be those that came in, bit for bit."""
    arch = subject.arch
    checkpoint = open_checkpoint(folder / OFFICIAL_FILE, Hints(arch.family, arch.heads, arch.classes))
    model = checkpoint.load()
    if hash_of_weights(model) != subject.config.source["sha256"]:
        raise UserError(f"{folder / OFFICIAL_FILE}: is not what came in, bit for bit.", hint="Please report it.")
    return replace(probe, cases=tuple(case for case in probe.cases if case.levels == SOFTMAX and not case.scheduled)).outputs(model)


def official_usage(subject: Subject, choices: Choices) -> str:
    models = "models.py of DiT or SiT"
    return f"""```python
import torch
model = ...  # {subject.arch.name}, from {models}
model.load_state_dict(torch.load("DEST/{OFFICIAL_FILE}", weights_only=True))
```

`mediatorize inspect DEST/{OFFICIAL_FILE} --family {subject.arch.family} --num-heads {subject.arch.heads}` reads it as well."""
