"""Finds plans for several numbers of calls. Weights are fitted on one set of noise, times and settings are chosen on a second, and a third
tells what a plan is worth.

    1. The reference: the teacher's ODE on all three sets, with as many calls as its own check asks for.
    2. Times: a family of two parameters, fitted in closed loop, the candidates halved.
    3. Weights: fitted in closed loop on all of the first set.
    4. Gauss-Newton on the final error, over weights and times, as long as the second set gains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mediatorize.diffusion.plan import Bands, Feature, Plan, Setting, Streams
from mediatorize.errors import UserError
from mediatorize.planning.fit import Batch, analytic, call_at, final_of, fit, gauss_newton, middle
from mediatorize.planning.judge import Errors, with_interval
from mediatorize.planning.levels import Measure, counts_for, with_levels
from mediatorize.planning.path import Path, path_of
from mediatorize.planning.reference import TOLERANCE, Denoiser, Reference, calls_needed, cosine_grid, solve
from mediatorize.progress import Progress, silent
from mediatorize.store import InMemory, Kept, Store

FEWEST = 2
"""Calls of a plan."""
POWERS, BENDS = (1.0, 1.4, 1.8), (1.0, 1.4, 1.8, 2.4)
"""Times u = 1 - (1 - w^power)^bend of even w: larger bends put more calls near the data, larger powers more near the noise."""
FIRST_SIGHT, KEPT = 8, 3
"""Samples of each set that all times are tried with, and how many times are tried again with twice as many."""
JACOBIAN = 16
"""Samples that a Gauss-Newton step of `JACOBIAN_CALLS` or more calls is made from; fewer calls make it cheaper, and take more."""
JACOBIAN_CALLS = 8
MOST_STEPS, LEAST_GAIN = 3, 0.8
"""Gauss-Newton steps at most; another is made only where the last one left less than this share of the error."""
PRICE = 2
"""Errors fall about as the number of rows to this power: by error * rows^PRICE a plan with fewer rows is held against one with more."""
CHECKED = 8
"""Samples that the reference's number of calls is chosen on."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What plans are for, and how they are sought."""

    process: str
    shape: tuple[int, ...]
    """Of one state (c, ...)."""
    cfg_scale: float = 1.0
    cfg_channels: int | str = 3
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    streams: Streams = "guided"
    feature: Feature = "velocity"
    edges: tuple[float, ...] = (0.25, 0.5)
    """Of bands (`Plan.edges`)."""
    samples: int = 48
    """Of the first set. The second has two thirds as many."""
    reported: int = 64
    """Of the third."""
    history: int = 4
    """How many calls' outputs an update combines."""
    steps: int = MOST_STEPS
    """Gauss-Newton steps at most; 0 leaves the closed loop's weights."""
    tolerance: float = TOLERANCE
    """Of the reference."""

    def __post_init__(self) -> None:
        if self.samples < 4 or self.reported < 1:
            raise UserError(f"{self.samples} samples are too few to fit and to choose by.", hint="Pass at least 4.")

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Samples of the three sets."""
        return self.samples, max(4, 2 * self.samples // 3), self.reported

    @property
    def path(self) -> Path:
        return path_of(self.process)

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Channels that share weights: guided ones and the others."""
        channels = range(self.shape[0])
        guided = len(channels) if self.cfg_channels == "all" or self.cfg_scale == 1 else int(self.cfg_channels)
        return tuple(tuple(part) for part in (channels[:guided], channels[guided:]) if part)

    def plan(self, us: Sequence[float], streams: Streams | None = None) -> Plan:
        """A plan with calls at places u, with first-order weights yet to be fitted."""
        unit = tuple(tuple((1.0,) for _ in range(len(self.edges) + 1)) for _ in self.groups)
        names = ("process", "cfg_scale", "cfg_channels", "cfg_interval", "feature", "groups", "edges")
        calls = tuple(replace(call_at(self.path, u), weights=unit) for u in us)
        bare = Plan(calls=calls, streams=streams or self.streams, **{name: getattr(self, name) for name in names})
        return replace(bare, calls=tuple(replace(call, uncond=bare.inside(call)) for call in calls))

    def rows_of_reference(self, calls: int) -> list[int]:
        """Rows of every model call of one sample's reference; where its last place is no data, that is called, too."""
        places, guided = cosine_grid(self.path, calls), guided_at(self)
        return [2 if guided(u) else 1 for u in (places if self.path.end < 1 else places[:-1])]

    def times(self, calls: int, power: float, bend: float) -> list[float]:
        """Places of a number of calls, from the path's start."""
        even = [k / calls for k in range(calls)]
        return [self.path.start + (self.path.end - self.path.start) * (1 - (1 - w**power) ** bend) for w in even]


@dataclass(frozen=True, kw_only=True)
class Found:
    """A plan, and what each stage of its search brought."""

    plan: Plan
    stages: Mapping[str, float]
    """Geometric mean of the second set's errors after each stage."""
    fitted: Errors
    """Of the first set, where weights were fitted."""
    reported: Errors
    """Of the third set."""
    others: Mapping[str, Errors]
    """Of the same samples by other solvers with as many calls in full."""


@dataclass(frozen=True, kw_only=True)
class Plans:
    """What a search found."""

    found: Mapping[int, Found]
    """By the number of calls."""
    reference_calls: int
    reference_error: float
    """Median relative error of the reference, as Richardson's extrapolation has it."""
    many: Mapping[str, Errors] = field(default_factory=dict)
    """The third set by a solver with many steps."""

    @property
    def plans(self) -> dict[int, Plan]:
        """By their own numbers of calls, of two with as many the dearer one."""
        return {len(found.plan.calls): found.plan for _, found in sorted(self.found.items())}

    @property
    def reference_is_enough(self) -> bool:
        """Whether the reference errs by a tenth of the best plan at most."""
        return self.reference_error <= min(found.reported.median for found in self.found.values()) / 10


Others = Callable[[int, Tensor, Tensor], Mapping[str, Tensor]]
"""(calls, noise, rows) -> samples (n, c, ...) of other solvers with so many calls, by name."""


def search(
    denoise: Denoiser,
    wanted: Wanted,
    calls: Sequence[int],
    noise: tuple[Tensor, Tensor, Tensor],
    *,
    others: Others | None = None,
    many: Callable[[Tensor, Tensor], Mapping[str, Tensor]] | None = None,
    levels: Measure | None = None,
    store: Store | None = None,
    progress: Progress = silent,
) -> Plans:
    """Plans for some numbers of calls, or for their price.

    Args:
        denoise: the model. Its rows are those of the three sets, one after another.
        noise: (n, c, ...) of the three sets: to fit on, to choose by, to tell from.
        others: baselines, drawn from the third set's noise.
        many: the same with many steps.
        levels: measures what cheaper levels do in a plan; more calls with such are then tried for the price of each number of calls.
        store: keeps what is found; one that outlasts the process resumes the search.

    Raises:
        UserError: fewer than two calls, or the teacher's samples are not finite.
    """
    if not calls or min(calls) < FEWEST:
        raise UserError("A plan has at least 2 calls.", hint="Pass --calls 4,6,8.")
    store = InMemory() if store is None else store
    sizes = [len(part) for part in noise]
    rows = torch.arange(sum(sizes)).split(sizes)
    ending, error = reference_calls(denoise, wanted, noise[1][:CHECKED], rows[1][:CHECKED], store, progress)
    sets = [
        Batch(noise=part, rows=own, reference=reference(denoise, wanted, part, own, ending, name, store, progress))
        for name, part, own in zip(("fit", "choose", "tell"), noise, rows, strict=True)
    ]
    bands = Bands(wanted.edges, wanted.shape, noise[2].device)

    def judged(drawn: Mapping[str, Tensor]) -> dict[str, Errors]:
        return {name: with_interval(sets[2].errors(bands.to(x.to(sets[2].noise)))) for name, x in drawn.items()}

    found = {}
    for count in sorted(set(calls)):
        with progress(1, f"fitting a plan of {count} calls", "plan") as bar:

            def make(count: int = count) -> Kept:
                plan, stages = find(denoise, wanted, count, sets[0], sets[1])
                if levels is not None:
                    plan, stages = find_levels(denoise, wanted, plan, stages, levels, sets[0], sets[1])
                errors = {
                    "fitted": sets[0].errors(final_of(denoise, plan, sets[0])),
                    "told": sets[2].errors(final_of(denoise, plan, sets[2])),
                }
                return Kept(errors, {"plan": plan.to_json(), "stages": stages})

            kept = store.once(f"plan-{count}", make)
            drawn = {} if others is None else others(count, sets[2].noise, sets[2].rows)
            bar.update()
        found[count] = Found(
            plan=Plan.from_json(kept.facts["plan"]),
            stages=kept.facts["stages"],
            fitted=Errors.summed(kept.tensors["fitted"]),
            reported=with_interval(kept.tensors["told"]),
            others=judged(drawn),
        )
    told = judged(many(sets[2].noise, sets[2].rows)) if many is not None else {}
    return Plans(found=found, reference_calls=ending, reference_error=error, many=told)


def find(denoise: Denoiser, wanted: Wanted, count: int, batch: Batch, others: Batch) -> tuple[Plan, dict[str, float]]:
    """A plan of `count` calls, fitted to `batch` and chosen by `others`; and the errors of `others` after each stage."""

    def tried(shape: tuple[float, float], samples: int) -> float:
        few = others.first(samples)
        plan = fit(denoise, wanted.plan(wanted.times(count, *shape)), batch.first(samples), wanted.history)
        return middle(few.errors(final_of(denoise, plan, few)))

    shapes = [(power, bend) for power in POWERS for bend in BENDS]
    best = sorted(shapes, key=lambda shape: tried(shape, FIRST_SIGHT))[:KEPT]
    places = wanted.times(count, *min(best, key=lambda shape: tried(shape, 2 * FIRST_SIGHT)))

    def error(plan: Plan) -> float:
        return middle(others.errors(final_of(denoise, plan, others)))

    bare = wanted.plan(places)
    stages = {"analytic weights": error(analytic(bare, wanted.shape))}
    bares = [bare, half_priced(bare)] if bare.streams == "halves" and bare.calls[0].uncond else [bare]
    fitted = [(error(plan), plan) for plan in (fit(denoise, each, batch, wanted.history) for each in bares)]
    last, plan = min(fitted, key=lambda each: each[0] * sum(each[1].rows) ** PRICE)
    stages["fitted weights"] = last
    for step in range(1, wanted.steps + 1):
        plan, after = gauss_newton(denoise, plan, wanted.path, batch.first(jacobian_samples(wanted, count)), others)
        stages[f"Gauss-Newton, step {step}"] = after
        if after > LEAST_GAIN * last:
            break
        last = after
    return plan, stages


def find_levels(
    denoise: Denoiser, wanted: Wanted, full: Plan, stages: dict[str, float], measure: Measure, batch: Batch, others: Batch
) -> tuple[Plan, dict[str, float]]:
    """The best for the price of a plan whose calls run in full: that plan, or one of more calls, at cheaper levels in some layers."""
    best, error = full, list(stages.values())[-1]
    for count in counts_for(len(full.calls)):
        bare, _ = find(denoise, replace(wanted, steps=0), count, batch, others)
        table = measure(bare)
        mixed = with_levels(bare, table, table.in_full * sum(full.rows) / sum(bare.rows))
        if mixed is None:
            continue
        fitted = fit(denoise, mixed, batch, wanted.history)
        plan, after = gauss_newton(denoise, fitted, wanted.path, batch.first(jacobian_samples(wanted, count)), others)
        stages = stages | {f"{count} calls at cheaper levels": after}
        if after < error:
            best, error = plan, after
    return best, stages


def jacobian_samples(wanted: Wanted, count: int) -> int:
    """How many samples a Gauss-Newton step of `count` calls is made from: about as many model calls for every count."""
    return min(wanted.samples, max(JACOBIAN, JACOBIAN * JACOBIAN_CALLS**2 // count**2))


def half_priced(plan: Plan) -> Plan:
    """The plan whose first call leaves the unconditional half out. At pure noise the halves hardly differ; every other call loses by it."""
    return replace(plan, calls=(replace(plan.calls[0], uncond=False), *plan.calls[1:]))


def plain_setting(wanted: Wanted, device: torch.device | str = "cpu") -> Setting:
    """How the teacher's outputs become velocities, with guidance applied."""
    start = replace(wanted, feature="velocity").plan([wanted.path.start], "guided")
    return Setting.of(start, wanted.shape, device)


def guided_at(wanted: Wanted) -> Callable[[float], bool]:
    """Whether guidance holds at a place u."""
    return lambda u: wanted.plan([u]).calls[0].uncond


def converged(denoise: Denoiser, wanted: Wanted, noise: Tensor, calls: int) -> Tensor:
    """The teacher's own solutions (n, c, ...) from noise of that shape, by a reference of so many calls."""
    setting, rows = plain_setting(wanted, noise.device), torch.arange(len(noise))
    return setting.bands.back(solve(denoise, setting, wanted.path, guided_at(wanted), noise, rows, calls).final)


def reference_calls(denoise: Denoiser, wanted: Wanted, noise: Tensor, rows: Tensor, store: Store, progress: Progress) -> tuple[int, float]:
    """How many calls the reference needs, and its error then."""
    setting = plain_setting(wanted, noise.device)

    def make() -> Kept:
        with progress(0, "how many calls the reference needs", "call") as bar:

            def solved(calls: int) -> Tensor:
                return solve(denoise, setting, wanted.path, guided_at(wanted), noise, rows, calls, bar.update).final

            calls, error = calls_needed(solved, wanted.tolerance)
        return Kept({"error": torch.tensor([error], dtype=torch.float64)}, {"calls": calls})

    kept = store.once("reference-calls", make)
    return int(kept.facts["calls"]), float(kept.tensors["error"])


def reference(
    denoise: Denoiser, wanted: Wanted, noise: Tensor, rows: Tensor, calls: int, name: str, store: Store, progress: Progress
) -> Reference:
    """The teacher's solutions from some noises."""
    setting = plain_setting(wanted, noise.device)

    def make() -> Kept:
        with progress(calls, f"the teacher's solutions, to {name}", "call") as bar:
            solved = solve(denoise, setting, wanted.path, guided_at(wanted), noise, rows, calls, bar.update, keep=name == "fit")
        return Kept({key: value.cpu() for key, value in vars(solved).items()})

    kept = store.once(f"reference-{name}", make)
    return Reference(**{key: value.to(noise.device) for key, value in kept.tensors.items()})


def model_rows(wanted: Wanted, calls: Sequence[int], reference: int | None = None) -> int:
    """About how many rows of model calls a search takes: what `--dry-run` predicts.

    Args:
        reference: calls of the reference; None expects what a DiT's needs.
    """
    reference = (140 if wanted.process == "ddpm" else 60) if reference is None else reference
    halves = 1 if wanted.cfg_scale == 1 else 2
    total = CHECKED * (2 * reference) + sum(wanted.sizes) * reference
    terms = len(wanted.groups) * (len(wanted.edges) + 1) * (1 + wanted.history * (2 if wanted.streams == "halves" else 1))
    steps = min(wanted.steps, 2)
    for count in calls:
        first = len(POWERS) * len(BENDS) * FIRST_SIGHT * 3 + KEPT * FIRST_SIGHT * 6
        fitted, chosen, told = wanted.sizes
        total += count * (first + 3 * fitted + (2 + 6 * steps) * chosen + told)
        total += steps * jacobian_samples(wanted, count) * (terms * count * (count - 1) // 2 + count * count // 2)
    return halves * total
