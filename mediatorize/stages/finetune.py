"""`mediatorize finetune` trains a bundle: briefly against its own softmax path (distillation), with or without data; or on data alone."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mediatorize.compression.records import Distillation, DistillSettings, Optimizer, Rate, Teacher, Trained, Weighting
from mediatorize.errors import UserError, refuse_below
from mediatorize.model.levels import Level, read_level
from mediatorize.signatures import given, listed, number
from mediatorize.stages import options
from mediatorize.stages.options import DATA, RESOURCES, SAMPLING, WHAT, option
from mediatorize.stages.running import process_bytes, progress_bar

if TYPE_CHECKING:
    from mediatorize.compression.training import Finetuning

ABOUT_A_TEACHER = (
    *("feature_weight", "weighting", "trajectories", "reuse", "renoised"),
    *("solver", "sampler_steps", "cfg_scales", "cfg_channels"),
)
"""Options that say nothing without a teacher."""


def finetune(
    model: Annotated[Path, typer.Argument(help="the bundle to train; it is replaced when training is done")],
    *,
    train_steps: Annotated[int, option("training steps", WHAT, min=1)] = DistillSettings.steps,
    batch: Annotated[int, option("states per step, over all processes", WHAT, min=1)] = DistillSettings.batch,
    learning_rate: Annotated[
        float, option("peak learning rate at width 128; wider models use it times 128 / width", WHAT, min=0)
    ] = DistillSettings.learning_rate,
    warmup: Annotated[int, option("warm-up steps, at most a tenth of all steps", WHAT, min=0)] = DistillSettings.warmup,
    ema: Annotated[
        float, option("decay of averaged weights, such as 0.999; 0 keeps the last weights", WHAT, min=0, max=1)
    ] = DistillSettings.ema,
    feature_weight: Annotated[float, option("loss weight of matching every block's output", WHAT, min=0)] = DistillSettings.feature_weight,
    train: Annotated[Trained, option("what to train: mediators; or all, which changes level softmax too", WHAT)] = "mediators",
    train_levels: Annotated[
        tuple[Level, ...],
        option("levels to train; default: all that were added", WHAT, parser=listed(read_level), metavar="LEVEL,LEVEL,..."),
    ] = DistillSettings.levels,
    teacher: Annotated[
        Teacher, option("softmax: the bundle's own softmax path; none: learn from --data alone, as the originals are trained", WHAT)
    ] = DistillSettings.teacher,
    optimizer: Annotated[
        Optimizer, option("muon: Muon and NAdamW; adamw: AdamW without weight decay, at one rate for any width", WHAT)
    ] = DistillSettings.optimizer,
    rate: Annotated[
        Rate, option("after the warm-up, the learning rate falls to 0 along a cosine, or is constant", WHAT)
    ] = DistillSettings.rate,
    clip: Annotated[float, option("largest norm of the gradient; 0 leaves it as it is", WHAT, min=0)] = DistillSettings.clip,
    weighting: Annotated[
        Weighting,
        option("sample: errors weigh by how far they move a sample, measured first at the first guidance; even: all equally", WHAT),
    ] = "sample",
    data: options.Data = None,
    vae: options.Vae = None,
    data_weight: Annotated[
        float, option("with --data: loss weight of the error against the data, beside that against the teacher", DATA, min=0)
    ] = DistillSettings.data_weight,
    label_dropout: Annotated[
        float, option("with --teacher none: share of the labels that are null, so that the model can be guided", DATA, min=0, max=1)
    ] = DistillSettings.label_dropout,
    trajectories: Annotated[int, option("teacher samples per round; a round trains on their states", SAMPLING, min=1)] = 32,
    reuse: Annotated[int, option("how often each state is trained on before it is replaced", SAMPLING, min=1)] = 1,
    renoised: Annotated[int, option("extra states per state of a trajectory: its finished sample with new noise", SAMPLING, min=0)] = 3,
    solver: options.Solver = None,
    sampler_steps: options.Steps = None,
    cfg_scales: Annotated[
        tuple[float, ...],
        option("guidance scales, one per round in turn; 1 is none", SAMPLING, parser=listed(number), metavar="X,X,..."),
    ] = (1.5, 1.0, 4.0),
    cfg_channels: options.Channels = 3,
    seed: options.Seed = 0,
    accumulate: Annotated[int, option("parts to split a batch into, to save memory", RESOURCES, min=1)] = DistillSettings.accumulate,
    checkpointing: Annotated[
        bool, option("recompute activations in the backward pass, to save memory", RESOURCES, "--checkpointing")
    ] = False,
    save_every: Annotated[int, option("steps between saves; a resumed run starts at the last save", RESOURCES, min=1)] = 200,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], option("precision of matrix products; auto: bfloat16 on CUDA, else float32", RESOURCES)
    ] = "auto",
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    force: options.Force = False,
) -> Finetuning:
    """Trains the added weights to repeat the model's own softmax outputs along its trajectories; with --teacher none, all weights on data.
    Resumes after a kill; runs under torchrun.

    Example: mediatorize finetune runs/bundle --train-steps 2000 --cfg-scales 1.5,1,4
    """
    arguments = dict(locals())
    from mediatorize.compression import training as trainings
    from mediatorize.compression.training import DivergedError, Estimate, Finetuning, TrainingPlan
    from mediatorize.devices import measured_flops_per_second, pick_device, processes
    from mediatorize.formats import bundle
    from mediatorize.formats.data import open_data
    from mediatorize.report.card import model_card
    from mediatorize.report.training import Metrics, facts
    from mediatorize.stages.work import STATE_FILE, Work

    start = time.monotonic()
    if not bundle.is_bundle(model):
        raise UserError(f"{model}: is no bundle.", hint="Make one with `mediatorize convert CKPT OUT`.")
    config = bundle.read_config(model)
    bundle.refuse_pruned(model, config)
    refuse_idle_options(teacher, arguments)
    if teacher == "softmax":
        bundle.refuse_untrained(model, config)
    where = pick_device(device)
    distill = DistillSettings(
        steps=train_steps,
        batch=batch,
        learning_rate=learning_rate,
        warmup=warmup,
        ema=ema,
        feature_weight=feature_weight,
        data_weight=data_weight,
        train=train,
        levels=tuple(train_levels),
        teacher=teacher,
        label_dropout=label_dropout,
        optimizer=optimizer,
        rate=rate,
        clip=clip,
        accumulate=accumulate,
        checkpointing=checkpointing,
        seed=seed,
    )
    refuse_below({"save-every": save_every}, 1)
    if teacher == "none" and not data:
        raise UserError("Without a teacher the data are all there is to learn from.", hint="Pass --data PATH --data-weight 1.")
    plan = TrainingPlan.resolve(
        config.arch,
        distill=distill,
        trajectories=trajectories,
        reuse=reuse,
        renoised=renoised,
        solver=solver,
        steps=sampler_steps,
        cfg_scales=cfg_scales,
        cfg_channels=cfg_channels,
        dtype=dtype if dtype != "auto" else "bfloat16" if where.type == "cuda" else "float32",
        weighting=weighting,
    )
    if (vae or data_weight) and not data:
        raise UserError("--vae and --data-weight are for data, and there are none.", hint="Pass --data, or leave them out.")
    trainings.refuse_untrainable_levels(distill, config.settings)
    dataset = open_data(data, config.arch, vae, where) if data else None
    plan = replace(plan, data=vars(dataset.facts()) if dataset else None)

    student = bundle.load_bundle(model)
    done = Finetuning(path=model, plan=plan, trained_parameters=plan.trained_parameters(config.arch, config.settings))
    if dry_run:
        per_second = measured_flops_per_second(where, config.arch.width, config.arch.tokens)
        peak = {size: process_bytes(plan.peak_bytes(config.arch, config.settings, size), where) for size in (1, 4, 16, 64)}
        return replace(done, estimate=Estimate(seconds=plan.flops(config.arch, config.settings) / per_second, peak_bytes=peak))

    fingerprint = plan.fingerprint(bundle.hash_of_file(model / "model.safetensors"))
    if config.finetuned is not None and {**config.finetuned.plan, "start": fingerprint["start"]} == fingerprint and not force:
        raise UserError(f"{model}: was trained with these very settings.", hint="Pass --force to go on from there.")
    prepared = bundle.beside(model, "finetune")
    other_work = UserError(
        f"{prepared}: an unfinished fine-tuning with other settings or weights.", hint="Repeat its command, or pass --force to drop it."
    )
    with processes(where) as world:
        if world.is_first and not (prepared / bundle.WORK_FOLDER).exists():
            shutil.rmtree(prepared, ignore_errors=True)  # nobody's work
        work = Work.open(prepared / bundle.WORK_FOLDER, fingerprint, force=force, refusal=lambda _: other_work, world=world)
        student = student.to(world.device)
        effects = None
        if plan.weighting == "sample":
            with progress_bar(plan.effects_calls(world.size), "measuring what errors do", "call") as bar:
                effects = trainings.measured_effects(student, plan, world, bar.update)
        state = work.state(world.device)
        resumed_at = state["distiller"]["step"] if state else 0
        metrics = Metrics(work.folder, resumed_at) if world.is_first else None  # one process writes
        with progress_bar(train_steps, "distilling" if teacher != "none" else "training", initial=resumed_at) as bar:

            def tell(step: int, loss: float, at_rate: float) -> None:
                bar.set_postfix(loss=f"{loss:.4f}", rate=f"{at_rate:.1e}")
                if metrics is not None:
                    metrics.write(step, loss, at_rate)

            try:
                training = trainings.train(
                    student,
                    plan,
                    data=dataset,
                    effects=effects,
                    world=world,
                    state=state,
                    save=work.save_state,
                    save_every=save_every,
                    on_step=bar.update,
                    on_loss=tell,
                )
            except DivergedError as error:
                raise UserError(
                    f"{model}: {error.message} The bundle is as it was, and the state of {error.saved_at} steps is in "
                    f"{work.folder / STATE_FILE}.",
                    hint=f"{error.hint.rstrip('.')}, and --force to begin anew.",
                ) from error
        notes = ("the bundle's schedule was made for the old weights; calibrate again",) if (model / "schedule.json").exists() else ()
        trained_levels = plan.distill.levels or config.settings.levels
        own = None if teacher != "none" else bundle.only_level(trained_levels, config.settings, config.arch.depth)
        if own is not None:
            notes = (f"it samples at level {', '.join(map(str, own.used))} unless another is asked for: the others were not trained",)
        done = replace(done, training=training, seconds=time.monotonic() - start, notes=notes)
        if metrics is not None:
            student = student.cpu()
            finished = replace(config, finetuned=Distillation(fingerprint, training.before, training.after))
            if teacher == "none":
                finished = replace(finished, source=bundle.origin_of_training(finished, student))
            bundle.write_bundle(prepared, student, finished, model_card(finished))
            if own is not None:
                bundle.write_json(prepared / "schedule.json", own.to_json())
            metrics.copy_to(prepared)
            shutil.copy(model / bundle.LOG_FILE, prepared / bundle.LOG_FILE)
            bundle.append_log(prepared, "finetune", fingerprint, facts(done))
            bundle.commit(prepared, model)
        world.barrier()
    return done


def refuse_idle_options(teacher: Teacher, arguments: dict[str, Any]) -> None:
    """Refuses options about a teacher where there is none, and about its absence where there is one."""
    idle = given(finetune, {name: arguments[name] for name in (ABOUT_A_TEACHER if teacher == "none" else ("label_dropout",))})
    if idle:
        spelled = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        raise UserError(f"{spelled} says nothing with --teacher {teacher}.", hint="Leave it out.")
