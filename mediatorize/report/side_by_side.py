"""The report of `mediatorize compare`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mediatorize.evaluation.results import SideBySide, SideResult
from mediatorize.report.document import Block, Code, Document, Picture, Table, Text, markdown
from mediatorize.report.evaluation import first_pictures
from mediatorize.report.pictures import write_comparison
from mediatorize.report.tables import gmacs, text_table

if TYPE_CHECKING:
    from pathlib import Path

    from mediatorize.evaluation.side_by_side import Contestant

RESULT_FILE, TABLE_FILE, PICTURE_FILE = "comparison.json", "comparison.md", "comparison.png"

COLUMNS: tuple[tuple[str, Callable[[SideResult], str]], ...] = (
    ("model", lambda row: row.name),
    ("GMACs per sample", lambda row: gmacs(row.flops)),
    ("FLOPs / first", lambda row: f"{row.relative_flops:.1%}"),
    ("class accuracy", lambda row: _figure(row.accuracy, 3)),
    ("Frechet distance", lambda row: _figure(row.frechet_distance, 2)),
    ("precision", lambda row: _figure(row.precision, 3)),
    ("recall", lambda row: _figure(row.recall, 3)),
)


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def table(found: SideBySide) -> Table:
    """A row per model."""
    return Table([name for name, _ in COLUMNS], [[of(row) for _, of in COLUMNS] for row in found.results])


def title(found: SideBySide) -> str:
    how = found.sampler
    return (
        f"{found.name}: {found.samples} samples per model from the same noise, {how.solver} {how.steps} steps, guidance {how.cfg_scale:g}"
    )


def about(found: SideBySide) -> str:
    halves = found.distance_of_halves
    rough = "" if halves is None else f" Two halves of {found.reference} are {halves:.2f} apart."
    return f"Accuracy and distances are by {found.features}, compared with {found.reference}.{rough}"


def words(found: SideBySide) -> str:
    shown = table(found)
    files = ", ".join([TABLE_FILE, RESULT_FILE, *found.pictures])
    return "\n\n".join(
        [title(found), text_table(shown.header, shown.rows), about(found), *found.about_plans, f"Wrote {files} in {found.out}."]
    )


def facts(found: SideBySide) -> dict[str, Any]:
    return {
        "out": str(found.out),
        "name": found.name,
        "samples": found.samples,
        "sampling": found.sampler.to_json(),
        "results": [asdict(row) for row in found.results],
        "features": found.features,
        "reference": found.reference,
        "distance_of_halves": found.distance_of_halves,
        "pictures": dict(found.pictures),
        "command": found.command,
        "about_plans": list(found.about_plans),
    }


def write_pictures(out: Path, contestants: Sequence[Contestant], results: Sequence[SideResult]) -> dict[str, str]:
    """Writes the first samples of every model, where they are pictures: file name -> caption."""
    from mediatorize.formats.images import class_names

    shown = [first_pictures(one.samples, one.samples.rows[0]) for one in contestants]
    rows = [
        (row.name, pictures, f"{row.relative_flops:.0%} of FLOPs, distance {row.frechet_distance:.2f}")
        for row, pictures in zip(results, shown, strict=True)
        if pictures is not None
    ]
    if not rows:
        return {}
    (_, pictures, _), first = rows[0], contestants[0]
    classes = class_names(first.samples.labels[: len(pictures)].tolist(), first.models[0].arch.classes)
    write_comparison(out / PICTURE_FILE, rows, classes)
    return {PICTURE_FILE: "Samples; each column has the same noise and class"}


def write_report(found: SideBySide) -> None:
    """Writes the table for people as Markdown, and for machines as JSON."""
    from mediatorize.formats.bundle import write_json, write_text

    blocks: list[Block] = [table(found), Text(about(found))]
    blocks += [Picture(found.out / file, caption) for file, caption in found.pictures.items()]
    blocks += [Code(found.command)]
    write_text(found.out / TABLE_FILE, markdown(Document("Models side by side", f"{title(found)}.", blocks)))
    write_json(found.out / RESULT_FILE, facts(found))
