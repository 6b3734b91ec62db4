"""Time of a whole sampler with forecast calls relative to the teacher's, side by side in one process.

    python benchmarks/sampler.py                           # S/2 and B/2 at 256 pixels, batch 8, at 40% of the FLOPs
    python benchmarks/sampler.py --steps 5,10,20,40 --models SiT-S/2@256
    python benchmarks/sampler.py --models SiT-XL/2@256 --batch 32 --device cuda --dtype bfloat16 --json sampler.json

The weights are random: which calls are computed does not matter here, only how many. The schedule is the one that `calibrate` would write
for so many computed calls: the rest are linear forecasts of every layer. The two samplers run in turn on the same noise, and the ratio is
the median over pairs.
"""

from __future__ import annotations

import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from mediatorize.compression.paths import uniform_path
from mediatorize.diffusion.sampling import Sampler, sample_batch
from mediatorize.model.architecture import preset
from mediatorize.model.levels import LINEAR, SOFTMAX
from mediatorize.model.schedule import Call, CallSchedule
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.randomness import gaussian
from mediatorize.report.tables import text_table
from mediatorize.stages.running import hardware, keep_freed_memory, versions


def measure(name: str, steps: int, budget: float, batch: int, pairs: int, device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    torch.manual_seed(0)
    arch = preset(name)
    model = DiffusionTransformer(arch).to(device, dtype).requires_grad_(False).eval()
    sampler = Sampler.resolve(arch, steps=steps)
    depth, noise_levels = arch.depth, tuple(sampler.noise_levels(arch))
    whole, resting = Call((SOFTMAX,) * depth), Call((LINEAR,) * depth)
    softmax = sampler.flops(arch, SOFTMAX, None) or 1.0
    count, schedule = steps, CallSchedule(noise_levels, (whole,) * steps)
    while (sampler.flops(arch, schedule, None) or 0.0) > budget * softmax:
        count -= 1
        path = uniform_path(steps, count)
        schedule = CallSchedule(noise_levels, tuple(whole if call in path else resting for call in range(steps)))
    labels = torch.zeros(batch, dtype=torch.long)
    noise = gaussian(0, "initial noise", range(batch), (arch.channels, *arch.input_size))

    def seconds(levels: CallSchedule | str) -> float:
        begun = time.perf_counter()
        sample_batch(model, labels, sampler, levels, noise=noise)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    both = partial(seconds, schedule), partial(seconds, SOFTMAX)
    both[0](), both[1]()  # to warm up
    times = [(both[0](), both[1]()) for _ in range(pairs)]
    ratios = sorted(one / other for one, other in times)
    return {
        "model": name,
        "batch": batch,
        "solver": sampler.solver,
        "calls": steps,
        "computed_calls": sum(call.computed for call in schedule.of_calls),
        "relative_flops": (sampler.flops(arch, schedule, None) or 0.0) / softmax,
        "relative_time": statistics.median(ratios),
        "lowest_and_highest": [ratios[0], ratios[-1]],
        "softmax_seconds": statistics.median(other for _, other in times),
        "memory_mib_per_sample": sampler.memory_numbers(arch, schedule, model.settings) * torch.finfo(dtype).bits / 8 / 2**20,
        "pairs": pairs,
    }


def main(
    models: Annotated[str, typer.Option(help="published sizes, with commas")] = "SiT-S/2@256,SiT-B/2@256",
    steps: Annotated[str, typer.Option(help="of the sampler, with commas")] = "10",
    budget: float = 0.41,
    batch: int = 8,
    pairs: int = 3,
    device: str = "cpu",
    dtype: str = "float32",
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    keep_freed_memory()
    where, kind = torch.device(device), {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    counts = list(map(int, steps.split(",")))
    found = [measure(name, count, budget, batch, pairs, where, kind) for name in models.split(",") for count in counts]
    header = ("model", "computed", "FLOPs", "time", "range", "softmax")
    rows = [
        (
            str(result["model"]),
            f"{result['computed_calls']} of {result['calls']}",
            f"{result['relative_flops']:.3f}",
            f"{result['relative_time']:.3f}",
            "{:.3f} to {:.3f}".format(*result["lowest_and_highest"]),  # type: ignore[misc]
            f"{result['softmax_seconds']:.1f} s",
        )
        for result in found
    ]
    typer.echo(text_table(header, rows))
    if json_file is not None:
        told = {"hardware": hardware(where), "versions": versions(), "dtype": dtype}
        json_file.write_text(json.dumps(told | {"results": found}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
