"""A model by a plan: how a plan calls a class-conditional model, and samples of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mediatorize.devices import ALONE, World
from mediatorize.diffusion.plan import Plan, run_plan
from mediatorize.diffusion.process import process_of
from mediatorize.errors import UserError
from mediatorize.model import cost
from mediatorize.model.architecture import Architecture
from mediatorize.model.levels import SOFTMAX, MediatorSettings, holds
from mediatorize.model.transformer import DiffusionTransformer


class ModelDenoiser:
    """Calls a class-conditional model, a batch of rows at a time, in its own precision; processes share the rows."""

    def __init__(
        self,
        model: DiffusionTransformer,
        labels: Tensor,
        batch: int = 64,
        world: World = ALONE,
        observe: Callable[[Tensor, Tensor, Tensor], object] | None = None,
    ) -> None:
        """
        Args:
            labels: (n,) classes; `rows` of a call are places in it.
            batch: rows of the model at a time; both halves of a guided call count.
            world: processes that all make the same calls; each computes its share.
            observe: called before every model call with its x, t and labels, both halves of a guided batch.
        """
        self.model, self.labels, self.batch, self.world, self.observe = model, labels, batch, world, observe
        self.process = process_of(model.arch)

    def __call__(self, x: Tensor, t: float, uncond: bool, levels: Any, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Outputs (b, c, h, w) of the conditional and of the unconditional half, float32, in the solver's terms.

        Args:
            x: (b, c, h, w); rows: (b,).
        """
        share = self.world.share(len(x))
        step = max(1, self.batch // (2 if uncond else 1))
        pairs = zip(x[share].split(step), rows[share].split(step), strict=True)
        parts = [self._halves(part, t, uncond, levels, own) for part, own in pairs]
        if self.world.size > 1:
            empty = x.new_zeros(0, 1 + uncond, *x.shape[1:])
            both = self.world.gather(torch.cat([empty, *parts])).to(x.device)
        else:
            both = torch.cat(parts)
        return both[:, 0], both[:, 1] if uncond else None

    def _halves(self, x: Tensor, t: float, uncond: bool, levels: Any, rows: Tensor) -> Tensor:
        """(b, halves, c, h, w)"""
        parameter, labels = next(self.model.parameters()), self.labels[rows.to(self.labels.device)]
        x, labels = x.to(parameter), labels.to(parameter.device)
        if uncond:
            x, labels = torch.cat([x, x]), torch.cat([labels, torch.full_like(labels, self.model.arch.classes)])
        times = torch.full((len(x),), self.process.own_time(t), device=x.device, dtype=torch.float32)
        if self.observe is not None:
            self.observe(x, times, labels)
        output = self.model(x, times, labels, levels=SOFTMAX if levels is None else levels)[:, : self.model.arch.channels]
        return self.process.told_to_solver(output.float()).unflatten(0, (1 + uncond, -1)).movedim(0, 1)


@torch.no_grad()
def sample_by_plan(
    model: DiffusionTransformer,
    labels: Tensor,
    plan: Plan,
    noise: Tensor,
    observe: Callable[[Tensor, Tensor, Tensor], object] | None = None,
) -> Tensor:
    """Samples (b, c, h, w) of one batch, float32, on the model's device.

    Args:
        labels: (b,); noise: (b, c, h, w).
        observe: as `ModelDenoiser` calls it.

    Raises:
        UserError: the plan is for another process or for other states.
    """
    refuse_other_plan(model.arch, plan)
    denoise, rows = ModelDenoiser(model, labels, 2 * len(labels), observe=observe), torch.arange(len(labels))

    def evaluate(x: Tensor, t: float, uncond: bool, levels: Any) -> tuple[Tensor, Tensor | None]:
        return denoise(x, t, uncond, levels, rows)

    return run_plan(plan, evaluate, noise)


def refuse_other_plan(arch: Architecture, plan: Plan) -> None:
    """Refuses a plan that is not for models of an architecture."""
    process, channels = process_of(arch).name, sum(map(len, plan.groups))
    if plan.process != process:
        raise UserError(f"The plan is for a process {plan.process!r}, and this model's is {process!r}.", hint="Calibrate this model.")
    if channels != arch.channels:
        raise UserError(f"The plan is for {channels} channels, and this model has {arch.channels}.", hint="Calibrate this model.")
    if any(holds(level) for call in plan.calls for level in call.levels or ()):
        raise UserError("The plan has levels with a held rest, and a plan's calls remember nothing.", hint="Calibrate this model.")
    if any(call.uncond for call in plan.calls) and not arch.null_class:
        raise UserError("The plan guides, and this model has no null class.", hint="Calibrate this model with --cfg-scale 1.")


def choose_plan(plans: Mapping[int, Plan], calls: int | None = None) -> Plan:
    """The plan of a number of calls, or the one of the most calls; refuses what is not there."""
    there = ", ".join(map(str, plans))
    if calls is not None and calls not in plans:
        hint = f"Run `mediatorize calibrate --calls {calls}`."
        raise UserError(f"There is no plan of {calls} calls; there are plans of {there}.", hint=hint)
    return plans[max(plans) if calls is None else calls]


def refuse_other_guidance(
    plan: Plan, cfg_scale: float | None, cfg_channels: int | str, cfg_interval: Sequence[float], timestep_shift: float
) -> None:
    """Refuses guidance or a shift that are neither the plan's own nor left at their defaults (None, 3, everywhere, 1)."""
    asked = {
        "cfg-scale": (cfg_scale, None, plan.cfg_scale),
        "cfg-channels": (cfg_channels, 3, plan.cfg_channels),
        "cfg-interval": (tuple(cfg_interval), (0.0, 1.0), plan.cfg_interval),
        "timestep-shift": (timestep_shift, 1.0, 1.0),
    }
    for name, (given, default, own) in asked.items():
        if given not in (default, own):
            there = f"The plan's {name} is {_as_option(own)}, not {_as_option(given)}."
            again = "leave --timestep-shift out" if name == "timestep-shift" else _again(plan, name, given)
            raise UserError(there, hint=f"{again[0].upper()}{again[1:]}.")


def _again(plan: Plan, name: str, given: object) -> str:
    return f"run `mediatorize calibrate --calls {len(plan.calls)} --{name} {_as_option(given)}`, or leave --{name} out"


def _as_option(value: object) -> str:
    return ",".join(f"{item:g}" for item in value) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)


def plan_flops(arch: Architecture, plan: Plan, settings: MediatorSettings | None) -> float:
    """FLOPs of one sample by a plan; those of the updates are not counted."""
    return float(
        sum(
            rows * cost.forward_flops(arch, SOFTMAX if call.levels is None else call.levels, settings)
            for rows, call in zip(plan.rows, plan.calls, strict=True)
        )
    )
