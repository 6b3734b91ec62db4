"""Schedules: what runs in every layer of every model call. No torch here.

A `Schedule` has a level for every noise level and layer, whatever a sampler's steps are. A `RuleSchedule` leaves the choice of the level to
the step-wise rule, which looks at the samples.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

from mediatorize.errors import UserError
from mediatorize.model.levels import (
    SOFTMAX,
    Level,
    MediatorSettings,
    holds,
    in_full,
    kind_of,
    levels_per_layer,
    parts_of,
    read_level,
    title,
)

CALLS_FORMAT = 2
"""Version of schedule files with single calls, which are read, and no longer written. Files of pieces have none."""

RULE_FORMAT = 3
"""Version of a schedule file with a step-wise rule."""

Measure = Literal["mean-absolute", "mean-square"]
"""What is averaged of the change of the latents. The paper's choice is mean-absolute."""

SwitchPer = Literal["batch", "sample"]
"""Whether all samples of a batch switch together, by their mean change, as in the original; or each by its own."""

Levels = tuple[Level, ...]
"""What one model call runs: a level per layer."""


def with_memory(calls: Sequence[Levels], rows: Sequence[int]) -> tuple[list[Levels], list[tuple[Levels, ...]]]:
    """What calls run along one trajectory, and for each call and layer the mediators whose rests it must leave for later calls.

    A level with a held rest runs as softmax where no earlier call of as many rows computed softmax attention in its layer.

    Args:
        calls: levels of every call.
        rows: of the same calls per sample: 2 where they are guided, else 1.
    """
    depth = len(calls[0])
    runs = [list(levels) for levels in calls]
    watched: list[list[set[Level]]] = [[set() for _ in range(depth)] for _ in calls]
    for layer in range(depth):
        last: int | None = None
        for index, levels in enumerate(runs):
            parts = parts_of(levels[layer])
            if parts.held and last is not None and rows[last] >= rows[index]:
                watched[last][layer].add(parts.attention)
                continue
            levels[layer] = in_full(levels[layer])
            if parts_of(levels[layer]).attention == SOFTMAX:
                last = index
    left = [tuple(tuple(sorted(each, key=str)) for each in layers) for layers in watched]
    return [tuple(levels) for levels in runs], left


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

    def calls(self, noise_levels: Sequence[float]) -> list[Levels]:
        """What a sampler's calls run, at the noise levels of its calls in their order."""
        return [self.at(noise_level) for noise_level in noise_levels]

    @classmethod
    def through(cls, noise_levels: Sequence[float], levels: Sequence[Levels]) -> Schedule:
        """The schedule with given levels at given noise levels, edges half-way between them; equal neighbours are one piece."""
        ascending = sorted(zip(noise_levels, levels, strict=True), key=lambda pair: pair[0])
        edges: list[float] = []
        pieces = [ascending[0][1]]
        for (before, _), (after, own) in pairwise(ascending):
            if own != pieces[-1] and after > before:
                edges.append(round((before + after) / 2, 6))
                pieces.append(own)
        return cls(tuple(edges), tuple(pieces))

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


def of_single_calls(content: Mapping[str, Any]) -> Schedule:
    """A schedule from a file that says what each call of one sampler runs, as older versions wrote them.

    Raises:
        UserError: it is damaged, or calls of it are forecast from others, which is no longer done.
    """
    try:
        if content.get("format") != CALLS_FORMAT:
            raise UserError(f"A schedule of format {content.get('format')} is not known.", hint="Update mediatorize.")
        depth, calls = int(content["layers"]), content["calls"]
        halves = [(call["levels"], call.get("unconditional", call["levels"])) for call in calls]
        if any(own != other or not own for own, other in halves) or _forecasts(calls):
            raise UserError(
                "This schedule forecasts model calls. Plans are several times nearer at the same price.",
                hint="Delete or rename the file, then run `mediatorize calibrate MODEL --calls 8`.",
            )
        levels = [tuple(map(read_level, own)) if isinstance(own, list) else (read_level(own),) * depth for own, _ in halves]
        return Schedule.through([float(call["noise_level"]) for call in calls], levels)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError("Not a schedule: it needs layers, and calls of noise_level and levels.", hint="Check schedule.json.") from error


FORECASTS = ("hold", "linear", "quadratic")
"""How levels of older versions begin that forecast a sub-layer."""


def _forecasts(calls: Sequence[Mapping[str, Any]]) -> bool:
    """Whether some layer of a call is forecast."""
    every = (level for call in calls for level in (call["levels"] if isinstance(call["levels"], list) else [call["levels"]]))
    sub_layers = (part for level in every for part in str(level).split("|"))
    return any(part.partition("+")[0] in FORECASTS for part in sub_layers)


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
            if holds(level):
                raise UserError(f"A stage at level {level} has no call to hold from.", hint="Name levels such as 4 or softmax.")

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

    def calls(self, noise_levels: Sequence[float]) -> list[Levels]:
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


AnySchedule = Schedule | RuleSchedule


def schedule_from_json(content: Mapping[str, Any]) -> AnySchedule:
    """A schedule from a file of any form."""
    if isinstance(content, Mapping) and "rule" in content:
        return RuleSchedule.from_json(content)
    return of_single_calls(content) if isinstance(content, Mapping) and "calls" in content else Schedule.from_json(content)


def calls_at(schedule: AnySchedule | Level, noise_levels: Sequence[float], depth: int, settings: MediatorSettings | None) -> list[Levels]:
    """What calls at these noise levels run by a schedule, or by one level for the whole model, to which `settings` were added."""
    if isinstance(schedule, int | str):
        return [tuple(levels_per_layer(schedule, depth, settings))] * len(noise_levels)
    return schedule.calls(noise_levels)


def patterns_of(schedule: AnySchedule, settings: MediatorSettings | None) -> list[Levels]:
    """Everything that a schedule can run in a model to which `settings` were added, one level per layer; each once."""
    stages = schedule.rule.levels if isinstance(schedule, RuleSchedule) else ()
    uniform = [tuple(levels_per_layer(level, schedule.depth, settings)) for level in stages]
    return list(dict.fromkeys((*schedule.patterns, *uniform)))
