"""The report of `mediatorize calibrate`: words, JSON, schedule files and pictures."""

from __future__ import annotations

import json
import math
import statistics
from typing import TYPE_CHECKING, Any

from mediatorize.compression.costs import COSTS
from mediatorize.model.levels import is_pretrained, title
from mediatorize.report.tables import seconds_in_words, text_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mediatorize.compression.search import Candidate, Latency, Outcome, Outcomes
    from mediatorize.stages.calibrate import Calibration

LEAST_JUDGED = 3
"""The predictions are judged from this many measured candidates on."""


def words(result: Calibration) -> str:
    how, found, unit = result.sampler, result.found, COSTS[result.cost].name
    levels = ", ".join(title(level) for level in result.settings.all_levels)
    lines = [
        f"{result.arch.name}: levels {levels} in {result.arch.depth} layers at {len(result.costs.cells)} noise levels; "
        f"{how.solver}, {how.steps} steps, guidance {how.cfg_scale}",
        f"  possible budgets: {result.costs.least:.1%} to 100% of softmax's {unit}",
        *(f"  {note}" for note in result.notes),
    ]
    if found is None:
        seconds = seconds_in_words(result.estimated_seconds or 0.0)
        lines.append(
            f"Would measure errors on {result.trajectories} samples, then each candidate on {result.verify} samples. This would take "
            f"about {seconds} at this device's rate. Nothing was written."
        )
        return "\n".join(lines)
    lines += ["", _table(found, unit), _about_errors(result.verify), *_about_predictions(found.candidates), ""]
    for outcome in found.outcomes:
        best = outcome.chosen
        file = result.files[outcome.budget]
        lines.append(f"{file}: {best.name}, {best.share:.2%} of softmax's {unit} for a budget of {outcome.budget:.2%}")
        lines += [] if outcome.latency is None else [_about_time(outcome.latency)]
    table = "was there from before" if found.table_seconds is None else f"took {seconds_in_words(found.table_seconds)}"
    lines.append(f"The error table {table}. The whole command took {seconds_in_words(result.seconds)}. Pictures are in {result.folder}.")
    return "\n".join(lines)


def _table(found: Outcomes, unit: str) -> str:
    """A row per candidate, the dearest first."""
    rows = []
    for candidate in sorted(found.candidates, key=lambda candidate: (-candidate.share, candidate.error)):
        kept = ", ".join(f"{outcome.budget:.2%}" for outcome in found.outcomes if outcome.chosen is candidate)
        measured = "-" if candidate.measured is None else f"{candidate.measured:.4f}"
        rows.append((candidate.name, f"{candidate.share:.2%}", f"{candidate.predicted['vectors']:.4f}", measured, kept))
    return text_table(("candidate", f"of softmax's {unit}", "predicted error", "measured error", "kept for"), rows)


def _about_errors(verify: int) -> str:
    measured = f"The measured error is from {verify} held-out samples" if verify else "No error was measured (--verify 0)"
    return f"Error means sample error: |samples - teacher's samples| / |teacher's samples|. {measured}."


def _about_predictions(candidates: Sequence[Candidate]) -> list[str]:
    """How well each way of adding up errors predicted the measured candidates."""
    judged = [(candidate.predicted, candidate.measured) for candidate in candidates if candidate.measured]
    if len(judged) < LEAST_JUDGED:
        return []
    parts = []
    for way in judged[0][0]:
        logs = [math.log(predicted[way] / measured) for predicted, measured in judged]
        parts.append(f"as {way} {math.exp(statistics.fmean(logs)):.2f} (spread {statistics.pstdev(logs):.0%})")
    return [f"Predicted / measured error (geometric mean over candidates), if errors of single layers add up {', '.join(parts)}."]


def _about_time(took: Latency) -> str:
    return (
        f"  a batch of {took.batch}: predicted {took.predicted:.3f} s, measured {took.measured:.3f} s, softmax "
        f"{took.measured_softmax:.3f} s; measured / softmax {took.measured / took.measured_softmax:.1%}"
    )


def facts(result: Calibration) -> dict[str, Any]:
    found = result.found
    return {
        "bundle": str(result.bundle),
        "dry_run": found is None,
        "sampler": result.sampler.to_json(),
        "cost": result.cost,
        "noise_levels": len(result.costs.cells),
        "layers": result.arch.depth,
        "levels": list(result.settings.levels),
        "least_budget": result.costs.least,
        "trajectories": result.trajectories,
        "verified_samples": result.verify,
        "notes": list(result.notes),
        "schedules": [_outcome_facts(result, outcome) for outcome in found.outcomes] if found else [],
        "candidates": [_candidate_facts(candidate) for candidate in found.candidates] if found else [],
        "table_seconds": None if found is None or found.table_seconds is None else round(found.table_seconds, 1),
        "estimated_seconds": result.estimated_seconds,
        "seconds": round(result.seconds, 1),
    }


def _outcome_facts(result: Calibration, outcome: Outcome) -> dict[str, Any]:
    return {
        "budget": outcome.budget,
        "file": result.files[outcome.budget].name,
        "candidate": outcome.chosen.name,
        "relative_cost": outcome.chosen.share,
        "predicted_error": outcome.chosen.predicted["vectors"],
        "measured_error": outcome.chosen.measured,
        "solved_seconds": round(outcome.solved_seconds, 3),
        "latency": None if outcome.latency is None else vars(outcome.latency),
    }


def _candidate_facts(candidate: Candidate) -> dict[str, Any]:
    return {key: value for key, value in vars(candidate).items() if key != "choice"}


def schedule_text(result: Calibration, outcome: Outcome) -> str:
    """The text of a schedule's file: JSON. First what it was made for, then one line per piece."""
    how, best = result.sampler, outcome.chosen
    made_for = {
        "budget": outcome.budget,
        "cost": result.cost,
        "relative_cost": round(best.share, 6),
        "predicted_error": round(best.predicted["vectors"], 6),
        "measured_error": None if best.measured is None else round(best.measured, 6),
        "calibrated_for": {"solver": how.solver, "steps": how.steps, "cfg_scale": how.cfg_scale, "cfg_channels": how.cfg_channels},
        "weights_sha256": result.weights,
    }
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in made_for.items()]
    pieces = [f"    {json.dumps(piece)}" for piece in outcome.schedule.to_json()["pieces"]]
    return "{\n" + "\n".join(lines) + '\n  "pieces": [\n' + ",\n".join(pieces) + "\n  ]\n}\n"


def write_pictures(result: Calibration) -> None:
    """Into the calibration's folder: a map of every schedule, the error table, and error against cost of all candidates."""
    import numpy as np

    from mediatorize.compression.search import WHOLE
    from mediatorize.report.pictures import Point, write_candidates, write_error_table, write_schedule_map

    found, unit = result.found, COSTS[result.cost].name
    if found is None:
        return
    for outcome in found.outcomes:
        best = outcome.chosen
        caption = f"{result.arch.name}: {best.share:.1%} of softmax's {unit}, sample error {best.error:.3f}"
        write_schedule_map(result.folder / f"schedule-{result.files[outcome.budget].stem}.png", outcome.schedule, caption)
    added = [option for option, level in enumerate(found.table.options) if not is_pretrained(level)]
    levels = [found.table.options[option] for option in added]
    errors = np.sqrt(found.table.squares()[:, :, added])
    write_error_table(result.folder / "sensitivity.png", found.table.noise_levels, levels, errors)
    kept = {outcome.chosen.name for outcome in found.outcomes}
    points = [Point(c.kind, c.name if c.kind == WHOLE else "", c.share, c.error, c.name in kept) for c in found.candidates]
    error = "sample error" + (f", measured on {result.verify} samples" if result.verify else ", predicted")
    write_candidates(result.folder / "candidates.png", points, f"{unit} of the sampler, as a share of softmax's", error)
