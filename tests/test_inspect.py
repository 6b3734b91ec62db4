"""Inspection: published costs and sizes, what files and bundles turn out to be, as text and as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from conftest import TINY, official_state, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mediatorize.errors import UserError
from mediatorize.evaluation import timing
from mediatorize.evaluation.timing import PairedTime
from mediatorize.formats import bundle
from mediatorize.model.architecture import Architecture, preset
from mediatorize.model.cost import count_parameters
from mediatorize.model.levels import SOFTMAX, Level, MediatorSettings
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.report.inspection import facts, words
from mediatorize.stages.inspect import CallTimes, Inspection, inspect

PUBLISHED_GMACS = {
    256: {"S": (0.36, 1.41, 6.06), "B": (1.42, 5.57, 23.01), "L": (5.01, 19.70, 80.70), "XL": (7.39, 29.04, 118.62)},
    512: {"S": (1.43, 6.07, 31.44), "B": (5.59, 23.03, 106.38), "L": (19.73, 80.74, 360.98), "XL": (29.09, 118.66, 524.54)},
}
"""By image size and model, for patches of 8, 4 and 2 (facts.md)."""

PUBLISHED_PARAMETERS = {"S": 33, "B": 130, "L": 458, "XL": 675}
"""In millions, for patches of 2 (DiT's table 1)."""


def counted_flops(arch: Architecture, settings: MediatorSettings | None = None, levels: Sequence[Level] = (SOFTMAX,)) -> list[int]:
    """torch's own count of one forward on one sample, at each level."""
    with torch.device("meta"):
        model = DiffusionTransformer(arch, settings)
        inputs = torch.empty(1, arch.channels, *arch.input_size), torch.empty(1), torch.empty(1, dtype=torch.long)
    counts = []
    for level in levels:
        with FlopCounterMode(display=False) as counter:
            model(*inputs, levels=level)
        counts.append(counter.get_total_flops())
    return counts


def refusal(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        inspect(*arguments)
    assert caught.value.hint
    return caught.value.message


def write_bundle(folder: Path, model: DiffusionTransformer) -> Path:
    assert model.settings is not None
    folder.mkdir()
    bundle.write_bundle(folder, model, bundle.BundleConfig(model.arch, model.settings, bundle.Origin("a.pt")), "card")
    return folder


# --- published sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["DiT", "SiT"])
@pytest.mark.parametrize("image_size", PUBLISHED_GMACS)
@pytest.mark.parametrize("letter", ["S", "B", "L", "XL"])
def test_cost_is_the_published_one(letter: str, image_size: int, family: str) -> None:
    for patch, published in zip((8, 4, 2), PUBLISHED_GMACS[image_size][letter], strict=True):
        name = f"{family}-{letter}/{patch}"
        report = facts(inspect(f"{name}@{image_size}"))
        for macs in (report["macs"], report["flops"] / 2, sum(report["flops_by_part"].values()) / 2):
            assert macs / 1e9 == pytest.approx(published, abs=0.0051)  # rounded to a hundredth
        assert report["name"] == name
        assert report["image_size"] == (image_size, image_size)


@pytest.mark.parametrize("letter", PUBLISHED_PARAMETERS)
def test_parameters_are_the_published_ones(letter: str) -> None:
    assert inspect(f"DiT-{letter}/2@256").parameters / 1e6 == pytest.approx(PUBLISHED_PARAMETERS[letter], abs=0.6)


def test_xl_2_is_what_the_paper_says() -> None:
    text = words(inspect("DiT-XL/2@256"))
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


def test_reachable_reduction_is_what_a_model_runs_at_three_resolutions(official_file: Callable[..., Path]) -> None:
    inspection = inspect(str(official_file()), family="sit", num_heads=3, num_classes=10)
    rows = inspection.reachable
    assert [row.arch.grid for row in rows] == [(2, 2), (4, 4), (8, 8)]
    assert [list(row.relative) for row in rows] == [[1, 4], [1, 4, 16], [1, 4, 16, 64]]
    for row in rows:
        fitting = tuple(row.relative)
        settings = dataclasses.replace(inspection.settings, levels=fitting)
        softmax, *others = counted_flops(dataclasses.replace(TINY, grid=row.arch.grid), settings, (SOFTMAX, *fitting))
        assert row.flops == softmax
        assert list(row.relative.values()) == [flops / softmax for flops in others]
    told = facts(inspection)["reachable"]
    assert [(row["flops"], row["relative"]) for row in told] == [(row.flops, row.relative) for row in rows]


def test_reachable_reduction_of_a_published_size_is_told_at_three_resolutions() -> None:
    inspection = inspect("DiT-XL/2@256")
    rows = inspection.reachable
    assert [row.arch.image_size for row in rows] == [(128, 128), (256, 256), (512, 512)]
    assert [row.flops / 2e9 for row in rows[1:]] == pytest.approx([118.62, 524.54], abs=0.0051)  # as published
    assert [list(row.relative) for row in rows] == [[1, 4, 16, 64]] * 3
    text = words(inspection)
    for expected in ("256x256 (this one)", "128x128", "512x512", "m=1 ", "m=64", f"{rows[1].relative[4]:.1%}"):
        assert expected in text
    assert text.count("(this one)") == 1


def test_levels_that_do_not_fit_a_resolution_are_left_out() -> None:
    """16 tokens here and 4 at half the size have no 64 mediators."""
    rows = inspect("SiT-S/8@256").reachable
    assert [list(row.relative) for row in rows] == [[1, 4], [1, 4, 16], [1, 4, 16, 64]]


def test_report_of_a_training_checkpoint(tmp_path: Path) -> None:
    state = official_state(tiny_model())
    path = tmp_path / "0100000.pt"
    torch.save({"model": state, "ema": state, "args": argparse.Namespace(model="SiT-S/2", num_classes=10)}, path)
    inspection = inspect(str(path), num_heads=3)
    assert (inspection.source, inspection.weights, inspection.arch) == (str(path), "ema", TINY)
    assert inspection.parameters == sum(value.numel() for value in state.values()) == count_parameters(TINY)
    assert inspect(str(path), num_heads=3, weights="model").weights == "model"
    text = words(inspection)
    assert f"{path}: SiT-3x48/2 (official, ema)" in text
    assert "3 layers, width 48, 3 heads of 16, patches of 2, 16 tokens (4x4), 10 classes and null" in text
    assert "4 channels of 8x8 latents, pictures of 64x64" in text


def test_report_of_pixels(official_file: Callable[..., Path]) -> None:
    text = words(inspect(str(official_file(channels=1)), family="sit", num_heads=3))
    assert "1 channels of 8x8 pixels, pictures of 8x8" in text


def test_what_was_assumed_is_in_the_report(official_file: Callable[..., Path]) -> None:
    inspection = inspect(str(official_file()), family="dit", num_heads=3)
    assert any("--num-classes" in note for note in inspection.notes)
    for note in inspection.notes:
        assert note in words(inspection)
    assert not any("--num-classes" in note for note in inspect(str(official_file()), family="dit", num_heads=3, num_classes=10).notes)


@pytest.mark.parametrize("kind", ["size", "file", "bundle"])
def test_report_is_json(tmp_path: Path, official_file: Callable[..., Path], kind: str) -> None:
    if kind == "size":
        inspection: Inspection = inspect("SiT-B/4@512")
    elif kind == "file":
        inspection = inspect(str(official_file()), family="sit", num_heads=3)
    else:
        inspection = inspect(str(write_bundle(tmp_path / "out", tiny_model(MediatorSettings((1, 4))))))
    report = json.loads(json.dumps(facts(inspection)))
    assert Architecture.from_json(report["architecture"]) == inspection.arch
    assert report["name"] == inspection.arch.name
    assert report["macs"] * 2 == report["flops"] == sum(report["flops_by_part"].values()) == counted_flops(inspection.arch)[0]
    with torch.device("meta"):
        model = DiffusionTransformer(inspection.arch, inspection.settings if kind == "bundle" else None)
    assert report["parameters"] == sum(value.numel() for value in model.state_dict().values())
    assert len(report["reachable"]) == 3


def test_a_published_size_is_told_without_torch() -> None:
    program = """import sys
from mediatorize.stages.inspect import inspect
from mediatorize.report.inspection import facts, words
found = inspect("DiT-XL/2@256")
print(words(found), facts(found)["parameters"])
print(sorted({"torch", "scipy", "sklearn", "timm", "diffusers", "matplotlib"} & set(sys.modules)))"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.splitlines()
    assert out[0].startswith("DiT-XL/2@256: DiT-XL/2")
    assert out[-1] == "[]"


# --- bundles -------------------------------------------------------------------------------------------------------------------


def test_report_of_a_bundle(tmp_path: Path) -> None:
    settings = MediatorSettings((1, 4, 9), local_rank=5)
    model = tiny_model(settings)
    path = write_bundle(tmp_path / "out", model)
    inspection = inspect(str(path))
    assert (inspection.format, inspection.arch, inspection.settings) == ("bundle", TINY, settings)
    assert inspection.parameters == sum(value.numel() for value in model.state_dict().values())
    added = sum(value.numel() for name, value in model.state_dict().items() if ".mediator." in name)
    text = words(inspection)
    assert "levels m=1, m=4, m=9, softmax" in text
    assert f"mediators add {added / 1e6:.1f}M" in text
    assert re.search(r"GMACs softmax +m=1 +m=4 +m=9\n", text)
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


# --- time ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [None, (0, 2)], ids=["every layer", "some layers"])
def test_time_is_measured_at_every_level(layers: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By a clock that counts the FLOPs of what runs, times are the shares of FLOPs that stand beside them."""
    settings = MediatorSettings((1, 4), local_rank=8, layers=layers)
    path = write_bundle(tmp_path / "bundle", tiny_model(settings))
    counted = FlopCounterMode(display=False)

    def seconds(call: Callable[[], object], device: torch.device) -> float:
        with counted, sdpa_kernel(SDPBackend.MATH):  # the fused one is not counted on a CPU
            call()
        return float(counted.get_total_flops())

    monkeypatch.setattr(timing, "seconds", seconds)
    found = inspect(str(path), measure=True, batch=1, device="cpu")
    assert found.times is not None
    assert list(found.times.calls) == [1, 4]
    for share, time in found.times.calls.values():
        assert time.ratio == pytest.approx(share, rel=1e-6)
        assert time.reference_seconds == counted_flops(found.arch)[0]
    rows = words(found).split("random weights:\n")[1].splitlines()
    assert [row.split()[0] for row in rows[2:]] == ["m=1", "m=4"]
    told = facts(found)["times"]
    assert (told["batch"], told["dtype"], list(told["calls"])) == (1, "float32", ["1", "4"])
    assert inspect(str(path)).times is None


def test_what_is_slower_with_fewer_flops_is_told() -> None:
    found = inspect("DiT-S/2@256")
    times = {
        1: (0.6, PairedTime(0.7, (0.6, 0.8), 1.0)),
        4: (0.7, PairedTime(1.2, (1.1, 1.3), 1.0)),
        16: (0.8, PairedTime(1.1, (0.9, 1.2), 1.0)),
    }
    where = {"device": "cpu", "processor": "a", "threads": 2}
    text = words(dataclasses.replace(found, times=CallTimes(hardware=where, dtype="float32", batch=2, calls=times)))
    assert text.endswith("Slower than softmax here, though of fewer FLOPs: m=4.")


def test_a_call_of_no_rows_is_refused() -> None:
    with pytest.raises(UserError, match="batch"):
        inspect("DiT-S/2@256", measure=True, batch=0)
