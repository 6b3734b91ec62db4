"""The teachers that ship: official names, small, and as good as the README says."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mediatorize import load_model
from mediatorize.diffusion.process import noised, process_of
from mediatorize.diffusion.sampling import Sampler, sample_many
from mediatorize.evaluation.digits import digit_classifier, digit_images
from mediatorize.evaluation.metrics import distance_of_halves, frechet_distance
from mediatorize.formats.checkpoint import open_checkpoint

DIGITS = Path(__file__).parent.parent / "recipes" / "digits"


@pytest.mark.parametrize("family", ["sit", "dit"])
def test_a_teacher_is_small_and_known_without_flags(family: str) -> None:
    path = DIGITS / f"{family}.safetensors"
    checkpoint = open_checkpoint(path)
    assert path.stat().st_size <= 8_000_000
    assert checkpoint.format == "official"
    assert (checkpoint.arch.family, checkpoint.arch.heads, checkpoint.arch.tokens) == (family, 4, 64)


@pytest.mark.parametrize("family", ["sit", "dit"])
def test_a_teacher_predicts_its_target_on_real_digits(family: str) -> None:
    model = load_model(DIGITS / f"{family}.safetensors")
    images, labels = (values[::29] for values in digit_images())
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=generator)
    levels = torch.rand(len(images), generator=generator) * 0.8 + 0.1
    process = process_of(model.arch)
    t = process.time_at(levels).round() if family == "dit" else process.time_at(levels)
    with torch.no_grad():
        output = model(noised(process, images, noise, t), t, labels)[:, :1]
    target = process.target(images, noise)
    assert float((output - target).square().mean() / target.square().mean()) < 0.15


@pytest.mark.slow
@pytest.mark.parametrize(("family", "solver", "steps", "cfg_scale"), [("sit", "euler", 25, 1.0), ("dit", "ddim", 50, 1.2)])
def test_a_teacher_is_as_good_as_stated(family: str, solver: str, steps: int, cfg_scale: float) -> None:
    model = load_model(DIGITS / f"{family}.safetensors")
    labels = torch.arange(2000) % 10
    sampler = Sampler.resolve(model.arch, solver=solver, steps=steps, cfg_scale=cfg_scale)
    samples = sample_many(model, labels, sampler, "softmax", batch=250)
    classifier = digit_classifier()
    accuracy = classifier.accuracy(samples, labels)
    distance = frechet_distance(classifier.features(samples), classifier.features(digit_images()[0]))
    assert accuracy >= 0.96
    assert distance <= 1.6 * distance_of_halves(classifier.features(digit_images()[0]))


def test_the_frechet_distance_is_the_closed_form_of_gaussians() -> None:
    random = np.random.default_rng(0)
    first = random.normal(size=(20_000, 3)) * [1.0, 2.0, 3.0]
    second = random.normal(size=(20_000, 3)) * [2.0, 2.0, 1.0] + [1.0, 0.0, -2.0]
    assert frechet_distance(first, second) == pytest.approx(1 + 4 + 1 + 0 + 4, rel=0.05)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-8)
    turned = np.linalg.qr(random.normal(size=(3, 3)))[0]
    assert frechet_distance(first @ turned, second @ turned) == pytest.approx(frechet_distance(first, second), rel=1e-6)


def test_the_classifier_knows_real_digits_and_not_noise() -> None:
    images, labels = digit_images()
    assert digit_classifier().accuracy(images, labels) > 0.99
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert digit_classifier().accuracy(noise, labels) < 0.3


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_resumes_to_the_same_weights(optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DIGITS))
    import train

    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    run = train.Training(steps=4, batch=4, peak_rate=1e-3, seed=0, optimizer=optimizer)
    arguments = (train.teacher_architecture("dit"), *digit_images(), run, "digits")
    train.train(*arguments, tmp_path / "whole.safetensors")
    real, calls = train.training_loss, []

    def interrupted(*arguments: object) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(train, "training_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train(*arguments, tmp_path / "broken.safetensors")
    train.train(*arguments, tmp_path / "broken.safetensors")
    assert len(calls) == 6
    whole, broken = (load_model(tmp_path / f"{name}.safetensors").state_dict() for name in ("whole", "broken"))
    assert all(torch.equal(value, broken[name]) for name, value in whole.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.safetensors", "whole.safetensors"]
    sys.modules.pop("train")
