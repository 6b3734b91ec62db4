"""How a stage's signature becomes command-line options and recipe keys: names, defaults and help are written once, in the signature."""

from __future__ import annotations

import inspect
import shlex
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from mediatorize.diffusion.solvers import SOLVERS
from mediatorize.errors import UserError
from mediatorize.model.architecture import Family


@dataclass(frozen=True)
class Option:
    """Help for one parameter, and the table that its values come from."""

    help: str
    choices: Collection[str] | None = None


@dataclass(frozen=True)
class Parameter:
    name: str
    type: Any
    option: Option
    default: Any
    """`inspect.Parameter.empty` where it is required."""
    positional: bool

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    def convert(self, value: Any) -> Any:
        """`value`, as text or from TOML, in this parameter's type; ValueError says what was expected."""
        converted = convert(value, self.type)
        if self.option.choices is not None and converted is not None and converted not in self.option.choices:
            raise ValueError(f"expected one of {', '.join(self.option.choices)}")
        return converted


def parameters(stage: Callable[..., Any]) -> dict[str, Parameter]:
    """The parameters of a stage, each annotated with an `Option`."""
    hints = get_type_hints(stage, include_extras=True)
    found = {}
    for name, parameter in inspect.signature(stage).parameters.items():
        kind, *extras = get_args(hints[name])
        option = next(extra for extra in extras if isinstance(extra, Option))
        positional = parameter.kind is not inspect.Parameter.KEYWORD_ONLY
        found[name] = Parameter(name, kind, option, parameter.default, positional)
    return found


def convert(value: Any, kind: Any) -> Any:
    """`value` as `kind`: a plain type, a Literal, an optional, a union tried in order, or a tuple (comma-separated as text)."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        problems = []
        for choice in inner:
            if choice is not type(None):
                try:
                    return convert(value, choice)
                except ValueError as error:
                    problems.append(str(error))
        raise ValueError(" or ".join(problems))
    if origin is Literal:
        if value in inner:
            return value
        raise ValueError(f"expected {' or '.join(map(str, inner))}")
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        return tuple(convert(item.strip() if isinstance(item, str) else item, inner[0]) for item in items)
    if kind is bool:
        if isinstance(value, bool):
            return value
        if value in ("true", "false"):
            return value == "true"
        raise ValueError("expected true or false")
    if kind in (int, float):
        name = "a whole number" if kind is int else "a number"
        if isinstance(value, bool) or not isinstance(value, int | float | str) or (kind is int and isinstance(value, float)):
            raise ValueError(f"expected {name}")
        try:
            return kind(value)
        except ValueError:
            raise ValueError(f"expected {name}") from None
    if not isinstance(value, str | Path):
        raise ValueError("expected text")
    return kind(value)


def check_arguments(stage_name: str, stage: Callable[..., Any], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Recipe values in the types of a stage's parameters; unknown keys, wrong types and missing ones are refused by name."""
    known = parameters(stage)
    arguments = {}
    for key, value in given.items():
        name = key.replace("-", "_")
        if name not in known:
            raise UserError(f"{where}: [{stage_name}] has no key {key!r}.", hint=f"It knows {', '.join(known)}.")
        try:
            arguments[name] = known[name].convert(value)
        except ValueError as error:
            raise UserError(f"{where}: {stage_name}.{key} = {value!r}: {error}.", hint="Mend the recipe or the --set.") from None
    if missing := [name for name, parameter in known.items() if parameter.required and name not in arguments]:
        raise UserError(f"{where}: [{stage_name}] needs {', '.join(missing)}.", hint="Add it to the recipe, or pass --set.")
    return arguments


def as_command(name: str, stage: Callable[..., Any], arguments: Mapping[str, Any]) -> str:
    """The shell command that calls a stage so; what has its default value is left out."""
    words = ["mediatorize", name]
    for key, parameter in parameters(stage).items():
        value = arguments.get(key, parameter.default)
        if value == parameter.default or value is None:
            continue
        if not parameter.positional:
            words.append(f"--{key.replace('_', '-')}")
        if not isinstance(value, bool):
            words.append(",".join(map(str, value)) if isinstance(value, tuple) else str(value))
    return shlex.join(words)


# --- options that several stages share -----------------------------------------------------------------------------------------

FamilyOption = Annotated[Family | None, Option("dit or sit, where the file cannot tell")]
HeadsOption = Annotated[int | None, Option("attention heads, where the width is none of the published ones")]
ClassesOption = Annotated[int | None, Option("classes, where the last label row is not the null class")]
WeightsOption = Annotated[str | None, Option("which weights of a training checkpoint: ema or model")]
DeviceOption = Annotated[str, Option("where to compute", choices=("auto", "cpu", "cuda", "mps"))]
DtypeOption = Annotated[str, Option("precision of the model", choices=("float32", "bfloat16", "float16"))]
SeedOption = Annotated[int, Option("of everything random")]
ChannelsOption = Annotated[int | Literal["all"], Option("channels that guidance acts on: 3 as DiT and SiT do, or all")]
SolverOption = Annotated[str | None, Option("sampler; default: ddim (DiT), euler (SiT)", choices=SOLVERS)]
StepsOption = Annotated[int | None, Option("its steps; default: the solver's own")]
GuidanceOption = Annotated[float, Option("guidance; 1 is none and costs half")]
BatchOption = Annotated[int, Option("samples at a time")]
DataOption = Annotated[
    Path | None, Option("data on disk: latents as of fast-DiT, REPA or LightningDiT, an .npz of pixels, or a folder of images per class")
]
VaeOption = Annotated[Path | None, Option("a diffusers AutoencoderKL folder: between pixels and the latents of a latent model")]
ForceOption = Annotated[bool, Option("overwrite what is there")]
DryRunOption = Annotated[bool, Option("say what would be done, and do nothing")]
