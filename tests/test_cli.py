"""The installed command, as a user meets it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import model_inputs, official_state, tiny_model
from PIL import Image
from typer.testing import CliRunner

from mediatorize import load_model, sample
from mediatorize.cli import app
from mediatorize.formats.images import VAE_SCALE, to_pixels

TEACHER = Path(__file__).parent.parent / "recipes" / "digits" / "sit.safetensors"
QUICK = [
    "--levels",
    "1,4",
    "--states",
    "48",
    "--trajectories",
    "4",
    "--fit-steps",
    "2",
    "--batch",
    "8",
    "--steps",
    "4",
    "--device",
    "cpu",
    "--family",
    "sit",
]


def mediatorize(*arguments: object, code: int = 0) -> tuple[str, str]:
    """Runs a command in this process; gives stdout and stderr."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


@pytest.mark.parametrize("how", ["installed", "module"])
def test_the_command_prints_one_line_and_exits_with_one(how: str, tmp_path: Path) -> None:
    installed = shutil.which("mediatorize", path=sysconfig.get_path("scripts"))
    assert installed
    command = [installed] if how == "installed" else [sys.executable, "-m", "mediatorize"]
    result = subprocess.run([*command, "inspect", tmp_path / "nowhere.pt"], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == f"error: {tmp_path / 'nowhere.pt'}: no such file or folder. Check the path.\n"


@pytest.mark.parametrize(
    "arguments",
    [["inspect"], ["convert", "a"], ["nonsense"], ["inspect", "x", "--nonsense"], ["convert", "a", "b", "--fit-steps", "many"]],
)
def test_wrong_usage_exits_with_two(arguments: list[str]) -> None:
    mediatorize(*arguments, code=2)


def test_a_wrong_choice_names_the_choices() -> None:
    _, stderr = mediatorize("convert", "a", "b", "--init", "magic", code=2)
    assert "expected one of pool, cluster-keys, cluster-queries" in " ".join(stderr.replace("│", " ").split())


def test_debug_shows_where_an_error_came_from(tmp_path: Path) -> None:
    _, quiet = mediatorize("inspect", tmp_path, code=1)
    _, loud = mediatorize("inspect", tmp_path, "--debug", code=1)
    assert "Traceback" not in quiet
    assert "Traceback" in loud


def test_help_of_every_command_names_its_options() -> None:
    expected = {
        "inspect": "--num-heads",
        "convert": "--init",
        "calibrate": "--budget",
        "sample": "--cfg-channels",
        "evaluate": "--features",
        "run": "--set",
    }
    for command, option in expected.items():
        assert option in mediatorize(command, "--help")[0]


def test_inspect_convert_sample_as_a_user_does_it(official_file: Callable[..., Path], tmp_path: Path) -> None:
    source, bundle = official_file(channels=1, learn_sigma=False), tmp_path / "bundle"
    found = json.loads(mediatorize("inspect", source, "--family", "sit", "--num-heads", 3, "--json")[0])
    assert found["name"] == "SiT-3x48/2"
    report = json.loads(mediatorize("convert", source, bundle, *QUICK, "--num-heads", 3, "--json")[0])
    assert len(report["layer_errors"]) == 3
    grid, array = tmp_path / "grid.png", tmp_path / "array.npz"
    options = ["--classes", "1,2", "--per-class", 3, "--steps", 5, "--cfg-scale", 2.0, "--level", 4, "--seed", 7]
    mediatorize("sample", bundle, "--out", grid, *options)
    mediatorize("sample", bundle, "--out", array, *options, "--batch", 4)
    with Image.open(grid) as picture:
        assert picture.size == (3 * 66 + 2, 2 * 66 + 2)
    pixels = np.load(array)["arr_0"]
    labels = torch.tensor([1, 1, 1, 2, 2, 2])
    expected = sample(load_model(bundle), labels, steps=5, cfg_scale=2.0, seed=7, schedule=4)
    assert pixels.shape == (6, 8, 8, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - to_pixels(expected).astype(int)).max() <= 1


def test_raw_checkpoints_are_sampled_too_and_latents_need_a_vae_for_pictures(official_file: Callable[..., Path], tmp_path: Path) -> None:
    source = official_file(family="dit")
    common = ["sample", source, "--family", "dit", "--num-heads", 3, "--classes", "3", "--steps", 3]
    _, refusal = mediatorize(*common, "--out", tmp_path / "x.png", code=1)
    assert "Pass --vae PATH" in refusal
    mediatorize(*common, "--out", tmp_path / "x.npz")
    latents = torch.from_numpy(np.load(tmp_path / "x.npz")["latents"])
    expected = sample(load_model(source, family="dit", num_heads=3), [3], steps=3)
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)


def test_latents_are_decoded_by_a_vae_on_disk(official_file: Callable[..., Path], tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, latent_channels=4).eval()
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    source = official_file(family="sit")
    common = ["sample", source, "--family", "sit", "--num-heads", 3, "--classes", "3,4", "--steps", 3, "--vae", tmp_path / "pipeline"]
    mediatorize(*common, "--out", tmp_path / "x.npz")
    latents = sample(load_model(source, family="sit", num_heads=3), [3, 4], steps=3)
    with torch.no_grad():
        expected = to_pixels(vae.decode(latents / VAE_SCALE).sample)
    assert np.abs(np.load(tmp_path / "x.npz")["arr_0"].astype(int) - expected.astype(int)).max() <= 1
    _, refusal = mediatorize(*common[:-1], tmp_path, "--out", tmp_path / "y.png", code=1)
    assert "no VAE" in refusal


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "x.jpg"], "neither .png nor .npz"),
        (["--out", "there/x.png"], "its folder does not exist"),
        (["--out", "x.png", "--level", "9"], "no level 9"),
        (["--out", "x.png", "--classes", "11"], "not all known"),
        (["--out", "x.png", "--solver", "ddpm"], "not one for a SIT"),
        (["--out", "x.png", "--steps", "0"], "0 steps cannot be taken"),
    ],
)
def test_bad_requests_are_refused_in_one_line(options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, stderr = mediatorize("sample", TEACHER, *options, code=1)
    assert message in stderr
    assert stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_existing_picture_is_kept(tmp_path: Path) -> None:
    picture = tmp_path / "x.png"
    picture.write_bytes(b"mine")
    _, stderr = mediatorize("sample", TEACHER, "--out", picture, code=1)
    assert "--force" in stderr
    assert picture.read_bytes() == b"mine"


def test_evaluate_judges_every_level_from_the_same_noise(tmp_path: Path) -> None:
    mediatorize("convert", TEACHER, tmp_path / "bundle", *QUICK)
    report = json.loads(mediatorize("evaluate", tmp_path / "bundle", tmp_path / "out", "--samples", 40, "--steps", 4, "--json")[0])
    softmax, *others = report["results"]
    assert softmax["level"] == "softmax"
    assert softmax["sample_error"] == 0
    assert [other["level"] for other in others] == ["4", "1"]
    assert all(other["sample_error"] > 0 and other["relative_flops"] < 1 for other in others)
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == report
    assert "| m" not in (tmp_path / "out" / "report.md").read_text()
    with Image.open(tmp_path / "out" / "comparison.png") as picture:
        assert picture.size[0] > 1000


def test_a_model_without_mediators_says_so(official_file: Callable[..., Path], tmp_path: Path) -> None:
    source = official_file(channels=1, learn_sigma=False)
    _, stderr = mediatorize("sample", source, "--family", "sit", "--num-heads", 3, "--level", 4, "--out", tmp_path / "x.png", code=1)
    assert "This model has no level 4. It has softmax." in stderr


def test_the_public_face_is_as_documented(official_file: Callable[..., Path]) -> None:
    source = official_file(family="dit")
    model = load_model(source, family="dit", num_heads=3)
    assert not model.training
    x, t, y = model_inputs(model)
    assert model(x, t, y).shape == (3, 8, 8, 8)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    z = sample(model, torch.tensor([1, 2]), solver="ddim", steps=4, cfg_scale=1.5, cfg_channels=3, noise=noise, seed=0, schedule=None)
    assert torch.equal(z, sample(model, torch.tensor([1, 2]), solver="ddim", steps=4, cfg_scale=1.5, noise=noise, schedule="softmax"))
    assert official_state(tiny_model(family="dit")).keys() == set(model.state_dict())
