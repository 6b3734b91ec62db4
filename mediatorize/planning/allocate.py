"""One level for every cell under a budget: the multiple-choice knapsack, solved exactly by HiGHS (design 5). No torch here."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mediatorize.errors import UserError

Choice = NDArray[np.int64]

TOLERANCE = 2e-6
"""HiGHS takes a row for kept when it is broken by no more than half of this."""

MOST_UNITS = 10**7
"""Costs that are whole multiples of one unit, and no more of them than this, are compared exactly."""

LEAST_GAIN = 1e-4
"""`descend` goes on while a step takes this share off the error."""

MOST_DAMPING = 256.0

MOST_NODES = 200
"""For each step of `descend`, which is of a model of the error only. To the very best HiGHS can take minutes."""

PRICES = 40
"""How often the price of cost is halved in between, to bound what any choice can reach."""


def allocate(errors: ArrayLike, costs: ArrayLike, budget: float, *, per_step: bool = False, nodes: int | None = None) -> Choice:
    """The option of every cell that makes the sum of errors smallest while the sum of costs is at most `budget`.

    min sum e[s, l, j] z[s, l, j]  such that  sum c z <= budget,  sum_j z[s, l, j] = 1,  z in {0, 1}

    Args:
        errors: (steps, layers, options), finite; they may be negative.
        costs: the same shape. Whole numbers (FLOPs) are counted exactly, however large.
        budget: in the unit of `costs`.
        per_step: one option for all layers of a step.
        nodes: of HiGHS' search tree, after which the best choice so far is taken; None searches to the end.

    Returns:
        (steps, layers) indices of options. Never over the budget: sums are checked again in exact arithmetic.

    Raises:
        UserError: not even the cheapest options keep the budget.
    """
    error_table, cost_table = np.asarray(errors, dtype=np.float64), np.asarray(costs)
    steps, layers, _ = error_table.shape
    if cost_table.shape != error_table.shape or not np.isfinite(error_table).all():
        raise ValueError("errors and costs need one shape and finite values")
    if per_step:
        whole = allocate(error_table.sum(1, keepdims=True), cost_table.sum(1, keepdims=True), budget, nodes=nodes)
        return np.repeat(whole, layers, axis=1)

    cheapest = total(cost_table.min(2, keepdims=True), np.zeros((steps, layers), dtype=np.int64))
    if cheapest > budget:
        raise UserError(f"The cheapest levels cost {cheapest}, which is over {budget}.", hint="Allow more.")
    slack = 0.0
    while True:
        choice = _solve(error_table, cost_table, budget, slack, nodes)
        if total(cost_table, choice) <= budget:
            return choice
        slack = max(2 * slack, TOLERANCE)  # HiGHS took its tolerance: leave it that much


def total(table: NDArray[Any], choice: Choice) -> Any:
    """The sum of a table's chosen entries; of whole numbers a whole number."""
    return np.take_along_axis(table, choice[..., None], 2).sum().item()


def _solve(errors: NDArray[np.float64], costs: NDArray[Any], budget: float, slack: float, nodes: int | None) -> Choice:
    """The knapsack with a whole number n[g, j] for how many cells of the same costs take option j.

    Only these are branched on. Where they are whole, what is left is a transportation problem, whose corners are whole; without them, the
    many cells of equal cost are as many ways to come as close to the budget, and HiGHS tries them for minutes.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import block_array, coo_array, eye_array

    options = errors.shape[2]
    rows, group = np.unique(costs.reshape(-1, options), axis=0, return_inverse=True)
    cells, groups = len(group), len(rows)
    extra = rows - rows.min(1, keepdims=True)
    room = budget - rows.min(1)[group].sum().item()
    whole = np.issubdtype(extra.dtype, np.integer)
    unit = int(np.gcd.reduce(extra, axis=None)) or 1 if whole else 0
    if whole and extra.max() // unit <= MOST_UNITS:
        extra, limit = extra // unit, room // unit + 0.5  # sums are whole: nothing is near the limit
    else:
        scale = float(extra.max()) or 1.0
        extra, limit = extra / scale, room / scale - slack
    cheapest = rows.argmin(1)[group].reshape(errors.shape[:2])
    if limit < 0:  # less than the tolerance is left
        return cheapest
    gain = errors.reshape(cells, options)
    gain = gain - gain.min(1, keepdims=True)
    most = np.where(_dominated(gain, extra[group]) | _hopeless(gain, extra[group], limit), 0.0, 1.0)

    cell, option = np.indices((cells, options)).reshape(2, -1)
    each = np.arange(cells * options)
    one_each = coo_array((np.ones(each.size), (cell, each)))
    counted = coo_array((np.ones(each.size), (group[cell] * options + option, each)))
    counts = groups * options
    structure = block_array([[one_each, None], [counted, -eye_array(counts)]], format="csr")
    sums = np.concatenate([np.ones(cells), np.zeros(counts)])
    spent = np.concatenate([np.zeros(each.size), extra.ravel()])
    result = milp(
        np.concatenate([(gain / (gain.max() or 1.0)).ravel(), np.zeros(counts)]),
        integrality=np.concatenate([np.zeros(each.size), np.ones(counts)]),
        bounds=Bounds(0, np.concatenate([most.ravel(), np.full(counts, cells)])),
        constraints=[LinearConstraint(structure, sums, sums), LinearConstraint(spent.reshape(1, -1), -np.inf, limit)],
        options={"mip_rel_gap": 0.0} if nodes is None else {"mip_rel_gap": LEAST_GAIN, "node_limit": nodes},
    )
    if result.x is None and nodes is not None:  # nothing was found so far
        return cheapest
    if result.x is None:
        raise RuntimeError(f"HiGHS found no choice: {result.message}")
    chosen = result.x[: each.size].reshape(cells, options)
    if np.abs(chosen - chosen.round()).max() > 1e-6:
        raise RuntimeError("HiGHS found no corner of the transportation problem.")
    return chosen.argmax(1).reshape(errors.shape[:2])


def _dominated(errors: NDArray[np.float64], costs: NDArray[Any]) -> NDArray[np.bool_]:
    """(cells, options): whether another option of the cell errs no more and costs no more; of equal ones all but the first are."""
    order = np.arange(errors.shape[1])
    no_worse = (errors[:, None] <= errors[..., None]) & (costs[:, None] <= costs[..., None])  # (cells, options, others)
    equal = no_worse & no_worse.mT
    return np.any(no_worse & (~equal | (order < order[:, None])), axis=2)


def _hopeless(errors: NDArray[np.float64], costs: NDArray[Any], room: float) -> NDArray[np.bool_]:
    """(cells, options): whether every choice within the room that takes this option errs more than one that is at hand.

    With a price on cost, every cell alone takes the option of least error and price: what that adds up to, less the price of the room, is a
    bound from below for all choices (Sinha and Zoltners 1979, "The multiple-choice knapsack problem"). An option whose own surplus lifts it
    above the error of a known choice is in no best one.

    Args:
        costs: the least of every cell is 0.
        room: at least 0.
    """
    cells = np.arange(len(errors))

    def bought(price: float) -> Choice:
        return (errors + price * costs).argmin(1)

    def keeps(choice: Choice) -> bool:
        return bool(costs[cells, choice].sum() <= room)

    low, high = 0.0, 0.0
    while not keeps(bought(high)):
        low, high = high, 2 * high or (errors.max() or 1.0) / costs.max()
    for _ in range(PRICES):
        middle = (low + high) / 2
        low, high = (low, middle) if keeps(bought(middle)) else (middle, high)

    known = bought(high)
    while True:  # what is left of the room is spent where it gains most
        now = errors[cells, known], costs[cells, known]
        gain = np.where(costs - now[1][:, None] <= room - now[1].sum(), now[0][:, None] - errors, 0.0)
        cell, option = np.unravel_index(gain.argmax(), gain.shape)
        if gain[cell, option] <= 0:
            break
        known[cell] = option
    priced = errors + high * costs
    surplus = priced - priced.min(1, keepdims=True)
    bound = priced.min(1).sum() - high * room
    return surplus > errors[cells, known].sum() - bound + 1e-9 * errors.max()


def descend(
    products: NDArray[np.float64], costs: ArrayLike, budget: float, start: Choice, *, apart: bool, per_step: bool = False
) -> Choice:
    """A choice within the budget whose changes add up to less than `start`'s, where they are vectors and not numbers.

    The error |sum of vectors|^2 is not a sum over cells. Around a choice with sum R it is, for changes d of single cells,
    |R|^2 + sum (2 <d, R> + |d|^2); `allocate` minimises that, with |d|^2 weighed more until the whole error goes down.

    Args:
        products: (steps, layers, options, probes), vectors whose squares are squared errors.
        apart: take different layers' vectors for orthogonal, and add up only each layer's over the steps. They nearly are; what few
            probes show of their products is mostly noise.
    """
    choice, best, damping = start, joint_error(products, start, apart=apart), 1.0
    while damping <= MOST_DAMPING:
        now = chosen_vectors(products, choice)
        changes = products - now[:, :, None]
        sums = now.sum(0) if apart else np.broadcast_to(now.sum((0, 1)), now.shape[1:])
        table = 2 * np.einsum("sljp,lp->slj", changes, sums) + damping * np.square(changes).sum(-1)
        candidate = allocate(table, costs, budget, per_step=per_step, nodes=MOST_NODES)
        error = joint_error(products, candidate, apart=apart)
        if error < best * (1 - LEAST_GAIN):
            choice, best, damping = candidate, error, max(1.0, damping / 2)
        else:
            damping *= 2
    return choice


def chosen_vectors(products: NDArray[np.float64], choice: Choice) -> NDArray[np.float64]:
    """(steps, layers, probes)"""
    return np.take_along_axis(products, choice[:, :, None, None], 2)[:, :, 0]


def joint_error(products: NDArray[np.float64], choice: Choice, *, apart: bool = False) -> float:
    """|sum of a choice's vectors|^2; `apart` sums each layer's alone and adds the squares."""
    vectors = chosen_vectors(products, choice).sum(0)
    return float(np.square(vectors if apart else vectors.sum(0)).sum())
