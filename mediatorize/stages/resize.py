"""`mediatorize resize` makes a model for another resolution, ready to be fine-tuned."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mediatorize.errors import UserError
from mediatorize.signatures import one, whole_number
from mediatorize.stages import options
from mediatorize.stages.options import DATA, WHAT, option

if TYPE_CHECKING:
    from mediatorize.formats.checkpoint import Hints
    from mediatorize.model.architecture import Architecture
    from mediatorize.model.levels import MediatorSettings


@dataclass(frozen=True, kw_only=True)
class Resized:
    """What `resize` made."""

    out: Path
    before: Architecture
    after: Architecture
    settings: MediatorSettings | None
    """What the bundle added to the checkpoint; None for a checkpoint."""
    teacher: str
    """The checkpoint that the pretrained weights are of, where it is another one."""


def sides(text: str) -> tuple[int, int]:
    """512, or 512x768: height and width."""
    parts = [whole_number(part) for part in text.split("x")]
    if len(parts) not in (1, 2):
        raise ValueError(f"{text!r} is no size, such as 512 or 512x768.")
    return parts[0], parts[-1]


def resize(
    model: Annotated[str, typer.Argument(help="a bundle or a pretrained checkpoint")],
    out: Annotated[Path, typer.Argument(help="the bundle to write; for a checkpoint, a .pt file")],
    *,
    image_size: Annotated[tuple[int, int], option("pixels: 512, or height x width: 512x768", WHAT, parser=one(sides), metavar="N|HxW")],
    teacher: Annotated[
        str, option("bundles: a checkpoint of the new resolution, whose weights replace the pretrained ones", DATA, metavar="FILE")
    ] = "",
    family: options.Family = None,
    num_heads: options.Heads = None,
    num_classes: options.Classes = None,
    weights: options.Weights = None,
    force: options.Force = False,
) -> Resized:
    """Makes a model for another resolution: positions are computed anew or interpolated. Fine-tune it before use.

    Example: mediatorize resize out out-512 --image-size 512 --teacher DiT-XL-2-512x512.pt --family dit
    """
    from mediatorize.formats import bundle
    from mediatorize.formats.checkpoint import Hints

    source, hints = Path(model), Hints(family, num_heads, num_classes)
    if bundle.is_bundle(source):
        if out.absolute() == source.absolute():
            raise UserError(f"{out}: is the bundle itself.", hint="Name another folder.")
        bundle.refuse_occupied(out, force)
        return _resize_bundle(source, out, image_size, teacher, hints, weights)
    if teacher:
        raise UserError("--teacher is for bundles: a checkpoint is a teacher itself.", hint="Leave --teacher out.")
    if out.suffix != ".pt":
        raise UserError(f"{out}: a resized checkpoint is a .pt file.", hint="Name a .pt.")
    if out.exists() and not force:
        raise UserError(f"{out}: exists.", hint="Pass --force to replace it, or another path.")
    return _resize_checkpoint(source, out, image_size, hints, weights)


def _resize_checkpoint(source: Path, out: Path, image_size: tuple[int, int], hints: Hints, weights: str | None) -> Resized:
    """Writes a flat `.pt` with the original's names."""
    import torch

    from mediatorize.formats.checkpoint import open_checkpoint, published_name
    from mediatorize.formats.tensors import own_copies, write_beside
    from mediatorize.model.resize import grid_of_image, resized

    checkpoint = open_checkpoint(source, hints, weights)
    if checkpoint.format == "diffusers DiT":
        raise UserError(f"{source}: diffusers' DiT has conventions of its own, which a .pt file does not tell.", hint="Convert it first.")
    checkpoint.verify()
    before = checkpoint.load()
    after = resized(before, grid_of_image(before.arch, *image_size))
    state = {published_name(name): value for name, value in own_copies(after.state_dict()).items()}
    facts: dict[str, Any] = {"family": after.arch.family, "num_heads": after.arch.heads, "num_classes": after.arch.classes}
    facts |= {"enc_type": "resized"} if after.arch.reversed_time else {}  # REPA's files are known by it
    if after.arch.latent_std:
        mean, std = torch.tensor(after.arch.latent_mean), torch.tensor(after.arch.latent_std)
        state |= {"bn.running_mean": mean, "bn.running_var": std.square()}
    write_beside(out, lambda path: torch.save({"ema": state, "args": facts}, path))
    return Resized(out=out, before=before.arch, after=after.arch, settings=None, teacher="")


def _resize_bundle(source: Path, out: Path, image_size: tuple[int, int], teacher: str, hints: Hints, weights: str | None) -> Resized:
    """Writes a bundle without schedules: what was measured is of the other resolution."""
    from mediatorize.formats import bundle
    from mediatorize.formats.checkpoint import open_checkpoint
    from mediatorize.model.resize import grid_of_image, resized
    from mediatorize.report.card import model_card

    config = bundle.read_config(source)
    bundle.refuse_pruned(source, config)
    before = bundle.load_bundle(source)
    after = resized(before, grid_of_image(before.arch, *image_size))
    pixels = "x".join(map(str, image_size))
    origin = replace(config.source, format=f"{config.source.format}, resized to {pixels} pixels")
    if teacher:
        other = open_checkpoint(teacher, hints, weights)
        if other.arch != after.arch:
            raise UserError(f"{teacher}: is no {after.arch.name} of {after.arch.grid[0]}x{after.arch.grid[1]} tokens.", hint=SAME_MODEL)
        other.verify()
        after.load_state_dict(after.state_dict() | other.load().state_dict(), assign=True)
        origin = bundle.Origin(file=Path(teacher).name, format=other.format, weights=other.part)
    origin = replace(origin, sha256=bundle.hash_of_weights(after))
    config = replace(config, arch=after.arch, source=origin, layer_errors=(), finetuned=None)
    partial = bundle.partial_folder(out)
    if (partial / bundle.WORK_FOLDER).exists():
        raise UserError(f"{partial}: an unfinished conversion stands in the way.", hint="Finish or delete it, or name another folder.")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    bundle.write_bundle(partial, after, config, model_card(config))
    if (log := source / bundle.LOG_FILE).exists():
        shutil.copy(log, partial / bundle.LOG_FILE)
    bundle.append_log(partial, "resize", {"image_size": list(image_size), "teacher": teacher}, {})
    bundle.commit(partial, out)
    return Resized(out=out, before=before.arch, after=after.arch, settings=config.settings, teacher=teacher)


SAME_MODEL = "Pass a checkpoint of the same model at --image-size, and its --num-heads where its width is not a published one."
