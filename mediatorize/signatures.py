"""How a function's signature becomes a command and the keys of a recipe's table: names, types, defaults and help are written once, there.

A parameter is annotated with its type and Typer's own `Option` or `Argument`. What Typer has no type for is said by a second mark: `OneOf`
for names in a table, and a `parser` for values that a function reads, such as lists written with commas.
"""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Any, Literal, get_args, get_type_hints

import typer

from mediatorize.errors import UserError

Function = Callable[..., Any]


@dataclass(frozen=True)
class OneOf:
    """Marks a parameter whose values are the names in a table."""

    table: Collection[str]


def listed(read: Callable[[str], Any]) -> Callable[[Any], tuple[Any, ...]]:
    """Reads values written with commas, each by `read`, which raises ValueError or UserError for what it cannot."""

    def parse(given: Any) -> tuple[Any, ...]:
        if not isinstance(given, str):
            return tuple(given)
        try:
            return tuple(read(item.strip()) for item in given.split(","))
        except (UserError, ValueError) as error:
            raise typer.BadParameter(str(error)) from None

    return parse


def one(read: Callable[[str], Any]) -> Callable[[Any], Any]:
    """Reads one value by `read`, which raises ValueError or UserError for what it cannot."""

    def parse(given: Any) -> Any:
        if not isinstance(given, str):
            return given
        try:
            return read(given)
        except (UserError, ValueError) as error:
            raise typer.BadParameter(str(error)) from None

    return parse


def whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a whole number.") from None


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number.") from None


def typed_signature(function: Function) -> list[inspect.Parameter]:
    """A function's parameters in types that Typer knows, in the order of its signature."""
    parameters = {name: kind for name, kind in function.__annotations__.items() if name != "return"}  # what it returns may need torch
    hints = get_type_hints(SimpleNamespace(__annotations__=parameters), function.__globals__, include_extras=True)
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        kind, *marks = get_args(hints[name])
        info = next(mark for mark in marks if not isinstance(mark, OneOf))
        table = next((mark.table for mark in marks if isinstance(mark, OneOf)), None)
        if table is not None:
            kind = Literal[tuple(table)] if type(None) not in get_args(kind) else Literal[tuple(table)] | None
        elif info.parser is not None:
            kind = Any
        found.append(parameter.replace(annotation=Annotated[kind, info]))
    return found


def as_typer(function: Function, call: Callable[..., Any]) -> Callable[..., Any]:
    """A function of `function`'s parameters, in types that Typer knows, that passes them to `call`.

    Spellings of other tools, and bare words for what is counted twice here, are hidden options that are answered with ours.
    """
    signature = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in typed_signature(function)]
    known = {parameter.name for parameter in signature}

    def command(**given: Any) -> Any:
        return call(**{name: value for name, value in given.items() if name in known or name in ("json", "debug")})

    for spelling, ours in OTHER_SPELLINGS.items():
        name = spelling.replace("-", "_")
        here = [own for own in ours if own.replace("-", "_") in known]
        if here and name not in known:
            info = typer.Option(f"--{spelling}", hidden=True, callback=_answer(spelling, here))
            signature.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, info]))
    command.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    command.__doc__ = function.__doc__
    return command


def _answer(spelling: str, ours: list[str]) -> Callable[[str | None], None]:
    def answer(value: str | None) -> None:
        if value is not None:
            raise typer.BadParameter(f"there is no --{spelling} here; pass {' or '.join(f'--{name}' for name in ours)}.")

    return answer


OTHER_SPELLINGS: dict[str, tuple[str, ...]] = {
    "steps": ("train-steps", "fit-steps", "sampler-steps"),
    "num-steps": ("steps", "train-steps", "fit-steps", "sampler-steps"),
    "num-inference-steps": ("steps", "sampler-steps"),
    "num-sampling-steps": ("steps", "sampler-steps"),
    "max-train-steps": ("train-steps",),
    "epochs": ("train-steps",),
    "batch-size": ("batch",),
    "lr": ("learning-rate",),
    "guidance-scale": ("cfg-scale", "cfg-scales"),
    "cfg": ("cfg-scale", "cfg-scales"),
    "cfg-scale": ("cfg-scales",),
    "gradient-accumulation-steps": ("accumulate",),
    "gradient-checkpointing": ("checkpointing",),
    "grad-checkpointing": ("checkpointing",),
    "ckpt": ("checkpoint", "model"),
    "output": ("out",),
    "output-dir": ("out",),
    "num-samples": ("samples", "per-class"),
    "class-labels": ("classes",),
    "sampler": ("solver",),
    "scheduler": ("solver",),
    "mixed-precision": ("dtype",),
    "precision": ("dtype",),
    "overwrite": ("force",),
}
"""What other tools call an option, or what is not enough to tell two apart, and what each is called here; the first four of a command's."""


def check_arguments(name: str, function: Function, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A recipe's table as a function's arguments, read by the command line's own parser: what it refuses is refused here."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(name)(as_typer(function, lambda **arguments: arguments))
    signature = {parameter.name: parameter for parameter in typed_signature(function)}
    options, positional = [], {}
    for key, value in given.items():
        own = key.replace("-", "_")
        text = ",".join(map(_as_text, value)) if isinstance(value, list | tuple) else _as_text(value)
        if own in signature and signature[own].kind is not inspect.Parameter.KEYWORD_ONLY:
            positional[own] = text
        elif isinstance(value, bool) and own in signature:
            options += [f"--{own.replace('_', '-')}"] * value
        elif own in signature or own.replace("_", "-") in OTHER_SPELLINGS:
            options += [f"--{own.replace('_', '-')}={text}"]
        else:
            raise UserError(f"{where}: [{name}] has no key {key!r}.", hint=f"It knows {', '.join(signature)}.")
    names = [own for own, parameter in signature.items() if parameter.kind is not inspect.Parameter.KEYWORD_ONLY]
    if missing := [own for own in names if own not in positional]:
        raise UserError(f"{where}: [{name}] needs {', '.join(missing)}.", hint="Add it to the recipe, or pass --set.")
    words = [*options, "--", *(positional[own] for own in names)]
    try:
        arguments: dict[str, Any] = typer.main.get_command(app).main(words, name, standalone_mode=False)
    except USAGE_ERROR as error:
        raise UserError(f"{where}: [{name}] {error.format_message()}", hint="Mend the recipe or the --set.") from None
    defaults = {own: parameter.default for own, parameter in signature.items()}
    return {own: value for own, value in arguments.items() if own in positional or value != defaults[own]}


USAGE_ERROR: Any = typer.BadParameter.__bases__[0]
"""The error of wrong usage; Typer has its own copy of click's."""


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def given(function: Function, arguments: Mapping[str, Any]) -> list[str]:
    """Names of the arguments that differ from the function's defaults, in the order of its signature."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
    return [name for name, default in defaults.items() if arguments.get(name, default) != default]


def as_command(name: str, function: Function, arguments: Mapping[str, Any]) -> str:
    """The shell command that calls a function so; what has its default value is left out."""
    words = ["mediatorize", name]
    for key, parameter in inspect.signature(function).parameters.items():
        value = arguments.get(key, parameter.default)
        if value == parameter.default or value is None:
            continue
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            words.append(f"--{key.replace('_', '-')}")
        if not isinstance(value, bool):
            words.append(",".join(map(str, value)) if isinstance(value, tuple) else str(value))
    return shlex.join(words)
