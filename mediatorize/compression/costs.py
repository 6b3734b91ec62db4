"""The cost of a sampler, given the levels of its layers. The unit is FLOPs, in closed form, or seconds, measured on this device.

Importing the table of costs does not import torch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mediatorize.compression.allocate import Choice, total
from mediatorize.errors import UserError
from mediatorize.model import cost
from mediatorize.model.levels import SOFTMAX, MediatorSettings, kind_of, title

if TYPE_CHECKING:
    import torch

    from mediatorize.model.transformer import DiffusionTransformer

TIMINGS = 5
"""A latency is the median of this many."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """The cost of a whole sampler, given the level of every layer in every cell (noise level)."""

    cells: NDArray[Any]
    """(cells, layers, options): the cost that depends on a layer's level. Whole numbers are compared exactly."""
    rest: int | float
    """The cost that no level changes."""
    softmax_option: int
    """The place of softmax among the options."""

    @property
    def softmax(self) -> Any:
        """Of the sampler with every layer at softmax."""
        return self.rest + self.cells[:, :, self.softmax_option].sum().item()

    @property
    def least(self) -> float:
        """The smallest share of softmax's cost that can be reached."""
        return float((self.rest + self.cells.min(2).sum().item()) / self.softmax)

    def of(self, choice: Choice) -> Any:
        return self.rest + total(self.cells, choice)

    def room(self, share: float) -> Any:
        """What the attention layers may cost for the whole to keep a share of softmax's cost."""
        whole = share * self.softmax
        return (math.floor(whole) if np.issubdtype(self.cells.dtype, np.integer) else whole) - self.rest


def flops_costs(model: DiffusionTransformer, settings: MediatorSettings, calls: Sequence[int], rows: int, batch: int) -> Costs:
    """FLOPs of one sample, in closed form.

    Args:
        calls: model calls of each cell.
        rows: of a model call per sample; guidance makes them two.
        batch: samples at a time; of no account here.
    """
    arch = model.arch
    one = np.array([cost.layer_flops(arch, level, settings) for level in settings.all_levels], dtype=np.int64)
    times = np.asarray(calls, dtype=np.int64) * rows
    rest = cost.forward_flops(arch) - arch.depth * cost.layer_flops(arch, SOFTMAX, settings)
    return Costs(
        cells=np.tile(times[:, None, None] * one, (1, arch.depth, 1)),
        rest=rest * int(times.sum()),
        softmax_option=settings.all_levels.index(SOFTMAX),
    )


def latency_costs(model: DiffusionTransformer, settings: MediatorSettings, calls: Sequence[int], rows: int, batch: int) -> Costs:
    """Seconds of one batch, on the model's device and in its precision.

    Every layer is timed at every level. Layers have one shape, so that their times differ by chance alone: a level's time is the median
    over layers, lest the solver choose by chance.
    """
    import torch

    arch, parameter = model.arch, next(model.parameters())
    count = rows * batch
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        tokens = torch.randn(count, arch.tokens, arch.width, generator=generator).to(parameter)
        layers = model.attention_layers()
        one = {
            level: statistics.median(median_seconds(lambda: layer(tokens, level), tokens.device) for layer in layers)  # noqa: B023
            for level in settings.all_levels
        }
        x = torch.randn(count, arch.channels, *arch.input_size, generator=generator).to(parameter)
        t, y = torch.full((count,), 0.5, device=x.device), torch.zeros(count, dtype=torch.long, device=x.device)
        rest = max(0.0, median_seconds(lambda: model(x, t, y), x.device) - arch.depth * one[SOFTMAX])
    times = np.asarray(calls, dtype=np.float64)
    return Costs(
        cells=np.tile(times[:, None, None] * np.array(list(one.values())), (1, arch.depth, 1)),
        rest=rest * float(times.sum()),
        softmax_option=settings.all_levels.index(SOFTMAX),
    )


@dataclass(frozen=True)
class Unit:
    """A unit that budgets can have."""

    name: str
    """The unit's name in sentences: softmax's FLOPs."""
    measure: Callable[[DiffusionTransformer, MediatorSettings, Sequence[int], int, int], Costs]
    """(model, settings, calls of each cell, rows per sample, batch) -> costs."""
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
    hint = "Pass a share such as 0.75 or 75%."
    try:
        share = float(given.removesuffix("%")) / 100 if isinstance(given, str) and given.endswith("%") else float(given)
    except ValueError:
        raise UserError(f"{given!r} is no budget.", hint=hint) from None
    if not 0 < share <= 1:
        raise UserError(f"{given} is no share of the softmax sampler's cost.", hint=hint)
    return round(share, 6)


def refuse_out_of_reach(budget: float, costs: Costs, settings: MediatorSettings, unit: Unit) -> None:
    """A budget below the cheapest levels' cost: the message says what can be reached, and what would widen that."""
    if budget >= costs.least:
        return
    levels = ", ".join(title(level) for level in settings.levels)
    fewest = min(kind_of(level).mediators(level) for level in settings.levels)
    wider = [*(["smaller --levels"] if fewest > 1 else []), *(["a smaller --local-rank"] if settings.local_rank else [])]
    hint = f"Convert with {' or '.join(wider)}; " if wider else ""
    raise UserError(
        f"can go down to {costs.least:.1%} of softmax's {unit.name} with levels {levels}; you asked for {budget:.1%}.",
        hint=f"{hint}{'a' if hint else 'A'} higher resolution widens the range too. Or ask for {math.ceil(costs.least * 1000) / 10:.1f}%.",
    )


def median_seconds(call: Callable[[], object], device: torch.device, times: int = TIMINGS) -> float:
    """The median time of a call, after one to warm up."""
    from mediatorize.devices import seconds

    return statistics.median([seconds(call, device) for _ in range(times + 1)][1:])
