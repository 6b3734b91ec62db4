"""The error table: how far a sample moves when one layer of one model call runs at one level (design 5).

A solver calls the model at states x_1, x_2, ... and ends in a sample. To first order, a change d of the k-th call's guided output
moves the sample by J_k d. J_k is never built. For random directions v of unit variance, one backward pass through the solver gives
`g_k = J_k' v`, and the mean of <g_k, d>^2 over v is |J_k d|^2. The table keeps the products <g_k, d>, not their squares. So changes that
point the same way at several calls add up, and opposite changes cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mediatorize.compression.allocate import Choice, chosen_vectors, joint_error
from mediatorize.diffusion.sampling import GuidedModel, Sampler, draw_noise
from mediatorize.model.levels import SOFTMAX, Level
from mediatorize.model.schedule import Schedule
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.randomness import gaussian, generator


@dataclass(frozen=True)
class Probes:
    """The teacher's trajectories, and the gradients of their final samples, on the CPU."""

    labels: Tensor
    """(n,)"""
    states: Tensor
    """(calls, n, c, h, w): the solver's input to the model at each call."""
    gradients: Tensor
    """(calls, k, n, output channels, h, w): gradients of the sample's product with k random directions, by the output of each call."""
    samples: Tensor
    """(n, c, h, w)"""

    @classmethod
    def joined(cls, parts: Sequence[Probes]) -> Probes:
        return cls(
            torch.cat([part.labels for part in parts]),
            torch.cat([part.states for part in parts], dim=1),
            torch.cat([part.gradients for part in parts], dim=2),
            torch.cat([part.samples for part in parts]),
        )


def probe(
    model: DiffusionTransformer,
    labels: Tensor,
    sampler: Sampler,
    directions: int,
    first_index: int = 0,
    on_call: Callable[[], object] | None = None,
) -> Probes:
    """Samples with the teacher, sample i with index `first_index` + i, and walks back from each sample along `directions` random vectors.

    Activations of one call at a time are in memory: each is computed again on the way back.
    """
    arch = model.arch
    device = next(model.parameters()).device
    guided = GuidedModel(model, labels.to(device), sampler)
    indices = range(first_index, first_index + len(labels))
    shape = (arch.channels, *arch.input_size)
    states: list[Tensor] = []
    changes: list[Tensor] = []

    draw = partial(draw_noise, sampler, indices, shape, device)

    def predict(x: Tensor, t: float) -> Tensor:
        states.append(x.detach().cpu())
        output = checkpoint(lambda x: guided.output(model(*guided.inputs(x, t))), x, use_reentrant=False)
        changes.append(torch.zeros_like(output, requires_grad=True))
        if on_call is not None:
            on_call()
        return output + changes[-1]

    with torch.enable_grad():
        end = sampler.how.run(predict, draw(-1), sampler.steps, draw)
    gradients = []
    for direction in range(directions):
        toward = gaussian(sampler.seed, "direction", indices, shape, direction).to(device)
        found = torch.autograd.grad(end, changes, toward, retain_graph=direction + 1 < directions, allow_unused=True)
        gradients.append(torch.stack([torch.zeros_like(c) if g is None else g for g, c in zip(found, changes, strict=True)]).cpu())
    return Probes(labels.cpu(), torch.stack(states), torch.stack(gradients, dim=1), end.detach().cpu())


def probe_all(
    model: DiffusionTransformer, count: int, sampler: Sampler, directions: int, batch: int, on_call: Callable[[], object] | None = None
) -> Probes:
    """`probe` of `count` samples of classes in turn, `batch` of them at a time."""
    labels = spread_labels(model.arch.classes, count, sampler.seed)
    split = torch.arange(count).split(batch)
    return Probes.joined([probe(model, labels[rows], sampler, directions, int(rows[0]), on_call) for rows in split])


def spread_labels(classes: int, count: int, seed: int) -> Tensor:
    """(count,) classes in random order, none again before all others."""
    order = torch.randperm(classes, generator=generator(seed, "states"))
    return order.repeat(-(-count // classes))[:count]


@dataclass(frozen=True)
class Effects:
    """How far a change of the model's output moves the sample, by noise level; over a sampler's noise levels the mean is 1."""

    noise_levels: tuple[float, ...]
    """Ascending."""
    values: tuple[float, ...]

    def at(self, noise_level: Tensor) -> Tensor:
        """(s,) -> (s,), on the CPU: between the measured ones in proportion."""
        return torch.from_numpy(np.interp(noise_level.cpu().numpy(), self.noise_levels, self.values)).float()


@torch.no_grad()
def effects_on_samples(
    model: DiffusionTransformer,
    sampler: Sampler,
    probes: Probes,
    levels: Sequence[Level],
    batch: int,
) -> Effects:
    """|J d| / |d| of every call, over the changes d that whole-model `levels` make on the teacher's trajectories.

    Squares of calls at one noise level add up. d counts without a DiT's variance rows. A step that spans several noise levels spreads its
    effect evenly over them.
    """
    channels = model.arch.channels
    device = next(model.parameters()).device
    cells, place = cells_of(sampler.noise_levels(model.arch))
    squares = np.zeros(len(cells))
    for call, t in enumerate(sampler.times()):
        moved, changed = torch.zeros((), device=device), torch.zeros((), device=device)
        for rows in torch.arange(len(probes.labels)).split(batch):
            guided = GuidedModel(model, probes.labels[rows].to(device), sampler)
            inputs = guided.inputs(probes.states[call, rows].to(device), t)
            teacher, gradients = guided.output(model(*inputs)), probes.gradients[call][:, rows].to(device)
            for level in levels:
                change = guided.output(model(*inputs, levels=level)) - teacher
                moved += torch.einsum("nchw,knchw->kn", change, gradients).square().sum() / len(gradients)
                changed += change[:, :channels].square().sum()
        squares[place[call]] += float(moved / changed.clamp(min=1e-12))
    order = np.argsort(cells)
    ascending = np.array(cells)[order]
    passed = np.diff(ascending, prepend=0.0)  # to the next call's noise level, or to data
    passed[passed == 0] = np.median(passed) or 1.0  # a last call at the data themselves, which may be the only one
    effects = np.sqrt(squares)[order] / passed
    values = effects / effects.mean() if effects.any() else np.ones_like(effects)
    return Effects(tuple(ascending.tolist()), tuple(values.tolist()))


@torch.no_grad()
def output_changes(
    model: DiffusionTransformer, guided: GuidedModel, x: Tensor, t: float, levels: Sequence[Level], around: Sequence[Level] | None = None
) -> Tensor:
    """Change of the guided output when one layer runs at one level: (layers, levels, n, output channels, h, w)

    Blocks below the layer are not run again: their outputs are kept from one pass. `around` has the levels of all other layers (default
    softmax); changes are from the teacher in any case.
    """
    layers = model.layers()
    base: Sequence[Level] = around or [SOFTMAX] * len(layers)
    batch, times, labels = guided.inputs(x, t)
    conditioning = model.condition(times, labels)

    def finish(tokens: Tensor, first: int) -> Tensor:
        copies = conditioning.repeat(len(tokens) // len(conditioning), 1)
        outputs = model.finish(model.run_blocks(tokens, copies, base[first:], first), copies)
        return torch.stack([guided.output(part) for part in outputs.split(len(batch))])

    *inputs, tokens = model.walk(model.embed(batch), conditioning, base)
    teacher = finish(tokens, len(layers))[0] if around is None else guided.output(model(batch, times, labels))
    changes = []
    for index, block in enumerate(layers):
        variants = torch.cat([block(inputs[index], conditioning, level) for level in levels])
        changes.append(finish(variants, index + 1) - teacher)
    return torch.stack(changes)


@dataclass(frozen=True)
class ErrorTable:
    """How every level of every layer moves the sample, at every noise level of the sampler's model calls.

    Calls at one noise level are one cell: a schedule cannot tell them apart. Their changes add up.
    """

    noise_levels: tuple[float, ...]
    """Noise levels of the cells, in the order of the first calls."""
    calls: tuple[int, ...]
    """How many calls each cell has."""
    options: tuple[Level, ...]
    """Levels in the order of their rank."""
    products: NDArray[np.float64]
    """(cells, layers, options, probes): squares are shares of the samples' squared norm."""

    def predicted(self, choice: Choice) -> dict[str, float]:
        """Relative error of the samples by three models: changes add as vectors, their squares add, their norms add."""
        squares = np.square(chosen_vectors(self.products, choice)).sum(-1)
        return {
            "vectors": joint_error(self.products, choice) ** 0.5,
            "squares": float(squares.sum() ** 0.5),
            "norms": float(np.sqrt(squares).sum()),
        }

    def squares(self) -> NDArray[np.float64]:
        """(cells, layers, options): squared relative error of each cell alone."""
        return np.square(self.products).sum(-1)

    def schedule(self, choice: Choice) -> Schedule:
        """A choice against noise level, edges half-way between the cells; equal neighbours are one piece."""
        edges: list[float] = []
        pieces: list[tuple[Level, ...]] = []
        before = 0.0
        for cell in sorted(range(len(self.noise_levels)), key=self.noise_levels.__getitem__):
            levels = tuple(self.options[option] for option in choice[cell])
            noise_level = self.noise_levels[cell]
            if pieces and levels != pieces[-1]:
                edges.append(round((before + noise_level) / 2, 6))
            if not pieces or levels != pieces[-1]:
                pieces.append(levels)
            before = noise_level
        return Schedule(tuple(edges), tuple(pieces))

    def around(self, choice: Choice, remeasured: ErrorTable) -> ErrorTable:
        """This table, with the changes of single cells as they are when all others are at `choice`.

        `remeasured` has, for every cell and option, the whole change of the cell's calls with one layer at that option.
        """
        now = chosen_vectors(remeasured.products, choice)[:, :, None]
        return replace(self, products=chosen_vectors(self.products, choice)[:, :, None] + remeasured.products - now)


def cells_of(noise_levels: Sequence[float]) -> tuple[tuple[float, ...], list[int]]:
    """The distinct noise levels of a sampler's calls, in order, and each call's place among them."""
    places = {level: place for place, level in enumerate(dict.fromkeys(noise_levels))}
    return tuple(places), [places[level] for level in noise_levels]


def error_table(products: Tensor, sample_squares: Tensor, noise_levels: Sequence[float], options: Sequence[Level]) -> ErrorTable:
    """The table from products (calls, layers, options, n, k) and the squared norms of the samples (n,)."""
    cells, place = cells_of(noise_levels)
    summed = torch.zeros(len(cells), *products.shape[1:], dtype=torch.float64).index_add_(0, torch.tensor(place), products.double())
    scaled = summed.flatten(3) / (sample_squares.double().sum() * products.shape[-1]).sqrt()
    counts = tuple(place.count(cell) for cell in range(len(cells)))
    return ErrorTable(cells, counts, tuple(options), scaled.numpy())


def products_of_call(
    model: DiffusionTransformer,
    sampler: Sampler,
    probes: Probes,
    call: int,
    t: float,
    options: Sequence[Level],
    batch: int,
    around: Sequence[Level] | None = None,
) -> Tensor:
    """Products of one call's output changes with its gradients: (layers, options, n, k), on the CPU. `batch` trajectories at a time."""
    device = next(model.parameters()).device
    parts = []
    for rows in torch.arange(len(probes.labels)).split(batch):
        guided = GuidedModel(model, probes.labels[rows].to(device), sampler)
        changes = output_changes(model, guided, probes.states[call, rows].to(device), t, options, around)
        parts.append(torch.einsum("ljnchw,knchw->ljnk", changes, probes.gradients[call][:, rows].to(device)).cpu())
    return torch.cat(parts, dim=2)


def latent_changes(states: Tensor) -> list[float]:
    """Mean absolute change of the latents (calls, n, c, h, w) from each call to the next; of the last as of the one before."""
    changes = (states[1:] - states[:-1]).abs().flatten(1).mean(1).tolist()
    return [*changes, changes[-1] if changes else 0.0]
