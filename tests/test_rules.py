"""Step-wise rules within a budget: they are predicted to switch where they do, and the best is the one that trying all finds."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mediatorize.compression.rules import Rules, begins, ratios_of
from mediatorize.diffusion.switching import Switcher
from mediatorize.errors import UserError
from mediatorize.model.levels import SOFTMAX
from mediatorize.model.schedule import Began, RuleSchedule, Schedule, SwitchRule, schedule_from_json

LEVELS = (1, 4, SOFTMAX)


def falling(steps: int, samples: int, seed: int) -> NDArray[np.float64]:
    """Changes of latents that fall on the whole, each sample's in its own way."""
    random = np.random.default_rng(seed)
    return np.linspace(1, 0.2, steps - 1)[:, None] * random.uniform(0.7, 1.3, (steps - 1, samples))


def tables(steps: int, seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Errors that fall with the level, and costs that rise."""
    random = np.random.default_rng(seed)
    return np.sort(random.random((steps, 3)), axis=1)[:, ::-1].copy(), np.tile(np.array([2, 5, 9]), (steps, 1))


@pytest.mark.parametrize("first", [1, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rules_begin_where_a_switcher_switches(first: int, seed: int) -> None:
    steps, samples, ratios = 15, 4, (1.1, 0.7, 0.7, 0.1)
    changes = falling(steps, samples, seed)
    expected = begins(changes, first, ratios)
    rule = SwitchRule(levels=(1, 2, 3, 4, SOFTMAX), ratios=ratios, first=first, per="sample")
    switcher = Switcher(rule, [torch.nn.Identity()] * 5, samples)
    states = np.concatenate([np.zeros((1, samples)), changes.cumsum(0)])
    for state in states:  # those that steps begin with
        switcher.look(torch.from_numpy(state).view(samples, 1, 1, 1).expand(samples, 2, 3, 3))
    found = switcher.switches.T.numpy()
    assert np.where(found < 0, steps, found).tolist() == expected.tolist()
    assert found.min() == -1  # some never switch
    assert (found >= rule.earliest).any()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_rule_within_a_budget_is_the_one_that_trying_all_finds(seed: int) -> None:
    steps, samples = 7, 2
    changes, (errors, costs) = falling(steps, samples, seed), tables(steps, seed)
    rules = Rules(LEVELS, changes, errors, costs)

    def does(levels: tuple[Any, ...], ratios: tuple[float, ...], first: int) -> tuple[float, float]:
        rule, at = SwitchRule(levels=levels, ratios=ratios, first=first), begins(changes, first, ratios)
        sums = np.zeros(2)
        for sample in range(samples):
            for step, stage in enumerate(rule.stages_of_calls(at[:, sample].tolist(), steps, 1)):
                option = LEVELS.index(levels[stage])
                sums += (errors[step, option], costs[step, option])
        return float(sums[0] / samples), float(sums[1] / samples)

    every = [
        does(levels, ratios, first)
        for first in range(1, steps - 2)
        for levels in ((1, 4), (1, SOFTMAX), (4, SOFTMAX), LEVELS)
        for ratios in combinations(ratios_of(changes, first), len(levels) - 1)
    ]
    seen = set()
    for budget in range(14, 64, 3):
        found = rules.within(budget)
        assert bool(found) == any(cost <= budget for _, cost in every)
        for each in found:
            assert does(each.rule.levels, each.rule.ratios, each.rule.first) == pytest.approx((each.error, each.cost))
            assert each.cost <= budget
        if found:
            assert found[0].error == pytest.approx(min(error for error, cost in every if cost <= budget))
            seen.add(found[0].rule)
    assert len(seen) > 3
    assert rules.range == pytest.approx((min(cost for _, cost in every), max(cost for _, cost in every)))


def test_many_levels_and_steps_are_not_tried_one_by_one() -> None:
    steps, levels = 250, (1, 2, 4, 8, 16, 32, SOFTMAX)
    costs = np.tile(np.arange(1, 8), (steps, 1))
    found = Rules(levels, falling(steps, 8, 0), 1 / costs, costs).within(4.0 * steps)
    assert found
    assert all(each.cost <= 4.0 * steps for each in found)
    assert found[0].cost > 3.5 * steps


def test_there_must_be_time_to_switch() -> None:
    for steps, there in ((3, False), (4, True)):
        errors, costs = tables(steps, 0)
        rules = Rules(LEVELS, falling(steps, 2, 0), errors, costs)
        assert bool(rules.within(1000)) == there
        assert (rules.range is not None) == there


def test_a_rule_comes_back_from_its_file_and_others_are_refused() -> None:
    rule = SwitchRule(levels=(1, 4, SOFTMAX), ratios=(0.9, 0.25), first=2, per="sample")
    schedule = RuleSchedule(rule, Schedule((0.5,), ((SOFTMAX,) * 3, (1,) * 3)))
    content = schedule.to_json()
    assert schedule_from_json(content) == schedule
    assert (schedule.depth, schedule.used) == (3, {1, 4, SOFTMAX})
    assert "pieces" not in content  # what reads pieces alone must not take it for a fixed schedule
    for changes, match in (
        ({"format": 9}, "format 9 is not known"),
        ({"usual": None}, "it needs"),
        ({"rule": {"levels": [1, 4]}}, "it needs"),
        ({"rule": content["rule"] | {"per": "sometimes"}}, "per sometimes"),
        ({"rule": content["rule"] | {"extra": 1}}, "it needs"),
        ({"rule": content["rule"] | {"levels": [1, "hold+4|full", SOFTMAX]}}, "no call to hold from"),
    ):
        with pytest.raises(UserError, match=match):
            schedule_from_json(content | changes)


def test_when_stages_began_is_counted_from_one() -> None:
    began = Began.of(["a", "b", "c"], [[3, -1], [5, -1], [9, -1], [4, -1]])
    assert began == (Began("b", 4, 5, 10, 4), Began("c", None, None, None, 0))
