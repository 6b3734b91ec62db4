"""The model cards that travel with a bundle and with what is exported from it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from mediatorize.errors import UserError
from mediatorize.model import cost
from mediatorize.model.levels import SOFTMAX, Level, title
from mediatorize.model.schedule import RuleSchedule
from mediatorize.report.sampling import rule_in_words
from mediatorize.report.tables import layers_in_words, left_out

if TYPE_CHECKING:
    from mediatorize.formats.bundle import BundleConfig
    from mediatorize.model.schedule import AnySchedule


def model_card(config: BundleConfig) -> str:
    """Markdown: what it is, from which file, at what cost, how to use it."""
    return f"""# {config.arch.name} in mediator form

Made by `mediatorize convert` from {_origin(config)}

{_levels(config)}

```
mediatorize sample FOLDER --level {config.settings.levels[-1]} --out grid.png
```

{_licence(config)}
"""


def export_card(
    config: BundleConfig,
    schedule: AnySchedule | None,
    *,
    target: str,
    usage: str,
    checks: str,
    history: Sequence[Mapping[str, Any]],
    evaluation: str,
) -> str:
    """Markdown: what it is, how to use it, from which file, how made and checked, at what cost and quality.

    Args:
        target: what was exported to.
        usage: a few lines of use.
        checks: what the written files were compared by.
        history: the bundle's log.
        evaluation: Markdown of `mediatorize evaluate`, or nothing.
    """
    steps = "\n".join(f"- `mediatorize {entry['command']}` ({_versions(entry)}), {entry['time']}" for entry in history)
    return f"""# {config.arch.name} in mediator form, exported to {target}

{usage}

## What it is

Made with `mediatorize` from {_origin(config)}

{steps}

{checks}

## Cost and quality

{_levels(config)}

{_scheduled(config, schedule)}

{_quoted(evaluation)}

## Licence

{_licence(config)}
"""


def hub_header(library: str, license: str | None, base_model: str | None) -> str:
    """The YAML that the Hugging Face Hub reads at the beginning of a model card.

    Args:
        library: what loads the files.
        license: as the Hub names it; None: that of the pretrained model, unnamed.
        base_model: of the pretrained model on the Hub, `owner/name`; None: not said.

    Raises:
        UserError: the Hub would refuse one of them.
    """
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise UserError(f"--license {license!r} is no name of a licence on the Hub.", hint="Pass one such as mit or cc-by-nc-4.0.")
    if base_model is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", base_model):
        raise UserError(f"--base-model {base_model!r} is no name on the Hub.", hint="Pass one such as facebook/DiT-XL-2-256.")
    named = [f"license: {license}"] if license else ["license: other", "license_name: that-of-the-pretrained-model"]
    base = [f"base_model: {base_model}"] if base_model else []
    tags = ["tags:", *[f"- {tag}" for tag in ("mediatorize", "diffusion-transformer", "class-conditional")]]
    return "\n".join(["---", f"library_name: {library}", *named, *base, *tags, "---", "", ""])


def _origin(config: BundleConfig) -> str:
    source = config.source
    if source.began_random:
        return f"""random weights, of the sizes of `{source.file}` ({source.format}).
SHA-256 of the weights that level `softmax` has now: `{source.sha256}`."""
    weights = f", its {source.weights} weights" if source.weights else ""
    return f"""`{source.file}` ({source.format}{weights}).
SHA-256 of those weights: `{source.sha256}`."""


def _levels(config: BundleConfig) -> str:
    """The cost and the layers' errors at every level."""
    arch, settings = config.arch, config.settings
    softmax = cost.forward_flops(arch)
    rows = []
    for level in settings.levels:
        flops = cost.forward_flops(arch, level, settings.whole)
        before, after = (_mean_error(config, level, when) for when in ("before", "after"))
        rows.append(f"| {title(level)} | {flops / 2e9:.4g} | {flops / softmax:.1%} | {before} | {after} |")
    table = "\n".join(rows)
    training, kept = "", "Level `softmax` is that model, bit for bit."
    changed = "All weights were trained: level `softmax` is no longer that model."
    if config.source.began_random:
        kept = changed = "It holds no pretrained weights."
    if config.finetuned is not None and config.finetuned.settings.teacher == "none":
        how = config.finetuned.settings
        at = ", ".join(map(title, how.levels or settings.levels))
        training = (
            f" Then trained by `mediatorize finetune` on data alone, {how.steps} steps of {how.batch} states, at {at} and no other level."
        )
        kept = changed
    elif config.finetuned is not None:
        distilled, how = config.finetuned, config.finetuned.settings
        errors = ", ".join(
            f"{error:.3f} at {title(level)} (before: {distilled.before[level]:.3f})" for level, error in distilled.after.items()
        )
        training = (
            f" Then distilled by `mediatorize finetune`, {how.steps} steps of {how.batch} states: relative error of the model's output on "
            f"held-out trajectories of the teacher, the whole model at one level, {errors}."
        )
        if how.train == "all":
            kept = changed
    which = "each attention layer" if settings.layers is None else layers_in_words(settings, arch.depth)
    if settings.kept is not None:
        kept = f"""This is pruned to the schedule below: levels that it does not use cannot run. Gone: {left_out(settings)}.

The rest of this section is about the whole bundle. {kept}"""
    closing = "None of these errors is picture quality: judge that by sampling."
    if config.source.began_random:
        closing = "How good its pictures are, samples tell."
    form = "in its published form" if settings.form == "published" else "with absorbed projections"
    own = {"own": ", and each block has an MLP of its own", "shared": ""}[config.settings.mlp]
    return f"""{kept} Every other level runs {which} through a few mediator tokens
(arXiv 2408.05710, {form}){own}.

| level | GMACs per forward | of softmax's FLOPs | mean layer error, initialised | mean layer error, fitted |
|---|---|---|---|---|
| {title(SOFTMAX)} | {softmax / 2e9:.4g} | 100% | 0 | 0 |
{table}

{_fitting(config)}{training} {closing}"""


def _fitting(config: BundleConfig) -> str:
    """What the errors of layers are."""
    if config.source.began_random:
        return "Weights began at random, and nothing was fitted."
    text = "A layer's error is |mediator - softmax| / |softmax| of its output, on held-out states, all other layers at softmax."
    return f"{text} Those it was fitted\non came from {config.fitted_on}."


def _mean_error(config: BundleConfig, level: Level, when: str) -> str:
    """Over layers; a dash where none was measured at this resolution."""
    errors = [getattr(layer, when)[level] for layer in config.layer_errors]
    return f"{sum(errors) / len(errors):.3f}" if errors else "-"


def _scheduled(config: BundleConfig, schedule: AnySchedule | None) -> str:
    if schedule is None:
        return "It has no schedule of levels: one level serves the whole model at all times, softmax where none is chosen."
    softmax = cost.forward_flops(config.arch)
    rule = ""
    if isinstance(schedule, RuleSchedule):
        rule, schedule = f"It follows the step-wise rule of arXiv 2408.05710: {rule_in_words(schedule.rule)}. ", schedule.usual
    widths = [high - low for low, high in pairwise((0.0, *schedule.edges, 1.0))]
    shares = [cost.forward_flops(config.arch, levels, config.settings) / softmax for levels in schedule.levels]
    mean = sum(width * share for width, share in zip(widths, shares, strict=True))
    chooses = "The median sample is at one level for every layer" if rule else "Its schedule chooses a level for every layer by noise level"
    return (
        f"{rule}{chooses}, in {len(shares)} piece{'s' * (len(shares) > 1)}: "
        f"{min(shares):.1%} to {max(shares):.1%} of softmax's FLOPs per forward, {mean:.1%} on steps even in noise level."
    )


def _quoted(evaluation: str) -> str:
    """An evaluation's Markdown a heading lower, without its pictures."""
    if not evaluation:
        return "Its samples were not judged when it was exported."
    lines = [f"##{line}" if line.startswith("#") else line for line in evaluation.strip().splitlines() if not line.startswith("![")]
    return "\n".join(lines).strip()


def _versions(entry: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in entry["versions"].items())


def _licence(config: BundleConfig) -> str:
    if config.source.began_random:
        return "Licence: it contains no weights of others. The data that it was trained on may have terms of their own."
    return f"""Licence: this contains the weights of `{config.source.file}` and carries their licence on. (Official DiT
weights are CC BY-NC 4.0, official SiT weights MIT.)"""
