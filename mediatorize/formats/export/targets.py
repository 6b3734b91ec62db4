"""The targets of `mediatorize export`."""

from __future__ import annotations

from mediatorize.formats.export import pipelines, programs, weights
from mediatorize.formats.export.contract import Export

EXPORTS: dict[str, Export] = {
    "diffusers": Export(
        "a folder for DiffusionPipeline.from_pretrained, its code with it",
        pipelines.write_pipeline,
        pipelines.pipeline_outputs,
        pipelines.pipeline_usage,
        frozenset({"vae", "level"}),
    ),
    "safetensors": Export(
        "one file of weights and config.json; --adapter for what was added alone",
        weights.write_safetensors,
        weights.safetensors_outputs,
        weights.safetensors_usage,
        frozenset({"dtype", "adapter"}),
        weights.rounded,
    ),
    "torch-export": Export(
        "a .pt2 program per pattern of levels",
        programs.write_programs,
        programs.programs_outputs,
        programs.programs_usage,
    ),
    "official": Export(
        "the pretrained weights as an official .pt",
        weights.write_official,
        weights.official_outputs,
        weights.official_usage,
    ),
}
"""Exports by name. To add one: a function that writes into a folder, one that loads it back, and a few lines of use."""
