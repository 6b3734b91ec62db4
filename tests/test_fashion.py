"""Fashion-MNIST: its judge, and the script that trains the judge and the teacher."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import official_state, tiny_model
from safetensors import safe_open
from safetensors.torch import save_file
from test_data import idx, write_idx
from test_recipes import QUICK

from mediatorize import UserError, load_model, sample
from mediatorize.evaluation.features import judge
from mediatorize.formats import judges
from mediatorize.formats.checkpoint import open_checkpoint
from mediatorize.stages.compare import compare
from mediatorize.stages.evaluate import evaluate
from mediatorize.stages.run import run

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    import recipes.fashion.train as script

    return script


@pytest.fixture
def products(tmp_path: Path) -> Path:
    """Twenty made-up products of 28x28 in each part; the brightness is the class."""
    folder = tmp_path / "data"
    folder.mkdir()
    random = np.random.default_rng(0)
    for part in ("train", "t10k"):
        labels = np.arange(20) % 10
        pictures = random.integers(0, 20, (20, 28, 28)) + 24 * labels[:, None, None]
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(pictures))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return folder


def write_tiny_teacher(path: Path) -> Path:
    """A randomised DiT of grey 28x28 pictures, which is known without flags."""
    model = tiny_model(family="dit", channels=1, patch=4, grid=(7, 7), depth=2)
    save_file(official_state(model), path, {"family": "dit", "num_heads": str(model.arch.heads)})
    return path


def test_the_judge_knows_the_products_it_was_trained_with(
    script: ModuleType, products: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "judge.safetensors"
    script.classifier(data=products, steps=40, batch=16, out=file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "judge.safetensors"]
    monkeypatch.setattr(judges, "FASHION", file)
    extractor = judges.open_extractor("fashion", None, CPU)
    assert extractor is not None and extractor.own_reference is not None
    images, labels = script.pictures(products, "t10k")
    features, scores = extractor.extract(images)
    assert scores is not None
    reference = extractor.own_reference()
    assert reference.features == pytest.approx(features, rel=1e-3, abs=1e-3)  # stored in half precision
    quality = judge(features, scores, labels.numpy(), reference)
    assert quality.frechet_distance == pytest.approx(0, abs=1e-2)
    with safe_open(file, "pt") as stored:
        assert float(stored.metadata()["test_accuracy"]) == pytest.approx(quality.accuracy, abs=1e-4)
    assert f"recognises {quality.accuracy:.1%} of the test set" in capsys.readouterr().out
    grey = extractor.extract(images.expand(-1, 3, -1, -1))[0]  # as three channels
    assert grey == pytest.approx(features, rel=1e-4, abs=1e-4)


def test_what_ships_makes_products(script: ModuleType) -> None:
    """The teacher's samples are recognised, and not as other classes; and it is the model that the script trains."""
    teacher = load_model(ROOT / "recipes" / "fashion" / "dit.safetensors")
    assert teacher.arch == script.teacher_architecture()
    extractor = judges.open_extractor("fashion", None, CPU)
    assert extractor is not None and extractor.own_reference is not None
    labels = torch.arange(40) % 10
    samples = sample(teacher, labels, solver="ddim", steps=10, cfg_scale=1.5, seed=3)
    features, scores = extractor.extract(samples)
    assert scores is not None
    accuracy = (scores.argmax(1) == labels.numpy()).mean()
    assert accuracy > 0.7
    assert (scores.argmax(1) == labels.roll(1).numpy()).mean() < 0.2
    reference = extractor.own_reference()
    assert reference.features.shape == (10000, 64)
    noise, _ = extractor.extract(torch.randn(40, 1, 28, 28, generator=torch.Generator().manual_seed(0)))
    of_samples, of_noise = (judge(each, None, None, reference).frechet_distance for each in (features, noise))
    assert of_samples < of_noise / 3


def test_the_judge_refuses_other_pictures_and_says_how_it_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = r"model\.pt: the fashion classifier judges 28x28 products, not DiT-.*\. Pass --features none\."
    with pytest.raises(UserError, match=message):
        judges.refuse_unfit("model.pt", tiny_model(family="dit", channels=1).arch, "fashion", None, None, None, npz=False)
    teacher = write_tiny_teacher(tmp_path / "dit.safetensors")
    judges.refuse_unfit(str(teacher), load_model(teacher).arch, "fashion", None, None, None, npz=False)
    monkeypatch.setattr(judges, "FASHION", tmp_path / "judge.safetensors")
    for stage in (evaluate, compare):
        with pytest.raises(
            UserError, match=r"judge\.safetensors: no such file; .* run python -m recipes\.fashion\.train classifier --out "
        ):
            stage(str(teacher), tmp_path / "out", features="fashion", samples=4, steps=2, device="cpu")
        assert [path.name for path in tmp_path.iterdir()] == ["dit.safetensors"]  # nothing was sampled
    judges.FASHION.write_bytes(b"text")
    with pytest.raises(UserError, match=r"judge\.safetensors: not a whole safetensors file"):
        judges.open_extractor("fashion", None, CPU)


def test_the_script_says_where_the_data_are_missing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "recipes.fashion.train", "teacher", "--data", str(tmp_path / "nowhere")]
    done = subprocess.run([*command, "--out", str(tmp_path / "dit.safetensors")], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        f"error: {tmp_path}/nowhere: no such folder. Install Debian's package dataset-fashion-mnist, or pass --data FOLDER.\n"
    )
    assert not list(tmp_path.iterdir())


def test_the_script_trains_a_teacher_that_is_known_without_flags(script: ModuleType, products: Path, tmp_path: Path) -> None:
    script.teacher(data=products, steps=2, batch=4, out=tmp_path / "dit.safetensors")
    checkpoint = open_checkpoint(tmp_path / "dit.safetensors")
    assert checkpoint.arch == script.teacher_architecture()
    assert (checkpoint.arch.input_size, checkpoint.arch.tokens) == ((28, 28), 49)


def test_the_script_refuses_pictures_of_another_size(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz: pictures of 8x8 pixels; Fashion-MNIST has 28x28"):
        script.classifier(data=write_idx(tmp_path / "data"), out=tmp_path / "judge.safetensors")


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
def test_the_recipe_runs_whole(script: ModuleType, products: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judges, "FASHION", tmp_path / "judge.safetensors")
    script.classifier(data=products, steps=2, batch=4, out=judges.FASHION)
    teacher = write_tiny_teacher(tmp_path / "dit.safetensors")
    shorter = [change.replace(".steps=3", ".steps=5").replace("samples=40", "samples=12") for change in QUICK]
    places = [f"{stage}.checkpoint={teacher}" for stage in ("inspect", "convert")]
    recipe = ROOT / "recipes" / "fashion.toml"
    planned = run(recipe, set=[*shorter, *places], out=tmp_path / "out", dry_run=True)
    assert list(planned.told) == ["inspect", "convert"] and not (tmp_path / "out").exists()
    result = run(recipe, set=[*shorter, *places], out=tmp_path / "out")
    assert list(result.told) == ["inspect", "convert", "finetune", "calibrate", "sample", "evaluate", "export"]
    found = json.loads((tmp_path / "out" / "evaluation" / "evaluation.json").read_text())
    assert (found["features"], found["reference"]) == ("the fashion classifier", "the real products")
    assert {"softmax", "converged teacher", "plan of 3 calls", "ddim, 3 calls", "1", "4"} <= {row["level"] for row in found["results"]}
    assert all(row["frechet_distance"] > 0 and row["accuracy"] is not None for row in found["results"])
