"""The step-wise rule of arXiv 2408.05710, section 3.3: few mediators first, more when the latents change less from step to step.

With x_i the latents after step i = 0, 1, ... and d_i the mean change from x_(i-1) to x_i, the base is the mean of d_1 .. d_first. From
i = first + 1 on, the next stage begins after the first step with d_i < ratio * base, and no stage comes back. One check may end two stages.
(`time_step_wise_adjusting/transport/integrators.py` of LeapLabTHU/Attention-Mediators, for its stochastic sampler and three models.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from mediatorize.diffusion.sampling import Sampler, refuse_unknown_level
from mediatorize.errors import UserError
from mediatorize.model.cost import forward_flops
from mediatorize.model.levels import SOFTMAX, Level
from mediatorize.model.transformer import DiffusionTransformer

MEASURES: dict[str, Callable[[Tensor], Tensor]] = {"mean-absolute": Tensor.abs, "mean-square": Tensor.square}
"""What is averaged of the change of the latents. The paper's choice is mean-absolute."""

Per = Literal["batch", "sample"]
"""Whether all samples of a batch switch together, by their mean change, as in the original; or each by its own."""


@dataclass(frozen=True)
class Stage:
    """What runs from one switch to the next."""

    model: DiffusionTransformer
    level: Level


@dataclass(frozen=True, kw_only=True)
class SwitchRule:
    """Stages in order, and when the next one begins."""

    stages: tuple[Stage, ...]
    ratios: tuple[float, ...]
    """Of every stage but the first: the change, as a share of the base, below which it begins."""
    first: int = 3
    """Changes that the base is the mean of."""
    measure: str = "mean-absolute"
    """A name in `MEASURES`."""
    per: Per = "batch"

    def __post_init__(self) -> None:
        if len(self.stages) != len(self.ratios) + 1:
            raise UserError(f"{len(self.ratios)} ratios do not switch between {len(self.stages)} stages.", hint="Pass one ratio fewer.")
        if any(before < after for before, after in pairwise(self.ratios)) or not all(ratio > 0 for ratio in self.ratios):
            raise UserError(f"Ratios {_listed(self.ratios)} do not descend above 0.", hint="Pass for instance --ratios 0.6,0.3.")
        if self.first < 1:
            raise UserError(f"The base cannot be of {self.first} changes.", hint="Pass --first 3.")
        archs = {
            replace(stage.model.arch, depth=1, width=1, heads=1, patch=1, grid=(1, 1), mlp_width=1, mediators=0) for stage in self.stages
        }
        if len(archs) > 1 or len({stage.model.arch.input_size for stage in self.stages}) > 1:
            raise UserError("The checkpoints are not for the same latents, classes and process.", hint="Pass checkpoints of one kind.")


class Switcher:
    """Runs the stages of a rule along one trajectory of a batch: `sample_batch(..., drive=switcher, before=switcher.look)`."""

    def __init__(self, rule: SwitchRule, sampler: Sampler, batch: int) -> None:
        if sampler.how.adaptive:
            raise UserError(f"{sampler.solver} takes as many steps as it needs; the rule needs fixed ones.", hint="Pass --solver sde.")
        self.rule, self.batch, self.calls_per_step = rule, batch, sampler.how.calls_per_step
        self.stage = torch.zeros(batch, dtype=torch.long)
        self.base = torch.zeros(batch, dtype=torch.float64)
        self.before: Tensor | None = None
        self.call = 0
        self.switches = torch.full((batch, len(rule.ratios)), -1)
        """The step, from 0, that each stage but the first began with, of every sample (b, stages - 1); -1: it never did."""
        self.flops = 0.0
        """Of all samples together so far."""

    def look(self, x: Tensor) -> None:
        """Looks at the solver's state (b, c, h, w) before every model call, and decides which stage makes it."""
        if self.call % self.calls_per_step == 0:
            self._begin_step(self.call // self.calls_per_step, x[: self.batch].float())
        self.call += 1

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The output (rows, ...) of the model call at hand: x (b or 2b, c, h, w), conditional first."""
        stage = self.stage.repeat(len(x) // self.batch).to(x.device)
        output: Tensor | None = None
        for index in self.stage.unique().tolist():
            rows, chosen = stage == index, self.rule.stages[index]
            part = chosen.model(x[rows], t[rows], y[rows], levels=chosen.level)
            self.flops += len(part) * forward_flops(chosen.model.arch, chosen.level, chosen.model.settings)
            if output is None:
                output = part.new_empty(len(x), *part.shape[1:])
            output[rows] = part
        assert output is not None, "a batch has samples"
        return output

    def _begin_step(self, step: int, x: Tensor) -> None:
        """Looks at the latents that a step begins with, which the step before gave."""
        if step >= 2:
            assert self.before is not None, "the step before kept its latents"
            change = MEASURES[self.rule.measure](x - self.before).flatten(1).mean(1).cpu().double()  # (b,)
            change = change if self.rule.per == "sample" else change.mean().expand(self.batch)
            if step - 1 <= self.rule.first:
                self.base = self.base + change / self.rule.first
            else:
                for index, ratio in enumerate(self.rule.ratios):
                    ends = (self.stage == index) & (change < ratio * self.base)
                    self.stage[ends] = index + 1
                    self.switches[ends, index] = step
        if step >= 1:
            self.before = x


def stages_of(model: DiffusionTransformer, levels: Sequence[Level] = (), others: Sequence[DiffusionTransformer] = ()) -> tuple[Stage, ...]:
    """Levels of one model (all that it has, if none are named), or several models' own attention."""
    if others:
        return tuple(Stage(each, SOFTMAX) for each in (model, *others))
    for level in levels:
        refuse_unknown_level(model, level)
    return tuple(Stage(model, level) for level in levels or model.all_levels)


def _listed(numbers: Sequence[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers)
