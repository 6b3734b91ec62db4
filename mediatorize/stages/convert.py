"""`mediatorize convert` adds switchable mediator attention to a pretrained model and fits it layer by layer, with or without data; or makes
a model of random weights, to be trained from scratch."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mediatorize.compression.conversion import Conversion, ConversionPlan, check_plan, convert_model, states_needed
from mediatorize.compression.initialise import INITIALISERS
from mediatorize.compression.records import FitSettings, LayerErrors
from mediatorize.errors import UserError, refuse_below
from mediatorize.model.architecture import default_local_rank, default_modulation_rank, default_projection_rank, preset
from mediatorize.model.levels import Form, Level, MediatorSettings, MlpOwner, Space, in_order, read_layers, read_level
from mediatorize.signatures import OneOf, given, listed, one, whole_number
from mediatorize.stages import options
from mediatorize.stages.options import DATA, SAMPLING, WHAT, option
from mediatorize.stages.running import process_bytes, progress_bar

if TYPE_CHECKING:
    from mediatorize.devices import World
    from mediatorize.formats.data import Latents
    from mediatorize.model.transformer import DiffusionTransformer
    from mediatorize.store import Kept


ABOUT_FITTING = (
    *("init", "data", "vae", "states", "trajectories", "fit_steps", "batch", "learning_rate"),
    *("solver", "sampler_steps", "cfg_scale", "cfg_channels"),
)
"""Options that say nothing of random weights."""


def widths(text: str) -> tuple[int, ...]:
    """Shares of the hidden width, the narrowest first."""
    return () if text == "none" else tuple(sorted(set(listed(whole_number)(text)), reverse=True))


def convert(
    checkpoint: Annotated[
        str, typer.Argument(help="a pretrained DiT or SiT; with --weights random or --dry-run also a published size: DiT-XL/2@256")
    ],
    out: Annotated[Path, typer.Argument(help="the bundle (a folder) to write")],
    *,
    levels: Annotated[
        tuple[Level, ...],
        option("levels to add to layers, beside softmax: numbers of mediators", WHAT, parser=listed(read_level), metavar="N,N,..."),
    ] = (1, 4, 16),
    layers: Annotated[
        tuple[int, ...] | None,
        option(
            "layers to convert, counted from 0: numbers and ranges, such as 0-3,8; the others stay softmax. Default: all",
            WHAT,
            parser=one(read_layers),
            metavar="N-N,N,...",
        ),
    ] = None,
    form: Annotated[
        Form,
        option("learned: pooling and scales are learned, projections absorbed; published: as in the paper (arXiv 2408.05710)", WHAT),
    ] = "learned",
    init: Annotated[
        str | None, option("how the pooling of tokens into mediators is initialised; default: cluster-queries", WHAT), OneOf(INITIALISERS)
    ] = None,
    mediators_from: Annotated[Space, option("projection that mediators are pooled from", WHAT)] = "queries",
    local_rank: Annotated[
        int | None, option("rank of the local branch, 0 for none; default: a quarter of the width, at most 64", WHAT, min=0)
    ] = None,
    modulation_rank: Annotated[
        int | None,
        option("rank of the change to modulations, trained by finetune; default: a quarter of the width, at most 32", WHAT, min=0),
    ] = None,
    projection_rank: Annotated[
        int | None,
        option(
            "rank of the change to the projections; 0: copies; default: a quarter of the width, at most 32; published form: 0; "
            "random weights: shared with softmax",
            WHAT,
            min=0,
        ),
    ] = None,
    mlp: Annotated[
        MlpOwner, option("own: mediator levels get their own MLPs, trained by finetune; shared: they use softmax's", WHAT)
    ] = "shared",
    mlp_widths: Annotated[
        tuple[int, ...],
        option(
            "narrow MLPs to add: 8 is an eighth of the hidden width; or none",
            WHAT,
            parser=one(widths),
            metavar="N,N,...",
        ),
    ] = (8, 4),
    data: options.Data = None,
    vae: options.Vae = None,
    latent_stats: Annotated[
        Path | None,
        option("LightningDiT's latents_stats.pt: mean and deviation of its latents, which decoding needs; kept in the bundle", DATA),
    ] = None,
    states: Annotated[
        int, option("states to fit on, from the model's own trajectories or from --data; fewer with --fit-steps 0", DATA, min=16)
    ] = 1024,
    trajectories: Annotated[int, option("samples drawn at a time to collect states", DATA, min=1)] = 32,
    fit_steps: Annotated[int, option("fitting steps per layer; 0 leaves mediators as initialised", WHAT, min=0)] = FitSettings.steps,
    batch: Annotated[int, option("states per fitting step", WHAT, min=1)] = FitSettings.batch,
    learning_rate: Annotated[float, option("peak learning rate of fitting", WHAT)] = FitSettings.learning_rate,
    solver: options.Solver = None,
    sampler_steps: options.Steps = None,
    cfg_scale: Annotated[
        float,
        option(
            "guidance of the trajectories: use that of later sampling; 1 is none. With --data, half of the labels are null unless it is 1",
            SAMPLING,
        ),
    ] = 1.5,
    cfg_channels: options.Channels = 3,
    seed: options.Seed = 0,
    family: options.Family = None,
    num_heads: options.Heads = None,
    num_classes: options.Classes = None,
    weights: Annotated[
        str | None,
        option(
            "weights to read from a training checkpoint: ema or model; or random: of the checkpoint's sizes, to train from scratch", DATA
        ),
    ] = None,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    force: options.Force = False,
) -> Conversion:
    """Adds a mediator path to attention layers and fits each to the layer's softmax output. Resumes after a kill; runs under
    torchrun.
    With --weights random, begins a model of its own, which `finetune --teacher none` trains.

    Example: mediatorize convert DiT-XL-2-512x512.pt out --family dit
    """
    arguments = dict(locals())
    from mediatorize.compression.fit import layer_name
    from mediatorize.compression.trajectories import States
    from mediatorize.devices import measured_flops_per_second, pick_device, processes
    from mediatorize.diffusion.sampling import Sampler
    from mediatorize.formats import bundle
    from mediatorize.formats.checkpoint import Hints, open_checkpoint
    from mediatorize.formats.data import open_data, read_statistics
    from mediatorize.model.transformer import from_scratch
    from mediatorize.report.card import model_card
    from mediatorize.report.conversion import fitted_on
    from mediatorize.stages.work import SharedWork, Work

    start = time.monotonic()
    refuse_below({"fit-steps": fit_steps}, 0)
    refuse_below({"batch": batch, "trajectories": trajectories}, 1)
    refuse_below({"states": states}, 16)
    if vae and not data:
        raise UserError(f"{vae}: without --data there is nothing for a VAE to encode.", hint="Pass --data, or leave --vae out.")
    source = Path(checkpoint)
    if bundle.is_bundle(source):
        raise UserError(f"{source}: is a bundle already; nothing was converted.", hint="Convert the checkpoint it was made from.")
    random = weights == bundle.RANDOM
    if random:
        mlp_widths = refuse_fitting(arguments)
    published = (dry_run or random) and "@" in checkpoint and not source.exists()
    opened = None if published else open_checkpoint(source, Hints(family, num_heads, num_classes), None if random else weights)
    arch = preset(checkpoint) if opened is None else opened.arch
    if latent_stats is not None:
        if arch.latent_std:
            raise UserError(f"{source}: holds statistics of its own.", hint="Leave --latent-stats out.")
        mean, std = (tuple(values.flatten().tolist()) for values in read_statistics(latent_stats, arch.channels))
        arch = replace(arch, latent_mean=mean, latent_std=std)
        opened = None if opened is None else replace(opened, arch=arch)

    if form == "published" and init not in (None, "pool"):
        raise UserError(f"--init {init} says nothing to --form published, which pools on a grid.", hint="Leave --init out.")
    init = ("pool" if form == "published" else "cluster-queries") if init is None else init
    local_default, projection_default = default_local_rank(arch.width), default_projection_rank(arch.width)
    modulation_default, shared = default_modulation_rank(arch.width), False
    if form == "published":  # projections of all tokens run, where a low rank would cost FLOPs
        local_default = projection_default = 0
    if random:  # what the originals train has nothing beside it
        modulation_default, shared = 0, projection_rank is None
    fit = FitSettings(steps=0 if random else fit_steps, batch=batch, learning_rate=learning_rate, seed=seed)
    taken, at_a_time = (0, 0) if random else states_needed(states, trajectories, init, fit, bool(mlp_widths))
    plan = ConversionPlan(
        arch=arch,
        settings=MediatorSettings(
            levels=tuple(in_order(levels)),
            space=mediators_from,
            local_rank=local_default if local_rank is None else local_rank,
            modulation_rank=modulation_default if modulation_rank is None else modulation_rank,
            projection_rank=None if shared else projection_default if projection_rank is None else projection_rank,
            mlp=mlp,
            mlp_widths=tuple(mlp_widths),
            form=form,
            layers=layers,
        ).of_model(arch.depth),
        init=init,
        fit=fit,
        states=taken,
        trajectories=at_a_time,
        sampler=Sampler.resolve(
            arch, solver=solver, steps=sampler_steps, cfg_scale=cfg_scale, cfg_channels=cfg_channels, seed=seed, fixed_for="states need"
        ),
        random=random,
    )
    notes = check_plan(plan) + (opened.notes if opened else ())
    if taken < states and not random:
        notes += (f"without fitting, {taken} states are enough to initialise mediators and to measure errors",)
    dataset = open_data(data, arch, vae, pick_device(device)) if data else None
    plan = replace(plan, data=dataset.facts() if dataset else None)
    if dry_run:
        where = pick_device(device)
        expected = plan.flops() / measured_flops_per_second(where, arch.width, arch.tokens)
        memory = process_bytes(plan.peak_bytes(), where)
        return Conversion(out=out, plan=plan, notes=notes, estimated_seconds=expected, estimated_bytes=memory)

    bundle.refuse_occupied(out, force)
    if random:
        model = from_scratch(arch, plan.settings, seed)
    else:
        assert opened is not None, "only random weights have no file"
        opened.verify()
        model = opened.load()
    weights_hash = bundle.hash_of_weights(model)
    partial = bundle.partial_folder(out)
    unfinished = UserError(
        f"{partial}: an unfinished conversion with other settings, data or weights.", hint="Repeat its command, or pass --force to drop it."
    )
    with processes(pick_device(device)) as world:
        if world.size > at_a_time and not random and dataset is None:
            raise UserError(
                f"{world.size} processes cannot share {at_a_time} trajectories.", hint="Pass more --trajectories, or start fewer processes."
            )
        if world.is_first and not (partial / bundle.WORK_FOLDER).exists():
            shutil.rmtree(partial, ignore_errors=True)  # nobody's work
        fingerprint = plan.fingerprint(weights_hash)
        work = Work.open(partial / bundle.WORK_FOLDER, fingerprint, force=force, refusal=lambda before: unfinished, world=world)
        errors: list[LayerErrors] = []
        left = [index for index in plan.layers[world.rank :: world.size] if not work.has(layer_name(index))]
        resumed = sum(work.has(layer_name(index)) for index in plan.layers) if world.is_first else 0
        if not random:
            model = model.to(world.device)
            collected = States(**SharedWork(work, world).once("states", lambda: _collect(model, plan, dataset, world)).tensors)
            dataset = None  # and the VAE with it
            with progress_bar(len(left) * plan.steps_per_layer, "fitting layers") as bar:
                errors = convert_model(model, collected, plan.settings, init=init, fit=fit, store=work, world=world, on_step=bar.update)

        result = Conversion(out=out, plan=plan, notes=notes, errors=tuple(errors), seconds=time.monotonic() - start, resumed_layers=resumed)
        if world.is_first:
            name, form_of_file = (checkpoint, "published size") if opened is None else (source.name, opened.format)
            part = bundle.RANDOM if random or opened is None else opened.part
            origin = bundle.Origin(file=name, format=form_of_file, weights=part, sha256=weights_hash)
            config = bundle.BundleConfig(arch, plan.settings, origin, result.errors, fitted_on=fitted_on(plan))
            bundle.write_bundle(partial, model.cpu(), config, model_card(config))
            (partial / bundle.LOG_FILE).unlink(missing_ok=True)  # of a try that was killed at the very end
            logged = {"checkpoint": checkpoint, "out": str(out), **work.plan}
            bundle.append_log(partial, "convert", logged, {"seconds": round(result.seconds, 1), "resumed_layers": resumed})
            bundle.commit(partial, out)
        world.barrier()
    return result


def refuse_fitting(arguments: dict[str, Any]) -> tuple[int, ...]:
    """Refuses options about fitting where weights are random. The narrow MLPs of such a model: none."""
    idle = given(convert, {name: arguments[name] for name in ABOUT_FITTING})
    if idle:
        spelled = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        raise UserError(f"{spelled} says nothing with --weights random: nothing is fitted then.", hint="Leave it out.")
    if given(convert, {"mlp_widths": arguments["mlp_widths"]}) and arguments["mlp_widths"]:
        raise UserError("Narrow MLPs are fitted to trained ones, and --weights random has none.", hint="Leave --mlp-widths out.")
    return ()


def _collect(model: DiffusionTransformer, plan: ConversionPlan, dataset: Latents | None, world: World) -> Kept:
    """Collects the states of a plan and shows a progress bar."""
    from mediatorize.compression.trajectories import data_states, teacher_states
    from mediatorize.store import Kept

    if dataset is None:
        with progress_bar(plan.calls(), "sampling the teacher", "call") as bar:
            how = {"trajectories": plan.trajectories, "world": world, "on_call": bar.update}
            return Kept(vars(teacher_states(model, plan.states, plan.sampler, **how)))
    guidance, seed = plan.sampler.cfg_scale, plan.sampler.seed
    with progress_bar(plan.states, "reading data", "item") as bar:
        return Kept(vars(data_states(plan.arch, dataset, plan.states, cfg_scale=guidance, seed=seed, on_read=bar.update)[0]))
