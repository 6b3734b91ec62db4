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
from mediatorize.model.levels import Level, forecasts, levels_per_layer, parts_of
from mediatorize.model.memory import Memory, Series, SubLayerMemory
from mediatorize.model.schedule import CallSchedule, RuleSchedule, highest_order, is_computed, places_of
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


Key = tuple[int, str, Level | None]
"""A sub-layer (layer, "attention" or "mlp"), and the surrogate whose rest is kept; None: the sub-layer's output itself."""


class Remembering(AtLevels):
    """A computed call: (x, t, y) -> output, and what later forecasts rest on (keys, b, n, c)."""

    def __init__(self, model: DiffusionTransformer, levels: Sequence[Level], keys: Sequence[Key]) -> None:
        super().__init__(model, levels)
        self.keys = keys

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        memory = Memory(self.model.arch.depth, order=0)
        watched = [
            tuple(tuple(level for layer, side, level in self.keys if (layer, side) == (index, name) and level) for name in SIDES)
            for index in range(self.model.arch.depth)
        ]
        memory.begin(0.0, watched)  # type: ignore[arg-type]
        output = self.model(x, t, y, levels=self.levels, memory=memory)
        return output, torch.stack([_series(memory, key).values[-1] for key in self.keys])


class Forecasting(AtLevels):
    """A forecast call: (x, t, y, what the last computed call and the one before gave, their weights (2,)) -> output."""

    def __init__(self, model: DiffusionTransformer, levels: Sequence[Level], keys: Sequence[Key]) -> None:
        super().__init__(model, levels)
        self.keys = keys

    def forward(self, x: Tensor, t: Tensor, y: Tensor, last: Tensor, before: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        memory = Memory(self.model.arch.depth, order=0)
        for index, key in enumerate(self.keys):
            series = _series(memory, key)
            series.places.append(0.0)
            series.values.append(weights[0] * last[index] + weights[1] * before[index])
        return self.model(x, t, y, levels=self.levels, memory=memory)


SIDES = ("attention", "mlp")


def _series(memory: Memory, key: Key) -> Series:
    layer, side, surrogate = key
    of_side: SubLayerMemory = getattr(memory.blocks[layer], side)
    return of_side.outputs if surrogate is None else of_side.surrogates.setdefault(surrogate, Series())


def keys_of(schedule: CallSchedule) -> list[Key]:
    """What a schedule's computed calls must leave for its forecasts, in the order of the memory's first axis."""
    found: set[Key] = set()
    for levels in schedule.patterns:
        for layer, level in enumerate(levels):
            parts = parts_of(level)
            found |= {
                (layer, side, part.runs) for side, part in zip(SIDES, (parts.attention, parts.mlp), strict=True) if part.order is not None
            }
    return sorted(found, key=str)


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
    if isinstance(schedule, CallSchedule):
        write_json(folder / INDEX_FILE, index | _write_calls(folder, model, schedule))
        return
    uniform: list[tuple[Level, ...]] = [tuple(levels_per_layer(level, arch.depth, model.settings)) for level in subject.levels]
    patterns = uniform if schedule is None else schedule.patterns
    names = {pattern: f"program-{number:03d}.pt2" for number, pattern in enumerate(patterns)}
    for pattern, name in names.items():
        torch.export.save(_program(model, AtLevels, pattern), folder / name)
    pieces = [] if schedule is None else schedule.to_json()["pieces"]
    index["programs"] = {name: list(pattern) for pattern, name in names.items()}
    index["pieces"] = [{**piece, "program": names[tuple(piece["levels"])]} for piece in pieces]
    write_json(folder / INDEX_FILE, index)


def _write_calls(folder: Path, model: DiffusionTransformer, schedule: CallSchedule) -> dict[str, Any]:
    """Programs of a schedule with forecasts, and what the index says of them."""
    keys = keys_of(schedule)
    patterns = schedule.patterns
    if any(len({forecasts(level) for level in pattern}) > 1 for pattern in patterns):
        raise UserError("A call of the schedule forecasts some layers alone.", hint="Export to safetensors or diffusers.")
    if highest_order(patterns) > 1:
        raise UserError("The schedule has forecasts of second order.", hint="Export to safetensors or diffusers.")
    names: dict[tuple[Level, ...], str] = {}
    for number, pattern in enumerate(patterns):
        names[pattern] = f"program-{number:03d}.pt2"
        kind = AtLevels if not keys else Remembering if is_computed(pattern) else Forecasting
        torch.export.save(_program(model, kind, pattern, keys), folder / names[pattern])
    calls = [
        {"noise_level": noise, "programs": [names.get(levels) for levels in call.streams]}
        for noise, call in zip(schedule.noise_levels, schedule.of_calls, strict=True)
    ]
    return {
        "programs": {name: list(pattern) for pattern, name in names.items()},
        "computed": [name for pattern, name in names.items() if is_computed(pattern)],
        "memory": ["sub-layers and surrogates", "batch", model.arch.tokens, model.arch.width],
        "calls": calls,
        "pieces": [],
    }


def _program(
    model: DiffusionTransformer, kind: type[AtLevels], pattern: Sequence[Level], keys: Sequence[Key] = ()
) -> torch.export.ExportedProgram:
    arch = model.arch
    batch = 3  # any but 1, which would be taken for a constant
    example: tuple[Tensor, ...] = (
        torch.zeros(batch, arch.channels, *arch.input_size),
        torch.zeros(batch),
        torch.zeros(batch, dtype=torch.long),
    )
    any_batch = {0: torch.export.Dim("batch", min=1)}
    shapes: tuple[Any, ...] = (any_batch, any_batch, any_batch)
    if kind is Forecasting:
        kept = torch.zeros(len(keys), batch, arch.tokens, arch.width)
        example = (*example, kept, kept.clone(), torch.zeros(2))
        shapes = (*shapes, {1: any_batch[0]}, {1: any_batch[0]}, None)

    def exported(model: DiffusionTransformer) -> torch.export.ExportedProgram:
        module = kind(model, pattern) if kind is AtLevels else kind(model, pattern, keys)  # type: ignore[call-arg]
        return torch.export.export(module, example, dynamic_shapes=shapes)

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
    if "calls" in index:
        return _walked(folder, index, probe)
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


def _walked(folder: Path, index: dict[str, Any], probe: Probe) -> dict[str, Tensor]:
    """The first calls of the schedule by its programs, as the index and `usage` say: an independent driver."""
    found: dict[str, Tensor] = {}
    memory: list[Tensor] = []
    places: list[float] = []
    all_places = places_of([call["noise_level"] for call in index["calls"]])
    for (t, case), call, place in zip(probe.walk, index["calls"], all_places, strict=True):
        name = call["programs"][0]
        if not case or name is None:
            continue
        program = torch.export.load(folder / name).module()
        inputs = (probe.x, probe.x.new_full((len(probe.x),), t), probe.y)
        if name in index["computed"]:
            result = program(*inputs)
            found[case], *kept = result if isinstance(result, tuple) else (result,)
            if places and places[-1] == place:
                memory, places = memory[:-1], places[:-1]
            memory, places = [*memory, *kept][-2:], [*places, place][-2:]
        else:
            step = (place - places[-1]) / (places[-1] - places[0]) if len(places) > 1 else 0.0
            found[case] = program(*inputs, memory[-1], memory[0], torch.tensor([1 + step, -step]))
    return found


def usage(subject: Subject, choices: Choices) -> str:
    schedule = subject.model.schedule
    head = f"""```python
import json, torch
index = json.load(open("DEST/{INDEX_FILE}"))"""
    tail = """
```

Programs are for the CPU in float32; `torch.export.passes.move_to_device_pass` moves a loaded one to a GPU."""
    if isinstance(schedule, CallSchedule):
        return f"""{head}
load = lambda name: torch.export.load(f"DEST/{{name}}").module()
for place, call in enumerate(index["calls"]):  # one call of the sampler each; place: its number among distinct noise levels
    name = call["programs"][0]  # [1] is the unconditional half's
    if name in index["computed"]:
        output, kept = load(name)(x, t, y)  # remember the last two of kept and place: last, before, a, b (a before b); a second at
        # one place takes the first one's
    elif name is not None:
        step = (place - b) / (b - a)  # 0 while only one call was computed
        output = load(name)(x, t, y, last, before, torch.tensor([1 + step, -step]))
    # name None: the output is (1 + step) times the last computed one, less step times the one before; for [1], of its difference to [0]
{tail.lstrip()}"""
    if schedule is None:
        pick = 'name = next(iter(index["programs"]))  # its values are the levels of every layer'
    else:
        pick = 'name = [piece["program"] for piece in index["pieces"] if piece["noise_from"] <= noise_level][-1]  # 0 data, 1 noise'
    return f"""{head}
{pick}
program = torch.export.load(f"DEST/{{name}}").module()
output = program(x, t, y)  # x (b, c, h, w), t (b,), y (b,); any b. index.json says what t means{tail}"""
