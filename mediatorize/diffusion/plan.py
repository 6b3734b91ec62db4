"""Plans: few model calls at fitted times, and fitted weights of the sampler's updates. What a plan is, and how one runs.

A sampler takes a state from one model call to the next by a linear combination of the state and of the model's last outputs: Euler, DDIM,
Adams-Bashforth and DPM-Solver++ differ in the weights alone. A plan has weights of its own for every call (`planning.fit`). With z the
state and f_j,s the output of call j in stream s, both as coefficients of a cosine transform, in band b and channel group g:

    z_{i+1} = w_{i,g,b,0} z_i + sum over j, s of w_{i,g,b,j,s} f_{j,s}

States are z = x / (signal + noise), so that the processes of all models look alike: z runs from noise to data as u = signal / (signal +
noise) runs to 1, and dz/du is the velocity data - noise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

PLAN_FORMAT = "mediatorize-plan"
PLAN_VERSION = 1

Feature = Literal["velocity", "noise", "data"]
"""What an update combines: the model's output as a velocity (data - noise), as a prediction of the noise, or of the data."""
Streams = Literal["guided", "halves"]
"""`guided`: one output per call, with guidance applied. `halves`: the conditional output and the conditional minus the unconditional."""

Evaluate = Callable[[Tensor, float, bool, Any], tuple[Tensor, Tensor | None]]
"""(x (b, c, ...), the solver's time t, whether the unconditional half is computed, levels) -> outputs of both halves, float32."""


class PlanError(ValueError):
    """A plan that cannot be read or run: the message says why."""


@dataclass(frozen=True, kw_only=True)
class PlanCall:
    """One model call, and the update after it."""

    t: float
    """The solver's time: a DDPM's timestep, any fraction; a flow's 0 (noise) to 1 (data)."""
    signal: float
    noise: float
    """Factors of data and noise in the state at `t`."""
    uncond: bool = False
    """Whether the unconditional half is computed."""
    levels: tuple[int | str, ...] | None = None
    """One level per layer; None is softmax everywhere."""
    features: tuple[tuple[str, int], ...] = ()
    """(stream, call) of every output in the update: stream `c` (or the guided output) or `d` (conditional minus unconditional)."""
    weights: tuple[tuple[tuple[float, ...], ...], ...] = ()
    """By channel group and band: of the state, then of every feature."""

    @property
    def u(self) -> float:
        """How far the state is: 0 is noise, 1 is data."""
        return self.signal / (self.signal + self.noise)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A sampler of a few model calls. `errors` and `made_for` say what it was measured on and made for."""

    process: str
    """`ddpm` or `flow`."""
    calls: tuple[PlanCall, ...]
    feature: Feature = "velocity"
    streams: Streams = "guided"
    cfg_scale: float = 1.0
    cfg_channels: int | str = 3
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    groups: tuple[tuple[int, ...], ...]
    """Channels that share weights; every channel is in one group."""
    edges: tuple[float, ...] = (0.25, 0.5)
    """Where bands of spatial frequency end, as shares of the highest; none: one band, and any shape of states."""
    errors: Mapping[str, Any] = field(default_factory=dict)
    made_for: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.calls) < 1:
            raise PlanError("A plan needs at least one call.")
        bands = len(self.edges) + 1
        for index, call in enumerate(self.calls):
            shape = {(len(group), *map(len, group)) for group in call.weights}
            if len(call.weights) != len(self.groups) or shape != {(bands, *[1 + len(call.features)] * bands)}:
                raise PlanError(f"Call {index} does not have weights for {len(self.groups)} groups and {bands} bands.")
            if not all(math.isfinite(w) for group in call.weights for band in group for w in band):
                raise PlanError(f"Call {index} has weights that are not finite.")
            if any(not 0 <= j <= index or stream not in ("c", "d") for stream, j in call.features):
                raise PlanError(f"Call {index} needs outputs that are not there yet.")
            if not (call.signal > 0 or index == 0) or call.signal < 0 or call.noise < 0 or not call.signal + call.noise > 0:
                raise PlanError(f"Call {index} is at no noise level.")

    def inside(self, call: PlanCall) -> bool:
        """Whether guidance holds at a call's noise level (1 - u for a flow, t / 999 for a DDPM)."""
        low, high = self.cfg_interval
        level = call.t / 999 if self.process == "ddpm" else 1 - call.t
        return self.cfg_scale != 1 and low - 1e-6 <= level <= high + 1e-6

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of the model that every call takes for one sample."""
        return tuple(2 if call.uncond else 1 for call in self.calls)

    def to_json(self) -> dict[str, Any]:
        head = {name: getattr(self, name) for name in ("process", "feature", "streams", "cfg_scale", "cfg_channels")}
        head |= {name: list(map(_listed, getattr(self, name))) for name in ("cfg_interval", "groups", "edges")}
        calls = [{name: _listed(value) for name, value in vars(call).items()} for call in self.calls]
        return head | {"calls": calls, "errors": dict(self.errors), "made_for": dict(self.made_for)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Plan:
        try:
            calls = tuple(
                PlanCall(
                    t=float(call["t"]),
                    signal=float(call["signal"]),
                    noise=float(call["noise"]),
                    uncond=bool(call["uncond"]),
                    levels=None if call["levels"] is None else tuple(call["levels"]),
                    features=tuple((str(stream), int(index)) for stream, index in call["features"]),
                    weights=tuple(tuple(tuple(map(float, band)) for band in group) for group in call["weights"]),
                )
                for call in content["calls"]
            )
            if content["feature"] not in get_args(Feature) or content["streams"] not in get_args(Streams):
                raise PlanError(f"Features {content['feature']!r}, {content['streams']!r} are not known.")
            low, high = map(float, content["cfg_interval"])
            return cls(
                process=str(content["process"]),
                calls=calls,
                feature=content["feature"],
                streams=content["streams"],
                cfg_scale=float(content["cfg_scale"]),
                cfg_channels=content["cfg_channels"],
                cfg_interval=(low, high),
                groups=tuple(tuple(map(int, group)) for group in content["groups"]),
                edges=tuple(map(float, content["edges"])),
                errors=dict(content["errors"]),
                made_for=dict(content["made_for"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"Not a whole plan ({type(error).__name__}: {error}).") from error


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple) else value


def plans_to_text(plans: Mapping[int, Plan]) -> str:
    """Plans by their number of calls, as a file keeps them."""
    content = {"format": PLAN_FORMAT, "version": PLAN_VERSION, "plans": [plan.to_json() for _, plan in sorted(plans.items())]}
    return json.dumps(content, indent=1) + "\n"


def plans_from_text(text: str) -> dict[int, Plan]:
    """The plans in a file, by their number of calls.

    Raises:
        PlanError: the text is no plan file, is cut short, or is of a newer version.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise PlanError(f"Not JSON, or cut short ({error}).") from error
    if not isinstance(content, dict) or content.get("format") != PLAN_FORMAT:
        raise PlanError("Not a plan file.")
    if content.get("version") != PLAN_VERSION:
        raise PlanError(f"Plan files of version {content.get('version')} are not known here, only {PLAN_VERSION}: update mediatorize.")
    plans = [Plan.from_json(plan) for plan in content.get("plans") or ()]
    if not plans:
        raise PlanError("There is no plan in it.")
    return {len(plan.calls): plan for plan in plans}


def cosine_transform(size: int) -> Tensor:
    """The orthonormal DCT-II (size, size), float64: row k has frequency k."""
    places = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    matrix = (math.pi * torch.arange(size, dtype=torch.float64).unsqueeze(1) * places).cos() * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


class Bands:
    """Splits states (b, c, ..., h, w) of one shape into bands of spatial frequency, for any h and w.

    A band holds the coefficients of an orthonormal cosine transform whose larger frequency, as a share of the highest, lies between two
    edges. So bands add up to the state, and least squares in one band knows nothing of another.
    """

    def __init__(self, edges: Sequence[float], shape: Sequence[int], device: torch.device | str = "cpu") -> None:
        """
        Args:
            shape: of one state (c, ..., h, w); only the last two axes matter. Without edges there is one band and no transform.
        """
        self.count = len(edges) + 1
        self.transforms: tuple[Tensor, Tensor] | None = None
        """Cosine transforms of the rows and of the columns."""
        if not edges:
            self.index = torch.zeros((1,) * (len(shape) - 1), dtype=torch.long, device=device)
            return
        height, width = shape[-2:]
        share = torch.maximum(torch.arange(height).unsqueeze(1) / height, torch.arange(width).unsqueeze(0) / width)
        index = torch.bucketize(share, torch.tensor(edges), right=True)
        self.index = index.view((1,) * (len(shape) - 3) + tuple(index.shape)).to(device)
        """The band of every coefficient (..., h, w)."""
        self.transforms = cosine_transform(height).float().to(device), cosine_transform(width).float().to(device)

    def to(self, x: Tensor) -> Tensor:
        """(b, c, ..., h, w) -> its coefficients, of the same shape."""
        return x if self.transforms is None else self.transforms[0] @ x @ self.transforms[1].mT

    def back(self, z: Tensor) -> Tensor:
        """The inverse of `to`."""
        return z if self.transforms is None else self.transforms[0].mT @ z @ self.transforms[1]


def factors(feature: Feature, prediction: Feature, signal: float, noise: float) -> tuple[float, float]:
    """(p, q) so that the feature is p x + q output, for a model that predicts the noise, the velocity data - noise, or the data."""
    if prediction == feature:
        return 0.0, 1.0
    # data and noise as combinations of x and the output; x = signal data + noise_factor noise
    of_data, of_noise = {
        "noise": lambda: ((1 / signal, -noise / signal), (0.0, 1.0)),
        "data": lambda: ((0.0, 1.0), (1 / noise, -signal / noise)),
        "velocity": lambda: (
            (1 / (signal + noise), noise / (signal + noise)),
            (1 / (signal + noise), -signal / (signal + noise)),
        ),
    }[prediction]()
    if feature == "velocity":
        return of_data[0] - of_noise[0], of_data[1] - of_noise[1]
    return of_data if feature == "data" else of_noise


PREDICTIONS: dict[str, Feature] = {"ddpm": "noise", "flow": "velocity"}
"""What models of a process predict, as solvers are told it."""


@dataclass(frozen=True)
class Setting:
    """What the steps of a plan share: how outputs become features, and which weights belong together."""

    prediction: Feature
    feature: Feature
    streams: Streams
    cfg_scale: float
    guided: Tensor
    """(c,) whether guidance changes a channel."""
    group: Tensor
    """(c,) the group of every channel."""
    bands: Bands

    @classmethod
    def of(cls, plan: Plan, shape: Sequence[int], device: torch.device | str = "cpu") -> Setting:
        """For states of a shape (c, ...)."""
        channels = shape[0]
        group = torch.full((channels,), -1)
        for index, members in enumerate(plan.groups):
            group[list(members)] = index
        if (group < 0).any() or max(max(members) for members in plan.groups) >= channels:
            raise PlanError(f"The plan is for {sum(map(len, plan.groups))} channels, the states have {channels}.")
        count = channels if plan.cfg_channels == "all" else min(int(plan.cfg_channels), channels)
        return cls(
            PREDICTIONS[plan.process],
            plan.feature,
            plan.streams,
            plan.cfg_scale,
            (torch.arange(channels) < count).to(device),
            group.to(device),
            Bands(plan.edges, shape, device),
        )

    def features(self, z: Tensor, cond: Tensor, uncond: Tensor | None, signal: float, noise: float) -> dict[str, Tensor]:
        """Features of a call by stream, as coefficients, from the state's coefficients and the outputs (b, c, ...)."""
        p, q = factors(self.feature, self.prediction, signal, noise)
        difference = None if uncond is None else self.bands.to(cond - uncond)
        own = (p * (signal + noise)) * z + q * self.bands.to(cond)
        if difference is None:
            return {"c": own}
        if self.streams == "halves":
            return {"c": own, "d": q * difference}
        guided = self.guided.view(-1, *(1,) * (cond.ndim - 2))
        return {"c": own + (q * (self.cfg_scale - 1)) * difference * guided}

    def mask(self, group: int, band: int) -> Tensor:
        """(c, ..., h, w) booleans, with axes of 1 where it does not matter: the coefficients of a channel group and a band."""
        index = self.bands.index
        return (self.group == group).view(-1, *(1,) * index.ndim) & (index == band)

    def spread(self, weights: Tensor) -> Tensor:
        """Weights (groups, bands) -> one for every coefficient of a state (c, ..., h, w)."""
        index = self.bands.index
        return weights.to(index.device)[self.group.view(-1, *(1,) * index.ndim), index]

    def update(self, weights: Tensor, terms: Sequence[Tensor]) -> Tensor:
        """The next state: weights (groups, bands, terms) of the state and of features (b, c, ...)."""
        total = self.spread(weights[..., 0]) * terms[0]
        for k, term in enumerate(terms[1:], 1):
            total += self.spread(weights[..., k]) * term
        return total


def run_plan(plan: Plan, evaluate: Evaluate, x: Tensor) -> Tensor:
    """Samples a batch by a plan: from noise x (b, c, ...) to data, in float32."""
    setting = Setting.of(plan, x.shape[1:], x.device)
    first = plan.calls[0]
    z = setting.bands.to(x.float() / (first.signal + first.noise))
    history: dict[tuple[str, int], Tensor] = {}
    for index, call in enumerate(plan.calls):
        x = setting.bands.back(z) * (call.signal + call.noise)
        cond, uncond = evaluate(x, call.t, call.uncond, call.levels)
        found = setting.features(z, cond, uncond, call.signal, call.noise)
        history |= {(stream, index): value for stream, value in found.items()}
        z = setting.update(torch.tensor(call.weights, dtype=torch.float32), [z, *(history[key] for key in call.features)])
        needed = {key for later in plan.calls[index + 1 :] for key in later.features}
        history = {key: value for key, value in history.items() if key in needed}
    return setting.bands.back(z)
