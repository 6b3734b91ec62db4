"""Time of one whole model call relative to the pretrained one, side by side in one process: levels, and their limit.

    python benchmarks/forward.py --json forward.json
    python benchmarks/forward.py --models DiT-XL/2@512 --batches 1,32 --device cuda --dtype bfloat16 --compile

The weights are random. A call and softmax (timm's fused attention) run in turn, A B A B ..., and a ratio is a median over pairs. The limit
of mediators is the same model without its attention layers.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from mediatorize.evaluation.timing import model_call, paired_time
from mediatorize.model import cost
from mediatorize.model.architecture import Architecture, preset
from mediatorize.model.levels import SOFTMAX, Level, MediatorSettings
from mediatorize.model.transformer import DiffusionTransformer, from_scratch, initialise_from_scratch
from mediatorize.report.pictures import calm, new_figure
from mediatorize.report.tables import text_table
from mediatorize.stages.inspect import SHOWN_LEVELS, shown_settings
from mediatorize.stages.running import hardware, keep_freed_memory, versions

SIZES = ("DiT-S/2@256", "DiT-S/2@512", "DiT-S/2@1024", "DiT-B/2@256", "DiT-L/2@256", "DiT-XL/2@256", "DiT-XL/2@512")
WITHOUT_ATTENTION = "no attention layers"


class Nothing(nn.Module):
    """Stands for an attention layer that is not there."""

    def forward(self, x: Tensor, level: Level) -> Tensor:
        return torch.zeros_like(x)


@dataclass(frozen=True)
class Kind:
    """One way of running a model call."""

    name: str
    run: Callable[[], object]
    flops: int


def kinds(arch: Architecture, batch: int, device: torch.device, dtype: torch.dtype, compiled: bool) -> tuple[Kind, Iterator[Kind]]:
    """The softmax call, and all others one after another; what one needs alone is freed once the next is made."""
    torch.manual_seed(0)
    settings = replace(shown_settings(arch), mlp_widths=(8, 4))

    def on_device(model: DiffusionTransformer) -> DiffusionTransformer:
        model = model.to(device, dtype).requires_grad_(False).eval()
        if compiled:
            model.compile(dynamic=False)
        return model

    model = on_device(from_scratch(arch, settings))

    def at(level: Level, name: str) -> Kind:
        return Kind(name, model_call(model, batch, level), cost.forward_flops(arch, level, settings))

    def others() -> Iterator[Kind]:
        for level in SHOWN_LEVELS:
            yield at(level, f"m = {level}")
        published = MediatorSettings(SHOWN_LEVELS, form="published", projection_rank=None)
        their = on_device(from_scratch(arch, published))
        for level in SHOWN_LEVELS:
            yield Kind(f"published form, m = {level}", model_call(their, batch, level), cost.forward_flops(arch, level, published))
        del their
        bare = DiffusionTransformer(arch)
        initialise_from_scratch(bare, 0)
        for block in bare.layers():
            block.attn = Nothing()  # type: ignore[assignment]
        rest = cost.forward_flops(arch) - cost.forward_flops_by_part(arch)["attention"]
        yield Kind(WITHOUT_ATTENTION, model_call(on_device(bare), batch, SOFTMAX), rest)

    return at(SOFTMAX, "softmax"), others()


def measure(
    name: str, batch: int, pairs: int, device: torch.device, dtype: torch.dtype, compiled: bool, wanted: list[str]
) -> list[dict[str, Any]]:
    """A row for every kind of call that is wanted; none named: for all."""
    arch = preset(name)
    about: dict[str, Any] = {"model": arch.name, "image_size": int(name.rpartition("@")[2]), "batch": batch}
    about |= {"tokens": arch.tokens, "width": arch.width, "depth": arch.depth}
    softmax, others = kinds(arch, batch, device, dtype, compiled)
    rows = []
    for kind in chain([softmax], others):
        if wanted and kind.name not in wanted:
            continue
        times = paired_time(kind.run, softmax.run, pairs, device)
        figures = {"time": times.ratio, "quartiles": times.quartiles, "softmax_seconds": times.reference_seconds}
        rows.append(about | {"kind": kind.name, "flops": kind.flops / softmax.flops} | figures)
        print(f"{name}, batch {batch}, {kind.name}: {times.ratio:.3f} of {times.reference_seconds:.3f} s", file=sys.stderr)
    return rows


def slopes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The exponents with which a kind's time in one layer grows with tokens (of one model) and with width (at one image size), and how many
    sizes each is from. Of batches of one, by least squares of logarithms.
    """
    found = []
    single = [row for row in rows if row["batch"] == 1]
    for kind in dict.fromkeys(row["kind"] for row in single):
        mine = [row for row in single if row["kind"] == kind]
        smallest = min(row["width"] for row in mine), min(row["tokens"] for row in mine)
        exponents: dict[str, Any] = {"kind": kind}
        for axis, same, value in (("tokens", "width", smallest[0]), ("width", "tokens", smallest[1])):
            line = [row for row in mine if row[same] == value]
            if len({row[axis] for row in line}) > 1:
                times = [math.log(row["softmax_seconds"] * row["time"] / row["depth"]) for row in line]
                exponents[axis] = statistics.linear_regression([math.log(row[axis]) for row in line], times).slope
                exponents[f"sizes of {axis}"] = len(line)
        found.append(exponents)
    return found


def per_mediator(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How much of a softmax call's time one more mediator takes, by model and batch: the slope over m = 1, 4 and 16."""
    found = []
    for size in dict.fromkeys((row["model"], row["image_size"], row["batch"]) for row in rows):
        times = {row["kind"]: row["time"] for row in rows if (row["model"], row["image_size"], row["batch"]) == size}
        counts = [count for count in SHOWN_LEVELS[:3] if f"m = {count}" in times]
        if len(counts) == 3:
            slope = statistics.linear_regression(counts, [times[f"m = {count}"] for count in counts]).slope
            found.append({"model": size[0], "image_size": size[1], "batch": size[2], "time": slope})
    return found


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A PNG: time against FLOPs, a panel for this tool's calls and one for the published form. On the diagonal, FLOPs saved are time.

    A colour for every model, a shape for every image size; hollow with one row per call.
    """
    figure = new_figure(9, 4.2)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    sizes = sorted({(row["width"], row["image_size"], row["batch"], row["model"]) for row in rows})
    widths, pixels_of = (sorted({size[place] for size in sizes}) for place in (0, 1))
    for axis, title in zip(panels, ("this tool", "the published form"), strict=True):
        axis.plot((0, 110), (0, 110), color="0.8", linewidth=1)
        for width, pixels, batch, name in sizes:
            size = name, pixels, batch
            mine = [row for row in rows if (row["model"], row["image_size"], row["batch"]) == size]
            theirs = [row for row in mine if row["kind"].startswith("published")]
            ours = [row for row in mine if row not in theirs and row["kind"] != WITHOUT_ATTENTION]
            points = theirs if axis is panels[1] else ours
            flops, times = ([100 * row[measure] for row in points] for measure in ("flops", "time"))
            colour, shape = f"C{widths.index(width)}", "os^Dv"[pixels_of.index(pixels)]
            look: dict[str, Any] = {"color": colour, "markersize": 5, "markerfacecolor": "white" if batch == 1 else colour}
            axis.plot(flops, times, shape, label=f"{name}, {pixels} pixels, batch {batch}", **look)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("% of softmax's FLOPs", fontsize=9)
        calm(axis)
    panels[0].set_ylabel("% of softmax's time", fontsize=9)
    panels[1].legend(fontsize=7, frameon=False, loc="lower right")
    figure.savefig(path)


def main(
    models: Annotated[str, typer.Option(help="published sizes, with commas; empty: only draw")] = ",".join(SIZES),
    batches: Annotated[str, typer.Option(help="with commas")] = "1,8",
    only: Annotated[str, typer.Option(help="kinds of call, with semicolons, such as 'softmax;m = 16'; default: all")] = "",
    pairs: int = 5,
    device: str = "cpu",
    dtype: str = "float32",
    compiled: Annotated[bool, typer.Option("--compile")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="its rows of other measurements are kept")] = None,
    return_freed: Annotated[
        bool, typer.Option("--return-freed", help="give freed memory back to the system, as glibc does by itself")
    ] = False,
    picture: Annotated[Path | None, typer.Option(help="a PNG of all rows in the JSON of this device, type and compilation")] = None,
) -> None:
    """Prints and writes the ratios."""
    if not return_freed:
        keep_freed_memory()
    where, kind = torch.device(device), {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    how: dict[str, Any] = {"device": device, "dtype": dtype, "compiled": compiled}
    wanted = list(filter(None, only.split(";")))
    with torch.inference_mode():
        for name in filter(None, models.split(",")):
            for batch in map(int, batches.split(",")):
                rows = [how | row for row in measure(name, batch, pairs, where, kind, compiled, wanted)]
                table = [
                    (row["kind"], f"{row['flops']:.3f}", f"{row['time']:.3f}", "{:.3f} to {:.3f}".format(*row["quartiles"])) for row in rows
                ]
                typer.echo(f"\n{name}, batch {batch}: softmax {rows[0]['softmax_seconds']:.3f} s")
                typer.echo(text_table(("call", "FLOPs", "time", "quartiles"), table))
                if json_file is not None:
                    keep(json_file, rows, where, pairs)
    if json_file is not None and picture is not None:
        draw([row for row in json.loads(json_file.read_text())["rows"] if how.items() <= row.items()], picture)


def keep(path: Path, rows: list[dict[str, Any]], device: torch.device, pairs: int) -> None:
    """Puts rows into the file, in the place of those of the same model, batch, type and device."""
    facts = json.loads(path.read_text()) if path.exists() else {"rows": []}
    same = ("model", "image_size", "batch", "device", "dtype", "compiled")
    rows = [row for row in facts["rows"] if any(row[key] != rows[0][key] for key in same)] + rows
    told: dict[str, Any] = {"hardware": hardware(device), "versions": versions(), "pairs": pairs}
    ways = list(dict.fromkeys(tuple((key, row[key]) for key in ("device", "dtype", "compiled")) for row in rows))
    for name, summary in (("exponents", slopes), ("per mediator", per_mediator)):
        told[name] = [dict(way) | each for way in ways for each in summary([row for row in rows if set(way) <= row.items()])]
    path.write_text(json.dumps(told | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
