"""Plan files: one JSON with the plans of several numbers of calls, and what they were made for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mediatorize.diffusion.plan import Plan, PlanError, plans_from_text, plans_to_text
from mediatorize.diffusion.planned import choose_plan
from mediatorize.errors import UserError
from mediatorize.formats.bundle import write_text

PLAN_NAME = "plan.json"
"""The plan file of a bundle."""


def default_place(model: Path, is_bundle: bool) -> Path:
    """Where `calibrate` writes plans: in a bundle, or beside a checkpoint."""
    return model / PLAN_NAME if is_bundle else model.with_name(f"{model.name}.{PLAN_NAME}")


def read_plans(file: Path) -> dict[int, Plan]:
    """The plans in a file, by their number of calls.

    Raises:
        UserError: there is no such file, it is no plan file, or it is damaged or of a newer version.
    """
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error}).", hint="Pass a file that `mediatorize calibrate --calls` wrote.") from error
    try:
        return plans_from_text(text)
    except PlanError as error:
        raise UserError(f"{file}: {error}", hint="Run `mediatorize calibrate --calls` again.") from error


def load_plan(path: str | Path, calls: int | None = None) -> Plan:
    """The plan of a number of calls in a plan file or a bundle; None is the one of the most calls.

    Raises:
        UserError: the file cannot be read, or has no plan of so many calls.
    """
    path = Path(path)
    return choose_plan(read_plans(path / PLAN_NAME if path.is_dir() else path), calls)


def write_plans(file: Path, plans: Mapping[int, Plan]) -> None:
    """Writes a plan file, whole or not at all."""
    write_text(file, plans_to_text(plans))


def refuse_other_weights(plan: Plan, weights: str) -> None:
    """Refuses a plan that was fitted to other pretrained weights.

    Args:
        weights: hash of the model's (`bundle.hash_of_weights`).
    """
    if (made_for := plan.made_for.get("weights")) and made_for != weights:
        raise UserError("The plan was fitted to other weights.", hint="Run `mediatorize calibrate --calls` on this model.")
