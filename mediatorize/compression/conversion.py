"""Conversion adds levels to a pretrained model and fits them layer by layer. This module has its plan, its cost and its result.

Importing this does not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mediatorize.compression.initialise import INITIALISERS, states_looked_at
from mediatorize.compression.records import FitSettings, LayerErrors
from mediatorize.errors import UserError
from mediatorize.model import cost
from mediatorize.model.architecture import Architecture, coarse_grid
from mediatorize.model.levels import SOFTMAX, Level, MediatorSettings, Parts, most_mediators, title
from mediatorize.version import VERSION

if TYPE_CHECKING:
    from mediatorize.compression.trajectories import States
    from mediatorize.devices import World
    from mediatorize.diffusion.sampling import Sampler
    from mediatorize.model.transformer import DiffusionTransformer
    from mediatorize.store import Store

JUDGED_STATES = 16
"""Where nothing is fitted: how many states errors are measured on."""

STATES_PER_TRAJECTORY = 12
"""Where nothing is fitted: how many states one sample gives, at most."""


class DataFacts(Protocol):
    """A dataclass that identifies a data set: different facts mean different data."""

    @property
    def encode_flops(self) -> int:
        """FLOPs of the VAE per item; 0 where there is none."""


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """What a conversion will do; the same plan on the same weights gives the same model."""

    arch: Architecture
    settings: MediatorSettings
    init: str
    """A name in `INITIALISERS`."""
    fit: FitSettings
    states: int
    trajectories: int
    """How many samples are drawn at a time to get the states."""
    sampler: Sampler
    data: DataFacts | None = None
    """The data that states are made from; None means the model's own trajectories."""
    random: bool = False
    """Whether the weights are random, to be trained from scratch: then nothing is sampled or fitted, and there are no states."""

    def fingerprint(self, weights_hash: str) -> dict[str, Any]:
        """Everything that the result depends on, as JSON keeps it."""
        fields = {
            "architecture": self.arch.to_json(),
            "mediators": self.settings.to_json(),
            "init": self.init,
            "fit": vars(self.fit),
            "states": [self.states, self.trajectories],
            "solver": list(vars(self.sampler).values()),
            "data": vars(self.data) if self.data else None,
            "weights": weights_hash,
            "version": VERSION,
        } | ({"random": True} if self.random else {})
        return json.loads(json.dumps(fields))

    def relative_flops(self) -> dict[Level, float]:
        """FLOPs of the whole model with every converted layer at one level, of softmax's."""
        softmax = cost.forward_flops(self.arch)
        return {level: cost.forward_flops(self.arch, level, self.settings) / softmax for level in self.settings.levels}

    def added_parameters(self) -> int:
        return cost.added_parameters(self.arch, self.settings)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are converted."""
        return self.settings.converted(self.arch.depth)

    @property
    def steps_per_layer(self) -> int:
        """Steps of progress: of the attention, and of the narrow MLPs where there are some."""
        return max(self.fit.steps, 1) * (2 if self.settings.mlp_widths else 1)

    def calls(self) -> int:
        """Model calls of sampling the teacher; none where there are data."""
        from mediatorize.compression.trajectories import batches_for

        if self.data or self.random:
            return 0
        calls = len(self.sampler.times())
        return calls * batches_for(self.states, calls, self.trajectories, self.sampler)

    def states_flops(self) -> int:
        """FLOPs of sampling the teacher, or of encoding pictures; latents and pixels on disk cost none."""
        if self.data:
            return self.states * self.data.encode_flops
        return self.calls() * self.trajectories * self.sampler.rows * cost.forward_flops(self.arch)

    def flops(self) -> int:
        """FLOPs of the conversion: states, the teacher's pass over them, and fitting (a backward counts as two forwards)."""
        arch, settings = self.arch, self.settings
        levels = sum(cost.attention_flops(arch, level, settings) for level in settings.levels)
        levels += sum(cost.mlp_flops(arch, Parts(SOFTMAX, level).level) for level in settings.mlp_levels)
        fitting = len(self.layers) * self.fit.steps * self.fit.batch * 3 * levels
        blocks = self.layers[-1] + 1 + len(self.layers)  # up to the last one that is fitted; those that are fitted run once more
        return self.states_flops() + blocks * self.states * cost.forward_flops(arch) // arch.depth + fitting

    def peak_bytes(self) -> int:
        """The model with its mediators, all states at one layer, and one step of fitting."""
        arch, added = self.arch, self.added_parameters()
        tokens = 4 * self.states * arch.tokens * arch.width
        row = 6 * arch.width + 4 * arch.heads * most_mediators(self.settings.levels) + arch.mlp_width
        step = 4 * self.fit.batch * arch.tokens * row
        return 4 * (cost.count_parameters(arch) + added) + 16 * added // len(self.layers) + 3 * tokens + step


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a conversion did, or would do."""

    out: Path
    plan: ConversionPlan
    notes: tuple[str, ...]
    """Assumptions and omissions, for the user to check."""
    errors: tuple[LayerErrors, ...] = ()
    seconds: float = 0.0
    estimated_seconds: float | None = None
    """After a dry run only: FLOPs divided by this device's measured rate."""
    estimated_bytes: int | None = None
    """After a dry run only: memory of the process, or of the GPU."""
    resumed_layers: int = 0


def states_needed(states: int, trajectories: int, init: str, fit: FitSettings, narrow: bool = False) -> tuple[int, int]:
    """How many of `states` a conversion looks at, and how many samples at a time give them.

    Where nothing is fitted, a few do: those that the initialiser and narrow MLPs look at, and those that errors are measured on.
    """
    if fit.steps:
        return states, trajectories
    states = min(states, JUDGED_STATES + states_looked_at(INITIALISERS[init], narrow))
    return states, min(trajectories, -(-states // STATES_PER_TRAJECTORY))


def check_plan(plan: ConversionPlan) -> tuple[str, ...]:
    """Notes on a plan; refuses one that cannot be, or that would save nothing."""
    arch, levels = plan.arch, plan.settings.levels
    rows, columns = coarse_grid(arch.grid)
    if (most := most_mediators(levels)) > rows * columns:
        raise UserError(f"{most} mediators do not fit {rows * columns} positions.", hint="Pass smaller --levels.")
    relative = plan.relative_flops()
    idle = [level for level, share in relative.items() if share >= 1]
    if len(idle) == len(relative):
        raise UserError(
            f"Nothing was converted: with {arch.tokens} tokens of width {arch.width} none of levels {', '.join(map(str, levels))} is "
            "cheaper than softmax.",
            hint="Pass smaller --levels or a smaller --local-rank.",
        )
    return tuple(f"level {title(level)} is no cheaper than softmax here ({relative[level]:.1%})" for level in idle)


def convert_model(
    model: DiffusionTransformer,
    states: States,
    settings: MediatorSettings,
    *,
    init: str = "cluster-queries",
    fit: FitSettings | None = None,
    store: Store | None = None,
    world: World | None = None,
    on_step: Callable[[], object] | None = None,
) -> list[LayerErrors]:
    """Gives the blocks of a pretrained model that `settings` name their added levels, in place, and fits them to the block's own attention.

    Args:
        states: what the layers are fitted and judged on: `teacher_states(model, ...)` or `data_states(...)`.
        init: a name in `INITIALISERS`.
        fit: None is the defaults.
        store: where fitted layers are kept, so that a second call with the same arguments goes on.
        world: the processes that share the layers, and a store of files; all get the whole model.
        on_step: called after every step of fitting.

    Returns:
        The errors of every converted layer, before and after fitting.
    """
    from mediatorize.compression.fit import fit_layers
    from mediatorize.devices import ALONE

    fit = FitSettings() if fit is None else fit
    model.add_mediators(settings, fit.seed)
    model.requires_grad_(False)
    return fit_layers(model, states, INITIALISERS[init], fit, store, world=world or ALONE, on_step=on_step)
