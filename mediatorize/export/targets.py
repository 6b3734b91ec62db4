"""The targets of `mediatorize export`. No torch here: the command line lists them to start."""

from __future__ import annotations

from dataclasses import fields

from mediatorize.errors import UserError
from mediatorize.export.contract import Choices, Export

EXPORTS: dict[str, Export] = {
    "diffusers": Export(
        module="mediatorize.export.pipelines",
        help="a folder for DiffusionPipeline.from_pretrained, its code with it",
        heeds=frozenset({"dtype", "vae", "level", "schedule", "prune"}),
        carries_plans=True,
        level_later=True,
    ),
    "safetensors": Export(
        module="mediatorize.export.safetensors",
        help="one file of weights and config.json; with --adapter what was added alone",
        heeds=frozenset({"dtype", "adapter", "schedule", "prune"}),
        carries_plans=True,
    ),
    "torch-export": Export(
        module="mediatorize.export.programs",
        help="a .pt2 program per pattern of levels",
        heeds=frozenset({"schedule"}),
        carries_plans=True,
    ),
    "official": Export(
        module="mediatorize.export.official",
        help="the pretrained weights as an official .pt",
    ),
    "attention-mediators": Export(
        module="mediatorize.export.attention_mediators",
        help="one level of the published form as a .pt of the paper's code",
        heeds=frozenset({"level"}),
    ),
}
"""Exports by name. To add one: a module that is a `Target` (`contract.py`), and an entry here."""


def refuse_idle_choices(to: str, choices: Choices) -> None:
    """An option that would change nothing is a mistake."""
    for choice in fields(Choices):
        if getattr(choices, choice.name) != choice.default and choice.name not in EXPORTS[to].heeds:
            heeding = [name for name, export in EXPORTS.items() if choice.name in export.heeds]
            raise UserError(f"--{choice.name} says nothing to --to {to}.", hint=f"It goes with --to {' or '.join(heeding)}.")
    if choices.level is not None and (choices.schedule is not None or choices.prune):
        raise UserError("--level takes the place of a schedule, which --schedule and --prune go by.", hint="Leave --level out.")
    if choices.adapter and choices.prune:
        raise UserError("An adapter is put on the whole checkpoint, and --prune leaves parts of it out.", hint="Pass one of them.")
