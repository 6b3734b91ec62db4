"""A block's MLP: what each kind computes, and narrow ones in its place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from mediatorize.errors import UserError
from mediatorize.model.architecture import MLPS, Architecture, MlpKind
from mediatorize.model.levels import Level, mlp_share


class SwiGlu(nn.Module):
    """`w3(silu(x1) * x2)`, where x1 and x2 are the halves of `w12(x)` (SwiGLU, arXiv 2002.05202), under LightningDiT's names."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, c) -> (b, n, c)"""
        return self.w3(gated(self.w12(x)))


def gated(x: Tensor) -> Tensor:
    """(..., 2 units) -> (..., units)"""
    first, second = x.chunk(2, dim=-1)
    return F.silu(first) * second


UNITS: dict[MlpKind, Callable[[Tensor], Tensor]] = {"gelu": partial(F.gelu, approximate="tanh"), "swiglu": gated}
"""The hidden units, from what the first layer gives."""


def block_mlp(arch: Architecture) -> Mlp | SwiGlu:
    """The MLP of a block: timm's, as DiT and SiT use it, or LightningDiT's."""
    if arch.mlp == "swiglu":
        return SwiGlu(arch.width, arch.mlp_width)
    return Mlp(arch.width, arch.mlp_width, act_layer=partial(nn.GELU, approximate="tanh"))  # type: ignore[arg-type]


def layers_of_mlp(mlp: nn.Module, kind: MlpKind) -> tuple[nn.Linear, nn.Linear]:
    """The two linear layers of a block's MLP."""
    first, last = (mlp.get_submodule(name) for name in (MLPS[kind].first, MLPS[kind].last))
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear), "both are linear"
    return first, last


def rows_of_units(values: Tensor, kind: MlpKind, units: slice | Tensor) -> Tensor:
    """What of the first layer's weight or bias (rows, ...) belongs to some hidden units."""
    return values.unflatten(0, (MLPS[kind].rows, -1))[:, units].flatten(0, 1)


class NarrowMlp(nn.Module):
    """A narrow MLP in place of a block's own (design 4). Its levels are nested: a narrower one is the first hidden units of the widest."""

    def __init__(self, arch: Architecture, shares: Sequence[int]) -> None:
        """
        Args:
            shares: 8 is an eighth of the hidden width; in descending order.
        """
        super().__init__()
        self.hidden, self.kind = arch.mlp_width, arch.mlp
        units = self.hidden // shares[-1]
        self.fc1 = nn.Linear(arch.width, MLPS[arch.mlp].rows * units)
        self.fc2 = nn.Linear(units, arch.width, bias=False)
        self.biases = nn.ParameterDict({str(share): nn.Parameter(torch.zeros(arch.width)) for share in shares})

    def start_from(self, mlp: nn.Module) -> None:
        """Takes the MLP's first hidden units."""
        first, last = layers_of_mlp(mlp, self.kind)
        units = slice(self.fc2.in_features)
        self.fc1.load_state_dict({name: rows_of_units(value, self.kind, units) for name, value in first.state_dict().items()})
        self.fc2.load_state_dict({"weight": last.weight[:, units]})
        for bias in self.biases.values():
            bias.data.copy_(last.bias)

    def keep(self, parts: Collection[Level]) -> None:
        """Drops the hidden units and biases of all levels but the kept ones, of which there must be one."""
        for share in [share for share in self.biases if f"1/{share}" not in parts]:
            del self.biases[share]
        units = slice(self.hidden // min(map(int, self.biases)))
        weight, bias = (rows_of_units(value, self.kind, units) for value in (self.fc1.weight, self.fc1.bias))
        self.fc1.weight, self.fc1.bias, self.fc2.weight = (_own(value) for value in (weight, bias, self.fc2.weight[:, units]))
        self.fc1.out_features, self.fc2.in_features = len(self.fc1.weight), units.stop

    def forward(self, x: Tensor, level: Level) -> Tensor:
        """(b, n, c) -> (b, n, c) at one of its levels."""
        share = mlp_share(level)
        if str(share) not in self.biases:
            raise UserError(f"This model has no MLP of width {level}.", hint="Run `mediatorize convert` with --mlp-widths.")
        units = slice(self.hidden // share)
        weight, bias = (rows_of_units(value, self.kind, units) for value in (self.fc1.weight, self.fc1.bias))
        return F.linear(UNITS[self.kind](F.linear(x, weight, bias)), self.fc2.weight[:, units], self.biases[str(share)])


def _own(value: Tensor) -> nn.Parameter:
    """A piece of a parameter as one, in memory of its own."""
    return nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format), requires_grad=value.requires_grad)
