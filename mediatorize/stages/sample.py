"""`mediatorize sample`: pictures from a bundle or a checkpoint."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mediatorize.errors import UserError, about, refuse_below
from mediatorize.model.levels import SOFTMAX, Level, read_level, title
from mediatorize.model.schedule import Measure, RuleSchedule, SwitchPer, SwitchRule
from mediatorize.signatures import listed, whole_number
from mediatorize.stages import options
from mediatorize.stages.options import OUTPUT, SAMPLING, SWITCHING, WHAT, option
from mediatorize.stages.plans import REFERENCE_STEPS, added_hash, plan_warnings
from mediatorize.stages.running import progress_bar

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What `sample` made."""

    out: Path
    count: int
    name: str
    """The model's name."""
    level: Level | None
    """None means the levels of the bundle's schedule."""
    plan: str | None = None
    """Where the plan is from and how many calls it has; None: a solver sampled."""
    warnings: tuple[str, ...] = ()
    seconds: float
    flops: float | None
    """FLOPs of all samples, guidance included; None for an adaptive solver."""
    softmax_flops: float | None
    """FLOPs of as many samples at level softmax (beside a plan, in 50 steps); of the last one of several checkpoints."""
    switches: tuple[tuple[int, ...], ...] = ()
    """By sample: the step, from 0, that each stage of the step-wise rule but the first began with; -1: it never did."""
    stages: tuple[str, ...] = ()
    """What each of these stages runs."""


def sample(
    model: Annotated[str, typer.Argument(help="a bundle or a pretrained checkpoint")],
    *,
    out: Annotated[Path, option("a .png (grid of pictures) or .npz (arr_0, uint8, for the ADM evaluator; without --vae, latents)", OUTPUT)],
    classes: Annotated[
        tuple[int, ...] | None,
        option("class numbers, such as 207,360; default: the first ten classes", WHAT, parser=listed(whole_number), metavar="N,N,..."),
    ] = None,
    per_class: Annotated[int, option("samples of each class", WHAT, min=1)] = 1,
    captions: Annotated[
        Literal["classes", "none"],
        option("under the pictures of a .png: their classes (of a model of 1,000 classes with ImageNet's names), or none", OUTPUT),
    ] = "classes",
    level: options.Level = None,
    schedule: Annotated[Path | None, option("a schedule file (JSON), in place of the bundle's own", WHAT)] = None,
    plan: Annotated[
        Path | None,
        option("a plan file; default: the bundle's own, unless a level, a schedule or a solver is named", WHAT),
    ] = None,
    calls: Annotated[int | None, option("which of the plans: its number of model calls; default: the most", WHAT, min=1)] = None,
    switch: Annotated[
        Measure | None,
        option("begin with few mediators, and switch to more when the latents change less; how the change is measured", SWITCHING),
    ] = None,
    switch_levels: Annotated[
        tuple[Level, ...],
        option("levels of the stages; default: all, softmax too", SWITCHING, parser=listed(read_level), metavar="LEVEL,..."),
    ] = (),
    checkpoints: Annotated[
        tuple[str, ...],
        option("checkpoints of the stages, in place of levels; MODEL is the first", SWITCHING, parser=listed(str), metavar="FILE,FILE,..."),
    ] = (),
    ratios: options.Ratios = (0.6, 0.3),
    first: options.First = 3,
    switch_per: Annotated[
        SwitchPer,
        option("batch: samples of a batch switch together, as in the paper; sample: each alone", SWITCHING),
    ] = "batch",
    solver: options.Solver = None,
    steps: options.Steps = None,
    cfg_scale: Annotated[
        float | None, option("classifier-free guidance scale; 1 is no guidance, at half the cost; default: the plan's, else 1", SAMPLING)
    ] = None,
    cfg_channels: options.Channels = 3,
    cfg_interval: options.Interval = (0.0, 1.0),
    timestep_shift: options.Shift = 1.0,
    seed: options.Seed = 0,
    batch: options.Batch = 64,
    vae: options.Vae = None,
    family: options.Family = None,
    num_heads: options.Heads = None,
    num_classes: options.Classes = None,
    weights: options.Weights = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    compile: options.Compile = False,
    force: options.Force = False,
) -> Sampled:
    """Samples pictures. The same seed gives the same pictures at any batch size (except with dopri5, whose steps depend on the batch).

    Example: mediatorize sample out --classes 207,360 --out grid.png --vae sd-vae-ft-ema
    """
    import numpy as np
    import torch

    from mediatorize.devices import DTYPES, pick_device, refuse_uncompilable
    from mediatorize.diffusion.planned import choose_plan, plan_flops, refuse_other_guidance, refuse_other_plan
    from mediatorize.diffusion.sampling import (
        Sampler,
        flops_by_rule,
        own_level,
        refuse_unknown_classes,
        refuse_unknown_level,
        sample_many,
        sample_many_by_plan,
        switcher_of,
    )
    from mediatorize.diffusion.switching import Switcher
    from mediatorize.formats.bundle import hash_of_weights, read_schedules
    from mediatorize.formats.images import class_names, load_vae, to_pixels, write_arrays, write_grid
    from mediatorize.formats.loading import load_model
    from mediatorize.formats.plans import PLAN_NAME, read_plans, refuse_other_weights
    from mediatorize.formats.samples import DECODED_AT_A_TIME, decoder_of

    refuse_bad_output(out, force)
    others = checkpoints[1:] if checkpoints[:1] == (model,) else checkpoints
    if checkpoints and not others:
        raise UserError(f"{model} is the only one of --checkpoints.", hint="Name the next ones too.")
    refuse_idle_options(switch, level, schedule, switch_levels, others)
    told = {"level": level, "schedule": schedule, "switch": switch, "solver": solver, "steps": steps}
    if (plan is not None or calls is not None) and (doubled := [name for name, value in told.items() if value is not None]):
        raise UserError(f"A plan says which calls are made, and so does --{doubled[0]}.", hint="Pass one of them.")
    refuse_below({"per-class": per_class, "batch": batch}, 1)
    loaded = load_model(model, family=family, num_heads=num_heads, num_classes=num_classes, weights=weights)
    arch = loaded.arch
    for named in (level, *switch_levels):
        refuse_unknown_level(loaded, named)
    if schedule is not None:
        (loaded.schedule,) = read_schedules((schedule,), loaded).values()
    own_plan = Path(model) / PLAN_NAME
    file = plan if plan is not None else own_plan if not any(told.values()) and own_plan.is_file() else None
    if file is None and calls is not None:
        raise UserError(f"{model}: has no plan.", hint=f"Run `mediatorize calibrate {model} --calls {calls}`, or pass --plan FILE.")
    chosen = None
    if file is not None:
        with about(file):
            chosen = choose_plan(read_plans(file), calls)
            refuse_other_plan(arch, chosen)
            refuse_other_guidance(chosen, cfg_scale, cfg_channels, cfg_interval, timestep_shift)
            refuse_other_weights(chosen, hash_of_weights(loaded))
    guidance: dict[str, Any] = {"cfg_scale": 1.0 if cfg_scale is None else cfg_scale, "cfg_channels": cfg_channels}
    guidance |= {"cfg_interval": cfg_interval, "timestep_shift": timestep_shift}
    sampler = Sampler.resolve(arch, solver=solver, steps=steps, seed=seed, **guidance)
    as_pixels = vae is not None or arch.channels in (1, 3)
    if out.suffix == ".png" and not as_pixels:
        raise UserError(
            f"{model}: makes latents of {arch.channels} channels.", hint="Pass --vae PATH, or --out something.npz for the latents."
        )
    where = pick_device(device)
    if compile:
        refuse_uncompilable(where)
    decoded = decoder_of(load_vae(vae, where), where, arch) if vae else to_pixels
    added = None if chosen is None else added_hash(loaded)
    loaded = loaded.to(device=where, dtype=DTYPES[dtype])

    own = loaded.schedule if level is None else level
    rule, models = (own.rule, [loaded] * len(own.rule.levels)) if isinstance(own, RuleSchedule) else (None, [])
    if switch is not None:
        later = [load_model(file, family=family, num_heads=num_heads, num_classes=num_classes, weights=weights) for file in others]
        levels = tuple(map(own_level, (loaded, *later))) if others else switch_levels or loaded.all_levels
        rule = SwitchRule(levels=levels, ratios=ratios, first=first, measure=switch, per=switch_per)
        models = [loaded, *(other.to(device=where, dtype=DTYPES[dtype]) for other in later)] if others else [loaded] * len(levels)

    if compile:
        for used in {loaded, *models}:
            used.compile_blocks()

    wanted = classes or tuple(range(min(arch.classes, 10)))
    refuse_unknown_classes(arch, wanted)
    labels = torch.tensor(wanted).repeat_interleave(per_class)
    start = time.monotonic()
    switchers: list[Switcher] = []

    def switcher(count: int) -> Switcher:
        assert rule is not None, "switchers follow a rule"
        switchers.append(switcher_of(rule, models, sampler, count))
        return switchers[-1]

    with progress_bar(len(labels), "sampling", "sample") as bar:
        if chosen is not None:
            latents = sample_many_by_plan(loaded, labels, chosen, seed, batch, bar.update)
        else:
            latents = sample_many(loaded, labels, sampler, level, batch, bar.update, None if rule is None else switcher)
    seconds = time.monotonic() - start
    if as_pixels:
        parts = []
        with progress_bar(len(latents), "decoding", "picture") as bar:
            for few in latents.split(DECODED_AT_A_TIME):  # pictures are never all in memory as floats
                parts.append(decoded(few))
                bar.update(len(few))
        pixels = np.concatenate(parts)
    if not as_pixels:
        write_arrays(out, latents=latents.numpy(), labels=labels.numpy())
    elif out.suffix == ".npz":
        write_arrays(out, arr_0=pixels.repeat(3, -1) if pixels.shape[-1] == 1 else pixels, labels=labels.numpy())
    else:
        names = class_names(labels.tolist(), arch.classes) if captions == "classes" else []
        write_grid(out, pixels, grid_columns(len(pixels), per_class), scale=max(1, 64 // pixels.shape[1]), captions=names)

    total: float | None
    if rule is None:
        by_plan = None if chosen is None else plan_flops(arch, chosen, loaded.settings)
        switches, spent = torch.zeros(len(labels), 0), sampler.flops(arch, own, loaded.settings) if by_plan is None else by_plan
        total = None if spent is None else spent * len(labels)
    else:
        switches = torch.cat([switcher.switches for switcher in switchers])
        total = flops_by_rule(rule, models, sampler, switches)
    if chosen is not None:  # beside as many steps as budgets are shares of
        guidance |= {name: getattr(chosen, name) for name in ("cfg_scale", "cfg_channels", "cfg_interval")}
        sampler = Sampler.resolve(arch, steps=REFERENCE_STEPS, **guidance)
    softmax = sampler.flops(models[-1].arch if others else arch, SOFTMAX, None)
    return Sampled(
        out=out,
        count=len(labels),
        name=arch.name,
        level=SOFTMAX if level is None and loaded.schedule is None else level,
        plan=None if chosen is None else f"{file}, {len(chosen.calls)} calls",
        warnings=() if chosen is None else plan_warnings(chosen, dtype, added),
        seconds=seconds,
        flops=total,
        softmax_flops=None if softmax is None else softmax * len(labels),
        switches=() if rule is None else tuple(map(tuple, switches.tolist())),
        stages=() if rule is None else tuple((model, *others) if others else map(title, rule.levels)),
    )


def refuse_idle_options(
    switch: str | None, level: Level | None, schedule: Path | None, switch_levels: tuple[Level, ...], others: tuple[str, ...]
) -> None:
    """Stages say nothing without the rule, and the rule has its own levels."""
    if switch is None and (switch_levels or others):
        raise UserError("Stages need the rule that switches between them.", hint="Pass --switch mean-absolute.")
    if switch is not None and level is not None:
        raise UserError("--level is for all model calls, and --switch changes it.", hint="Pass one of them.")
    if schedule is not None and (switch is not None or level is not None):
        raise UserError("--schedule says what runs, and so does --level or --switch.", hint="Pass one of them.")
    if switch_levels and others:
        raise UserError("Stages are levels of one model, or checkpoints.", hint="Pass --switch-levels or --checkpoints.")


def refuse_bad_output(out: Path, force: bool) -> None:
    if out.suffix not in (".png", ".npz"):
        raise UserError(f"{out}: neither .png nor .npz.", hint="Name a .png for a grid or a .npz for an array.")
    if out.exists() and not force:
        raise UserError(f"{out}: exists.", hint="Pass --force to replace it, or another path.")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out}: its folder does not exist.", hint=f"Make {out.parent} first.")


def grid_columns(count: int, per_class: int) -> int:
    """One row per class if each has several samples; otherwise rows of ten, or a square if there are more than a hundred."""
    return per_class if 1 < per_class <= 16 else min(count, max(10, math.isqrt(count)))
