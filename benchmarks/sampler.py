"""Time of a plan's few calls relative to many steps of the default solver, side by side in one process.

    python benchmarks/sampler.py                           # S/2 and B/2 at 256 pixels, batch 8: 8 calls beside 50
    python benchmarks/sampler.py --calls 4,8,16 --models SiT-S/2@256
    python benchmarks/sampler.py --models SiT-XL/2@256 --batch 32 --device cuda --dtype bfloat16 --json sampler.json

The weights are random, and the plan's are analytic: what they are does not matter here, only how many calls and numbers there are. The two
run in turn on the same noise, and the ratio is the median over pairs.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from mediatorize.devices import wait_for
from mediatorize.diffusion.planned import sample_by_plan
from mediatorize.diffusion.sampling import Sampler, sample_batch
from mediatorize.model.architecture import preset
from mediatorize.model.levels import SOFTMAX
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.planning.fit import analytic
from mediatorize.randomness import gaussian
from mediatorize.report.tables import text_table
from mediatorize.stages.plans import wanted_of
from mediatorize.stages.running import hardware, keep_freed_memory, versions


def measure(
    name: str, calls: int, steps: int, cfg_scale: float, batch: int, pairs: int, device: torch.device, dtype: torch.dtype
) -> dict[str, object]:
    torch.manual_seed(0)
    arch = preset(name)
    model = DiffusionTransformer(arch).to(device, dtype).requires_grad_(False).eval()
    sampler = Sampler.resolve(arch, steps=steps, cfg_scale=cfg_scale)
    wanted = wanted_of(arch, {"cfg_scale": cfg_scale})
    plan = analytic(wanted.plan(wanted.times(calls, 1.0, 1.0)), wanted.shape, wanted.history)
    labels = torch.zeros(batch, dtype=torch.long, device=device)
    noise = gaussian(0, "initial noise", range(batch), wanted.shape).to(device)

    def seconds(run: Callable[[], object]) -> float:
        begun = time.perf_counter()
        run()
        wait_for(device)
        return time.perf_counter() - begun

    few = partial(sample_by_plan, model, labels, plan, noise)
    many = partial(sample_batch, model, labels, sampler, SOFTMAX, noise=noise)
    seconds(few)  # to warm up
    times = [(seconds(few), seconds(many)) for _ in range(pairs)]
    ratios = sorted(one / other for one, other in times)
    return {
        "model": name,
        "batch": batch,
        "cfg_scale": cfg_scale,
        "solver": sampler.solver,
        "calls": calls,
        "steps": steps,
        "relative_time": statistics.median(ratios),
        "over_calls": statistics.median(ratios) * steps / calls,
        "lowest_and_highest": [ratios[0], ratios[-1]],
        "many_seconds": statistics.median(other for _, other in times),
        "pairs": pairs,
    }


def main(
    models: Annotated[str, typer.Option(help="published sizes, with commas")] = "SiT-S/2@256,SiT-B/2@256",
    calls: Annotated[str, typer.Option(help="of the plan, with commas")] = "8",
    steps: Annotated[int, typer.Option(help="of the default solver")] = 50,
    cfg_scale: float = 1.0,
    batch: int = 8,
    pairs: int = 3,
    device: str = "cpu",
    dtype: str = "float32",
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    keep_freed_memory()
    where, kind = torch.device(device), {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    counts = list(map(int, calls.split(",")))
    found = [measure(name, count, steps, cfg_scale, batch, pairs, where, kind) for name in models.split(",") for count in counts]
    header = ("model", "calls", "time", "range", "time over calls", "all steps")
    rows = [
        (
            str(result["model"]),
            f"{result['calls']} beside {result['steps']}",
            f"{result['relative_time']:.4f}",
            "{:.4f} to {:.4f}".format(*result["lowest_and_highest"]),  # type: ignore[misc]
            f"{result['over_calls']:.3f}",
            f"{result['many_seconds']:.1f} s",
        )
        for result in found
    ]
    typer.echo(text_table(header, rows))
    if json_file is not None:
        told = {"hardware": hardware(where), "versions": versions(), "dtype": dtype}
        json_file.write_text(json.dumps(told | {"results": found}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
