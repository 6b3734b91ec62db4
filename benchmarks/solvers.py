"""Which solver, and how many steps: the Frechet distance of the shipped digits teachers' samples to real digits, against model calls.

    python benchmarks/solvers.py --json benchmarks/solvers.json
    python benchmarks/solvers.py --samples 500 --calls 8,12

Every solver of a teacher starts from the same noise. The error is |sample - reference| / |reference|, where references are samples from the
same noise by many small steps of a deterministic solver: stochastic solvers have none. None of this tool's levels or schedules is used.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from mediatorize.compression.judging import Errors
from mediatorize.diffusion.sampling import Sampler, sample_many
from mediatorize.diffusion.solvers import SOLVERS
from mediatorize.evaluation.digits import digit_classifier, distance_to_digits
from mediatorize.formats.loading import load_model
from mediatorize.model.levels import SOFTMAX
from mediatorize.randomness import spread_labels
from mediatorize.report.tables import text_table
from mediatorize.stages.running import hardware, keep_freed_memory, versions

DIGITS = Path(__file__).parents[1] / "recipes" / "digits"
TEACHERS = {
    "SiT": (DIGITS / "sit.safetensors", 1.0, ("euler", 250), ("euler", "heun", "unipc", "sde")),
    "DiT": (DIGITS / "dit.safetensors", 1.2, ("ddim", 250), ("ddim", "dpm-solver++", "ddpm")),
}
"""Of every teacher: its file, the guidance of its samples, what the reference is made by, and the solvers that are compared."""
STOCHASTIC = ("sde", "ddpm")
SEED = 90210


def measure(name: str, calls: list[int], samples: int, batch: int) -> list[dict[str, Any]]:
    """A row for every solver and count of calls."""
    file, cfg_scale, (exact, many), solvers = TEACHERS[name]
    model = load_model(file)
    labels = spread_labels(model.arch.classes, samples, SEED)

    def draw(solver: str, steps: int) -> Tensor:
        sampler = Sampler.resolve(model.arch, solver=solver, steps=steps, cfg_scale=cfg_scale, seed=SEED)
        return sample_many(model, labels, sampler, SOFTMAX, batch)

    reference = draw(exact, many)

    def judged(solver: str, count: int, drawn: Tensor) -> dict[str, Any]:
        row = {"model": name, "solver": solver, "calls": count, "frechet": distance_to_digits(drawn)}
        row["accuracy"] = digit_classifier().accuracy(drawn, labels)
        row["error"] = None if solver in STOCHASTIC else Errors.of(drawn, reference).median
        print(row, file=sys.stderr)
        return row

    rows = []
    for solver in solvers:
        per_step = SOLVERS[solver].calls_per_step
        rows += [judged(solver, count, draw(solver, count // per_step)) for count in calls if count % per_step == 0]
    return [*rows, judged(exact, many, reference)]


def main(
    calls: Annotated[str, typer.Option(help="with commas")] = "4,6,8,10,12,16,20,30,50,100",
    teachers: Annotated[str, typer.Option(help="with commas")] = ",".join(TEACHERS),
    samples: int = 2000,
    batch: int = 250,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    keep_freed_memory()
    rows = [row for name in teachers.split(",") for row in measure(name, list(map(int, calls.split(","))), samples, batch)]
    table = [
        (
            row["model"],
            row["solver"],
            str(row["calls"]),
            f"{row['frechet']:.2f}",
            f"{row['accuracy']:.1%}",
            "-" if row["error"] is None else f"{row['error']:.4f}",
        )
        for row in rows
    ]
    typer.echo(text_table(("teacher", "solver", "calls", "Frechet", "accuracy", "median error"), table))
    if json_file is not None:
        facts = {"hardware": hardware(torch.device("cpu")), "versions": versions(), "samples": samples, "rows": rows}
        json_file.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
