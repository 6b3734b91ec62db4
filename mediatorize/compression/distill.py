"""One training step: the model at mediator levels learns from itself at level softmax (design 2.4), or at any level from data alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from timm.optim import NAdamW
from timm.scheduler import CosineLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mediatorize.compression.muon import StackedMuon
from mediatorize.compression.records import DistillSettings, Optimizer, Rate
from mediatorize.compression.sensitivity import bytes_for_backward
from mediatorize.compression.trajectories import Targets
from mediatorize.diffusion.process import process_of
from mediatorize.model.architecture import Architecture
from mediatorize.model.block import Block, call
from mediatorize.model.levels import SOFTMAX, Level, MediatorSettings, Parts, in_order, is_pretrained, levels_per_layer
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.randomness import generator


def levels_of_step(settings: MediatorSettings, depth: int, seed: int, step: int) -> list[Level]:
    """The level of every layer in one step: all at the smallest, all at the largest, all at a drawn one, each at a drawn one, in turn.

    ("Sandwich", arXiv 1903.05134: the ends are always among the steps.) A mixture has softmax among its levels, as schedules do; one layer
    at least is at a mediator level. Where there are narrow MLPs, about half of a mixture's layers run at one. Layers that are not converted
    are at softmax.
    """
    layers = settings.converted(depth)
    per_layer: list[Level] = [SOFTMAX] * depth
    for layer, level in zip(layers, _drawn_levels(settings, len(layers), seed, step), strict=True):
        per_layer[layer] = level
    return per_layer


def _drawn_levels(settings: MediatorSettings, depth: int, seed: int, step: int) -> list[Level]:
    """The same for `depth` layers, all of which are converted."""
    levels, mlps, turn = settings.levels, settings.mlp_levels, step % 4
    if turn < 2:
        return [levels[-turn]] * depth
    random = generator(seed, "levels", step)
    if turn == 2:
        return [levels[int(torch.randint(0, len(levels), (1,), generator=random))]] * depth
    options = [*levels, SOFTMAX]
    drawn = [options[int(index)] for index in torch.randint(0, len(options), (depth,), generator=random)]
    if all(is_pretrained(level) for level in drawn):
        drawn[int(torch.randint(0, depth, (1,), generator=random))] = levels[0]
    if not mlps:
        return drawn
    widths = [mlps[int(index)] if index < len(mlps) else None for index in torch.randint(0, 2 * len(mlps), (depth,), generator=random)]
    return [level if mlp is None else Parts(level, mlp).level for level, mlp in zip(drawn, widths, strict=True)]


def forward_with_features(
    model: DiffusionTransformer, x: Tensor, t: Tensor, y: Tensor, levels: Sequence[Level], checkpointing: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """The model's output, and every block's (b, n, c)."""
    conditioning = model.condition(t, y)
    _, *features = model.walk(model.embed(x), conditioning, levels, run=recomputed if checkpointing else call)
    return model.finish(features[-1], conditioning), features


def recomputed(block: Block, tokens: Tensor, conditioning: Tensor, level: Level) -> Tensor:
    """Runs a block so that its activations are computed again in the backward pass."""
    return checkpoint(block, tokens, conditioning, level, use_reentrant=False)


def output_loss(output: Tensor, target: Tensor, channels: int, size: Tensor, weight: Tensor | None = None) -> Tensor:
    """Squared error of the prediction over its mean square `size[0]`, and of a DiT's variance rows over theirs, `size[1]`.

    Args:
        weight: of every state (b,).
    """
    parts = [(a - b).square().flatten(1).mean(1) for a, b in zip(output.split(channels, 1), target.split(channels, 1), strict=True)]
    errors = torch.stack([part / whole for part, whole in zip(parts, size, strict=False)]).sum(0)  # (b,)
    return (errors if weight is None else errors * weight).mean()


def mean_squares(target: Tensor, channels: int) -> Tensor:
    """The mean square of the prediction and, for a DiT, of the variance rows."""
    return torch.stack([part.square().mean() for part in target.split(channels, 1)]).clamp(min=1e-12)


def distillation_loss(
    model: DiffusionTransformer,
    teacher: DiffusionTransformer,
    states: Targets,
    sizes: Tensor,
    levels: Sequence[Level],
    settings: DistillSettings,
) -> Tensor:
    """How far the model at `levels` is from the teacher on a batch of states."""
    features = settings.feature_weight > 0
    output, own = forward_with_features(model, states.x, states.t, states.y, levels, settings.checkpointing)
    loss = output_loss(output.float(), states.output, model.arch.channels, sizes, states.weight)
    if settings.data_weight and states.truth is not None:
        loss = loss + settings.data_weight * output_loss(
            output.float()[:, : model.arch.channels], states.truth, model.arch.channels, sizes, states.weight
        )
    if features:
        with torch.no_grad():
            _, theirs = forward_with_features(teacher, states.x, states.t, states.y, [SOFTMAX] * model.arch.depth)
        gaps = [(a - b).square().mean() / b.square().mean() for a, b in zip(own, theirs, strict=True)]
        loss = loss + settings.feature_weight * torch.stack(gaps).mean()
    return loss


def training_loss(model: DiffusionTransformer, states: Targets, levels: Sequence[Level], settings: DistillSettings) -> Tensor:
    """What the originals train a model by (`Process.training_loss`), times `data_weight`: its error against the data's own targets."""
    assert states.truth is not None, "states without a teacher are of data"
    output, _ = forward_with_features(model, states.x, states.t, states.y, levels, settings.checkpointing)
    return settings.data_weight * process_of(model.arch).training_loss(output.float(), states.truth, states.t)


@torch.no_grad()
def output_errors(model: DiffusionTransformer, states: Targets, batch: int) -> dict[Level, float]:
    """|student - teacher| / |teacher| of the prediction over all `states`, the whole model at one level, by level."""
    channels = model.arch.channels
    device = next(model.parameters()).device
    errors: dict[Level, float] = {}
    for level in model.added().levels:
        gap, size = torch.zeros((), device=device), torch.zeros((), device=device)
        for rows in torch.arange(len(states)).split(batch):
            part = states.at(rows).to(device)
            output = model(part.x, part.t, part.y, levels=level)
            gap += (output - part.output)[:, :channels].square().sum()
            size += part.output[:, :channels].square().sum()
        errors[level] = float((gap / size).sqrt())
    return errors


def parameters_to_train(model: DiffusionTransformer, settings: DistillSettings) -> dict[str, nn.Parameter]:
    """What training changes, by name."""
    trained = model.mediator_parameters() if settings.train == "mediators" else dict(model.named_parameters())
    trained.pop("pos_embed", None)  # fixed in the originals
    return trained


def optimizer_bytes(arch: Architecture, settings: MediatorSettings, distill: DistillSettings) -> int:
    """Bytes of gradients, averages and moments in float32; under Muon a matrix has one moment, all else has two."""
    with torch.device("meta"):
        model = DiffusionTransformer(arch, settings)
    trained, averages = parameters_to_train(model, distill).values(), 1 if distill.ema else 0
    moments = [1 if distill.optimizer == "muon" and parameter.ndim == 2 else 2 for parameter in trained]
    return 4 * sum(parameter.numel() * (1 + count + averages) for parameter, count in zip(trained, moments, strict=True))


def saved_bytes(arch: Architecture, settings: MediatorSettings, distill: DistillSettings, batch: int) -> int:
    """Bytes that a step on `batch` states at the largest level keeps for its backward pass, by running it on the meta device."""
    with torch.device("meta"):
        model = DiffusionTransformer(arch, settings)
        states = Targets(
            torch.empty(batch, arch.channels, *arch.input_size),
            torch.empty(batch),
            torch.empty(batch, dtype=torch.long),
            torch.empty(batch, arch.output_channels, *arch.input_size),
        )
        sizes = torch.empty(arch.output_channels // arch.channels)
    model.requires_grad_(distill.train == "all")
    for parameter in model.mediator_parameters().values():
        parameter.requires_grad_(True)
    largest = levels_per_layer(in_order(distill.levels or settings.levels)[-1], arch.depth, settings)
    if distill.teacher == "none":
        return bytes_for_backward(model, lambda: training_loss(model, replace(states, truth=states.x), largest, distill))
    return bytes_for_backward(model, lambda: distillation_loss(model, model, states, sizes, largest, distill))


def _muon(parameters: list[nn.Parameter], rate: float, width: int) -> list[torch.optim.Optimizer]:
    matrices = [p for p in parameters if p.ndim == 2]
    others = [p for p in parameters if p.ndim != 2]
    return [
        StackedMuon(matrices, rate * min(1.0, 128 / width)),
        NAdamW(others, rate, betas=(0.9, 0.95), eps=1e-7, weight_decay=0, foreach=True),
    ]


OPTIMIZERS: dict[Optimizer, Callable[[list[nn.Parameter], float, int], list[torch.optim.Optimizer]]] = {
    "muon": _muon,
    "adamw": lambda parameters, rate, width: [torch.optim.AdamW(parameters, rate, weight_decay=0, foreach=True)],
}
"""(what is trained, peak rate, the model's width) -> the optimisers that share it."""

RATES: dict[Rate, Callable[[torch.optim.Optimizer, int, int], Scheduler]] = {
    "cosine": lambda optimizer, steps, warmup: CosineLRScheduler(optimizer, t_initial=steps, warmup_t=warmup, t_in_epochs=False),
    "constant": lambda optimizer, steps, warmup: StepLRScheduler(
        optimizer, decay_t=steps + 1, decay_rate=1.0, warmup_t=warmup, t_in_epochs=False
    ),
}
"""(optimiser, steps, warm-up steps) -> its rate at every step."""


class Distiller:
    """A model in training: its weights, optimiser and averaged weights. Training resumes from these, bit for bit.

    Muon (orthogonalised momentum, arXiv 2502.16982) trains matrices, and timm's NAdamW everything else; or AdamW trains all. The learning
    rate warms up, then falls to zero along a cosine or stays. A step depends only on this state, the batch and (seed, step).
    """

    def __init__(self, model: DiffusionTransformer, teacher: DiffusionTransformer | None, settings: DistillSettings) -> None:
        """
        Args:
            teacher: None: the states' own truth is what is learned.
        """
        self.model, self.teacher, self.settings = model, teacher, settings
        self.levels = tuple(in_order(settings.levels)) or model.added().levels
        self.parameters = trained = parameters_to_train(model, settings)
        for parameter in trained.values():
            parameter.requires_grad_(True)
        self.optimizers = OPTIMIZERS[settings.optimizer](list(trained.values()), settings.learning_rate, model.arch.width)
        warmup = min(settings.warmup, settings.steps // 10)
        self.schedules = [RATES[settings.rate](optimizer, settings.steps, warmup) for optimizer in self.optimizers]
        self.average: Any = None
        if settings.ema:
            from diffusers.training_utils import EMAModel

            self.average = EMAModel(list(trained.values()), decay=settings.ema)
        self.step_count = 0

    def loss(self, states: Targets, sizes: Tensor) -> Tensor:
        """The loss of the step at hand on some of its states.

        Without a teacher every layer is at one of the trained levels, which take turns from step to step.
        """
        depth, step, added = self.model.arch.depth, self.step_count, self.model.added()
        if self.teacher is None:
            levels = levels_per_layer(self.levels[step % len(self.levels)], depth, added)
            return training_loss(self.model, states, levels, self.settings)
        levels = levels_of_step(replace(added, levels=self.levels), depth, self.settings.seed, step)
        return distillation_loss(self.model, self.teacher, states, sizes, levels, self.settings)

    def step(self, states: Targets, sizes: Tensor, share: float = 1.0, reduce: Callable[[list[Tensor]], None] | None = None) -> Tensor:
        """One step on this process's part of a batch, which is `share` of the whole; the part's loss, not yet waited for.

        Args:
            sizes: `mean_squares` of the targets that the states were drawn from, on the model's device; without a teacher of no account.
            reduce: adds up gradients over processes, in place.
        """
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        total = torch.zeros((), device=sizes.device)
        for part in torch.arange(len(states)).tensor_split(self.settings.accumulate):
            if len(part):
                loss = self.loss(states.at(part).to(sizes.device), sizes) * (len(part) / len(states))
                (loss * share).backward()
                total += loss.detach()
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        if reduce is not None:
            reduce(gradients)
        nn.utils.clip_grad_norm_(list(self.parameters.values()), self.settings.clip or math.inf)
        self.step_count += 1
        for schedule, optimizer in zip(self.schedules, self.optimizers, strict=True):
            schedule.step_update(self.step_count)
            optimizer.step()
        if self.average is not None:
            self.average.step(list(self.parameters.values()))
        return total

    @property
    def rate(self) -> float:
        """The rate of the last step."""
        return self.optimizers[-1].param_groups[0]["lr"]

    def finish(self) -> None:
        """Ends training; the averaged weights, where there are any, take the place of the last ones."""
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
        if self.average is not None:
            self.average.copy_to(list(self.parameters.values()))

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step_count,
            "weights": {name: parameter.data for name, parameter in self.parameters.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "average": None if self.average is None else self.average.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step_count = state["step"]
        for name, parameter in self.parameters.items():
            parameter.data.copy_(state["weights"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if self.average is not None:
            self.average.load_state_dict(state["average"])
