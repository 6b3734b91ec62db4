"""The command line: parse, one library call, print. Options are the parameters of the stages."""

from __future__ import annotations

import inspect
import json
import sys
import traceback
from typing import Annotated, Any

import typer

from mediatorize.errors import UserError
from mediatorize.signatures import as_typer
from mediatorize.stages.options import OUTPUT, option
from mediatorize.stages.run import run
from mediatorize.stages.running import keep_freed_memory
from mediatorize.stages.table import STAGES, Stage
from mediatorize.torchrun import is_first_process
from mediatorize.version import VERSION

app = typer.Typer(
    help="Compresses pretrained diffusion transformers (DiT, SiT) into mediator form.",
    epilog="Example: mediatorize inspect DiT-XL/2@512",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main() -> None:
    keep_freed_memory()
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mediatorize {VERSION}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[bool, typer.Option("--version", help="print the version and stop", callback=_show_version, is_eager=True)] = False,
) -> None:
    """What stands before a command."""


def _register(name: str, stage: Stage) -> None:
    """Makes a stage a command: its signature's parameters become options, its result is printed."""

    def call(json: bool, debug: bool, **arguments: Any) -> None:
        try:
            result = stage.run(**arguments)
        except UserError as error:
            _fail(str(error), debug)
        except KeyboardInterrupt:
            _fail("interrupted; the same command goes on where it can.", debug, code=130)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            _fail(f"{where}{error.strerror or error}.", debug)
        except Exception as error:
            _fail(f"unexpected {type(error).__name__}: {error}. Pass --debug for where, and please report it.", debug)
        else:
            if is_first_process():
                typer.echo(_as_json(stage, result) if json else stage.words(result))

    command = as_typer(stage.run, call)
    flags = [
        _flag("json", "print the result as JSON"),
        _flag("debug", "show where an error came from"),
    ]
    signature = inspect.signature(command)
    command.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *flags])  # type: ignore[attr-defined]
    text, _, example = (inspect.getdoc(stage.run) or "").partition("\n\nExample: ")
    app.command(name, help=text, epilog=f"Example: {example}" if example else None)(command)


def _flag(name: str, help_text: str) -> inspect.Parameter:
    annotation = Annotated[bool, option(help_text, OUTPUT, f"--{name}")]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)


def _as_json(stage: Stage, result: Any) -> str:
    return json.dumps(stage.facts(result), indent=2, default=str)


def _fail(message: str, debug: bool, code: int = 1) -> None:
    if debug:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(code)


COMMANDS = STAGES | {"run": Stage(run, "mediatorize.report.running")}

for _name, _stage in COMMANDS.items():
    _register(_name, _stage)
