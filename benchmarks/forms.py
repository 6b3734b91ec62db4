"""The published form of mediator attention beside the learned one, on the digits SiT, at equal fine-tuning time.

    python benchmarks/forms.py runs/forms --json forms.json --picture forms.png

Converts the teacher in both forms with the same levels, states and fitting steps, and fine-tunes each for the same time (by the time of a
step, measured side by side). Judges every level, and three schedules of mediators alone (`calibrate --kinds mediators`): FLOPs, time of
sampling a batch of eight, error against the teacher, and Frechet distance to the real digits. The same command goes on where an earlier run
was stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer

from mediatorize.compression.distill import Distiller, mean_squares
from mediatorize.compression.judging import Errors
from mediatorize.compression.records import DistillSettings
from mediatorize.compression.search import costs_of, search
from mediatorize.compression.trajectories import Targets
from mediatorize.diffusion.process import process_of
from mediatorize.diffusion.sampling import Sampler, sample_batch, sample_many
from mediatorize.evaluation.digits import distance_to_digits
from mediatorize.evaluation.timing import paired_time
from mediatorize.formats.bundle import load_bundle, read_log
from mediatorize.model.levels import SOFTMAX, Form, Level, title
from mediatorize.model.schedule import AnySchedule
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.randomness import spread_labels
from mediatorize.report.pictures import calm, new_figure
from mediatorize.report.tables import text_table
from mediatorize.stages.convert import convert
from mediatorize.stages.finetune import finetune
from mediatorize.stages.running import hardware

TEACHER = Path(__file__).parent.parent / "recipes" / "digits" / "sit.safetensors"
OTHER_SEED = 90210
"""Of the samples that are judged: no training and no search has seen it."""
TURNS = 4
"""Training steps that are timed together: one of each kind (`levels_of_step`)."""
SHARES = (0.25, 0.5, 0.75)
"""Where between the cheapest level and softmax schedules are calibrated."""
TRAINING: dict[str, Any] = {"batch": 16, "learning_rate": 1.5e-3, "trajectories": 164, "sampler_steps": 25, "cfg_scales": (1.0,)}


def converted(form: Form, work: Path, levels: tuple[Level, ...], states: int, fit_steps: int) -> Path:
    """The bundle of a form, made unless an earlier run did."""
    bundle = work / form
    if not bundle.exists():
        how: dict[str, Any] = {"levels": levels, "form": form, "states": states, "trajectories": 164, "fit_steps": fit_steps}
        convert(str(TEACHER), bundle, **how, cfg_scale=1.0, mlp="own", projection_rank=0)
    return bundle


def step_ratio(bundle: Path, reference: Path, pairs: int) -> float:
    """Time of a training step of one bundle relative to another's, side by side."""
    batch = TRAINING["batch"]

    def steps_of(path: Path) -> Callable[[], object]:
        model = load_bundle(path)
        arch = model.arch
        distiller = Distiller(model, model, DistillSettings(steps=10**6, batch=batch, learning_rate=1e-6))
        times = process_of(arch).training_times(batch, torch.Generator().manual_seed(0))
        x, y = torch.randn(batch, arch.channels, *arch.input_size), torch.arange(batch) % arch.classes
        states = Targets(x, times, y, torch.randn(x.shape))
        return lambda: [distiller.step(states, mean_squares(states.output, arch.channels)) for _ in range(TURNS)]

    return paired_time(steps_of(bundle), steps_of(reference), pairs, torch.device("cpu")).ratio


def train(bundle: Path, steps: int) -> None:
    """Fine-tunes a bundle, unless an earlier run did."""
    if not any(line["command"] == "finetune" for line in read_log(bundle)):
        finetune(bundle, train_steps=steps, **TRAINING)


def judged(form: Form, bundle: Path, samples: int, pairs: int) -> list[dict[str, Any]]:
    """Every level and schedule of a bundle beside the teacher."""
    model = load_bundle(bundle)
    arch, settings = model.arch, model.added()
    sampler = Sampler.resolve(arch, solver="euler", steps=25)
    whole = sampler.flops(arch, SOFTMAX, settings)
    assert whole is not None
    costs = costs_of("flops", model, sampler)
    floor = costs.least(("mediators",))
    budgets = [round(floor + (1 - floor) * share, 4) for share in SHARES]
    found = search(model, sampler, budgets, costs, kinds=("mediators",))
    rows: list[tuple[str, AnySchedule | Level]] = [(title(level), level) for level in settings.levels]
    rows += [(f"schedule for {outcome.budget:.1%}", outcome.schedule) for outcome in found.outcomes]

    labels = spread_labels(arch.classes, samples, OTHER_SEED)
    how = replace(sampler, seed=OTHER_SEED)
    teacher = sample_many(model, labels, how, SOFTMAX, 100)
    base = distance_to_digits(teacher)
    result = []
    for name, schedule in rows:
        drawn = sample_many(model, labels, how, schedule, 100)
        flops = sampler.flops(arch, schedule, settings)
        assert flops is not None
        facts = {"form": form, "name": name, "flops": flops / whole, **time_of(model, sampler, schedule, pairs)}
        result.append(facts | vars(Errors.of(drawn, teacher)) | {"frechet_of_the_teachers": distance_to_digits(drawn) / base})
    return result


def time_of(model: DiffusionTransformer, sampler: Sampler, schedule: AnySchedule | Level, pairs: int) -> dict[str, Any]:
    """Time of sampling eight, as a share of softmax's."""
    labels = torch.arange(8)
    device = next(model.parameters()).device
    by_schedule, by_softmax = (partial(sample_batch, model, labels, sampler, levels) for levels in (schedule, SOFTMAX))
    times = paired_time(by_schedule, by_softmax, pairs, device)
    return {"time": times.ratio, "time_quartiles": times.quartiles}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A PNG: Frechet distance against FLOPs and against time, a line for each form's levels and one for its schedules."""
    figure = new_figure(9, 3.6)
    colours = dict(zip(get_args(Form), ("#2f6f9f", "#c8553d"), strict=True))
    highest = max(row["frechet_of_the_teachers"] for row in rows)
    for axis, (measure, label) in zip(figure.subplots(1, 2), (("flops", "FLOPs"), ("time", "time, batch 8")), strict=True):
        for form, colour in colours.items():
            for schedules, line, mark in ((False, ":", "o"), (True, "-", "D")):
                points = [row for row in rows if row["form"] == form and row["name"].startswith("schedule") == schedules]
                places = sorted((100 * row[measure], row["frechet_of_the_teachers"]) for row in points)
                what = "schedules" if schedules else "one level throughout"
                axis.plot(*zip(*places, strict=True), line + mark, color=colour, markersize=5, label=f"{form} form, {what}")
        axis.plot(100, 1, "o", color="#1c2228", markersize=6)
        axis.annotate("softmax", (100, 1), (0, 6), textcoords="offset points", ha="center", fontsize=8)
        axis.set_xlabel(f"% of softmax's {label}", fontsize=9)
        axis.set_ylim(0.95, 1.02 * highest)
        calm(axis)
    figure.axes[0].set_ylabel("Frechet distance, of the teacher's", fontsize=9)
    figure.axes[0].legend(fontsize=7.5, frameon=False)
    figure.savefig(path)


def main(
    work: Path,
    levels: str = "1,4,16",
    states: int = 4096,
    fit_steps: int = 1000,
    steps: int = 2600,
    samples: int = 2000,
    pairs: int = 9,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    picture: Path | None = None,
) -> None:
    """Prints, writes and draws the figures. `--steps` are the learned form's; the published form gets as much time."""
    counts = tuple(int(count) for count in levels.split(","))
    work.mkdir(parents=True, exist_ok=True)
    bundles = {form: converted(form, work, counts, states, fit_steps) for form in get_args(Form)}
    ratio = step_ratio(bundles["published"], bundles["learned"], pairs)
    trained = {"learned": steps, "published": round(steps / ratio)}
    for form, bundle in bundles.items():
        train(bundle, trained[form])
    rows: list[dict[str, Any]] = []
    for form in get_args(Form):
        rows += judged(form, bundles[form], samples, pairs)
    header = ("form", "what", "FLOPs", "time", "median error", "Frechet")
    cells = [
        (
            row["form"],
            row["name"],
            f"{row['flops']:.1%}",
            f"{row['time']:.2f}",
            f"{row['median']:.4f}",
            f"{row['frechet_of_the_teachers']:.3f}",
        )
        for row in rows
    ]
    typer.echo(text_table(header, cells))
    typer.echo(f"A training step of the published form takes {ratio:.2f} of the learned form's time; steps: {trained}.")
    facts = {"hardware": hardware(torch.device("cpu")), "torch": torch.__version__, "samples": samples}
    facts |= {"step_time_ratio": ratio, "training_steps": trained}
    if json_file is not None:
        json_file.write_text(json.dumps(facts | {"rows": rows}, indent=2) + "\n")
    if picture is not None:
        draw(rows, picture)


if __name__ == "__main__":
    typer.run(main)
