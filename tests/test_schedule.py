"""Schedules: which level holds at which noise level, JSON both ways, and what is refused."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest

from mediatorize.errors import UserError
from mediatorize.model.schedule import Schedule

SCHEDULE = Schedule((0.25, 0.5), (("softmax", 4), (4, 1), (1, 1)))


@pytest.mark.parametrize(
    ("noise_level", "piece"),
    [(0.0, 0), (0.1, 0), (math.nextafter(0.25, 0), 0), (0.25, 1), (0.3, 1), (math.nextafter(0.5, 0), 1), (0.5, 2), (0.75, 2), (1.0, 2)],
)
def test_a_piece_holds_from_its_lower_edge_up_to_its_upper(noise_level: float, piece: int) -> None:
    assert SCHEDULE.at(noise_level) == SCHEDULE.levels[piece]


@pytest.mark.parametrize("noise_level", [0.0, 0.5, 1.0])
def test_a_schedule_of_one_piece_holds_everywhere(noise_level: float) -> None:
    assert Schedule((), ((4, "softmax"),)).at(noise_level) == (4, "softmax")


@pytest.mark.parametrize("schedule", [SCHEDULE, Schedule((), (("softmax",) * 3,)), Schedule((0.1 + 0.2,), ((1,), (64,)))])
def test_json_round_trip_gives_the_same_schedule(schedule: Schedule) -> None:
    assert Schedule.from_json(json.loads(json.dumps(schedule.to_json()))) == schedule


def test_json_names_the_bounds_and_levels_of_every_piece() -> None:
    assert SCHEDULE.to_json() == {
        "pieces": [
            {"noise_from": 0.0, "noise_to": 0.25, "levels": ["softmax", 4]},
            {"noise_from": 0.25, "noise_to": 0.5, "levels": [4, 1]},
            {"noise_from": 0.5, "noise_to": 1.0, "levels": [1, 1]},
        ]
    }


@pytest.mark.parametrize(
    ("edges", "levels", "message"),
    [
        ((), ((4,), (1,)), "A schedule of 2 pieces has 0 inner edges. It needs one fewer."),
        ((0.5, 0.7), ((4,), (1,)), "A schedule of 2 pieces has 2 inner edges. It needs one fewer."),
        ((), (), "A schedule of 0 pieces has 0 inner edges. It needs one fewer."),
        ((0.5, 0.3), ((4,), (1,), (2,)), "Schedule edges [0.5, 0.3] do not ascend between 0 and 1. Check schedule.json."),
        ((0.5, 0.5), ((4,), (1,), (2,)), "Schedule edges [0.5, 0.5] do not ascend between 0 and 1. Check schedule.json."),
        ((0.0,), ((4,), (1,)), "Schedule edges [0.0] do not ascend between 0 and 1. Check schedule.json."),
        ((1.0,), ((4,), (1,)), "Schedule edges [1.0] do not ascend between 0 and 1. Check schedule.json."),
        ((-0.2,), ((4,), (1,)), "Schedule edges [-0.2] do not ascend between 0 and 1. Check schedule.json."),
        ((1.5,), ((4,), (1,)), "Schedule edges [1.5] do not ascend between 0 and 1. Check schedule.json."),
        ((math.nan,), ((4,), (1,)), "Schedule edges [nan] do not ascend between 0 and 1. Check schedule.json."),
        ((0.5,), ((4, 4), (1,)), "Schedule pieces differ in their number of layers. Check schedule.json."),
        (
            (),
            (("soft",),),
            "'soft' is no level. Levels are softmax, a count of mediators or an attention with an MLP (softmax|1/8 or hold+4|full).",
        ),
        ((), ((0,),), "0 is no level. Levels are softmax, a count of mediators or an attention with an MLP (softmax|1/8 or hold+4|full)."),
        (
            (),
            ((4, -1),),
            "-1 is no level. Levels are softmax, a count of mediators or an attention with an MLP (softmax|1/8 or hold+4|full).",
        ),
        (
            (),
            ((4.5,),),
            "4.5 is no level. Levels are softmax, a count of mediators or an attention with an MLP (softmax|1/8 or hold+4|full).",
        ),
        (
            (0.5,),
            ((4,), (4.0,)),
            "4.0 is no level. Levels are softmax, a count of mediators or an attention with an MLP (softmax|1/8 or hold+4|full).",
        ),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(edges: tuple[float, ...], levels: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        Schedule(edges, levels)


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        None,
        {"pieces": None},
        {"pieces": [3]},
        {"pieces": [{"noise_from": 0.0, "noise_to": 1.0}]},
        {"pieces": [{"noise_from": 0.0, "levels": None}]},
        {"pieces": [{"levels": [4]}, {"levels": [1]}]},
        {"pieces": [{"noise_from": 0.0, "levels": [4]}, {"noise_from": "half", "levels": [1]}]},
        {"pieces": [{"noise_from": 0.0, "levels": [[4]]}]},
    ],
)
def test_json_that_is_no_schedule_is_refused(content: Any) -> None:
    message = "Not a schedule: it needs pieces of noise_from, noise_to and levels. Check schedule.json."
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        Schedule.from_json(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"pieces": []}, "do not follow one another"),
        (
            {"pieces": [{"noise_from": 0.0, "noise_to": 2.0, "levels": [4]}, {"noise_from": 2.0, "noise_to": 1.0, "levels": [1]}]},
            r"Schedule edges \[2\.0\] do not ascend between 0 and 1",
        ),
        ({"pieces": [{"noise_from": 0.0, "noise_to": 1.0, "levels": ["hard"]}]}, "'hard' is no level"),
        (
            {"pieces": [{"noise_from": 0.0, "noise_to": 0.5, "levels": [4]}, {"noise_from": 0.5, "noise_to": 1.0, "levels": [4, 4]}]},
            "differ in their number of layers",
        ),
        (
            {"pieces": [{"noise_from": 0.0, "noise_to": 0.4, "levels": [4]}, {"noise_from": 0.5, "noise_to": 1.0, "levels": [4]}]},
            "do not follow one another",
        ),
    ],
)
def test_json_of_a_schedule_that_makes_no_sense_is_refused_for_what_is_wrong(content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Schedule.from_json(content)
