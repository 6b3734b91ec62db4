"""The model card that travels with a bundle."""

from __future__ import annotations

from mediatorize.formats.bundle import BundleConfig
from mediatorize.model import cost


def model_card(config: BundleConfig) -> str:
    """Markdown: what it is, from which file, at what cost, how to use it."""
    arch, settings, source = config.arch, config.settings, config.source
    softmax = cost.forward_flops(arch)
    rows = []
    for m in settings.levels:
        flops = cost.forward_flops(arch, m, settings)
        before, after = (sum(layer[when][m] for layer in config.layer_errors) / arch.depth for when in ("before", "after"))
        rows.append(f"| {m} | {flops / 2e9:.4g} | {flops / softmax:.1%} | {before:.3f} | {after:.3f} |")
    table = "\n".join(rows)
    training, kept = "", "Level `softmax` is that model, bit for bit."
    if config.finetuned is not None:
        plan, before, after = (config.finetuned[key] for key in ("plan", "before", "after"))
        errors = ", ".join(f"{after[m]:.3f} at {m} (before: {before[m]:.3f})" for m in after)
        training = (
            f"Then distilled by `mediatorize finetune`: {plan['distill']['steps']} steps of {plan['distill']['batch']} states. Relative "
            f"error of the model's output on held-out trajectories of the teacher, all layers at one level: {errors}.\n\n"
        )
        if plan["distill"]["train"] == "all":
            kept = "All weights were trained: level `softmax` is no longer that model."
    weights = f", its {source['weights']} weights" if source["weights"] else ""
    return f"""# {arch.name} in mediator form

Made by `mediatorize convert` from `{source["file"]}` ({source["format"]}{weights}).
SHA-256 of those weights: `{source["sha256"]}`.

{kept} Every other level runs each attention layer through a few mediator tokens (arXiv 2408.05710,
with absorbed projections).

| mediators | GMACs per forward | of softmax's FLOPs | mean layer error, initialised | mean layer error, fitted |
|---|---|---|---|---|
| softmax | {softmax / 2e9:.4g} | 100% | 0 | 0 |
{table}

A layer's error is |mediator - softmax| / |softmax| of its output, on held-out states, all other layers at softmax. Those it was
fitted on came from {config.fitted_on}. It is not picture quality: judge that by sampling.

{training}```
mediatorize sample FOLDER --level {settings.levels[-1]} --out grid.png
```

Licence: this bundle contains the weights of `{source["file"]}` and carries their licence on. (Official DiT weights are CC BY-NC 4.0,
official SiT weights MIT.)
"""
