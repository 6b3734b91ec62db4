"""Data on disk: every layout read back exactly, every failure named, nothing unpickled, conversion on data."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from safetensors.torch import save_file
from test_cli import mediatorize
from test_convert import QUICK, assert_same_state, state_of

from mediatorize import Architecture, UserError
from mediatorize.compression.trajectories import data_states
from mediatorize.diffusion.process import process_of
from mediatorize.formats import bundle
from mediatorize.formats.data import LAYOUTS, open_data, open_idx, read_idx
from mediatorize.formats.images import VAE_SCALE, to_pixels
from mediatorize.report.conversion import facts, words
from mediatorize.stages.convert import convert

PIXELS = dataclasses.replace(TINY, channels=3)
GREY = dataclasses.replace(TINY, channels=1)
WIDE = dataclasses.replace(TINY, channels=32)
LABELS = [3, 0, 9, 1, 3]


def latents(channels: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(len(LABELS), channels, 8, 8, generator=torch.Generator().manual_seed(seed))


def write_fast_dit(path: Path) -> Path:
    for part in ("imagenet256_features", "imagenet256_labels"):
        (path / part).mkdir(parents=True)
    for index, (latent, label) in enumerate(zip(latents(), LABELS, strict=True)):
        name = f"{index + 8}.npy"  # 8, 9, 10 ..: as text they would sort otherwise
        np.save(path / "imagenet256_features" / name, latent[None].numpy())
        np.save(path / "imagenet256_labels" / name, np.array([label]))
    return path


def write_repa(path: Path) -> Path:
    listed = []
    for index, (mean, std) in enumerate(zip(latents(), latents(seed=1).abs(), strict=True)):
        name = f"0000{index // 3}/img-mean-std-{index:08d}.npy"
        (path / "vae-sd" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(path / "vae-sd" / name, torch.cat([mean, std]).numpy())
        listed.append([name, LABELS[index]])
    (path / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": listed[::-1]}))
    return path


def write_lightning_dit(path: Path, channels: int = 4) -> Path:
    path.mkdir()
    for shard, rows in enumerate((slice(0, 2), slice(2, 5))):
        tensors = {
            "latents": latents(channels)[rows].contiguous(),
            "latents_flip": latents(channels)[rows].flip(-1).contiguous(),
            "labels": torch.tensor(LABELS[rows]),
        }
        save_file(tensors, path / f"latents_rank00_shard{shard:03d}.safetensors")
    torch.save(statistics(channels), path / "latents_stats.pt")
    return path


def statistics(channels: int) -> dict[str, torch.Tensor]:
    ramp = torch.arange(channels).view(1, -1, 1, 1)
    return {"mean": ramp / 4, "std": 1.0 + ramp}


def write_npz(path: Path, channels: int = 3, **changes: Any) -> Path:
    arrays = {"arr_0": to_pixels(latents(channels).tanh()), "labels": np.array(LABELS)} | changes
    np.savez(path.with_suffix(".npz"), **{key: value for key, value in arrays.items() if value is not None})
    return path.with_suffix(".npz")


def write_images(path: Path, side: int = 8) -> Path:
    for label in range(10):
        (path / f"n0{label}").mkdir(parents=True)
    pictures = np.random.default_rng(0).integers(0, 256, (len(LABELS), side, side, 3), np.uint8)
    for index, label in enumerate(LABELS):
        Image.fromarray(pictures[index]).save(path / f"n0{label}" / f"{index}.png")
    return path


def idx(values: np.ndarray[Any, Any]) -> bytes:
    """Bytes in MNIST's IDX format."""
    return bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes() + values.astype(np.uint8).tobytes()


def write_idx(path: Path, part: str = "train", packed: bool = True) -> Path:
    path.mkdir(exist_ok=True)
    for kind, values in (("images-idx3", to_pixels(latents(1).tanh())[..., 0]), ("labels-idx1", np.array(LABELS))):
        file = path / f"{part}-{kind}-ubyte{'.gz' * packed}"
        file.write_bytes(gzip.compress(idx(values)) if packed else idx(values))
    return path


WRITERS: dict[str, tuple[Callable[[Path], Path], Architecture]] = {
    "fast-DiT": (write_fast_dit, TINY),
    "REPA": (write_repa, TINY),
    "LightningDiT": (write_lightning_dit, TINY),
    "npz": (write_npz, PIXELS),
    "IDX": (write_idx, GREY),
    "images": (write_images, PIXELS),
}


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    """A VAE that halves the side, on disk."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4, **kinds).save_pretrained(
        tmp_path / "vae"
    )
    return tmp_path / "vae"


# --- what is read is what was written ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_recognised_and_a_function_of_seed_and_index(layout: str, tmp_path: Path) -> None:
    write, arch = WRITERS[layout]
    data = open_data(write(tmp_path / "data"), arch)
    assert (data.layout, len(data)) == (layout, 5)
    x, y = data.read(range(5), seed=0)
    assert (x.dtype, x.shape, y.dtype) == (torch.float32, (5, arch.channels, 8, 8), torch.long)
    assert sorted(y.tolist()) == sorted(LABELS)
    again, labels = data.read([4, 1], seed=0)
    assert torch.equal(again, x[[4, 1]])
    assert torch.equal(labels, y[[4, 1]])


def test_fast_dit_latents_are_as_stored(tmp_path: Path) -> None:
    x, y = open_data(write_fast_dit(tmp_path / "data"), TINY).read(range(5), seed=0)
    assert torch.equal(x, latents())
    assert y.tolist() == LABELS


def test_repa_latents_are_drawn_from_their_posterior_and_scaled(tmp_path: Path) -> None:
    path = write_repa(tmp_path / "data")
    data = open_data(path, TINY)
    mean, std = latents(), latents(seed=1).abs()
    draws = torch.stack([data.read(range(5), seed)[0] for seed in range(400)])
    assert data.read(range(5), seed=0)[1].tolist() == LABELS
    noise = (draws / VAE_SCALE - mean) / std
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.std()) - 1) < 0.01
    assert not torch.equal(noise[0, 0], noise[0, 1])
    inner = open_data(path / "vae-sd", TINY)
    assert torch.equal(inner.read(range(5), 7)[0], draws[7])


@pytest.mark.parametrize("channels", [4, 32])
def test_lightning_dit_latents_are_flipped_by_chance_and_in_the_models_scale(channels: int, tmp_path: Path) -> None:
    data = open_data(write_lightning_dit(tmp_path / "data", channels), dataclasses.replace(TINY, channels=channels))
    moments = statistics(channels)
    scaled = latents(4) * VAE_SCALE if channels == 4 else (latents(channels) - moments["mean"]) / moments["std"]
    flipped = 0
    for seed in range(40):
        x, y = data.read(range(5), seed)
        assert y.tolist() == LABELS
        for item, expected in zip(x, scaled, strict=True):
            assert torch.equal(item, expected) or torch.equal(item, expected.flip(-1))
            flipped += not torch.equal(item, expected)
    assert 70 < flipped < 130


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_of_an_npz_come_back_bit_for_bit(channels: int, tmp_path: Path) -> None:
    arch = dataclasses.replace(TINY, channels=channels)
    x, y = open_data(write_npz(tmp_path / "bytes", channels), arch).read(range(5), seed=0)
    assert np.array_equal(to_pixels(x), np.load(tmp_path / "bytes.npz")["arr_0"])
    assert y.tolist() == LABELS
    floats = latents(channels).tanh().permute(0, 2, 3, 1).numpy()
    other = write_npz(tmp_path / "floats", channels, arr_0=None, labels=None, images=floats, arr_1=np.array(LABELS))
    assert np.array_equal(open_data(other, arch).read(range(5), seed=0)[0].permute(0, 2, 3, 1).numpy(), floats)


@pytest.mark.parametrize("packed", [True, False])
def test_pixels_of_idx_files_come_back_bit_for_bit(packed: bool, tmp_path: Path) -> None:
    path = write_idx(write_idx(tmp_path / "data", "t10k"), packed=packed)
    x, y = open_data(path, GREY).read(range(5), seed=0)
    assert np.array_equal(to_pixels(x), to_pixels(latents(1).tanh()))
    assert y.tolist() == LABELS
    (path / f"train-labels-idx1-ubyte{'.gz' * packed}").unlink()
    assert open_idx(path, (1, 8, 8), 10, "t10k").labels.tolist() == LABELS  # the parts do not need each other


def test_images_of_the_models_size_come_back_bit_for_bit_and_folders_are_classes(tmp_path: Path) -> None:
    data = open_data(write_images(tmp_path / "data"), PIXELS)
    x, y = data.read(range(5), seed=0)
    assert y.tolist() == sorted(LABELS)
    for index, picture in enumerate(to_pixels(x)):
        with Image.open(data.items.name(index)) as image:
            assert np.array_equal(picture, np.array(image))
    grey = open_data(tmp_path / "data", GREY).read([0], seed=0)[0]
    with Image.open(data.items.name(0)) as image:
        assert np.array_equal(to_pixels(grey)[0, :, :, 0], np.array(image.convert("L")))


def test_other_images_are_cropped_to_the_middle_and_resized(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "data")
    stripes = np.zeros((16, 64, 3), np.uint8)
    stripes[:, 18:46] = (10, 200, 90)  # the middle, and what the resizing filter sees beside it
    Image.fromarray(stripes).save(folder / "n00" / "0.jpeg", quality=100, subsampling=0)
    Image.fromarray(stripes).save(folder / "n00" / "0.bmp")
    x, y = open_data(folder, PIXELS).read([0, 1], seed=0)
    assert y.tolist() == [0, 0]
    assert (to_pixels(x)[0] == (10, 200, 90)).all()
    assert np.abs(to_pixels(x)[1].astype(int) - (10, 200, 90)).max() < 8


@pytest.mark.parametrize("source", ["npz", "images"])
def test_pictures_are_encoded_by_a_vae(source: str, tmp_path: Path, vae: Path) -> None:
    from diffusers import AutoencoderKL

    pictures = np.random.default_rng(1).integers(0, 256, (5, 16, 16, 3), np.uint8)
    path = write_npz(tmp_path / "data", arr_0=pictures) if source == "npz" else write_images(tmp_path / "data", side=16)
    data = open_data(path, TINY, vae)
    pixels = open_data(path, dataclasses.replace(PIXELS, grid=(8, 8))).read(range(5), 0)[0]
    with torch.no_grad():
        posterior = AutoencoderKL.from_pretrained(vae).encode(pixels).latent_dist
    draws = torch.stack([data.read(range(5), seed)[0] for seed in range(60)])
    assert draws.shape[1:] == (5, 4, 8, 8)
    noise = (draws / VAE_SCALE - posterior.mean) / posterior.std
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02
    assert torch.equal(data.read([3], 5)[0][0], draws[5, 3])
    facts = data.facts()
    assert facts.vae_sha256
    assert facts.encode_flops > 2 * 16 * 16 * 9 * 3 * 8  # the first convolution alone


@pytest.mark.parametrize("layout", LAYOUTS)
def test_facts_tell_data_sets_apart_and_do_not_change_with_their_place(layout: str, tmp_path: Path) -> None:
    write, arch = WRITERS[layout]
    path = write(tmp_path / "data")
    facts = open_data(path, arch).facts()
    assert (facts.name, facts.layout, facts.items, facts.encode_flops) == (path.name, layout, 5, 0)
    (tmp_path / "elsewhere").mkdir()
    path.rename(tmp_path / "elsewhere" / path.name)
    moved = tmp_path / "elsewhere" / path.name
    assert open_data(moved, arch).facts() == facts
    change_one_item(layout, moved)
    assert open_data(moved, arch).facts().sha256 != facts.sha256


def change_one_item(layout: str, path: Path) -> None:
    if layout == "npz":
        np.savez(path, arr_0=255 - np.load(path)["arr_0"], labels=np.array(LABELS))
    elif layout == "images":
        Image.new("RGB", (8, 8), "red").save(path / "n03" / "0.png")
    elif layout == "IDX":
        file = path / "train-images-idx3-ubyte.gz"
        file.write_bytes(gzip.compress(idx(255 - read_idx(file, 3))))
    elif layout == "LightningDiT":
        changed = {"latents": latents()[:2] + 1, "latents_flip": latents()[:2], "labels": torch.tensor(LABELS[:2])}
        save_file(changed, path / "latents_rank00_shard000.safetensors")
    else:
        file = next(path.rglob("*9.npy" if layout == "fast-DiT" else "*4.npy"))
        np.save(file, np.load(file) + 1)


# --- what is wrong is named ----------------------------------------------------------------------------------------------------


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.witness),)


def refused(path: Path, arch: Architecture, message: str, vae: Path | None = None) -> None:
    """Opening, or else reading every item, is refused with this message and the path of the data."""
    with pytest.raises(UserError, match=message) as error:
        open_data(path, arch, vae).read(range(5), 0)
    assert "\n" not in str(error.value)
    assert error.value.hint


@pytest.mark.parametrize("index", [0, 3])
def test_broken_npy_items_are_named_when_read(index: int, tmp_path: Path) -> None:
    path = write_fast_dit(tmp_path / "data")
    file = path / "imagenet256_features" / f"{index + 8}.npy"
    whole = file.read_bytes()
    good = open_data(path, TINY)
    cases: list[tuple[bytes, str]] = [
        (whole[:-10], "not a whole .npy file"),
        (whole[:20], "not a whole .npy file"),
        (b"", "not a whole .npy file"),
        (b"<html>", "not a whole .npy file"),
    ]
    for content, message in cases:
        file.write_bytes(content)
        refused(path, TINY, f"{file}: {message}")
    for array, message in (
        (np.zeros((1, 4, 8, 9), np.float32), r"shape \[1, 4, 8, 9\] where .* needs \[1, 4, 8, 8\]"),
        (np.full((1, 4, 8, 8), np.nan, np.float32), "has values that are NaN or infinite"),
        (np.full((1, 4, 8, 8), np.inf, np.float16), "has values that are NaN or infinite"),
        (np.zeros((1, 4, 8, 8), np.int64), "latents of type int64"),
    ):
        np.save(file, array)
        refused(path, TINY, f"{file}: {message}")
    file.unlink()
    with pytest.raises(UserError, match=f"{file}: cannot be read \\(No such file"):
        good.read([index], 0)


@pytest.mark.parametrize("form", ["object array", "plain pickle"])
def test_pickled_npy_are_refused_by_name_and_not_executed(form: str, tmp_path: Path) -> None:
    import pickle

    hostile = Hostile(tmp_path / "executed")
    array = np.empty(1, dtype=object)
    array[0] = hostile
    path = write_fast_dit(tmp_path / "data")
    for file in [path / "imagenet256_features" / "10.npy", path / "imagenet256_labels" / "11.npy"]:
        before = file.read_bytes()
        if form == "object array":
            np.save(file, array)
        else:
            file.write_bytes(pickle.dumps(hostile))
        refused(path, TINY, f"{file}: is a pickled object, as U-ViT writes its latents; it was not opened")
        file.write_bytes(before)
    # U-ViT's own folders: no labels beside them
    for name in ("imagenet256_features", "uvit"):
        folder = tmp_path / name / name if name == "imagenet256_features" else tmp_path / name
        folder.mkdir(parents=True)
        np.save(folder / "0.npy", array)
        refused(tmp_path / name, TINY, r"0\.npy: is a pickled object, as U-ViT writes")
    npz = tmp_path / "pickled.npz"
    np.savez(npz, arr_0=array, labels=np.array([0]))
    refused(npz, PIXELS, f"{npz}: cannot be read as an .npz \\(it holds pickled objects")
    wide = write_lightning_dit(tmp_path / "wide", 32)
    torch.save({"mean": hostile}, wide / "latents_stats.pt")
    refused(wide, WIDE, r"latents_stats.pt: its pickle asks to load \w+.mkdir")
    assert not (tmp_path / "executed").exists()


def test_what_is_wrong_with_fast_dit_folders_is_said(tmp_path: Path) -> None:
    path = write_fast_dit(tmp_path / "data")
    labels = path / "imagenet256_labels"
    for label, message in (
        (np.array([10]), "label 10 is not one of 0 to 9"),
        (np.array([-1]), "label -1 is not one of 0 to 9"),
        (np.array([0.5]), r"\[1\] of float64 is no label"),
        (np.array([1, 2]), r"\[2\] of int64 is no label"),
    ):
        np.save(labels / "11.npy", label)
        refused(path, TINY, f"11.npy: {message}")
    (labels / "11.npy").unlink()
    refused(path, TINY, f"{labels / '11.npy'}: missing, though imagenet256_features has it")
    labels.rename(path / "somewhere")
    refused(path, TINY, f"{path}: has imagenet256_features, but no imagenet256_labels beside it")
    (tmp_path / "none" / "x_features").mkdir(parents=True)
    (tmp_path / "none" / "x_labels").mkdir(parents=True)
    refused(tmp_path / "none", TINY, "holds no items")


def test_what_is_wrong_with_repa_folders_is_said(tmp_path: Path) -> None:
    path = write_repa(tmp_path / "data")
    file = path / "vae-sd" / "dataset.json"
    listed = json.loads(file.read_text())["labels"]
    refused(path, WIDE, "REPA's latents are the SD VAE's, of 4 channels; this model has 32")
    refused(path, dataclasses.replace(TINY, grid=(8, 8)), r"img-mean-std-00000000.npy: shape \[8, 8, 8\] where .* needs \[8, 16, 16\]")
    for content, message in (
        ('{"labels": null}', "has no labels"),
        ('{"labels": [["a.npy"]]}', "not REPA's list of names and labels"),
        ('{"labels": [["a.npy", 1.5]]}', "the label of a.npy is 1.5"),
        ("[1]", "not REPA's list"),
        ("{", "not REPA's list"),
        (json.dumps({"labels": [*listed[:-1], [listed[-1][0], 10]]}), "00000000.npy: label 10 is not one of 0 to 9"),
        (json.dumps({"labels": [*listed, ["gone.npy", 1]]}), "gone.npy: cannot be read"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            open_data(path, TINY).read(range(6), 0)
    file.unlink()
    refused(path, TINY, f"{file}: missing; it has the labels")


def test_what_is_wrong_with_lightning_dit_folders_is_said(tmp_path: Path) -> None:
    path = write_lightning_dit(tmp_path / "data")
    refused(path, WIDE, "latents_stats.pt: has no mean and std of 32 channels")
    file = path / "latents_rank00_shard001.safetensors"
    whole = file.read_bytes()
    good = {"latents": torch.zeros(3, 4, 8, 8), "latents_flip": torch.zeros(3, 4, 8, 8), "labels": torch.zeros(3).long()}
    bad = torch.zeros(3, 4, 8, 8)
    bad[1, 2, 3, 4] = float("nan")
    for changes, message in (
        ({"labels": None}, "has no labels"),
        ({"latents_flip": None}, "has no latents_flip"),
        ({"labels": torch.zeros(2).long()}, "3 latents, 3 flipped and 2 labels do not go together"),
        ({"labels": torch.tensor([0, 10, 0])}, "item 1: label 10 is not one of 0 to 9"),
        ({"labels": torch.zeros(3)}, "labels are no list of whole numbers"),
        ({"latents": bad.long()}, "latents of type torch.int64"),
        ({"latents_flip": bad}, "item 1: has values that are NaN"),
        ({"latents": bad[..., :4].contiguous(), "latents_flip": bad[..., :4].contiguous()}, r"item 0: shape \[2, 4, 8, 4\]"),
    ):
        tensors = {key: value for key, value in (good | changes).items() if value is not None}
        save_file(tensors, file)
        refused(path, TINY, f"{file.name}: {message}")
    file.write_bytes(whole)
    good_data = open_data(path, TINY)
    file.write_bytes(whole[: len(whole) // 4])
    refused(path, TINY, f"{file}: not a whole safetensors file")
    with pytest.raises(UserError, match=f"{file}: item 2: cannot be read any more"):
        good_data.read([4], 0)
    for changes in ({key: value[:2] for key, value in good.items()}, {"latents": good["latents"][..., :4].contiguous()}):
        save_file(good | changes, file)
        with pytest.raises(UserError, match=f"{file}: item 2: cannot be read any more"):
            good_data.read([4], 0)
    file.unlink()
    with pytest.raises(UserError, match=f"{file}: item 0: cannot be read any more .*No such file"):
        good_data.read([2], 0)

    wide = write_lightning_dit(tmp_path / "wide", 32)
    stats = wide / "latents_stats.pt"
    for content, message in (
        (statistics(4), "has no mean and std of 32 channels"),
        ({"mean": statistics(32)["mean"]}, "has no mean and std of 32 channels"),
        (statistics(32) | {"std": torch.zeros(1, 32, 1, 1)}, "has a mean that is not finite, or a std that is not above 0"),
    ):
        torch.save(content, stats)
        refused(wide, WIDE, f"{stats}: {message}")
    stats.unlink()
    refused(wide, WIDE, f"{stats}: missing; latents of 32 channels are normalised by it")


def test_what_is_wrong_with_an_npz_is_said(tmp_path: Path) -> None:
    pixels = to_pixels(latents(3).tanh())
    floats = latents(3).permute(0, 2, 3, 1).numpy().clip(-1, 1)
    spoiled = floats.copy()
    spoiled[3, 0, 0, 0] = np.nan
    for changes, message in (
        ({"arr_0": None}, "has no arr_0 or images"),
        ({"arr_0": pixels[0]}, r"has images \[8, 8, 3\] of uint8"),
        ({"arr_0": pixels.astype(np.int32)}, "of int32"),
        ({"arr_0": pixels[:, :4]}, r"item 0: shape \[3, 4, 8\] where"),
        ({"arr_0": pixels[..., :1]}, r"item 0: shape \[1, 8, 8\] where"),
        ({"arr_0": pixels.astype(np.float32)}, "item 0: values up to 25"),
        ({"arr_0": spoiled}, "item 3: has values that are NaN"),
        ({"labels": None}, "has no labels"),
        ({"labels": np.zeros(4, int)}, r"labels \[4\] of int64 for 5 images"),
        ({"labels": np.zeros(5)}, "of float64 for 5 images"),
        ({"labels": np.array([0, 1, 2, 3, 12])}, "item 4: label 12 is not one of 0 to 9"),
        ({"arr_0": pixels[:0], "labels": np.zeros(0, int)}, "holds no items"),
    ):
        refused(write_npz(tmp_path / "data", **changes), PIXELS, message)
    whole = write_npz(tmp_path / "data").read_bytes()
    for content in (whole[:-30], b"", b"text", whole[:60] + b"\0" * 60 + whole[120:]):
        (tmp_path / "data.npz").write_bytes(content)
        refused(tmp_path / "data.npz", PIXELS, "data.npz: (not a whole .npz|cannot be read as an .npz)")


def test_what_is_wrong_with_idx_files_is_said(tmp_path: Path) -> None:
    path = write_idx(tmp_path / "data")
    refused(path, TINY, "holds pictures, and .* works on latents of 4 channels. Pass --vae PATH")
    refused(path, PIXELS, r"item 0: shape \[1, 8, 8\] where .* needs \[3, 8, 8\]")
    refused(path, dataclasses.replace(GREY, classes=9), "item 2: label 9 is not one of 0 to 8")
    pictures, labels = (path / f"train-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
    whole = {file: file.read_bytes() for file in (pictures, labels)}
    content = gzip.decompress(whole[pictures])
    for file, changed, message in (
        (pictures, whole[pictures][:-20], "cannot be read"),
        (pictures, b"text", "cannot be read"),
        (pictures, b"", "is no IDX file of bytes with 3 axes"),
        (pictures, whole[labels], "is no IDX file of bytes with 3 axes"),
        (pictures, gzip.compress(b"\0\0\x0d" + content[3:]), "is no IDX file of bytes with 3 axes"),
        (pictures, gzip.compress(content[:-1]), r"holds 319 bytes, where \[5, 8, 8\] needs 320"),
        (labels, gzip.compress(idx(np.array(LABELS[:4]))), "4 labels for 5 images"),
    ):
        file.write_bytes(changed)
        refused(path, GREY, f"{file}: {message}")
        file.write_bytes(whole[file])
    labels.unlink()
    refused(path, GREY, f"{labels.with_suffix('')}: cannot be read \\(No such file")


def test_what_is_wrong_with_image_folders_is_said(tmp_path: Path) -> None:
    path = write_images(tmp_path / "data")
    refused(path, TINY, "holds pictures, and .* works on latents of 4 channels. Pass --vae PATH")
    refused(path, dataclasses.replace(PIXELS, classes=11), "has 10 folders, the model 11 classes")
    file = path / "n09" / "2.png"
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"text"):
        file.write_bytes(content)
        refused(path, PIXELS, f"{file}: cannot be read as an image")
    (tmp_path / "bare" / "x").mkdir(parents=True)
    refused(tmp_path / "bare", PIXELS, "no images in its folders")
    (tmp_path / "flat").mkdir()
    file.write_bytes(whole)
    file.rename(tmp_path / "flat" / "2.png")
    refused(tmp_path / "flat", PIXELS, "no data of a known layout. Known are .*one folder of images per class")


def test_what_is_no_data_is_said(tmp_path: Path, vae: Path) -> None:
    refused(tmp_path / "nowhere", TINY, "no such file or folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", TINY, "the folder is empty")
    (tmp_path / "data.txt").write_text("")
    refused(tmp_path / "data.txt", TINY, "no data of a known layout")
    (tmp_path / "plain").mkdir()
    np.save(tmp_path / "plain" / "0.npy", np.zeros((1, 4, 8, 8), np.float32))
    refused(tmp_path / "plain", TINY, "no data of a known layout")
    refused(write_fast_dit(tmp_path / "latents"), TINY, "holds latents already: there is nothing for a VAE to encode", vae)
    images = write_images(tmp_path / "images")
    refused(images, PIXELS, "works on pixels: there is nothing for a VAE to encode", vae)
    refused(images, WIDE, "its latents have 4 channels, those of .* 32", vae)
    refused(images, TINY, "no VAE", tmp_path / "empty")


# --- states and conversion -----------------------------------------------------------------------------------------------------


class Constant:
    """Ten items, each its own number."""

    def __len__(self) -> int:
        return 10

    def read(self, indices: Any, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        values = torch.tensor(indices, dtype=torch.float32)
        return values.view(-1, 1, 1, 1).expand(-1, 4, 32, 32).clone(), torch.tensor(indices)


@pytest.mark.parametrize("change", [{"family": "dit"}, {"family": "sit"}, {"family": "sit", "reversed_time": True}])
def test_states_are_noised_data_at_even_times(change: dict[str, Any]) -> None:
    arch = dataclasses.replace(TINY, grid=(16, 16), **change)
    states, truth = data_states(arch, Constant(), 995, cfg_scale=1.0, seed=3)
    counts = states.y.bincount(minlength=10)
    assert counts.min() == 99
    assert counts.max() == 100
    data, noise = process_of(arch).signal_and_noise(states.t)
    assert (states.x.mean((1, 2, 3)) - data * states.y).abs().max() < 0.1
    assert (states.x.std((1, 2, 3)) - noise).abs().max() < 0.1
    clean = states.y.view(-1, 1, 1, 1).float().expand_as(states.x)
    added = (states.x - data.view(-1, 1, 1, 1) * clean) / noise.view(-1, 1, 1, 1).clamp(min=1e-3)
    well_noised = noise > 0.1
    expected = added if arch.family == "dit" else (clean - added) * (-1 if arch.reversed_time else 1)
    torch.testing.assert_close(truth[well_noised], expected[well_noised].float(), rtol=1e-3, atol=1e-3)
    if arch.family == "dit":
        assert torch.equal(states.t, states.t.round())
        assert 0 <= states.t.min() < states.t.max() <= 999
    shares = (states.t / (999 if arch.family == "dit" else 1)).sort().values
    assert (shares - torch.linspace(0, 1, 995)).abs().max() < 0.06
    again, _ = data_states(arch, Constant(), 995, cfg_scale=1.0, seed=3, read_at_once=7)
    assert torch.equal(states.x, again.x)
    assert not torch.equal(states.t, data_states(arch, Constant(), 995, cfg_scale=1.0, seed=4)[0].t)


def test_half_of_the_labels_are_null_where_guidance_needs_it() -> None:
    assert int((data_states(TINY, Constant(), 64, cfg_scale=4.0)[0].y == 10).sum()) == 32
    assert int((data_states(TINY, Constant(), 64, cfg_scale=1.0)[0].y == 10).sum()) == 0
    without = dataclasses.replace(TINY, null_class=False)
    assert int(data_states(without, Constant(), 64, cfg_scale=1.0)[0].y.max()) < 10
    with pytest.raises(UserError, match=r"no null class.*--cfg-scale 1\."):
        data_states(without, Constant(), 64, cfg_scale=4.0)


def test_a_conversion_on_data_says_so_repeats_and_costs_no_sampling(official_file: Callable[..., Path], tmp_path: Path) -> None:
    source, data = str(official_file()), write_repa(tmp_path / "data")
    free = convert(source, tmp_path / "out", **QUICK, dry_run=True)
    planned = convert(source, tmp_path / "out", **QUICK, data=data, dry_run=True)
    assert 0 < planned.plan.flops() == free.plan.flops() - free.plan.states_flops()
    assert "states of noised data: data (5 items, REPA)" in words(planned)
    assert not (tmp_path / "out").exists()
    result = convert(source, tmp_path / "out", **QUICK, data=data)
    assert "States were of noised data: data (5 items, REPA)" in words(result)
    assert facts(result)["data"]["sha256"] == open_data(data, TINY).facts().sha256
    card = (tmp_path / "out" / "README.md").read_text()
    assert "came from noised data: data (5 items, REPA)" in card
    assert bundle.read_config(tmp_path / "out").fitted_on == "noised data: data (5 items, REPA)"
    for errors in result.errors:
        assert all(0 < error < 2 for error in errors.after.values())
    convert(source, tmp_path / "again", **QUICK, data=data)
    assert_same_state(state_of(tmp_path / "out"), state_of(tmp_path / "again"))
    convert(source, tmp_path / "free", **QUICK)
    key = "blocks.1.attn.mediator.qkv.up"
    assert not torch.equal(state_of(tmp_path / "out")[key], state_of(tmp_path / "free")[key])
    assert "the model's own sampling trajectories" in (tmp_path / "free" / "README.md").read_text()


def test_an_unfinished_conversion_with_other_data_is_refused(
    official_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, data = str(official_file()), write_fast_dit(tmp_path / "data")
    monkeypatch.setattr(bundle, "write_bundle", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", **QUICK, data=data)
    monkeypatch.undo()
    (tmp_path / "other").mkdir()
    renamed = write_fast_dit(tmp_path / "other" / "data")
    change_one_item("fast-DiT", renamed)
    for other in ({}, {"data": renamed}, {"data": write_repa(tmp_path / "repa")}):
        with pytest.raises(UserError, match="unfinished conversion with other settings, data or weights"):
            convert(source, tmp_path / "out", **QUICK, **other)
    assert convert(source, tmp_path / "out", **QUICK, data=data).resumed_layers == 3


def test_a_conversion_on_pictures_counts_the_vae(official_file: Callable[..., Path], tmp_path: Path, vae: Path) -> None:
    source, data = str(official_file()), write_images(tmp_path / "data", side=20)
    planned = convert(source, tmp_path / "out", **QUICK, data=data, vae=vae, dry_run=True)
    assert planned.plan.data is not None
    assert planned.plan.states_flops() == 48 * planned.plan.data.encode_flops > 0
    result = convert(source, tmp_path / "out", **QUICK, data=data, vae=vae)
    assert "data (5 items, images, encoded by a VAE)" in words(result)


def test_the_command_takes_data(official_file: Callable[..., Path], tmp_path: Path) -> None:
    source, data = official_file(channels=1), write_npz(tmp_path / "data", 1)
    options = [f"--{key.replace('_', '-')}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for key, v in QUICK.items()]
    text, _ = mediatorize("convert", source, tmp_path / "out", *options, "--data", data)
    assert "noised data: data.npz (5 items, npz)" in text
    _, refusal = mediatorize("convert", source, tmp_path / "two", *options, "--data", tmp_path / "none", code=1)
    assert refusal == f"error: {tmp_path / 'none'}: no such file or folder. Check the path of --data.\n"
    _, refusal = mediatorize("convert", source, tmp_path / "two", *options, "--vae", tmp_path, code=1)
    assert "without --data there is nothing for a VAE to encode" in refusal
    assert not (tmp_path / "two").exists()
