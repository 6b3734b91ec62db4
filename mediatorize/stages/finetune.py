"""`mediatorize finetune`: short distillation of a bundle against its own softmax path, with or without data."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from mediatorize.compression.distill import (
    Distiller,
    DistillSettings,
    Trained,
    mean_squares,
    output_errors,
    saved_bytes,
)
from mediatorize.compression.sensitivity import Effects, Sampler, effects_on_samples, probe_all
from mediatorize.compression.trajectories import Samples, Targets, data_targets, teacher_targets
from mediatorize.diffusion.process import noise_level
from mediatorize.diffusion.solvers import (
    DEFAULT_SOLVER,
    Channels,
    call_noise_levels,
    call_times,
    find_solver,
    refuse_steps,
    rows_per_sample,
)
from mediatorize.errors import UserError
from mediatorize.formats import bundle
from mediatorize.formats.latents import DataFacts, Latents, open_data
from mediatorize.formats.tensors import write_beside
from mediatorize.model import cost
from mediatorize.model.architecture import Architecture, MediatorSettings
from mediatorize.model.transformer import DiffusionTransformer, count_parameters
from mediatorize.report.card import model_card
from mediatorize.stages.distributed import World, processes
from mediatorize.stages.options import (
    ChannelsOption,
    DataOption,
    DeviceOption,
    DryRunOption,
    ForceOption,
    Option,
    SeedOption,
    SolverOption,
    StepsOption,
    VaeOption,
)
from mediatorize.stages.running import (
    measured_flops_per_second,
    pick_device,
    progress_bar,
    refuse_below,
    seconds_in_words,
    text_table,
)

LOG_EVERY = 20
"""Steps between lines of metrics, each a mean over them."""

DIVERGED = 4.0
"""A mean loss this many times the first one stops the training."""

HELD_OUT_SAMPLES = 16
"""Samples whose whole trajectories say how far the model is from its teacher; training never sees them."""

HELD_OUT_SEED = 2**31

EFFECTS_SAMPLES = 16
"""Trajectories of the teacher on which it is measured how far errors move a sample."""

EFFECTS_SEED = HELD_OUT_SEED + 1

METRICS_FILE = "finetune.jsonl"

Weighting = Literal["sample", "even"]


@dataclass(frozen=True)
class Plan:
    """What a fine-tuning will do; the same plan on the same bundle gives the same weights."""

    distill: DistillSettings
    trajectories: int
    """Samples drawn at a time; all their states make a round."""
    reuse: int
    """How often every state of a round is used."""
    renoised: int
    """For every state of a trajectory, how many of its finished sample with new noise: less alike than states of one path."""
    solver: str
    steps: int
    cfg_scales: tuple[float, ...]
    """A round's guidance is one of these, in turn."""
    cfg_channels: Channels
    dtype: str
    weighting: Weighting = "sample"
    """Whether a squared error counts by how far it moves the sample (by that squared, few states carry the gradient), or all alike."""
    data: DataFacts | None = None
    """What states are made of; None is the teacher's own trajectories."""

    def fingerprint(self, start: str) -> dict[str, Any]:
        """Everything that the result depends on, as JSON keeps it."""
        return json.loads(json.dumps({**asdict(self), "start": start}))

    def cfg_scale(self, round_index: int) -> float:
        return self.cfg_scales[round_index % len(self.cfg_scales)]

    def rows(self, arch: Architecture, round_index: int) -> int:
        """States of a round."""
        calls = len(call_times(find_solver(arch, self.solver), self.steps))
        return calls * self.trajectories * rows_per_sample(self.cfg_scale(round_index)) * (1 + self.renoised)

    def rounds(self, arch: Architecture) -> Iterator[range]:
        """The steps of every round."""
        start, index = 0, 0
        while start < self.distill.steps:
            stop = start + max(1, self.rows(arch, index) * self.reuse // self.distill.batch)
            yield range(start, min(stop, self.distill.steps))
            start, index = stop, index + 1

    def flops(self, arch: Architecture, settings: MediatorSettings) -> float:
        """FLOPs of all states and steps; a backward counts as two forwards."""
        forward = cost.forward_flops(arch)
        per_level = [cost.forward_flops(arch, level, settings) for level in settings.levels]
        # a step in four at the smallest, one at the largest, two at drawn ones
        student = (per_level[0] + per_level[-1] + 2 * sum(per_level) / len(per_level)) / 4
        features = forward if self.distill.feature_weight else 0
        rows = self.distill.steps * self.distill.batch
        steps = rows * (forward / self.reuse + features + (4 if self.distill.checkpointing else 3) * student)
        if self.weighting == "even":
            return steps
        probes = EFFECTS_SAMPLES * len(call_times(find_solver(arch, self.solver), self.steps)) * rows_per_sample(self.cfg_scale(0))
        return steps + probes * (5 * forward + sum(per_level))  # sampled, run again and walked back, compared


@dataclass(frozen=True)
class Finetuning:
    """What `finetune` did, or with `dry_run` would do."""

    path: Path
    plan: Plan
    arch: Architecture
    trained_parameters: int
    notes: tuple[str, ...] = ()
    before: dict[Any, float] | None = None
    """Relative error of the model's output on held-out trajectories of the teacher, by level."""
    after: dict[Any, float] | None = None
    seconds: float = 0.0
    resumed_at: int = 0
    estimated_seconds: float | None = None
    peak_bytes: dict[int, int] | None = None
    """Of a dry run: memory by batch size."""

    def to_json(self) -> dict[str, Any]:
        return {
            "bundle": str(self.path),
            "dry_run": self.estimated_seconds is not None,
            "trained_parameters": self.trained_parameters,
            "plan": asdict(self.plan),
            "before": self.before,
            "after": self.after,
            "seconds": round(self.seconds, 1),
            "resumed_at": self.resumed_at,
            "estimated_seconds": self.estimated_seconds,
            "peak_bytes": self.peak_bytes,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        plan, distill = self.plan, self.plan.distill
        guidance = ", ".join(f"{scale:g}" for scale in plan.cfg_scales)
        source = plan.data or f"its own trajectories ({plan.solver}, {plan.steps} steps, guidance {guidance})"
        lines = [
            f"{self.path}: {distill.steps} steps of {distill.batch} states of {source}; "
            f"{self.trained_parameters / 1e6:.2f}M parameters train",
            *(f"  {note}" for note in self.notes),
        ]
        if self.estimated_seconds is not None and self.peak_bytes is not None:
            lines.append(f"Would take about {seconds_in_words(self.estimated_seconds)} at this device's rate; nothing was done.")
            rows = [(str(batch), f"{size / 2**30:.2f}") for batch, size in self.peak_bytes.items()]
            lines.append(text_table(("states at a time", "GiB at most"), rows))
            return "\n".join(lines)
        assert self.before is not None and self.after is not None
        errors = [(f"m={level}", f"{self.before[level]:.4f}", f"{self.after[level]:.4f}") for level in self.after]
        lines.append(text_table(("all layers at", "error before", "after"), errors))
        lines.append("Errors are |student - teacher| / |teacher| of the model's output on held-out trajectories of the teacher.")
        resumed = f" (went on from step {self.resumed_at})" if self.resumed_at else ""
        kept = "Level softmax moved with the rest (--train all)." if distill.train == "all" else "Level softmax is as it was, bit for bit."
        lines.append(f"Took {seconds_in_words(self.seconds)}{resumed}. {kept}")
        return "\n".join(lines)


def finetune(
    model: Annotated[Path, Option("the bundle to train; it is replaced when training is done")],
    *,
    train_steps: Annotated[int, Option("steps of training")] = DistillSettings.steps,
    batch: Annotated[int, Option("states per step, over all processes")] = DistillSettings.batch,
    learning_rate: Annotated[
        float, Option("peak rate, for a width of 128; wider models take it in proportion")
    ] = DistillSettings.learning_rate,
    warmup: Annotated[int, Option("steps until the peak rate, at most a tenth of all")] = DistillSettings.warmup,
    ema: Annotated[float, Option("decay of averaged weights, such as 0.999; 0 keeps the last weights")] = DistillSettings.ema,
    feature_weight: Annotated[float, Option("weight of matching every block's output")] = DistillSettings.feature_weight,
    data: DataOption = None,
    vae: VaeOption = None,
    data_weight: Annotated[float, Option("with --data: weight of the error against the data themselves, beside the teacher")] = 0.0,
    train: Annotated[Trained, Option("mediators, or all: then level softmax moves too")] = "mediators",
    accumulate: Annotated[int, Option("parts to take a batch in, where memory is short")] = DistillSettings.accumulate,
    checkpointing: Annotated[bool, Option("recompute activations in the backward pass, where memory is short")] = False,
    trajectories: Annotated[int, Option("samples of the teacher drawn at a time, whose states make a round")] = 32,
    reuse: Annotated[int, Option("how often a state is trained on before it is replaced")] = 1,
    renoised: Annotated[int, Option("for every state of a trajectory, states of its finished sample with new noise")] = 3,
    weighting: Annotated[
        Weighting, Option("sample: errors count by how far they move a sample, measured first at the first guidance; even: all alike")
    ] = "sample",
    solver: SolverOption = None,
    steps: StepsOption = None,
    cfg_scales: Annotated[tuple[float, ...], Option("guidance of the rounds, in turn; 1 is none")] = (1.5, 1.0, 4.0),
    cfg_channels: ChannelsOption = 3,
    save_every: Annotated[int, Option("steps between saves to resume from")] = 200,
    dtype: Annotated[
        str, Option("precision of the products: auto is bfloat16 on CUDA, else float32", choices=("auto", "float32", "bfloat16"))
    ] = "auto",
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dry_run: DryRunOption = False,
    force: ForceOption = False,
) -> Finetuning:
    """Trains what was added on the model's own softmax outputs along its trajectories. Resumes after a kill; runs under torchrun."""
    start = time.monotonic()
    if not bundle.is_bundle(model):
        raise UserError(f"{model}: is no bundle.", hint="Make one with `mediatorize convert CKPT OUT`.")
    config = bundle.read_config(model)
    arch = config.arch
    where = pick_device(device)
    precision = ("bfloat16" if where.type == "cuda" else "float32") if dtype == "auto" else dtype
    distill = DistillSettings(
        train_steps, batch, learning_rate, warmup, ema, feature_weight, data_weight, train, accumulate, checkpointing, seed=seed
    )
    name = solver or DEFAULT_SOLVER[arch.family]
    chosen = find_solver(arch, name)
    scales = tuple(dict.fromkeys(cfg_scales if arch.null_class else (1.0,)))
    plan = Plan(
        distill,
        trajectories,
        reuse,
        renoised,
        name,
        chosen.default_steps if steps is None else steps,
        scales,
        cfg_channels,
        precision,
        weighting,
    )
    _check_plan(plan, arch, save_every)
    if (vae or data_weight) and not data:
        raise UserError("--vae and --data-weight are for data, and there are none.", hint="Pass --data, or leave them out.")
    dataset = open_data(data, arch, vae, where) if data else None
    plan = replace(plan, data=dataset.facts() if dataset else None)

    loaded = bundle.load_bundle(model)
    trained = sum(p.numel() for p in (loaded.mediator_parameters().values() if train == "mediators" else loaded.parameters()))
    if dry_run:
        rate = measured_flops_per_second(where, arch.width, arch.tokens)
        peak = {size: _peak_bytes(plan, config, trained, size) for size in (1, 4, 16, 64)}
        seconds = plan.flops(arch, config.settings) / rate
        return Finetuning(model, plan, arch, trained, estimated_seconds=seconds, peak_bytes=peak)

    fingerprint = plan.fingerprint(bundle.hash_of_file(model / "model.safetensors"))
    with processes(where) as world:
        if config.finetuned is not None and {**config.finetuned["plan"], "start": fingerprint["start"]} == fingerprint and not force:
            raise UserError(f"{model}: was trained with these very settings.", hint="Pass --force to go on from there.")
        folder = _open_working_folder(model, fingerprint, force, world)
        return _train(model, folder, loaded, config, plan, dataset, fingerprint, world, save_every, trained, start)


def _train(
    path: Path,
    folder: Path,
    model: DiffusionTransformer,
    config: bundle.BundleConfig,
    plan: Plan,
    dataset: Latents | None,
    fingerprint: dict[str, Any],
    world: World,
    save_every: int,
    trained: int,
    start: float,
) -> Finetuning:
    arch, distill = config.arch, plan.distill
    model = model.to(world.device)
    model.schedule = None
    teacher = copy.deepcopy(model) if distill.train == "all" else model
    alone = World(0, 1, world.device)
    held_out = _targets(teacher, replace(plan, renoised=0), HELD_OUT_SAMPLES, HELD_OUT_SEED, plan.cfg_scale(0), alone)
    before = output_errors(model, held_out, distill.batch)
    effects = _effects(model, plan, world) if plan.weighting == "sample" else None
    distiller = Distiller(model, teacher, distill)
    state_file = folder / bundle.TRAINING_FILE
    first_loss: float | None = None
    if state_file.exists():
        state = torch.load(state_file, map_location=world.device, weights_only=True)
        distiller.load_state_dict(state["distiller"])
        first_loss = state["first_loss"]
    resumed_at = saved_at = distiller.step_count
    metrics = Metrics(folder, resumed_at) if world.is_first else None  # one process writes
    losses: list[torch.Tensor] = []
    with progress_bar(distill.steps, "distilling", initial=resumed_at) as bar:
        for index, span in enumerate(plan.rounds(arch)):
            todo = range(max(span.start, resumed_at), span.stop)
            if not todo:
                continue
            seed, scale = distill.seed + 1 + index, plan.cfg_scale(index)
            if dataset is None:
                states = _targets(teacher, plan, plan.trajectories, seed, scale, world)
            else:
                count = plan.rows(arch, index)
                states = data_targets(teacher, dataset, count, cfg_scale=scale, seed=seed, part=world.share(count)).map(world.gather)
            if effects is not None:
                states = replace(states, weight=effects.at(noise_level(arch, states.t)))
            sizes = mean_squares(states.output, arch.channels).to(world.device)
            for step in todo:
                rows = batch_rows(len(states), distill.batch, distill.seed, index, step - span.start)[world.share(distill.batch)]
                share = len(rows) / distill.batch
                with torch.autocast(world.device.type, torch.bfloat16, enabled=plan.dtype == "bfloat16"):
                    losses.append(distiller.step(states.at(rows), sizes, share, world.add_up) * share)
                bar.update()
                if (step + 1) % LOG_EVERY and step + 1 < distill.steps:
                    continue
                loss = torch.stack(losses).mean().reshape(1)
                losses = []
                world.add_up([loss])
                first_loss = float(loss) if first_loss is None else first_loss
                if not float(loss) < DIVERGED * first_loss:
                    raise UserError(
                        f"{path}: training diverged at step {step + 1} (loss {float(loss):.3g}, at first {first_loss:.3g}); the bundle "
                        f"is as it was, and the state of {saved_at} steps is in {state_file}.",
                        hint=f"Pass a smaller --learning-rate than {distill.learning_rate:g}, and --force to begin anew.",
                    )
                bar.set_postfix(loss=f"{float(loss):.4f}", rate=f"{distiller.rate:.1e}")
                if metrics is not None:
                    metrics.write(step + 1, float(loss), distiller.rate)
                    if step + 1 - saved_at >= save_every:
                        saved_at = step + 1
                        state = {"distiller": distiller.state_dict(), "first_loss": first_loss}
                        write_beside(state_file, lambda file, state=state: torch.save(state, file))
    distiller.finish()
    after = output_errors(model, held_out, distill.batch)
    notes = ("its schedule was made for the weights before; calibrate again",) if (path / "schedule.json").exists() else ()
    result = Finetuning(path, plan, arch, trained, notes, before, after, time.monotonic() - start, resumed_at)
    if world.is_first:
        summary = {"plan": fingerprint, "before": before, "after": after}
        finished = replace(config, finetuned=summary)
        bundle.write_bundle(folder, model.cpu(), finished, model_card(finished))
        shutil.copy(path / bundle.LOG_FILE, folder / bundle.LOG_FILE)
        bundle.append_log(folder, "finetune", fingerprint, result.to_json())
        bundle.commit(folder, path)
    world.barrier()
    return result


def batch_rows(states: int, batch: int, seed: int, round_index: int, step: int) -> torch.Tensor:
    """Which of a round's states a step trains on: (batch,); every state once in each pass over them, in an order of its own."""
    places = torch.arange(step * batch, (step + 1) * batch)
    rows = []
    for sweep in sorted(set((places // states).tolist())):
        mixed = torch.Generator().manual_seed((seed * 1_000_003 + round_index) * 1_009 + sweep)
        order = torch.randperm(states, generator=mixed)
        rows.append(order[places[places // states == sweep] % states])
    return torch.cat(rows)


def _targets(teacher: DiffusionTransformer, plan: Plan, samples: int, seed: int, cfg_scale: float, world: World) -> Targets:
    """States and answers of the teacher along `samples` trajectories, and at what they end in noised anew.

    Every process samples its share, all get all.
    """
    labels = torch.randint(0, teacher.arch.classes, (samples,), generator=torch.Generator().manual_seed(seed))
    mine = world.share(samples)
    own, finished = teacher_targets(
        teacher,
        labels[mine],
        solver=plan.solver,
        steps=plan.steps,
        cfg_scale=cfg_scale,
        cfg_channels=plan.cfg_channels,
        seed=seed,
        first_index=mine.start,
    )
    path = own.map(world.gather)
    if not plan.renoised:
        return path
    ends = Samples(world.gather(finished.x), world.gather(finished.y))
    count = plan.renoised * len(path)
    again = data_targets(teacher, ends, count, cfg_scale=cfg_scale, seed=seed, part=world.share(count)).map(world.gather)
    joined = (torch.cat([getattr(path, name), getattr(again, name)]) for name in ("x", "t", "y", "output"))
    return Targets(*joined)


def _effects(model: DiffusionTransformer, plan: Plan, world: World) -> Effects:
    """How far errors move samples, by noise level; of the weights as they are before training, at the first guidance."""
    arch, distill = model.arch, plan.distill
    assert model.settings is not None
    solver = find_solver(arch, plan.solver)
    times, noise_levels = call_times(solver, plan.steps), call_noise_levels(arch, solver, plan.steps)
    sampler = Sampler(plan.solver, plan.steps, plan.cfg_scale(0), plan.cfg_channels, EFFECTS_SEED)
    batch = max(1, distill.batch // world.size // distill.accumulate // rows_per_sample(sampler.cfg_scale))
    with progress_bar(-(-EFFECTS_SAMPLES // batch) * len(times), "measuring what errors do", "call") as bar:
        probes = probe_all(model, EFFECTS_SAMPLES, sampler, 1, batch, lambda: bar.update())
        return effects_on_samples(model, sampler, probes, times, noise_levels, model.settings.levels, batch)


class Metrics:
    """Loss and rate by step: JSON lines, and TensorBoard where it is installed."""

    def __init__(self, folder: Path, resumed_at: int) -> None:
        self.file = folder / METRICS_FILE
        before = self.file.read_text().splitlines() if self.file.exists() else []
        kept = [line for line in before if json.loads(line)["step"] <= resumed_at]
        write_beside(self.file, lambda file: file.write_text("".join(f"{line}\n" for line in kept)))
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.board: Any = None
        else:
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_at)

    def write(self, step: int, loss: float, rate: float) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step, "loss": loss, "learning_rate": rate}) + "\n")
        if self.board is not None:
            self.board.add_scalar("loss", loss, step)
            self.board.add_scalar("learning rate", rate, step)


def _check_plan(plan: Plan, arch: Architecture, save_every: int) -> None:
    solver, distill = find_solver(arch, plan.solver), plan.distill
    if solver.adaptive:
        raise UserError(f"{plan.solver} takes as many steps as it needs; rounds need a fixed number.", hint="Pass --solver euler.")
    refuse_steps(solver, plan.steps)
    counts = {"train-steps": distill.steps, "batch": distill.batch, "accumulate": distill.accumulate, "save-every": save_every}
    refuse_below({**counts, "trajectories": plan.trajectories, "reuse": plan.reuse}, 1)
    refuse_below({"seed": distill.seed, "warmup": distill.warmup, "renoised": plan.renoised}, 0)
    if not distill.learning_rate > 0:
        raise UserError(f"A learning rate of {distill.learning_rate} trains nothing.", hint="Pass for instance 1e-3.")
    if not 0 <= distill.ema < 1:
        raise UserError(f"--ema {distill.ema} is no decay.", hint="Pass for instance 0.999, or 0 for none.")
    if distill.feature_weight < 0:
        raise UserError(f"--feature-weight {distill.feature_weight} is negative.", hint="Pass 0 to leave it out.")
    if not plan.cfg_scales:
        raise UserError("No guidance was given.", hint="Pass for instance --cfg-scales 1.0,1.5.")


def _open_working_folder(path: Path, fingerprint: dict[str, Any], force: bool, world: World) -> Path:
    """Where training keeps its state: a new folder, or an unfinished one of the same plan."""
    folder = bundle.beside(path, "finetune")
    plan_file = folder / bundle.PLAN_FILE
    same = plan_file.exists() and json.loads(plan_file.read_text()) == fingerprint
    world.barrier()
    if same:
        return folder
    if plan_file.exists() and not force:
        raise UserError(
            f"{folder}: an unfinished fine-tuning with other settings or weights.", hint="Repeat its command, or pass --force to drop it."
        )
    if world.is_first:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        bundle.write_json(plan_file, fingerprint)
    world.barrier()
    return folder


def _peak_bytes(plan: Plan, config: bundle.BundleConfig, trained: int, batch: int) -> int:
    """Weights, what the optimiser keeps (gradient, momentum and, at most, a second moment), and activations of `batch` states."""
    copies = 2 if plan.distill.train == "all" else 1
    weights = 4 * copies * count_parameters(config.arch, config.settings)
    return weights + (16 if plan.distill.ema else 12) * trained + saved_bytes(config.arch, config.settings, plan.distill, batch)
