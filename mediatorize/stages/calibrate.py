"""`mediatorize calibrate`: the schedule (a level for every timestep and layer) that keeps quality within a budget."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor

from mediatorize.compression.allocate import Choice, allocate, descend, latent_change_rule
from mediatorize.compression.costs import CostKind, Costs, flops_costs, latency_costs, median_seconds
from mediatorize.compression.sensitivity import (
    ErrorTable,
    Probes,
    Sampler,
    cells_of,
    error_table,
    latent_changes,
    probe_all,
    products_of_call,
    spread_labels,
)
from mediatorize.diffusion.solvers import (
    DEFAULT_SOLVER,
    Channels,
    call_noise_levels,
    call_times,
    find_solver,
    refuse_steps,
    rows_per_sample,
    sample,
)
from mediatorize.errors import UserError, about
from mediatorize.formats import bundle as bundles
from mediatorize.model import cost as closed_form
from mediatorize.model.architecture import SOFTMAX, Architecture, Level, MediatorSettings
from mediatorize.model.schedule import Schedule
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.report.pictures import Point, write_candidates, write_error_table, write_schedule_map
from mediatorize.stages.options import (
    BatchOption,
    ChannelsOption,
    DeviceOption,
    DryRunOption,
    ForceOption,
    GuidanceOption,
    Option,
    SeedOption,
    SolverOption,
    StepsOption,
)
from mediatorize.stages.running import measured_flops_per_second, pick_device, progress_bar, refuse_below, seconds_in_words, text_table
from mediatorize.stages.sample import Sampling, sample_many

Per = Literal["cell", "step"]

FOLDER = "calibration"
"""In the bundle: the error table, the candidates, pictures, and what an unfinished measurement has so far."""
SCHEDULES = "schedules"
PLAN_FILE = "plan.json"
PROBES_FILE = "probes.safetensors"
TABLE_FILE = "sensitivity.safetensors"
CANDIDATES_FILE = "candidates.json"

TABLE_SEED, HELD_OUT_SEED = 2**33, 2**33 + 1
"""Added to twice the seed: the table's noise and the held-out noise are nobody else's."""

DIRECTIONS = 4
"""Random directions per trajectory along which the change of a sample is followed."""

MODELS = ("vectors", "squares", "norms")
"""How errors of cells may add up; schedules are solved by the first two and predicted by the first."""


WHOLE, RULE, PER_STEP, PER_CELL = "one level throughout", "latent-change rule", "a level per step", "a level per step and layer"
"""Kinds of candidates."""


@dataclass(frozen=True)
class Candidate:
    """A choice of levels, its cost, and its error."""

    name: str
    kind: str
    """The picture's legend."""
    choice: Choice
    """(cells, layers) places among the table's options."""
    share: float
    """Of the softmax sampler's cost."""
    per_step: bool
    """Whether every step has one level for all layers."""
    predicted: dict[str, float]
    """Relative error of the samples, by each of `MODELS`."""
    measured: float | None = None
    """|sample - teacher's| / |teacher's| from held-out noise."""

    @property
    def error(self) -> float:
        return self.predicted["vectors"] if self.measured is None else self.measured


@dataclass(frozen=True)
class Latency:
    """Seconds of sampling one batch: predicted from single layers, and measured end to end."""

    batch: int
    predicted: float
    measured: float
    measured_softmax: float


@dataclass(frozen=True)
class Outcome:
    """What was chosen for one budget."""

    budget: float
    chosen: Candidate
    file: Path
    solved_seconds: float
    latency: Latency | None


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` did, or with `dry_run` would do."""

    bundle: Path
    name: str
    sampler: Sampler
    cost: CostKind
    noise_levels: int
    """How many the sampler meets."""
    layers: int
    levels: tuple[int, ...]
    least: float
    trajectories: int
    verify: int
    notes: tuple[str, ...]
    outcomes: tuple[Outcome, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    table_seconds: float | None = None
    """To measure the error table; None where it was there."""
    seconds: float = 0.0
    estimated_seconds: float | None = None
    """Only of a dry run: FLOPs over this device's measured rate."""

    def to_json(self) -> dict[str, Any]:
        return {
            "bundle": str(self.bundle),
            "dry_run": self.estimated_seconds is not None,
            "sampler": asdict(self.sampler),
            "cost": self.cost,
            "noise_levels": self.noise_levels,
            "layers": self.layers,
            "levels": list(self.levels),
            "least_budget": self.least,
            "trajectories": self.trajectories,
            "verified_samples": self.verify,
            "notes": list(self.notes),
            "schedules": [
                {
                    "budget": outcome.budget,
                    "file": outcome.file.name,
                    "candidate": outcome.chosen.name,
                    "relative_cost": outcome.chosen.share,
                    "predicted_error": outcome.chosen.predicted["vectors"],
                    "measured_error": outcome.chosen.measured,
                    "solved_seconds": round(outcome.solved_seconds, 3),
                    "latency": None if outcome.latency is None else vars(outcome.latency),
                }
                for outcome in self.outcomes
            ],
            "candidates": [{key: value for key, value in vars(c).items() if key != "choice"} for c in self.candidates],
            "table_seconds": None if self.table_seconds is None else round(self.table_seconds, 1),
            "estimated_seconds": self.estimated_seconds,
            "seconds": round(self.seconds, 1),
        }

    def __str__(self) -> str:
        how, levels = self.sampler, ", ".join(map(str, self.levels))
        unit = "FLOPs" if self.cost == "flops" else "time"
        lines = [
            f"{self.name}: levels {levels} or softmax in {self.layers} layers at {self.noise_levels} noise levels; {how.solver}, "
            f"{how.steps} steps, guidance {how.cfg_scale}",
            f"  budgets from {self.least:.1%} to 100% of softmax's {unit} can be met",
            *(f"  {note}" for note in self.notes),
        ]
        if self.estimated_seconds is not None:
            lines.append(
                f"Would measure {self.trajectories} trajectories and judge candidates by {self.verify} samples each: about "
                f"{seconds_in_words(self.estimated_seconds)} at this device's rate. Nothing was written."
            )
            return "\n".join(lines)
        kept = {outcome.chosen.name: f"{outcome.budget:.2%}" for outcome in self.outcomes}
        rows = [
            (
                candidate.name,
                f"{candidate.share:.2%}",
                f"{candidate.predicted['vectors']:.4f}",
                "-" if candidate.measured is None else f"{candidate.measured:.4f}",
                kept.get(candidate.name, ""),
            )
            for candidate in sorted(self.candidates, key=lambda candidate: (-candidate.share, candidate.error))
        ]
        header = ("candidate", f"of softmax's {unit}", "predicted error", "measured error", "kept for")
        lines += ["", text_table(header, rows), "", *self._of_models()]
        for outcome in self.outcomes:
            best = outcome.chosen
            lines.append(f"{outcome.file}: {best.name}, {best.share:.2%} of softmax's {unit} for a budget of {outcome.budget:.2%}")
            if outcome.latency is not None:
                took = outcome.latency
                lines.append(
                    f"  a batch of {took.batch}: predicted {took.predicted:.3f} s, measured {took.measured:.3f} s, softmax "
                    f"{took.measured_softmax:.3f} s: {took.measured / took.measured_softmax:.1%} of its time"
                )
        table = "was there from before" if self.table_seconds is None else f"took {seconds_in_words(self.table_seconds)}"
        lines.append(f"The error table {table}; all in all {seconds_in_words(self.seconds)}. Pictures are in {self.bundle / FOLDER}.")
        return "\n".join(lines)

    def _of_models(self) -> list[str]:
        """How each way of adding up errors did on the candidates that were measured."""
        judged = [(candidate.predicted, candidate.measured) for candidate in self.candidates if candidate.measured]
        if len(judged) < 3:
            return []
        parts = []
        for model in MODELS:
            logs = [math.log(predicted[model] / measured) for predicted, measured in judged]
            parts.append(f"as {model} {math.exp(statistics.fmean(logs)):.2f} (spread {statistics.pstdev(logs):.0%})")
        return [f"Predicted over measured error, where cells add up {', '.join(parts)}.", ""]


def calibrate(
    model: Annotated[Path, Option("the bundle; the schedule is put into it")],
    *,
    budget: Annotated[float | str | None, Option("share of the softmax sampler's cost, such as 0.75 or 75%")] = None,
    budgets: Annotated[tuple[float | str, ...], Option("several, such as 0.9,0.8; schedule.json is of --budget, or of the first")] = (),
    cost: Annotated[
        CostKind, Option("what is budgeted: flops, or latency on this device at --batch", choices=("flops", "latency"))
    ] = "flops",
    per: Annotated[Per, Option("a level for every step and layer, or one per step for all layers", choices=("cell", "step"))] = "cell",
    solver: SolverOption = None,
    steps: StepsOption = None,
    cfg_scale: GuidanceOption = 1.0,
    cfg_channels: ChannelsOption = 3,
    trajectories: Annotated[int, Option("of the teacher, that errors are measured on")] = 32,
    verify: Annotated[int, Option("held-out samples that candidates are judged by; 0 trusts predictions")] = 64,
    rounds: Annotated[int, Option("times that errors are measured again around the best schedule")] = 0,
    seed: SeedOption = 0,
    batch: BatchOption = 32,
    device: DeviceOption = "auto",
    dry_run: DryRunOption = False,
    force: ForceOption = False,
) -> Calibration:
    """Finds the schedule that changes samples least within a budget. Errors are measured once for all budgets. Resumes after a kill."""
    start = time.monotonic()
    shares = parse_budgets(budget, budgets)
    refuse_below({"trajectories": trajectories, "batch": batch}, 1)
    refuse_below({"verify": verify, "rounds": rounds, "seed": seed}, 0)
    if not bundles.is_bundle(model):
        raise UserError(f"{model}: is no bundle.", hint="Run `mediatorize convert` first.")
    loaded = bundles.load_bundle(model)
    arch, settings = loaded.arch, loaded.settings
    assert settings is not None
    sampler = sampler_for(arch, solver, steps, cfg_scale, cfg_channels, TABLE_SEED + 2 * seed)
    noise_levels = call_noise_levels(arch, find_solver(arch, sampler.solver), sampler.steps)
    cells, place = cells_of(noise_levels)
    calls = [place.count(cell) for cell in range(len(cells))]
    loaded = loaded.to(pick_device(device))
    rows = rows_per_sample(cfg_scale)
    costs = flops_costs(arch, settings, calls, rows) if cost == "flops" else latency_costs(loaded, settings, calls, rows * batch)
    for share in shares:
        refuse_out_of_reach(model, share, costs, settings)
    files = {share: model / SCHEDULES / schedule_name(share, cost) for share in shares}
    log = bundles.read_log(model)
    finished = {item["file"] for line in log if line["command"] == "calibrate" for item in line["result"]["schedules"]}
    there = [file for file in files.values() if file.exists() and file.name in finished]  # others are of a run killed at the very end
    if there and not (force or dry_run):
        raise UserError(f"{there[0]}: exists.", hint="Pass --force to replace it, or another budget.")
    notes = []
    if not any(line["command"] == "finetune" for line in log):
        notes.append("warning: never finetuned; at the same budget a finetuned model loses less")
    sizes = (len(cells), arch.depth)
    report = Calibration(model, arch.name, sampler, cost, *sizes, settings.levels, costs.least, trajectories, verify, tuple(notes))
    if dry_run:
        spent = flops_to_calibrate(arch, settings, sampler, trajectories, verify, len(shares), rounds)
        rate = measured_flops_per_second(pick_device(device), arch.width, arch.tokens)
        return replace(report, estimated_seconds=spent / rate)

    work = Workplace.open(model, loaded, sampler, trajectories, batch, force)
    table, probes = work.table()
    table_seconds = time.monotonic() - start if work.measured else None
    judge = Judge(work, table, costs, replace(sampler, seed=HELD_OUT_SEED + 2 * seed), verify, batch)
    for option, level in enumerate(settings.levels):
        judge.add(f"m = {level}", WHOLE, np.full(sizes, option))
    states = probes.states[[place.index(cell) for cell in range(len(cells))]]
    solved = {}
    for share in shares:
        begun, room = time.monotonic(), costs.room(share)
        found = solutions(table, costs, room, per)
        solved[share] = time.monotonic() - begun
        rule = latent_change_rule(latent_changes(states), table.squares(), costs.cells, room)
        for name, choice in (found if rule is None else {**found, RULE: rule}).items():
            judge.add(f"{name}, {share:.2%}", kind_of(name), choice)
        for turn in range(rounds):
            present = judge.best(share, per).choice
            nearby = work.table_around(table, probes, present)
            again = _descend(nearby, costs, room, present, per, apart=True)
            judge.add(f"measured again {turn + 1}, {share:.2%}", PER_STEP if per == "step" else PER_CELL, again)
    outcomes = []
    for share in shares:
        best = judge.best(share, per)
        took = latency(loaded, sampler, table.schedule(best.choice), float(costs.of(best.choice)), batch) if cost == "latency" else None
        outcomes.append(Outcome(share, best, files[share], solved[share], took))

    report = replace(report, outcomes=tuple(outcomes), candidates=tuple(judge.candidates), table_seconds=table_seconds)
    _write_pictures(work.folder, table, report)
    (model / SCHEDULES).mkdir(exist_ok=True)
    for outcome in outcomes:
        facts = _facts(outcome, report, work.plan["weights"])
        bundles.write_text(outcome.file, schedule_text(table.schedule(outcome.chosen.choice), facts))
    bundles.write_text(model / "schedule.json", files[shares[0]].read_text())
    report = replace(report, seconds=time.monotonic() - start)
    arguments = {"budgets": shares, "cost": cost, "per": per, **work.plan}
    bundles.append_log(model, "calibrate", arguments, {"schedules": report.to_json()["schedules"], "seconds": round(report.seconds, 1)})
    return report


# --- what is asked for ---------------------------------------------------------------------------------------------------------


def parse_budgets(budget: float | str | None, budgets: Sequence[float | str]) -> list[float]:
    """Shares, that of `budget` first, none twice."""
    given = [*([] if budget is None else [budget]), *budgets]
    if not given:
        raise UserError("No budget was given.", hint="Pass --budget 0.75, or --budgets 0.9,0.8,0.7.")
    shares = []
    for text in given:
        try:
            share = float(text.removesuffix("%")) / 100 if isinstance(text, str) and text.endswith("%") else float(text)
        except ValueError:
            raise UserError(f"{text!r} is no budget.", hint="Pass a share such as 0.75 or 75%.") from None
        if not 0 < share <= 1:
            raise UserError(f"{text} is no share of the softmax sampler's cost.", hint="Pass a share such as 0.75 or 75%.")
        shares.append(round(share, 6))
    return list(dict.fromkeys(shares))


def schedule_name(share: float, cost: CostKind) -> str:
    """`0.80.json`, `latency-0.725.json`."""
    text = f"{share:.6f}".rstrip("0")
    return f"{'' if cost == 'flops' else 'latency-'}{text.ljust(4, '0')}.json"


def sampler_for(arch: Architecture, solver: str | None, steps: int | None, cfg_scale: float, cfg_channels: Channels, seed: int) -> Sampler:
    name = solver or DEFAULT_SOLVER[arch.family]
    chosen = find_solver(arch, name)
    if chosen.adaptive:
        raise UserError(f"{name} takes as many steps as it needs; a budget needs a fixed number.", hint="Pass --solver euler.")
    if cfg_scale != 1 and not arch.null_class:
        raise UserError("This model has no null class, which guidance needs.", hint="Pass --cfg-scale 1.")
    taken = chosen.default_steps if steps is None else steps
    refuse_steps(chosen, taken)
    return Sampler(name, taken, cfg_scale, cfg_channels, seed)


def refuse_out_of_reach(bundle: Path, share: float, costs: Costs, settings: MediatorSettings) -> None:
    if share >= costs.least:
        return
    levels = ", ".join(map(str, settings.levels))
    wider = [*(["smaller --levels"] if settings.levels[0] > 1 else []), *(["a smaller --local-rank"] if settings.local_rank else [])]
    hint = f"Convert with {' or '.join(wider)}; " if wider else ""
    what = "FLOPs" if costs.kind == "flops" else "time"
    raise UserError(
        f"{bundle}: can go down to {costs.least:.1%} of softmax's {what} with levels {levels}; you asked for {share:.1%}.",
        hint=f"{hint}{'a' if hint else 'A'} higher resolution widens the range too. Or ask for {math.ceil(costs.least * 1000) / 10:.1f}%.",
    )


def flops_to_calibrate(
    arch: Architecture, settings: MediatorSettings, sampler: Sampler, trajectories: int, verify: int, budgets: int, rounds: int
) -> float:
    """Roughly: probes (a backward counts as two forwards and runs the call again), the table, and whole samples of candidates."""
    rows = len(call_times(find_solver(arch, sampler.solver), sampler.steps)) * rows_per_sample(sampler.cfg_scale)
    table = 1 + len(settings.levels) * (arch.depth + 1) / (2 * arch.depth)
    forwards = trajectories * (1 + 3 * DIRECTIONS + table * (1 + rounds * budgets))
    candidates = 1 + len(settings.levels) + (4 + rounds) * budgets
    return rows * (forwards + candidates * verify) * closed_form.forward_flops(arch)


# --- measuring -----------------------------------------------------------------------------------------------------------------


@dataclass
class Workplace:
    """The bundle's calibration folder: what is measured is kept there call by call, and is not measured again."""

    folder: Path
    plan: dict[str, Any]
    """Everything that the error table depends on."""
    model: DiffusionTransformer
    sampler: Sampler
    trajectories: int
    batch: int
    measured: bool = False
    """Whether anything had to be."""

    @classmethod
    def open(cls, bundle: Path, model: DiffusionTransformer, sampler: Sampler, trajectories: int, batch: int, force: bool) -> Workplace:
        """The folder as it is, if it is of this plan; else a new one, in place of one for other weights or by force."""
        folder = bundle / FOLDER
        weights = bundles.hash_of_file(bundle / "model.safetensors")
        plan = {"sampler": asdict(sampler), "trajectories": trajectories, "directions": DIRECTIONS, "weights": weights}
        plan_file = folder / PLAN_FILE
        before = json.loads(plan_file.read_text()) if plan_file.exists() else None
        if before is not None and before != plan:
            if before["weights"] == weights and not force:
                other = before["sampler"]
                raise UserError(
                    f"{folder}: is for {other['solver']}, {other['steps']} steps, guidance {other['cfg_scale']}, "
                    f"{before['trajectories']} trajectories, or another seed.",
                    hint="Repeat those, or pass --force to measure anew.",
                )
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        if before != plan:
            bundles.write_json(plan_file, plan)
        return cls(folder, plan, model, sampler, trajectories, batch)

    @property
    def options(self) -> list[Level]:
        assert self.model.settings is not None
        return [*self.model.settings.levels, SOFTMAX]

    @property
    def times(self) -> list[float]:
        return call_times(find_solver(self.model.arch, self.sampler.solver), self.sampler.steps)

    @property
    def noise_levels(self) -> list[float]:
        return call_noise_levels(self.model.arch, find_solver(self.model.arch, self.sampler.solver), self.sampler.steps)

    def table(self) -> tuple[ErrorTable, Probes]:
        """The error table around the teacher, and the trajectories that it is of."""
        probes = self._probes()
        file = self.folder / TABLE_FILE
        if not file.exists():
            self.measured = True
            products = self._products(probes, "measuring errors")
            bundles.write_tensors(file, {"products": products, "sample_squares": probes.samples.flatten(1).square().sum(1)}, self.plan)
            for part in self.folder.glob("call-*.safetensors"):
                part.unlink()
        stored, _ = bundles.read_tensors(file)
        products = stored["products"]
        softmax = torch.zeros_like(products[:, :, :1])
        return error_table(torch.cat([products, softmax], dim=2), stored["sample_squares"], self.noise_levels, self.options), probes

    def _probes(self) -> Probes:
        file = self.folder / PROBES_FILE
        if not file.exists():
            self.measured = True
            with progress_bar(-(-self.trajectories // self.batch) * len(self.times), "sampling the teacher", "call") as bar:
                probes = probe_all(self.model, self.trajectories, self.sampler, DIRECTIONS, self.batch, lambda: bar.update())
            bundles.write_tensors(file, vars(probes))
        return Probes(**bundles.read_tensors(file)[0])

    def _products(self, probes: Probes, description: str, levels: Sequence[Sequence[Level]] | None = None) -> Tensor:
        """(calls, layers, options, n, k); around the teacher every call is kept at once, and softmax is left out."""
        parts = []
        options = self.options if levels else self.options[:-1]
        with progress_bar(len(self.times), description, "call") as bar:
            for call, t in enumerate(self.times):
                file = self.folder / f"call-{call:04d}.safetensors"
                if levels is None and file.exists():
                    parts.append(bundles.read_tensors(file)[0]["products"])
                else:
                    around = levels[call] if levels else None
                    parts.append(products_of_call(self.model, self.sampler, probes, call, t, options, self.batch, around))
                    if levels is None:
                        bundles.write_tensors(file, {"products": parts[-1]})
                bar.update()
        return torch.stack(parts)

    def table_around(self, table: ErrorTable, probes: Probes, choice: Choice) -> ErrorTable:
        """`table`, its changes of single cells measured again where all others are at `choice`."""
        _, place = cells_of(self.noise_levels)
        levels = [[self.options[option] for option in choice[cell]] for cell in place]
        products = self._products(probes, "measuring again", levels)
        squares = probes.samples.flatten(1).square().sum(1)
        return table.around(choice, error_table(products, squares, self.noise_levels, self.options))


class Judge:
    """Candidates and their errors; what was measured before, on the same held-out noise, is not measured again."""

    def __init__(self, work: Workplace, table: ErrorTable, costs: Costs, sampler: Sampler, samples: int, batch: int) -> None:
        self.work, self.table, self.costs = work, table, costs
        self.sampling = Sampling(sampler.solver, sampler.steps, sampler.cfg_scale, sampler.cfg_channels, sampler.seed, batch)
        self.samples = samples
        self.labels = spread_labels(work.model.arch.classes, samples, sampler.seed)
        self.teacher: Tensor | None = None
        self.candidates: list[Candidate] = []
        self.file = work.folder / CANDIDATES_FILE
        self.measured: dict[str, float] = {}
        if self.file.exists():
            stored = json.loads(self.file.read_text())
            self.measured = stored["measured"] if stored["samples"] == samples else {}

    def add(self, name: str, kind: str, choice: Choice) -> None:
        """Judges a choice of levels, unless one like it of that kind is there."""
        if any(kind == candidate.kind and np.array_equal(choice, candidate.choice) for candidate in self.candidates):
            return
        share = float(self.costs.of(choice) / self.costs.softmax)
        per_step = bool((choice == choice[:, :1]).all())
        measured = self._measure(name, choice) if self.samples else None
        self.candidates.append(Candidate(name, kind, choice, share, per_step, self.table.predicted(choice), measured))

    def _measure(self, name: str, choice: Choice) -> float:
        key = " ".join("".join(map(str, row)) for row in choice.tolist())
        if key not in self.measured:
            if self.teacher is None:
                self.teacher = sample_many(self.work.model, self.labels, self.sampling, SOFTMAX, "held-out teacher")
            found = sample_many(self.work.model, self.labels, self.sampling, self.table.schedule(choice), name)
            self.measured[key] = float((found - self.teacher).norm() / self.teacher.norm())
            bundles.write_json(self.file, {"samples": self.samples, "measured": self.measured})
        return self.measured[key]

    def best(self, share: float, per: Per) -> Candidate:
        """The candidate of least error within a budget; of a smaller budget's too, should they be better."""
        room = self.costs.room(share) + self.costs.rest
        fitting = [c for c in self.candidates if self.costs.of(c.choice) <= room and (per == "cell" or c.per_step)]
        return min(fitting, key=lambda candidate: (candidate.error, candidate.share))


def solutions(table: ErrorTable, costs: Costs, room: float, per: Per) -> dict[str, Choice]:
    """Choices within the budget, by several ways of adding up errors; with one level per step in any case."""
    squares = table.squares()
    found: dict[str, Choice] = {}
    if per == "cell":
        found["sum of squares"] = allocate(squares, costs.cells, room)
        found["sum of vectors per layer"] = _descend(table, costs, room, found["sum of squares"], per, apart=True)
        found["sum of vectors"] = _descend(table, costs, room, found["sum of squares"], per, apart=False)
    steps = allocate(squares, costs.cells, room, per_step=True)
    found["per step, sum of squares"] = steps
    found["per step, sum of vectors"] = _descend(table, costs, room, steps, "step", apart=True)
    return found


def kind_of(name: str) -> str:
    return RULE if name == RULE else PER_STEP if name.startswith("per step") else PER_CELL


def _descend(table: ErrorTable, costs: Costs, room: float, start: Choice, per: Per, *, apart: bool) -> Choice:
    return descend(table.products, costs.cells, room, start, apart=apart, per_step=per == "step")


@torch.no_grad()
def latency(model: DiffusionTransformer, sampler: Sampler, schedule: Schedule, predicted: float, batch: int) -> Latency:
    """Whole batches, by the schedule and by softmax."""
    labels = torch.zeros(batch, dtype=torch.long)
    how: dict[str, Any] = {key: value for key, value in vars(sampler).items() if key != "seed"}
    noise = torch.randn(batch, model.arch.channels, *model.arch.input_size, generator=torch.Generator().manual_seed(0))
    where = next(model.parameters()).device
    levels: tuple[Schedule | Level, ...] = (schedule, SOFTMAX)
    times = [
        [median_seconds(partial(sample, model, labels, noise=noise, schedule=level, **how), where, 1) for level in levels] for _ in range(3)
    ]
    return Latency(batch, predicted, *(statistics.median(column) for column in zip(*times, strict=True)))  # in turns: other load hits both


# --- what is written -----------------------------------------------------------------------------------------------------------


def schedule_text(schedule: Schedule, facts: Mapping[str, Any]) -> str:
    """A schedule as JSON with one line per piece, after what it was made for."""
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in facts.items()]
    pieces = [f"    {json.dumps(piece)}" for piece in schedule.to_json()["pieces"]]
    return "{\n" + "\n".join(lines) + '\n  "pieces": [\n' + ",\n".join(pieces) + "\n  ]\n}\n"


def read_schedule_for(bundle: Path, share: float, cost: CostKind = "flops") -> Schedule:
    """The schedule that the bundle keeps for a budget."""
    file = bundle / SCHEDULES / schedule_name(share, cost)
    if not file.exists():
        there = ", ".join(sorted(other.stem for other in (bundle / SCHEDULES).glob("*.json"))) or "none"
        raise UserError(f"{bundle}: has no schedule for {share:.4g} ({there}).", hint=f"Run `mediatorize calibrate --budget {share:.4g}`.")
    with about(file):
        return Schedule.from_json(json.loads(file.read_text()))


def _facts(outcome: Outcome, report: Calibration, weights: str) -> dict[str, Any]:
    how = report.sampler
    best = outcome.chosen
    return {
        "budget": outcome.budget,
        "cost": report.cost,
        "relative_cost": round(best.share, 6),
        "predicted_error": round(best.predicted["vectors"], 6),
        "measured_error": None if best.measured is None else round(best.measured, 6),
        "calibrated_for": {"solver": how.solver, "steps": how.steps, "cfg_scale": how.cfg_scale, "cfg_channels": how.cfg_channels},
        "weights_sha256": weights,
    }


def _write_pictures(folder: Path, table: ErrorTable, report: Calibration) -> None:
    unit = "FLOPs" if report.cost == "flops" else "time"
    for outcome in report.outcomes:
        best = outcome.chosen
        title = f"{report.name}: {best.share:.1%} of softmax's {unit}, error {best.error:.3f}"
        write_schedule_map(folder / f"schedule-{outcome.file.stem}.png", table.schedule(best.choice), title)
    write_error_table(folder / "sensitivity.png", table.noise_levels, report.levels, np.sqrt(table.squares()[:, :, :-1]))
    kept = {outcome.chosen.name for outcome in report.outcomes}
    points = [Point(c.kind, c.name if c.kind == WHOLE else "", c.share, c.error, c.name in kept) for c in report.candidates]
    error = "relative error of the samples" + (f", measured on {report.verify}" if report.verify else ", predicted")
    write_candidates(folder / "candidates.png", points, f"{unit} of the sampler, of softmax's", error)
