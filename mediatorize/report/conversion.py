"""The report of `mediatorize convert`: what it did, or would do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mediatorize.compression.conversion import Conversion, ConversionPlan
from mediatorize.compression.records import Errors, LayerErrors
from mediatorize.model import cost
from mediatorize.model.levels import SOFTMAX, title
from mediatorize.report.tables import gmacs, layers_in_words, seconds_in_words, text_table


def fitted_on(plan: ConversionPlan) -> str:
    """Where the states come from: layers are fitted and judged on them."""
    from mediatorize.formats.bundle import OWN_TRAJECTORIES  # here, as it takes long to load

    return f"noised data: {plan.data}" if plan.data else OWN_TRAJECTORIES


def words(found: Conversion) -> str:
    plan = found.plan
    arch, settings, relative = plan.arch, plan.settings, plan.relative_flops()
    rows = [(title(SOFTMAX), gmacs(cost.forward_flops(arch)), "100%")]
    rows += [(title(level), gmacs(cost.forward_flops(arch, level, settings)), f"{share:.1%}") for level, share in relative.items()]
    projections = f"changed by rank {settings.projection_rank}" if settings.projection_rank else "copied"
    if settings.projection_rank is None:
        projections = f"shared with {title(SOFTMAX)}"
    made = f"mediators from {settings.space}, {plan.init}, local rank {settings.local_rank}"
    if settings.form == "published":
        made = "mediators as the paper has them (published form)"
    narrow = f", narrow ones of {', '.join(map(str, settings.mlp_levels))}" if settings.mlp_levels else ""
    share = plan.added_parameters() / cost.count_parameters(arch)
    lines = [
        f"{arch.name}: {layers_in_words(settings, arch.depth)} get levels {', '.join(map(title, settings.levels))} beside {title(SOFTMAX)}",
        f"  {made}, projections {projections}, {settings.mlp} MLPs"
        f"{narrow}; {plan.added_parameters() / 1e6:.1f}M parameters are added ({share:.0%} of the model's)",
        *(f"  {note}" for note in found.notes),
        "",
        text_table(("whole model at", "GMACs per forward", "of softmax's"), rows),
        "",
    ]
    return "\n".join([*lines, *(_done(found) if found.estimated_seconds is None else _planned(found, found.estimated_seconds))])


def _planned(found: Conversion, seconds: float) -> list[str]:
    plan, sampler = found.plan, found.plan.sampler
    if plan.random:
        return [f"Would draw random weights; nothing is fitted. {found.out} would be written."]
    how = f"guidance {sampler.cfg_scale}"
    if not plan.data:
        how = f"{sampler.solver}, {sampler.steps} steps, {how}"
    fitting = "fit nothing (--fit-steps 0)"
    if plan.fit.steps:
        fitting = f"fit {layers_in_words(plan.settings, plan.arch.depth)} for {plan.fit.steps} steps of {plan.fit.batch} states each"
    return [
        f"Would take {plan.states} states of {fitted_on(plan)} ({how})",
        f"and {fitting}:",
        f"  {plan.flops() / 1e12:.1f} TFLOPs, about {seconds_in_words(seconds)} at this device's rate; "
        f"memory up to {(found.estimated_bytes or 0) / 2**30:.1f} GiB",
        f"  {found.out} would be written.",
    ]


def _done(found: Conversion) -> list[str]:
    plan = found.plan
    if plan.random:
        level = plan.settings.levels[0]
        return [
            f"Wrote {found.out} with random weights. Nothing was fitted. Train it on data, at one of its levels:",
            f"  mediatorize finetune {found.out} --teacher none --train all --train-levels {level} --data PATH --data-weight 1",
        ]
    levels = (*plan.settings.levels, *plan.settings.mlp_levels)
    lines = [f"States were of {fitted_on(plan)}."] if plan.data else []
    if plan.fit.steps == 0:
        lines.append("Not fitted (--fit-steps 0): mediators are as initialised. Relative error of each layer's output:")
    else:
        lines.append("Relative error of each layer's output on held-out states, before -> after fitting:")

    def row(name: str, before: Errors, after: Errors) -> tuple[str, ...]:
        return (name, *(f"{before[level]:.3f} -> {after[level]:.3f}" for level in levels))

    def mean(when: Callable[[LayerErrors], Errors]) -> Errors:
        return {level: sum(when(errors)[level] for errors in found.errors) / len(found.errors) for level in levels}

    table = [row(f"{errors.layer}", errors.before, errors.after) for errors in found.errors]
    table.append(row("mean", mean(lambda errors: errors.before), mean(lambda errors: errors.after)))
    resumed = f" ({found.resumed_layers} layers were fitted in an earlier run)" if found.resumed_layers else ""
    return [
        *lines,
        text_table(("layer", *map(title, levels)), table),
        "",
        f"Wrote {found.out} in {seconds_in_words(found.seconds)}{resumed}. Level softmax is the pretrained model, bit for bit.",
    ]


def facts(found: Conversion) -> dict[str, Any]:
    plan = found.plan
    return {
        "out": str(found.out),
        "dry_run": found.estimated_seconds is not None,
        "architecture": plan.arch.to_json(),
        "mediators": plan.settings.to_json(),
        "init": plan.init,
        "fit": dict(vars(plan.fit)),
        "states": plan.states,
        "data": dict(vars(plan.data)) if plan.data else None,
        "added_parameters": plan.added_parameters(),
        "flops_of_conversion": plan.flops(),
        "estimated_bytes": found.estimated_bytes,
        "relative_flops": plan.relative_flops(),
        "layer_errors": [errors.to_json() for errors in found.errors],
        "seconds": round(found.seconds, 1),
        "estimated_seconds": found.estimated_seconds,
        "resumed_layers": found.resumed_layers,
        "notes": list(found.notes),
    }
