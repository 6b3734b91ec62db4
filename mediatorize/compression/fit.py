"""Layer-by-layer regression: every mediator path on its own layer's inputs and outputs in the teacher (design 2.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mediatorize.compression.initialise import Initialiser
from mediatorize.compression.trajectories import States
from mediatorize.errors import UserError
from mediatorize.model.architecture import SOFTMAX
from mediatorize.model.attention import MediatorAttention
from mediatorize.model.transformer import Block, DiffusionTransformer, modulate

HELD_OUT = 8
"""One state in this many is kept from fitting, and errors are measured on those."""

CLUSTER_STATES = 32
"""How many states initialisers look at."""


@dataclass(frozen=True)
class FitSettings:
    steps: int = 500
    """Optimiser steps per layer; each trains every level. 0 leaves the mediators as initialised."""
    batch: int = 16
    """States per step."""
    learning_rate: float = 3e-3
    """Adam's peak, for weights of width 128; projections of a wider model take it in proportion to 128 / width."""
    seed: int = 0


@dataclass(frozen=True)
class LayerErrors:
    """Relative error |mediator - softmax| / |softmax| of a layer's output on held-out states, by mediator count."""

    layer: int
    before: dict[int, float]
    after: dict[int, float]


def fit_layers(
    model: DiffusionTransformer,
    states: States,
    initialise: Initialiser,
    settings: FitSettings,
    *,
    restored: Mapping[int, tuple[dict[str, Tensor], LayerErrors]] | None = None,
    on_step: Callable[[], None] | None = None,
) -> Iterator[LayerErrors]:
    """Fits the layers of a model that has mediators, in order, and yields each one's errors when it is done.

    Streams: beside the model and the states' tokens only one layer's inputs and outputs are in memory. A layer in `restored` is taken from
    there. Fitting a layer depends on the teacher, the states and (seed, layer) alone.
    """
    device = next(model.parameters()).device
    with torch.no_grad():
        calls = zip(*(values.split(settings.batch) for values in (states.x, states.t, states.y)), strict=True)
        embedded = [(model.embed(x.to(device)), model.condition(t.to(device), y.to(device))) for x, t, y in calls]
        tokens, condition = (torch.cat(parts) for parts in zip(*embedded, strict=True))
        del embedded
    for index, block in enumerate(model.layers()):
        if restored is not None and index in restored:
            weights, errors = restored[index]
            block.attn.mediated().load_state_dict(weights)
        else:
            errors = _fit_layer(index, block, tokens, condition, initialise, settings, on_step)
            if not all(math.isfinite(error) for error in errors.after.values()):
                raise UserError(f"Fitting layer {index} diverged.", hint="Pass a smaller --learning-rate.")
        yield errors
        if index + 1 < len(model.blocks):
            with torch.no_grad():
                for rows in torch.arange(len(tokens)).split(settings.batch):
                    tokens[rows] = block(tokens[rows], condition[rows], SOFTMAX)


def _fit_layer(
    index: int,
    block: Block,
    tokens: Tensor,
    condition: Tensor,
    initialise: Initialiser,
    settings: FitSettings,
    on_step: Callable[[], None] | None,
) -> LayerErrors:
    layer = block.attn
    mediator = layer.mediated()
    inputs, targets, gates = _inputs_and_outputs(block, tokens, condition, settings.batch)
    held_out = len(inputs) // HELD_OUT
    seed = settings.seed * 1_000_003 + index
    seen = inputs[held_out:]
    for mediators in mediator.settings.levels:
        pool = initialise(layer, seen[:: max(1, len(seen) // CLUSTER_STATES)], mediators, seed)
        mediator.level(mediators).pool.data.copy_(pool)

    before = relative_errors(mediator, inputs[:held_out], targets[:held_out], settings.batch)
    if settings.steps == 0:
        return LayerErrors(index, before, before)
    regress(mediator, seen, targets[held_out:], gates[held_out:], settings, seed, on_step)
    return LayerErrors(index, before, relative_errors(mediator, inputs[:held_out], targets[:held_out], settings.batch))


@torch.no_grad()
def _inputs_and_outputs(block: Block, tokens: Tensor, condition: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the attention layer gets and gives in the teacher, (s, n, c) each, and the gate that its output passes, (s, 1, c)."""
    inputs, outputs = torch.empty_like(tokens), torch.empty_like(tokens)
    gates = torch.empty_like(tokens[:, :1])
    for rows in torch.arange(len(tokens)).split(batch):
        shift, scale, gate = block.modulation(condition[rows], SOFTMAX)[:3]
        gates[rows] = gate.unsqueeze(1)
        inputs[rows] = modulate(block.norm1(tokens[rows]), shift, scale)
        outputs[rows] = block.attn(inputs[rows], SOFTMAX)
    return inputs, outputs, gates


@torch.no_grad()
def relative_errors(mediator: MediatorAttention, inputs: Tensor, targets: Tensor, batch: int) -> dict[int, float]:
    """|mediator - softmax| / |softmax| over all of `inputs` and `targets` (s, n, c), per level."""
    errors = {}
    size = torch.stack([y.square().sum() for y in targets.split(batch)]).sum().clamp(min=1e-12)
    for mediators in mediator.settings.levels:
        squared = torch.zeros((), device=inputs.device)
        for x, y in zip(inputs.split(batch), targets.split(batch), strict=True):
            squared += (mediator(x, mediators) - y).square().sum()
        errors[mediators] = float((squared / size).sqrt())
    return errors


def regress(
    mediator: MediatorAttention,
    inputs: Tensor,
    targets: Tensor,
    gates: Tensor,
    settings: FitSettings,
    seed: int,
    on_step: Callable[[], None] | None = None,
) -> None:
    """Trains the mediator path on (inputs, targets), (s, n, c) each, summed over levels, by Adam with a cosine to zero.

    The loss is the mean absolute error of what the block's gate (s, 1, c) lets through: errors in channels and states that the residual
    stream never sees do not count.
    """
    mediator.requires_grad_(True)
    projections = [*mediator.qkv.parameters(), *mediator.proj.parameters()]
    own = {id(parameter) for parameter in projections}
    others = [parameter for parameter in mediator.parameters() if id(parameter) not in own]
    shrink = min(1.0, 128 / inputs.shape[2])
    optimizer = torch.optim.Adam([{"params": projections, "scale": shrink}, {"params": others, "scale": 1.0}], betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    sizes = [(y * gate).abs().sum() for y, gate in zip(targets.split(settings.batch), gates.split(settings.batch), strict=True)]
    scale = (torch.stack(sizes).sum() / targets.numel()).clamp(min=1e-12)  # a dead block's gate is zero
    for step in range(settings.steps):
        rate = settings.learning_rate * (1 + math.cos(math.pi * step / settings.steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        rows = torch.randint(0, len(inputs), (settings.batch,), generator=generator)
        x, y, gate = inputs[rows], targets[rows], gates[rows] / scale
        optimizer.zero_grad()
        for mediators in mediator.settings.levels:
            ((mediator(x, mediators) - y) * gate).abs().mean().backward()
        optimizer.step()
        if on_step is not None:
            on_step()
    mediator.requires_grad_(False)
