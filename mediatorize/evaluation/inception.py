"""The Inception network of FID (TensorFlow's of 2015-12-05), with weights from pytorch-fid's file, which is never downloaded.

It is torchvision's Inception v3 with 1008 classes and no auxiliary head. The pooling branches of nine blocks differ: averages leave the
padding out, and the last block takes a maximum. torchvision is imported here, so import this module where it is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import Inception3
from torchvision.models.inception import InceptionA, InceptionC, InceptionE

from mediatorize.errors import UserError

SIDE = 299
CLASSES = 1008


class _AverageWithoutPadding(nn.Module):
    """Replaces the last branch of a torchvision block, which pools before it convolves; names of weights stay."""

    branch_pool: Any

    def forward(self, x: Tensor) -> Tensor:
        others: Tensor = super().forward(x)[:, : -self.branch_pool.conv.out_channels]
        return torch.cat([others, self.branch_pool(self.pooled(x))], 1)

    def pooled(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class BlockA(_AverageWithoutPadding, InceptionA):  # type: ignore[misc]
    pass


class BlockC(_AverageWithoutPadding, InceptionC):  # type: ignore[misc]
    pass


class BlockE(_AverageWithoutPadding, InceptionE):  # type: ignore[misc]
    pass


class LastBlock(BlockE):
    def pooled(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, stride=1, padding=1)


class FidInception(Inception3):  # type: ignore[misc]
    """(b, 3, h, w) in [-1, 1] -> class scores (b, 1008)."""

    def __init__(self) -> None:
        super().__init__(num_classes=CLASSES, aux_logits=False, transform_input=False, init_weights=False)
        self.Mixed_5b = BlockA(192, pool_features=32)
        self.Mixed_5c = BlockA(256, pool_features=64)
        self.Mixed_5d = BlockA(288, pool_features=64)
        self.Mixed_6b = BlockC(768, channels_7x7=128)
        self.Mixed_6c = BlockC(768, channels_7x7=160)
        self.Mixed_6d = BlockC(768, channels_7x7=160)
        self.Mixed_6e = BlockC(768, channels_7x7=192)
        self.Mixed_7b = BlockE(1280)
        self.Mixed_7c = LastBlock(2048)

    def forward(self, x: Tensor) -> Any:
        return super().forward(F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", align_corners=False))


def load_inception(path: Path) -> FidInception:
    """The network up to its features, (b, 2048) after the last pooling, with the weights of `pt_inception-2015-12-05-6726825d.pth` on disk.

    Eval mode, float32, CPU.
    """
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: no weights that can be read ({reason}).", hint="Take pytorch-fid's Inception weights.") from error
    with torch.device("meta"):
        network = FidInception()
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    found = {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)} if isinstance(state, dict) else {}
    for name, shape in expected.items():
        if found.get(name) != shape:
            raise UserError(
                f"{path}: {name} is {found.get(name, 'missing')} where FID's Inception has {shape}.",
                hint="Take pytorch-fid's pt_inception-2015-12-05 weights; torchvision's are another network.",
            )
    network = network.to_empty(device="cpu")
    network.load_state_dict({name: state[name].float() for name in expected}, strict=False)
    network.fc = nn.Identity()  # features are what comes before the classes
    return network.requires_grad_(False).eval()
