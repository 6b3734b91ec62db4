"""Plots and picture sheets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mediatorize.evaluation.results import RowResult
from mediatorize.model.levels import Level, holds, in_order, is_pretrained, read_level
from mediatorize.model.levels import title as title_of
from mediatorize.model.schedule import AnySchedule, Levels, RuleSchedule

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from mediatorize.formats.images import Pixels

INK, SOFT, STUDENT, SCHEDULED = "#1c2228", "#5b6670", "#2f6f9f", "#c8553d"

Colour = str | tuple[float, float, float, float]


def write_comparison(path: Path, rows: Sequence[tuple[str, Pixels, str]], classes: Sequence[str] = ()) -> None:
    """A PNG with one labelled row of pictures per sampler, the same noise in each column.

    Args:
        rows: name, pictures (n, height, width, channels) in bytes, and a line of figures that stands under the name; every row has the
            same n.
        classes: what stands over each column.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    _, first, _ = rows[0]
    count, cell = len(first), min(max(first.shape[1] / 120, 0.55), 2.0)  # inches
    figure = Figure(figsize=(3.2 + cell * count, max(0.75, cell + 0.1) * len(rows)), dpi=120)
    FigureCanvasAgg(figure)
    widths = [3.0 / cell] + [1] * count
    axes = figure.subplots(len(rows), count + 1, squeeze=False, gridspec_kw={"width_ratios": widths, "wspace": 0.06, "hspace": 0.12})
    for line, (name, pixels, caption) in zip(axes, rows, strict=True):
        for axis in line:
            axis.axis("off")
        line[0].text(0, 0.62, name, fontsize=11, fontweight="bold", va="center", transform=line[0].transAxes)
        line[0].text(0, 0.22, caption, fontsize=7.5, color="0.3", va="center", transform=line[0].transAxes)
        for axis, picture in zip(line[1:], pixels, strict=True):
            _show(axis, picture)
    for axis, name in zip(axes[0, 1:], classes, strict=False):  # there may be fewer pictures
        axis.set_title(name, fontsize=7.5, color="0.3", pad=3)
    top = 0.99 - 0.2 / figure.get_figheight() * bool(classes)
    figure.subplots_adjust(left=0.01, right=0.995, top=top, bottom=0.01)
    _write(path, figure)


def _show(axis: Axes, picture: Pixels, extent: tuple[float, float, float, float] | None = None) -> None:
    """A picture (height, width, channels) in bytes, of which every pixel is a sharp square."""
    shown = picture.squeeze(-1) if picture.shape[-1] == 1 else picture
    axis.imshow(shown, cmap="gray", vmin=0, vmax=255, interpolation="nearest", extent=extent)


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches, apart from pyplot's own."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _write(path: Path, figure: Figure, **how: Any) -> None:
    from mediatorize.formats.tensors import write_beside

    write_beside(path, lambda beside: figure.savefig(beside, format="png", **how))


def calm(axis: Axes) -> None:
    """No frame but the two axes, a light grid."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(SOFT)
    axis.tick_params(colors=SOFT, labelsize=8)
    axis.grid(color="0.92", linewidth=0.8)
    axis.set_axisbelow(True)


def write_error_cost(path: Path, results: Sequence[RowResult]) -> None:
    """A PNG: sample error and the distance from the reference, against FLOPs and measured time.

    Args:
        results: the teacher first.
    """
    measures = [("sample error", [row.sample_error for row in results])]
    distances = [row.frechet_distance for row in results]
    if None not in distances:
        measures.append(("Frechet distance", [float(distance or 0) for distance in distances]))
    figure = new_figure(4.2 * len(measures), 3.4)
    for axis, (name, values) in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures, strict=True):
        ceiling = 1.15 * max(*values, 1e-6)
        for row, value in zip(results, values, strict=True):
            level, teacher = row.kind == "level", row is results[0]
            colour = INK if teacher else STUDENT if level else SCHEDULED
            if row.relative_time is not None and not teacher:
                axis.plot([100 * row.relative_flops, 100 * row.relative_time], [value] * 2, color=colour, linewidth=0.8, alpha=0.35)
                axis.plot(100 * row.relative_time, value, "o", color="white", markeredgecolor=colour, markersize=5.5)
            axis.plot(100 * row.relative_flops, value, "o" if level else "D", color=colour, markersize=6, clip_on=False)
            # levels are named above their marks, schedules at the lower left, if there is room: often one lies just below a level
            offset, side, edge = ((0, 5), "center", "bottom") if level or value < 0.1 * ceiling else ((-4, -3), "right", "top")
            place = (100 * row.relative_flops, value)
            axis.annotate(row.title, place, offset, textcoords="offset points", fontsize=8, color=colour, ha=side, va=edge)
        timed = any(row.relative_time is not None for row in results[1:])
        axis.set_xlabel(f"% of softmax's FLOPs{' (filled) and time (open)' if timed else ''}", fontsize=8.5, color=SOFT)
        axis.set_title(name, fontsize=10, loc="left", color=INK)
        axis.margins(x=0.12)
        axis.set_ylim(0, ceiling)
        calm(axis)
    _write(path, figure)


def write_error_calls(path: Path, results: Sequence[RowResult]) -> None:
    """A PNG: median error to the converged teacher, and the distance from the reference, against model calls: plans, and other solvers.

    Args:
        results: the teacher first, with its converged solution among them.
    """
    shown = [row for row in results if row.kind in ("plan", "solver") or row is results[0]]
    goal = next(row for row in results if row.kind == "converged")
    lines: dict[str, list[RowResult]] = {}
    for row in shown:
        method = "plan" if row.kind == "plan" else row.level.partition(",")[0] if row.kind == "solver" else f"{row.calls} steps"
        lines.setdefault(method, []).append(row)
    judged = goal.frechet_distance is not None
    figure = new_figure(4.6 * (1 + judged), 3.6)
    axes = figure.subplots(1, 1 + judged, squeeze=False)[0]
    for index, (method, rows) in enumerate(lines.items()):
        rows = sorted(rows, key=lambda row: row.calls)
        colour = SCHEDULED if method == "plan" else INK if rows[0] is results[0] else _shade(index, len(lines))
        look: dict[str, Any] = {"color": colour, "label": method, "linewidth": 2.2 if method == "plan" else 1.2, "markersize": 5}
        calls = [row.calls for row in rows]
        axes[0].plot(calls, [row.converged.median if row.converged else 0.0 for row in rows], "o-", **look)
        if judged:
            axes[1].plot(calls, [row.frechet_distance or 0.0 for row in rows], "o-", **look)
    axes[0].set_yscale("log")
    axes[0].set_title("median error to the converged teacher", fontsize=10, loc="left", color=INK)
    if judged:
        axes[1].axhline(goal.frechet_distance or 0.0, color=SOFT, linewidth=1, linestyle="--", label="the converged teacher")
        axes[1].set_title("Frechet distance", fontsize=10, loc="left", color=INK)
    ticks = sorted({row.calls for row in shown})
    for axis in axes:
        axis.set_xscale("log")
        axis.set_xticks(ticks, list(map(str, ticks)))
        axis.minorticks_off()
        axis.set_xlabel("model calls", fontsize=8.5, color=SOFT)
        calm(axis)
    axes[-1].legend(fontsize=8, frameon=False, labelcolor=INK)
    _write(path, figure)


def write_trajectory_errors(path: Path, results: Sequence[RowResult], noise_levels: Sequence[float]) -> None:
    """A PNG: |student - teacher| / |teacher| at each model call, noise to the left; a level of higher rank is darker.

    Args:
        results: the teacher first.
        noise_levels: of every model call.
    """
    figure = new_figure(6.4, 3.2)
    axis = figure.subplots()
    schedules = [row for row in results[1:] if row.kind == "schedule"]
    levels = [row for row in results[1:] if row.kind == "level"]
    shades = level_colours([read_level(row.level) for row in levels])
    for index, row in enumerate(schedules):
        colour = _shade(index, len(schedules), "Oranges")
        axis.plot(noise_levels, row.errors_by_call, color=colour, linewidth=1.6, label=row.title, linestyle="--")
    for row in levels:
        axis.plot(noise_levels, row.errors_by_call, color=shades[read_level(row.level)], linewidth=1.6, label=row.title)
    axis.invert_xaxis()
    axis.set_xlabel("noise level (1 noise, 0 data)", fontsize=8.5, color=SOFT)
    axis.set_title("distance from the teacher along the trajectory", fontsize=10, loc="left", color=INK)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8, frameon=False, labelcolor=INK)
    calm(axis)
    _write(path, figure)


def level_colours(levels: Sequence[Level]) -> dict[Level, Colour]:
    """A colour for every level, in the order of their rank: a higher one is darker, and the pretrained layer's is ink."""
    order = in_order(levels)
    return {level: INK if is_pretrained(level) else _shade(index, len(order)) for index, level in enumerate(order)}


def _shade(index: int, count: int, colours: str = "Blues") -> Colour:
    """One of `count` colours, from light to dark."""
    from matplotlib import colormaps

    return colormaps[colours](0.4 + 0.55 * (index + 0.5) / count)


MOST_OUTLINED = 120
"""Cells of a map with more columns have no lines between them."""


def write_schedule_map(path: Path, schedule: AnySchedule, title: str = "") -> None:
    """A PNG: the level of every layer (up) at every noise level (noise to the left); darker is dearer.

    Of a step-wise rule it shows the median sample.
    """
    if isinstance(schedule, RuleSchedule):
        schedule = schedule.usual
    figure = new_figure(6.4, 1.4 + _map_height(schedule.depth))
    axis = figure.subplots()
    _draw_map(axis, schedule.levels, schedule.edges)
    axis.set_title(title, fontsize=10, loc="left", color=INK)
    _write(path, figure)


def write_trajectory(
    path: Path, calls: Sequence[Levels], shown: Sequence[int], rows: Sequence[tuple[str, Pixels]], title: str = ""
) -> None:
    """A PNG: one trajectory's pictures after model calls, over the level of every layer (up) at every call.

    Args:
        calls: levels of the whole trajectory, in order.
        shown: the calls, from 0, after which there are pictures, at even distances.
        rows: a name, and a picture (height, width, channels) in bytes after each of these calls.
    """
    every = shown[1] - shown[0] if len(shown) > 1 else len(calls)
    first, last = shown[0] + 1.5 - every, len(calls) + 0.5  # call k is between k + 0.5 and k + 1.5
    tile = min(max(11 / len(shown), 0.4), 1.0)  # inches
    width = tile * (last - first) / every
    heights = [*[tile] * len(rows), _map_height(len(calls[0]))]
    below, gap = 0.5, 0.07
    size = width + 1.0, below + sum(heights) + gap * len(heights) + 0.3
    figure, axes, at = new_figure(*size), [], size[1] - 0.3
    figure.set_layout_engine("none")
    for height in heights:
        at -= height
        axes.append(figure.add_axes((0.9 / size[0], at / size[1], width / size[0], height / size[1])))
        at -= gap
    for axis, (name, pictures) in zip(axes, rows, strict=False):
        for call, picture in zip(shown, pictures, strict=True):
            left, right = call + 1.5 - every, call + 1.5
            _show(axis, picture, (left + 0.1 * every, right - 0.1 * every, 0.1, 0.9))
        axis.set(xlim=(first, last), ylim=(0, 1), aspect="auto", xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.set_ylabel(name, fontsize=8.5, color=SOFT, rotation=0, ha="right", va="center")
    _draw_map(axes[-1], calls)
    axes[-1].set_xlim(first, last)
    axes[0].set_title(title, fontsize=10, loc="left", color=INK)
    _write(path, figure, bbox_inches="tight")


def _map_height(depth: int) -> float:
    """Inches."""
    return 0.16 * max(depth, 6)


def _draw_map(axis: Axes, columns: Sequence[Levels], edges: Sequence[float] | None = None) -> None:
    """Draws levels of the layers in every column, and the legend beside them.

    Args:
        edges: noise levels between the columns; None: columns are model calls.
    """
    import numpy as np
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    used, depth = {level for levels in columns for level in levels}, len(columns[0])
    colours = level_colours(list(used))
    held = in_order(level for level in used if holds(level))
    colours |= {level: _shade(index, len(held) + 1, "Oranges") for index, level in enumerate(held)}
    order = list(colours)
    cells = np.array([[order.index(level) for level in levels] for levels in columns]).T  # (layers, columns)
    axis.pcolormesh(
        np.arange(len(columns) + 1) + 0.5 if edges is None else [0.0, *edges, 1.0],
        np.arange(depth + 1) - 0.5,
        cells,
        cmap=ListedColormap(list(colours.values())),
        vmin=-0.5,
        vmax=len(order) - 0.5,
        edgecolors="white",
        linewidth=0.4 if len(columns) <= MOST_OUTLINED else 0,
    )
    axis.set_ylabel("layer", fontsize=8.5, color=SOFT)
    axis.set_yticks(range(0, depth, max(1, depth // 7)))
    axis.tick_params(colors=SOFT, labelsize=8)
    axis.spines[:].set_visible(False)
    if edges is None:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axis.invert_xaxis()
    axis.set_xlabel("model call (noise to the left)" if edges is None else "noise level (1 noise, 0 data)", fontsize=8.5, color=SOFT)
    patches = [Patch(color=colour, label=title_of(level)) for level, colour in colours.items()]
    axis.legend(
        handles=patches,
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        title="level",
        title_fontsize=8,
    )


def write_redundancy(
    path: Path,
    effective_rank: Sequence[Sequence[Sequence[float]]],
    errors: Mapping[int, Sequence[Sequence[float]]],
    noise_levels: Sequence[float],
) -> None:
    """A PNG of heat maps, layers (up) by noise level (noise to the left). A layer's heads are stripes within it.

    Args:
        effective_rank: of attention, by layer, noise level and head.
        errors: by rank, of the best approximation of attention of that rank, by layer and noise level, in [0, 1].
        noise_levels: of the columns, descending.
    """
    import numpy as np

    ranks = np.asarray(effective_rank)  # (layers, noise levels, heads)
    stripes = ranks.transpose(0, 2, 1).reshape(-1, ranks.shape[1])
    panels: list[tuple[str, Any, float | None]] = [("effective rank, by head", stripes, None)]
    panels += [(f"error of best rank {rank}", np.asarray(values), 1.0) for rank, values in errors.items()]
    depth = len(effective_rank)
    figure = new_figure(1.2 + 2.6 * len(panels), 1.5 + 0.13 * max(depth, 8))
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (name, values, highest) in zip(axes, panels, strict=True):
        extent = (-0.5, len(noise_levels) - 0.5, -0.5, depth - 0.5)
        colours = "viridis" if highest is None else "magma"
        image = axis.imshow(
            values, origin="lower", aspect="auto", cmap=colours, vmin=0, vmax=highest, extent=extent, interpolation="nearest"
        )
        axis.set_title(name, fontsize=9.5, loc="left", color=INK)
        ticks = sorted({0, len(noise_levels) // 2, len(noise_levels) - 1})
        axis.set_xticks(ticks, [f"{noise_levels[tick]:.2f}" for tick in ticks])
        axis.tick_params(colors=SOFT, labelsize=8, left=axis is axes[0])
        axis.spines[:].set_visible(False)
        axis.set_xlabel("noise level", fontsize=8.5, color=SOFT)
        bar = figure.colorbar(image, ax=axis, fraction=0.05, pad=0.03)
        bar.ax.tick_params(labelsize=7, colors=SOFT)
        bar.outline.set_visible(False)
    axes[0].set_ylabel("layer", fontsize=8.5, color=SOFT)
    axes[0].set_yticks(range(0, depth, max(1, depth // 7)))
    _write(path, figure)


def _label_cells(axis: Any, noise_levels: Sequence[float], layers: int) -> None:
    """Noise levels along x, at most a dozen of them written, and layers along y."""
    every = -(-len(noise_levels) // 12)
    axis.set_xticks(range(0, len(noise_levels), every), [f"{level:.2g}" for level in noise_levels[::every]])
    axis.set_yticks(range(0, layers, -(-layers // 14)))


def write_error_table(path: Path, noise_levels: Sequence[float], levels: Sequence[Level], errors: NDArray[np.float64]) -> None:
    """A PNG of the error table: one panel per level beside softmax, layers by noise level, on one logarithmic scale.

    Args:
        errors: (cells, layers, levels), relative errors of the samples; NaN where a layer does not have the levels.
    """
    import numpy as np
    from matplotlib.colors import LogNorm

    cells, layers, _ = errors.shape
    figure = new_figure(max(8.0, 1.5 + len(levels) * (1.0 + 0.1 * cells)), max(2.6, 1.5 + 0.24 * layers))
    axes = figure.subplots(1, len(levels), squeeze=False, sharey=True)[0]
    positive = errors[errors > 0]
    low, high = (float(positive.min()), float(positive.max())) if positive.size else (1e-6, 1.0)
    scale = LogNorm(max(low, high / 1000), high)
    for axis, level, table in zip(axes, levels, np.moveaxis(errors, 2, 0), strict=True):
        image = axis.imshow(table.T.clip(min=scale.vmin), norm=scale, cmap="magma", aspect="auto", interpolation="nearest")
        _label_cells(axis, noise_levels, layers)
        axis.set_xticks(axis.get_xticks()[::2])
        axis.set(title=title_of(level), xlabel="noise level")
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="sample error")
    figure.suptitle("Sample error if only one layer at one noise level leaves softmax")
    _write(path, figure)


@dataclass(frozen=True)
class Point:
    """A candidate on the picture of error against cost."""

    kind: str
    label: str
    """Written beside it, where not empty."""
    cost: float
    error: float
    kept: bool
    baseline: bool
    """Whether one could have it without a search."""


def write_candidates(path: Path, points: Sequence[Point], cost_label: str, error_label: str) -> None:
    """A PNG of error against cost, kinds of candidates in their own colours, baselines joined by dashes, what was kept ringed."""
    from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter, StrMethodFormatter

    figure = new_figure(8.0, 5.0)
    axis = figure.subplots()
    kinds = list(dict.fromkeys(point.kind for point in points))
    for place, kind in enumerate(kinds):
        those = sorted((point for point in points if point.kind == kind and point.error > 0), key=lambda point: point.cost)
        marker, colour = "osD^vPX*"[place % 8], f"C{place % 10}"
        baseline = any(point.baseline for point in those)
        line, label = ("--", f"{kind} (baseline)") if baseline else ("", kind)
        place_of = [p.cost for p in those], [p.error for p in those]
        axis.plot(*place_of, marker + line, color=colour, label=label, markersize=7, alpha=1 if baseline else 0.6, linewidth=1.2)
        for point in those:
            if point.label:
                axis.annotate(point.label, (point.cost, point.error), xytext=(7, 5), textcoords="offset points", fontsize=9)
    kept = sorted((point for point in points if point.kept and point.error > 0), key=lambda point: point.cost)
    axis.plot([p.cost for p in kept], [p.error for p in kept], "-", color="0.4", linewidth=1, zorder=0)
    axis.plot([p.cost for p in kept], [p.error for p in kept], "o", color="black", fillstyle="none", markersize=14, label="kept")
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.margins(x=0.1, y=0.08)
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.grid(which="both", color="0.9", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.set(xlabel=cost_label, ylabel=error_label)
    axis.legend(frameon=False, fontsize=9)
    _write(path, figure)
