"""Export as a checkpoint of LeapLabTHU/Attention-Mediators: one mediator count in every layer, under that code's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mediatorize.errors import UserError
from mediatorize.export.contract import Choices, Probe, Subject
from mediatorize.export.pretrained import pretrained_part
from mediatorize.formats.checkpoint import Hints, open_checkpoint, published_name
from mediatorize.formats.tensors import own_copies
from mediatorize.model.architecture import Architecture
from mediatorize.model.block import Block
from mediatorize.model.levels import SOFTMAX, Level, kind_of, layers_in_short
from mediatorize.model.transformer import DiffusionTransformer, is_mediator

FILE = "model.pt"


def write(folder: Path, subject: Subject, choices: Choices) -> None:
    """The weights of one level, those that it shares with others among them, as `torch.save` of the original model's state dict."""
    state = alone_at(subject.model, _level(subject, choices)).state_dict()
    torch.save({published_name(name): value for name, value in own_copies(state).items()}, folder / FILE)


def outputs(folder: Path, subject: Subject, choices: Choices, probe: Probe) -> Mapping[str, Tensor]:
    """The model's outputs at the level that was written."""
    level, arch = _level(subject, choices), subject.arch
    model = open_checkpoint(folder / FILE, Hints(arch.family, arch.heads, arch.classes)).load()
    case = next(case for case in probe.cases if case.levels == level)
    return replace(probe, cases=(replace(case, levels=SOFTMAX),)).outputs(model)


def usage(subject: Subject, choices: Choices) -> str:
    mediators = _architecture(subject.arch, _level(subject, choices)).mediators
    return f"""```python
import torch
model = ...  # {subject.arch.name} with mediator_num={mediators}, from models.py of Attention-Mediators
model.load_state_dict(torch.load("DEST/{FILE}", weights_only=True))
```

`mediatorize inspect DEST/{FILE}` reads it as well."""


def alone_at(model: DiffusionTransformer, level: Level) -> DiffusionTransformer:
    """A model that is the given one with all layers at one level: what the level changes is merged into the pretrained weights."""
    if level == SOFTMAX:
        return pretrained_part(model)
    with torch.device("meta"):
        alone = DiffusionTransformer(_architecture(model.arch, level))
    state = {name: value for name, value in model.state_dict().items() if not is_mediator(name)}
    for index, block in enumerate(model.layers()):
        state |= {f"blocks.{index}.{name}": value for name, value in _merged(block, level).items()}
    alone.load_state_dict({name: state[name] for name in alone.state_dict()}, assign=True)
    return alone.requires_grad_(False).eval()


@torch.no_grad()
def _merged(block: Block, level: Level) -> dict[str, Tensor]:
    """What differs in a block at a level, under the pretrained block's names."""
    attention, own = block.attn.mediated(), block.mediator
    found: dict[str, Tensor] = {}
    for name, layer in (("attn.qkv", attention.qkv), ("attn.proj", attention.proj)):
        found |= {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}
    found |= {f"attn.published.levels.{level}.{name}": value for name, value in attention.level(level).state_dict().items()}
    if own is not None and own.mlp is not None:
        found |= {f"mlp.{name}": value for name, value in own.mlp.state_dict().items()}
    if own is not None and own.modulation is not None:
        update, pretrained = own.modulation, block.adaLN_modulation[1]
        assert isinstance(pretrained, nn.Linear)
        found["adaLN_modulation.1.weight"] = pretrained.weight + update.up.weight @ update.down.weight
        found["adaLN_modulation.1.bias"] = pretrained.bias + update.up.bias
    return found


def _architecture(arch: Architecture, level: Level) -> Architecture:
    return arch if level == SOFTMAX else replace(arch, mediators=kind_of(level).mediators(level))


def _level(subject: Subject, choices: Choices) -> Level:
    """The level that is written: the one that was asked for, or that of a checkpoint that was trained with mediators."""
    arch, settings = subject.arch, subject.config.settings
    if arch.family != "sit" or arch.reversed_time:
        raise UserError(f"Attention-Mediators' code runs SiTs, and this is a {arch.name}.", hint="Export to diffusers or safetensors.")
    if arch.qk_norm:
        raise UserError("Attention-Mediators' code does not normalise queries and keys.", hint="Export to diffusers or safetensors.")
    level = SOFTMAX if choices.level is None and arch.mediators else choices.level
    if level is None:
        raise UserError("An Attention-Mediators checkpoint has one count of mediators.", hint=f"Pass --level {settings.levels[0]}.")
    if level == SOFTMAX and not arch.mediators:
        raise UserError("Level softmax has no mediators.", hint="Export to official.")
    if level != SOFTMAX and settings.form != "published":
        raise UserError(
            "The bundle's mediators are not in the published form, the only one that Attention-Mediators' code runs.",
            hint="Convert with --form published.",
        )
    if level != SOFTMAX and settings.layers is not None:
        raise UserError(
            f"Level {level} is in layers {layers_in_short(settings.layers)} alone, and Attention-Mediators' code has mediators in all.",
            hint="Convert without --layers, or export to diffusers or safetensors.",
        )
    return level
