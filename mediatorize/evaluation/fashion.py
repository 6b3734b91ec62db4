"""A classifier of Fashion-MNIST's products: grey pictures of 28x28 pixels (arXiv 1708.07747)."""

from __future__ import annotations

from torch import Tensor, nn

SIDE = 28


class FashionClassifier(nn.Module):
    """Two convolutions and two linear layers; the 64 hidden units between the latter are the features that distances are measured in."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.hidden = nn.Linear(64 * (SIDE // 4) ** 2, 64)
        self.scores = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(b, 1 or 3, 28, 28) in [-1, 1] -> features (b, 64) and class scores (b, 10); of three channels, the first is taken."""
        features = self.hidden(self.convolutions(images[:, :1]).flatten(1)).relu()
        return features, self.scores(features)
