"""The words, tables and pictures of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from mediatorize.evaluation.results import Evaluation, RowResult
from mediatorize.report.document import Block, Code, Document, Heading, Picture, Table, Text
from mediatorize.report.tables import gmacs

Column = tuple[str, Callable[[RowResult], str | None]]


def _shown(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


COST: tuple[Column, ...] = (
    ("GMACs per sample", lambda row: gmacs(row.flops)),
    ("GFLOPs per sample", lambda row: gmacs(2 * row.flops)),
    ("FLOPs / softmax", lambda row: f"{row.relative_flops:.1%}"),
    ("time / softmax", lambda row: _shown(row.relative_time, ".1%")),
    ("time per model call, ms", lambda row: _shown(row.latency_ms, ".2f")),
    ("images per second", lambda row: _shown(row.images_per_second, ".2f")),
    ("peak memory, GiB", lambda row: None if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f}"),
)
QUALITY: tuple[Column, ...] = (
    ("trajectory error", lambda row: f"{row.trajectory_error:.3f}"),
    ("sample error", lambda row: f"{row.sample_error:.3f}"),
    ("class accuracy", lambda row: _shown(row.accuracy, ".3f")),
    ("Frechet distance", lambda row: _shown(row.frechet_distance, ".2f")),
    ("precision", lambda row: _shown(row.precision, ".3f")),
    ("recall", lambda row: _shown(row.recall, ".3f")),
)
SHORT = (COST[0], COST[2], COST[3], *QUALITY)


def table(found: Evaluation, columns: Sequence[Column], first: str = "level") -> Table:
    """A row per level or schedule; columns that no row has are left out."""
    cells = {name: [of(row) for row in found.results] for name, of in columns}
    kept = {name: values for name, values in cells.items() if any(value is not None for value in values)}
    rows = [(row.level, *(values[index] or "-" for values in kept.values())) for index, row in enumerate(found.results)]
    return Table((first, *kept), rows)


def title(found: Evaluation) -> str:
    how = found.sampling
    return (
        f"{found.name}: {found.samples} samples per level from the same noise, {how['solver']} {how['steps']} steps, "
        f"guidance {how['cfg_scale']:g}"
    )


def lead(found: Evaluation) -> str:
    """The figures that matter: of every schedule where there is one, else of the cheapest and the closest level."""
    teacher, *students = found.results
    if not students:
        judged = "" if teacher.frechet_distance is None else f" For the teacher, {_quality(teacher, found)}."
        return f"Only the pretrained model was judged: {gmacs(teacher.flops)} GMACs per sample.{judged}"
    scheduled = [row for row in students if not row.level.isdigit()]
    shown = scheduled or list({row.level: row for row in (min(students, key=_cost), min(students, key=_error))}.values())
    sentences = []
    for row in shown:
        name = f"With every layer at {row.level} mediator{'s' * (row.level != '1')}" if row.level.isdigit() else f"At {_named(row.level)}"
        time = "" if row.relative_time is None else f" and {row.relative_time:.0%} of its time per model call"
        text = (
            f"{name} the model spends {row.relative_flops:.1%} of softmax's FLOPs{time}; "
            f"from the same noise its samples differ from the teacher's by {row.sample_error:.1%}"
        )
        text += "" if row.frechet_distance is None else f"; {_quality(row, found)} (the teacher: {_brief(teacher)})"
        sentences.append(f"{text}.")
    if found.distance_of_halves is not None:
        sentences.append(f"Two halves of {found.reference} are {found.distance_of_halves:.2f} apart.")
    return " ".join(sentences)


def _named(schedule: str) -> str:
    return "its calibrated schedule" if schedule == "schedule" else f"schedule {schedule}"


def _cost(row: RowResult) -> float:
    return row.relative_flops


def _error(row: RowResult) -> float:
    return row.sample_error


def _quality(row: RowResult, found: Evaluation) -> str:
    accuracy = "" if row.accuracy is None else f" and {row.accuracy:.1%} are recognised as their class"
    return f"the Frechet distance to {found.reference} is {row.frechet_distance:.2f}{accuracy}"


def _brief(row: RowResult) -> str:
    accuracy = "" if row.accuracy is None else f" and {row.accuracy:.1%}"
    return f"{row.frechet_distance:.2f}{accuracy}"


def captions(results: Sequence[RowResult]) -> list[str]:
    """A line under each row's name in the comparison."""
    texts = []
    for row in results:
        distance = "" if row.frechet_distance is None else f", distance {row.frechet_distance:.2f}"
        accuracy = "" if row.accuracy is None else f", accuracy {row.accuracy:.3f}"
        texts.append(f"{row.relative_flops:.0%} of FLOPs{distance}{accuracy}")
    return texts


def document(found: Evaluation) -> Document:
    """The whole report."""
    how = found.sampling
    blocks: list[Block] = [Text(f"{title(found)}, seed {how['seed']}, {how['dtype']} on {found.hardware['device']}.")]
    blocks += _pictures(found, "comparison.png")
    blocks += [Heading("Cost"), table(found, COST), Text(_about_time(found)), Heading("Distance from the teacher, and quality")]
    blocks += [table(found, QUALITY), Text(_about_quality(found)), *_pictures(found, "error-cost.png", "trajectory.png")]
    maps = [file for file in found.pictures if file.startswith("schedule")]
    if maps:
        blocks += [Heading("Schedule"), *_pictures(found, *maps)]
    if found.notes:
        blocks += [Heading("Notes"), *(Text(note) for note in found.notes)]
    blocks += [Heading("Repeat it"), Code(found.command)]
    facts = [("samples", f"{found.samples}, classes in turn, sample i from noise (seed {how['seed']}, i)")]
    facts += [(name.replace("_", " "), str(value)) for name, value in {**how, **found.hardware}.items() if value is not None]
    facts += [("versions", ", ".join(f"{name} {version}" for name, version in found.versions.items()))]
    blocks += [Table(("setting", "value"), facts, words=True)]
    if found.source is not None:
        facts = [(name, str(value)) for name, value in found.source.items() if value]
        blocks += [Heading("Where the bundle comes from"), Table(("pretrained file", "value"), facts, words=True)]
        for entry in found.log:
            heading = f"{entry.get('time', '?')}  {entry.get('command', '?')}"
            blocks.append(Code(json.dumps(entry, indent=1), summary=heading))
    return Document(f"{found.name}, teacher and student", lead(found), blocks)


def _pictures(found: Evaluation, *files: str) -> list[Block]:
    return [
        Picture(found.out / file, found.pictures[file], wide=file in ("comparison.png", "error-cost.png"))
        for file in files
        if file in found.pictures
    ]


def _about_time(found: Evaluation) -> str:
    flops = "FLOPs count matrix products and convolutions, two per multiply-add (MAC); they are computed, not measured."
    if found.timing is None:
        return f"{flops} Time was not measured (--pairs 0)."
    timing = found.timing
    low, high = timing.control_quartiles
    memory = "" if any(row.peak_bytes for row in found.results) else " Peak memory is measured on CUDA devices only."
    return (
        f"{flops} Time: model calls on {timing.batch} samples, each beside one of softmax in turn, {timing.pairs} pairs per level; the "
        f"ratio is the median over pairs, and milliseconds are that ratio times softmax's median ({timing.softmax_ms:.2f} ms). Softmax "
        f"beside itself measures {timing.control:.1%} (quartiles {low:.1%} to {high:.1%}): differences within that mean nothing. A "
        f"schedule's time is the mean over its calls.{memory}"
    )


def _about_quality(found: Evaluation) -> str:
    text = (
        "Trajectory error is |student - teacher| / |teacher| of the state at each model call, over all samples, then the mean over calls; "
        "sample error is the same of the final samples. Both are 0 for level softmax, which is the pretrained model, and neither is a "
        "measure of how good pictures look."
    )
    if found.features is None:
        return f"{text} No features judged the samples (--features none)."
    halves = "" if found.distance_of_halves is None else f" Two halves of it are {found.distance_of_halves:.2f} apart."
    return (
        f"{text} Frechet distance (arXiv 1706.08500), precision and recall (arXiv 1904.06991, 3 neighbours) compare features of "
        f"{found.features} with those of {found.reference}.{halves} Such figures depend on the number of samples: compare them at equal "
        "numbers only."
    )
