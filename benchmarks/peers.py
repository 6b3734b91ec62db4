"""Plans beside the caches that diffusers users know, on one exported pipeline: error, Frechet distance, FLOPs and time.

    pip install '.[peers]'
    python benchmarks/peers.py runs/digits-dit/bundle --steps 50 --cfg-scale 1.2 --json peers-50.json --picture peers-50.png

Every contender is the same diffusers pipeline on the same noise: with a plan of ours as its scheduler, with fewer steps, or with a cache of
diffusers (FirstBlockCache, TaylorSeer) or of cache-dit (DBCache, alone and with its TaylorSeer) at several settings. Errors are to the
converged teacher. FLOPs are counted while it samples. Time is that of one batch, in turn with the pipeline at all its steps. The noise is
none that a search has seen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers.hooks import FirstBlockCacheConfig, TaylorSeerCacheConfig
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mediatorize.diffusion.plan import Plan
from mediatorize.diffusion.planned import ModelDenoiser
from mediatorize.diffusion.sampling import Sampler
from mediatorize.evaluation.digits import distance_to_digits
from mediatorize.evaluation.timing import paired_time
from mediatorize.export.pipelines import pipeline_of
from mediatorize.export.travelling.pipeline import MediatorPipeline
from mediatorize.export.travelling.plan_scheduler import PlanScheduler
from mediatorize.formats.bundle import load_bundle
from mediatorize.model.levels import SOFTMAX
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.planning.judge import Errors
from mediatorize.planning.search import converged
from mediatorize.randomness import gaussian, spread_labels
from mediatorize.report.pictures import calm, new_figure
from mediatorize.report.tables import text_table
from mediatorize.stages.plans import calibrate, wanted_of
from mediatorize.stages.running import hardware, versions

OTHER_SEED = 90210
"""Of the noise of all contenders: no search has seen it."""
OURS, FEWER = "mediatorize", "fewer steps"
INTERVALS = (2, 3, 4, 6)
"""One step in so many is computed."""
FIRST = 2
"""Steps that TaylorSeer and DBCache compute before they skip any: a line needs two."""
THRESHOLDS = (0.05, 0.1, 0.2, 0.4)
"""Of FirstBlockCache and DBCache: how much the first block's output may change while the others are skipped."""

Setup = Callable[[Any], None]
"""What is switched on in a pipeline."""


def at_softmax(model: DiffusionTransformer, setup: Setup | None = None) -> MediatorPipeline:
    """The pretrained model's pipeline, and what is switched on in it."""
    pipe = pipeline_of(model, None)
    pipe.transformer.level = SOFTMAX
    if setup is not None:
        setup(pipe)
    return pipe


def with_cache(config: Any) -> Setup:
    return lambda pipe: pipe.transformer.enable_cache(config)


def with_cache_dit(threshold: float, taylor: bool) -> Setup:
    """DBCache with one block computed always (F1B0), as FirstBlockCache has it."""
    settings = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": FIRST, "residual_diff_threshold": threshold}

    def setup(pipe: Any) -> None:
        import cache_dit

        blocks = cache_dit.BlockAdapter(
            pipe=pipe,
            transformer=pipe.transformer,
            blocks=pipe.transformer.blocks,
            forward_pattern=cache_dit.ForwardPattern.Pattern_3,
            check_forward_pattern=False,
        )
        config = cache_dit.DBCacheConfig(**settings)
        calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1) if taylor else None
        cache_dit.enable_cache(blocks, cache_config=config, calibrator_config=calibrator)

    return setup


def peers() -> Iterator[tuple[str, str, Setup]]:
    """Method, setting, and what switches it on."""
    for interval in INTERVALS:
        config = TaylorSeerCacheConfig(
            cache_interval=interval,
            disable_cache_before_step=FIRST,
            cache_identifiers=[r"blocks\.\d+\.(attn|mlp)"],  # attention alone by default, which saves little
            taylor_factors_dtype=torch.float32,
        )
        yield "TaylorSeer (diffusers)", f"one step in {interval}", with_cache(config)
    for threshold in THRESHOLDS:
        yield "FirstBlockCache (diffusers)", f"threshold {threshold}", with_cache(FirstBlockCacheConfig(threshold=threshold))
    for threshold in THRESHOLDS:
        yield "DBCache (cache-dit)", f"threshold {threshold}", with_cache_dit(threshold, taylor=False)
    for threshold in THRESHOLDS:
        yield "DBCache + TaylorSeer (cache-dit)", f"threshold {threshold}", with_cache_dit(threshold, taylor=True)


def by_plan(model: DiffusionTransformer, plan: Plan) -> MediatorPipeline:
    """The pretrained model's pipeline with a plan as its scheduler."""
    pipe = at_softmax(model)
    pipe.scheduler = PlanScheduler([plan.to_json()])
    return pipe


def contenders(
    model: DiffusionTransformer, sampler: Sampler, calls: list[int]
) -> Iterator[tuple[str, str, Callable[[], MediatorPipeline], int]]:
    """Method, setting, how its pipeline is made, and its steps."""
    for count, plan in calibrate(model, calls, cfg_scale=sampler.cfg_scale).items():
        yield OURS, f"{count} calls", partial(by_plan, model, plan), count
    yield FEWER, f"{sampler.steps} steps", partial(at_softmax, model), sampler.steps
    for part in INTERVALS:
        yield FEWER, f"{sampler.steps // part} steps", partial(at_softmax, model), sampler.steps // part
    for method, setting, setup in peers():
        yield method, setting, partial(at_softmax, model, setup), sampler.steps


def cheaper(rows: list[dict[str, Any]], row: dict[str, Any], axis: str) -> float | None:
    """The smallest error of ours at no more than a row's cost; None where all of ours cost more."""
    errors = [own["median"] for own in rows if own["method"] == OURS and own[axis] <= row[axis]]
    return min(errors, default=None)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A PNG: error against FLOPs and against time, a line for each method."""
    figure = new_figure(9.5, 4)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    colours = dict(zip(methods, ("#c8553d", "#8a8f98", "#2f6f9f", "#5fa777", "#9a6fb0", "#d0a030"), strict=True))
    for axis, (cost, label) in zip(figure.subplots(1, 2, sharey=True), (("flops", "FLOPs"), ("time", "time")), strict=True):
        for method in methods:
            places = sorted((100 * row[cost], row["median"]) for row in rows if row["method"] == method and row["median"] > 0)
            if places:
                width = 2.2 if method == OURS else 1.2
                axis.plot(*zip(*places, strict=True), "-o", color=colours[method], linewidth=width, markersize=4, label=method)
        axis.set_yscale("log")
        axis.set_xlabel(f"% of softmax's {label}", fontsize=9)
        calm(axis)
        axis.grid(color="0.92", linewidth=0.8, which="minor")
    figure.axes[0].set_ylabel("median sample error", fontsize=9)
    figure.axes[0].legend(fontsize=7.5, frameon=False)
    figure.savefig(path)


def main(
    bundle: Path,
    steps: int = 50,
    cfg_scale: float = 1.2,
    calls: Annotated[str, typer.Option(help="of plans, with commas")] = "4,6,8,10,12,16",
    samples: int = 200,
    frechet: int = 0,
    batch: int = 20,
    pairs: int = 5,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    picture: Path | None = None,
) -> None:
    """Prints, writes and draws the figures. `--frechet` is of how many samples the distance to the real digits is taken."""
    model = load_bundle(bundle)
    arch = model.arch
    sampler = Sampler.resolve(arch, steps=steps, cfg_scale=cfg_scale)
    labels = spread_labels(arch.classes, max(samples, frechet), OTHER_SEED)
    noise = gaussian(OTHER_SEED, "initial noise", range(len(labels)), (arch.channels, *arch.input_size))

    def run(pipe: MediatorPipeline, count: int, part: slice) -> Tensor:
        how = {"guidance_scale": cfg_scale, "num_inference_steps": count, "output_type": "latent"}
        return pipe(labels[part].tolist(), latents=noise[part], **how).images  # type: ignore[arg-type, union-attr, return-value]

    def drawn(pipe: MediatorPipeline, count: int) -> Tensor:
        return torch.cat([run(pipe, count, slice(start, start + batch)) for start in range(0, len(labels), batch)])

    def flops(pipe: MediatorPipeline, count: int) -> int:
        with FlopCounterMode(display=False) as counter:
            run(pipe, count, slice(batch))
        return counter.get_total_flops()

    softmax = at_softmax(model)
    wanted = wanted_of(arch, {"cfg_scale": cfg_scale})
    goal = [converged(ModelDenoiser(model, own), wanted, x, 160) for own, x in zip(labels.split(batch), noise.split(batch), strict=True)]
    teacher, whole = torch.cat(goal), flops(softmax, steps)
    base = distance_to_digits(teacher) if frechet else None
    rows: list[dict[str, Any]] = []
    for method, setting, make, count in contenders(model, sampler, list(map(int, calls.split(",")))):
        pipe = make()
        first, reference = partial(run, pipe, count, slice(batch)), partial(run, softmax, steps, slice(batch))
        times = paired_time(first, reference, pairs, torch.device("cpu"))
        row = {"method": method, "setting": setting, "flops": flops(pipe, count) / whole, "time": times.ratio, "quartiles": times.quartiles}
        images = drawn(pipe, count)
        row |= vars(Errors.of(images[:samples], teacher[:samples]))
        rows.append(row | {"frechet_of_the_teachers": distance_to_digits(images) / base if base else None})
    for row in rows:
        row["ours_at_its_flops"], row["ours_at_its_time"] = (cheaper(rows, row, axis) for axis in ("flops", "time"))

    def cell(value: float | None, digits: int = 4) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    header = ("method", "setting", "FLOPs", "time", "median", "flipped", "Frechet", "ours, no more FLOPs", "ours, no more time")
    table = [
        (
            row["method"],
            row["setting"],
            f"{row['flops']:.1%}",
            f"{row['time']:.2f}",
            cell(row["median"]),
            f"{row['flipped']:.1%}",
            cell(row["frechet_of_the_teachers"], 3),
            *((cell(row[name]) for name in ("ours_at_its_flops", "ours_at_its_time")) if row["method"] != OURS else ("", "")),
        )
        for row in rows
    ]
    typer.echo(text_table(header, table))
    for name, what in (("ours_at_its_flops", "FLOPs"), ("ours_at_its_time", "time")):
        skipping = [row for row in rows if row["method"] != OURS and row["median"] > 0]
        met = [row for row in skipping if row[name] is not None]
        ahead = sum(row[name] < row["median"] for row in met)
        rest = len(skipping) - len(met)
        typer.echo(
            f"At no more {what}, ours has the smaller error than {ahead} of {len(met)} settings of others. {rest} cost less than ours."
        )
    if json_file is not None:
        facts: dict[str, Any] = {"hardware": hardware(torch.device("cpu")), "versions": versions() | {"cache-dit": version("cache-dit")}}
        facts |= {"sampler": sampler.to_json(), "samples": samples, "frechet_samples": frechet, "batch": batch, "pairs": pairs}
        json_file.write_text(json.dumps(facts | {"teacher_frechet": base, "rows": rows}, indent=2) + "\n")
    if picture is not None:
        draw(rows, picture)


if __name__ == "__main__":
    typer.run(main)
