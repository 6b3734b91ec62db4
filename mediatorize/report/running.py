"""The report of `mediatorize run`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mediatorize.report.tables import seconds_in_words

if TYPE_CHECKING:
    from mediatorize.stages.run import RunResult


def words(found: RunResult) -> str:
    blocks = [f"== {name} ==\n{told.words}" for name, told in found.told.items()]
    blocks += [f"== {name} == finished before; not run again" for name in found.skipped]
    blocks += [f"== {name} == reads the output of earlier stages; run those to see its plan" for name in found.unplanned]
    if found.dry_run:
        return "\n\n".join([*blocks, f"Nothing was done. Results would go to {found.recipe.out}."])
    took = f"{found.recipe.path.name} took {seconds_in_words(found.seconds)}. Results are in {found.recipe.out}."
    return "\n\n".join([*blocks, took])


def facts(found: RunResult) -> dict[str, Any]:
    return {
        "recipe": str(found.recipe.path),
        "out": str(found.recipe.out),
        "dry_run": found.dry_run,
        "seconds": round(found.seconds, 1),
        "skipped": list(found.skipped),
        "unplanned": list(found.unplanned),
        "stages": {name: told.facts for name, told in found.told.items()},
    }
