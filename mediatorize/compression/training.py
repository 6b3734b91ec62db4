"""Training: the plan, its rounds of states, the weights of their errors, and the loop over rounds. One step is in `distill`.

A round is a set of states with the teacher's outputs. Every state of a round is used `reuse` times; then the next round is drawn. Without a
teacher there are no rounds: every step noises items of the data anew.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mediatorize.compression.distill import Distiller, mean_squares, optimizer_bytes, output_errors, saved_bytes
from mediatorize.compression.records import DistillSettings, Errors, Weighting
from mediatorize.compression.sensitivity import Effects, effects_on_samples, probe_all
from mediatorize.compression.trajectories import DataSet, Samples, Targets, data_targets, teacher_targets, training_states
from mediatorize.devices import World
from mediatorize.diffusion.process import process_of
from mediatorize.diffusion.sampling import Channels, Sampler
from mediatorize.errors import UserError, refuse_below
from mediatorize.model import cost
from mediatorize.model.architecture import Architecture
from mediatorize.model.levels import SOFTMAX, MediatorSettings, in_order
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.randomness import generator, seed_for

LOG_EVERY = 20
"""Steps between reports of the loss, each a mean over them."""

DIVERGED = 4.0
"""A mean loss this many times the first one stops the training."""

HELD_OUT_SAMPLES = 16
"""Samples whose whole trajectories say how far the model is from its teacher; training never sees them."""

EFFECTS_SAMPLES = 16
"""Trajectories of the teacher on which it is measured how far errors move a sample."""

State = Mapping[str, Any]
"""What a training goes on from: `distiller` is a `Distiller.state_dict`, `first_loss` and `loss` are the first and the last mean loss.
`torch.save` keeps it."""


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a training will do; the same plan on the same model gives the same weights. Made by `resolve`, which checks it."""

    distill: DistillSettings
    trajectories: int
    """Samples drawn at a time; all their states make a round."""
    reuse: int
    """How often every state of a round is used."""
    renoised: int
    """Extra states per state of a trajectory: its finished sample with new noise. They vary more than states of one trajectory."""
    solver: str
    steps: int
    """Steps of the solver."""
    cfg_scales: tuple[float, ...]
    """A round's guidance is one of these, in turn."""
    cfg_channels: Channels
    dtype: Literal["float32", "bfloat16"]
    """Precision of the products; weights are in float32."""
    weighting: Weighting
    """`sample`: squared errors weigh by how far they move the sample (by its square, few states carry the gradient). `even`: equally."""
    data: Mapping[str, Any] | None = None
    """Facts of the data that states are made from, for `to_json`; None means the teacher's own trajectories."""

    @classmethod
    def resolve(
        cls,
        arch: Architecture,
        *,
        distill: DistillSettings | None = None,
        trajectories: int = 32,
        reuse: int = 1,
        renoised: int = 3,
        solver: str | None = None,
        steps: int | None = None,
        cfg_scales: tuple[float, ...] = (1.5, 1.0, 4.0),
        cfg_channels: Channels = 3,
        dtype: Literal["float32", "bfloat16"] = "float32",
        weighting: Weighting = "sample",
        data: Mapping[str, Any] | None = None,
    ) -> TrainingPlan:
        """A plan for models of that architecture, its defaults filled in.

        Args:
            solver: a name in `SOLVERS`; None takes the default of the model's process.
            steps: of the solver; None takes the solver's default.

        Raises:
            UserError: the model cannot be sampled so, or a number is out of its range.
        """
        distill = distill or DistillSettings()
        _refuse_settings(distill, trajectories=trajectories, reuse=reuse, renoised=renoised)
        if distill.teacher == "none":  # nothing is sampled, and no error is weighed
            _refuse_without_teacher(arch, distill)
            cfg_scales, weighting = (1.0,), "even"
        scales = tuple(dict.fromkeys(cfg_scales))
        if not scales:
            raise UserError("No guidance was given.", hint="Pass for instance --cfg-scales 1.0,1.5.")
        if scales != (1.0,) and not arch.null_class:
            raise UserError("This model has no null class, which guidance needs.", hint="Pass --cfg-scales 1.")
        sampler = Sampler.resolve(
            arch, solver=solver, steps=steps, cfg_scale=scales[0], cfg_channels=cfg_channels, seed=distill.seed, fixed_for="rounds need"
        )
        return cls(
            distill=distill,
            trajectories=trajectories,
            reuse=reuse,
            renoised=renoised,
            solver=sampler.solver,
            steps=sampler.steps,
            cfg_scales=scales,
            cfg_channels=cfg_channels,
            dtype=dtype,
            weighting=weighting,
            data=data,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"cfg_scales": list(self.cfg_scales)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> TrainingPlan:
        """A plan from `to_json` or from a fingerprint, whose `start` is left out."""
        own = {name: value for name, value in fields.items() if name != "start"}
        read = {"distill": DistillSettings.from_json(own["distill"]), "cfg_scales": tuple(own["cfg_scales"])}
        return cls(**{**own, **read})

    def fingerprint(self, start: str) -> dict[str, Any]:
        """Everything that the result depends on, as JSON keeps it; `start` is a hash of the weights before."""
        return json.loads(json.dumps({**self.to_json(), "start": start}))

    def sampler(self, round_index: int) -> Sampler:
        """How the trajectories of a round are sampled."""
        return Sampler(
            solver=self.solver,
            steps=self.steps,
            cfg_scale=self.cfg_scales[round_index % len(self.cfg_scales)],
            cfg_channels=self.cfg_channels,
            seed=seed_for(self.distill.seed, "round", round_index),
        )

    def first_sampler(self, purpose: str) -> Sampler:
        """The same at the first guidance, for samples that no round has: a purpose in `randomness.PURPOSES`."""
        return replace(self.sampler(0), seed=seed_for(self.distill.seed, purpose))

    def rows(self, round_index: int) -> int:
        """States of a round."""
        sampler = self.sampler(round_index)
        return len(sampler.times()) * self.trajectories * sampler.rows * (1 + self.renoised)

    def rounds(self) -> Iterator[range]:
        """The steps of every round."""
        start, index = 0, 0
        while start < self.distill.steps:
            stop = start + max(1, self.rows(index) * self.reuse // self.distill.batch)
            yield range(start, min(stop, self.distill.steps))
            start, index = stop, index + 1

    def effects_batch(self, processes: int = 1) -> int:
        """Trajectories at a time on which effects are measured: as many states as a step takes."""
        return max(1, self.distill.batch // processes // self.distill.accumulate // self.sampler(0).rows)

    def effects_calls(self, processes: int = 1) -> int:
        """Calls of the model that the solver makes while effects are measured."""
        return -(-EFFECTS_SAMPLES // self.effects_batch(processes)) * len(self.sampler(0).times())

    def trained_parameters(self, arch: Architecture, settings: MediatorSettings) -> int:
        return cost.added_parameters(arch, settings) if self.distill.train == "mediators" else cost.count_parameters(arch, settings)

    def flops(self, arch: Architecture, settings: MediatorSettings) -> float:
        """FLOPs of all states and steps, and of errors on held-out trajectories before and after; a backward counts as two forwards."""
        forward = cost.forward_flops(arch)
        per_level = [cost.forward_flops(arch, level, settings) for level in in_order(self.distill.levels) or settings.levels]
        rows = self.distill.steps * self.distill.batch
        passes = 4 if self.distill.checkpointing else 3
        if self.distill.teacher == "none":
            return rows * passes * sum(per_level) / len(per_level)
        # a step in four at the smallest, one at the largest, two at drawn ones
        student = (per_level[0] + per_level[-1] + 2 * sum(per_level) / len(per_level)) / 4
        features = forward if self.distill.feature_weight else 0
        steps = rows * (forward / self.reuse + features + passes * student)
        first = self.sampler(0)
        calls = len(first.times()) * first.rows
        all_levels = [cost.forward_flops(arch, level, settings) for level in settings.levels]
        judged = HELD_OUT_SAMPLES * calls * (forward + 2 * sum(all_levels))
        if self.weighting == "even":
            return steps + judged
        return steps + judged + EFFECTS_SAMPLES * calls * (5 * forward + sum(per_level))  # sampled, run again and walked back, compared

    def peak_bytes(self, arch: Architecture, settings: MediatorSettings, batch: int) -> int:
        """Weights, gradients, what the optimiser keeps, and activations of `batch` states."""
        copies = 2 if self.distill.train == "all" and self.distill.teacher != "none" else 1
        weights = 4 * copies * cost.count_parameters(arch, settings)
        return weights + optimizer_bytes(arch, settings, self.distill) + saved_bytes(arch, settings, self.distill, batch)


def _refuse_settings(distill: DistillSettings, *, trajectories: int, reuse: int, renoised: int) -> None:
    """Refuses numbers out of their range, by the names that `mediatorize finetune` gives them."""
    refuse_below({"train-steps": distill.steps, "batch": distill.batch, "accumulate": distill.accumulate}, 1)
    refuse_below({"trajectories": trajectories, "reuse": reuse}, 1)
    refuse_below({"seed": distill.seed, "warmup": distill.warmup, "renoised": renoised}, 0)
    if not distill.learning_rate > 0:
        raise UserError(f"A learning rate of {distill.learning_rate} trains nothing.", hint="Pass for instance 1e-3.")
    if not 0 <= distill.ema < 1:
        raise UserError(f"--ema {distill.ema} is no decay.", hint="Pass for instance 0.999, or 0 for none.")
    for name in ("feature_weight", "data_weight", "clip"):
        if getattr(distill, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(distill, name)} is negative.", hint="Pass 0 to leave it out.")


def _refuse_without_teacher(arch: Architecture, distill: DistillSettings) -> None:
    """Refuses settings that leave nothing to learn where there is no teacher, or that are about one."""
    if not distill.data_weight:
        raise UserError("Without a teacher the data are all there is to learn from.", hint="Pass --data PATH --data-weight 1.")
    if distill.train != "all":
        raise UserError("Without a teacher the model itself is trained, and not its mediators alone.", hint="Pass --train all.")
    if distill.feature_weight:
        raise UserError("There is no teacher whose blocks --feature-weight could match.", hint="Leave it out.")
    if not 0 <= distill.label_dropout < 1:
        raise UserError(f"--label-dropout {distill.label_dropout} is no share of the labels.", hint="Pass for instance 0.1, or 0 for none.")
    if distill.label_dropout and not arch.null_class:
        raise UserError("This model has no null class that dropped labels could have.", hint="Pass --label-dropout 0.")


def refuse_untrainable_levels(distill: DistillSettings, settings: MediatorSettings) -> None:
    """Refuses levels to train that the model does not have, and softmax where it is the teacher."""
    for level in distill.levels:
        if level not in settings.all_levels:
            has = ", ".join(map(str, settings.all_levels))
            raise UserError(f"This model has no level {level} to train.", hint=f"Its --train-levels can be {has}.")
        if level == SOFTMAX and distill.teacher == "softmax":
            raise UserError("Level softmax is the teacher, and cannot learn from itself.", hint="Pass --teacher none, or other levels.")


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a training did to a model."""

    before: Errors
    """Relative error of the model's output on held-out trajectories of the teacher, by level of all layers; empty without a teacher."""
    after: Errors
    losses: tuple[float, float]
    """The first mean loss over `LOG_EVERY` steps, and the last."""
    resumed_at: int
    """Steps that were already done in the state that was passed in."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a dry run predicts about a training."""

    seconds: float
    peak_bytes: dict[int, int]
    """Memory by batch size."""


@dataclass(frozen=True, kw_only=True)
class Finetuning:
    """What `finetune` did, or with `dry_run` would do."""

    path: Path
    plan: TrainingPlan
    trained_parameters: int
    training: Training | None = None
    """None after a dry run."""
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    estimate: Estimate | None = None
    """After a dry run only."""


class DivergedError(UserError):
    """The loss rose to `DIVERGED` times the first one, or is not finite."""

    def __init__(self, step: int, loss: float, first_loss: float, saved_at: int, learning_rate: float) -> None:
        super().__init__(
            f"Training diverged at step {step} (loss {loss:.3g}, at first {first_loss:.3g}).",
            hint=f"Pass a smaller --learning-rate than {learning_rate:g}.",
        )
        self.saved_at = saved_at
        """Steps of the state that was saved last; 0 if none was."""


def train(
    model: DiffusionTransformer,
    plan: TrainingPlan,
    *,
    data: DataSet | None = None,
    effects: Effects | None = None,
    world: World | None = None,
    state: State | None = None,
    save: Callable[[State], object] | None = None,
    save_every: int = 200,
    on_step: Callable[[], object] | None = None,
    on_loss: Callable[[int, float, float], object] | None = None,
) -> Training:
    """Trains a converted model in place. Its schedule, which was made for the weights before, is taken away.

    Args:
        model: on the device where it is to be trained; eval mode.
        data: what states are made of, if not of the teacher's own trajectories; `plan.data` has its facts.
        effects: of this model and plan (`measured_effects`); None measures them, if the plan weighs errors by them.
        world: the processes that share the work; None is this one alone.
        state: what `save` was last given by an unfinished training of the same model and plan; it ends at the same weights, bit for bit.
        save: called by the first process with what a training goes on from, every `save_every` steps; the next step changes its tensors.
        on_step: called after every step.
        on_loss: called every `LOG_EVERY` steps and after the last with the steps done, their mean loss and the rate.

    Raises:
        DivergedError: the loss rose; the model is as the last step left it.
    """
    if (plan.data is not None or plan.distill.teacher == "none") and data is None:
        raise UserError("The plan is of data, and there are none.", hint="Pass them as `data`.")
    refuse_untrainable_levels(plan.distill, model.added())
    distill, world = plan.distill, world or World(0, 1, next(model.parameters()).device)
    model.schedule = None
    teacher, held_out, before = None, None, {}
    if distill.teacher != "none":
        teacher = copy.deepcopy(model) if distill.train == "all" else model
        held_out = trajectory_targets(teacher, plan.first_sampler("held-out training"), HELD_OUT_SAMPLES, 0, World(0, 1, world.device))
        before = output_errors(model, held_out, distill.batch)
    if effects is None and plan.weighting == "sample":
        effects = measured_effects(model, plan, world)
    distiller = Distiller(model, teacher, distill)
    first_loss: float | None = None
    loss = math.nan
    if state is not None:
        distiller.load_state_dict(state["distiller"])
        first_loss, loss = state["first_loss"], state["loss"]
    resumed_at = saved_at = distiller.step_count
    losses: list[Tensor] = []
    steps = _steps_on_data(distiller, data, world, plan.dtype) if teacher is None else _steps(distiller, plan, data, effects, world)
    for loss_of_step in steps:
        losses.append(loss_of_step)
        step = distiller.step_count
        if on_step is not None:
            on_step()
        if step % LOG_EVERY and step < distill.steps:
            continue
        loss = _mean(losses, world)
        losses = []
        first_loss = loss if first_loss is None else first_loss
        if not loss < DIVERGED * first_loss:
            raise DivergedError(step, loss, first_loss, saved_at, distill.learning_rate)
        if on_loss is not None:
            on_loss(step, loss, distiller.rate)
        if save is not None and step - saved_at >= save_every:
            saved_at = step
            if world.is_first:
                save({"distiller": distiller.state_dict(), "first_loss": first_loss, "loss": loss})
    distiller.finish()
    after = {} if held_out is None else output_errors(model, held_out, distill.batch)
    assert first_loss is not None, "a training has steps"
    return Training(before=before, after=after, losses=(first_loss, loss), resumed_at=resumed_at)


def _steps(distiller: Distiller, plan: TrainingPlan, data: DataSet | None, effects: Effects | None, world: World) -> Iterator[Tensor]:
    """Takes the steps that are left, and yields the share of each one's loss that this process's part of the batch has."""
    batch, seed, done = plan.distill.batch, plan.distill.seed, distiller.step_count
    for index, span in enumerate(plan.rounds()):
        todo = range(max(span.start, done), span.stop)
        if not todo:
            continue
        assert distiller.teacher is not None, "rounds are of a teacher's outputs"
        states = round_targets(distiller.teacher, plan, index, data, effects, world)
        sizes = mean_squares(states.output, distiller.model.arch.channels).to(world.device)
        for step in todo:
            rows = batch_rows(len(states), batch, seed, index, step - span.start)[world.share(batch)]
            share = len(rows) / batch
            with torch.autocast(world.device.type, torch.bfloat16, enabled=plan.dtype == "bfloat16"):
                loss = distiller.step(states.at(rows), sizes, share, world.add_up)
            yield loss * share


def _steps_on_data(distiller: Distiller, data: DataSet | None, world: World, dtype: str) -> Iterator[Tensor]:
    """The same without a teacher. A step reads this process's part of its batch alone."""
    assert data is not None, "without a teacher there are data"
    settings, arch, none = distiller.settings, distiller.model.arch, torch.ones(1, device=world.device)
    batch, seed = settings.batch, settings.seed
    mine = world.share(batch)
    for step in range(distiller.step_count, settings.steps):
        items = batch_rows(len(data), batch, seed, 0, step)[mine].tolist()
        places = range(step * batch, (step + 1) * batch)[mine]
        states = training_states(arch, data, items, places, step=step, label_dropout=settings.label_dropout, seed=seed)
        with torch.autocast(world.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = distiller.step(states, none, len(items) / batch, world.add_up)
        yield loss * (len(items) / batch)


def _mean(losses: list[Tensor], world: World) -> float:
    """The mean of steps' losses, of which every process has a share."""
    loss = torch.stack(losses).mean().reshape(1)
    world.add_up([loss])
    return float(loss)


def batch_rows(states: int, batch: int, seed: int, round_index: int, step: int) -> Tensor:
    """Which of a round's states a step trains on: (batch,); every state once in each pass over them, in an order of its own."""
    places = torch.arange(step * batch, (step + 1) * batch)
    sweeps = sorted(set((places // states).tolist()))
    return torch.cat([_order(states, seed, round_index, sweep)[places[places // states == sweep] % states] for sweep in sweeps])


@lru_cache(maxsize=2)
def _order(states: int, seed: int, round_index: int, sweep: int) -> Tensor:
    """One pass's order, drawn once for all of its steps: a data set has millions of items."""
    return torch.randperm(states, generator=generator(seed, "order", round_index, sweep))


def round_targets(
    teacher: DiffusionTransformer, plan: TrainingPlan, round_index: int, data: DataSet | None, effects: Effects | None, world: World
) -> Targets:
    """A round's states, the teacher's answers and, with `effects`, what each one's error counts.

    Every process makes its share of them, and gets all.
    """
    sampler = plan.sampler(round_index)
    if data is None:
        states = trajectory_targets(teacher, sampler, plan.trajectories, plan.renoised, world)
    else:
        states = noised_targets(teacher, data, plan.rows(round_index), sampler, world)
    if effects is None:
        return states
    return replace(states, weight=effects.at(process_of(teacher.arch).noise_level(states.t)))


def trajectory_targets(teacher: DiffusionTransformer, sampler: Sampler, samples: int, renoised: int, world: World) -> Targets:
    """States and answers of the teacher along `samples` trajectories and, `renoised` times as many, at what they end in noised anew."""
    labels = torch.randint(0, teacher.arch.classes, (samples,), generator=generator(sampler.seed, "states"))
    mine = world.share(samples)
    own, finished = teacher_targets(teacher, labels[mine], sampler, first_index=mine.start)
    path = own.map(world.gather)
    if not renoised:
        return path
    ends = Samples(world.gather(finished.x), world.gather(finished.y))
    again = noised_targets(teacher, ends, renoised * len(path), sampler, world)
    joined = (torch.cat([getattr(path, name), getattr(again, name)]) for name in ("x", "t", "y", "output"))
    return Targets(*joined)


def noised_targets(teacher: DiffusionTransformer, data: DataSet, count: int, sampler: Sampler, world: World) -> Targets:
    """`count` states of noised data and the teacher's answers; the sampler has their seed, and says whether labels are dropped."""
    part = world.share(count)
    return data_targets(teacher, data, count, cfg_scale=sampler.cfg_scale, seed=sampler.seed, part=part).map(world.gather)


def measured_effects(
    model: DiffusionTransformer, plan: TrainingPlan, world: World | None = None, on_call: Callable[[], object] | None = None
) -> Effects:
    """How far errors move samples, by noise level; of the weights as they are before training, at the first guidance.

    Args:
        on_call: called `plan.effects_calls(world.size)` times.
    """
    sampler, batch = plan.first_sampler("effects"), plan.effects_batch(world.size if world else 1)
    probes = probe_all(model, EFFECTS_SAMPLES, sampler, 1, batch, on_call)
    return effects_on_samples(model, sampler, probes, model.added().levels, batch)
