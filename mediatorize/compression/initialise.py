"""Initial mediators: one pooling matrix per head, from the token grid or from clusters of the teacher's queries or keys.

Importing the table of initialisers does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mediatorize.model.architecture import coarse_grid

if TYPE_CHECKING:
    from torch import Tensor

    from mediatorize.model.block import SwitchableAttention

    Initialiser = Callable[[SwitchableAttention, Tensor, int, int], Tensor]
    """(layer, its inputs (s, n, c), mediators, seed) -> pooling weights (h, m, gh, gw) on the coarse grid, each mediator's summing to 1."""

CLUSTER_STATES = 32
"""How many states initialisers look at, at least, where there are as many."""


def average_pooling(layer: SwitchableAttention, inputs: Tensor, mediators: int, seed: int) -> Tensor:
    """Near-square cells of the token grid, the same in every head."""
    from mediatorize.model.mediators import grid_partition

    coarse = coarse_grid(layer.grid)
    return grid_partition(mediators, coarse).view(1, mediators, *coarse).repeat(layer.num_heads, 1, 1, 1)


def query_clusters(layer: SwitchableAttention, inputs: Tensor, mediators: int, seed: int) -> Tensor:
    """Positions grouped by k-means over their queries."""
    return _clusters(layer, inputs, mediators, seed, projection=0)


def key_clusters(layer: SwitchableAttention, inputs: Tensor, mediators: int, seed: int) -> Tensor:
    """Positions grouped by k-means over their keys."""
    return _clusters(layer, inputs, mediators, seed, projection=1)


def _clusters(layer: SwitchableAttention, inputs: Tensor, mediators: int, seed: int, projection: int) -> Tensor:
    """Pooling over clusters of positions, head by head.

    A position's coordinates are its queries (or keys) in all calibration states: positions that ask alike, whatever the picture, share a
    mediator. The matrix must not depend on the picture, or it could not be absorbed.
    """
    import torch
    from sklearn.cluster import KMeans  # here, as every library that takes long to load and that most commands do without
    from torch.nn import functional as F

    heads, width = layer.num_heads, layer.qkv.in_features
    weight = layer.qkv.weight.detach().view(3, heads, -1, width)[projection]
    coarse = coarse_grid(layer.grid)
    on_cells = F.interpolate(inputs.mT.unflatten(2, layer.grid), size=coarse, mode="area").flatten(2).mT  # (s, cells, c)
    result = []
    for head in range(heads):
        points = (on_cells @ weight[head].mT).transpose(0, 1).flatten(1).cpu().numpy()  # (cells, s * d)
        cluster = KMeans(mediators, n_init=1, random_state=(seed + head) % 2**32).fit(points).labels_
        members = F.one_hot(torch.from_numpy(cluster).long(), mediators).T.float()  # (m, cells)
        result.append(members / members.sum(1, keepdim=True).clamp(min=1))
    return torch.stack(result).view(heads, mediators, *coarse).to(inputs.device)


INITIALISERS: dict[str, Initialiser] = {"pool": average_pooling, "cluster-keys": key_clusters, "cluster-queries": query_clusters}
"""By name. To add one: a function as above."""

LOOK_AT_NOTHING: frozenset[Initialiser] = frozenset({average_pooling})
"""Those that do without states."""


def states_looked_at(initialise: Initialiser, narrow: bool = False) -> int:
    """How many states an initialiser, or the start of narrow MLPs, looks at, at least."""
    return 0 if initialise in LOOK_AT_NOTHING and not narrow else CLUSTER_STATES
