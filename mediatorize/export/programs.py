"""Exports of compiled graphs: `torch.export` programs, one per pattern of levels, for any batch size."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mediatorize.diffusion.process import process_of
from mediatorize.errors import UserError
from mediatorize.export.contract import Choices, Probe, Subject
from mediatorize.formats.bundle import write_json
from mediatorize.formats.plans import PLAN_NAME, write_plans
from mediatorize.model.levels import SOFTMAX, Level, holds, levels_per_layer
from mediatorize.model.schedule import RuleSchedule
from mediatorize.model.transformer import DiffusionTransformer

INDEX_FILE = "index.json"
INDEX_FORMAT = "mediatorize-torch-export"


class AtLevels(nn.Module):
    """A model at fixed levels: (x, t, y) -> output."""

    def __init__(self, model: DiffusionTransformer, levels: Level | Sequence[Level]) -> None:
        super().__init__()
        self.model, self.levels = model, levels

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.model(x, t, y, levels=self.levels)


def write(folder: Path, subject: Subject, choices: Choices) -> None:
    """A program per distinct pattern of the schedule, or per level where there is none, and an index of noise levels to programs."""
    model, schedule = subject.model, subject.model.schedule
    if isinstance(schedule, RuleSchedule):
        raise UserError("A step-wise rule looks at the samples, which no program does.", hint="Export to safetensors or diffusers.")
    arch, process = subject.arch, process_of(subject.arch)
    index: dict[str, Any] = {
        "format": INDEX_FORMAT,
        "inputs": {
            "x": ["batch", arch.channels, *arch.input_size],
            "t": ["batch"],
            "y": ["batch"],
        },
        "time": process.time_in_words,
        "noise_level": process.noise_level_in_words,
    }
    if schedule is not None and any(map(holds, schedule.used)):
        raise UserError("The schedule holds what attention left, which no program remembers.", hint="Export to safetensors or diffusers.")
    uniform: list[tuple[Level, ...]] = [tuple(levels_per_layer(level, arch.depth, model.settings)) for level in subject.levels]
    planned = [(SOFTMAX,) * arch.depth if call.levels is None else call.levels for plan in subject.plans.values() for call in plan.calls]
    patterns = dict.fromkeys((*(uniform if schedule is None else schedule.patterns), *planned))
    names = {pattern: f"program-{number:03d}.pt2" for number, pattern in enumerate(patterns)}
    for pattern, name in names.items():
        torch.export.save(_program(model, pattern), folder / name)
    pieces = [] if schedule is None else schedule.to_json()["pieces"]
    index["programs"] = {name: list(pattern) for pattern, name in names.items()}
    index["pieces"] = [{**piece, "program": names[tuple(piece["levels"])]} for piece in pieces]
    write_json(folder / INDEX_FILE, index)
    if subject.plans:
        write_plans(folder / PLAN_NAME, subject.plans)


def _program(model: DiffusionTransformer, pattern: Sequence[Level]) -> torch.export.ExportedProgram:
    arch = model.arch
    batch = 3  # any but 1, which would be taken for a constant
    example: tuple[Tensor, ...] = (
        torch.zeros(batch, arch.channels, *arch.input_size),
        torch.zeros(batch),
        torch.zeros(batch, dtype=torch.long),
    )
    any_batch = {0: torch.export.Dim("batch", min=1)}
    shapes: tuple[Any, ...] = (any_batch, any_batch, any_batch)

    def exported(model: DiffusionTransformer) -> torch.export.ExportedProgram:
        return torch.export.export(AtLevels(model, pattern), example, dynamic_shapes=shapes)

    program = exported(model)
    idle = {node.name for node in program.graph.nodes if node.op == "placeholder" and not node.users}
    light = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})  # the same weights, other modules
    for node, name in program.graph_signature.inputs_to_parameters.items():
        if node in idle:  # another level's
            owner, _, leaf = name.removeprefix("model.").rpartition(".")
            light.get_submodule(owner).register_parameter(leaf, None)
    return exported(light)


def outputs(folder: Path, subject: Subject, choices: Choices, probe: Probe) -> Mapping[str, Tensor]:
    index = json.loads((folder / INDEX_FILE).read_text())
    found = {}
    for case in probe.cases:
        if index["pieces"]:
            noise = float(process_of(subject.arch).noise_level(torch.tensor(case.t)))
            name = [piece["program"] for piece in index["pieces"] if piece["noise_from"] <= noise][-1] if case.scheduled else None
        else:
            pattern = levels_per_layer(case.levels, subject.arch.depth, subject.model.settings)
            name = next(name for name, levels in index["programs"].items() if levels == pattern)
        if name is not None:
            found[case.name] = torch.export.load(folder / name).module()(probe.x, probe.times(case), probe.y)
    return found


def usage(subject: Subject, choices: Choices) -> str:
    schedule = subject.model.schedule
    head = f"""```python
import json, torch
index = json.load(open("DEST/{INDEX_FILE}"))"""
    tail = """
```

Programs are for the CPU in float32; `torch.export.passes.move_to_device_pass` moves a loaded one to a GPU."""
    if schedule is None:
        pick = 'name = next(iter(index["programs"]))  # its values are the levels of every layer'
    else:
        pick = 'name = [piece["program"] for piece in index["pieces"] if piece["noise_from"] <= noise_level][-1]  # 0 data, 1 noise'
    return f"""{head}
{pick}
program = torch.export.load(f"DEST/{{name}}").module()
output = program(x, t, y)  # x (b, c, h, w), t (b,), y (b,); any b. index.json says what t means{tail}"""
