"""Options that several stages share, and the groups they stand in. A stage says for instance `solver: options.Solver = None`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mediatorize.diffusion.solvers import SOLVERS
from mediatorize.model import architecture, levels
from mediatorize.signatures import OneOf, one, whole_number

WHAT, SAMPLING, DATA, RESOURCES, OUTPUT = "What to do", "How to sample", "Data and checkpoint", "Resources", "Output"
"""Groups of options in `--help`."""


def channels(text: str) -> int | Literal["all"]:
    return "all" if text == "all" else whole_number(text)


def option(help: str, panel: str, *names: str, **more: Any) -> Any:
    """Typer's option with help and group; its name is the parameter's unless `names` are given."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


Family = Annotated[architecture.Family | None, option("model family, where the file cannot tell", DATA), OneOf(architecture.FAMILIES)]
Heads = Annotated[int | None, option("attention heads, where the width is none of the published ones", DATA, min=1)]
Classes = Annotated[int | None, option("classes, where the last label row is not the null class", DATA, min=1)]
Weights = Annotated[str | None, option("which weights of a training checkpoint: ema or model", DATA)]
Data = Annotated[
    Path | None,
    option("data on disk: latents as of fast-DiT, REPA or LightningDiT, an .npz of pixels, or a folder of images per class", DATA),
]
Vae = Annotated[Path | None, option("a diffusers AutoencoderKL folder: between pixels and the latents of a latent model", DATA)]
Level = Annotated[
    levels.Level | None,
    option("one level for all layers and steps; default: the schedule, else softmax", WHAT, parser=one(levels.read_level), metavar="LEVEL"),
]
Solver = Annotated[str | None, option("solver; default: ddim (DiT), euler (SiT)", SAMPLING), OneOf(SOLVERS)]
Steps = Annotated[int | None, option("steps of the solver; default: the solver's own", SAMPLING)]
Guidance = Annotated[float, option("classifier-free guidance; 1 is none and costs half", SAMPLING)]
Channels = Annotated[
    int | Literal["all"],
    option("channels that guidance acts on: 3 as DiT and SiT do, or all", SAMPLING, parser=one(channels), metavar="N|all"),
]
Seed = Annotated[int, option("seed of everything random", SAMPLING)]
Batch = Annotated[int, option("samples at a time", RESOURCES)]
Device = Annotated[Literal["auto", "cpu", "cuda", "mps"], option("where to compute", RESOURCES)]
Dtype = Annotated[Literal["float32", "bfloat16", "float16"], option("precision of the model", RESOURCES)]
Force = Annotated[bool, option("overwrite what is there", OUTPUT, "--force")]
DryRun = Annotated[bool, option("say what would be done, and do nothing", OUTPUT, "--dry-run")]
