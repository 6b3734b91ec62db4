"""Samples by the step-wise rule of arXiv 2408.05710, section 3.3: few mediators first, more when the latents change less (`SwitchRule`).

Its original is `time_step_wise_adjusting/transport/integrators.py` of LeapLabTHU/Attention-Mediators, for its stochastic sampler and three
models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mediatorize.diffusion.driver import Model
from mediatorize.model.schedule import Measure, SwitchRule

CHANGES: dict[Measure, Callable[[Tensor], Tensor]] = {"mean-absolute": Tensor.abs, "mean-square": Tensor.square}
"""What is averaged of a change of the latents."""


class Switcher:
    """Runs the stages of a rule along one trajectory of a batch. A second trajectory needs a second switcher."""

    def __init__(self, rule: SwitchRule, models: Sequence[Model], batch: int, calls_per_step: int = 1) -> None:
        """
        Args:
            models: what each stage calls, at its level.
            batch: samples.
            calls_per_step: model calls in a step of the solver; the first one gets the latents that the step begins with.
        """
        self.rule, self.models, self.batch, self.calls_per_step = rule, models, batch, calls_per_step
        self.stage = torch.zeros(batch, dtype=torch.long)
        self.base = torch.zeros(batch, dtype=torch.float64)
        self.before: Tensor | None = None
        self.call = 0
        self.switches = torch.full((batch, len(rule.ratios)), -1)
        """The step, from 0, that each stage but the first began with, of every sample (b, stages - 1); -1: it never did."""

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
            rows = stage == index
            part = self.models[index](x[rows], t[rows], y[rows], levels=self.rule.levels[index])
            if output is None:
                output = part.new_empty(len(x), *part.shape[1:])
            output[rows] = part
        assert output is not None, "a batch has samples"
        return output

    def _begin_step(self, step: int, x: Tensor) -> None:
        """Looks at the latents that a step begins with, which the step before gave."""
        if step >= 2:
            assert self.before is not None, "the step before kept its latents"
            change = CHANGES[self.rule.measure](x - self.before).flatten(1).mean(1).cpu().double()  # (b,)
            change = change if self.rule.per == "sample" else change.mean().expand(self.batch)
            if step < self.rule.earliest:
                self.base = self.base + change / self.rule.first
            else:
                for index, ratio in enumerate(self.rule.ratios):
                    ends = (self.stage == index) & (change < ratio * self.base)
                    self.stage[ends] = index + 1
                    self.switches[ends, index] = step
        if step >= 1:
            self.before = x
