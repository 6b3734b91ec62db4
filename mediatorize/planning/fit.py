"""Fits a plan's weights: least squares in closed loop, then Gauss-Newton on the error of the final sample.

In closed loop, every call is run on the plan's own states, and the update after it is fitted to the reference's state at the next call.
What was done wrong before is mended by what comes after. The model is a black box. All states are coefficients, as in `diffusion.plan`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from mediatorize.diffusion.plan import Plan, PlanCall, Setting
from mediatorize.planning.judge import relative_errors
from mediatorize.planning.path import Path
from mediatorize.planning.reference import Denoiser, Reference, adams_weights

RIDGES = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridges that are tried; left-out samples choose."""
FOLDS = 4
ORDER, LAST_ORDER = 2, 1
"""Of the analytic weights: of all updates, and of the one that leads to the data."""
DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Of a Gauss-Newton step; samples that it was not made from choose."""
NUDGE = 1e-3
"""A weight's change for a finite difference, as a share of the final sample; also a time's change in u."""
Key = tuple[str, int]
"""(stream, call) of an output."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples to fit to or to judge by."""

    noise: Tensor
    """(n, c, ...)"""
    rows: Tensor
    """(n,) whose conditioning each has."""
    reference: Reference

    def __len__(self) -> int:
        return len(self.rows)

    def first(self, count: int) -> Batch:
        """The first `count` samples."""
        return Batch(noise=self.noise[:count], rows=self.rows[:count], reference=self.reference.first(count))

    def errors(self, z: Tensor) -> Tensor:
        """(n,) relative errors of final coefficients."""
        return relative_errors(z, self.reference.final)


def middle(errors: Tensor) -> float:
    """The geometric mean of errors (n,), which everything is chosen by: no sample rules it."""
    return float(errors.clamp(min=1e-9).log().mean().exp())


# --- analytic weights ----------------------------------------------------------------------------------------------------------


def wanted_features(plan: Plan, index: int, history: int) -> tuple[Key, ...]:
    """The outputs that the update after call `index` combines: of the last `history` calls that have each stream, the newest first."""
    calls = range(index, -1, -1)
    found = [("c", j) for j in calls][:history]
    if plan.streams == "halves":
        found += [("d", j) for j in calls if plan.calls[j].uncond][:history]
    return tuple(found)


def analytic_weights(plan: Plan, setting: Setting, index: int, features: Sequence[Key], stop: float, order: int) -> Tensor:
    """(groups, bands, 1 + features) float64: the variable-step multistep weights that a fit is drawn to.

    With velocities these are Adams-Bashforth's in u. With predictions of the data or the noise they are those of the exponential method in
    log-SNR: order 2 is DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2), or DPM-Solver's multistep form (arXiv 2206.00927).

    Args:
        stop: the place u after the update.
        order: of the method; less where there are not so many calls yet.
    """
    places = [j for stream, j in features if stream == "c"][:order]
    us = [plan.calls[j].u for j in places]
    state, own = (1.0, adams_weights(us, us[0], stop)) if setting.feature == "velocity" else _exponential(setting.feature, us, stop)
    weights = torch.zeros(len(plan.groups), len(plan.edges) + 1, 1 + len(features), dtype=torch.float64)
    weights[..., 0] = state
    differences = [j for stream, j in features if stream == "d"]
    guided = torch.tensor([bool(setting.guided[list(members)].all()) for members in plan.groups])
    for j, weight in zip(places, own, strict=False):
        weights[..., 1 + features.index(("c", j))] += weight
        if differences and (plan.calls[j].uncond or plan.inside(plan.calls[j])):  # a half that was left out is the nearest call's
            nearest = min(differences, key=lambda i: (abs(i - j), i > j))
            weights[guided, :, 1 + features.index(("d", nearest))] += weight * (plan.cfg_scale - 1)
    return weights


def _exponential(feature: str, us: Sequence[float], stop: float) -> tuple[float, list[float]]:
    """Weights of the state and of predictions of data or noise at places `us`, the newest first: of order 1 or 2 in log-SNR."""
    start = us[0]
    ratio, data = start / (1 - start), feature == "data"
    if stop >= 1:  # a step to the data itself
        return (0.0, [1.0]) if data else (1 / start, [-1 / ratio])
    after = stop / (1 - stop)
    state, total = ((1 - stop) / (1 - start), (1 - stop) * (after - ratio)) if data else (stop / start, stop * (1 / after - 1 / ratio))
    if len(us) == 1 or us[1] <= 0:
        return state, [total]
    logs = [math.log(u / (1 - u)) for u in (stop, *us[:2])]
    correction = total * (logs[0] - logs[1]) / (2 * (logs[1] - logs[2]))
    return state, [total + correction, -correction]


# --- closed loop ---------------------------------------------------------------------------------------------------------------


def differences_basis(features: Sequence[Key]) -> Tensor:
    """A basis in which neighbouring outputs are not alike: of every stream the newest, then first, second, ... differences.

    (1 + features, 1 + features) float64: weights = basis @ coefficients. The first column is the state's.
    """
    basis = torch.eye(1 + len(features), dtype=torch.float64)
    for stream in dict.fromkeys(stream for stream, _ in features):
        own = [k for k, (other, _) in enumerate(features, 1) if other == stream]
        for order in range(len(own)):
            basis[own[: order + 1], own[order]] = torch.tensor([(-1.0) ** i * math.comb(order, i) for i in range(order + 1)]).double()
    return basis


def ridge(gram: Tensor, right: Tensor, prior: Tensor, counts: Tensor, basis: Tensor) -> Tensor:
    """Weighted least squares drawn to `prior` (f,), with the ridge that predicts left-out samples best.

    Args:
        gram: (n, f, f) and right: (n, f), float64, of every sample.
        counts: (n,) how much each sample counts.
        basis: the ridge is on coefficients in this basis, each scaled to unit power.
    """
    turned = counts.view(-1, 1, 1) * (basis.T @ gram @ basis)
    rest = counts.view(-1, 1) * ((right - gram @ prior) @ basis)  # what the prior leaves
    power = torch.diag(turned.sum(0).diagonal().clamp(min=1e-300))
    fold = torch.arange(len(gram), device=gram.device) % FOLDS

    def solved(keep: Tensor, amount: float) -> Tensor:
        return torch.linalg.solve(turned[keep].sum(0) + amount * power * keep.double().mean(), rest[keep].sum(0))

    def left_out(amount: float) -> float:
        changes = [(solved(fold != k, amount), fold == k) for k in range(FOLDS)]
        return sum(float(d @ turned[out].sum(0) @ d - 2 * rest[out].sum(0) @ d) for d, out in changes)

    best = min(RIDGES, key=left_out) if len(gram) >= FOLDS else RIDGES[len(RIDGES) // 2]
    return prior + basis @ solved(torch.ones_like(fold, dtype=torch.bool), best)


def fitted_update(
    setting: Setting, terms: Sequence[Tensor], target: Tensor, prior: Tensor, counts: Tensor, features: Sequence[Key]
) -> Tensor:
    """The weights (groups, bands, terms) float64 of one update: of the state and features (n, c, ...), to the target (n, c, ...)."""
    basis, fitted = differences_basis(features), prior.clone()
    stacked, target = torch.stack(list(terms), -1).cpu(), target.cpu()
    for g in range(prior.shape[0]):
        for b in range(prior.shape[1]):
            mask = setting.mask(g, b).expand(target.shape[1:]).cpu()
            values, wanted = stacked[:, mask].double(), target[:, mask].double()  # (n, values, terms), (n, values)
            right = (wanted.unsqueeze(1) @ values).squeeze(1)
            fitted[g, b] = ridge(values.mT @ values, right, prior[g, b], counts, basis)
    return fitted


@torch.no_grad()
def fit_in_closed_loop(denoise: Denoiser, plan: Plan, batch: Batch, history: int, trust: Tensor | None = None) -> tuple[Plan, Tensor]:
    """The plan with weights fitted call by call, and the final coefficients (n, c, ...) of the batch.

    Args:
        history: how many calls' outputs an update combines.
        trust: (n,) how much each sample counts, beside 1 / |final sample|^2.
    """
    run = Run(denoise, plan, batch)
    counts = 1 / batch.reference.final.double().flatten(1).square().sum(1).cpu()
    counts = counts if trust is None else counts * trust
    calls = list(plan.calls)
    for index, call in enumerate(calls):
        run.call(index, call)
        features = wanted_features(plan, index, history)
        last = index + 1 == len(calls)
        stop = 1.0 if last else calls[index + 1].u
        prior = analytic_weights(plan, run.setting, index, features, stop, LAST_ORDER if last else ORDER)
        terms = [run.z, *(run.outputs[key] for key in features)]
        fitted = fitted_update(run.setting, terms, batch.reference.at(stop), prior, counts, features)
        calls[index] = replace(call, features=features, weights=nested(fitted))
        run.z = run.setting.update(fitted.float(), terms)
    return replace(plan, calls=tuple(calls)), run.z


def fit(denoise: Denoiser, plan: Plan, batch: Batch, history: int) -> Plan:
    """The plan with fitted weights. A second pass counts samples less that the first could not bring near, so that a few do not rule."""
    _, final = fit_in_closed_loop(denoise, plan, batch, history)
    return fit_in_closed_loop(denoise, plan, batch, history, trust(batch.errors(final)))[0]


def trust(errors: Tensor) -> Tensor:
    """(n,) float64: how much samples count, by their errors: those of Cauchy's loss, scaled by the median."""
    squares = errors.double().square().cpu()
    return 1 / (squares + squares.median().clamp(min=1e-18))


def analytic(plan: Plan, shape: Sequence[int], history: int = ORDER, last_order: int = LAST_ORDER) -> Plan:
    """The plan with analytic weights, for states of a shape (c, ...)."""
    setting, calls = Setting.of(plan, shape), []
    for index, call in enumerate(plan.calls):
        features, last = wanted_features(plan, index, history), index + 1 == len(plan.calls)
        stop = 1.0 if last else plan.calls[index + 1].u
        weights = analytic_weights(plan, setting, index, features, stop, min(history, last_order if last else history))
        calls.append(replace(call, features=features, weights=nested(weights)))
    return replace(plan, calls=tuple(calls))


def nested(weights: Tensor) -> tuple[tuple[tuple[float, ...], ...], ...]:
    """(groups, bands, terms) as a plan keeps them."""
    return tuple(tuple(tuple(band) for band in group) for group in weights.tolist())


# --- running -------------------------------------------------------------------------------------------------------------------


class Run:
    """A plan's trajectory of a batch, call by call."""

    def __init__(self, denoise: Denoiser, plan: Plan, batch: Batch) -> None:
        self.denoise, self.plan, self.rows = denoise, plan, batch.rows
        self.setting = Setting.of(plan, batch.noise.shape[1:], batch.noise.device)
        first = plan.calls[0]
        self.z = self.setting.bands.to(batch.noise.float() / (first.signal + first.noise))
        self.outputs: dict[Key, Tensor] = {}

    def branch(self, z: Tensor, copies: int) -> Run:
        """The same trajectory, several times, from other states z (copies * n, c, ...)."""
        other = Run.__new__(Run)
        other.denoise, other.plan, other.setting, other.z = self.denoise, self.plan, self.setting, z
        other.rows = self.rows.repeat(copies)
        other.outputs = {key: value.repeat(copies, *(1,) * (value.ndim - 1)) for key, value in self.outputs.items()}
        return other

    def call(self, index: int, call: PlanCall) -> None:
        """Calls the model."""
        x = self.setting.bands.back(self.z) * (call.signal + call.noise)
        halves = self.denoise(x, call.t, call.uncond, call.levels, self.rows)
        found = self.setting.features(self.z, *halves, call.signal, call.noise)
        self.outputs |= {(stream, index): value for stream, value in found.items()}

    def terms(self, call: PlanCall) -> list[Tensor]:
        """What the update after a call combines."""
        return [self.z, *(self.outputs[key] for key in call.features)]

    def rest(self, first: int, calls: Sequence[PlanCall]) -> Tensor:
        """Runs the calls from number `first` on: the final coefficients."""
        for index in range(first, len(calls)):
            self.call(index, calls[index])
            self.z = self.setting.update(torch.tensor(calls[index].weights, dtype=torch.float32), self.terms(calls[index]))
        return self.z


@torch.no_grad()
def final_of(denoise: Denoiser, plan: Plan, batch: Batch) -> Tensor:
    """The final coefficients (n, c, ...) of a batch by a plan."""
    return Run(denoise, plan, batch).rest(0, plan.calls)


# --- Gauss-Newton --------------------------------------------------------------------------------------------------------------

Move = tuple[int, int, int, int] | int
"""What a column of the Jacobian moves: a weight (call, group, band, term), or the time of a call."""


@torch.no_grad()
def gauss_newton(denoise: Denoiser, plan: Plan, path: Path, batch: Batch, others: Batch) -> tuple[Plan, float]:
    """One step of Gauss-Newton over all weights and times on the error of the final samples, and the error of `others` after it.

    The Jacobian is by finite differences, column by column: the model is called as it samples. The damping that is best on `others` is
    taken; where none is better than no step, the plan stays.
    """
    final, moves, columns = _jacobian(denoise, plan, path, batch)
    counts = (trust(batch.errors(final)) / batch.reference.final.double().flatten(1).square().sum(1).cpu()).tolist()
    left = (final - batch.reference.final).flatten(1).cpu()
    size = len(moves)
    normal, right = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for k, count in enumerate(counts):
        jacobian = torch.stack([column[k].flatten() for column in columns]).double().cpu()  # (moves, values)
        normal += count * jacobian @ jacobian.T
        right -= count * jacobian @ left[k].double()
    best, error = plan, middle(others.errors(final_of(denoise, plan, others)))
    for damping in DAMPINGS:
        change = torch.linalg.solve(normal + damping * torch.diag(normal.diagonal().clamp(min=1e-30)), right)
        candidate = moved(plan, path, dict(zip(moves, change.tolist(), strict=True)))
        if candidate is None:
            continue
        found = middle(others.errors(final_of(denoise, candidate, others)))
        if found < error:
            best, error = candidate, found
    return best, error


def _jacobian(denoise: Denoiser, plan: Plan, path: Path, batch: Batch) -> tuple[Tensor, list[Move], list[Tensor]]:
    """Final coefficients, and their derivatives (n, c, ...) by every weight and by every time but the first."""
    calls, states = plan.calls, []
    run = Run(denoise, plan, batch)
    outputs: list[dict[Key, Tensor]] = []
    for index, call in enumerate(calls):
        states.append(run.z)
        outputs.append(dict(run.outputs))
        run.call(index, call)
        run.z = run.setting.update(torch.tensor(call.weights, dtype=torch.float32), run.terms(call))
    final, size = run.z, float(batch.reference.final.norm())
    states.append(final)
    moves: list[Move] = []
    columns: list[Tensor] = []
    for index, call in enumerate(calls):
        terms = [states[index], *(run.outputs[key] for key in call.features)]
        nudges = []
        for g in range(len(plan.groups)):
            for b in range(len(plan.edges) + 1):
                mask = run.setting.mask(g, b).float()
                for k, term in enumerate(terms):
                    moves.append((index, g, b, k))
                    direction = mask * term
                    nudges.append((direction, NUDGE * size / max(float(direction.norm()), 1e-12)))
        if index + 1 == len(calls):
            columns += [direction for direction, _ in nudges]
        else:
            start = Run(denoise, plan, batch)
            start.outputs = {key: value for key, value in run.outputs.items() if key[1] <= index}
            z = torch.cat([states[index + 1] + amount * direction for direction, amount in nudges])
            ends = start.branch(z, len(nudges)).rest(index + 1, calls).chunk(len(nudges))
            columns += [(end - final) / amount for end, (_, amount) in zip(ends, nudges, strict=True)]
        if index > 0 and (shifted := moved(plan, path, {index: NUDGE})) is not None:
            start = Run(denoise, plan, batch)
            start.outputs, start.z = dict(outputs[index]), states[index]
            moves.append(index)
            columns.append((start.rest(index, shifted.calls) - final) / NUDGE)
    return final, moves, columns


def moved(plan: Plan, path: Path, changes: Mapping[Move, float]) -> Plan | None:
    """The plan with weights and times (in u) changed; None where times would no longer ascend within the path,
    or leave the guidance interval or enter it."""
    us = [call.u for call in plan.calls]
    weights = [torch.tensor(call.weights, dtype=torch.float64) for call in plan.calls]
    for move, change in changes.items():
        if isinstance(move, int):
            us[move] += change
        else:
            weights[move[0]][move[1:]] += change
    if any(after <= before for before, after in pairwise(us)) or us[-1] > min(path.end, 1 - NUDGE):
        return None
    placed = [call if u == call.u else call_at(path, u, call) for call, u in zip(plan.calls, us, strict=True)]
    if any(plan.inside(before) != plan.inside(after) for before, after in zip(plan.calls, placed, strict=True)):
        return None  # a call would cross an end of the guidance interval
    return replace(plan, calls=tuple(replace(call, weights=nested(own)) for call, own in zip(placed, weights, strict=True)))


def call_at(path: Path, u: float, like: PlanCall | None = None) -> PlanCall:
    """A call at a place of the path, in all else like another."""
    t = path.time(u)
    signal, noise = path.factors(t)
    return replace(like or PlanCall(t=t, signal=signal, noise=noise), t=t, signal=signal, noise=noise)
