"""Tables and figures as text."""

from __future__ import annotations

from collections.abc import Sequence

from mediatorize.model.levels import FULL, MODULATION, OWN, Level, MediatorSettings, layers_in_short, title


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


PARTS: dict[Level, str] = {
    MODULATION: "the change of the modulation",
    FULL: "the pretrained MLP",
    OWN: "the added levels' MLP",
}
"""Names of parts of a layer that are no levels of their own."""


def left_out(settings: MediatorSettings) -> str:
    """What the layers of a pruned model lack, part by part: such as `softmax attention in layers 2-4; m=16 in layers 0-5`."""
    depth = len(settings.kept or ())
    gone: dict[Level, list[int]] = {}
    for layer in range(depth):
        for part in settings.all_parts(layer):
            if part not in settings.parts(layer):
                gone.setdefault(part, []).append(layer)
    where = {part: f"layer{'s' * (len(layers) > 1)} {layers_in_short(layers)}" for part, layers in gone.items()}
    return "; ".join(f"{PARTS[part] if part in PARTS else title(part)} in {layers}" for part, layers in where.items()) or "nothing"
