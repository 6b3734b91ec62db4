"""Judges models that have no teacher side by side: samples of each from the same noise, against data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mediatorize.devices import ALONE, World
from mediatorize.diffusion.plan import Plan
from mediatorize.diffusion.planned import plan_flops
from mediatorize.diffusion.sampling import Sampler, flops_by_rule, sample_part, sample_part_by_plan, switcher_of
from mediatorize.errors import UserError
from mediatorize.evaluation.comparison import Progress, Samples, features_of, no_progress
from mediatorize.evaluation.features import Extractor, Reference, judge
from mediatorize.evaluation.results import SideResult
from mediatorize.model.schedule import SwitchRule
from mediatorize.model.transformer import DiffusionTransformer


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A model as it runs by itself, at its schedule or else at softmax; by a plan; or several by the step-wise rule."""

    name: str
    models: tuple[DiffusionTransformer, ...]
    """One, or one for each stage of the rule."""
    samples: Samples
    """Of one row, whose name and levels are of no account."""
    rule: SwitchRule | None = None
    plan: Plan | None = None

    def draw(self, sampler: Sampler, world: World = ALONE, progress: Progress = no_progress) -> None:
        """Draws this process's share of the parts that are not there yet; each keeps what its samples cost, in FLOPs."""
        samples, (row,) = self.samples, self.samples.rows
        mine = samples.firsts()[world.rank :: world.size]
        with progress(sum(len(samples.labels_at(first)) for first in mine), f"sampling {self.name}", "sample") as bar:
            for first in mine:
                labels = samples.labels_at(first)
                if not samples.has(row, first):
                    x, flops = self._drawn(labels, sampler, first)
                    samples.write(row, first, x, flops=torch.full((len(labels),), flops, dtype=torch.float64))
                bar.update(len(labels))

    def _drawn(self, labels: Tensor, sampler: Sampler, first: int) -> tuple[Tensor, float]:
        """A batch of samples, and what one costs."""
        model = self.models[0]
        if self.plan is not None:
            return sample_part_by_plan(model, labels, self.plan, sampler.seed, first), plan_flops(model.arch, self.plan, model.settings)
        if self.rule is None:
            flops = sampler.flops(model.arch, model.schedule, model.settings)
            assert flops is not None, "the sampler was resolved for a fixed number of steps"
            return sample_part(model, labels, sampler, None, first), flops
        switcher = switcher_of(self.rule, self.models, sampler, len(labels))
        x = sample_part(model, labels, sampler, None, first, drive=switcher)
        return x, flops_by_rule(self.rule, self.models, sampler, switcher.switches) / len(labels)


def judge_side_by_side(
    contestants: Sequence[Contestant], extractor: Extractor, reference: Reference | None = None, progress: Progress = no_progress
) -> tuple[tuple[SideResult, ...], Reference]:
    """What features tell of each contestant's samples, which have been drawn, and what they were compared with.

    Args:
        reference: None takes the extractor's own.

    Raises:
        UserError: there is nothing to compare with.
    """
    if reference is None and extractor.own_reference is not None:
        reference = extractor.own_reference()
    if reference is None:
        raise UserError("Without a teacher there must be data to compare samples with.", hint="Pass --reference FILE.npz.")
    found: list[SideResult] = []
    for one in contestants:
        row = one.samples.rows[0]
        features, scores = features_of(one.samples, row, extractor, progress)
        flops = float(np.concatenate(list(one.samples.read(row, "flops"))).mean())
        quality = judge(features, scores, one.samples.labels.numpy(), reference)
        relative = flops / (found[0].flops if found else flops)
        found.append(SideResult(name=one.name, flops=flops, relative_flops=relative, **vars(quality)))
    return tuple(found), reference
