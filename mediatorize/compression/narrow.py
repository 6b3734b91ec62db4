"""Narrow MLPs start from the units of the pretrained MLP that matter most (design 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from mediatorize.model.block import Block
from mediatorize.model.mlp import UNITS, NarrowMlp, layers_of_mlp, rows_of_units

DAMPING = 1e-3
"""Of the least squares, as a share of the mean square of a unit."""

MOST_ROWS = 16384
"""Tokens that units are chosen and solved by, at most."""


@torch.no_grad()
def start_from_units(block: Block, narrow: NarrowMlp, inputs: Tensor, gates: Tensor) -> None:
    """Gives a narrow MLP the hidden units whose outputs are largest, and the output weights that come nearest to the whole MLP's output.

    The narrowest level's weights are solved first; every wider one's units then take what is left, so that one set of weights serves all.

    Args:
        inputs: of the block's MLP (s, n, c).
        gates: that its output passes (s, 1, c).
    """
    every = max(1, inputs.shape[0] * inputs.shape[1] // MOST_ROWS)
    x = inputs.flatten(0, 1)[::every]
    weight = gates.square().mean(0).squeeze(0)  # of a channel of the output, (c,)
    first, last = layers_of_mlp(block.mlp, narrow.kind)
    hidden = UNITS[narrow.kind](first(x))  # (rows, units)
    out = last.weight  # (c, units)
    size = (hidden - hidden.mean(0)).square().mean(0) * (out.square() * weight.unsqueeze(1)).sum(0)
    chosen = size.argsort(descending=True)[: narrow.fc2.in_features]
    narrow.fc1.weight.copy_(rows_of_units(first.weight, narrow.kind, chosen))
    narrow.fc1.bias.copy_(rows_of_units(first.bias, narrow.kind, chosen))
    kept = hidden[:, chosen]
    mean_unit = kept.mean(0)
    left = block.mlp(x)
    mean_output = left.mean(0)
    left = left - mean_output
    start = 0
    for share in sorted(map(int, narrow.biases), reverse=True):
        stop = narrow.hidden // share
        units = kept[:, start:stop] - mean_unit[start:stop]
        gram = units.mT @ units
        gram.diagonal().add_(DAMPING * gram.diagonal().mean() + 1e-12)
        solved = torch.linalg.solve(gram.double(), (units.mT @ left).double()).to(units.dtype)  # (units, c)
        narrow.fc2.weight[:, start:stop] = solved.mT
        left = left - units @ solved
        narrow.biases[str(share)].copy_(mean_output - narrow.fc2.weight[:, :stop] @ mean_unit[:stop])
        start = stop
