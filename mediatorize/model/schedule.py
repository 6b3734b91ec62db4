"""Schedules: what runs in every layer of every model call. No torch here.

A `Schedule` has a level for every noise level and layer, whatever a sampler's steps are. A `CallSchedule` says for each model call of one
sampler what is computed and what is forecast; a sampler of other steps takes the nearest calls. A `RuleSchedule` leaves the choice of the
level to the step-wise rule, which looks at the samples.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

from mediatorize.errors import UserError
from mediatorize.model.levels import (
    LINEAR,
    SOFTMAX,
    Level,
    MediatorSettings,
    forecasts,
    kind_of,
    levels_per_layer,
    parts_of,
    read_level,
    title,
)

CALLS_FORMAT = 2
"""Version of a schedule file with single calls. Files of pieces have none."""

RULE_FORMAT = 3
"""Version of a schedule file with a step-wise rule."""

Measure = Literal["mean-absolute", "mean-square"]
"""What is averaged of the change of the latents. The paper's choice is mean-absolute."""

SwitchPer = Literal["batch", "sample"]
"""Whether all samples of a batch switch together, by their mean change, as in the original; or each by its own."""

Watched = tuple[tuple[Level, ...], tuple[Level, ...]]
"""Surrogates of a block's attention and of its MLP that a computed call runs beside them, for later forecasts."""


def polynomial_weights(places: Sequence[float], at: float) -> list[float]:
    """Weights of values at `places` in their interpolating polynomial at `at` (Lagrange)."""
    weights = []
    for mine in places:
        weight = 1.0
        for other in places:
            if other != mine:
                weight *= (at - other) / (mine - other)
        weights.append(weight)
    return weights


@dataclass(frozen=True)
class Call:
    """What one model call runs."""

    levels: tuple[Level, ...]
    """One per layer. None at all: the model is not called, and its output is forecast from those of computed calls."""
    unconditional: tuple[Level, ...] | None = None
    """The same for the unconditional half of a guided call; None: as the conditional one. Empty: their difference is forecast."""

    @property
    def streams(self) -> tuple[tuple[Level, ...], tuple[Level, ...]]:
        """Levels of the conditional and of the unconditional half."""
        return self.levels, self.levels if self.unconditional is None else self.unconditional

    @property
    def computed(self) -> bool:
        """Whether nothing of the conditional half is forecast."""
        return is_computed(self.levels)


def is_computed(levels: Sequence[Level]) -> bool:
    """Whether a call at these levels of its layers forecasts nothing."""
    return bool(levels) and not any(forecasts(level) for level in levels)


def streams_of(calls: Sequence[Call], rows: Sequence[int]) -> tuple[list[tuple[Level, ...]], list[tuple[Level, ...]]]:
    """Levels of the conditional and of the unconditional half of every call; none where a call has no such half.

    The first call that a half has is computed, even where the schedule, made for another guidance, forecasts it.

    Args:
        rows: 2 where a call is guided, else 1.
    """
    halves = []
    for side in (0, 1):
        there = [side < count for count in rows]
        levels = [call.streams[side] if has else () for call, has in zip(calls, there, strict=True)]
        if any(there) and not is_computed(levels[there.index(True)]):
            levels[there.index(True)] = calls[0].streams[side]
        halves.append(levels)
    return halves[0], halves[1]


def places_of(noise_levels: Sequence[float]) -> list[float]:
    """Where calls stand on the axis of the forecasts' polynomials: the number of a call's noise level among the distinct ones."""
    distinct = {noise: float(place) for place, noise in enumerate(dict.fromkeys(noise_levels))}
    return [distinct[noise] for noise in noise_levels]


def watched_surrogates(calls: Sequence[Sequence[Level]], depth: int, places: Sequence[float]) -> list[tuple[Watched, ...]]:
    """For every call and layer, the surrogates that it must run beside computed sub-layers: those of later forecasts that rest on it.

    A forecast of order o rests on the calls that computed its sub-layer at the last o + 1 places.

    Args:
        places: of the calls (`places_of`).
    """
    found: list[list[tuple[set[Level], set[Level]]]] = [[(set(), set()) for _ in range(depth)] for _ in calls]
    for layer in range(depth):
        recent: tuple[list[int], list[int]] = [], []
        for index, levels in enumerate(calls):
            parts = parts_of(levels[layer]) if levels else None
            for side, part in enumerate(() if parts is None else (parts.attention, parts.mlp)):
                if part.order is None:
                    recent[side].append(index)
                elif part.runs is not None:
                    last = list(dict.fromkeys(places[computed] for computed in recent[side]))[-part.order - 1 :]
                    for computed in recent[side]:
                        if places[computed] in last:
                            found[computed][layer][side].add(part.runs)
    return [tuple((tuple(sorted(a, key=str)), tuple(sorted(m, key=str))) for a, m in layers) for layers in found]


def highest_order(calls: Sequence[Sequence[Level]]) -> int:
    """The highest order of the calls' forecasts."""
    parts = [parts_of(level) for levels in calls for level in set(levels)]
    return max((part.order or 0 for both in parts for part in (both.attention, both.mlp)), default=0)


@dataclass(frozen=True)
class Schedule:
    """Piecewise constant in the noise level (0 data, 1 noise): `levels[i]` from `edges[i - 1]` (or 0) up to `edges[i]` (or 1)."""

    edges: tuple[float, ...]
    levels: tuple[tuple[Level, ...], ...]
    """For every piece, one level per layer."""

    def __post_init__(self) -> None:
        if len(self.levels) != len(self.edges) + 1:
            raise UserError(f"A schedule of {len(self.levels)} pieces has {len(self.edges)} inner edges.", hint="It needs one fewer.")
        if any(not low < high for low, high in pairwise((0.0, *self.edges, 1.0))):
            raise UserError(f"Schedule edges {list(self.edges)} do not ascend between 0 and 1.", hint="Check schedule.json.")
        if len({len(piece) for piece in self.levels}) != 1:
            raise UserError("Schedule pieces differ in their number of layers.", hint="Check schedule.json.")
        for level in (level for piece in self.levels for level in piece):
            kind_of(level)  # refuses what is none

    @property
    def depth(self) -> int:
        """How many layers it is for."""
        return len(self.levels[0])

    @property
    def patterns(self) -> list[tuple[Level, ...]]:
        """What its pieces run, one level per layer; each once."""
        return list(dict.fromkeys(self.levels))

    @property
    def used(self) -> set[Level]:
        """Every level that some layer runs at somewhere."""
        return {level for pattern in self.patterns for level in pattern}

    def at(self, noise_level: float) -> tuple[Level, ...]:
        """The level of every layer at a noise level in [0, 1]."""
        return self.levels[bisect_right(self.edges, noise_level)]

    def calls(self, noise_levels: Sequence[float]) -> list[Call]:
        """What a sampler's calls run, at the noise levels of its calls in their order."""
        return [Call(self.at(noise_level)) for noise_level in noise_levels]

    def to_json(self) -> dict[str, Any]:
        bounds = pairwise((0.0, *self.edges, 1.0))
        return {
            "pieces": [
                {"noise_from": low, "noise_to": high, "levels": list(levels)}
                for (low, high), levels in zip(bounds, self.levels, strict=True)
            ]
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Schedule:
        try:
            pieces = content["pieces"]
            starts, stops = [piece["noise_from"] for piece in pieces], [piece["noise_to"] for piece in pieces]
            if [*starts, 1.0] != [0.0, *stops]:
                raise UserError("Schedule pieces do not follow one another from 0 to 1.", hint="Check schedule.json.")
            return cls(tuple(starts[1:]), tuple(tuple(piece["levels"]) for piece in pieces))
        except (KeyError, TypeError) as error:
            raise UserError("Not a schedule: it needs pieces of noise_from, noise_to and levels.", hint="Check schedule.json.") from error


@dataclass(frozen=True)
class CallSchedule:
    """What each model call of one sampler runs. A sampler of other steps computes the calls nearest to those that are computed here."""

    noise_levels: tuple[float, ...]
    """Of the calls, in the sampler's order: from noise to data."""
    of_calls: tuple[Call, ...]

    def __post_init__(self) -> None:
        if not self.of_calls or len(self.of_calls) != len(self.noise_levels):
            raise UserError(
                f"A schedule of {len(self.of_calls)} calls has {len(self.noise_levels)} noise levels.", hint="Check schedule.json."
            )
        if any(not 0 <= later <= earlier <= 1 for earlier, later in pairwise((1.0, *self.noise_levels))):
            raise UserError("The noise levels of a schedule's calls do not fall between 1 and 0.", hint="Check schedule.json.")
        lengths = {len(levels) for call in self.of_calls for levels in call.streams if levels}
        if len(lengths) != 1:
            raise UserError("A schedule's calls differ in their number of layers.", hint="Check schedule.json.")
        if not all(is_computed(levels) for levels in self.of_calls[0].streams):
            raise UserError("A schedule forecasts its first call, before which there is nothing.", hint="Check schedule.json.")
        for level in self.used:
            kind_of(level)  # refuses what is none

    @property
    def depth(self) -> int:
        """How many layers it is for."""
        return len(self.of_calls[0].levels)

    @property
    def patterns(self) -> list[tuple[Level, ...]]:
        """What halves of its calls run, one level per layer; each once."""
        return list(dict.fromkeys(levels for call in self.of_calls for levels in call.streams if levels))

    @property
    def used(self) -> set[Level]:
        """Every level that some layer runs at somewhere."""
        return {level for pattern in self.patterns for level in pattern}

    @property
    def guided(self) -> bool:
        """Whether the halves of a guided call differ somewhere."""
        return any(call.unconditional is not None for call in self.of_calls)

    def calls(self, noise_levels: Sequence[float]) -> list[Call]:
        """What a sampler's calls run, at the noise levels of its calls in their order.

        The calls of the sampler that the schedule was made for are its own. Otherwise every call of the schedule in which something is
        computed takes the place of the nearest call, and all others do as the schedule's nearest forecast call does.
        """
        if len(noise_levels) == len(self.noise_levels) and max(map(_apart, noise_levels, self.noise_levels)) < SAME_NOISE_LEVEL:
            return list(self.of_calls)
        own = list(zip(self.noise_levels, self.of_calls, strict=True))
        resting = [(noise, call) for noise, call in own if not _computes(call)] or own
        found = [min(resting, key=lambda pair: abs(pair[0] - noise_level))[1] for noise_level in noise_levels]
        found[0] = self.of_calls[0]
        taken = {0}
        for noise, call in own[1:]:
            if not _computes(call):
                continue
            free = [place for place in range(len(found)) if place not in taken]
            if free:
                nearest = min(free, key=lambda place: abs(noise_levels[place] - noise))
                found[nearest] = call
                taken.add(nearest)
        return found

    def to_json(self) -> dict[str, Any]:
        calls = []
        for noise_level, call in zip(self.noise_levels, self.of_calls, strict=True):
            content: dict[str, Any] = {"noise_level": noise_level, "levels": _short(call.levels)}
            if call.unconditional is not None:
                content["unconditional"] = _short(call.unconditional)
            calls.append(content)
        return {"format": CALLS_FORMAT, "layers": self.depth, "calls": calls}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> CallSchedule:
        try:
            if content.get("format") != CALLS_FORMAT:
                raise UserError(f"A schedule of format {content.get('format')} is not known.", hint="Update mediatorize.")
            depth, calls = int(content["layers"]), content["calls"]
            of_calls = []
            for call in calls:
                other = call.get("unconditional")
                of_calls.append(Call(_long(call["levels"], depth), None if other is None else _long(other, depth)))
            return cls(tuple(float(call["noise_level"]) for call in calls), tuple(of_calls))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError("Not a schedule: it needs layers, and calls of noise_level and levels.", hint="Check schedule.json.") from error


def forecast_from_the_first(noise_levels: Sequence[float], depth: int) -> CallSchedule:
    """The first call computed, all others linear forecasts: the schedule that keeps most in memory, and computes least."""
    calls = [Call((SOFTMAX,) * depth), *[Call((LINEAR,) * depth)] * (len(noise_levels) - 1)]
    return CallSchedule(tuple(noise_levels), tuple(calls))


SAME_NOISE_LEVEL = 1e-5
"""Noise levels that are nearer than this are the same call."""


@dataclass(frozen=True, kw_only=True)
class SwitchRule:
    """The step-wise rule of arXiv 2408.05710, section 3.3: stages of the sampling, each at a level, and when the next one begins.

    With x_i the latents after step i = 0, 1, ... and d_i the mean change from x_(i-1) to x_i, the base is the mean of d_1 .. d_first. From
    i = first + 1 on, the next stage begins after the first step with d_i < ratio * base, and no stage comes back. One check may end two
    stages.
    """

    levels: tuple[Level, ...]
    """Of the stages, in order: each for all layers."""
    ratios: tuple[float, ...]
    """Of every stage but the first: the change, as a share of the base, below which it begins."""
    first: int = 3
    """Changes that the base is the mean of."""
    measure: Measure = "mean-absolute"
    per: SwitchPer = "batch"

    def __post_init__(self) -> None:
        if len(self.levels) < 2:
            raise UserError("A rule with fewer than two stages has nothing to switch to.", hint="Name at least two levels.")
        if len(self.levels) != len(self.ratios) + 1:
            raise UserError(f"{len(self.ratios)} ratios do not switch between {len(self.levels)} stages.", hint="Pass one ratio fewer.")
        if any(before < after for before, after in pairwise(self.ratios)) or not all(ratio > 0 for ratio in self.ratios):
            listed = ",".join(f"{ratio:g}" for ratio in self.ratios)
            raise UserError(f"Ratios {listed} do not descend above 0.", hint="Pass for instance --ratios 0.6,0.3.")
        if self.first < 1:
            raise UserError(f"The base cannot be of {self.first} changes.", hint="Pass --first 3.")
        if self.measure not in get_args(Measure) or self.per not in get_args(SwitchPer):
            known = ", ".join((*get_args(Measure), *get_args(SwitchPer)))
            raise UserError(f"A rule cannot be by {self.measure} per {self.per}.", hint=f"Choose among {known}.")
        for level in self.levels:
            kind_of(level)  # refuses what is none

    @property
    def earliest(self) -> int:
        """The first step, from 0, that a later stage can begin with."""
        return self.first + 2

    def stages_of_calls(self, begins: Sequence[int], calls: int, calls_per_step: int) -> list[int]:
        """The stage that makes each model call of a sample.

        Args:
            begins: the step, from 0, that each stage but the first began with; -1: it never did.
        """
        return [sum(0 <= begin <= call // calls_per_step for begin in begins) for call in range(calls)]


@dataclass(frozen=True)
class Began:
    """When a later stage of a step-wise rule began: steps count from 1, and are None where it never did."""

    stage: str
    first: int | None
    median: int | None
    last: int | None
    samples: int
    """In how many it began."""

    @classmethod
    def of(cls, stages: Sequence[str], switches: Sequence[Sequence[int]]) -> tuple[Began, ...]:
        """Of every stage but the first.

        Args:
            stages: what each is called.
            switches: by sample, the step, from 0, that each of them began with; -1: it never did.
        """
        found = []
        for index, stage in enumerate(stages[1:]):
            steps = sorted(row[index] + 1 for row in switches if row[index] >= 0)
            if steps:
                found.append(cls(stage, steps[0], steps[(len(steps) - 1) // 2], steps[-1], len(steps)))
            else:
                found.append(cls(stage, None, None, None, 0))
        return tuple(found)


@dataclass(frozen=True)
class RuleSchedule:
    """A step-wise rule between levels of one model, as a schedule. What a call runs is known only when samples are made."""

    rule: SwitchRule
    usual: Schedule
    """The levels of the median of the samples that the rule was calibrated on: for pictures, and to estimate costs before sampling."""

    @property
    def depth(self) -> int:
        """How many layers it is for."""
        return self.usual.depth

    @property
    def patterns(self) -> list[tuple[Level, ...]]:
        """What its pieces usually run, one level per layer; each once."""
        return self.usual.patterns

    @property
    def used(self) -> set[Level]:
        """Every level that some layer runs at somewhere."""
        return {*self.rule.levels, *self.usual.used}

    def began(self, switches: Sequence[Sequence[int]]) -> tuple[Began, ...]:
        """When its later stages began in samples that switched so."""
        return Began.of([title(level) for level in self.rule.levels], switches)

    def calls(self, noise_levels: Sequence[float]) -> list[Call]:
        """What a sampler's calls usually run, at the noise levels of its calls in their order."""
        return self.usual.calls(noise_levels)

    def to_json(self) -> dict[str, Any]:
        rule = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self.rule).items()}
        return {"format": RULE_FORMAT, "rule": rule, "usual": self.usual.to_json()["pieces"]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RuleSchedule:
        try:
            if content.get("format") != RULE_FORMAT:
                raise UserError(f"A rule of format {content.get('format')} is not known.", hint="Update mediatorize.")
            fields = dict(content["rule"])
            levels, ratios = tuple(map(read_level, fields.pop("levels"))), tuple(map(float, fields.pop("ratios")))
            rule = SwitchRule(levels=levels, ratios=ratios, first=int(fields.pop("first")), **fields)
            return cls(rule, Schedule.from_json({"pieces": content["usual"]}))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            text = "Not a rule: it needs levels, ratios, first, measure and per, and the usual pieces."
            raise UserError(text, hint="Check schedule.json.") from error


AnySchedule = Schedule | CallSchedule | RuleSchedule


def schedule_from_json(content: Mapping[str, Any]) -> AnySchedule:
    """A schedule from a file of any form."""
    if isinstance(content, Mapping) and "rule" in content:
        return RuleSchedule.from_json(content)
    return CallSchedule.from_json(content) if isinstance(content, Mapping) and "calls" in content else Schedule.from_json(content)


def calls_at(schedule: AnySchedule | Level, noise_levels: Sequence[float], depth: int, settings: MediatorSettings | None) -> list[Call]:
    """What calls at these noise levels run by a schedule, or by one level for the whole model, to which `settings` were added."""
    if isinstance(schedule, int | str):
        return [Call(tuple(levels_per_layer(schedule, depth, settings)))] * len(noise_levels)
    return schedule.calls(noise_levels)


def patterns_of(schedule: AnySchedule, settings: MediatorSettings | None) -> list[tuple[Level, ...]]:
    """Everything that a schedule can run in a model to which `settings` were added, one level per layer; each once."""
    stages = schedule.rule.levels if isinstance(schedule, RuleSchedule) else ()
    uniform = [tuple(levels_per_layer(level, schedule.depth, settings)) for level in stages]
    return list(dict.fromkeys((*schedule.patterns, *uniform)))


def _apart(one: float, other: float) -> float:
    return abs(one - other)


def _computes(call: Call) -> bool:
    """Whether something of a call is computed for others to rest on."""
    return any(is_computed(levels) for levels in call.streams)


def _short(levels: tuple[Level, ...]) -> Any:
    """Levels as a file has them: one for all layers where they are equal."""
    return levels[0] if len(set(levels)) == 1 else list(levels)


def _long(levels: Any, depth: int) -> tuple[Level, ...]:
    return tuple(map(read_level, levels)) if isinstance(levels, list) else (read_level(levels),) * depth
