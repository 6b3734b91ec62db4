"""The report of `mediatorize evaluate`: words, facts, tables, pictures, and the whole document."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mediatorize.compression.costs import COSTS
from mediatorize.evaluation.results import OWN_SCHEDULE, Evaluation, RowResult
from mediatorize.model.schedule import RuleSchedule
from mediatorize.report.calibration import CANDIDATES_FILE
from mediatorize.report.document import Block, Code, Document, Heading, Picture, Sides, Table, Text, markdown
from mediatorize.report.html import html_page
from mediatorize.report.pictures import (
    write_comparison,
    write_error_calls,
    write_error_cost,
    write_schedule_map,
    write_trajectory,
    write_trajectory_errors,
)
from mediatorize.report.sampling import began_in_words
from mediatorize.report.tables import gmacs, text_table

if TYPE_CHECKING:
    from mediatorize.diffusion.sampling import Sampler
    from mediatorize.evaluation.comparison import Row, Samples
    from mediatorize.evaluation.features import Pictures
    from mediatorize.model.transformer import DiffusionTransformer

RESULT_FILE = "evaluation.json"

SHEET = "pictures-"
"""How files of one row's pictures begin; the teacher's is the first."""

Column = tuple[str, Callable[[RowResult], str | None]]


def _shown(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _interval(row: RowResult) -> str | None:
    return None if row.converged is None or row.converged.interval is None else "{:.4f}-{:.4f}".format(*row.converged.interval)


COST: tuple[Column, ...] = (
    ("model calls", lambda row: str(row.calls)),
    ("GMACs per sample", lambda row: gmacs(row.flops)),
    ("GFLOPs per sample", lambda row: gmacs(2 * row.flops)),
    ("FLOPs / softmax", lambda row: f"{row.relative_flops:.1%}"),
    ("time / softmax", lambda row: _shown(row.relative_time, ".1%")),
    ("time per model call, ms", lambda row: _shown(row.latency_ms, ".2f")),
    ("images per second", lambda row: _shown(row.images_per_second, ".2f")),
    ("peak memory, GiB", lambda row: None if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f}"),
)
QUALITY: tuple[Column, ...] = (
    ("error to the converged teacher", lambda row: None if row.converged is None else f"{row.converged.median:.4f}"),
    ("95% interval", lambda row: _interval(row)),
    ("flipped", lambda row: None if row.converged is None else f"{row.converged.flipped:.1%}"),
    ("trajectory error", lambda row: _shown(row.trajectory_error, ".3f")),
    ("sample error", lambda row: f"{row.sample_error:.3f}"),
    ("class accuracy", lambda row: _shown(row.accuracy, ".3f")),
    ("Frechet distance", lambda row: _shown(row.frechet_distance, ".2f")),
    ("precision", lambda row: _shown(row.precision, ".3f")),
    ("recall", lambda row: _shown(row.recall, ".3f")),
)
SHORT = (COST[0], COST[1], COST[3], COST[4], QUALITY[0], *QUALITY[3:])


def words(found: Evaluation) -> str:
    """For the terminal."""
    short = table(found, SHORT)
    files = ", ".join(["report.html", "report.md", RESULT_FILE, *found.pictures, *found.arrays])
    blocks = [title(found), text_table(short.header, short.rows), *rules(found), lead(found), *notes(found)]
    return "\n\n".join([*blocks, f"Wrote {files} in {found.out}."])


def facts(found: Evaluation) -> dict[str, Any]:
    """For machines: what `--json` prints and `evaluation.json` holds."""
    return {
        "model": found.model,
        "name": found.name,
        "out": str(found.out),
        "samples": found.samples,
        "sampling": _sampling(found),
        "command": found.command,
        "results": [asdict(row) for row in found.results],
        "timing": None if found.comparison.timing is None else asdict(found.comparison.timing),
        "features": found.comparison.features,
        "reference": found.comparison.reference,
        "distance_of_halves": found.comparison.distance_of_halves,
        "hardware": dict(found.hardware),
        "versions": dict(found.versions),
        "source": None if found.source is None else dict(found.source),
        "log": [dict(entry) for entry in found.log],
        "notes": notes(found),
        "pictures": dict(found.pictures),
        "arrays": list(found.arrays),
        "noise_levels": list(found.noise_levels),
    }


def _sampling(found: Evaluation) -> dict[str, Any]:
    own = {"batch": found.batch, "dtype": found.dtype, "processes": found.processes, "vae": found.vae}
    return found.sampler.to_json() | own


def notes(found: Evaluation) -> list[str]:
    """Warnings about these figures."""
    told = list(found.about_plans)
    width = found.comparison.feature_width
    if width is None or width < found.samples:
        return told
    return [
        *told,
        f"Frechet distances of {found.samples} samples in {width} features are far too rough. Take several times as many samples.",
    ]


def table(found: Evaluation, columns: Sequence[Column], first: str = "row") -> Table:
    """A row per way of sampling; columns that no row has are left out."""
    cells = {name: [of(row) for row in found.results] for name, of in columns}
    kept = {name: values for name, values in cells.items() if any(value is not None for value in values)}
    rows = [(row.title, *(values[index] or "-" for values in kept.values())) for index, row in enumerate(found.results)]
    return Table((first, *kept), rows)


def rules(found: Evaluation) -> list[str]:
    """When step-wise rules switched, a paragraph each."""
    told = [(row.title, began_in_words(row.began, found.samples)) for row in found.results if row.began]
    return ["\n".join([f"{title}, each stage by the step that it began with:", *lines]) for title, lines in told]


def title(found: Evaluation) -> str:
    how = found.sampler
    return f"{found.name}: {found.samples} samples per row from the same noise, {how.solver} {how.steps} steps, guidance {how.cfg_scale:g}"


def lead(found: Evaluation) -> str:
    """The figures that matter, a paragraph for every plan and schedule; without any, for the cheapest and the closest level."""
    teacher, *students = found.results
    if not students:
        judged = "" if teacher.frechet_distance is None else f" For the teacher, {_quality(teacher, found)}."
        return f"Only the pretrained model was judged: {gmacs(teacher.flops)} GMACs per sample.{judged}"
    scheduled = [row for row in students if row.kind == "schedule"]
    cheapest = min(students, key=lambda row: row.relative_flops)
    closest = min(students, key=lambda row: row.sample_error)
    plans = [row for row in students if row.kind == "plan"]
    shown = scheduled or ([] if plans else [cheapest, *([closest] if closest is not cheapest else [])])
    sentences = _about_plans(found, plans)
    for row in shown:
        time = "" if row.relative_time is None else f" and {row.relative_time:.0%} of softmax's time per model call"
        text = (
            f"{_how(row)}, the model uses {row.relative_flops:.1%} of softmax's FLOPs{time}. "
            f"From the same noise, its samples differ from the teacher's by {row.sample_error:.1%}"
        )
        text += "" if row.frechet_distance is None else f"; {_quality(row, found)} (the teacher: {_brief(teacher)})"
        sentences.append(f"{text}.")
    if found.comparison.distance_of_halves is not None:
        sentences.append(f"The distance between two halves of {found.comparison.reference} is {found.comparison.distance_of_halves:.2f}.")
    return "\n\n".join(sentences)


def _about_plans(found: Evaluation, plans: Sequence[RowResult]) -> list[str]:
    """A paragraph for every plan: what it costs, how near it is, and the best that another solver does with as many calls."""
    teacher, solvers = found.results[0], [row for row in found.results if row.kind == "solver"]
    sentences = []
    for row in plans:
        assert row.converged is not None, "plans come with the converged teacher"
        time = "" if row.relative_time is None else f" and {row.relative_time:.1%} of their time"
        text = (
            f"The {row.title} takes {row.relative_flops:.1%} of the FLOPs of {teacher.calls} calls{time}. Its median distance to the "
            f"converged teacher is {row.converged.median:.4f}"
        )
        beside = [each for each in solvers if each.calls == row.calls and each.converged is not None]
        best = min(beside, key=lambda each: each.converged.median if each.converged else 0.0, default=None)
        if best is not None and best.converged is not None:
            text += f"; the best other solver of the tool has {best.converged.median:.4f} ({best.level})"
            text += ", which is nearer" if best.converged.median < row.converged.median else ""
        text += f"; {teacher.calls} calls of {found.sampler.solver} have {teacher.converged.median:.4f}" if teacher.converged else ""
        text += "" if row.frechet_distance is None else f"; {_quality(row, found)} ({_beside_it(found)})"
        sentences.append(f"{text}.")
    return sentences


def _beside_it(found: Evaluation) -> str:
    goal = next((row for row in found.results if row.kind == "converged"), found.results[0])
    return f"the converged teacher: {_brief(goal)}"


def _how(row: RowResult) -> str:
    if row.kind == "level":
        return f"With the whole model at {row.title}"
    return "At its calibrated schedule" if row.level == OWN_SCHEDULE else f"At schedule {row.title}"


def _quality(row: RowResult, found: Evaluation) -> str:
    accuracy = "" if row.accuracy is None else f" and {row.accuracy:.1%} of samples are recognised as their class"
    return f"the Frechet distance to {found.comparison.reference} is {row.frechet_distance:.2f}{accuracy}"


def _brief(row: RowResult) -> str:
    accuracy = "" if row.accuracy is None else f" and {row.accuracy:.1%}"
    return f"{row.frechet_distance:.2f}{accuracy}"


# --- pictures ------------------------------------------------------------------------------------------------------------------


def write_pictures(
    out: Path,
    samples: Samples,
    results: Sequence[RowResult],
    model: DiffusionTransformer,
    sampler: Sampler,
    calibration: Path | None = None,
) -> dict[str, str]:
    """Writes the pictures of the report: file name -> caption.

    Args:
        results: of the samples' rows.
        calibration: the folder of the bundle's calibration.
    """
    from mediatorize.evaluation.comparison import calls_of_sample_0, shown_calls
    from mediatorize.formats.images import class_names, write_grid
    from mediatorize.formats.tensors import write_beside

    written = {}
    shown = _shown_pictures(samples)
    noise_levels = sampler.noise_levels(model.arch)
    titles = [f"teacher ({results[0].title})", *(row.title for row in results[1:])]
    if shown is not None:
        classes = class_names(samples.labels[: len(shown[0])].tolist(), model.arch.classes)
        write_comparison(out / "comparison.png", list(zip(titles, shown, captions(results), strict=True)), classes)
        written["comparison.png"] = "Samples; each column has the same noise and class"
        for row, name, pictures in zip(samples.rows, titles, shown, strict=True):
            file = f"{SHEET}{row.file_name}.png"
            side = pictures.shape[1]
            write_grid(out / file, pictures, 10 if side <= SMALL else 4, max(1, 64 // side), classes)
            written[file] = name
    if any(row.kind == "plan" for row in results):
        write_error_calls(out / "error-calls.png", results)
        written["error-calls.png"] = "Error against model calls, of plans and of solvers"
    levels = [row for row in results if row.kind in ("level", "schedule")]
    if len(levels) > 1:
        write_error_cost(out / "error-cost.png", levels)
        written["error-cost.png"] = "Error against cost of each level and schedule"
    if sum(bool(row.errors_by_call) for row in results) > 1:
        write_trajectory_errors(out / "trajectory.png", results, noise_levels)
        written["trajectory.png"] = "Distance of each level and schedule from the teacher, along the trajectory"
    scheduled = [row for row in samples.rows if row.kind == "schedule"]
    for index, row in enumerate(scheduled):
        file = f"schedule-{index}.png" if index else "schedule.png"
        if shown is None:
            assert not isinstance(row.levels, int | str), "the row is a schedule"
            write_schedule_map(out / file, row.levels, row.name)
            sample = ", in the median of the samples that the rule was calibrated on" if isinstance(row.levels, RuleSchedule) else ""
            written[file] = f"{row.name}: the level of every layer{sample}"
            continue
        calls = calls_of_sample_0(model, samples, row, sampler)
        after = shown_calls(len(calls))
        states = [(name, samples.states(one)) for name, one in (("teacher", samples.rows[0]), ("student", row))]
        write_trajectory(out / file, calls, after, states, row.name)
        which = "each call" if len(after) == len(calls) else f"every {after[1] - after[0]} calls"
        written[file] = f"{row.name}: the first sample after {which}; below, what every layer runs in every call"
    candidates = None if calibration is None else calibration / CANDIDATES_FILE
    if candidates is not None and candidates.exists():
        write_beside(out / CANDIDATES_FILE, lambda beside: shutil.copyfile(candidates, beside))
        written[CANDIDATES_FILE] = "The calibration's candidates: baselines are joined by dashes, what was kept is ringed"
    return written


SMALL = 64
"""Pictures of at most so many pixels a side are small: more of them are shown."""


def _shown_pictures(samples: Samples) -> list[Pictures] | None:
    """The first samples of every row, where they are pictures."""
    shown = (first_pictures(samples, row) for row in samples.rows)
    return [pictures for pictures in shown if pictures is not None] or None


def first_pictures(samples: Samples, row: Row) -> Pictures | None:
    """The first samples of a row, where they are pictures: twenty small ones or eight large."""
    _, height, _, channels = next(samples.pictures(row)).shape
    return _first(samples.pictures(row), 20 if height <= SMALL else 8) if channels in (1, 3) else None


def _first(parts: Iterator[Pictures], count: int) -> Pictures:
    """The first `count` pictures of all parts together, or as many as there are."""
    import numpy as np

    kept: list[Pictures] = []
    while sum(map(len, kept)) < count and (part := next(parts, None)) is not None:
        kept.append(part)
    return np.concatenate(kept)[:count]


def captions(results: Sequence[RowResult]) -> list[str]:
    """A line under each row's name in the comparison."""
    texts = []
    for row in results:
        distance = "" if row.frechet_distance is None else f", distance {row.frechet_distance:.2f}"
        accuracy = "" if row.accuracy is None else f", accuracy {row.accuracy:.3f}"
        texts.append(f"{row.relative_flops:.0%} of FLOPs{distance}{accuracy}")
    return texts


# --- the report ----------------------------------------------------------------------------------------------------------------


def write_report(found: Evaluation) -> None:
    """Writes the report beside its pictures: for people as HTML and Markdown, for machines as JSON."""
    from mediatorize.formats.bundle import write_json, write_text

    text = document(found)
    write_text(found.out / "report.md", markdown(text))
    write_text(found.out / "report.html", html_page(text))
    write_json(found.out / RESULT_FILE, facts(found))


def document(found: Evaluation) -> Document:
    """The whole report."""
    how = f"{title(found)}, seed {found.sampler.seed}, {found.dtype} on {found.hardware['device']}."
    blocks: list[Block] = [Text(how), *_sides(found), *_pictures(found, "comparison.png")]
    blocks += [Heading("Cost"), table(found, COST), Text(_about_time(found)), Heading("Distance from the teacher, and quality")]
    blocks += [table(found, QUALITY), Text(_about_quality(found)), *_pictures(found, "error-calls.png", "error-cost.png", "trajectory.png")]
    maps = [file for file in found.pictures if file.startswith("schedule")]
    if maps:
        blocks += [Heading("Schedules" if len(maps) > 1 else "Schedule"), *_pictures(found, *maps), *map(Text, rules(found))]
    if calibration := [*_calibrated(found.log), *_pictures(found, CANDIDATES_FILE)]:
        blocks += [Heading("Calibration, and what one would have without it"), *calibration]
    if notes(found):
        blocks += [Heading("Notes"), *(Text(note) for note in notes(found))]
    blocks += [Heading("Repeat it"), Code(found.command)]
    settings = [("samples", f"{found.samples}, classes in turn, sample i from noise (seed {found.sampler.seed}, i)")]
    settings += [
        (name.replace("_", " "), str(value)) for name, value in {**_sampling(found), **found.hardware}.items() if value is not None
    ]
    settings += [("versions", ", ".join(f"{name} {version}" for name, version in found.versions.items()))]
    blocks += [Table(("setting", "value"), settings, words=True)]
    if found.source is not None:
        origin = [(name, value) for name, value in found.source.items() if value]
        blocks += [Heading("Where the bundle comes from"), Table(("pretrained file", "value"), origin, words=True)]
        for entry in found.log:
            heading = f"{entry.get('time', '?')}  {entry.get('command', '?')}"
            blocks.append(Code(json.dumps(entry, indent=1), summary=heading))
    return Document(f"{found.name}, teacher and student", lead(found), blocks)


def _calibrated(log: Sequence[Mapping[str, Any]]) -> list[Block]:
    """What was kept for every budget since the weights changed last, and the best of each kind of baseline within it.

    Args:
        log: of the bundle.
    """
    blocks: list[Block] = []
    seen: set[str] = set()  # a file that was calibrated again holds the later schedule
    for entry in takewhile(lambda entry: entry.get("command") == "calibrate", reversed(log)):
        if not entry["result"]["schedules"]:  # it was for plans, which say themselves what they are worth
            continue
        how, cost, rows = entry["arguments"]["sampler"], COSTS[entry["arguments"]["cost"]].name, []
        for schedule in (schedule for schedule in entry["result"]["schedules"] if schedule["file"] not in seen):
            seen.add(schedule["file"])
            for place, each in enumerate(schedule["reported"]):
                name, what = (each["kind"], "baseline") if place else (schedule["file"], each["kind"])
                spent = each["relative_cost"] if each["share"] is None else each["share"]
                errors = f"{each['median']:.4f}", f"{each['mean']:.4f}", f"{each['flipped']:.0%}"
                rows.append((name, f"{schedule['budget']:.2%}", f"{spent:.2%}", *errors, what))
        if rows:
            count = max(each["samples"] for schedule in entry["result"]["schedules"] for each in schedule["reported"])
            header = ("schedule or baseline", "budget", f"{cost} / softmax", "median error", "mean error", "flipped", "what it is")
            about = (
                f"Calibrated for {how['solver']}, {how['steps']} steps, guidance {how['cfg_scale']:g}. Under each schedule stands the best "
                f"baseline of each kind within its budget. An error is |sample - teacher's| / |teacher's| of one of {count} samples from "
                "noise that nothing was chosen by. A sample has flipped where its error is above 0.5."
            )
            blocks += [Text(about), Table(header, rows)]
    return blocks


def _sides(found: Evaluation) -> list[Block]:
    """The teacher's pictures, and over them those of a student, where there are both."""
    sheets = [Picture(found.out / file, caption) for file, caption in found.pictures.items() if file.startswith(SHEET)]
    caption = "The same noise and class at each place. Move the line to see the teacher to its left and the student to its right."
    return [Sides(sheets[0], sheets[1:], caption)] if len(sheets) > 1 else []


def _pictures(found: Evaluation, *files: str) -> list[Block]:
    return [
        Picture(found.out / file, found.pictures[file], wide=not file.startswith("trajectory")) for file in files if file in found.pictures
    ]


def _about_time(found: Evaluation) -> str:
    flops = "FLOPs count matrix products and convolutions; one multiply-add (MAC) is two. They are computed, not measured."
    if found.comparison.timing is None:
        return f"{flops} Time was not measured (--pairs 0)."
    timing = found.comparison.timing
    low, high = timing.control_quartiles
    memory = "" if any(row.peak_bytes for row in found.results) else " Peak memory is measured on CUDA devices only."
    return (
        f"{flops} Time: each model call on {timing.batch} samples is paired with a softmax call, {timing.pairs} pairs per level. The "
        f"ratio is the median over pairs, added up over a sample's calls. Milliseconds are that ratio times softmax's median "
        f"({timing.softmax_ms:.2f} ms). Softmax "
        f"paired with itself measures {timing.control:.1%} (quartiles {low:.1%} to {high:.1%}): differences within that mean nothing. A "
        f"schedule's time is the mean over its calls.{memory}"
    )


def _about_quality(found: Evaluation) -> str:
    goal = next((row for row in found.results if row.kind == "converged"), None)
    converged = (
        ""
        if goal is None
        else f"The converged teacher is the pretrained model's own solution, of {goal.calls} calls. Errors to it are medians of single "
        "samples' |sample - its| / |its|; a sample has flipped where its own is above 0.5. "
    )
    text = (
        f"{converged}Trajectory error is |student - teacher| / |teacher| of the state at each model call, over all samples, then the mean "
        "over calls. "
        f"Sample error is the same ratio for the final samples. Both are to the first row, {found.sampler.solver} with "
        f"{found.sampler.steps} steps. Neither measures how good pictures look."
    )
    judged = found.comparison
    if judged.features is None:
        return f"{text} The samples were not judged by features (--features none)."
    halves = "" if judged.distance_of_halves is None else f" The distance between two halves of it is {judged.distance_of_halves:.2f}."
    return (
        f"{text} Frechet distance (arXiv 1706.08500), precision and recall (arXiv 1904.06991, 3 neighbours) compare features of "
        f"{judged.features} with those of {judged.reference}.{halves} Such figures depend on the number of samples: compare them only at "
        "equal numbers."
    )
