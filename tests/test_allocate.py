"""The budget solver: equal to brute force, never over the budget, never worse with more of it."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mediatorize.errors import UserError
from mediatorize.model.architecture import preset
from mediatorize.model.cost import attention_flops
from mediatorize.model.levels import SOFTMAX, MediatorSettings
from mediatorize.planning.allocate import allocate, descend, joint_error, total

Table = NDArray[Any]


def random_tables(seed: int, steps: int = 2, layers: int = 3, options: int = 3) -> tuple[Table, Table]:
    """Errors, and costs of which half are shared by all cells, as FLOPs are, and half by none."""
    random = np.random.default_rng(seed)
    errors = random.lognormal(sigma=2, size=(steps, layers, options))
    if seed % 2:
        errors -= errors.mean()
    shared = np.tile(np.sort(random.integers(10**9, 10**11, options)), (steps, layers, 1))
    return errors, shared if seed % 4 < 2 else random.integers(1, 50, (steps, layers, options))


def brute_force(errors: Table, costs: Table, budget: float, per_step: bool = False) -> float:
    """The least error within the budget, by trying everything."""
    steps, layers, options = errors.shape
    if per_step:
        errors, costs, layers = errors.sum(1, keepdims=True), costs.sum(1, keepdims=True), 1
    choices = (np.array(flat).reshape(steps, layers) for flat in product(range(options), repeat=steps * layers))
    return min(float(total(errors, choice)) for choice in choices if total(costs, choice) <= budget)


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_the_choice_is_the_one_that_brute_force_finds(seed: int, per_step: bool) -> None:
    errors, costs = random_tables(seed)
    least, most = costs.min(2).sum(), costs.max(2).sum()
    if per_step:
        least = costs.sum(1).min(1).sum()
    for share in (0.0, 0.1, 0.35, 0.5, 0.8, 1.0):
        budget = int(least + share * (most - least))
        choice = allocate(errors, costs, budget, per_step=per_step)
        assert total(costs, choice) <= budget
        assert total(errors, choice) == pytest.approx(brute_force(errors, costs, budget, per_step), rel=1e-9, abs=1e-9)
        assert not per_step or (choice == choice[:, :1]).all()


@pytest.mark.parametrize("calls", [1, 2, 250])
def test_a_budget_that_is_met_to_the_last_flop_is_met_and_one_less_is_not(calls: int) -> None:
    """Sums of 10^15: the solver's own tolerance of a millionth would give away millions."""
    arch = preset("DiT-XL/2@512")
    one = [calls * attention_flops(arch, level, MediatorSettings((1, 4, 16), local_rank=64)) for level in (1, 4, 16, SOFTMAX)]
    costs = np.tile(np.array(one), (6, 4, 1))
    random = np.random.default_rng(calls)
    choice = random.integers(0, 4, (6, 4))
    exact = total(costs, choice)
    errors = np.sort(random.lognormal(size=(6, 4, 4)), axis=2)[:, :, ::-1].copy()
    np.put_along_axis(errors, choice[:, :, None], 0.0, axis=2)
    assert np.array_equal(allocate(errors, costs, exact), choice)
    assert total(costs, allocate(errors, costs, exact - 1)) < exact


@pytest.mark.parametrize("seed", range(20))
def test_costs_without_a_common_unit_are_never_over_the_budget_either(seed: int) -> None:
    random = np.random.default_rng(seed)
    costs = np.tile(10**13 * np.array([1, 3, 9]) + random.integers(0, 10**6, 3), (6, 4, 1))
    errors = np.sort(random.lognormal(size=(6, 4, 3)), axis=2)[:, :, ::-1]
    for less in (0, 1, 10**5, 10**7):
        budget = total(costs, random.integers(0, 3, (6, 4))) - less
        assert total(costs, allocate(errors, costs, budget)) <= budget


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("per_step", [False, True])
def test_more_budget_never_gives_more_error(seed: int, per_step: bool) -> None:
    errors, costs = random_tables(seed, steps=6, layers=5, options=4)
    least = costs.sum(1).min(1).sum() if per_step else costs.min(2).sum()
    budgets = np.linspace(least, costs.max(2).sum(), 25).astype(np.int64)
    found = [total(errors, allocate(errors, costs, budget, per_step=per_step)) for budget in budgets]
    assert all(after <= before + 1e-9 for before, after in pairwise(found))
    assert found[-1] == pytest.approx(errors.sum(1).min(1).sum() if per_step else errors.min(2).sum())


@pytest.mark.parametrize("room", [1.5e-6, 1.2e-6, 1e-6, 5e-7, 0.0])
def test_a_room_within_the_tolerance_of_the_solver_is_kept(room: float) -> None:
    errors, costs = np.tile(np.array([5.0, 1.0, 0.5]), (1, 2, 1)), np.tile(np.array([1.0, 1.0 + 1e-6, 2.0]), (1, 2, 1))
    choice = allocate(errors, costs, total(costs, np.zeros((1, 2), dtype=np.int64)) + room)
    assert total(costs, choice) <= 2.0 + room
    assert choice.max() <= 1


def test_costs_may_be_seconds() -> None:
    random = np.random.default_rng(1)
    errors, costs = random.random((4, 3, 3)), np.tile(np.array([1e-5, 2e-5, 7e-5]), (4, 3, 1))
    for budget in (1.3e-4, 2.9e-4, 8e-4):
        choice = allocate(errors, costs, budget)
        assert total(costs, choice) <= budget
        assert total(errors, choice) == pytest.approx(allocate_by_counts(errors, budget, costs[0, 0]))


def allocate_by_counts(errors: Table, budget: float, costs: Table) -> float:
    """The least error where all cells cost alike, by dynamic programming over how many cells take each option."""
    flat = errors.reshape(-1, 3)
    best = {(0, 0): 0.0}
    for row in flat:
        after: dict[tuple[int, int], float] = {}
        for (second, third), error in best.items():
            for key, cost in (((second, third), row[0]), ((second + 1, third), row[1]), ((second, third + 1), row[2])):
                after[key] = min(after.get(key, np.inf), error + cost)
        best = after
    cells = len(flat)
    return min(e for (j, k), e in best.items() if (cells - j - k) * costs[0] + j * costs[1] + k * costs[2] <= budget)


@pytest.mark.parametrize("per_step", [False, True])
def test_what_cannot_be_met_is_refused(per_step: bool) -> None:
    errors, costs = random_tables(0)
    least = costs.sum(1).min(1).sum() if per_step else costs.min(2).sum()
    with pytest.raises(UserError, match="cheapest"):
        allocate(errors, costs, least - 1, per_step=per_step)


def test_tables_that_are_not_finite_or_do_not_fit_are_errors() -> None:
    errors, costs = random_tables(0)
    with pytest.raises(ValueError, match="finite"):
        allocate(np.where(errors == errors.max(), np.nan, errors), costs, costs.sum())
    with pytest.raises(ValueError, match="one shape"):
        allocate(errors[:1], costs, costs.sum())


def correlated_vectors(seed: int, steps: int, layers: int, options: int) -> Table:
    """Vectors that point much the same way at every step, as the errors of a layer do; the last option's are zero."""
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(1, layers, 1, 12)) + 0.5 * random.normal(size=(steps, layers, options, 12))
    return vectors * np.linspace(1, 0, options)[:, None] * random.lognormal(size=(steps, layers, 1, 1))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_descent_stays_within_the_budget_and_comes_near_to_brute_force(seed: int, apart: bool) -> None:
    products = correlated_vectors(seed, 3, 2, 3)
    costs = np.tile(np.array([2, 3, 6]), (3, 2, 1))
    for budget in (14, 20, 27):
        start = allocate(np.square(products).sum(-1), costs, budget)
        choice = descend(products, costs, budget, start, apart=apart)
        assert total(costs, choice) <= budget
        everything = (np.array(flat).reshape(3, 2) for flat in product(range(3), repeat=6))
        errors = sorted(joint_error(products, c, apart=apart) for c in everything if total(costs, c) <= budget)
        found = joint_error(products, choice, apart=apart)
        assert found <= joint_error(products, start, apart=apart)
        assert found <= errors[len(errors) // 20] + 1e-12  # among the best twentieth


def test_descent_uses_changes_that_cancel() -> None:
    """Two steps whose changes are opposite: as squares both cost, as vectors they make nothing."""
    vectors = np.zeros((3, 1, 2, 2))
    vectors[0, 0, 0], vectors[1, 0, 0], vectors[2, 0, 0] = (1.0, 0.0), (-1.0, 0.0), (0.0, 0.5)
    costs = np.tile(np.array([1, 2]), (3, 1, 1))
    start = allocate(np.square(vectors).sum(-1), costs, 4)
    assert joint_error(vectors, start) == pytest.approx(1.25)
    choice = descend(vectors, costs, 4, start, apart=False)
    assert choice.ravel().tolist() == [0, 0, 1]
    assert joint_error(vectors, choice) == 0
