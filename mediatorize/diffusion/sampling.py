"""Sampling. A `Sampler` is resolved once for a model; then it gives samples, their cost and the model calls."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from mediatorize.diffusion.driver import Driver
from mediatorize.diffusion.plan import Plan, run_plan
from mediatorize.diffusion.planned import refuse_other_guidance, sample_by_plan
from mediatorize.diffusion.process import process_of
from mediatorize.diffusion.solvers import SOLVERS, Solver, find_solver, refuse_steps
from mediatorize.diffusion.switching import Switcher
from mediatorize.errors import UserError
from mediatorize.model import cost
from mediatorize.model.architecture import Architecture
from mediatorize.model.levels import SOFTMAX, Level, MediatorSettings, levels_per_layer
from mediatorize.model.schedule import AnySchedule, Levels, RuleSchedule, Schedule, SwitchRule, calls_at
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.randomness import gaussian


class Drive(Protocol):
    """Makes the model calls of one trajectory of a batch."""

    def look(self, x: Tensor) -> None:
        """Is shown the solver's state (b, c, h, w), in float32, before every model call."""

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """(x, t, labels) of a call, the guided batch in full -> the model's output."""


Channels = int | Literal["all"]
Interval = tuple[float, float]
EVERYWHERE: Interval = (0.0, 1.0)
"""Noise levels at which guidance holds, unless fewer are asked for."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How samples are made. Made by `resolve`, which checks it against a model."""

    solver: str
    steps: int
    cfg_scale: float = 1.0
    """Classifier-free guidance; 1 is none, and costs half."""
    cfg_channels: Channels = 3
    """How many channels are guided."""
    cfg_interval: Interval = EVERYWHERE
    """Noise levels from the lowest to the highest at which calls are guided (arXiv 2404.07724); the others cost half."""
    timestep_shift: float = 1.0
    """Warp of a flow's steps (`solvers.flow_times`): below 1 more of them are where there is noise; 1 is none."""
    seed: int = 0
    """Seed of the initial noise and of every step's noise."""

    @classmethod
    def resolve(
        cls,
        arch: Architecture,
        *,
        solver: str | None = None,
        steps: int | None = None,
        cfg_scale: float = 1.0,
        cfg_channels: Channels = 3,
        cfg_interval: Interval = EVERYWHERE,
        timestep_shift: float = 1.0,
        seed: int = 0,
        fixed_for: str = "",
    ) -> Sampler:
        """A sampler for models of that architecture, its defaults filled in.

        Args:
            solver: a name in `SOLVERS`; None takes the default of the model's process.
            steps: of the solver; None takes the solver's default.
            fixed_for: what needs a fixed number of steps, for the message if the solver has none; empty if nothing does.

        Raises:
            UserError: the solver is for another process or adaptive, or steps, guidance, channels, shift or seed cannot be.
        """
        name, chosen = find_solver(process_of(arch), solver)
        if fixed_for and chosen.adaptive:
            raise UserError(f"{name} takes as many steps as it needs; {fixed_for} a fixed number.", hint="Pass --solver euler.")
        steps = chosen.default_steps if steps is None else steps
        refuse_steps(chosen, steps)
        if seed < 0 or (cfg_channels != "all" and cfg_channels < 1):
            raise UserError(f"Seed {seed} or {cfg_channels} guided channels cannot be.", hint="Seeds are from 0, channels from 1 or all.")
        refuse_guidance(arch, cfg_scale)
        low, high = cfg_interval
        if not 0 <= low <= high <= 1:
            raise UserError(f"No noise level is in the interval {low:g},{high:g}.", hint="Pass --cfg-interval LOW,HIGH between 0 and 1.")
        if chosen.adaptive and cfg_interval != EVERYWHERE:
            raise UserError(f"{name} takes its steps by both halves of a guided call.", hint="Pass --solver euler with --cfg-interval.")
        if not 0 < timestep_shift < math.inf:
            raise UserError(f"A timestep shift of {timestep_shift:g} cannot be.", hint="Pass a number above 0; 1 is no shift.")
        if timestep_shift != 1 and not chosen.shifts:
            able = ", ".join(known for known, solver in SOLVERS.items() if solver.shifts)
            raise UserError(f"The steps of {name} cannot be shifted; those of {able} can.", hint="Leave --timestep-shift out.")
        return cls(
            solver=name,
            steps=steps,
            cfg_scale=cfg_scale,
            cfg_channels=cfg_channels,
            cfg_interval=(low, high),
            timestep_shift=timestep_shift,
            seed=seed,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"cfg_interval": list(self.cfg_interval)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Sampler:
        return cls(**{**fields, "cfg_interval": tuple(fields.get("cfg_interval", EVERYWHERE))})

    @property
    def how(self) -> Solver:
        return SOLVERS[self.solver]

    @property
    def rows(self) -> int:
        """Rows of a guided model call that one sample takes: guidance doubles them."""
        return 1 if self.cfg_scale == 1 else 2

    def rows_at(self, noise_level: float) -> int:
        """Rows of a model call at a noise level that one sample takes."""
        low, high = self.cfg_interval
        if self.cfg_interval == EVERYWHERE:  # adaptive solvers step a little beyond
            return self.rows
        return self.rows if low - SAME_PLACE <= noise_level <= high + SAME_PLACE else 1

    def run(self, predict: Callable[[Tensor, float], Tensor], x: Tensor, draw: Callable[[int], Tensor]) -> Tensor:
        """Runs the solver from a first state (b, c, h, w) to the last."""
        shift = {"shift": self.timestep_shift} if self.how.shifts else {}
        return self.how.run(predict, x, self.steps, draw, **shift)

    def times(self) -> list[float]:
        """The times at which the solver calls the model, by running it on nothing."""
        times: list[float] = []

        def record(x: Tensor, t: float) -> Tensor:
            times.append(t)
            return torch.zeros_like(x)

        self.run(record, torch.zeros(1, 1, 1, 1), lambda count: torch.zeros(1, 1, 1, 1))
        return times

    def noise_levels(self, arch: Architecture) -> list[float]:
        """The noise level in [0, 1] of every model call, as it is looked up in a schedule."""
        process = process_of(arch)
        return [float(process.noise_level(torch.tensor(process.own_time(t)))) for t in self.times()]

    def calls(self, arch: Architecture, schedule: AnySchedule | Level | None, settings: MediatorSettings | None) -> list[Levels]:
        """What each call of a model with these settings runs; the solver's steps must be fixed."""
        return calls_at(SOFTMAX if schedule is None else schedule, self.noise_levels(arch), arch.depth, settings)

    def rows_of_calls(self, arch: Architecture) -> list[int]:
        """Rows of every model call that one sample takes."""
        return [self.rows_at(noise_level) for noise_level in self.noise_levels(arch)]

    def flops(self, arch: Architecture, schedule: AnySchedule | Level | None, settings: MediatorSettings | None) -> float | None:
        """FLOPs of one sample, all calls and guidance included; None where an adaptive solver decides."""
        if self.how.adaptive:
            return None
        calls = self.calls(arch, schedule, settings)
        return float(cost.calls_flops(arch, calls, self.rows_of_calls(arch), settings))


@dataclass(frozen=True, kw_only=True)
class PlanSampler(Sampler):
    """A plan of guided outputs in a sampler's place, for what walks back through a sampler's calls."""

    plan: Plan

    @classmethod
    def of(cls, plan: Plan, seed: int) -> PlanSampler:
        """With initial noise of a seed."""
        guidance: dict[str, Any] = {name: getattr(plan, name) for name in ("cfg_scale", "cfg_channels", "cfg_interval")}
        return cls(solver="plan", steps=len(plan.calls), seed=seed, plan=plan, **guidance)

    def run(self, predict: Callable[[Tensor, float], Tensor], x: Tensor, draw: Callable[[int], Tensor]) -> Tensor:
        """From noise x (b, c, h, w); `predict` gives outputs with guidance applied."""
        guided = replace(self.plan, cfg_scale=1.0)
        return run_plan(guided, lambda x, t, uncond, levels: (predict(x, t)[:, : x.shape[1]], None), x)

    def times(self) -> list[float]:
        return [call.t for call in self.plan.calls]

    def rows_of_calls(self, arch: Architecture) -> list[int]:
        return list(self.plan.rows)


SAME_PLACE = 1e-6
"""Noise levels are in an interval that they miss by no more."""


def refuse_guidance(arch: Architecture, cfg_scale: float) -> None:
    """Guidance needs a null class."""
    if cfg_scale != 1 and not arch.null_class:
        raise UserError("This model has no null class, which guidance needs.", hint="Pass --cfg-scale 1.")


@dataclass(frozen=True)
class GuidedModel:
    """Connects a solver to its model: applies guidance, and converts to the checkpoint's own time, sign and precision.

    A solver's `predict(x, t)` is `output(model(*inputs(x, t)))`.
    """

    model: DiffusionTransformer
    labels: Tensor
    """(b,), on the model's device."""
    sampler: Sampler
    whole: bool = False
    """Whether the solver gets both halves of a guided batch. The originals' adaptive solvers choose their steps by both."""

    def guided_at(self, t: float) -> bool:
        """Whether the call at the solver's time is guided."""
        process = process_of(self.model.arch)
        return self.sampler.rows_at(float(process.noise_level(torch.tensor(process.own_time(t))))) == 2

    def inputs(self, x: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor]:
        """The model's x, t and labels; guided, the batch twice, conditional first."""
        labels = self.labels
        x = x[: len(labels)]
        if self.guided_at(t):
            x, labels = torch.cat([x, x]), torch.cat([labels, torch.full_like(labels, self.model.arch.classes)])
        times = torch.full((len(x),), process_of(self.model.arch).own_time(t), device=x.device, dtype=torch.float32)
        return x.to(next(self.model.parameters()).dtype), times, labels  # only the model is in low precision

    def output(self, output: Tensor) -> Tensor:
        """What the solver is told, in float32, of what the model said."""
        output, arch = output.float(), self.model.arch
        if len(output) > len(self.labels):
            channels = self.sampler.cfg_channels
            output = guide(output, self.sampler.cfg_scale, arch.channels if channels == "all" else min(channels, arch.channels))
            output = output if self.whole else output[: len(self.labels)]
        return process_of(arch).told_to_solver(output)


def sample(
    model: DiffusionTransformer,
    labels: Tensor | Sequence[int],
    *,
    plan: Plan | None = None,
    solver: str | None = None,
    steps: int | None = None,
    cfg_scale: float | None = None,
    cfg_channels: Channels = 3,
    cfg_interval: Interval = EVERYWHERE,
    timestep_shift: float = 1.0,
    noise: Tensor | None = None,
    seed: int = 0,
    schedule: AnySchedule | Level | None = None,
    first_index: int = 0,
    observe: Callable[[Tensor, Tensor, Tensor], Any] | None = None,
) -> Tensor:
    """Samples one batch.

    Args:
        labels: (b,) class labels.
        plan: calls and weights that were fitted (`mz.load_plan`, `mz.calibrate`), in place of a solver; it brings its own guidance.
        solver: a name in `SOLVERS`; `None` takes ddim (DiT) or euler (SiT).
        steps: of the solver; all but heun and dopri5 call the model once per step. `None` takes the solver's default.
        cfg_scale: classifier-free guidance; 1 is none, and costs half. `None` is the plan's, else 1.
        cfg_channels: how many channels are guided. DiT and SiT guide the first 3, whatever there are; REPA and diffusers all.
        cfg_interval: the lowest and the highest noise level (0 data, 1 noise) at which calls are guided; the others cost half.
        timestep_shift: warps the steps of euler, heun and unipc: below 1 there are more where there is noise. LightningDiT: 0.3.
        noise: the initial state (b, c, h, w); `None` draws it from `seed`.
        seed: of the initial and every step's noise; sample i of a batch has index `first_index` + i.
        schedule: a `Schedule` or `RuleSchedule`; one level for everything; or `None`: the model's own where it has one,
            else softmax.
        observe: called before every model call with its x, t and labels, the guided batch in full.

    Returns:
        Latents (b, c, h, w), on the model's device.
    """
    if plan is not None:
        if solver is not None or steps is not None or schedule is not None:
            raise UserError("A plan says which calls are made, and so do solver, steps and schedule.", hint="Pass one of them.")
        refuse_other_guidance(plan, cfg_scale, cfg_channels, cfg_interval, timestep_shift)
        labels, x = first_state(model, labels, seed, first_index, noise)
        return sample_by_plan(model, labels, plan, x, observe)
    guidance: dict[str, Any] = {"cfg_channels": cfg_channels, "cfg_interval": cfg_interval}
    guidance["cfg_scale"] = 1.0 if cfg_scale is None else cfg_scale
    sampler = Sampler.resolve(model.arch, solver=solver, steps=steps, timestep_shift=timestep_shift, seed=seed, **guidance)
    return sample_batch(model, labels, sampler, schedule, noise=noise, first_index=first_index, observe=observe)


@torch.no_grad()
def sample_batch(
    model: DiffusionTransformer,
    labels: Tensor | Sequence[int],
    sampler: Sampler,
    schedule: AnySchedule | Level | None = None,
    *,
    noise: Tensor | None = None,
    first_index: int = 0,
    observe: Callable[[Tensor, Tensor, Tensor], Any] | None = None,
    drive: Drive | None = None,
) -> Tensor:
    """`sample` with a resolved sampler.

    Args:
        drive: makes the model calls of this one trajectory, in place of a schedule.
    """
    labels, x = first_state(model, labels, sampler.seed, first_index, noise)
    draw = partial(draw_noise, sampler.seed, range(first_index, first_index + len(labels)), x.shape[1:], x.device)
    schedule = schedule if schedule is not None else model.schedule
    guided_model = GuidedModel(model, labels, sampler, whole=sampler.how.adaptive)
    call = driver_of(model, sampler, schedule, len(labels)) if drive is None else drive

    def predict(x: Tensor, t: float) -> Tensor:
        call.look(x)
        batch, times, batch_labels = guided_model.inputs(x, t)
        if observe is not None:
            observe(batch, times, batch_labels)
        return guided_model.output(call(batch, times, batch_labels))

    if sampler.rows == 2 and sampler.how.adaptive:
        x = torch.cat([x, x])  # the originals integrate both halves, and step sizes depend on both
    return sampler.run(predict, x, draw)[: len(labels)]


def driver_of(model: DiffusionTransformer, sampler: Sampler, schedule: AnySchedule | Level | None, batch: int) -> Drive:
    """What a solver's calls of the model go through, for one trajectory of a batch."""
    if isinstance(schedule, RuleSchedule):
        return switcher_of(schedule.rule, [model] * len(schedule.rule.levels), sampler, batch)
    if sampler.how.adaptive:
        return AtOnce(model, schedule)
    return Driver(model, sampler.calls(model.arch, schedule, model.settings), sampler.rows_of_calls(model.arch))


@dataclass(frozen=True)
class AtOnce:
    """Calls a model at the levels of a call's noise level, however many calls there are."""

    model: DiffusionTransformer
    schedule: Schedule | Level | None

    def look(self, x: Tensor) -> None:
        """A schedule does not go by the state."""

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        noise_level = float(process_of(self.model.arch).noise_level(t[0]))
        levels = self.schedule.at(noise_level) if isinstance(self.schedule, Schedule) else self.schedule
        return self.model(x, t, y, levels=SOFTMAX if levels is None else levels)


def switcher_of(rule: SwitchRule, models: Sequence[DiffusionTransformer], sampler: Sampler, batch: int) -> Switcher:
    """The step-wise rule along one trajectory of a batch.

    Args:
        models: of the stages, at their levels.

    Raises:
        UserError: the solver's steps are not fixed, or the models are not for the same latents.
    """
    if sampler.how.adaptive:
        raise UserError(f"{sampler.solver} takes as many steps as it needs; the rule needs fixed ones.", hint="Pass --solver sde.")
    sizes: dict[str, Any] = {"depth": 1, "width": 1, "heads": 1, "patch": 1, "grid": (1, 1), "mlp_width": 1, "mediators": 0}
    parts: dict[str, Any] = {"norm": "layer", "mlp": "gelu", "rotary": False, "qk_norm": False}
    same = {replace(model.arch, **sizes, **parts) for model in models}
    if len(same) > 1 or len({model.arch.input_size for model in models}) > 1:
        raise UserError("The checkpoints are not for the same latents, classes and process.", hint="Pass checkpoints of one kind.")
    return Switcher(rule, models, batch, sampler.how.calls_per_step)


def own_level(model: DiffusionTransformer) -> Level:
    """The level at which a model runs by itself: softmax, or that of its schedule.

    Raises:
        UserError: its schedule has several.
    """
    if model.schedule is None:
        return SOFTMAX
    for level in model.all_levels:
        if model.schedule == Schedule((), (tuple(levels_per_layer(level, model.arch.depth, model.settings)),)):
            return level
    raise UserError("A stage's own schedule has several levels, and the rule stands in its place.", hint="Pass --switch-levels.")


def flops_by_rule(rule: SwitchRule, models: Sequence[DiffusionTransformer], sampler: Sampler, switches: Tensor) -> int:
    """FLOPs of all samples that switched so.

    Args:
        models: of the stages.
        switches: as `Switcher` gives them (n, stages - 1).
    """
    one = [cost.forward_flops(model.arch, level, model.settings) for model, level in zip(models, rule.levels, strict=True)]
    rows = sampler.rows_of_calls(models[0].arch)
    total = 0
    for begins, count in Counter(map(tuple, switches.tolist())).items():
        stages = rule.stages_of_calls(begins, len(rows), sampler.how.calls_per_step)
        total += count * sum(own * one[stage] for own, stage in zip(rows, stages, strict=True))
    return total


def sample_part(
    model: DiffusionTransformer,
    labels: Tensor,
    sampler: Sampler,
    schedule: AnySchedule | Level | None,
    first_index: int,
    observe: Callable[[Tensor, Tensor, Tensor], Any] | None = None,
    drive: Drive | None = None,
) -> Tensor:
    """One batch, whose samples have indices from `first_index`, on the CPU in float32; refuses what is not finite."""
    return on_the_cpu(sample_batch(model, labels, sampler, schedule, first_index=first_index, observe=observe, drive=drive))


def sample_part_by_plan(model: DiffusionTransformer, labels: Tensor, plan: Plan, seed: int, first_index: int) -> Tensor:
    """`sample_part` by a plan."""
    labels, noise = first_state(model, labels, seed, first_index)
    return on_the_cpu(sample_by_plan(model, labels, plan, noise))


def on_the_cpu(latents: Tensor) -> Tensor:
    """Samples in float32; refuses what is not finite."""
    if not latents.isfinite().all():
        raise UserError("The samples are not finite.", hint="Try --dtype float32, more steps or less guidance.")
    return latents.float().cpu()


def sample_many_by_plan(
    model: DiffusionTransformer, labels: Tensor, plan: Plan, seed: int, batch: int, on_samples: Callable[[int], object] | None = None
) -> Tensor:
    """`sample_many` by a plan."""
    parts = []
    for first in range(0, len(labels), batch):
        parts.append(sample_part_by_plan(model, labels[first : first + batch], plan, seed, first))
        if on_samples is not None:
            on_samples(len(parts[-1]))
    return torch.cat(parts)


def sample_many(
    model: DiffusionTransformer,
    labels: Tensor,
    sampler: Sampler,
    schedule: AnySchedule | Level | None,
    batch: int,
    on_samples: Callable[[int], object] | None = None,
    drive_of: Callable[[int], Drive] | None = None,
    first_index: int = 0,
) -> Tensor:
    """Any number of samples, `batch` at a time, on the CPU in float32: (n, c, h, w).

    Args:
        on_samples: called with the number of samples after each batch.
        drive_of: makes what makes the model calls of a batch of so many samples, in place of a schedule.
        first_index: the number of the first sample, which its noise is a function of.
    """
    parts = []
    for first in range(0, len(labels), batch):
        part = labels[first : first + batch]
        drive = None if drive_of is None else drive_of(len(part))
        parts.append(sample_part(model, part, sampler, schedule, first_index + first, drive=drive))
        if on_samples is not None:
            on_samples(len(part))
    return torch.cat(parts)


def first_state(
    model: DiffusionTransformer, labels: Tensor | Sequence[int], seed: int, first_index: int = 0, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Labels (b,) and the initial noise (b, c, h, w), on the model's device; drawn, unless it is given, by (seed, index of the sample)."""
    arch, device = model.arch, next(model.parameters()).device
    labels = torch.as_tensor(labels, device=device)
    refuse_unknown_labels(arch, labels)
    shape = (arch.channels, *arch.input_size)
    if noise is None:
        noise = draw_noise(seed, range(first_index, first_index + len(labels)), shape, device, -1)
    if noise.shape != (len(labels), *shape):
        raise UserError(f"Noise of shape {list(noise.shape)} does not fit.", hint=f"It must be {[len(labels), *shape]}.")
    return labels, noise.to(device, torch.float32)


def draw_noise(seed: int, samples: Sequence[int], shape: Sequence[int], device: torch.device, count: int) -> Tensor:
    """Noise of a sampler's k-th step (len(samples), *shape) for `count` = k, or the initial state for -1."""
    if count < 0:
        return gaussian(seed, "initial noise", samples, shape).to(device)
    return gaussian(seed, "step noise", samples, shape, count).to(device)


def guide(output: Tensor, scale: float, channels: int) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598) of the first `channels` in both halves; the others stay as they are.

    (2b, c, h, w), conditional first, -> (2b, c, h, w)
    """
    conditional, unconditional = output[:, :channels].chunk(2)
    guided = unconditional + scale * (conditional - unconditional)
    return torch.cat([torch.cat([guided, guided]), output[:, channels:]], dim=1)


def refuse_unknown_labels(arch: Architecture, labels: Tensor) -> None:
    if labels.ndim != 1 or not len(labels) or labels.is_floating_point():
        raise UserError(
            f"Labels of shape {list(labels.shape)} and type {labels.dtype} are no batch of classes.", hint="Pass (b,) integers."
        )
    refuse_unknown_classes(arch, labels.tolist())


def refuse_unknown_classes(arch: Architecture, classes: Sequence[int]) -> None:
    highest = arch.classes if arch.null_class else arch.classes - 1
    if not 0 <= min(classes) <= max(classes) <= highest:
        raise UserError(f"Classes {sorted(set(classes))} are not all known.", hint=f"This model knows 0 to {arch.classes - 1}.")


def refuse_unknown_level(model: DiffusionTransformer, level: Level | None) -> None:
    """Refuses a level for the whole model that it does not have, or that a layer of a pruned model does not have."""
    known = (SOFTMAX,) if model.settings is None else model.settings.all_levels
    if level is not None and level not in known:
        raise UserError(f"This model has no level {level}.", hint=f"It has {', '.join(map(str, known))}.")
    if level is not None:
        levels_per_layer(level, model.arch.depth, model.settings)
