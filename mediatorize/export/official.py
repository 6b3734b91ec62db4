"""Export as an official DiT's, SiT's or LightningDiT's `.pt`: the pretrained weights, bit for bit as they came in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mediatorize.errors import UserError
from mediatorize.export.contract import Choices, Probe, Subject
from mediatorize.export.pretrained import pretrained_part, refuse_changed_base
from mediatorize.formats.bundle import hash_of_weights
from mediatorize.formats.checkpoint import Hints, open_checkpoint
from mediatorize.formats.tensors import own_copies
from mediatorize.model.architecture import FAMILIES
from mediatorize.model.levels import is_pretrained

OFFICIAL_FILE = "model.pt"


def write(folder: Path, subject: Subject, choices: Choices) -> None:
    """The pretrained weights under their official names, as `torch.save` of an official model's state dict."""
    arch = subject.arch
    if arch.frequency_shift or arch.reversed_time or arch.mlp_norm_eps != 1e-6:
        whose = "REPA's SiT, whose time runs the other way" if arch.reversed_time else "diffusers' DiT, whose timestep frequencies differ"
        raise UserError(
            f"The weights are of {whose}: the official code would compute something else with them.",
            hint="Export to diffusers or safetensors.",
        )
    if arch.mediators:
        raise UserError("The weights are of a SiT with mediators, which SiT's code does not run.", hint="Pass --to attention-mediators.")
    if arch.family == "sit" and arch.qk_norm:
        raise UserError(
            "The weights are of a SiT that normalises queries and keys, which SiT's code does not.",
            hint="Export to diffusers or safetensors.",
        )
    refuse_changed_base(subject)
    torch.save(own_copies(pretrained_part(subject.model).state_dict()), folder / OFFICIAL_FILE)


def outputs(folder: Path, subject: Subject, choices: Choices, probe: Probe) -> Mapping[str, Tensor]:
    """The pretrained model's outputs; the weights must be those that came in, bit for bit."""
    arch = subject.arch
    checkpoint = open_checkpoint(folder / OFFICIAL_FILE, Hints(arch.family, arch.heads, arch.classes))
    model = checkpoint.load()
    if hash_of_weights(model) != subject.config.source.sha256:
        raise UserError(f"{folder / OFFICIAL_FILE}: is not what came in, bit for bit.", hint="Please report it.")
    alone = tuple(case for case in probe.cases if not isinstance(case.levels, tuple) and is_pretrained(case.levels))
    return replace(probe, cases=alone).outputs(model)


def usage(subject: Subject, choices: Choices) -> str:
    facts = FAMILIES[subject.arch.family]
    return f"""```python
import torch
model = ...  # {subject.arch.name}, from {facts.code} of {facts.name}
model.load_state_dict(torch.load("DEST/{OFFICIAL_FILE}", weights_only=True))
```

`mediatorize inspect DEST/{OFFICIAL_FILE} --family {subject.arch.family} --num-heads {subject.arch.heads}` reads it as well."""
