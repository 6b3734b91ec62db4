"""Time of one attention layer in mediator form relative to timm's fused softmax attention, side by side in one process.

    python benchmarks/attention.py                     # XL/2 at 256 and 512 pixels, m = 1, 4, 16, 64
    python benchmarks/attention.py --json attention.json --device cuda --dtype bfloat16

The two run in turn, A B A B ..., and the ratio is the median over pairs: machines drift, pairs do not. Pooling is per head, the local
branch and the change of the projections have their default ranks. The published form is measured beside it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from timm.layers import Attention

from mediatorize.evaluation.timing import paired_time
from mediatorize.model import cost
from mediatorize.model.architecture import Architecture, preset
from mediatorize.model.attention import MediatorAttention
from mediatorize.model.forms import softmax_flops
from mediatorize.model.levels import MediatorSettings
from mediatorize.report.tables import text_table
from mediatorize.stages.inspect import shown_settings
from mediatorize.stages.running import hardware, keep_freed_memory, versions


def measure(arch: Architecture, levels: tuple[int, ...], batch: int, pairs: int, device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    settings = replace(shown_settings(arch), levels=levels)
    softmax = Attention(arch.width, num_heads=arch.heads, qkv_bias=True).to(device, dtype).eval()
    pretrained = softmax.qkv, softmax.proj
    mediator, published = (
        MediatorAttention(arch.width, arch.heads, arch.grid, each, pretrained).to(device, dtype).eval()
        for each in (settings, MediatorSettings(levels, form="published", projection_rank=None))
    )
    x = torch.randn(batch, arch.tokens, arch.width, device=device, dtype=dtype)
    rows = []
    for m in levels:
        reference, where = partial(softmax, x), torch.device(device)
        ours, theirs = (paired_time(partial(layer, x, m), reference, pairs, where) for layer in (mediator, published))
        flops = cost.attention_flops(arch, m, mediator.settings) / softmax_flops(arch.tokens, arch.width)
        rows.append(
            {
                "model": arch.name,
                "image_size": arch.image_size,
                "mediators": m,
                "local_rank": settings.local_rank,
                "projection_rank": settings.projection_rank,
                "time_ratio": ours.ratio,
                "flops_ratio": flops,
                "published_time_ratio": theirs.ratio,
                "softmax_seconds": ours.reference_seconds,
            }
        )
    return rows


def main(
    models: Annotated[str, typer.Option(help="published sizes")] = "DiT-XL/2@256,DiT-XL/2@512",
    levels: Annotated[str, typer.Option(help="mediator counts")] = "1,4,16,64",
    batch: int = 8,
    pairs: int = 15,
    device: str = "cpu",
    dtype: str = "float32",
    destination: Annotated[Path | None, typer.Option("--json", help="where to write the figures")] = None,
) -> None:
    """Prints and writes the ratios."""
    keep_freed_memory()
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for name in models.split(","):
            counts = tuple(int(m) for m in levels.split(","))
            rows += measure(preset(name), counts, batch, pairs, device, getattr(torch, dtype))
    told = {"hardware": hardware(torch.device(device)), "versions": versions(), "batch": batch, "dtype": dtype, "pairs": pairs}
    header = ("layer", "m", "time / softmax", "FLOPs / softmax", "published form, time / softmax")
    table = [
        (
            f"{r['model']}@{r['image_size'][0]}",
            r["mediators"],
            f"{r['time_ratio']:.3f}",
            f"{r['flops_ratio']:.3f}",
            f"{r['published_time_ratio']:.3f}",
        )
        for r in rows
    ]
    print(text_table(header, table))
    if destination:
        destination.write_text(json.dumps(told | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
