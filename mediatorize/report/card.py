"""The model card that travels with a bundle."""

from __future__ import annotations

from mediatorize.formats.bundle import BundleConfig
from mediatorize.model import cost


def model_card(config: BundleConfig) -> str:
    """Markdown: what it is, from which file, at what cost, how to use it."""
    arch, settings, source = config.arch, config.settings, config.source
    softmax = cost.forward_flops(arch)
    rows = "\n".join(
        f"| {m} | {cost.forward_flops(arch, m, settings) / 2e9:.2f} | {cost.forward_flops(arch, m, settings) / softmax:.1%} "
        f"| {sum(e['before'][m] for e in config.layer_errors) / arch.depth:.3f} | {sum(e['after'][m] for e in config.layer_errors) / arch.depth:.3f} |"
        for m in settings.levels
    )
    return f"""# {arch.name} in mediator form

Made by `mediatorize convert` from `{source["file"]}` ({source["format"]}{", " + source["weights"] if source["weights"] else ""}; SHA-256 of its weights
`{source["sha256"]}`). Level `softmax` is that model, bit for bit; every other level runs each attention layer through a few mediator tokens
(arXiv 2408.05710, with absorbed projections).

| mediators | GMACs per forward | of softmax's FLOPs | mean layer error, initialised | mean layer error, fitted |
|---|---|---|---|---|
| softmax | {softmax / 2e9:.2f} | 100% | 0 | 0 |
{rows}

Layer errors are |mediator - softmax| / |softmax| of a layer's output on held-out states of the model's own sampling trajectories, all other layers at
softmax. They are not picture quality: judge that by sampling.

```
mediatorize sample FOLDER --classes 1,2,3 --level {settings.levels[-1]} --out grid.png
```

Licence: this bundle contains the weights of `{source["file"]}` and carries their licence on. (Official DiT weights are CC BY-NC 4.0, official SiT
weights MIT.)
"""
