"""An adapter: what conversion added to a pretrained checkpoint, alone, to be put on that checkpoint again."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from mediatorize.errors import UserError, about
from mediatorize.formats.bundle import BundleConfig, hash_of_weights, read_config, read_schedule
from mediatorize.formats.tensors import Weight, read_safetensors, refuse_non_finite
from mediatorize.model.transformer import DiffusionTransformer

ADAPTER_FORMAT = "mediatorize-adapter"
ADAPTER_FILE = "adapter.safetensors"


def apply_adapter(base: DiffusionTransformer, folder: Path) -> DiffusionTransformer:
    """The pretrained model `base` with the mediators and the schedule of an adapter: eval mode, float32.

    Raises:
        UserError: the folder is no whole adapter, or is one of another checkpoint (by the hash of its weights).
    """
    config = _adapter_config(folder)
    if base.settings is not None:
        raise UserError(f"{folder}: is for a pretrained checkpoint, and this model has mediators already.", hint="Load it without adapter.")
    found, needed = hash_of_weights(base), config.source.sha256
    if found != needed or base.arch != config.arch:
        what = f"its weights hash to {needed[:12]}, these to {found[:12]}" if found != needed else "same weights, another architecture"
        raise UserError(f"{folder}: belongs to another base ({what}).", hint=f"Load it on {config.source.file}, which it was made from.")
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
