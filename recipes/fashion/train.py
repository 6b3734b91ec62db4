"""Trains the teacher on Fashion-MNIST that ships with this project, and the classifier that judges its samples (`--features fashion`).

    apt-get install dataset-fashion-mnist        # or --data: any folder with the four files of Fashion-MNIST
    python -m recipes.fashion.train teacher      # from the root of the repository; 13 minutes of one core
    python -m recipes.fashion.train classifier   # one minute

Both are written to where recipes/fashion.toml and `--features fashion` look for them. The teacher is a DiT on pixels. To resume its
training, run the same command.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from mediatorize.errors import UserError
from mediatorize.evaluation.fashion import SIDE, FashionClassifier
from mediatorize.formats.data import from_bytes, open_idx
from mediatorize.formats.judges import FASHION
from mediatorize.formats.tensors import write_beside
from mediatorize.model.architecture import Architecture
from mediatorize.randomness import generator
from recipes.digits.train import Training, learning_rate, train

PACKAGED = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the data."""
CLASSES = 10

Data = Annotated[Path, typer.Option(help="Folder with Fashion-MNIST's four IDX files.")]

app = typer.Typer(add_completion=False, help=__doc__)


def pictures(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST's `train` or `t10k` part: (n, 1, 28, 28) in [-1, 1] and labels (n,).

    Raises:
        UserError: the folder is not there, its files are damaged, or its pictures have another size.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder.", hint="Install Debian's package dataset-fashion-mnist, or pass --data FOLDER.")
    items = open_idx(folder, (1, SIDE, SIDE), CLASSES, part)
    if items.images.shape[1:3] != (SIDE, SIDE):
        raise UserError(
            f"{items.path}: pictures of {items.images.shape[1]}x{items.images.shape[2]} pixels; Fashion-MNIST has {SIDE}x{SIDE}.",
            hint="Pass --data FOLDER with its files.",
        )
    images, labels = (torch.from_numpy(values.copy()) for values in (items.images, items.labels))
    return from_bytes(images.permute(0, 3, 1, 2).float()), labels.long()


def teacher_architecture() -> Architecture:
    """49 tokens of 4x4 pixels, 128 wide, 6 layers, 4 heads: 1.9M parameters."""
    return Architecture(
        family="dit",
        depth=6,
        width=128,
        heads=4,
        patch=4,
        channels=1,
        grid=(SIDE // 4, SIDE // 4),
        classes=CLASSES,
        null_class=True,
        learn_sigma=True,
        mlp_width=512,
    )


@app.command()
def teacher(
    data: Data = PACKAGED,
    steps: int = 3000,
    batch: int = 32,
    peak_rate: float = 1e-2,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="Where to write.")] = Path(__file__).parent / "dit.safetensors",
) -> None:
    """Trains the DiT."""
    run = Training(steps=steps, batch=batch, peak_rate=peak_rate, seed=seed, velocity_weighting=True, optimizer="muon")
    train(teacher_architecture(), *pictures(data, "train"), run, "Fashion-MNIST's training set, 28x28", out)


@app.command()
def classifier(
    data: Data = PACKAGED,
    steps: int = 1900,
    batch: int = 128,
    peak_rate: float = 2e-3,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="Where to write.")] = FASHION,
) -> None:
    """Trains the classifier, about four times over the data, and says its accuracy on the test set."""
    images, labels = pictures(data, "train")
    test_images, test_labels = pictures(data, "t10k")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = FashionClassifier()
    optimizer = torch.optim.AdamW(network.parameters(), lr=peak_rate, weight_decay=0.05)
    for step in tqdm(range(steps), desc="training the classifier", mininterval=10):
        chosen = torch.randint(0, len(images), (batch,), generator=generator(seed, "training step", step))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak_rate)
        loss = F.cross_entropy(network(images[chosen])[1], labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        features, scores = (torch.cat(parts) for parts in zip(*(network(part) for part in test_images.split(500)), strict=True))
    accuracy = float((scores.argmax(1) == test_labels).double().mean())
    metadata = {"trained_on": "Fashion-MNIST's training set", "test_accuracy": f"{accuracy:.4f}"}
    write_beside(out, lambda path: save_file(network.state_dict() | {"reference": features.half()}, path, metadata))
    typer.echo(f"{out}: recognises {accuracy:.1%} of the test set")


if __name__ == "__main__":
    try:
        app()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
