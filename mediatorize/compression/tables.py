"""The error tables around the teacher (design 5): its trajectories, and what every stand-in does there, to first order.

Work is split by trajectories. Each part is kept as soon as it is measured, and processes share the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from mediatorize.compression.costs import KINDS_OF_SAVING, bare_levels
from mediatorize.compression.sensitivity import (
    ErrorTable,
    Probes,
    Products,
    adjoint_products,
    error_table,
    latent_changes,
    probe,
)
from mediatorize.devices import ALONE, World
from mediatorize.diffusion.sampling import Sampler
from mediatorize.model.levels import Level, is_pretrained
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.progress import Progress, silent
from mediatorize.randomness import spread_labels
from mediatorize.store import Kept, Store

DIRECTIONS = 4
"""Random directions per trajectory along which the change of a sample is followed."""


@dataclass(frozen=True, kw_only=True)
class Tables:
    """What is known of a sampler's errors before anything is sampled with a schedule."""

    errors: ErrorTable
    """Of levels."""
    changes: Tensor
    """Of each sample's latents, from the beginning of each step to that of the next: (steps - 1, n)."""


def teacher_probes(
    model: DiffusionTransformer,
    sampler: Sampler,
    trajectories: int,
    batch: int,
    store: Store,
    world: World = ALONE,
    progress: Progress = silent,
) -> Probes:
    """The teacher's trajectories and what moves their ends."""
    labels = spread_labels(model.arch.classes, trajectories, sampler.seed)

    def of_part(rows: Tensor, on_call: Callable[[], object]) -> Probes:
        return probe(model, labels[rows], sampler, DIRECTIONS, int(rows[0]), on_call)

    def make() -> Kept:
        what, calls = "sampling the teacher", len(sampler.times())
        return Kept(vars(in_parts(Probes, "probes", of_part, trajectories, batch, calls, store, world, progress, what)))

    probes = Probes(**store.once("probes", make).tensors)
    store.drop("probes-*")
    return probes


Measured = TypeVar("Measured", Probes, Products)


def in_parts(
    kind: type[Measured],
    name: str,
    measure: Callable[[Tensor, Callable[[], object]], Measured],
    trajectories: int,
    batch: int,
    calls: int,
    store: Store,
    world: World,
    progress: Progress,
    what: str,
) -> Measured:
    """Something of all trajectories, measured part by part. Each part is kept as soon as it is measured; processes share them.

    Args:
        measure: takes the numbers of a part's trajectories, and what is called after each of its `calls` model calls.
        batch: the most trajectories of a part. There are at least as many parts as processes, where there are as many trajectories.
        what: is being done, for the progress bar.
    """
    parts = torch.arange(trajectories).tensor_split(max(-(-trajectories // batch), min(trajectories, world.size)))
    with progress(len(parts[world.rank :: world.size]) * calls, what, "call") as bar:

        def of_part(rows: Tensor) -> Kept:
            return Kept(vars(measure(rows, bar.update)))

        # Names say what is in a part: work that other processes, or another batch, left may be cut differently.
        makes = {f"{name}-{int(rows[0]):05d}-{len(rows):05d}": partial(of_part, rows) for rows in parts}
        return kind.joined([kind(**kept.tensors) for kept in store.each(makes)])


def measured_tables(
    model: DiffusionTransformer,
    sampler: Sampler,
    trajectories: int,
    batch: int,
    store: Store,
    world: World = ALONE,
    progress: Progress = silent,
    facts: Mapping[str, Any] | None = None,
) -> Tables:
    """The tables around the teacher. Every batch of trajectories is kept as soon as it is measured."""
    probes = teacher_probes(model, sampler, trajectories, batch, store, world, progress)
    settings, noise_levels = model.added(), sampler.noise_levels(model.arch)
    options = bare_levels(settings, KINDS_OF_SAVING)
    added = [level for level in options if not is_pretrained(level)]

    def of_part(rows: Tensor, on_call: Callable[[], object]) -> Products:
        return adjoint_products(model, sampler, probes, rows, added, on_call)

    def make() -> Kept:
        at_once, what, calls = max(1, batch // sampler.rows), "measuring errors", len(noise_levels)
        found = in_parts(Products, "part", of_part, trajectories, at_once, calls, store, world, progress, what)
        return Kept(vars(found), facts or {})

    levels = beside_pretrained(store.once("sensitivity", make).tensors["levels"], options)
    store.drop("part-*")
    norms = probes.samples.flatten(1).norm(dim=1)
    return Tables(
        errors=error_table(levels, norms, noise_levels, options), changes=latent_changes(probes.states[:: sampler.how.calls_per_step])
    )


def beside_pretrained(products: Tensor, options: Sequence[Level]) -> Tensor:
    """Products of added levels (calls, layers, levels, n, k), and between them zeros for pretrained ones, in the order of the options."""
    found = products.new_zeros(*products.shape[:2], len(options), *products.shape[3:])
    found[:, :, [place for place, level in enumerate(options) if not is_pretrained(level)]] = products
    return found
