"""`mediatorize evaluate` compares every level and schedule with the teacher, from the same noise, and writes one report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mediatorize.errors import UserError, refuse_below
from mediatorize.evaluation.results import OWN_SCHEDULE, Evaluation
from mediatorize.model.levels import Level, read_level
from mediatorize.signatures import as_command, listed, whole_number
from mediatorize.stages import options
from mediatorize.stages.calibrate import FOLDER
from mediatorize.stages.options import DATA, OUTPUT, RESOURCES, SAMPLING, WHAT, option
from mediatorize.stages.plans import REFERENCE_STEPS, plans_for
from mediatorize.stages.running import hardware, progress_bar, versions
from mediatorize.version import VERSION

SAMPLES_FOLDER = "samples"
"""A folder in the report's folder: the samples, in parts."""


def evaluate(
    model: Annotated[str, typer.Argument(help="a bundle; or a checkpoint, which is evaluated alone")],
    out: Annotated[Path, typer.Argument(help="folder for report.html, report.md, evaluation.json, pictures and samples")],
    *,
    levels: Annotated[
        tuple[Level, ...] | None,
        option("levels to evaluate; default: all levels of the bundle", WHAT, parser=listed(read_level), metavar="LEVEL,LEVEL,..."),
    ] = None,
    schedule: Annotated[
        tuple[Path, ...],
        option("schedule files (JSON) to evaluate, beside the bundle's own", WHAT, parser=listed(Path), metavar="FILE,FILE,..."),
    ] = (),
    plan: Annotated[
        Path | None, option("a plan file, which is judged beside solvers of as many calls; default: the bundle's own", WHAT)
    ] = None,
    calls: Annotated[
        tuple[int, ...],
        option("which of the plans: numbers of model calls; default: all", WHAT, parser=listed(whole_number), metavar="N,N,..."),
    ] = (),
    samples: Annotated[int, option("samples per row", WHAT, min=2)] = 2000,
    features: options.Features = "digits",
    inception_weights: options.Inception = None,
    reference: Annotated[
        Path | None,
        option("a .npz with mu and sigma, or with pictures in arr_0; default: the teacher's samples (digits, fashion: real ones)", DATA),
    ] = None,
    npz: Annotated[bool, option("write pictures for the ADM evaluator: teacher.npz and one per level", OUTPUT, "--npz")] = False,
    vae: options.Vae = None,
    pairs: Annotated[
        int, option("timed model calls per level (at least 2), each paired with a softmax call; 0 measures no time", WHAT, min=0)
    ] = 10,
    timing_batch: Annotated[int, option("samples per timed model call", RESOURCES, min=1)] = 32,
    solver: options.Solver = None,
    steps: options.Steps = None,
    cfg_scale: Annotated[float | None, option("classifier-free guidance scale; default: the plan's, else 1", SAMPLING)] = None,
    cfg_channels: options.Channels = 3,
    cfg_interval: options.Interval = (0.0, 1.0),
    timestep_shift: options.Shift = 1.0,
    seed: options.Seed = 0,
    batch: options.Batch = 128,
    family: options.Family = None,
    num_heads: options.Heads = None,
    weights: options.Weights = None,
    num_classes: options.Classes = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    compile: options.Compile = False,
    force: options.Force = False,
) -> Evaluation | None:
    """Compares every plan, level and schedule with the teacher (level softmax), from the same noise. Resumes after a kill; runs under
    torchrun.

    Example: mediatorize evaluate out report --features none --samples 64 --steps 50 --cfg-scale 4
    """
    command = as_command("evaluate", evaluate, dict(locals()))
    import torch

    from mediatorize.devices import DTYPES, pick_device, processes, refuse_uncompilable
    from mediatorize.diffusion.sampling import Sampler
    from mediatorize.evaluation.comparison import Samples, compare, rows_of
    from mediatorize.formats import bundle
    from mediatorize.formats.images import load_vae
    from mediatorize.formats.judges import open_extractor, read_reference, refuse_unfit
    from mediatorize.formats.loading import load_model
    from mediatorize.formats.samples import SampleFiles, decoder_of, write_adm_array
    from mediatorize.report.evaluation import write_pictures, write_report
    from mediatorize.stages.work import Work

    refuse_below({"samples": samples, "pairs": pairs or 2}, 2)
    refuse_below({"batch": batch, "timing-batch": timing_batch}, 1)
    _refuse_occupied(out, force)
    config = bundle.read_config(Path(model)) if bundle.is_bundle(Path(model)) else None
    if config is not None:
        bundle.refuse_pruned(Path(model), config)
        bundle.refuse_untrained(Path(model), config)
    loaded = load_model(model, family=family, num_heads=num_heads, num_classes=num_classes, weights=weights)
    arch = loaded.arch
    plans, own_guidance, told = plans_for(model, loaded, plan, calls, cfg_scale, cfg_channels, cfg_interval, timestep_shift, dtype)
    guidance: dict[str, Any] = {"cfg_scale": 1.0 if cfg_scale is None else cfg_scale, "cfg_channels": cfg_channels}
    guidance |= {"cfg_interval": cfg_interval, "timestep_shift": timestep_shift, **own_guidance}
    if plans and steps is None:
        steps = REFERENCE_STEPS
    sampler = Sampler.resolve(arch, solver=solver, steps=steps, seed=seed, fixed_for="a comparison needs", **guidance)
    rows = rows_of(loaded, sampler, levels, bundle.read_schedules(schedule, loaded, reserved=(OWN_SCHEDULE,)), plans)
    where = pick_device(device)
    if compile:
        refuse_uncompilable(where)
    refuse_unfit(model, arch, features, inception_weights, reference, vae, npz)
    decoder = load_vae(vae, torch.device("cpu")) if vae else None

    with processes(where) as world:
        extractor = open_extractor(features, inception_weights, world.device) if world.is_first else None
        drawn = {
            "weights": bundle.hash_of_tensors(loaded.state_dict()),
            "vae": bundle.hash_of_tensors(decoder.state_dict()) if decoder is not None else None,
            "latents": [list(arch.latent_mean), list(arch.latent_std)],
            "sampling": {**sampler.to_json(), "batch": batch},
            "device": world.device.type,
            "dtype": dtype,
            "compiled": compile,
            "version": VERSION,
        }
        compared_with = read_reference(reference, extractor, batch) if reference and extractor else None
        work = Work.open(out / SAMPLES_FOLDER, drawn, force=force, refusal=lambda other: _another_plan(out, drawn, other), world=world)
        kept = Samples(
            rows=rows,
            labels=torch.arange(samples) % arch.classes,
            batch=batch,
            parts=SampleFiles(work.folder),
            decode=decoder_of(decoder, world.device, arch) if decoder is not None else None,
        )
        loaded = loaded.to(device=world.device, dtype=DTYPES[dtype])
        if compile:
            loaded.compile_blocks()
        found = compare(
            loaded,
            kept,
            sampler,
            extractor=extractor,
            reference=compared_with,
            pairs=pairs,
            timing_batch=timing_batch,
            world=world,
            progress=progress_bar,
        )
        if not world.is_first:
            return None  # the first reports

    arrays = {f"{'teacher' if row is rows[0] else row.file_name}.npz": row for row in rows} if npz else {}
    for name, row in arrays.items():
        write_adm_array(out / name, samples, kept.pictures(row))
    result = Evaluation(
        model=model,
        name=arch.name,
        out=out,
        samples=samples,
        sampler=sampler,
        batch=batch,
        dtype=dtype,
        processes=world.size,
        vae=None if vae is None else str(vae),
        command=command,
        comparison=found,
        hardware=hardware(world.device),
        versions=versions(),
        source=config.source.to_json() if config else None,
        log=tuple(bundle.read_log(Path(model))) if config else (),
        pictures=write_pictures(out, kept, found.results, loaded, sampler, Path(model) / FOLDER if config else None),
        arrays=tuple(arrays),
        noise_levels=tuple(sampler.noise_levels(arch)),
        about_plans=told,
    )
    write_report(result)
    return result


def _refuse_occupied(out: Path, force: bool) -> None:
    from mediatorize.report.evaluation import RESULT_FILE

    if (out / RESULT_FILE).exists() and not force:
        raise UserError(f"{out}: has an evaluation.", hint="Pass --force to replace it, or another folder.")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file.", hint="Name a folder.")


def _another_plan(out: Path, plan: dict[str, Any], other: dict[str, Any]) -> UserError:
    differing = ", ".join(key for key in plan if other.get(key) != plan[key])
    return UserError(
        f"{out / SAMPLES_FOLDER}: has samples of another plan ({differing}).", hint="Pass --force to draw them anew, or another folder."
    )
