"""Inspection: published costs and sizes, what files and bundles turn out to be, as text and as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY, official_state, tiny_model

from mediatorize.errors import UserError
from mediatorize.formats import bundle
from mediatorize.model import cost
from mediatorize.model.architecture import Architecture, MediatorSettings, preset
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.stages.inspect import Inspection, count_parameters, inspect

PUBLISHED_GMACS = {
    256: {"S": (0.36, 1.41, 6.06), "B": (1.42, 5.57, 23.01), "L": (5.01, 19.70, 80.70), "XL": (7.39, 29.04, 118.62)},
    512: {"S": (1.43, 6.07, 31.44), "B": (5.59, 23.03, 106.38), "L": (19.73, 80.74, 360.98), "XL": (29.09, 118.66, 524.54)},
}
"""By image size and model, for patches of 8, 4 and 2 (facts.md)."""


def refusal(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        inspect(*arguments)
    assert caught.value.hint
    return caught.value.message


def write_bundle(folder: Path, model: DiffusionTransformer) -> Path:
    assert model.settings is not None
    folder.mkdir()
    bundle.write_bundle(folder, model, bundle.BundleConfig(model.arch, model.settings, {"file": "a.pt"}), "card")
    return folder


# --- published sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["DiT", "SiT"])
@pytest.mark.parametrize("image_size", PUBLISHED_GMACS)
@pytest.mark.parametrize("letter", ["S", "B", "L", "XL"])
def test_cost_is_the_published_one(letter: str, image_size: int, family: str) -> None:
    for patch, published in zip((8, 4, 2), PUBLISHED_GMACS[image_size][letter], strict=True):
        name = f"{family}-{letter}/{patch}"
        report = inspect(f"{name}@{image_size}").to_json()
        assert report["macs"] / 1e9 == pytest.approx(published, abs=0.02)
        assert report["flops"] == 2 * report["macs"] == sum(report["flops_by_part"].values())
        assert report["name"] == name
        assert report["image_size"] == (image_size, image_size)


def test_xl_2_is_what_the_paper_says() -> None:
    text = str(inspect("DiT-XL/2@256"))
    assert "118.62" in text
    assert "675.1M parameters" in text
    assert "28 layers, width 1152, 16 heads of 72, patches of 2, 256 tokens (16x16), 1000 classes and null" in text


@pytest.mark.parametrize(
    "arch",
    [
        *(preset(name) for name in ("DiT-XL/2@256", "DiT-XL/2@512", "SiT-S/8@256", "DiT-B/4@256", "SiT-L/2@256")),
        TINY,
        dataclasses.replace(TINY, null_class=False),
        dataclasses.replace(TINY, learn_sigma=False, channels=3, patch=4),
        dataclasses.replace(TINY, grid=(2, 7), mlp_width=100, depth=1),
    ],
    ids=lambda arch: arch.name,
)
def test_parameters_are_counted_as_a_model_has_them(arch: Architecture) -> None:
    with torch.device("meta"):
        model = DiffusionTransformer(arch)
    assert count_parameters(arch) == sum(value.numel() for value in model.state_dict().values())


UNKNOWN = (
    *("DiT-Q/2@256", "UViT-XL/2@256", "DiT-XL@256", "DiT-XL/2@", "@256", "DiT-XL/two@256", "DiT-XL/2@256@2"),
    *("DiT-XL/0@256", "DiT-XL/2@4", "DiT-XL/2@-256", "DiT-XL/2@250"),
)


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_size_is_refused_by_name(name: str) -> None:
    assert name in refusal(name)


def test_size_without_pixels_is_a_file_that_is_not_there() -> None:
    assert "no such file" in refusal("DiT-XL/2")


# --- reports -------------------------------------------------------------------------------------------------------------------


def test_reachable_reduction_is_the_cost_model_at_three_resolutions() -> None:
    inspection = inspect("DiT-XL/2@256")
    rows = inspection.reachable()
    assert [row["image_size"] for row in rows] == [(128, 128), (256, 256), (512, 512)]
    for row in rows:
        arch = preset(f"DiT-XL/2@{row['image_size'][0]}")
        assert row["flops"] == cost.forward_flops(arch)
        assert row["relative"].keys() == {1, 4, 16, 64}
        for level, relative in row["relative"].items():
            assert relative == cost.forward_flops(arch, level, inspection.settings) / row["flops"]
    text = str(inspection)
    for words in ("256x256 (this one)", "128x128", "512x512", "m=1 ", "m=64", f"{rows[1]['relative'][4]:.1%}"):
        assert words in text
    assert text.count("(this one)") == 1


def test_levels_that_do_not_fit_a_resolution_are_left_out() -> None:
    """16 tokens here and 4 at half the size have no 64 mediators."""
    rows = inspect("SiT-S/8@256").reachable()
    assert [list(row["relative"]) for row in rows] == [[1, 4], [1, 4, 16], [1, 4, 16, 64]]


def test_report_of_a_training_checkpoint(tmp_path: Path) -> None:
    state = official_state(tiny_model())
    path = tmp_path / "0100000.pt"
    torch.save({"model": state, "ema": state, "args": argparse.Namespace(model="SiT-S/2", num_classes=10)}, path)
    inspection = inspect(str(path), num_heads=3)
    assert (inspection.source, inspection.weights, inspection.arch) == (str(path), "ema", TINY)
    assert inspection.parameters == sum(value.numel() for value in state.values()) == count_parameters(TINY)
    assert inspect(str(path), num_heads=3, weights="model").weights == "model"
    text = str(inspection)
    assert f"{path}: SiT-3x48/2 (official, ema)" in text
    assert "3 layers, width 48, 3 heads of 16, patches of 2, 16 tokens (4x4), 10 classes and null" in text
    assert "4 channels of 8x8 latents, pictures of 64x64" in text


def test_report_of_pixels(official_file: Callable[..., Path]) -> None:
    text = str(inspect(str(official_file(channels=1)), family="sit", num_heads=3))
    assert "1 channels of 8x8 pixels, pictures of 8x8" in text


def test_what_was_assumed_is_in_the_report(official_file: Callable[..., Path]) -> None:
    inspection = inspect(str(official_file()), family="dit", num_heads=3)
    assert any("--num-classes" in note for note in inspection.notes)
    for note in inspection.notes:
        assert note in str(inspection)
    assert not any("--num-classes" in note for note in inspect(str(official_file()), family="dit", num_heads=3, num_classes=10).notes)


@pytest.mark.parametrize("kind", ["size", "file", "bundle"])
def test_report_is_json(tmp_path: Path, official_file: Callable[..., Path], kind: str) -> None:
    if kind == "size":
        inspection: Inspection = inspect("SiT-B/4@512")
    elif kind == "file":
        inspection = inspect(str(official_file()), family="sit", num_heads=3)
    else:
        inspection = inspect(str(write_bundle(tmp_path / "out", tiny_model(MediatorSettings((1, 4))))))
    report = json.loads(json.dumps(inspection.to_json()))
    assert Architecture.from_json(report["architecture"]) == inspection.arch
    assert report["name"] == inspection.arch.name
    assert report["macs"] * 2 == report["flops"] == cost.forward_flops(inspection.arch)
    assert report["parameters"] == inspection.parameters
    assert len(report["reachable"]) == 3


# --- bundles -------------------------------------------------------------------------------------------------------------------


def test_report_of_a_bundle(tmp_path: Path) -> None:
    settings = MediatorSettings((1, 4, 9), local_rank=5)
    model = tiny_model(settings)
    path = write_bundle(tmp_path / "out", model)
    inspection = inspect(str(path))
    assert (inspection.format, inspection.arch, inspection.settings) == ("bundle", TINY, settings)
    assert inspection.parameters == sum(value.numel() for value in model.state_dict().values())
    added = inspection.parameters - count_parameters(TINY)
    text = str(inspection)
    assert "levels 1, 4, 9, softmax" in text
    assert f"mediators add {added / 1e6:.1f}M" in text
    assert "m=9" in text
    assert "rank 5" in text


def test_bundle_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    model = tiny_model(MediatorSettings((1, 4)))
    model.state_dict()["blocks.1.attn.mediator.proj.bias"][3] = torch.nan
    assert "blocks.1.attn.mediator.proj.bias" in refusal(str(write_bundle(tmp_path / "out", model)))


def test_bundle_without_whole_weights_is_refused(tmp_path: Path) -> None:
    file = write_bundle(tmp_path / "out", tiny_model(MediatorSettings((1, 4)))) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    assert "not a whole safetensors file" in refusal(str(tmp_path / "out"))
    file.unlink()
    assert "model.safetensors" in refusal(str(tmp_path / "out"))


def test_bundle_whose_weights_are_of_another_model_is_refused(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "out", tiny_model(MediatorSettings((1, 4))))
    other = write_bundle(tmp_path / "other", tiny_model(MediatorSettings((1, 4)), depth=2))
    (other / "model.safetensors").replace(path / "model.safetensors")
    assert "model.safetensors" in refusal(str(path))
