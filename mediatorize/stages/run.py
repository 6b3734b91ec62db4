"""`mediatorize run`: the stages of a recipe, in order; what is finished is not run again."""

from __future__ import annotations

import hashlib
import json
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from mediatorize.errors import UserError
from mediatorize.formats.bundle import write_json, write_text
from mediatorize.stages.calibrate import calibrate
from mediatorize.stages.convert import convert
from mediatorize.stages.evaluate import evaluate
from mediatorize.stages.export import export
from mediatorize.stages.finetune import finetune
from mediatorize.stages.inspect import inspect
from mediatorize.stages.options import DryRunOption, Option, check_arguments, parameters
from mediatorize.stages.running import seconds_in_words
from mediatorize.stages.sample import sample
from mediatorize.version import VERSION

STAGES: dict[str, Callable[..., Any]] = {
    "inspect": inspect,
    "convert": convert,
    "finetune": finetune,
    "calibrate": calibrate,
    "sample": sample,
    "evaluate": evaluate,
    "export": export,
}
"""Stages that a recipe can have, in the order in which they run."""

TOP_KEYS = ("description", "out", "preset")


@dataclass(frozen=True)
class Recipe:
    path: Path
    description: str
    out: Path
    preset: str
    """Published size that stands for a checkpoint which is not there, in a dry run."""
    stages: dict[str, dict[str, Any]]
    """Arguments by stage, in the stages' own types."""


@dataclass(frozen=True)
class RunReport:
    recipe: Recipe
    reports: dict[str, Any]
    skipped: tuple[str, ...]
    seconds: float
    dry_run: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "recipe": str(self.recipe.path),
            "out": str(self.recipe.out),
            "dry_run": self.dry_run,
            "seconds": round(self.seconds, 1),
            "skipped": list(self.skipped),
            "stages": {name: report.to_json() for name, report in self.reports.items()},
        }

    def __str__(self) -> str:
        blocks = [f"== {name} ==\n{report}" for name, report in self.reports.items()]
        blocks += [f"== {name} == finished before; not run again" for name in self.skipped]
        end = f"Nothing was done; results would go to {self.recipe.out}." if self.dry_run else f"{self.recipe.path.name} took "
        end += "" if self.dry_run else f"{seconds_in_words(self.seconds)}; results are in {self.recipe.out}."
        return "\n\n".join([*blocks, end])


def run(
    recipe: Annotated[Path, Option("a recipe (TOML), one table per stage")],
    *,
    set: Annotated[tuple[str, ...], Option("values that replace the recipe's, as convert.levels=1,4; may be given again")] = (),
    out: Annotated[Path | None, Option("where results go; default: the recipe's own")] = None,
    dry_run: DryRunOption = False,
) -> RunReport:
    """Runs the stages of a recipe. What is finished, with the same arguments, is not run again."""
    start = time.monotonic()
    loaded = read_recipe(recipe, set, out)
    reports: dict[str, Any] = {}
    skipped = []
    if dry_run:
        for name, arguments in loaded.stages.items():
            if name in ("inspect", "convert"):
                arguments = dict(arguments)
                if loaded.preset and not Path(arguments["checkpoint"]).exists():
                    arguments["checkpoint"] = loaded.preset
                reports[name] = STAGES[name](**arguments, **({"dry_run": True} if name == "convert" else {}))
        return RunReport(loaded, reports, (), time.monotonic() - start, dry_run)

    loaded.out.mkdir(parents=True, exist_ok=True)
    write_text(loaded.out / "recipe.toml", resolved_toml(loaded))
    state_file = loaded.out / "finished.json"
    finished: dict[str, str] = json.loads(state_file.read_text()) if state_file.exists() else {}
    chain = ""
    for name, arguments in loaded.stages.items():
        what = [VERSION, chain, name, arguments, _state_of_inputs(arguments, loaded.out)]
        chain = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()
        result = arguments.get("out", arguments.get("model"))
        if finished.get(name) == chain and (result is None or result.exists()):
            skipped.append(name)
            continue
        if "force" in parameters(STAGES[name]) and result is not None and result.is_relative_to(loaded.out):
            arguments = arguments | {"force": True}  # what stands inside the recipe's own folder is its own earlier result
        reports[name] = STAGES[name](**arguments)
        finished[name] = chain
        write_json(state_file, finished)
    return RunReport(loaded, reports, tuple(skipped), time.monotonic() - start, dry_run)


def _state_of_inputs(arguments: dict[str, Any], own: Path) -> list[tuple[int, int]]:
    """Size and time of the checkpoint, bundle or data that a stage reads: another file under the same name is another input.

    What lies in the recipe's `own` folder is the work of its earlier stages.
    """
    paths = [Path(arguments[key]) for key in ("checkpoint", "model", "data") if arguments.get(key)]
    files = [path / "model.safetensors" if path.is_dir() else path for path in paths if not path.is_relative_to(own)]
    return [(file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]


def read_recipe(path: Path, changes: tuple[str, ...], out: Path | None) -> Recipe:
    """Parses a recipe, applies `--set` and checks every key against the signature of its stage."""
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
        stage, dot, key = target.partition(".")
        if not equals or not dot or stage not in STAGES:
            raise UserError(f"--set {change!r} is not STAGE.KEY=VALUE.", hint=f"Stages are {', '.join(STAGES)}.")
        tables.setdefault(stage, {})[key] = value
    folder = out or Path(str(content.get("out", f"runs/{path.stem}")))
    places = {"{recipe}": str(path.parent), "{out}": str(folder)}

    def placed(value: Any) -> Any:
        if isinstance(value, str):
            for name, place in places.items():
                value = value.replace(name, place)
        return value

    stages = {}
    for name in STAGES:
        if name in tables:
            given = {key: placed(value) for key, value in tables[name].items()}
            stages[name] = check_arguments(name, STAGES[name], given, str(path))
    if not stages:
        raise UserError(f"{path}: has no stages.", hint=f"Add tables named {', '.join(STAGES)}.")
    return Recipe(path, str(content.get("description", "")), folder, str(content.get("preset", "")), stages)


def resolved_toml(recipe: Recipe) -> str:
    """The recipe with every value filled in, defaults too."""
    lines = [
        f"description = {json.dumps(recipe.description)}",
        f"out = {json.dumps(str(recipe.out))}",
        f"preset = {json.dumps(recipe.preset)}",
    ]
    for name, arguments in recipe.stages.items():
        lines += ["", f"[{name}]"]
        for key, parameter in parameters(STAGES[name]).items():
            value = arguments.get(key, parameter.default)
            if value is not None:
                lines.append(f"{key} = {json.dumps(value if isinstance(value, bool | int | float | str | tuple) else str(value))}")
    return "\n".join(lines) + "\n"
