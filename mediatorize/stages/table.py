"""The commands that a recipe can have, in one table: what each does, and how its result is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from mediatorize.stages.calibrate import calibrate
from mediatorize.stages.compare import compare
from mediatorize.stages.convert import convert
from mediatorize.stages.evaluate import evaluate
from mediatorize.stages.export import export
from mediatorize.stages.finetune import finetune
from mediatorize.stages.inspect import inspect
from mediatorize.stages.resize import resize
from mediatorize.stages.sample import sample


@dataclass(frozen=True)
class Told:
    """The result of a stage, for people and for machines."""

    words: str
    facts: dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """A command: what it does, and how its result is told."""

    run: Callable[..., Any]
    report: str
    """The module that tells its result, by `words` and `facts`; it is imported when there is something to tell."""

    def words(self, result: Any) -> str:
        return str(import_module(self.report).words(result))

    def facts(self, result: Any) -> dict[str, Any]:
        """What `--json` prints."""
        return dict(import_module(self.report).facts(result))

    def tell(self, result: Any) -> Told:
        return Told(self.words(result), self.facts(result))


STAGES: dict[str, Stage] = {
    "inspect": Stage(inspect, "mediatorize.report.inspection"),
    "convert": Stage(convert, "mediatorize.report.conversion"),
    "resize": Stage(resize, "mediatorize.report.resizing"),
    "finetune": Stage(finetune, "mediatorize.report.training"),
    "calibrate": Stage(calibrate, "mediatorize.report.calibration"),
    "sample": Stage(sample, "mediatorize.report.sampling"),
    "evaluate": Stage(evaluate, "mediatorize.report.evaluation"),
    "compare": Stage(compare, "mediatorize.report.side_by_side"),
    "export": Stage(export, "mediatorize.report.exporting"),
}
"""Stages that a recipe can have, in the order in which they run. Each is a command too."""
