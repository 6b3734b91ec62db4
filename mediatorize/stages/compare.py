"""`mediatorize compare` judges models that have no teacher side by side, against data."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mediatorize.errors import UserError, refuse_below
from mediatorize.evaluation.results import SideBySide
from mediatorize.signatures import as_command, listed
from mediatorize.stages import options
from mediatorize.stages.options import DATA, SAMPLING, SWITCHING, WHAT, option
from mediatorize.stages.plans import plans_for
from mediatorize.stages.running import progress_bar
from mediatorize.version import VERSION

if TYPE_CHECKING:
    from mediatorize.diffusion.plan import Plan

SAMPLES_FOLDER = "samples"
"""A folder in the report's folder: the samples of every model, in parts."""


def compare(
    model: Annotated[str, typer.Argument(help="the first model: a bundle, which runs at its schedule or else at softmax, or a checkpoint")],
    out: Annotated[Path, typer.Argument(help="folder for comparison.md, comparison.json, pictures and samples")],
    *,
    beside: Annotated[tuple[str, ...], option("other models to judge beside it", WHAT, parser=listed(str), metavar="FILE,FILE,...")] = (),
    switch: Annotated[
        tuple[str, ...],
        option(
            "models between which samples switch, from the first to the last: one more row",
            SWITCHING,
            parser=listed(str),
            metavar="FILE,FILE,...",
        ),
    ] = (),
    ratios: options.Ratios = (0.6, 0.3),
    first: options.First = 3,
    plan: Annotated[
        Path | None, option("a plan file of the first model, one more row for each of its plans; default: the bundle's own", WHAT)
    ] = None,
    samples: Annotated[int, option("samples per model", WHAT, min=2)] = 2000,
    features: options.Features = "digits",
    inception_weights: options.Inception = None,
    reference: Annotated[
        Path | None, option("a .npz with mu and sigma, or with pictures in arr_0; default: the data of --features digits or fashion", DATA)
    ] = None,
    vae: options.Vae = None,
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
    num_classes: options.Classes = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    force: options.Force = False,
) -> SideBySide | None:
    """Judges models that have no teacher side by side: cost and quality against data, from the same noise. Resumes after a kill; runs under
    torchrun.

    Example: mediatorize compare baseline report --beside m4,m16 --switch m4,m16,baseline --cfg-scale 1.5
    """
    command = as_command("compare", compare, dict(locals()))
    import torch

    from mediatorize.devices import DTYPES, pick_device, processes
    from mediatorize.diffusion.sampling import Sampler, own_level
    from mediatorize.evaluation.comparison import Row, Samples
    from mediatorize.evaluation.metrics import distance_of_halves
    from mediatorize.evaluation.side_by_side import Contestant, judge_side_by_side
    from mediatorize.formats import bundle
    from mediatorize.formats.images import load_vae
    from mediatorize.formats.judges import open_extractor, read_reference, refuse_unfit
    from mediatorize.formats.loading import load_model
    from mediatorize.formats.samples import SampleFiles, decoder_of
    from mediatorize.model.levels import SOFTMAX
    from mediatorize.model.schedule import SwitchRule
    from mediatorize.report.side_by_side import RESULT_FILE, write_pictures, write_report
    from mediatorize.stages.work import Work

    refuse_below({"samples": samples}, 2)
    refuse_below({"batch": batch}, 1)
    if (out / RESULT_FILE).exists() and not force:
        raise UserError(f"{out}: has a comparison.", hint="Pass --force to replace it, or another folder.")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file.", hint="Name a folder.")
    if features == "none" and inception_weights is None:
        raise UserError("Without features nothing is judged.", hint="Pass --features or --inception-weights.")
    if len(switch) == 1:
        raise UserError(f"{switch[0]} is the only one of --switch.", hint="Name the next ones too.")
    files = tuple(dict.fromkeys((model, *beside)))
    hints: dict[str, Any] = {"family": family, "num_heads": num_heads, "num_classes": num_classes}
    loaded = {file: load_model(file, **({} if bundle.is_bundle(Path(file)) else hints)) for file in dict.fromkeys((*files, *switch))}
    arch = loaded[model].arch
    plans, own_guidance, told = plans_for(model, loaded[model], plan, (), cfg_scale, cfg_channels, cfg_interval, timestep_shift, dtype)
    guidance: dict[str, Any] = {"cfg_scale": 1.0 if cfg_scale is None else cfg_scale, "cfg_channels": cfg_channels}
    guidance |= {"cfg_interval": cfg_interval, "timestep_shift": timestep_shift, **own_guidance}
    sampler = Sampler.resolve(arch, solver=solver, steps=steps, seed=seed, fixed_for="a comparison needs", **guidance)
    for file in files:
        refuse_unfit(file, loaded[file].arch, features, inception_weights, reference, vae, npz=False)
        if (loaded[file].arch.input_size, loaded[file].arch.classes) != (arch.input_size, arch.classes):
            raise UserError(f"{file}: is not for the pictures and classes of {model}.", hint="Compare models of one kind.")
    rule = SwitchRule(levels=tuple(own_level(loaded[file]) for file in switch), ratios=ratios, first=first) if switch else None
    names = {file: Path(file).stem for file in loaded}
    if len(set(names.values())) < len(names):
        names = {file: file for file in loaded}
    hashes = {file: bundle.hash_of_tensors(one.state_dict()) for file, one in loaded.items()}
    schedules = {file: None if one.schedule is None else one.schedule.to_json() for file, one in loaded.items()}

    with processes(pick_device(device)) as world:
        extractor = open_extractor(features, inception_weights, world.device) if world.is_first else None
        decoder = load_vae(vae, world.device) if vae else None
        for one in loaded.values():
            one.to(device=world.device, dtype=DTYPES[dtype])
        how = {
            "vae": bundle.hash_of_tensors(decoder.state_dict()) if decoder is not None else None,
            "sampling": {**sampler.to_json(), "batch": batch},
            "device": world.device.type,
            "dtype": dtype,
            "version": VERSION,
        }
        contestants = []
        entries: list[tuple[str, tuple[str, ...], Plan | None]] = [(names[file], (file,), None) for file in files]
        entries += [(f"{names[model]}, plan of {count} calls", (model,), each) for count, each in sorted(plans.items(), reverse=True)]
        entries += [("step-wise", switch, None)] if switch else []
        for index, (name, shown, planned) in enumerate(entries):
            own: dict[str, Any] = {"models": [[hashes[file], schedules[file]] for file in shown]}
            own |= {"latents": [list(loaded[shown[0]].arch.latent_mean), list(loaded[shown[0]].arch.latent_std)]}
            own |= {"ratios": list(ratios), "first": first} if shown is switch else {}
            own |= {"plan": planned.to_json()} if planned is not None else {}
            folder = out / SAMPLES_FOLDER / f"{index}"
            work = Work.open(folder, how | own, force=force, refusal=partial(_another_plan, folder), world=world)
            kept = Samples(
                rows=(Row(name, SOFTMAX),),
                labels=torch.arange(samples) % arch.classes,
                batch=batch,
                parts=SampleFiles(work.folder),
                decode=decoder_of(decoder, world.device, loaded[shown[0]].arch) if decoder is not None else None,
            )
            models = tuple(loaded[file] for file in shown)
            entrant = Contestant(name=name, models=models, samples=kept, rule=rule if shown is switch else None, plan=planned)
            entrant.draw(sampler, world, progress_bar)
            contestants.append(entrant)
        world.barrier()
        if not world.is_first:
            return None  # the first reports
        assert extractor is not None, "features are judged"
        given = read_reference(reference, extractor, batch) if reference else None
        results, compared_with = judge_side_by_side(contestants, extractor, given, progress_bar)

    found = SideBySide(
        name=arch.name,
        out=out,
        samples=samples,
        sampler=sampler,
        results=results,
        features=extractor.name,
        reference=compared_with.name,
        distance_of_halves=None if compared_with.features is None else distance_of_halves(compared_with.features),
        pictures={},
        command=command,
        about_plans=told,
    )
    found = replace(found, pictures=write_pictures(out, contestants, results))
    write_report(found)
    return found


def _another_plan(folder: Path, other: dict[str, Any]) -> UserError:
    return UserError(f"{folder}: has samples of another model or plan.", hint="Pass --force to draw them anew, or another folder.")
