"""Plots and picture sheets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mediatorize.compression.allocate import Choice
from mediatorize.formats.images import Pixels
from mediatorize.formats.tensors import write_beside
from mediatorize.model.architecture import SOFTMAX, Level


def write_comparison(path: Path, rows: Mapping[str, Pixels], captions: Sequence[str]) -> None:
    """A PNG with one labelled row of pictures per sampler, the same noise in each column.

    Args:
        rows: name of the row -> (n, height, width, channels) bytes; every row has the same n.
        captions: a line of figures under each row's name.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(next(iter(rows.values())))
    figure = Figure(figsize=(3.2 + 0.55 * count, 0.75 * len(rows)), dpi=120)
    FigureCanvasAgg(figure)
    widths = [5.5] + [1] * count
    axes = figure.subplots(len(rows), count + 1, squeeze=False, gridspec_kw={"width_ratios": widths, "wspace": 0.06, "hspace": 0.12})
    for line, (name, pixels), caption in zip(axes, rows.items(), captions, strict=True):
        for axis in line:
            axis.axis("off")
        line[0].text(0, 0.62, name, fontsize=11, fontweight="bold", va="center", transform=line[0].transAxes)
        line[0].text(0, 0.22, caption, fontsize=7.5, color="0.3", va="center", transform=line[0].transAxes)
        for axis, picture in zip(line[1:], pixels, strict=True):
            axis.imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    figure.subplots_adjust(left=0.01, right=0.995, top=0.99, bottom=0.01)
    write_beside(path, lambda beside: figure.savefig(beside, format="png"))


def _figure(width: float, height: float) -> Any:
    """A figure that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save_figure(path: Path, figure: Any) -> None:
    write_beside(path, lambda beside: figure.savefig(beside, format="png"))


def _label_cells(axis: Any, noise_levels: Sequence[float], layers: int) -> None:
    """Noise levels along x, at most a dozen of them written, and layers along y."""
    every = -(-len(noise_levels) // 12)
    axis.set_xticks(range(0, len(noise_levels), every), [f"{level:.2g}" for level in noise_levels[::every]])
    axis.set_yticks(range(0, layers, -(-layers // 14)))


def write_schedule_map(path: Path, noise_levels: Sequence[float], options: Sequence[Level], choice: Choice, title: str) -> None:
    """A PNG of one schedule: layers by noise level, one colour per level.

    Args:
        noise_levels: of the cells, in the sampler's order.
        options: ascending mediator counts, then softmax.
        choice: (cells, layers) places among the options.
    """
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    cells, layers = choice.shape
    shades = colormaps["viridis_r"]([0.05 + 0.85 * place / max(1, len(options) - 1) for place in range(len(options))])
    figure = _figure(max(6.0, 2.4 + 0.2 * cells), max(2.6, 1.5 + 0.24 * layers))
    axis = figure.subplots()
    axis.imshow(choice.T, cmap=ListedColormap(shades), vmin=-0.5, vmax=len(options) - 0.5, aspect="auto", interpolation="nearest")
    axis.set_xticks([cell - 0.5 for cell in range(1, cells)], minor=True)
    axis.set_yticks([layer - 0.5 for layer in range(1, layers)], minor=True)
    axis.grid(which="minor", color="white", linewidth=0.6)
    axis.tick_params(which="minor", length=0)
    _label_cells(axis, noise_levels, layers)
    axis.set(title=title, xlabel="noise level (sampling runs from left to right)", ylabel="layer")
    names = [f"m = {option}" if option != SOFTMAX else SOFTMAX for option in options]
    patches = [Patch(color=shade, label=name) for shade, name in zip(shades, names, strict=True)]
    figure.legend(handles=patches, loc="outside right center", frameon=False)
    _save_figure(path, figure)


def write_error_table(path: Path, noise_levels: Sequence[float], levels: Sequence[int], errors: NDArray[np.float64]) -> None:
    """A PNG of the error table: one panel per mediator level, layers by noise level, on one logarithmic scale.

    Args:
        errors: (cells, layers, levels), relative errors of the samples.
    """
    from matplotlib.colors import LogNorm

    cells, layers, _ = errors.shape
    figure = _figure(max(8.0, 1.5 + len(levels) * (1.0 + 0.1 * cells)), max(2.6, 1.5 + 0.24 * layers))
    axes = figure.subplots(1, len(levels), squeeze=False, sharey=True)[0]
    positive = errors[errors > 0]
    low, high = (float(positive.min()), float(positive.max())) if positive.size else (1e-6, 1.0)
    scale = LogNorm(max(low, high / 1000), high)
    for axis, level, table in zip(axes, levels, np.moveaxis(errors, 2, 0), strict=True):
        image = axis.imshow(table.T.clip(min=scale.vmin), norm=scale, cmap="magma", aspect="auto", interpolation="nearest")
        _label_cells(axis, noise_levels, layers)
        axis.set_xticks(axis.get_xticks()[::2])
        axis.set(title=f"m = {level}", xlabel="noise level")
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="relative error of the sample")
    figure.suptitle("Error that one layer at one noise level makes alone")
    _save_figure(path, figure)


@dataclass(frozen=True)
class Point:
    """A candidate on the picture of error against cost."""

    kind: str
    label: str
    """Written beside it, where not empty."""
    cost: float
    error: float
    kept: bool


def write_candidates(path: Path, points: Sequence[Point], cost_label: str, error_label: str) -> None:
    """A PNG of error against cost, kinds of candidates in their own colours, what was kept ringed."""
    from matplotlib.ticker import PercentFormatter, ScalarFormatter

    figure = _figure(8.0, 5.0)
    axis = figure.subplots()
    kinds = list(dict.fromkeys(point.kind for point in points))
    for place, kind in enumerate(kinds):
        those = sorted((point for point in points if point.kind == kind and point.error > 0), key=lambda point: point.cost)
        marker, colour = "osD^vPX*"[place % 8], f"C{place % 10}"
        axis.plot([p.cost for p in those], [p.error for p in those], marker, color=colour, label=kind, markersize=7, alpha=0.85)
        for point in those:
            if point.label:
                axis.annotate(point.label, (point.cost, point.error), xytext=(7, 5), textcoords="offset points", fontsize=9)
    kept = sorted((point for point in points if point.kept and point.error > 0), key=lambda point: point.cost)
    axis.plot([p.cost for p in kept], [p.error for p in kept], "-", color="0.4", linewidth=1, zorder=0)
    axis.plot([p.cost for p in kept], [p.error for p in kept], "o", color="black", fillstyle="none", markersize=14, label="kept")
    axis.set_yscale("log")
    axis.yaxis.set_minor_formatter(ScalarFormatter())
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.margins(x=0.1, y=0.08)
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.grid(which="both", color="0.9", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.set(xlabel=cost_label, ylabel=error_label)
    axis.legend(frameon=False, fontsize=9)
    _save_figure(path, figure)
