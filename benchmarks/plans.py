"""Plans beside solvers with as many model calls: distance to the converged teacher, and Frechet distance, against calls.

    python benchmarks/plans.py --json benchmarks/plans.json --picture docs/plans.png
    python benchmarks/plans.py --teachers "digits SiT" --calls 6,8

A plan's weights are fitted on one set of noise, its times and settings are chosen on a second. Errors are medians of --samples samples of
a third, against the teacher's own converged solution, with 95% bootstrap intervals. Every solver starts from the same noise. The second
column of errors is the distance to the solver that people use with 50 steps. Frechet distances are to the real data, over that of the
converged teacher, on a fourth set of noise.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from mediatorize.diffusion.planned import ModelDenoiser, sample_by_plan
from mediatorize.diffusion.process import BETAS, TRAIN_STEPS, process_of
from mediatorize.diffusion.sampling import GuidedModel, Sampler, sample_batch
from mediatorize.diffusion.solvers import SOLVERS, fixed_solvers
from mediatorize.evaluation.digits import distance_to_digits
from mediatorize.evaluation.metrics import frechet_distance
from mediatorize.formats.judges import open_fashion
from mediatorize.formats.loading import load_model
from mediatorize.model.levels import SOFTMAX
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.planning.judge import Errors, relative_errors, with_interval
from mediatorize.planning.search import converged
from mediatorize.randomness import gaussian, spread_labels
from mediatorize.report.tables import text_table
from mediatorize.stages.plans import REFERENCE_STEPS, default_solver, find_plans, wanted_of
from mediatorize.stages.running import hardware, keep_freed_memory, versions

RECIPES = Path(__file__).parents[1] / "recipes"
SEED = 90210


def distance_to_fashion(images: Tensor) -> float:
    """Frechet distance of pictures (n, 1, 28, 28) in [-1, 1] to the test set of Fashion-MNIST, in its classifier's features."""
    extractor = open_fashion(torch.device("cpu"))
    assert extractor.own_reference is not None
    return frechet_distance(extractor.extract(images.clamp(-1, 1))[0], extractor.own_reference().statistics)


@dataclass(frozen=True)
class Teacher:
    file: Path
    cfg_scale: float
    frechet: Callable[[Tensor], float]


TEACHERS = {
    "digits SiT": Teacher(RECIPES / "digits" / "sit.safetensors", 1.0, distance_to_digits),
    "digits DiT, guidance 1.2": Teacher(RECIPES / "digits" / "dit.safetensors", 1.2, distance_to_digits),
    "digits DiT, guidance 4": Teacher(RECIPES / "digits" / "dit.safetensors", 4.0, distance_to_digits),
    "Fashion-MNIST DiT, guidance 1.5": Teacher(RECIPES / "fashion" / "dit.safetensors", 1.5, distance_to_fashion),
}
"""Teachers that ship with the project, the guidance of their samples, and what judges their pictures."""


def schedulers(process: str) -> dict[str, Callable[[], Any]]:
    """diffusers' multistep schedulers, with the grids that their users choose."""
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    if process == "ddpm":
        base: dict[str, Any] = {"num_train_timesteps": TRAIN_STEPS, "trained_betas": BETAS, "timestep_spacing": "linspace"}
        return {
            "diffusers UniPC": lambda: UniPCMultistepScheduler(**base),
            "diffusers DPM-Solver++ 3M": lambda: DPMSolverMultistepScheduler(**base, solver_order=3),
            "diffusers DPM-Solver++ 2M, Karras": lambda: DPMSolverMultistepScheduler(**base, use_karras_sigmas=True),
            "diffusers UniPC, Karras": lambda: UniPCMultistepScheduler(**base, use_karras_sigmas=True),
        }
    flow: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    return {
        "diffusers DPM-Solver++ 2M": lambda: DPMSolverMultistepScheduler(**flow, flow_shift=1.0),
        "diffusers DPM-Solver++ 3M": lambda: DPMSolverMultistepScheduler(**flow, flow_shift=1.0, solver_order=3),
        "diffusers UniPC, shift 3": lambda: UniPCMultistepScheduler(**flow, flow_shift=3.0),
        "diffusers UniPC, shift 1/3": lambda: UniPCMultistepScheduler(**flow, flow_shift=1 / 3),
    }


CACHES = {"cache: outputs reused": 0, "cache: outputs forecast, order 1": 1, "cache: outputs forecast, order 2": 2}
"""Caches of whole outputs, as TeaCache (order 0) and TaylorSeer (1 and 2) have them: order of the polynomial through the last calls."""


@torch.no_grad()
def by_cache(order: int, model: DiffusionTransformer, sampler: Sampler, labels: Tensor, noise: Tensor, calls: int) -> Tensor:
    """Samples (n, c, h, w) by the default solver with `sampler.steps` steps, evenly spread `calls` of which call the model."""
    guided, steps = GuidedModel(model, labels, sampler), sampler.steps
    computed = {math.ceil(k * steps / calls) for k in range(calls)}
    known: list[tuple[int, Tensor]] = []
    count = -1

    def predict(x: Tensor, t: float) -> Tensor:
        nonlocal count
        count += 1
        if count in computed:
            known.insert(0, (count, guided.output(model(*guided.inputs(x, t), levels=SOFTMAX))))
            del known[order + 1 :]
        total = torch.zeros_like(known[0][1])
        for place, output in known:  # Lagrange's polynomial
            total += math.prod((count - other) / (place - other) for other, _ in known if other != place) * output
        return total

    return SOLVERS[sampler.solver].run(predict, noise, steps, lambda k: torch.zeros_like(noise))


@torch.no_grad()
def by_scheduler(scheduler: Any, model: DiffusionTransformer, sampler: Sampler, labels: Tensor, noise: Tensor, calls: int) -> Tensor:
    """Samples (n, c, h, w) by a scheduler of diffusers from the same noise."""
    process = process_of(model.arch).name
    guided = GuidedModel(model, labels, sampler)
    scheduler.set_timesteps(calls)
    x = noise
    for sigma, timestep in zip(scheduler.sigmas.tolist(), scheduler.timesteps, strict=False):
        t = float(timestep) if process == "ddpm" else 1 - sigma
        output = guided.output(model(*guided.inputs(x, t), levels=SOFTMAX))[:, : model.arch.channels]
        x = scheduler.step(output if process == "ddpm" else -output, timestep, x, return_dict=False)[0]
    return x


def measure(name: str, teacher: Teacher, calls: list[int], samples: int, frechet: int, frechet_calls: list[int]) -> dict[str, Any]:
    model = load_model(teacher.file)
    arch = model.arch
    wanted = wanted_of(arch, {"cfg_scale": teacher.cfg_scale}, samples=48, reported=samples)
    begun = time.perf_counter()
    found = find_plans(model, calls, wanted, seed=0)
    seconds = time.perf_counter() - begun
    denoise_labels = spread_labels(arch.classes, samples, SEED)
    noise = gaussian(SEED, "initial noise", range(samples), wanted.shape)
    reference = converged(ModelDenoiser(model, denoise_labels, 128), wanted, noise, found.reference_calls)
    sampler = Sampler.resolve(arch, cfg_scale=teacher.cfg_scale, steps=REFERENCE_STEPS)

    def by(solver: str, steps: int) -> Tensor:
        how = Sampler.resolve(arch, solver=solver, steps=steps, cfg_scale=teacher.cfg_scale)
        return sample_batch(model, denoise_labels, how, SOFTMAX, noise=noise)

    many = by(default_solver(wanted.process), REFERENCE_STEPS)

    def judged(method: str, count: int, drawn: Tensor) -> dict[str, Any]:
        errors = with_interval(relative_errors(drawn, reference))
        row = {"method": method, "calls": count, **vars(errors), "to_many": Errors.of(drawn, many).median}
        print(name, method, count, f"{errors.median:.4f}", file=sys.stderr)
        return row

    rows = [judged(f"{default_solver(wanted.process)}, {REFERENCE_STEPS} steps", REFERENCE_STEPS, many)]
    for count in calls:
        rows.append(judged("plan", count, sample_by_plan(model, denoise_labels, found.plans[count], noise)))
        for solver, how in fixed_solvers(wanted.process).items():
            if count % how.calls_per_step == 0:
                rows.append(judged(solver, count, by(solver, count // how.calls_per_step)))
        for method, make in schedulers(wanted.process).items():
            rows.append(judged(method, count, by_scheduler(make(), model, sampler, denoise_labels, noise, count)))
        for method, order in CACHES.items():
            rows.append(judged(method, count, by_cache(order, model, sampler, denoise_labels, noise, count)))
    result = {"teacher": name, "rows": rows, "search_seconds": seconds, "reference_calls": found.reference_calls}
    result |= {"reference_error": found.reference_error, "stages": {count: each.stages for count, each in found.found.items()}}
    if frechet:
        labels = spread_labels(arch.classes, frechet, SEED + 1)
        fresh = gaussian(SEED + 1, "initial noise", range(frechet), wanted.shape)
        base = teacher.frechet(converged(ModelDenoiser(model, labels, 128), wanted, fresh, 60))
        drawn = {count: in_parts(model, labels, fresh, found.plans[count]) for count in frechet_calls}
        result["frechet"] = {"samples": frechet, "teacher": base} | {count: teacher.frechet(x) / base for count, x in drawn.items()}
        print(name, result["frechet"], file=sys.stderr)
    return result


def in_parts(model: DiffusionTransformer, labels: Tensor, noise: Tensor, plan: Any) -> Tensor:
    """Samples by a plan, a hundred at a time."""
    pairs = zip(labels.split(100), noise.split(100), strict=True)
    return torch.cat([sample_by_plan(model, own, plan, x) for own, x in pairs])


def draw_picture(found: list[dict[str, Any]], file: Path) -> None:
    """Error against calls, log-log, a panel for every teacher."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(4.2 * len(found), 5.2), squeeze=False, sharey=True)
    methods = list(dict.fromkeys(row["method"] for teacher in found for row in teacher["rows"]))
    others = [method for method in methods if method != "plan"]
    looks = {method: {"color": plt.get_cmap("tab20")(k % 20), "linewidth": 1.2, "alpha": 0.9} for k, method in enumerate(others)}
    looks["plan"] = {"color": "black", "linewidth": 2.8, "zorder": 3}
    for axis, teacher in zip(axes[0], found, strict=True):
        for method in methods:
            own = sorted((row["calls"], row["median"]) for row in teacher["rows"] if row["method"] == method)
            if own:
                style = "--" if method.startswith("cache") else "-"
                axis.plot(*zip(*own, strict=True), style, marker="o", markersize=4, label=method, **looks[method])
        axis.set(xscale="log", yscale="log", title=teacher["teacher"], xlabel="model calls")
        ticks = sorted({row["calls"] for row in teacher["rows"]})
        axis.set_xticks(ticks, list(map(str, ticks)))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("median distance to the converged teacher")
    handles = {label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=4, fontsize=7.5, frameon=False)
    figure.tight_layout(rect=(0, 0.16, 1, 1))
    figure.savefig(file, dpi=110, bbox_inches="tight")


def main(
    teachers: Annotated[str, typer.Option(help="with semicolons")] = ";".join(TEACHERS),
    calls: Annotated[str, typer.Option(help="with commas")] = "3,4,5,6,8,10,12,16",
    samples: int = 160,
    frechet: int = 2000,
    frechet_calls: Annotated[str, typer.Option(help="with commas")] = "6,8,10",
    lightningdit: Annotated[Path | None, typer.Option(help="a LightningDiT of recipes/digits/train.py")] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    picture: Path | None = None,
) -> None:
    keep_freed_memory()
    wanted = {name: TEACHERS[name] for name in teachers.split(";") if name}
    if lightningdit is not None:
        wanted["digits LightningDiT"] = Teacher(lightningdit, 1.0, distance_to_digits)
    found: list[dict[str, Any]] = []
    counts, judged = list(map(int, calls.split(","))), list(map(int, frechet_calls.split(",")))
    for name, teacher in wanted.items():
        found.append(measure(name, teacher, counts, samples, frechet, [count for count in judged if count in counts]))
        if json_file is not None:  # after every teacher, as all take an hour
            facts = {"hardware": hardware(torch.device("cpu")), "versions": versions(), "samples": samples, "teachers": found}
            json_file.write_text(json.dumps(facts, indent=1) + "\n")
    header = ("teacher", "method", "calls", "median", "95% interval", "flipped", "to many steps")
    table = [
        (
            teacher["teacher"],
            row["method"],
            row["calls"],
            f"{row['median']:.4f}",
            f"{row['interval'][0]:.4f}-{row['interval'][1]:.4f}",
            f"{row['flipped']:.1%}",
            f"{row['to_many']:.4f}",
        )
        for teacher in found
        for row in teacher["rows"]
    ]
    typer.echo(text_table(header, table))
    if picture is not None:
        draw_picture(found, picture)


if __name__ == "__main__":
    typer.run(main)
