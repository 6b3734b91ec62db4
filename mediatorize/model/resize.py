"""A model at another resolution: what depends on the token grid is computed anew or interpolated, all else is kept."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from mediatorize.errors import UserError
from mediatorize.model.architecture import CELLS, Architecture, coarse_grid
from mediatorize.model.attention import rotary_tables
from mediatorize.model.levels import most_mediators
from mediatorize.model.transformer import DiffusionTransformer, sincos_position_embedding

AXES_OF_TERMS = {"ah_bias": 3, "aw_bias": 4, "ha_bias": 2, "wa_bias": 3}
"""The axis over rows or columns of tokens of each of the published form's position terms."""


def grid_of_image(arch: Architecture, height: int, width: int) -> tuple[int, int]:
    """The token grid of pictures of that size.

    Raises:
        UserError: patches (of latents, where there are four or more channels) do not divide it.
    """
    cell = arch.patch * CELLS.get(arch.channels, 8)
    if height % cell or width % cell or min(height, width) < 2 * cell:
        raise UserError(
            f"{height}x{width} pixels are no grid of patches of {cell} pixels.", hint=f"Pass multiples of {cell}, at least {2 * cell}."
        )
    return height // cell, width // cell


@torch.no_grad()
def resized(model: DiffusionTransformer, grid: tuple[int, int]) -> DiffusionTransformer:
    """The model for another token grid (rows, columns): eval mode, its unchanged weights shared with `model`.

    The position embedding and rotary tables are those of the new grid. The published form's position terms are interpolated as the original
    code does (`train_256to512.py` of LeapLabTHU/Attention-Mediators). Learned pooling and position terms are interpolated bilinearly, where
    their coarse grid changes.
    """
    arch, (rows, columns) = replace(model.arch, grid=grid), coarse_grid(grid)
    most = max(arch.mediators, most_mediators(model.settings.levels) if model.settings else 0)
    if most > rows * columns:
        raise UserError(f"{most} mediators do not fit {rows * columns} tokens ({rows}x{columns}).", hint="Pass a larger --image-size.")
    with torch.device("meta"):
        other = DiffusionTransformer(arch, model.settings)
    wanted = {name: tuple(value.shape) for name, value in other.state_dict().items()}
    state = {name: _fitted(name, value, wanted[name]) for name, value in model.state_dict().items()}
    state["pos_embed"] = sincos_position_embedding(arch.width, grid).to(model.pos_embed)
    if model.feat_rope is not None:
        tables = zip(("feat_rope.freqs_cos", "feat_rope.freqs_sin"), rotary_tables(arch.head_width, grid), strict=True)
        state |= {name: table.to(model.pos_embed) for name, table in tables}
    other.load_state_dict(state, assign=True)
    return other.requires_grad_(False).eval()


def _fitted(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A weight for a layer of that shape."""
    kind = name.rpartition(".")[2]
    if tuple(value.shape) == shape or name == "pos_embed" or name.startswith("feat_rope."):
        return value
    if kind in AXES_OF_TERMS:
        axis = AXES_OF_TERMS[kind]
        lines = value.movedim(axis, -1)
        flat = F.interpolate(lines.flatten(0, -2).unsqueeze(0), size=shape[axis], mode="linear", align_corners=True)
        return flat.view(*lines.shape[:-1], shape[axis]).movedim(-1, axis).contiguous()
    if kind not in ("pool", "key_bias", "query_bias"):
        raise AssertionError(f"{name} depends on the resolution in a way that is not known")
    on_grid = F.interpolate(value, size=shape[2:], mode="bilinear", align_corners=False, antialias=True)
    if kind != "pool":
        return on_grid
    return on_grid * (value.shape[2] * value.shape[3] / (shape[2] * shape[3]))  # weights of a mean: their sum stays about the same
