"""`mediatorize run` runs the stages of a recipe in order. A finished stage is not run again."""

from __future__ import annotations

import hashlib
import inspect
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mediatorize.errors import UserError
from mediatorize.stages import options
from mediatorize.stages.options import OUTPUT, WHAT, option
from mediatorize.stages.recipes import Recipe, read_recipe, resolved_toml, stage_of
from mediatorize.stages.table import STAGES, Told
from mediatorize.torchrun import started_by_torchrun
from mediatorize.version import VERSION


@dataclass(frozen=True, kw_only=True)
class RunResult:
    recipe: Recipe
    told: dict[str, Told]
    """The report of each stage that was run, or planned in a dry run."""
    skipped: tuple[str, ...] = ()
    unplanned: tuple[str, ...] = ()
    """In a dry run: stages whose plan depends on the output of earlier stages."""
    seconds: float
    dry_run: bool


def run(
    recipe: Annotated[Path, typer.Argument(help="a recipe (TOML), a table per stage, or several")],
    *,
    set: Annotated[list[str] | None, option("replaces a value of the recipe, such as convert.levels=1,4; can be repeated", WHAT)] = None,
    out: Annotated[Path | None, option("folder for the results; default: the recipe's own", OUTPUT)] = None,
    dry_run: options.DryRun = False,
) -> RunResult:
    """Runs the stages of a recipe in order. Skips a stage that has finished with the same arguments.

    Example: mediatorize run recipes/digits.toml --set finetune.train_steps=500 --out runs/quick
    """
    start = time.monotonic()
    if started_by_torchrun():
        raise UserError("A recipe runs in one process.", hint="Run its commands one by one under torchrun.")
    loaded = read_recipe(recipe, tuple(set or ()), out)
    told: dict[str, Told] = {}
    if dry_run:
        planned = [name for name in loaded.stages if _can_be_planned(name, loaded)]
        told = {name: STAGES[stage_of(name)].tell(_plan(loaded, name)) for name in planned}
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
        stage = STAGES[stage_of(name)]
        if "force" in inspect.signature(stage.run).parameters and made is not None and made.is_relative_to(loaded.out):
            arguments = arguments | {"force": True}  # what stands inside the recipe's own folder is its own earlier result
        told[name] = stage.tell(stage.run(**arguments))
        finished[name] = chain
        write_json(state_file, finished)
    return RunResult(recipe=loaded, told=told, skipped=tuple(skipped), seconds=time.monotonic() - start, dry_run=False)


def _can_be_planned(name: str, recipe: Recipe) -> bool:
    """Whether a stage can be planned before the earlier stages have run."""
    if stage_of(name) in ("inspect", "convert"):
        return True
    model = recipe.stages[name].get("model")
    return _takes_dry_run(stage_of(name)) and (model is None or model.exists())


def _plan(recipe: Recipe, name: str) -> Any:
    """What a stage would do."""
    arguments = recipe.stages[name]
    if "checkpoint" in arguments and recipe.preset and not Path(arguments["checkpoint"]).exists():
        arguments = arguments | {"checkpoint": recipe.preset}
    stage = stage_of(name)
    return STAGES[stage].run(**arguments, **({"dry_run": True} if _takes_dry_run(stage) else {}))


def _takes_dry_run(name: str) -> bool:
    return "dry_run" in inspect.signature(STAGES[name].run).parameters


def _state_of_inputs(arguments: dict[str, Any], own: Path) -> list[tuple[int, int]]:
    """Size and time of the checkpoint, bundle or data that a stage reads: another file under the same name is another input.

    What lies in the recipe's `own` folder is the work of its earlier stages.
    """
    named = [arguments[key] for key in ("checkpoint", "model", "data") if arguments.get(key)]
    paths = [Path(path) for path in (*named, *arguments.get("beside", ()), *arguments.get("checkpoints", ()))]
    files = [path / "model.safetensors" if path.is_dir() else path for path in paths if not path.is_relative_to(own)]
    return [(file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]
