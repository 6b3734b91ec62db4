"""`mediatorize run`: the stages of a recipe, in order; what is finished is not run again."""

from __future__ import annotations

import hashlib
import inspect as signatures
import json
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from mediatorize.errors import UserError
from mediatorize.signatures import check_arguments
from mediatorize.stages.calibrate import calibrate
from mediatorize.stages.convert import convert
from mediatorize.stages.evaluate import evaluate
from mediatorize.stages.export import export
from mediatorize.stages.finetune import finetune
from mediatorize.stages.inspect import inspect
from mediatorize.stages.options import OUTPUT, WHAT, DryRunOption, option
from mediatorize.stages.sample import sample
from mediatorize.version import VERSION


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
    "finetune": Stage(finetune, "mediatorize.report.training"),
    "calibrate": Stage(calibrate, "mediatorize.report.calibration"),
    "sample": Stage(sample, "mediatorize.report.sampling"),
    "evaluate": Stage(evaluate, "mediatorize.report.evaluation"),
    "export": Stage(export, "mediatorize.report.exporting"),
}
"""Stages that a recipe can have, in the order in which they run. Each is a command too."""

TOP_KEYS = ("description", "out", "preset")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    path: Path
    description: str
    out: Path
    preset: str
    """Published size that stands for a checkpoint which is not there, in a dry run."""
    stages: dict[str, dict[str, Any]]
    """Arguments by stage, in the stages' own types; those that are given."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    recipe: Recipe
    told: dict[str, Told]
    """By stage, of those that were run, or planned in a dry run."""
    skipped: tuple[str, ...] = ()
    unplanned: tuple[str, ...] = ()
    """Of a dry run: stages whose plan depends on what the stages before them would write."""
    seconds: float
    dry_run: bool


def run(
    recipe: Annotated[Path, typer.Argument(help="a recipe (TOML), one table per stage")],
    *,
    set: Annotated[list[str] | None, option("a value that replaces the recipe's, as convert.levels=1,4; may be given again", WHAT)] = None,
    out: Annotated[Path | None, option("where results go; default: the recipe's own", OUTPUT)] = None,
    dry_run: DryRunOption = False,
) -> RunResult:
    """Runs the stages of a recipe. What is finished, with the same arguments, is not run again.

    Example: mediatorize run recipes/digits.toml --set finetune.train_steps=500 --out runs/quick
    """
    start = time.monotonic()
    loaded = read_recipe(recipe, tuple(set or ()), out)
    told: dict[str, Told] = {}
    if dry_run:
        planned = [name for name in loaded.stages if _can_be_planned(name, loaded)]
        told = {name: STAGES[name].tell(_plan(loaded, name)) for name in planned}
        unplanned = tuple(name for name in loaded.stages if name not in planned)
        return RunResult(recipe=loaded, told=told, unplanned=unplanned, seconds=time.monotonic() - start, dry_run=True)

    from mediatorize.formats.bundle import write_json, write_text

    loaded.out.mkdir(parents=True, exist_ok=True)
    write_text(loaded.out / "recipe.toml", resolved_toml(loaded))
    state_file = loaded.out / "finished.json"
    finished: dict[str, str] = json.loads(state_file.read_text()) if state_file.exists() else {}
    skipped, chain = [], ""
    for name, arguments in loaded.stages.items():
        what = [VERSION, chain, name, arguments, _state_of_inputs(arguments, loaded.out)]
        chain = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()
        made = arguments.get("out", arguments.get("model"))
        if finished.get(name) == chain and (made is None or made.exists()):
            skipped.append(name)
            continue
        if "force" in signatures.signature(STAGES[name].run).parameters and made is not None and made.is_relative_to(loaded.out):
            arguments = arguments | {"force": True}  # what stands inside the recipe's own folder is its own earlier result
        told[name] = STAGES[name].tell(STAGES[name].run(**arguments))
        finished[name] = chain
        write_json(state_file, finished)
    return RunResult(recipe=loaded, told=told, skipped=tuple(skipped), seconds=time.monotonic() - start, dry_run=False)


stage = Stage(run, "mediatorize.report.running")


def _can_be_planned(name: str, recipe: Recipe) -> bool:
    """Whether a stage can say what it would do before the stages ahead of it have run."""
    if name in ("inspect", "convert"):
        return True
    return _takes_dry_run(name) and recipe.stages[name]["model"].exists()


def _plan(recipe: Recipe, name: str) -> Any:
    """What a stage would do."""
    arguments = recipe.stages[name]
    if "checkpoint" in arguments and recipe.preset and not Path(arguments["checkpoint"]).exists():
        arguments = arguments | {"checkpoint": recipe.preset}
    return STAGES[name].run(**arguments, **({"dry_run": True} if _takes_dry_run(name) else {}))


def _takes_dry_run(name: str) -> bool:
    return "dry_run" in signatures.signature(STAGES[name].run).parameters


def _state_of_inputs(arguments: dict[str, Any], own: Path) -> list[tuple[int, int]]:
    """Size and time of the checkpoint, bundle or data that a stage reads: another file under the same name is another input.

    What lies in the recipe's `own` folder is the work of its earlier stages.
    """
    paths = [Path(arguments[key]) for key in ("checkpoint", "model", "data") if arguments.get(key)]
    files = [path / "model.safetensors" if path.is_dir() else path for path in paths if not path.is_relative_to(own)]
    return [(file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]


def read_recipe(path: Path, changes: tuple[str, ...], out: Path | None) -> Recipe:
    """Parses a recipe, applies `--set` and checks every key as the command line of its stage does."""
    if not path.is_file():
        raise UserError(f"{path}: no such recipe.", hint="Recipes are TOML files, such as recipes/digits.toml.")
    try:
        content = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not TOML ({error}).", hint="Mend the recipe.") from error
    tables = {key: value for key, value in content.items() if isinstance(value, dict)}
    for key in content:
        if key not in (*STAGES, *TOP_KEYS):
            raise UserError(f"{path}: {key!r} is neither a stage nor a known key.", hint=f"Stages are {', '.join(STAGES)}.")
        if (key in STAGES) != (key in tables):
            raise UserError(f"{path}: {key!r} {'is no table' if key in STAGES else 'is a table'}.", hint=f"Write [{key}] for a stage only.")
    for change in changes:
        target, equals, value = change.partition("=")
        name, dot, key = target.partition(".")
        if not equals or not dot or name not in STAGES:
            raise UserError(f"--set {change!r} is not STAGE.KEY=VALUE.", hint=f"Stages are {', '.join(STAGES)}.")
        tables.setdefault(name, {})[key] = value
    folder = out or Path(str(content.get("out", f"runs/{path.stem}")))
    places = {"{recipe}": str(path.parent), "{out}": str(folder)}

    def placed(value: Any) -> Any:
        if isinstance(value, str):
            for name, place in places.items():
                value = value.replace(name, place)
        return value

    stages = {}
    for name, stage in STAGES.items():
        if name in tables:
            given = {key: placed(value) for key, value in tables[name].items()}
            stages[name] = check_arguments(name, stage.run, given, str(path))
    if not stages:
        raise UserError(f"{path}: has no stages.", hint=f"Add tables named {', '.join(STAGES)}.")
    description, preset = str(content.get("description", "")), str(content.get("preset", ""))
    return Recipe(path=path, description=description, out=folder, preset=preset, stages=stages)


def resolved_toml(recipe: Recipe) -> str:
    """The recipe with every value filled in, defaults too."""
    lines = [
        f"description = {json.dumps(recipe.description)}",
        f"out = {json.dumps(str(recipe.out))}",
        f"preset = {json.dumps(recipe.preset)}",
    ]
    for name, arguments in recipe.stages.items():
        lines += ["", f"[{name}]"]
        for key, parameter in signatures.signature(STAGES[name].run).parameters.items():
            value = arguments.get(key, parameter.default)
            if value is not None:
                lines.append(f"{key} = {json.dumps(value if isinstance(value, bool | int | float | str | tuple) else str(value))}")
    return "\n".join(lines) + "\n"
