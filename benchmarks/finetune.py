"""Time of a training step relative to what it must at least compute, side by side in one process.

    python benchmarks/finetune.py                          # the digits teacher's size, and S/2 at 256 pixels
    python benchmarks/finetune.py --models DiT-XL/2@256 --batch 8 --device cuda --dtype bfloat16 --json finetune.json

A step here is four turns of the levels (all at the smallest, all at the largest, a drawn one, a mixture), the teacher's answers included;
the reference is one teacher forward on the batch and one forward and backward of the student at the same levels, by plain autograd: no
optimiser, no clipping. The two run in turn and the ratio is the median over pairs. On CUDA the peak memory is measured beside the
predicted one.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from mediatorize.compression.distill import Distiller, levels_of_step, mean_squares
from mediatorize.compression.records import DistillSettings
from mediatorize.compression.training import TrainingPlan
from mediatorize.compression.trajectories import Targets
from mediatorize.diffusion.process import process_of
from mediatorize.evaluation.timing import paired_time, peak_bytes
from mediatorize.model.architecture import Architecture, default_local_rank, default_modulation_rank, preset
from mediatorize.model.levels import MediatorSettings
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.report.tables import text_table

DIGITS = Architecture(
    family="sit",
    depth=6,
    width=128,
    heads=4,
    patch=2,
    channels=1,
    grid=(8, 8),
    classes=10,
    null_class=True,
    learn_sigma=False,
    mlp_width=512,
)
"""The digits SiT teacher."""

TURNS = 4


def measure(arch: Architecture, batch: int, pairs: int, device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    torch.manual_seed(0)
    local, modulation = default_local_rank(arch.width), default_modulation_rank(arch.width)
    settings = MediatorSettings((1, 4, 16), local_rank=local, modulation_rank=modulation, mlp="own")
    model = DiffusionTransformer(arch, settings).to(device)
    for name, parameter in model.named_parameters():  # blocks alive, so that nothing is multiplied by zero
        if "adaLN" in name or "final_layer" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.requires_grad_(False)
    distill = DistillSettings(steps=10**6, batch=batch)
    distiller = Distiller(model, model, distill)
    x = torch.randn(batch, arch.channels, *arch.input_size)
    t = process_of(arch).training_times(batch, torch.Generator().manual_seed(0))
    y = torch.randint(0, arch.classes, (batch,))

    def answers() -> Targets:
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return Targets(x, t, y, model(x.to(device), t.to(device), y.to(device)).float().cpu())

    sizes = mean_squares(answers().output, arch.channels).to(device)

    def steps() -> None:
        for _ in range(TURNS):
            states = answers()
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                distiller.step(states, sizes)

    def reference() -> None:
        for turn in range(TURNS):
            states = answers().to(device)
            levels = levels_of_step(settings, arch.depth, 0, turn)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                output = model(states.x, states.t, states.y, levels=levels)
                loss = (output - states.output).square().mean()
            loss.backward()
            model.zero_grad()

    times = paired_time(steps, reference, pairs, device)
    trained = sum(parameter.numel() for parameter in distiller.parameters.values())
    predicted = TrainingPlan.resolve(arch, distill=distill).peak_bytes(arch, settings, batch)
    return {
        "model": arch.name,
        "image_size": arch.image_size,
        "batch": batch,
        "time_ratio": times.ratio,
        "quartiles": times.quartiles,
        "step_seconds": times.ratio * times.reference_seconds / TURNS,
        "trained_parameters": trained,
        "all_parameters": sum(p.numel() for p in model.parameters()),
        "predicted_peak_bytes": predicted,
        "measured_peak_bytes": peak_bytes(steps, device),
    }


def main(
    models: Annotated[str, typer.Option(help="published sizes, or digits")] = "digits,SiT-S/2@256",
    batch: int = 16,
    pairs: int = 9,
    device: str = "cpu",
    dtype: str = "float32",
    destination: Annotated[Path | None, typer.Option("--json", help="where to write the figures")] = None,
) -> None:
    """Prints and writes the ratios."""
    rows = []
    for name in models.split(","):
        arch = DIGITS if name == "digits" else preset(name)
        rows.append(measure(arch, batch, pairs, torch.device(device), getattr(torch, dtype)))
    table = [
        (
            f"{row['model']}@{row['image_size'][0]}",  # type: ignore[index]
            row["batch"],
            f"{row['time_ratio']:.2f}",
            f"{row['step_seconds']:.3f}",
            f"{row['predicted_peak_bytes'] / 2**30:.2f}",  # type: ignore[operator]
            "-" if row["measured_peak_bytes"] is None else f"{row['measured_peak_bytes'] / 2**30:.2f}",  # type: ignore[operator]
        )
        for row in rows
    ]
    print(text_table(("model", "batch", "step / bare step", "seconds", "GiB predicted", "GiB measured"), table))
    if destination:
        hardware = {
            "processor": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": sys.version.split()[0],
            "dtype": dtype,
            "pairs": pairs,
        }
        destination.write_text(json.dumps({"hardware": hardware, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
