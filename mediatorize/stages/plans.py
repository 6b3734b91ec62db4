"""Plans for a model: what `mediatorize calibrate --calls` does, and `mz.calibrate` in Python."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mediatorize.diffusion.solvers import fixed_solvers
from mediatorize.errors import UserError, about, refuse_below
from mediatorize.planning.results import Planned
from mediatorize.version import VERSION

if TYPE_CHECKING:
    from torch import Tensor

    from mediatorize.compression.costs import CallCosts
    from mediatorize.devices import World
    from mediatorize.diffusion.plan import Plan, Streams
    from mediatorize.model.architecture import Architecture
    from mediatorize.model.transformer import DiffusionTransformer
    from mediatorize.planning.levels import LevelTable
    from mediatorize.planning.search import Plans, Wanted
    from mediatorize.progress import Progress
    from mediatorize.store import Store

REFERENCE_STEPS = 50
"""Steps of the sampler that budgets are shares of."""
TRAJECTORIES = 8
"""Samples that effects of levels in a plan are measured on."""
SETS = ("calibration", "held-out calibration", "reported calibration")
"""Purposes of the three sets of noise (`randomness`)."""


def calls_within(budgets: Sequence[float], reference_steps: int) -> tuple[int, ...]:
    """The numbers of calls that budgets pay for, as shares of `reference_steps` calls.

    Raises:
        UserError: a budget pays for fewer than two.
    """
    counts = [math.floor(budget * reference_steps + 1e-9) for budget in budgets]
    for budget, count in zip(budgets, counts, strict=True):
        if count < 2:
            raise UserError(
                f"A budget of {budget:.1%} of {reference_steps} calls pays for {count}; a plan has at least 2.",
                hint=f"Pass --budget {2 / reference_steps:g} or more.",
            )
    return tuple(counts)


def calibrate_plans(
    model: Path,
    calls: Sequence[int],
    *,
    out: Path | None,
    guidance: Mapping[str, Any],
    reference_steps: int,
    streams: Streams,
    unit: str | None,
    samples: int,
    verify: int,
    seed: int,
    batch: int,
    device: str,
    dtype: str,
    load: Mapping[str, Any],
    dry_run: bool,
    force: bool,
) -> Planned:
    """Fits plans to a checkpoint or a bundle and writes them into one file.

    Args:
        guidance: `cfg_scale`, `cfg_channels`, `cfg_interval`.
        unit: of a budget, in `COSTS`, by which more calls at a bundle's cheaper levels are tried, too; None: calls were asked for.
        load: arguments of `load_model`.
    """
    from mediatorize.compression.costs import COSTS
    from mediatorize.devices import DTYPES, measured_flops_per_second, pick_device, processes
    from mediatorize.formats import bundle as bundles
    from mediatorize.formats.loading import load_model
    from mediatorize.formats.plans import default_place, write_plans
    from mediatorize.model import cost
    from mediatorize.planning.levels import counts_for
    from mediatorize.planning.search import model_rows
    from mediatorize.report import plans as report
    from mediatorize.stages.running import process_bytes, progress_bar
    from mediatorize.stages.work import SharedWork, Work

    start = time.monotonic()
    refuse_below({"samples": samples}, 4)
    refuse_below({"batch": batch, "verify": verify}, 1)
    if not calls or min(calls) < 2:
        raise UserError("A plan has at least 2 calls.", hint="Pass --calls 4,6,8.")
    is_bundle = bundles.is_bundle(model)
    if is_bundle:
        config = bundles.read_config(model)
        bundles.refuse_pruned(model, config)
        bundles.refuse_untrained(model, config)
    loaded = load_model(model, **load)
    place = default_place(model, is_bundle) if out is None else out
    if place.exists() and not (force or dry_run):
        raise UserError(f"{place}: exists.", hint="Pass --force to replace it, or another --out.")
    if not (dry_run or place.absolute().parent.is_dir()):
        raise UserError(f"{place}: its folder does not exist.", hint=f"Make {place.parent} first.")
    with about(model):
        wanted = wanted_of(loaded.arch, guidance, streams=streams, samples=samples, reported=verify)
    calls = tuple(sorted(set(calls)))
    result = Planned(model=model, out=place, arch=loaded.arch, wanted=wanted, calls=calls, reference_steps=reference_steps, dtype=dtype)
    where = pick_device(device)
    if dry_run:
        rows = model_rows(wanted, calls)
        if unit is not None and loaded.settings is not None:  # more calls at cheaper levels, too
            rows += model_rows(wanted, [more for count in calls for more in counts_for(count)])
        seconds = rows * cost.forward_flops(loaded.arch) / measured_flops_per_second(where, loaded.arch.width, loaded.arch.tokens)
        tensors = peak_bytes(loaded.arch, wanted, batch, DTYPES[dtype].itemsize)
        return replace(result, model_rows=rows, estimated_seconds=seconds, estimated_bytes=process_bytes(tensors, where))

    facts = {
        "weights": bundles.hash_of_weights(loaded),
        "added": added_hash(loaded),
        "wanted": asdict(wanted),
        "dtype": dtype,
        "seed": seed,
        "version": VERSION,
        "unit": unit,
    }
    facts = report.as_json(facts)
    folder = place.with_name(f"{place.name}.work")
    with processes(where) as world:
        work = Work.open(folder, facts, force=True, refusal=lambda before: None, world=world)
        loaded = loaded.to(where, DTYPES[dtype])
        costs = None
        if unit is not None and loaded.settings is not None and wanted.streams == "guided":
            costs = COSTS[unit].measure(loaded, loaded.settings, 1, batch)
        with about(model):
            found = find_plans(
                loaded,
                calls,
                wanted,
                seed=seed,
                batch=batch,
                reference_steps=reference_steps,
                levels=costs,
                store=SharedWork(work, world),
                world=world,
                progress=progress_bar,
            )
        found = replace(found, found={count: replace(each, plan=signed(each, found, facts)) for count, each in found.found.items()})
        shares = {count: share_of(loaded, each.plan, reference_steps) for count, each in found.found.items()}
        result = replace(result, plans=found, shares=shares)
        if world.is_first:
            write_plans(place, found.plans)
            result = replace(result, seconds=time.monotonic() - start)
            if is_bundle:
                arguments = {"calls": list(calls), "out": str(place), **guidance, "seed": seed}
                bundles.append_log(model, "calibrate", report.as_json(arguments), {"plans": report.facts(result)["plans"], "schedules": []})
            shutil.rmtree(folder)
        world.barrier()
    return result


def plans_for(
    model: str,
    loaded: DiffusionTransformer,
    file: Path | None,
    calls: Sequence[int],
    cfg_scale: float | None,
    cfg_channels: int | str,
    cfg_interval: Sequence[float],
    timestep_shift: float,
    dtype: str,
) -> tuple[dict[int, Plan], dict[str, Any], tuple[str, ...]]:
    """The plans that a model is to be judged by, by number of calls; the guidance that they bring; and what a user should know of them.

    A bundle whose plans are for other weights, or other guidance than was asked for, gives none, and says so.

    Args:
        file: of plans; None: the bundle's own.
        calls: which of them; none: all.
        cfg_scale, cfg_channels, cfg_interval, timestep_shift: as asked for, or their defaults.

    Raises:
        UserError: a plan is not there, or not for this model or this guidance.
    """
    from mediatorize.diffusion.planned import choose_plan, refuse_other_guidance, refuse_other_plan
    from mediatorize.formats.bundle import hash_of_weights
    from mediatorize.formats.plans import PLAN_NAME, read_plans, refuse_other_weights

    own = Path(model) / PLAN_NAME
    if file is None and not own.is_file():
        if calls:
            raise UserError(f"{model}: has no plan.", hint="Run `mediatorize calibrate`, or pass --plan FILE.")
        return {}, {}, ()
    asked = file is not None or bool(calls)
    file = own if file is None else file
    plans = read_plans(file)
    try:
        plans = {count: choose_plan(plans, count) for count in calls} if calls else plans
        weights = hash_of_weights(loaded)
        for plan in plans.values():
            refuse_other_plan(loaded.arch, plan)
            refuse_other_guidance(plan, cfg_scale, cfg_channels, cfg_interval, timestep_shift)
            refuse_other_weights(plan, weights)
        first, *others = plans.values()
        guidance = {name: getattr(first, name) for name in ("cfg_scale", "cfg_channels", "cfg_interval")}
        if any(getattr(plan, name) != value for plan in others for name, value in guidance.items()):
            raise UserError("Its plans are for different guidance.", hint="Choose some of one guidance scale.")
    except UserError as error:
        if asked:
            with about(file):
                raise
        return {}, {}, (f"the bundle's plans are left out: {error}",)
    added = added_hash(loaded)
    return plans, guidance, tuple(dict.fromkeys(told for plan in plans.values() for told in plan_warnings(plan, dtype, added)))


def plan_warnings(plan: Plan, dtype: str, added: str | None) -> tuple[str, ...]:
    """What a user should know of a plan that is sampled by.

    Args:
        added: hash of the weights that conversion added to the model.
    """
    found = []
    if (made_for := plan.made_for.get("dtype", dtype)) != dtype:
        found.append(f"the plan was fitted in {made_for}, and this sampled in {dtype}")
    if plan.made_for.get("added") not in (None, added):
        found.append("the weights of the levels have changed since the plan was fitted: run `mediatorize calibrate` again")
    return tuple(found)


def wanted_of(arch: Architecture, guidance: Mapping[str, Any], **settings: Any) -> Wanted:
    """What plans for a model are sought by; refuses guidance that it cannot have."""
    from mediatorize.diffusion.process import process_of
    from mediatorize.diffusion.sampling import Sampler
    from mediatorize.planning.search import Wanted

    Sampler.resolve(arch, **guidance)  # refuses
    return Wanted(process=process_of(arch).name, shape=(arch.channels, *arch.input_size), **guidance, **settings)


def find_plans(
    model: DiffusionTransformer,
    calls: Sequence[int],
    wanted: Wanted,
    *,
    seed: int = 0,
    batch: int = 64,
    reference_steps: int = REFERENCE_STEPS,
    levels: CallCosts | None = None,
    store: Store | None = None,
    world: World | None = None,
    progress: Progress | None = None,
) -> Plans:
    """Plans for a model, and beside them its other solvers with as many calls. The linear algebra is on the CPU, in float64.

    Args:
        model: in eval mode, on its device, in the precision that will sample.
        batch: rows of the model at a time.
        levels: costs of one row of a call: also try more calls at cheaper levels, for the price of each number of calls.
    """
    import torch

    from mediatorize.devices import ALONE
    from mediatorize.diffusion.planned import ModelDenoiser
    from mediatorize.planning.search import search
    from mediatorize.progress import silent
    from mediatorize.randomness import gaussian, seed_for, spread_labels

    world = ALONE if world is None else world
    seeds = [seed_for(seed, purpose) for purpose in SETS]
    noise = [gaussian(own, "initial noise", range(size), wanted.shape) for own, size in zip(seeds, wanted.sizes, strict=True)]
    known = model.arch.classes + (model.arch.null_class and wanted.cfg_scale == 1)  # without guidance, null is a label as others are
    classes = (known, known, model.arch.classes)
    labels = torch.cat([spread_labels(most, size, own) for most, size, own in zip(classes, wanted.sizes, seeds, strict=True)])
    drawn = partial(_drawn, model, labels, wanted, batch, world)
    return search(
        ModelDenoiser(model, labels, batch, world),
        wanted,
        calls,
        (noise[0], noise[1], noise[2]),
        others=lambda count, noise, rows: {
            name: drawn(name, count // solver.calls_per_step, noise, rows)
            for name, solver in fixed_solvers(wanted.process).items()
            if count % solver.calls_per_step == 0
        },
        many=lambda noise, rows: {name: drawn(name, reference_steps, noise, rows) for name in [default_solver(wanted.process)]},
        levels=None if levels is None else partial(level_table, model, labels[: wanted.sizes[0]], seeds[0], levels, batch, world),
        store=store,
        progress=silent if progress is None else progress,
    )


def level_table(
    model: DiffusionTransformer, labels: Tensor, seed: int, costs: CallCosts, batch: int, world: World, plan: Plan
) -> LevelTable:
    """What the model's levels do in a plan, from walks back along its own trajectories; the first process's, in all of them.

    Args:
        labels: (n,), of which the first `TRAJECTORIES` are used, from the initial noise of a seed.
        costs: of one row of a call.
        batch: rows of the model at a time.
    """
    import numpy as np
    import torch

    from mediatorize.compression.costs import KINDS_OF_SAVING, bare_levels
    from mediatorize.compression.sensitivity import Probes, Products, adjoint_products, error_table, probe
    from mediatorize.compression.tables import DIRECTIONS, beside_pretrained
    from mediatorize.diffusion.sampling import PlanSampler
    from mediatorize.model.levels import SOFTMAX
    from mediatorize.planning.levels import LevelTable

    arch, settings, sampler = model.arch, model.added(), PlanSampler.of(plan, seed)
    options = bare_levels(settings, KINDS_OF_SAVING)
    added = [level for level in options if level != SOFTMAX]
    parts = torch.arange(min(TRAJECTORIES, len(labels))).split(max(1, batch // max(plan.rows)))
    probes = Probes.joined([probe(model, labels[rows], sampler, DIRECTIONS, int(rows[0])) for rows in parts])
    products = Products.joined([adjoint_products(model, sampler, probes, rows, added) for rows in parts]).levels
    table = beside_pretrained(products, options)
    order = list(map(float, range(len(plan.calls))))  # every call is a cell of its own
    squares = error_table(table, probes.samples.flatten(1).norm(dim=1), order, options).squares()
    rows = np.array(plan.rows)
    there = [tuple(settings.level_of(layer, level) for level in options) for layer in range(arch.depth)]
    layers = [list(map(costs.block, own)) for own in there]
    table_of_plan = LevelTable(
        options=tuple(there), squares=squares, costs=rows[:, None, None] * np.array(layers), rest=int(rows.sum()) * costs.rest
    )
    return world.as_first(table_of_plan)


def default_solver(process: str) -> str:
    """The solver that people use with many steps: the first of the table."""
    return next(iter(fixed_solvers(process)))


def _drawn(
    model: DiffusionTransformer,
    labels: Tensor,
    wanted: Wanted,
    batch: int,
    world: World,
    solver: str,
    steps: int,
    noise: Tensor,
    rows: Tensor,
) -> Tensor:
    """Samples (n, c, h, w) by another solver from the same noise, on the CPU."""
    import torch

    from mediatorize.diffusion.sampling import Sampler, sample_batch
    from mediatorize.model.levels import SOFTMAX

    guidance: dict[str, Any] = {name: getattr(wanted, name) for name in ("cfg_scale", "cfg_channels", "cfg_interval")}
    sampler = Sampler.resolve(model.arch, solver=solver, steps=steps, **guidance)
    share = world.share(len(noise))
    pairs = zip(noise[share].split(batch), labels[rows][share].split(batch), strict=True)
    parts = [sample_batch(model, own, sampler, SOFTMAX, noise=part).float().cpu() for part, own in pairs]
    return world.gather(torch.cat([noise[:0], *parts]))


def share_of(model: DiffusionTransformer, plan: Plan, reference_steps: int) -> float:
    """FLOPs of a plan, as a share of those of so many calls in full."""
    from mediatorize.diffusion.planned import plan_flops
    from mediatorize.diffusion.sampling import Sampler
    from mediatorize.model.levels import SOFTMAX

    guidance: dict[str, Any] = {name: getattr(plan, name) for name in ("cfg_scale", "cfg_channels", "cfg_interval")}
    whole = Sampler.resolve(model.arch, steps=reference_steps, **guidance).flops(model.arch, SOFTMAX, None)
    assert whole is not None, "the default solver has fixed steps"
    return plan_flops(model.arch, plan, model.settings) / whole


def added_hash(model: DiffusionTransformer) -> str | None:
    """Of the weights that conversion added; None where there are none."""
    from mediatorize.formats.bundle import hash_of_tensors

    added = model.mediator_parameters()
    return hash_of_tensors({name: value.data for name, value in added.items()}) if added else None


def signed(each: Any, found: Plans, facts: Mapping[str, Any]) -> Plan:
    """The plan with what it was measured on and made for."""
    told = each.reported
    errors = {
        "median": told.median,
        "interval": list(told.interval or ()),
        "mean": told.mean,
        "flipped": told.flipped,
        "samples": told.samples,
    }
    reference = {"calls": found.reference_calls, "error": found.reference_error}
    added = facts["added"] if any(call.levels is not None for call in each.plan.calls) else None
    made_for = {name: facts[name] for name in ("weights", "dtype", "seed")}
    made_for |= {"added": added, "reference": reference, "mediatorize": VERSION}
    plan: Plan = replace(each.plan, errors=errors, made_for=made_for)
    return plan


def peak_bytes(arch: Architecture, wanted: Wanted, batch: int, itemsize: int) -> int:
    """Roughly the most memory that a search takes at a time: weights, one batch's activations, and the reference's states."""
    from mediatorize.model import cost

    numbers = math.prod(wanted.shape)
    calls = 140 if wanted.process == "ddpm" else 60
    activations = batch * arch.tokens * (12 * arch.width + arch.mlp_width) * itemsize
    return itemsize * cost.count_parameters(arch) + activations + 4 * numbers * wanted.samples * (2 * calls + 40)


def calibrate(
    model: DiffusionTransformer,
    calls: Sequence[int],
    *,
    cfg_scale: float = 1.0,
    cfg_channels: int | Literal["all"] = 3,
    cfg_interval: tuple[float, float] = (0.0, 1.0),
    streams: Streams = "guided",
    samples: int = 48,
    seed: int = 0,
    batch: int = 64,
    progress: Progress | None = None,
) -> dict[int, Plan]:
    """Plans for a model, by their number of calls: `mz.sample(model, labels, plan=plan)` samples by one.

    Args:
        model: in eval mode, on its device, in the precision that will sample.
        calls: numbers of model calls, each at least 2.
        cfg_scale, cfg_channels, cfg_interval: guidance, as in `mz.sample`.
        streams: `guided`: updates combine guided outputs. `halves`: both halves of guidance, which is nearer.
        samples: that weights are fitted to; more take longer.

    Raises:
        UserError: the model cannot be guided so, or its samples are not finite.
    """
    from mediatorize.formats.bundle import hash_of_weights

    guidance = {"cfg_scale": cfg_scale, "cfg_channels": cfg_channels, "cfg_interval": cfg_interval}
    wanted = wanted_of(model.arch, guidance, streams=streams, samples=samples)
    found = find_plans(model, calls, wanted, seed=seed, batch=batch, progress=progress)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    facts = {"weights": hash_of_weights(model), "added": added_hash(model), "dtype": dtype, "seed": seed}
    return {count: signed(each, found, facts) for count, each in found.found.items()}
