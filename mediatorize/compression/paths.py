"""Which model calls to compute, the others forecast: an exact path over calls (design 5). No torch here.

A forecast call costs next to nothing, and its error depends on the last two computed calls before it. So the best choice of `count`
computed calls is a shortest path. Its states are the last computed call, the gap before it, and how many calls were computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mediatorize.model.schedule import polynomial_weights

Floats = NDArray[np.float64]

WINDOW = 12
"""The longest gap between computed calls, and the number of calls back that a forecast can rest on."""


@dataclass(frozen=True)
class ForecastTable:
    """What forecasts do to a sample, to first order, by what each call's forecast rests on.

    `products[k, d]` are the products of what call k - d gave with what moves the sample at call k: (samples, directions), as shares of each
    sample's norm. A forecast is a weighted sum of earlier calls' outputs, so its effect is that sum of products, less `products[k, 0]`.
    """

    places: tuple[float, ...]
    """Of the calls, on the axis of the polynomials."""
    products: Floats
    """(calls, window + 1, samples, directions)"""

    def effect(self, call: int, basis: Sequence[int]) -> Floats:
        """Of a forecast of `call` by the polynomial through the calls of `basis`: (samples, directions)."""
        weights = polynomial_weights([self.places[index] for index in basis], self.places[call])
        terms = [weight * self.products[call, call - index] for index, weight in zip(basis, weights, strict=True)]
        return sum(terms) - self.products[call, 0]

    @property
    def window(self) -> int:
        return self.products.shape[1] - 1

    def errors(self, measure: Callable[[Floats], float]) -> Floats:
        """(calls, window + 1, window + 1): the error of each call's linear forecast [call, gap to the last computed call, gap before it].

        A gap before of 0 means that the first call alone was computed, which is held. What cannot be is infinite. Of two computed calls at
        one place, as heun's can be, the later is taken to be held, though what runs has a line through the place before, too.

        Args:
            measure: an effect (samples, directions) -> an error, which adds up over calls.
        """
        calls, window = len(self.places), self.window
        found = np.full((calls, window + 1, window + 1), np.inf)
        for call in range(1, calls):
            for last in range(max(0, call - window), call):
                gap = call - last
                if last == 0:
                    found[call, gap, 0] = measure(self.effect(call, [0]))
                for before in range(max(0, call - window), last):
                    basis = [last] if self.places[before] == self.places[last] else [before, last]
                    found[call, gap, last - before] = measure(self.effect(call, basis))
        return found

    def reaches(self, computed: Sequence[int]) -> bool:
        """Whether the window has all that the forecasts between these computed calls rest on."""
        return all(call - basis[0] <= self.window for call, basis in bases(computed, self.places).items())

    def joint(self, computed: Sequence[int]) -> Floats:
        """The sum of all forecasts' effects, for a set of computed calls in ascending order: (samples, directions)."""
        total = np.zeros(self.products.shape[2:])
        for call, basis in bases(computed, self.places).items():
            total += self.effect(call, basis)
        return total


def bases(computed: Sequence[int], places: Sequence[float], order: int = 1) -> dict[int, list[int]]:
    """For every call that is not computed, the computed calls that its forecast rests on: the last ones at different places.

    Args:
        places: of all calls (`model.schedule.places_of`).
    """
    known, found = set(computed), {}
    for call in range(len(places)):
        if call not in known:
            at_places = {places[index]: index for index in computed if index < call}  # of two at one place, the later
            found[call] = list(at_places.values())[-order - 1 :]
    return found


def mean_square(effect: Floats) -> float:
    """The mean over samples of the squared error; the mean over directions is the square of one sample's."""
    return float(np.square(effect).mean(1).mean())


def median_square(effect: Floats) -> float:
    """The squared error of the median sample: one that flips to another mode does not rule it."""
    return float(np.median(np.square(effect).mean(1)))


def median_norm(effect: Floats) -> float:
    """The error of the median sample: as a sum over calls, an upper bound."""
    return median_square(effect) ** 0.5


MEASURES: dict[str, Callable[[Floats], float]] = {"mean square": mean_square, "median square": median_square, "median": median_norm}
"""What a path can make smallest, summed over its forecast calls."""


def best_path(errors: Floats, count: int) -> tuple[int, ...] | None:
    """The `count` computed calls, the first among them, whose forecasts have the smallest sum of errors; None if there are none.

    Args:
        errors: `ForecastTable.errors`.
    """
    calls, size = len(errors), errors.shape[1] + 1
    spans = _spans(errors)
    value = np.full((calls, size), np.inf)  # by last computed call and the gap before it
    value[0, 0] = 0.0
    came: list[NDArray[np.int64]] = []
    for _ in range(count - 1):
        after, gap_before = np.full_like(value, np.inf), np.zeros(value.shape, dtype=np.int64)
        for gap in range(1, min(size, calls)):
            total = value[: calls - gap] + spans[: calls - gap, :, gap]
            gap_before[gap:, gap] = total.argmin(1)
            after[gap:, gap] = total.min(1)
        came.append(gap_before)
        value = after
    ends = value + np.stack([_to_the_end(spans, calls, last) for last in range(calls)])
    if not np.isfinite(ends).any():
        return None
    last, gap = map(int, np.unravel_index(ends.argmin(), ends.shape))
    path = [last]
    for gap_before in reversed(came):
        last, gap = last - gap, int(gap_before[last, gap])
        path.append(last)
    return tuple(reversed(path))


def _spans(errors: Floats) -> Floats:
    """(calls, gap before, gap after): the error of all forecasts between a computed call and the next, `gap after` later."""
    calls, size = errors.shape[:2]
    errors = np.pad(errors, ((0, 0), (0, 0), (0, 1)), constant_values=np.inf)  # a gap so wide that no forecast can rest on both its ends
    spans = np.full((calls, size + 1, size + 1), np.inf)
    for last in range(calls):
        spans[last, :, 1] = 0.0
        for gap in range(2, size + 1):
            call = last + gap - 1
            spans[last, :, gap] = spans[last, :, gap - 1] + (errors[call, gap - 1] if call < calls else 0.0)
    return spans


def _to_the_end(spans: Floats, calls: int, last: int) -> Floats:
    gap = calls - last
    return spans[last, :, gap] if gap < spans.shape[2] else np.full(spans.shape[1], np.inf)


def uniform_path(calls: int, count: int) -> tuple[int, ...]:
    """Every n-th call from the second on, after the first, with the smallest n that computes no more than `count`."""
    for every in range(1, calls + 1):
        path = (0, *range(1, calls, every))
        if len(path) <= count:
            return path
    return (0,)


def neighbours(path: Sequence[int], calls: int) -> list[tuple[int, ...]]:
    """Paths that differ in the place of one computed call, moved by one or two; the first call stays."""
    found = []
    for index in range(1, len(path)):
        low = path[index - 1]
        high = path[index + 1] if index + 1 < len(path) else calls
        moved = (path[index] + step for step in (-1, 1, -2, 2))
        found += [(*path[:index], place, *path[index + 1 :]) for place in moved if low < place < high]
    return found


def refined(table: ForecastTable, path: Sequence[int], measure: Callable[[Floats], float] = median_square) -> tuple[int, ...]:
    """The path after moves of single computed calls, as long as the error of all forecasts together, added up as vectors, falls."""
    best, error = tuple(path), measure(table.joint(path))
    while True:
        others = [other for other in neighbours(best, len(table.places)) if table.reaches(other)]
        tried = [(measure(table.joint(other)), other) for other in others]
        if not tried or min(tried)[0] >= error:
            return best
        error, best = min(tried)
