"""Layer-by-layer regression: what conversion adds is fitted to its own layer's inputs and outputs in the teacher (design 2.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from mediatorize.compression.initialise import CLUSTER_STATES, states_looked_at
from mediatorize.compression.narrow import start_from_units
from mediatorize.compression.records import FitSettings, LayerErrors
from mediatorize.compression.trajectories import States
from mediatorize.devices import ALONE, World
from mediatorize.errors import UserError
from mediatorize.model.block import Block
from mediatorize.model.levels import SOFTMAX, Level, kind_of
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.randomness import generator, seed_for
from mediatorize.store import Kept, Store

if TYPE_CHECKING:
    from mediatorize.compression.initialise import Initialiser

HELD_OUT = 8
"""One state in this many is kept from fitting, and errors are measured on those."""


def fit_layers(
    model: DiffusionTransformer,
    states: States,
    initialise: Initialiser,
    settings: FitSettings,
    store: Store | None = None,
    *,
    world: World = ALONE,
    on_step: Callable[[], object] | None = None,
) -> list[LayerErrors]:
    """Fits the layers of a model that have mediators, in order. Returns each one's errors.

    Streams: beside the model and the states' tokens only one layer's inputs and outputs are in memory. Fitting a layer depends on the
    teacher, the states and (seed, layer) alone.

    Args:
        store: keeps what was fitted, as `layer_name` says; a layer that it has is not fitted again.
        world: the processes that share the layers, and a store of files, through which all get all.
        on_step: called after every step of fitting; where there are none, after every layer.
    """
    device = next(model.parameters()).device
    with torch.no_grad():
        calls = zip(*(values.split(settings.batch) for values in (states.x, states.t, states.y)), strict=True)
        embedded = [(model.embed(x.to(device)), model.condition(t.to(device), y.to(device))) for x, t, y in calls]
        tokens, condition = (torch.cat(parts) for parts in zip(*embedded, strict=True))
        del embedded

    @torch.no_grad()
    def in_batches(block: Block, tokens: Tensor, condition: Tensor, level: Level) -> Tensor:  # in place: one layer's tokens in memory
        for rows in torch.arange(len(tokens)).split(settings.batch):
            tokens[rows] = block(tokens[rows], condition[rows], level)
        return tokens

    def fitted(index: int, block: Block, tokens: Tensor) -> Kept:
        errors = _fit_layer(index, block, tokens, condition, initialise, settings, on_step)
        weights = {name: value.to("cpu", copy=True) for name, value in fitted_part(block).state_dict().items()}
        return Kept(weights, errors.to_json())

    errors: dict[int, LayerErrors] = {}

    def take(index: int, make: Callable[[], Kept]) -> None:
        kept = make() if store is None else store.once(layer_name(index), make)
        fitted_part(model.layers()[index]).load_state_dict(kept.tensors)
        errors[index] = LayerErrors.from_json(kept.facts)

    converted = model.added().converted(model.arch.depth)
    mine = converted[world.rank :: world.size]
    walk = model.walk(tokens, condition, SOFTMAX, run=in_batches)
    for index, (block, tokens) in enumerate(zip(model.layers()[: max(mine, default=-1) + 1], walk, strict=False)):
        if index in mine:
            take(index, partial(fitted, index, block, tokens))
    world.barrier()
    for index in sorted(set(converted) - set(mine)):
        take(index, _never)
    world.barrier()  # before one of them moves the store
    return [errors[index] for index in converted]


def _never() -> Kept:
    raise AssertionError("another process has fitted this layer")


def fitted_part(block: Block) -> nn.ModuleDict:
    """What fitting trains in a block."""
    narrow = block.mediator.narrow if block.mediator is not None else None
    return nn.ModuleDict({"attention": block.attn.mediated()} | ({} if narrow is None else {"narrow": narrow}))


def layer_name(index: int) -> str:
    """What a fitted layer is called in a store."""
    return f"layer-{index:03d}"


def held_out(states: int, initialise: Initialiser, settings: FitSettings, narrow: bool = False) -> int:
    """How many of `states` errors are measured on: one in `HELD_OUT`, or all that the initialiser does not need where nothing is fitted."""
    share = states // HELD_OUT
    return share if settings.steps else max(share, states - states_looked_at(initialise, narrow))


def _fit_layer(
    index: int,
    block: Block,
    tokens: Tensor,
    condition: Tensor,
    initialise: Initialiser,
    settings: FitSettings,
    on_step: Callable[[], object] | None,
) -> LayerErrors:
    layer = block.attn
    mediator = layer.mediated()
    attention = _inputs_and_outputs(block.attention_input, partial(layer, level=SOFTMAX), tokens, condition, settings.batch)
    narrow = block.mediator.narrow if block.mediator is not None else None
    judged = held_out(len(tokens), initialise, settings, narrow is not None)
    seen = attention.inputs[judged:]
    few = seen[:: max(1, len(seen) // CLUSTER_STATES)]
    for level in mediator.settings.levels:
        if (count := kind_of(level).mediators(level)) and mediator.settings.form == "learned":
            pool = initialise(layer, few, count, seed_for(settings.seed, "layer", index))
            mediator.count(count).pool.data.copy_(pool)
    own = [*mediator.qkv.parameters(), *mediator.proj.parameters()]
    fit = partial(_fit_part, judged=judged, settings=settings, on_step=on_step)
    before, after = fit(mediator, mediator.settings.levels, attention, own, random=generator(settings.seed, "layer", index))
    del attention, seen, few
    if narrow is not None:
        mlp = _inputs_and_outputs(block.mlp_input, block.mlp, tokens, condition, settings.batch)
        start_from_units(block, narrow, mlp.inputs[judged:], mlp.gates[judged:])
        random = generator(settings.seed, "narrow MLP", index)
        of_mlp = fit(narrow, mediator.settings.mlp_levels, mlp, [narrow.fc1.weight, narrow.fc2.weight], random=random)
        before, after = before | of_mlp[0], after | of_mlp[1]
    if not all(math.isfinite(error) for error in after.values()):
        raise UserError(f"Fitting layer {index} diverged.", hint="Pass a smaller --learning-rate.")
    return LayerErrors(index, before, after)


@dataclass(frozen=True)
class _Regression:
    """What a sub-layer gets and gives in the teacher, (s, n, c) each, and the gate that its output passes, (s, 1, c)."""

    inputs: Tensor
    targets: Tensor
    gates: Tensor

    def part(self, rows: slice) -> _Regression:
        return _Regression(self.inputs[rows], self.targets[rows], self.gates[rows])


def _fit_part(
    module: nn.Module,
    levels: Sequence[Level],
    data: _Regression,
    matrices: Sequence[Tensor],
    *,
    judged: int,
    settings: FitSettings,
    random: torch.Generator,
    on_step: Callable[[], object] | None,
) -> tuple[dict[Level, float], dict[Level, float]]:
    """Fits a module to a sub-layer; errors of its levels before and after, on the first `judged` states."""
    held = data.part(slice(judged))
    before = relative_errors(module, levels, held.inputs, held.targets, settings.batch)
    if not settings.steps:
        if on_step is not None:
            on_step()
        return before, before
    regress(module, levels, data.part(slice(judged, None)), matrices, settings, random, on_step)
    return before, relative_errors(module, levels, held.inputs, held.targets, settings.batch)


@torch.no_grad()
def _inputs_and_outputs(
    read: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    run: Callable[[Tensor], Tensor],
    tokens: Tensor,
    condition: Tensor,
    batch: int,
) -> _Regression:
    """What a sub-layer gets (`read` gives it, and the gate) and gives (`run`) in the teacher."""
    inputs, outputs = torch.empty_like(tokens), torch.empty_like(tokens)
    gates = torch.empty_like(tokens[:, :1])
    for rows in torch.arange(len(tokens)).split(batch):
        inputs[rows], gates[rows] = read(tokens[rows], condition[rows])
        outputs[rows] = run(inputs[rows])
    return _Regression(inputs, outputs, gates)


@torch.no_grad()
def relative_errors(module: nn.Module, levels: Sequence[Level], inputs: Tensor, targets: Tensor, batch: int) -> dict[Level, float]:
    """|module - target| / |target| over all of `inputs` and `targets` (s, n, c), per level."""
    errors: dict[Level, float] = {}
    size = torch.stack([y.square().sum() for y in targets.split(batch)]).sum().clamp(min=1e-12)
    for level in levels:
        squared = torch.zeros((), device=inputs.device)
        for x, y in zip(inputs.split(batch), targets.split(batch), strict=True):
            squared += (module(x, level) - y).square().sum()
        errors[level] = float((squared / size).sqrt())
    return errors


def regress(
    module: nn.Module,
    levels: Sequence[Level],
    data: _Regression,
    matrices: Sequence[Tensor],
    settings: FitSettings,
    random: torch.Generator,
    on_step: Callable[[], object] | None = None,
) -> None:
    """Trains a module on a sub-layer's inputs and outputs, summed over levels, by Adam with a cosine to zero.

    The loss is the mean absolute error of what the block's gate lets through: errors in channels and states that the residual stream never
    sees do not count.

    Args:
        matrices: parameters whose rate shrinks with the width.
    """
    module.requires_grad_(True)
    inputs, targets, gates = data.inputs, data.targets, data.gates
    own = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in module.parameters() if id(parameter) not in own]
    shrink = min(1.0, 128 / inputs.shape[2])
    groups: list[dict[str, Any]] = [{"params": list(matrices), "lr_scale": shrink}, {"params": others}]
    optimizer = torch.optim.Adam(groups, lr=settings.learning_rate, betas=(0.9, 0.95))
    schedule = CosineLRScheduler(optimizer, t_initial=settings.steps, t_in_epochs=False)
    sizes = [(y * gate).abs().sum() for y, gate in zip(targets.split(settings.batch), gates.split(settings.batch), strict=True)]
    scale = (torch.stack(sizes).sum() / targets.numel()).clamp(min=1e-12)  # a dead block's gate is zero
    for step in range(settings.steps):
        schedule.step_update(step)
        rows = torch.randint(0, len(inputs), (settings.batch,), generator=random)
        x, y, gate = inputs[rows], targets[rows], gates[rows] / scale
        optimizer.zero_grad()
        for level in levels:
            ((module(x, level) - y) * gate).abs().mean().backward()
        optimizer.step()
        if on_step is not None:
            on_step()
    module.requires_grad_(False)
