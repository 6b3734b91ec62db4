"""Tables and figures as text."""

from __future__ import annotations

from collections.abc import Sequence

from mediatorize.model.levels import MediatorSettings, layers_in_short


def text_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        first, *others = zip(row, widths, strict=True)
        lines.append("  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip())
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def gmacs(flops: float) -> str:
    """Billions of multiply-adds, two decimals or, of a small number, three digits."""
    return f"{flops / 2e9:.2f}" if flops >= 2e9 else f"{flops / 2e9:.3g}"


def seconds_in_words(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def layers_in_words(settings: MediatorSettings, depth: int) -> str:
    """The converted layers of a model of `depth` layers: `28 layers` where they are all, else such as `layers 0-3,8 of 28`."""
    return f"{depth} layers" if settings.layers is None else f"layers {layers_in_short(settings.layers)} of {depth}"
