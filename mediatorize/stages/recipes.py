"""Recipes: TOML files with one table per stage, or an array of tables, which run in order. Keys and values are checked as on the command
line."""

from __future__ import annotations

import inspect
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mediatorize.errors import UserError
from mediatorize.signatures import check_arguments
from mediatorize.stages.table import STAGES

TOP_KEYS = ("description", "out", "preset")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    path: Path
    description: str
    out: Path
    preset: str
    """In a dry run, this published size replaces a missing checkpoint."""
    stages: dict[str, dict[str, Any]]
    """The given arguments of each stage, in the stage's own types, by label: `convert`, or of an array `convert 1`, `convert 2`, ..."""


def stage_of(label: str) -> str:
    """The stage that a label of `Recipe.stages` is of."""
    return label.partition(" ")[0]


def read_recipe(path: Path, changes: tuple[str, ...], out: Path | None) -> Recipe:
    """Parses a recipe, applies `--set` and checks every key as the command line of its stage does."""
    if not path.is_file():
        raise UserError(f"{path}: no such recipe.", hint="Recipes are TOML files, such as recipes/digits.toml.")
    try:
        content = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not TOML ({error}).", hint="Mend the recipe.") from error
    tables = {key: found for key, value in content.items() if (found := _tables(value))}
    for key in content:
        if key not in (*STAGES, *TOP_KEYS):
            raise UserError(f"{path}: {key!r} is neither a stage nor a known key.", hint=f"Stages are {', '.join(STAGES)}.")
        if (key in STAGES) != (key in tables):
            raise UserError(f"{path}: {key!r} {'is no table' if key in STAGES else 'is a table'}.", hint=f"Write [{key}] for a stage only.")
    for change in changes:
        target, equals, value = change.partition("=")
        name, dot, key = target.partition(".")
        if not equals or not dot or name not in STAGES:
            hint = f"Stages are {', '.join(STAGES)}. The recipe's folder is set by --out."
            raise UserError(f"--set {change!r} is not STAGE.KEY=VALUE.", hint=hint)
        for table in tables.setdefault(name, [{}]):
            table[key] = value
    folder = out or Path(str(content.get("out", f"runs/{path.stem}")))
    places = {"{recipe}": str(path.parent), "{out}": str(folder)}

    def placed(value: Any) -> Any:
        if isinstance(value, str):
            for name, place in places.items():
                value = value.replace(name, place)
        return [placed(item) for item in value] if isinstance(value, list) else value

    stages = {}
    for name, stage in STAGES.items():
        for number, table in enumerate(tables.get(name, []), 1):
            given = {key: placed(value) for key, value in table.items()}
            label = f"{name} {number}" if len(tables[name]) > 1 else name
            stages[label] = check_arguments(name, stage.run, given, str(path))
    if not stages:
        raise UserError(f"{path}: has no stages.", hint=f"Add tables named {', '.join(STAGES)}.")
    description, preset = str(content.get("description", "")), str(content.get("preset", ""))
    return Recipe(path=path, description=description, out=folder, preset=preset, stages=stages)


def _tables(value: Any) -> list[dict[str, Any]]:
    """A table, or the tables of an array; none in anything else."""
    tables = value if isinstance(value, list) else [value]
    return tables if all(isinstance(table, dict) for table in tables) else []


def resolved_toml(recipe: Recipe) -> str:
    """The recipe with every value filled in, defaults too."""
    lines = [
        f"description = {json.dumps(recipe.description)}",
        f"out = {json.dumps(str(recipe.out))}",
        f"preset = {json.dumps(recipe.preset)}",
    ]
    for label, arguments in recipe.stages.items():
        name = stage_of(label)
        lines += ["", f"[{name}]" if label == name else f"[[{name}]]"]
        for key, parameter in inspect.signature(STAGES[name].run).parameters.items():
            value = arguments.get(key, parameter.default)
            if value not in (None, ()):  # an option cannot be given an empty list
                lines.append(f"{key} = {json.dumps(value, default=str)}")
    return "\n".join(lines) + "\n"
