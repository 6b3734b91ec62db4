"""`mediatorize inspect` shows the model in a checkpoint, where its FLOPs go, and what each level would cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mediatorize.errors import UserError, refuse_below
from mediatorize.model import cost
from mediatorize.model.architecture import Architecture, default_local_rank, default_modulation_rank, default_projection_rank, preset
from mediatorize.model.levels import SOFTMAX, Level, MediatorSettings, kind_of, title
from mediatorize.planning.results import InspectedPlans
from mediatorize.report.tables import layers_in_words, left_out
from mediatorize.stages import options
from mediatorize.stages.options import RESOURCES, WHAT, option
from mediatorize.stages.running import hardware, progress_bar

if TYPE_CHECKING:
    from mediatorize.compression.redundancy import Redundancy
    from mediatorize.evaluation.timing import PairedTime

SHOWN_LEVELS = (1, 4, 16, 64)
"""Levels shown for a model that is not converted yet."""

REDUNDANCY_CALLS = 10
"""Model calls per trajectory when redundancy is measured."""

PAIRS = 5
"""Of calls, one at softmax in each, that a time is the median of."""


@dataclass(frozen=True, kw_only=True)
class CallTimes:
    """Time of whole model calls on this device, each beside one at softmax."""

    hardware: dict[str, object]
    dtype: str
    batch: int
    """Rows of a call."""
    calls: dict[Level, tuple[float, PairedTime]]
    """By level: FLOPs as a share of softmax's, and the time."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `inspect` found."""

    source: str
    format: str
    weights: str = ""
    arch: Architecture
    parameters: int
    settings: MediatorSettings
    """The mediators that were added, or could be added."""
    reachable: tuple[cost.Reachable, ...]
    """At half the resolution, at this one, and at twice it."""
    notes: tuple[str, ...] = ()
    redundancy: Redundancy | None = None
    redundancy_picture: Path | None = None
    times: CallTimes | None = None


def inspect(
    checkpoint: Annotated[str, typer.Argument(help="a checkpoint or bundle; or a published size, such as DiT-XL/2@512")],
    *,
    family: options.Family = None,
    num_heads: options.Heads = None,
    num_classes: options.Classes = None,
    weights: options.Weights = None,
    redundancy: Annotated[
        Path | None, option("a .png to write: how redundant attention is, per layer and noise level; draws a few samples", WHAT)
    ] = None,
    measure: Annotated[bool, option("time a model call at each level on this device, beside softmax", WHAT)] = False,
    batch: Annotated[int, option("rows of a timed call; a guided sample takes two", RESOURCES, min=1)] = 2,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
) -> Inspection | InspectedPlans:
    """Shows the model in a checkpoint, where its FLOPs go, and what each level would cost. Checks that all weights are finite. Or shows the
    plans in a file.

    Example: mediatorize inspect DiT-XL/2@512
    """
    refuse_below({"batch": batch}, 1)
    if checkpoint.endswith(".json"):
        from mediatorize.formats.plans import read_plans

        return InspectedPlans(Path(checkpoint), read_plans(Path(checkpoint)))
    found = _found(checkpoint, family, num_heads, num_classes, weights, redundancy, device)
    return replace(found, times=call_times(found.arch, found.settings, batch, device, dtype)) if measure else found


def _found(
    checkpoint: str,
    family: options.Family,
    num_heads: options.Heads,
    num_classes: options.Classes,
    weights: options.Weights,
    redundancy: Path | None,
    device: str,
) -> Inspection:
    """All but times."""
    path = Path(checkpoint)
    if redundancy is not None and (redundancy.suffix != ".png" or not redundancy.absolute().parent.is_dir()):
        raise UserError(f"{redundancy}: not a .png in a folder that is there.", hint="Pass --redundancy OUT.png.")
    if "@" in checkpoint and not path.exists():
        if redundancy is not None:
            raise UserError(f"{checkpoint}: a published size has no weights.", hint="Pass a checkpoint to --redundancy.")
        return _published(checkpoint)

    from mediatorize.devices import pick_device
    from mediatorize.formats.bundle import is_bundle, open_bundle, refuse_pruned
    from mediatorize.formats.checkpoint import Hints, open_checkpoint
    from mediatorize.formats.loading import load_model, refuse_checkpoint_options
    from mediatorize.model.transformer import is_mediator

    if is_bundle(path):
        refuse_checkpoint_options(path, family, num_heads, num_classes, weights)
        config, _, tensors = open_bundle(path)
        if redundancy is not None:
            refuse_pruned(path, config)
        sizes = {name: math.prod(weight.shape) for name, weight in tensors.items()}
        added = sum(size for name, size in sizes.items() if is_mediator(name))
        found = Inspection(
            source=checkpoint,
            format="bundle",
            arch=config.arch,
            parameters=sum(sizes.values()),
            settings=config.settings.whole,
            reachable=cost.reachable(config.arch, config.settings.whole),
            notes=(
                f"levels {', '.join(map(title, config.settings.all_levels))} in {layers_in_words(config.settings, config.arch.depth)}; "
                f"mediators add {added / 1e6:.1f}M parameters",
                *(() if config.settings.kept is None else (f"pruned to its schedule, without {left_out(config.settings)}",)),
            ),
        )
    else:
        opened = open_checkpoint(path, Hints(family, num_heads, num_classes), weights)
        opened.verify()
        settings = shown_settings(opened.arch)
        found = Inspection(
            source=checkpoint,
            format=opened.format,
            weights=opened.part,
            arch=opened.arch,
            parameters=sum(math.prod(weight.shape) for weight in opened.weights.values()),
            settings=settings,
            reachable=cost.reachable(opened.arch, settings),
            notes=opened.notes,
        )
    if redundancy is None:
        return found
    if found.arch.mediators:
        raise UserError(f"{checkpoint}: has no softmax attention, whose redundancy is measured.", hint="Leave --redundancy out.")

    from mediatorize.compression.redundancy import attention_redundancy
    from mediatorize.report.pictures import write_redundancy

    model = load_model(path, family=family, num_heads=num_heads, num_classes=num_classes, weights=weights).to(pick_device(device))
    ranks = [count for level in found.settings.levels if (count := kind_of(level).mediators(level))]
    with progress_bar(REDUNDANCY_CALLS + model.arch.depth, "attention", "call") as bar:
        measured = attention_redundancy(model, ranks, calls=REDUNDANCY_CALLS, on_step=bar.update)
    write_redundancy(redundancy, measured.effective_rank_of_heads, measured.errors, measured.noise_levels)
    return replace(found, redundancy=measured, redundancy_picture=redundancy)


def call_times(arch: Architecture, settings: MediatorSettings, batch: int, device: str, dtype: str) -> CallTimes:
    """Times a call at every level. The weights are random: time does not depend on them."""
    import torch

    from mediatorize.devices import DTYPES, pick_device
    from mediatorize.evaluation.timing import model_call, paired_time
    from mediatorize.model.transformer import from_scratch

    where = pick_device(device)
    model = from_scratch(arch, settings).to(where, DTYPES[dtype])
    softmax, calls = cost.forward_flops(arch), {}
    with torch.inference_mode(), progress_bar(len(settings.levels), "timing", "level") as bar:
        reference = model_call(model, batch, SOFTMAX)
        for level in settings.levels:
            share = cost.forward_flops(arch, level, settings) / softmax
            calls[level] = share, paired_time(model_call(model, batch, level), reference, PAIRS, where)
            bar.update()
    return CallTimes(hardware=hardware(where), dtype=dtype, batch=batch, calls=calls)


def _published(name: str) -> Inspection:
    arch = preset(name)
    settings = shown_settings(arch)
    return Inspection(
        source=name,
        format="published size, no file",
        arch=arch,
        parameters=cost.count_parameters(arch),
        settings=settings,
        reachable=cost.reachable(arch, settings),
    )


def shown_settings(arch: Architecture) -> MediatorSettings:
    """What `convert` adds by default, at more levels."""
    return MediatorSettings(
        SHOWN_LEVELS,
        local_rank=default_local_rank(arch.width),
        modulation_rank=default_modulation_rank(arch.width),
        projection_rank=default_projection_rank(arch.width),
    )
