"""Options that several stages share, and their groups. A stage writes, for instance, `solver: options.Solver = None`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mediatorize.diffusion.solvers import SOLVERS
from mediatorize.model import architecture, levels
from mediatorize.signatures import OneOf, listed, number, one, whole_number

WHAT, SAMPLING, DATA, RESOURCES, OUTPUT = "What to do", "How to sample", "Data and checkpoint", "Resources", "Output"
SWITCHING = "Step-wise rule of the paper (arXiv 2408.05710), in place of a schedule"
"""Groups of options in `--help`."""


def channels(text: str) -> int | Literal["all"]:
    return "all" if text == "all" else whole_number(text)


def interval(text: str) -> tuple[float, float]:
    bounds = listed(number)(text)
    if len(bounds) != 2:
        raise ValueError(f"{text!r} is not two noise levels, LOW,HIGH.")
    return bounds[0], bounds[1]


def option(help: str, panel: str, *names: str, **more: Any) -> Any:
    """Typer's option with help and group; its name is the parameter's unless `names` are given."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


Family = Annotated[architecture.Family | None, option("model family, if the file does not tell it", DATA), OneOf(architecture.FAMILIES)]
Heads = Annotated[int | None, option("number of attention heads, if the width is not a published one", DATA, min=1)]
Classes = Annotated[int | None, option("number of classes, if the last label row is not the null class", DATA, min=1)]
Weights = Annotated[str | None, option("weights to read from a training checkpoint: ema or model", DATA)]
Data = Annotated[
    Path | None,
    option(
        "data on disk: latents in fast-DiT's, REPA's or LightningDiT's layout, an .npz of pixels, MNIST's IDX files, or a folder of images "
        "per class",
        DATA,
    ),
]
Vae = Annotated[Path | None, option("folder of a diffusers AutoencoderKL, which turns pixels into latents and back", DATA)]
Level = Annotated[
    levels.Level | None,
    option(
        "one level for all layers and model calls; default: the plan or schedule, else softmax",
        WHAT,
        parser=one(levels.read_level),
        metavar="LEVEL",
    ),
]
Features = Annotated[
    str,
    option(
        "feature extractor: digits or fashion (classifiers), none, or a torch.export .pt2 file: images in [-1, 1] to features[, scores]",
        WHAT,
    ),
]
Inception = Annotated[Path | None, option("pytorch-fid's pt_inception-2015-12-05 file: uses FID's Inception in place of --features", WHAT)]
Ratios = Annotated[
    tuple[float, ...],
    option("a stage begins when the change is below this share of the first ones", SWITCHING, parser=listed(number), metavar="R,R,..."),
]
First = Annotated[int, option("how many first changes are averaged", SWITCHING)]
Solver = Annotated[str | None, option("solver; default: ddim (DiT), euler (SiT, LightningDiT)", SAMPLING), OneOf(SOLVERS)]
Steps = Annotated[int | None, option("steps of the solver; default: the solver's own", SAMPLING)]
Guidance = Annotated[float, option("classifier-free guidance scale; 1 is no guidance, at half the cost", SAMPLING)]
Channels = Annotated[
    int | Literal["all"],
    option("channels that guidance changes: 3, as in DiT and SiT, or all", SAMPLING, parser=one(channels), metavar="N|all"),
]
Interval = Annotated[
    tuple[float, ...],
    option(
        "lowest and highest noise level (0 data, 1 noise) at which calls are guided; the others cost half",
        SAMPLING,
        parser=one(interval),
        metavar="LOW,HIGH",
    ),
]
Shift = Annotated[
    float,
    option("warp of the steps of euler, heun and unipc: below 1, there are more where there is noise; LightningDiT: 0.3", SAMPLING),
]
Seed = Annotated[int, option("seed of all random numbers", SAMPLING)]
Batch = Annotated[int, option("samples per batch", RESOURCES)]
Device = Annotated[Literal["auto", "cpu", "cuda", "mps"], option("device to compute on", RESOURCES)]
Dtype = Annotated[Literal["float32", "bfloat16", "float16"], option("precision of the model", RESOURCES)]
Compile = Annotated[
    bool,
    option(
        "compile the model's blocks (torch.compile), one graph for each way that one runs: the first batch takes minutes, the others less",
        RESOURCES,
    ),
]
Force = Annotated[bool, option("replace existing results", OUTPUT, "--force")]
DryRun = Annotated[bool, option("only print what would be done", OUTPUT, "--dry-run")]
