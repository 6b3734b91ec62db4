"""The command line: parse, one library call, print. Options are the parameters of the stages."""

from __future__ import annotations

import inspect
import json
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any

import typer

from mediatorize.errors import UserError
from mediatorize.stages.options import Parameter, parameters
from mediatorize.stages.run import STAGES, run

app = typer.Typer(
    help="Compresses pretrained diffusion transformers (DiT, SiT) into mediator form.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    app()


def _command(name: str, stage: Callable[..., Any]) -> None:
    """Registers a stage: its signature's parameters as options, its result printed."""
    known = parameters(stage)

    def call(**given: Any) -> None:
        as_json, debug = given.pop("json"), given.pop("debug")
        arguments = {}
        for key, value in given.items():
            parameter = known[key]
            if value is None or (parameter.type is bool and not value):
                continue  # left out: the stage's own default holds
            try:
                arguments[key] = parameter.convert(value)
            except ValueError as error:
                raise typer.BadParameter(f"{value!r}: {error}.", param_hint=_hint(parameter)) from None
        try:
            report = stage(**arguments)
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
            typer.echo(json.dumps(report.to_json(), indent=2, default=str) if as_json else str(report))

    positional = [_parameter(parameter) for parameter in known.values() if parameter.positional]
    options = [_parameter(parameter) for parameter in known.values() if not parameter.positional]
    flags = [_flag("json", "print the result as JSON"), _flag("debug", "show where an error came from")]
    call.__signature__ = inspect.Signature([*positional, *options, *flags])  # type: ignore[attr-defined]
    app.command(name, help=inspect.getdoc(stage))(call)


def _hint(parameter: Parameter) -> str:
    return parameter.name.upper() if parameter.positional else f"--{parameter.name.replace('_', '-')}"


def _parameter(parameter: Parameter) -> inspect.Parameter:
    if parameter.type is bool:
        return _flag(parameter.name, parameter.option.help)
    help_text = parameter.option.help
    if parameter.option.choices is not None:
        help_text = f"{help_text} ({', '.join(parameter.option.choices)})"
    if not parameter.required and parameter.default is not None and parameter.default != ():
        default = ",".join(map(str, parameter.default)) if isinstance(parameter.default, tuple) else parameter.default
        help_text = f"{help_text} [default: {default}]"
    if parameter.positional:
        return _make(parameter.name, Annotated[str, typer.Argument(help=help_text, show_default=False)], inspect.Parameter.empty)
    option = typer.Option(_hint(parameter), help=help_text, show_default=False)
    if parameter.name == "set":
        return _make(parameter.name, Annotated[list[str] | None, option], None)
    if parameter.required:
        return _make(parameter.name, Annotated[str, option], inspect.Parameter.empty)
    return _make(parameter.name, Annotated[str | None, option], None)


def _flag(name: str, help_text: str) -> inspect.Parameter:
    return _make(name, Annotated[bool, typer.Option(f"--{name.replace('_', '-')}", help=help_text, show_default=False)], False)


def _make(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _fail(message: str, debug: bool, code: int = 1) -> None:
    if debug:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(code)


for _name, _stage in {**STAGES, "run": run}.items():
    _command(_name, _stage)
