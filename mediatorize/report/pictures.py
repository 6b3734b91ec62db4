"""Plots and picture sheets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mediatorize.formats.images import Pixels
from mediatorize.formats.tensors import write_beside


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
