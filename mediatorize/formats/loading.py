"""One call for a model, whatever it is stored as."""

from __future__ import annotations

from pathlib import Path

from mediatorize.errors import UserError
from mediatorize.formats.adapter import apply_adapter
from mediatorize.formats.bundle import is_bundle, load_bundle
from mediatorize.formats.checkpoint import Hints, open_checkpoint
from mediatorize.model.architecture import Family
from mediatorize.model.transformer import DiffusionTransformer


def load_model(
    path: str | Path,
    *,
    family: Family | None = None,
    num_heads: int | None = None,
    num_classes: int | None = None,
    weights: str | None = None,
    adapter: str | Path | None = None,
) -> DiffusionTransformer:
    """Loads a bundle or a pretrained checkpoint: eval mode, float32, CPU, memory-mapped.

    Args:
        path: a bundle; an official DiT or SiT file (`.pt` or safetensors, flat or from training); a REPA SiT; a diffusers DiT folder.
        family: `dit` or `sit`, where the file cannot tell.
        num_heads: where the width is none of the published ones.
        num_classes: where the last row of the label table is not the null class.
        weights: `ema` or `model` of a training checkpoint.
        adapter: for a pretrained checkpoint, a folder of `mediatorize export --to safetensors --adapter`: its mediators and schedule.

    Raises:
        UserError: the file is missing, damaged, unsafe, not finite, ambiguous or of another architecture, or not the adapter's base.
    """
    if is_bundle(Path(path)):
        refuse_checkpoint_options(Path(path), family, num_heads, num_classes, weights)
        model = load_bundle(Path(path))
    else:
        checkpoint = open_checkpoint(path, Hints(family, num_heads, num_classes), weights)
        checkpoint.verify()
        model = checkpoint.load()
    return model if adapter is None else apply_adapter(model, Path(adapter))


def refuse_checkpoint_options(path: Path, *given: object) -> None:
    """A bundle knows what a checkpoint may have to be told."""
    if any(option is not None for option in given):
        raise UserError(f"{path}: is a bundle, which knows its family, heads, classes and weights.", hint="Leave those options out.")
