"""The error table: how far a sample moves when one layer of one model call runs at one level (design 5).

A solver calls the model at states x_1, x_2, ... and ends in a sample. To first order, a change d of the k-th call's guided output moves
the sample by J_k d. J_k is never built. For random directions v of unit variance, one backward pass through the solver gives
`g_k = J_k' v`, and the mean of <g_k, d>^2 over v is |J_k d|^2. A second pass, back through each call, carries g_k on to every block. The
table keeps the products <g, d>, not their squares. So changes that point the same way at several calls add up, and opposite ones cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mediatorize.diffusion.sampling import GuidedModel, Sampler, draw_noise
from mediatorize.model.architecture import Architecture
from mediatorize.model.levels import SOFTMAX, Level, MediatorSettings
from mediatorize.model.schedule import Schedule
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.planning.allocate import Choice, chosen_vectors, joint_error
from mediatorize.randomness import gaussian, spread_labels


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

    Activations of one call at a time are in memory: each is computed again on the way back, once for all directions.
    """
    arch = model.arch
    device = next(model.parameters()).device
    guided = GuidedModel(model, labels.to(device), sampler)
    indices = range(first_index, first_index + len(labels))
    shape = (arch.channels, *arch.input_size)
    states: list[Tensor] = []
    changes: list[Tensor] = []

    def draw(count: int) -> Tensor:  # for every direction the same
        return draw_noise(sampler.seed, indices, shape, device, count).repeat(directions, 1, 1, 1)

    def predict(x: Tensor, t: float) -> Tensor:
        states.append(x[: len(labels)].detach().cpu())
        output = _OnCopies.apply(x, lambda x: guided.output(model(*guided.inputs(x, t))), directions)
        changes.append(torch.zeros_like(output, requires_grad=True))
        if on_call is not None:
            on_call()
        return output + changes[-1]

    with torch.enable_grad():
        end = sampler.run(predict, draw(-1), draw)
    toward = torch.cat([gaussian(sampler.seed, "direction", indices, shape, direction) for direction in range(directions)])
    found = torch.autograd.grad(end, changes, toward.to(device), materialize_grads=True)
    gradients = torch.stack([gradient.cpu() for gradient in found]).unflatten(1, (directions, -1))
    return Probes(labels.cpu(), torch.stack(states), gradients, end[: len(labels)].detach().cpu())


class _OnCopies(torch.autograd.Function):
    """A function of one of several equal copies of a batch, which gives as many copies of its value; each copy has a gradient of its own.

    Nothing is kept but the batch: on the way back the function runs once more, for the gradients of all copies.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], copies: int) -> Tensor:
        """(copies * b, ...) -> (copies * b, ...)"""
        ctx.function, ctx.x = function, x.chunk(copies)[0]
        return function(ctx.x).repeat(copies, 1, 1, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        with torch.enable_grad():
            x = ctx.x.detach().requires_grad_()
            value = ctx.function(x)
        found = _along(value, [x], gradients[0].unflatten(0, (-1, len(x))))
        return torch.cat([each for (each,) in found]), None, None


def probe_all(
    model: DiffusionTransformer, count: int, sampler: Sampler, directions: int, batch: int, on_call: Callable[[], object] | None = None
) -> Probes:
    """`probe` of `count` samples of classes in turn, `batch` of them at a time."""
    labels = spread_labels(model.arch.classes, count, sampler.seed)
    split = torch.arange(count).split(batch)
    return Probes.joined([probe(model, labels[rows], sampler, directions, int(rows[0]), on_call) for rows in split])


def bytes_for_backward(model: nn.Module, run: Callable[[], object]) -> int:
    """Bytes that a computation keeps for its backward pass, beside the model's parameters; on the meta device nothing is computed."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in kept.values())


def peak_bytes_of_products(arch: Architecture, settings: MediatorSettings, rows: int, directions: int) -> int:
    """About the most memory that `adjoint_products` takes at a time beside the model, in float32: one call's activations, and every block's
    gradients, these twice while they are joined.

    Args:
        rows: of a model call.
    """
    with torch.device("meta"):
        model = DiffusionTransformer(arch, settings).requires_grad_(False)
        tokens, conditioning = torch.empty(rows, arch.tokens, arch.width), torch.empty(rows, arch.width)
    activations = bytes_for_backward(model, lambda: model.run_blocks(tokens.requires_grad_(), conditioning, SOFTMAX))
    return activations + tokens.nbytes * 2 * directions * arch.depth


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


@dataclass(frozen=True)
class Products:
    """Products of changes on the teacher's trajectories with what moves the sample, to first order."""

    levels: Tensor
    """(calls, layers, levels, samples n, directions k): of a block that runs at a level, all others at softmax."""

    @classmethod
    def joined(cls, parts: Sequence[Products]) -> Products:
        return cls(torch.cat([part.levels for part in parts], dim=-2))


def adjoint_products(
    model: DiffusionTransformer,
    sampler: Sampler,
    probes: Probes,
    rows: Tensor,
    levels: Sequence[Level],
    on_call: Callable[[], object] | None = None,
) -> Products:
    """The products of some trajectories, by one pass back through each call.

    Backward from the gradient by the call's output, every block's output has its own gradient g; <g, d> is then the effect of any change d
    there, with no further model calls. In memory: one call's activations and gradients.

    Args:
        rows: (n,) indices into the probes.
        levels: of whole converted blocks. Others, which do not have them, are as at softmax: their products are 0.
    """
    device = next(model.parameters()).device
    guided = GuidedModel(model, probes.labels[rows].to(device), sampler)
    converts, times = model.added().converts, sampler.times()
    found = torch.zeros(len(times), model.arch.depth, len(levels), len(rows), probes.gradients.shape[1])
    for call, t in enumerate(times):
        batch, own_times, labels = guided.inputs(probes.states[call, rows].to(device), t)
        conditioning = model.condition(own_times, labels)
        toward = probes.gradients[call][:, rows].to(device)
        with torch.enable_grad():
            embedded = model.embed(batch).detach().requires_grad_()
            first, *tokens = model.walk(embedded, conditioning, SOFTMAX)
            told = guided.output(model.finish(tokens[-1], conditioning))
            by_block = list(map(torch.stack, zip(*_along(told, tokens, toward), strict=True)))  # (k, rows, n, c) each
        with torch.no_grad():
            inputs = [first, *tokens]
            for layer, block in enumerate(model.layers()):
                outputs = block.at_levels(inputs[layer], conditioning, levels if converts(layer) else ())
                for place, changed in enumerate(outputs):
                    products = _products(changed - inputs[layer + 1], by_block[layer], len(batch) // len(rows))
                    found[call, layer, place] = products.sum(0)
        if on_call is not None:
            on_call()
    return Products(found)


def _along(value: Tensor, inputs: Sequence[Tensor], directions: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Gradients of the value's product with every direction (k, *value's shape), by the inputs. The last frees the graph."""
    for index, direction in enumerate(directions, 1):
        yield torch.autograd.grad(value, inputs, direction, retain_graph=index < len(directions))


def _products(change: Tensor, gradients: Tensor, halves: int) -> Tensor:
    """<gradient, change> of every row: (rows, ...), (k, rows, ...) -> (halves, n, k)"""
    products = torch.einsum("rd,krd->rk", change.flatten(1).float(), gradients.flatten(2).float())
    return products.unflatten(0, (halves, -1))


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
    """(cells, layers, options, probes): sums of squares are mean squared relative errors of samples."""

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
        """A choice against noise level."""
        return Schedule.through(self.noise_levels, [tuple(self.options[option] for option in row) for row in choice])


def cells_of(noise_levels: Sequence[float]) -> tuple[tuple[float, ...], list[int]]:
    """The distinct noise levels of a sampler's calls, in order, and each call's place among them."""
    places = {level: place for place, level in enumerate(dict.fromkeys(noise_levels))}
    return tuple(places), [places[level] for level in noise_levels]


def error_table(products: Tensor, sample_norms: Tensor, noise_levels: Sequence[float], options: Sequence[Level]) -> ErrorTable:
    """The table from products (calls, layers, options, n, k) and the norms of the samples (n,)."""
    cells, place = cells_of(noise_levels)
    summed = torch.zeros(len(cells), *products.shape[1:], dtype=torch.float64).index_add_(0, torch.tensor(place), products.double())
    scaled = shares(summed, sample_norms).flatten(3) / products[0, 0, 0].numel() ** 0.5
    counts = tuple(place.count(cell) for cell in range(len(cells)))
    return ErrorTable(cells, counts, tuple(options), scaled.numpy())


def shares(products: Tensor, sample_norms: Tensor) -> Tensor:
    """Products (..., n, k) as shares of the samples' norms (n,), in double precision."""
    return products.double() / sample_norms.double().clamp(min=1e-12).unsqueeze(1)


def latent_changes(states: Tensor) -> Tensor:
    """Mean absolute change of each sample's latents (steps, n, c, h, w) from each step to the next: (steps - 1, n), double."""
    return (states[1:] - states[:-1]).abs().flatten(2).mean(2).double()
