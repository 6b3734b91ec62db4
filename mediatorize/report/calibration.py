"""The report of `mediatorize calibrate`: words, JSON, schedule files and pictures."""

from __future__ import annotations

import json
import math
import statistics
from typing import TYPE_CHECKING, Any

from mediatorize.compression.costs import COSTS
from mediatorize.model.levels import is_pretrained, title
from mediatorize.model.schedule import RuleSchedule
from mediatorize.planning.results import Planned
from mediatorize.report import plans
from mediatorize.report.sampling import began_in_words
from mediatorize.report.tables import layers_in_words, seconds_in_words, text_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mediatorize.compression.judging import Candidate, Errors
    from mediatorize.compression.search import Latency, Outcome, Outcomes
    from mediatorize.stages.calibrate import Calibration

CANDIDATES_FILE = "candidates.png"
"""In the calibration's folder: error against cost of all candidates."""

LEAST_JUDGED = 3
"""The predictions are judged from this many measured candidates on."""


def words(result: Calibration | Planned) -> str:
    if isinstance(result, Planned):
        return plans.words(result)
    how, found, unit = result.sampler, result.found, COSTS[result.cost].name
    levels = ", ".join(title(level) for level in (*result.settings.all_levels, *result.settings.mlp_levels))
    calls = len(result.costs.noise_levels)
    lines = [
        f"{result.arch.name}: levels {levels} in {layers_in_words(result.settings, result.arch.depth)}, {calls} model calls; "
        f"{how.solver}, {how.steps} steps, guidance {how.cfg_scale}",
        f"  possible budgets: {result.costs.least(result.kinds):.1%} to 100% of softmax's {unit}, with {', '.join(result.kinds)}",
    ]
    lines += [f"  {note}" for note in result.notes]
    if found is None:
        seconds = seconds_in_words(result.estimated_seconds or 0.0)
        lines.append(
            f"Would measure errors on {result.trajectories} samples, then each candidate on {result.verify} samples. This would take "
            f"about {seconds} at this device's rate, and up to {(result.estimated_bytes or 0) / 2**30:.1f} GiB. Nothing was written."
        )
        return "\n".join(lines)
    lines += ["", _table(found, unit), _about_errors(result), *_about_predictions(found.candidates), ""]
    for outcome in found.outcomes:
        lines += _about(result, outcome, unit)
    table = "was there from before" if found.table_seconds is None else f"took {seconds_in_words(found.table_seconds)}"
    lines.append(f"The error table {table}. The whole command took {seconds_in_words(result.seconds)}. Pictures are in {result.folder}.")
    return "\n".join(lines)


def _table(found: Outcomes, unit: str) -> str:
    """For every budget the best candidate of each kind, the dearest first."""
    shown: dict[str, Candidate] = {}
    for outcome in found.outcomes:
        within = [candidate for candidate in found.candidates if candidate.keeps(outcome.budget) or candidate is outcome.chosen]
        for kind in dict.fromkeys(candidate.kind for candidate in within):
            best = min((c for c in within if c.kind == kind), key=lambda candidate: candidate.error)
            shown[best.name] = best
    rows = []
    for candidate in sorted(shown.values(), key=lambda candidate: (-candidate.share, candidate.error)):
        kept = ", ".join(f"{outcome.budget:.2%}" for outcome in found.outcomes if outcome.chosen is candidate)
        predicted = f"{candidate.predicted['vectors']:.4f}" if candidate.predicted else "-"
        errors = candidate.measured
        told = ("-",) * 3 if errors is None else (f"{errors.median:.4f}", f"{errors.mean:.4f}", f"{errors.flipped:.0%}")
        rows.append((candidate.kind, candidate.name, f"{candidate.share:.2%}", predicted, *told, kept))
    header = ("kind", "best of its kind", f"of softmax's {unit}", "predicted", "median error", "mean", "flipped", "kept for")
    return text_table(header, rows)


def _about_errors(result: Calibration) -> str:
    candidates = result.found.candidates if result.found else ()
    counts = sorted({c.measured.samples for c in candidates if c.measured})
    far = sum(candidate.measured is None for candidate in candidates) if result.verify else 0
    counted = f"{len(candidates) - far} candidates were tried." + (
        f" {far} more were not sampled: others are predicted to be better." if far else ""
    )
    few = f", or of {counts[0]} where those were enough to drop a candidate" if len(counts) > 1 else ""
    measured = (
        f"Errors are of {result.verify} samples{few}; candidates are compared by the geometric mean"
        if result.verify
        else "No error was measured (--verify 0)"
    )
    return (
        f"Error means a sample's |sample - teacher's sample| / |teacher's sample|. {measured}. A sample has flipped where it is above 0.5. "
        f"{counted}"
    )


def _about_predictions(candidates: Sequence[Candidate]) -> list[str]:
    """How well errors were predicted, adding up changes as vectors."""
    judged = [(c.predicted["vectors"], c.measured.mean) for c in candidates if c.predicted and c.measured and c.measured.mean]
    if len(judged) < LEAST_JUDGED:
        return []
    logs = [math.log(predicted / measured) for predicted, measured in judged if predicted]
    if not logs:
        return []
    return [
        f"Predicted / measured mean error: {math.exp(statistics.fmean(logs)):.2f} (geometric mean over candidates, spread "
        f"{statistics.pstdev(logs):.0%})."
    ]


def _about(result: Calibration, outcome: Outcome, unit: str) -> list[str]:
    """What was kept for a budget, and what one would have without the search."""
    best = outcome.chosen
    lines = [
        f"{result.files[outcome.budget]}: {best.kind}, {best.share:.2%} of softmax's {unit} for a budget of {outcome.budget:.2%}: "
        f"{best.name}"
    ]
    if best.steps != result.sampler.steps:
        lines.append(f"  fewer steps are best here: sample with --steps {best.steps}")
    if outcome.reported:
        own = outcome.reported[best.name]
        spent = "" if own.share is None else f", {own.share:.2%} of softmax's {unit}"
        spent += ", which is above the budget" if own.share is not None and own.share > outcome.budget else ""
        told = f"  on other noise: median error {own.median:.4f}, mean {own.mean:.4f}, {own.flipped:.0%} flipped{spent}"
        others = [f"{c.kind} {outcome.reported[c.name].median:.4f}" for c in outcome.baselines if c.name != best.name]
        lines.append(told + (f"; baselines' medians: {', '.join(others)}" if others else ""))
        better = [c for c in outcome.baselines if outcome.reported[c.name].geometric < own.geometric]
        if better:
            lines.append(f"  on this noise a baseline is better: {', '.join(c.name for c in better)}")
    if isinstance(best.schedule, RuleSchedule):
        lines.append("  the step-wise rule, each sample for itself; on the trajectories that it was tuned on:")
        lines += [f"  {line}" for line in began_in_words(best.schedule.began(best.switches), len(best.switches))]
        if (other := _beside(result, outcome)) is not None:
            told = "" if other.measured is None else f", median error {other.measured.median:.4f}"
            lines.append(f"  beside it, {other.kind}, {other.share:.2%} of softmax's {unit}{told}: {other.name}")
    lines += [] if outcome.latency is None else [_about_time(outcome.latency)]
    return lines


def _beside(result: Calibration, outcome: Outcome) -> Candidate | None:
    """The best other candidate for the budget of a rule; all were judged on the same noise."""
    assert result.found is not None, "there is an outcome"
    others = [c for c in result.found.candidates if not isinstance(c.schedule, RuleSchedule) and c.keeps(outcome.budget)]
    return min(others, key=lambda candidate: candidate.error, default=None)


def _about_time(took: Latency) -> str:
    return (
        f"  a batch of {took.batch}: predicted {took.predicted:.3f} s, measured {took.measured:.3f} s, softmax "
        f"{took.measured_softmax:.3f} s; measured / softmax {took.measured / took.measured_softmax:.1%}"
    )


def facts(result: Calibration | Planned) -> dict[str, Any]:
    if isinstance(result, Planned):
        return plans.facts(result)
    found = result.found
    return {
        "bundle": str(result.bundle),
        "dry_run": found is None,
        "sampler": result.sampler.to_json(),
        "cost": result.cost,
        "calls": len(result.costs.noise_levels),
        "kinds": list(result.kinds),
        "layers": result.arch.depth,
        "levels": list(result.settings.levels),
        "converted_layers": list(result.settings.converted(result.arch.depth)),
        "least_budget": result.costs.least(result.kinds),
        "trajectories": result.trajectories,
        "verified_samples": result.verify,
        "notes": list(result.notes),
        "schedules": [_outcome_facts(result, outcome) for outcome in found.outcomes] if found else [],
        "candidates": [_candidate_facts(candidate) for candidate in found.candidates] if found else [],
        "table_seconds": None if found is None or found.table_seconds is None else round(found.table_seconds, 1),
        "estimated_seconds": result.estimated_seconds,
        "estimated_bytes": result.estimated_bytes,
        "seconds": round(result.seconds, 1),
    }


def _outcome_facts(result: Calibration, outcome: Outcome) -> dict[str, Any]:
    schedule = outcome.schedule
    rule = None if not isinstance(schedule, RuleSchedule) else schedule.to_json()["rule"]
    return {
        "rule": rule,
        "switched": _switched(outcome.chosen),
        "budget": outcome.budget,
        "file": result.files[outcome.budget].name,
        "candidate": outcome.chosen.name,
        "kind": outcome.chosen.kind,
        "steps": outcome.chosen.steps,
        "relative_cost": outcome.chosen.share,
        "predicted_error": outcome.chosen.predicted.get("vectors"),
        "measured_error": _errors(outcome.chosen.measured),
        "reported": [
            {"candidate": c.name, "kind": c.kind, "relative_cost": c.share, **vars(outcome.reported[c.name])}
            for c in (outcome.chosen, *(b for b in outcome.baselines if b is not outcome.chosen))
            if c.name in outcome.reported
        ],
        "solved_seconds": round(outcome.solved_seconds, 3),
        "latency": None if outcome.latency is None else vars(outcome.latency),
    }


def _candidate_facts(candidate: Candidate) -> dict[str, Any]:
    told = {key: value for key, value in vars(candidate).items() if key not in ("schedule", "measured", "switches")}
    told["switched"] = _switched(candidate)
    return {**told, "predicted": dict(candidate.predicted), "measured": _errors(candidate.measured)}


def _switched(candidate: Candidate) -> list[dict[str, Any]]:
    """When a rule switched on the trajectories that it was tuned on."""
    schedule = candidate.schedule
    return [vars(began) for began in schedule.began(candidate.switches)] if isinstance(schedule, RuleSchedule) else []


def _errors(errors: Errors | None) -> dict[str, Any] | None:
    return None if errors is None else vars(errors)


def schedule_text(result: Calibration, outcome: Outcome) -> str:
    """The text of a schedule's file: JSON. First what it was made for, and a rule, then one line per piece."""
    how, best = result.sampler, outcome.chosen
    predicted = best.predicted.get("vectors")
    made_for = {
        "budget": outcome.budget,
        "cost": result.cost,
        "relative_cost": round(best.share, 6),
        "kind": best.kind,
        "predicted_error": None if predicted is None else round(predicted, 6),
        "measured_error": None if best.measured is None else round(best.measured.geometric, 6),
        "calibrated_for": how.to_json() | {"steps": best.steps, "seed": None},
        "weights_sha256": result.weights,
    }
    if isinstance(best.schedule, RuleSchedule):
        made_for["switched"] = _switched(best)
    content = outcome.schedule.to_json()
    (name,) = {"pieces", "usual"} & content.keys()
    lines = content.pop(name)
    head = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in (made_for | content).items()]
    return "{\n" + "\n".join(head) + f'\n  "{name}": [\n' + ",\n".join(f"    {json.dumps(line)}" for line in lines) + "\n  ]\n}\n"


def write_pictures(result: Calibration) -> None:
    """Into the calibration's folder: a map of every schedule, the error table, and error against cost of all candidates."""
    import numpy as np

    from mediatorize.compression.proposals import BASELINES, WHOLE
    from mediatorize.report.pictures import Point, write_candidates, write_error_table, write_schedule_map

    found, unit = result.found, COSTS[result.cost].name
    if found is None:
        return
    for outcome in found.outcomes:
        best = outcome.chosen
        caption = f"{result.arch.name}: {best.share:.1%} of softmax's {unit}, sample error {best.error:.4f}"
        write_schedule_map(result.folder / f"schedule-{result.files[outcome.budget].stem}.png", outcome.schedule, caption)
    added = [option for option, level in enumerate(found.table.options) if not is_pretrained(level)]
    levels = [found.table.options[option] for option in added]
    errors = np.sqrt(found.table.squares()[:, :, added])
    errors[:, [layer for layer in range(result.arch.depth) if not result.settings.converts(layer)]] = np.nan
    write_error_table(result.folder / "sensitivity.png", found.table.noise_levels, levels, errors)
    kept = {outcome.chosen.name for outcome in found.outcomes}
    shown = [candidate for candidate in found.candidates if (candidate.measured or not result.verify) and math.isfinite(candidate.error)]
    points = [Point(c.kind, c.name if c.kind == WHOLE else "", c.share, c.error, c.name in kept, c.kind in BASELINES) for c in shown]
    error = "sample error" + (f", geometric mean of up to {result.verify} samples" if result.verify else ", predicted")
    write_candidates(result.folder / CANDIDATES_FILE, points, f"{unit} of the sampler, as a share of softmax's", error)
