"""`mediatorize calibrate` finds plans of few model calls, or the schedule that changes samples least within a budget."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mediatorize.compression.costs import COSTS, KINDS_OF_SAVING, kinds_of, read_budget, read_kind, refuse_out_of_reach
from mediatorize.errors import UserError, about, refuse_below
from mediatorize.planning.results import Planned
from mediatorize.signatures import OneOf, given, listed, one, whole_number
from mediatorize.stages import options
from mediatorize.stages.options import OUTPUT, SAMPLING, WHAT, option
from mediatorize.stages.plans import REFERENCE_STEPS, calibrate_plans, calls_within
from mediatorize.stages.running import process_bytes, progress_bar
from mediatorize.torchrun import started_by_torchrun

if TYPE_CHECKING:
    from mediatorize.compression.costs import Costs
    from mediatorize.compression.search import Outcomes
    from mediatorize.diffusion.sampling import Sampler
    from mediatorize.model.architecture import Architecture
    from mediatorize.model.levels import MediatorSettings

FOLDER = "calibration"
"""A folder in the bundle: the error table, the candidates, pictures, and the results of an unfinished measurement."""
SCHEDULES = "schedules"
"""A folder in the bundle: one schedule per budget."""


FOR_PLANS = {
    "model",
    "calls",
    "budget",
    "budgets",
    "out",
    "samples",
    "streams",
    "reference_steps",
    "cost",
    "verify",
    "seed",
    "batch",
    "device",
    "dtype",
} | {*("cfg_scale", "cfg_channels", "cfg_interval", "family", "num_heads", "num_classes", "weights", "dry_run", "force")}
"""Parameters that plans heed."""
ONLY_PLANS = {"calls", "out", "samples", "streams", "reference_steps", "family", "num_heads", "num_classes", "weights", "dtype"}
"""Parameters that schedules do not."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What `calibrate` did, or with `dry_run` would do."""

    bundle: Path
    folder: Path
    """Holds the error table and the pictures."""
    arch: Architecture
    settings: MediatorSettings
    sampler: Sampler
    """Errors are measured on this sampler's trajectories."""
    cost: str
    """The unit of the budget: a name in `COSTS`."""
    costs: Costs
    """The costs of that sampler."""
    kinds: tuple[str, ...]
    """What the schedule may spend less by: names in `KINDS_OF_SAVING`."""
    trajectories: int
    verify: int
    notes: tuple[str, ...]
    files: Mapping[float, Path]
    """The schedule's file, by budget."""
    weights: str = ""
    """SHA-256 of the bundle's weights; empty after a dry run."""
    found: Outcomes | None = None
    """None after a dry run."""
    seconds: float = 0.0
    estimated_seconds: float | None = None
    """After a dry run only: FLOPs divided by this device's measured rate."""
    estimated_bytes: int | None = None
    """After a dry run only: memory of the process, or of the GPU."""


def calibrate(
    model: Annotated[Path, typer.Argument(help="a checkpoint, a diffusers folder or a bundle")],
    *,
    calls: Annotated[
        tuple[int, ...],
        option("fit plans of so many model calls, such as 4,6,8", WHAT, parser=listed(whole_number), metavar="N,N,..."),
    ] = (),
    out: Annotated[Path | None, option("file for the plans; default: in the bundle, or beside the checkpoint", OUTPUT)] = None,
    streams: Annotated[
        Literal["guided", "halves"],
        option("with --calls and guidance: updates combine guided outputs, or both halves (nearer, but not for diffusers)", SAMPLING),
    ] = "guided",
    samples: Annotated[int, option("with --calls: samples that weights are fitted to", SAMPLING, min=1)] = 48,
    reference_steps: Annotated[int, option("of plans: steps of the sampler that budgets are shares of", SAMPLING, min=2)] = REFERENCE_STEPS,
    budget: Annotated[
        float | str | None,
        option(
            "the most that sampling may cost: of plans a share of --reference-steps, else of softmax's; 0.16 or 16%",
            WHAT,
            parser=one(read_budget),
            metavar="SHARE",
        ),
    ] = None,
    budgets: Annotated[
        tuple[float | str, ...],
        option(
            "several budgets; schedule.json is for --budget, or for the first of these",
            WHAT,
            parser=listed(read_budget),
            metavar="SHARE,SHARE,...",
        ),
    ] = (),
    cost: Annotated[str, option("unit of the budget: FLOPs, or time on this device at --batch", WHAT), OneOf(COSTS)] = "flops",
    rule: Annotated[
        Literal["latent-change"] | None,
        option("find the paper's step-wise rule for the budget, in place of a fixed schedule: levels, --first and --ratios", WHAT),
    ] = None,
    kinds: Annotated[
        tuple[str, ...],
        option(
            f"of a bundle: find a schedule of levels for all steps of a solver, in place of a plan; of {', '.join(KINDS_OF_SAVING)}",
            WHAT,
            parser=listed(read_kind),
            metavar="KIND,KIND,...",
        ),
    ] = (),
    solver: options.Solver = None,
    steps: options.Steps = None,
    cfg_scale: options.Guidance = 1.0,
    cfg_channels: options.Channels = 3,
    cfg_interval: options.Interval = (0.0, 1.0),
    timestep_shift: options.Shift = 1.0,
    seed: options.Seed = 0,
    trajectories: Annotated[int, option("teacher samples for the error table", SAMPLING, min=1)] = 8,
    verify: Annotated[int, option("held-out samples to measure errors on; 0 uses predicted errors of schedules", SAMPLING, min=0)] = 32,
    batch: options.Batch = 32,
    family: options.Family = None,
    num_heads: options.Heads = None,
    num_classes: options.Classes = None,
    weights: options.Weights = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    dry_run: options.DryRun = False,
    force: options.Force = False,
) -> Calibration | Planned:
    """Fits plans of few model calls to the teacher's own solution, for any model. With --kinds or --rule: finds a bundle's schedule of
    levels that changes the samples of a solver least within a budget. Resumes after a kill; runs under torchrun.

    Example: mediatorize calibrate DiT-XL-2-256x256.pt --family dit --calls 6,8,10 --cfg-scale 4
    """
    chosen = dict(locals())
    from mediatorize.compression import search as searching
    from mediatorize.compression.search import costs_of, flops_of_search, peak_bytes_of_search, samplers
    from mediatorize.compression.tables import DIRECTIONS
    from mediatorize.devices import measured_flops_per_second, pick_device, processes
    from mediatorize.diffusion.sampling import Sampler
    from mediatorize.formats import bundle as bundles
    from mediatorize.report import calibration as report
    from mediatorize.stages.work import SharedWork, Work

    start = time.monotonic()
    shares = list(dict.fromkeys(read_budget(given) for given in (*([] if budget is None else [budget]), *budgets)))
    if not shares and not calls:
        raise UserError("No number of calls and no budget was given.", hint="Pass --calls 4,6,8, or --budget 0.16.")
    if COSTS[cost].timed and started_by_torchrun():
        raise UserError("Times would be of processes that disturb each other.", hint="Run --cost latency in one process.")
    if not (kinds or rule):
        if calls and shares:
            raise UserError("A number of calls is a budget.", hint="Pass --calls or --budget.")
        asked = [name.replace("_", "-") for name in given(calibrate, chosen) if name not in FOR_PLANS]
        if asked:
            raise UserError(f"--{asked[0]} says nothing to plans.", hint="Leave it out, or pass --kinds mediators for a schedule.")
        return calibrate_plans(
            model,
            calls or calls_within(shares, reference_steps),
            out=out,
            guidance={"cfg_scale": cfg_scale, "cfg_channels": cfg_channels, "cfg_interval": tuple(cfg_interval)},
            reference_steps=reference_steps,
            streams=streams,
            unit=None if calls else cost,
            samples=samples,
            verify=max(2 * verify, 1),
            seed=seed,
            batch=batch,
            device=device,
            dtype=dtype,
            load={"family": family, "num_heads": num_heads, "num_classes": num_classes, "weights": weights},
            dry_run=dry_run,
            force=force,
        )
    idle = [name.replace("_", "-") for name in given(calibrate, chosen) if name in ONLY_PLANS]
    if idle:
        raise UserError(f"--{idle[0]} is for plans, and --kinds or --rule ask for a schedule.", hint="Pass one of them.")
    refuse_below({"trajectories": trajectories, "batch": batch}, 1)
    refuse_below({"verify": verify, "seed": seed}, 0)
    if not bundles.is_bundle(model):
        raise UserError(f"{model}: is no bundle.", hint="Make one with `mediatorize convert`, or leave --kinds out for a plan.")
    config = bundles.read_config(model)
    bundles.refuse_pruned(model, config)
    bundles.refuse_untrained(model, config)
    loaded = bundles.load_bundle(model)
    arch, settings, unit = loaded.arch, loaded.added(), COSTS[cost]
    with about(model):
        saving = kinds_of(settings, kinds)
    how: dict[str, Any] = {
        "solver": solver,
        "steps": steps,
        "cfg_scale": cfg_scale,
        "cfg_channels": cfg_channels,
        "cfg_interval": cfg_interval,
        "timestep_shift": timestep_shift,
    }
    sampler = Sampler.resolve(arch, **how, seed=seed, fixed_for="a budget needs" if rule is None else "a rule needs")
    measuring = samplers(sampler)[0]
    where = pick_device(device)
    costs = costs_of(cost, loaded.to(where), sampler, batch)
    for share in shares:
        with about(model):
            refuse_out_of_reach(share, costs, settings, unit, saving)
    files = {share: model / SCHEDULES / (("" if rule is None else "rule-") + unit.schedule_name(share)) for share in shares}
    log = bundles.read_log(model)
    finished = {item["file"] for line in log if line["command"] == "calibrate" for item in line["result"]["schedules"]}
    there = [file for file in files.values() if file.exists() and file.name in finished]  # others are of a run killed at the very end
    if there and not (force or dry_run):
        raise UserError(f"{there[0]}: exists.", hint="Pass --force to replace it, or another budget.")
    tuned = any(line["command"] == "finetune" for line in takewhile(lambda line: line["command"] != "resize", reversed(log)))
    result = Calibration(
        bundle=model,
        folder=model / FOLDER,
        arch=arch,
        settings=settings,
        sampler=measuring,
        cost=cost,
        costs=costs,
        kinds=saving,
        trajectories=trajectories,
        verify=verify,
        notes=() if tuned else ("warning: never finetuned; at the same budget a finetuned model has a smaller sample error",),
        files=files,
    )
    if dry_run:
        counts: dict[str, Any] = {"trajectories": trajectories, "verify": verify, "budgets": shares, "by_rule": rule is not None}
        spent = flops_of_search(arch, settings, sampler, **counts)
        expected = spent / measured_flops_per_second(where, arch.width, arch.tokens)
        tensors = peak_bytes_of_search(arch, settings, sampler, trajectories=trajectories, batch=batch)
        return replace(result, estimated_seconds=expected, estimated_bytes=process_bytes(tensors, where))

    measured = bundles.hash_of_file(model / "model.safetensors")
    plan = {"sampler": measuring.to_json(), "trajectories": trajectories, "directions": DIRECTIONS, "weights": measured}

    def refusal(before: dict[str, Any]) -> UserError | None:
        """Measurements of other weights are replaced. Measurements of another sampler are replaced only with --force."""
        other = Sampler.from_json(before["sampler"])
        how = f"{other.solver}, {other.steps} steps, guidance {other.cfg_scale}, {before['trajectories']} trajectories"
        error = UserError(f"{result.folder}: is for {how}, or another seed.", hint="Repeat those, or pass --force to measure anew.")
        return error if before["weights"] == measured else None

    wanted: dict[str, Any] = {"kinds": saving, "trajectories": trajectories, "verify": verify, "batch": batch}
    wanted |= {"by_rule": rule is not None, "timed": unit.timed, "facts": plan, "progress": progress_bar}
    with processes(where) as world:
        work = Work.open(result.folder, plan, force=force, refusal=refusal, world=world)
        wanted |= {"store": SharedWork(work, world), "world": world}
        with about(model):
            found = searching.search(loaded.to(world.device), sampler, shares, costs, **wanted)
        result = replace(result, found=found, weights=measured)
        if world.is_first:
            report.write_pictures(result)
            (model / SCHEDULES).mkdir(exist_ok=True)
            for outcome in found.outcomes:
                bundles.write_text(files[outcome.budget], report.schedule_text(result, outcome))
            bundles.write_text(model / "schedule.json", files[shares[0]].read_text())
            result = replace(result, seconds=time.monotonic() - start)
            told = report.facts(result)
            arguments = {"budgets": shares, "cost": cost, "rule": rule, "kinds": list(saving), **plan}
            bundles.append_log(model, "calibrate", arguments, {"schedules": told["schedules"], "seconds": told["seconds"]})
        world.barrier()
    return result
