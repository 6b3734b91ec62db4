"""`mediatorize inspect`: what a checkpoint is, where its FLOPs go, what reduction is reachable."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from mediatorize.compression.redundancy import Redundancy, attention_redundancy
from mediatorize.errors import UserError
from mediatorize.formats.bundle import is_bundle, open_bundle
from mediatorize.formats.checkpoint import Hints, open_checkpoint
from mediatorize.formats.loading import load_model, refuse_checkpoint_options
from mediatorize.model import cost
from mediatorize.model.architecture import SOFTMAX, Architecture, Family, MediatorSettings, coarse_grid, default_local_rank, preset
from mediatorize.model.transformer import count_parameters, is_mediator
from mediatorize.report.pictures import write_redundancy
from mediatorize.stages.options import ClassesOption, DeviceOption, FamilyOption, HeadsOption, Option, WeightsOption
from mediatorize.stages.running import gmacs, pick_device, progress_bar, text_table

SHOWN_LEVELS = (1, 4, 16, 64)
REDUNDANCY_CALLS = 10
"""Model calls of the trajectories that redundancy is measured along."""


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found; FLOPs are of one forward on one sample, a multiply-add counting two."""

    source: str
    format: str
    weights: str
    arch: Architecture
    parameters: int
    settings: MediatorSettings
    notes: tuple[str, ...]
    redundancy: Redundancy | None = None
    redundancy_picture: Path | None = None

    def reachable(self) -> list[dict[str, Any]]:
        """Cost of the whole model with all layers at a level, relative to softmax, at this resolution, half and twice it."""
        rows = []
        for scale in (0.5, 1, 2):
            grid = int(self.arch.grid[0] * scale), int(self.arch.grid[1] * scale)
            if min(grid) < 2:
                continue
            arch = replace(self.arch, grid=grid)
            softmax = cost.forward_flops(arch)
            cells = coarse_grid(grid)[0] * coarse_grid(grid)[1]
            row: dict[str, Any] = {"input_size": list(arch.input_size), "image_size": arch.image_size, "flops": softmax, "relative": {}}
            for level in self.settings.levels:
                if level <= cells:
                    row["relative"][level] = cost.forward_flops(arch, level, self.settings) / softmax
            rows.append(row)
        return rows

    def to_json(self) -> dict[str, Any]:
        parts = cost.forward_flops_by_part(self.arch)
        flops = sum(parts.values())
        return {
            "source": self.source,
            "format": self.format,
            "weights": self.weights,
            "name": self.arch.name,
            "architecture": self.arch.to_json(),
            "parameters": self.parameters,
            "image_size": self.arch.image_size,
            "flops": flops,
            "macs": flops // 2,
            "flops_by_part": parts,
            "reachable": self.reachable(),
            "local_rank": self.settings.local_rank,
            "notes": list(self.notes),
            "redundancy": self.redundancy.to_json() if self.redundancy else None,
        }

    def __str__(self) -> str:
        arch = self.arch
        size = "x".join(map(str, arch.input_size))
        image = f", pictures of {'x'.join(map(str, arch.image_size))}" if arch.image_size else ""
        kind = "pixels" if arch.channels in (1, 3) else "latents"
        lines = [
            f"{self.source}: {arch.name} ({self.format}{', ' + self.weights if self.weights else ''})",
            f"  family {arch.family}, {arch.depth} layers, width {arch.width}, {arch.heads} heads of {arch.head_width}, "
            f"patches of {arch.patch}, {arch.tokens} tokens ({arch.grid[0]}x{arch.grid[1]}), "
            f"{arch.classes} classes{' and null' if arch.null_class else ''}",
            f"  {arch.channels} channels of {size} {kind}{image}; {self.parameters / 1e6:.1f}M parameters",
            *(f"  {note}" for note in self.notes),
            "",
            "One forward on one sample (papers' Gflops are GMACs):",
        ]
        parts = cost.forward_flops_by_part(arch)
        total = sum(parts.values())
        rows = [(name, f"{flops / 2e9:.3f}", f"{flops / 1e9:.3f}", f"{flops / total:.1%}") for name, flops in parts.items()]
        rows.append(("total", gmacs(total), f"{2 * float(gmacs(total)):.4g}", "100%"))
        lines.append(text_table(("part", "GMACs", "GFLOPs", "share"), rows))
        rank = self.settings.local_rank
        lines += ["", f"Reachable with every layer at one level (FLOPs of the whole model; local branch of rank {rank} included):"]
        table = []
        for row in self.reachable():
            resolution = "x".join(map(str, row["image_size"] or row["input_size"]))
            name = f"{resolution}{' (this one)' if tuple(row['input_size']) == arch.input_size else ''}"
            relative = [f"{row['relative'][level]:.1%}" if level in row["relative"] else "-" for level in self.settings.levels]
            table.append((name, gmacs(row["flops"]), *relative))
        lines.append(text_table(("resolution", "GMACs softmax", *(f"m={level}" for level in self.settings.levels)), table))
        if self.redundancy is not None:
            lines += ["", *_redundancy_lines(self.redundancy, arch.tokens), f"Wrote {self.redundancy_picture}."]
        return "\n".join(lines)


def _redundancy_lines(found: Redundancy, tokens: int) -> list[str]:
    def cell(values: tuple[float, ...]) -> float:
        return sum(values) / len(values)

    header = ("layer", *(f"rank at {level:.2f}" for level in found.noise_levels), *(f"error at m={m}" for m in found.errors))
    rows = []
    for layer, ranks in enumerate(found.effective_rank):
        errors = (f"{cell(values[layer]):.3f}" for values in found.errors.values())
        rows.append((f"{layer}", *(f"{rank:.1f}" for rank in ranks), *errors))
    return [
        f"How redundant attention is, over {found.states} states of the model's own trajectories: effective rank of its {tokens}x{tokens} "
        "matrices (exp of the entropy of their singular values, mean over heads and states) at noise levels from 1 (noise) to 0 (data); "
        "and |A - A_m| / |A| of the best matrix A_m of rank m (Frobenius norm, mean over noise levels too), below which no attention "
        "through m mediators can come:",
        text_table(header, rows),
    ]


def inspect(
    checkpoint: Annotated[str, Option("a checkpoint or bundle; or a published size, such as DiT-XL/2@512")],
    *,
    family: FamilyOption = None,
    num_heads: HeadsOption = None,
    num_classes: ClassesOption = None,
    weights: WeightsOption = None,
    redundancy: Annotated[
        Path | None, Option("a .png to write: how redundant attention is, per layer and noise level; samples a little")
    ] = None,
    device: DeviceOption = "auto",
) -> Inspection:
    """What a checkpoint is, where its FLOPs go, what reduction is reachable. Reads every weight once, to be sure that all are finite."""
    path = Path(checkpoint)
    if redundancy is not None and (redundancy.suffix != ".png" or not redundancy.absolute().parent.is_dir()):
        raise UserError(f"{redundancy}: not a .png in a folder that is there.", hint="Pass --redundancy OUT.png.")
    found = _inspect(checkpoint, path, family, num_heads, num_classes, weights, redundancy is not None)
    if redundancy is None:
        return found
    model = load_model(path, family=family, num_heads=num_heads, num_classes=num_classes, weights=weights).to(pick_device(device))
    with progress_bar(REDUNDANCY_CALLS + model.arch.depth, "attention", "call") as bar:
        measured = attention_redundancy(model, found.settings.levels, calls=REDUNDANCY_CALLS, on_step=lambda: bar.update())
    write_redundancy(redundancy, measured.effective_rank, measured.errors, measured.noise_levels)
    return replace(found, redundancy=measured, redundancy_picture=redundancy)


def _inspect(
    checkpoint: str,
    path: Path,
    family: Family | None,
    num_heads: int | None,
    num_classes: int | None,
    weights: str | None,
    needs_weights: bool,
) -> Inspection:
    if "@" in checkpoint and not path.exists():
        if needs_weights:
            raise UserError(f"{checkpoint}: a published size has no weights.", hint="Pass a checkpoint to --redundancy.")
        arch = preset(checkpoint)
        return Inspection(checkpoint, "published size, no file", "", arch, count_parameters(arch), shown_settings(arch), ())
    if is_bundle(path):
        refuse_checkpoint_options(path, family, num_heads, num_classes, weights)
        config, _, tensors = open_bundle(path)
        added = sum(math.prod(weight.shape) for name, weight in tensors.items() if is_mediator(name))
        total = sum(math.prod(weight.shape) for weight in tensors.values())
        notes = (f"levels {', '.join(map(str, config.settings.levels))}, {SOFTMAX}; mediators add {added / 1e6:.1f}M parameters",)
        return Inspection(checkpoint, "bundle", "", config.arch, total, config.settings, notes)
    opened = open_checkpoint(path, Hints(family, num_heads, num_classes), weights)
    opened.verify()
    total = sum(math.prod(weight.shape) for weight in opened.weights.values())
    return Inspection(checkpoint, opened.format, opened.part, opened.arch, total, shown_settings(opened.arch), opened.notes)


def shown_settings(arch: Architecture) -> MediatorSettings:
    return MediatorSettings(SHOWN_LEVELS, local_rank=default_local_rank(arch.width))
