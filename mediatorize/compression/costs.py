"""The cost of a sampler, given its schedule. The unit is FLOPs, in closed form, or seconds, measured on this device.

Importing the table of costs does not import torch.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from mediatorize.errors import UserError
from mediatorize.model import cost
from mediatorize.model.levels import (
    FULL,
    OWN,
    SOFTMAX,
    Level,
    MediatorSettings,
    Parts,
    in_order,
    kind_of,
    layers_in_short,
    levels_per_layer,
    parts_of,
    title,
)
from mediatorize.model.schedule import AnySchedule, Levels, SwitchRule, calls_at, with_memory

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mediatorize.model.block import Block
    from mediatorize.model.transformer import DiffusionTransformer

TIMINGS = 5
"""A latency is the median of this many."""


@dataclass(frozen=True, kw_only=True)
class CallCosts:
    """The cost of a model call on one row, by what its blocks run."""

    rest: int | float
    """Of all that no level changes."""
    block: Callable[[Level], Any]
    """Of one block at a level."""
    attention: Callable[[Level], Any]
    """Of one attention layer alone, which runs beside softmax attention for later calls."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """The cost of a whole sampler, by its schedule. Whole numbers (FLOPs) are compared exactly."""

    call: CallCosts
    rows: tuple[int, ...]
    """Of every model call per sample: 2 where it is guided, else 1."""
    noise_levels: tuple[float, ...]
    """Of every model call."""
    depth: int
    settings: MediatorSettings
    """What was added to the model."""

    @property
    def softmax(self) -> Any:
        """Of the sampler with every layer at softmax."""
        return self.of(SOFTMAX)

    def of(self, schedule: AnySchedule | Level) -> Any:
        """Of the sampler by a schedule, or with one level throughout."""
        return self.of_calls(calls_at(schedule, self.noise_levels, self.depth, self.settings))

    def of_calls(self, calls: Sequence[Levels]) -> Any:
        total: Any = 0
        for levels, watched, rows in zip(*with_memory(calls, self.rows), self.rows, strict=True):
            beside = sum(self.call.attention(level) for layer in watched for level in layer)
            total += rows * (self.call.rest + sum(map(self.call.block, levels)) + beside)
        return total

    def by_rule(self, rule: SwitchRule, switches: Sequence[Sequence[int]], calls_per_step: int) -> float:
        """Of one sample, on average, by a step-wise rule.

        Args:
            switches: of every sample, as `Switcher` gives them.
        """
        total: Any = 0
        for begins, count in Counter(map(tuple, switches)).items():
            stages = rule.stages_of_calls(begins, len(self.rows), calls_per_step)
            calls = [tuple(levels_per_layer(rule.levels[stage], self.depth, self.settings)) for stage in stages]
            total += count * self.of_calls(calls)
        return float(total / len(switches))

    def share(self, schedule: AnySchedule | Level) -> float:
        """Of softmax's cost."""
        return float(self.of(schedule) / self.softmax)

    def least(self, kinds: Collection[str]) -> float:
        """The smallest share of softmax's cost that these kinds of stand-ins reach."""
        converted = len(self.settings.converted(self.depth))
        cheapest = min(self.call.block(level) for level in bare_levels(self.settings, kinds))
        one = self.call.rest + converted * cheapest + (self.depth - converted) * self.call.block(SOFTMAX)
        return float(sum(self.rows) * one / self.softmax)

    def room(self, share: float) -> Any:
        """What a sampler may cost to keep a share of softmax's cost."""
        whole = share * self.softmax
        return math.floor(whole) if isinstance(self.softmax, int) else whole


def flops_costs(model: DiffusionTransformer, settings: MediatorSettings, rows: int, batch: int) -> CallCosts:
    """FLOPs of one row, in closed form.

    Args:
        rows: of a guided model call per sample; of no account here.
        batch: samples at a time; of no account here.
    """
    arch = model.arch
    return CallCosts(
        rest=cost.forward_flops(arch) - arch.depth * cost.block_flops(arch, SOFTMAX, settings),
        block=cache(lambda level: cost.block_flops(arch, level, settings)),
        attention=cache(lambda level: cost.attention_flops(arch, level, settings)),
    )


def latency_costs(model: DiffusionTransformer, settings: MediatorSettings, rows: int, batch: int) -> CallCosts:
    """Seconds of one row of a batch, on the model's device and in its precision, memory traffic included.

    Every sub-layer is timed in every converted layer. Layers have one shape, so that their times differ by chance alone: the median over
    layers is taken, lest the solver choose by chance.
    """
    import torch

    arch, parameter = model.arch, next(model.parameters())
    count, converted = rows * batch, [model.layers()[layer] for layer in settings.converted(arch.depth)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        tokens = torch.randn(count, arch.tokens, arch.width, generator=generator).to(parameter)
        x = torch.randn(count, arch.channels, *arch.input_size, generator=generator).to(parameter)
        t, y = torch.full((count,), 0.5, device=x.device), torch.zeros(count, dtype=torch.long, device=x.device)

        def of_layers(run: Callable[[Block, Tensor], object]) -> float:
            return statistics.median(median_seconds(partial(run, block, tokens), tokens.device) for block in converted) / count

        def of_attention(level: Level) -> float:
            return of_layers(lambda block, tokens: block.attn(tokens, level))

        def of_mlp(level: Level) -> float:
            return of_layers(lambda block, tokens: block.run_mlp(tokens, level))

        attention = {level: of_attention(level) for level in settings.all_levels}
        mlp = {level: of_mlp(level) for level in (FULL, *settings.mlp_levels)}
        mlp[OWN] = mlp[FULL]
        whole = median_seconds(lambda: model(x, t, y), x.device) / count

    rest = max(0.0, whole - arch.depth * (attention[SOFTMAX] + mlp[FULL]))

    def of_block(level: Level) -> float:
        parts = parts_of(level)
        return attention[parts.attention] + mlp[parts.mlp]

    return CallCosts(rest=rest, block=of_block, attention=attention.__getitem__)


@dataclass(frozen=True)
class Unit:
    """A unit that budgets can have."""

    name: str
    """The unit's name in sentences: softmax's FLOPs."""
    measure: Callable[[DiffusionTransformer, MediatorSettings, int, int], CallCosts]
    """(model, settings, rows of a guided call per sample, batch) -> costs of one row."""
    prefix: str = ""
    """The prefix of schedule files for budgets in this unit."""
    timed: bool = False
    """Whether the chosen schedule is also timed end to end."""

    def schedule_name(self, share: float) -> str:
        """The file of the schedule for a budget: `0.80.json`, `latency-0.725.json`."""
        text = f"{share:.6f}".rstrip("0")
        return f"{self.prefix}{text.ljust(4, '0')}.json"


COSTS: dict[str, Unit] = {
    "flops": Unit("FLOPs", flops_costs),
    "latency": Unit("time", latency_costs, prefix="latency-", timed=True),
}
"""What can be budgeted, by name. To add one: a function that measures it, and an entry."""


def read_budget(given: float | str) -> float:
    """A share of the softmax sampler's cost, from 0.75 or 75%."""
    hint = "Pass a share such as 0.75 or 75%; --budgets takes several."
    try:
        share = float(given.removesuffix("%")) / 100 if isinstance(given, str) and given.endswith("%") else float(given)
    except ValueError:
        raise UserError(f"{given!r} is no budget.", hint=hint) from None
    if not 0 < share <= 1:
        raise UserError(f"{given} is no share of the softmax sampler's cost.", hint=hint)
    return round(share, 6)


KINDS_OF_SAVING = {
    "mediators": "layers that run at levels of mediators",
    "mlps": "narrow MLPs",
}
"""What a schedule may spend less by, by name."""


def bare_levels(settings: MediatorSettings, kinds: Collection[str]) -> list[Level]:
    """Levels of whole converted blocks, in the order of their rank: softmax last."""
    attention: tuple[Level, ...] = settings.all_levels if "mediators" in kinds else (SOFTMAX,)
    mlps: tuple[Level, ...] = settings.mlp_levels if "mlps" in kinds else ()
    narrow = [Parts(level, mlp).level for level in attention for mlp in mlps]
    return in_order([*narrow, *attention])


def read_kind(text: str) -> str:
    """A name in `KINDS_OF_SAVING`."""
    if text not in KINDS_OF_SAVING:
        raise UserError(f"{text!r} is no kind of saving.", hint=f"Choose among {', '.join(KINDS_OF_SAVING)}.")
    return text


def kinds_of(settings: MediatorSettings, wanted: Sequence[str] = ()) -> tuple[str, ...]:
    """Kinds of saving that a bundle has; of those that are wanted, an error where it does not have one."""
    there = tuple(kind for kind in KINDS_OF_SAVING if kind != "mlps" or settings.mlp_widths)
    if "mlps" in wanted and "mlps" not in there:
        raise UserError("This bundle has no narrow MLPs.", hint="Run `mediatorize convert` with --mlp-widths 8,4, or leave mlps out.")
    return tuple(kind for kind in there if not wanted or kind in wanted)


def refuse_out_of_reach(budget: float, costs: Costs, settings: MediatorSettings, unit: Unit, kinds: Collection[str]) -> None:
    """A budget below the cheapest schedule's cost: the message says what can be reached, and what would widen that."""
    least = costs.least(kinds)
    if budget >= least:
        return
    levels = ", ".join(title(level) for level in settings.levels)
    levels += "" if settings.layers is None else f" in layers {layers_in_short(settings.layers)}"
    fewest = min(kind_of(level).mediators(level) for level in settings.levels)
    smaller = "convert with smaller --levels, or " if fewest > 1 else ""
    raise UserError(
        f"can go down to {least:.1%} of softmax's {unit.name} with {', '.join(kinds)} and levels {levels}; you asked for {budget:.1%}.",
        hint=f"To go lower, {smaller}take fewer calls: leave --kinds out. Or ask for {math.ceil(least * 1000) / 10:.1f}%.",
    )


def median_seconds(call: Callable[[], object], device: torch.device, times: int = TIMINGS) -> float:
    """The median time of a call, after one to warm up."""
    from mediatorize.devices import seconds

    return statistics.median([seconds(call, device) for _ in range(times + 1)][1:])
