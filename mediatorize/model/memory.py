"""Memory of a trajectory: what mediators left out of each attention layer at the last call that computed softmax attention.

With y(x) softmax attention on a layer's input x, and M(x) its mediators:

    a call a that computes y:  r = y(x_a) - M(x_a) is remembered
    a later call k:            y(x_k) ~ M(x_k) + r

Whoever drives the model owns one memory per trajectory (`diffusion.driver`) and passes it in. Modules keep nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from mediatorize.errors import UserError
from mediatorize.model.levels import Level


@dataclass
class AttentionMemory:
    """Of one attention layer."""

    watched: tuple[Level, ...] = ()
    """Mediators whose rest the call at hand must leave, where it computes softmax attention."""
    rests: dict[Level, Tensor] = field(default_factory=dict)
    """(b, n, c), by the mediators that left it out."""

    def remember(self, rests: Mapping[Level, Tensor]) -> None:
        """Keeps what the watched mediators left out, and nothing from before."""
        self.rests = dict(rests)

    def recall(self, mediators: Level, like: Tensor) -> Tensor:
        """What mediators left out (b, n, c), for a call on tokens `like`: of the first b rows, where more are remembered.

        Raises:
            UserError: nothing was remembered, or for fewer rows.
        """
        rest = self.rests.get(mediators)
        if rest is None or len(rest) < len(like):
            raise UserError(
                "A held rest needs a call with softmax attention before it, of as many rows.", hint="Begin a trajectory with level softmax."
            )
        return rest[: len(like)]


class Memory:
    """What the attention layers of a model left along one trajectory of a batch."""

    def __init__(self, depth: int) -> None:
        self.blocks = [AttentionMemory() for _ in range(depth)]

    def begin(self, watched: Sequence[tuple[Level, ...]]) -> None:
        """Says, for every block, which mediators' rests the next model call must leave."""
        for block, own in zip(self.blocks, watched, strict=True):
            block.watched = own
