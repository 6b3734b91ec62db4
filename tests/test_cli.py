"""The installed command, as a user meets it."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from conftest import model_inputs, official_state, tiny_model
from PIL import Image
from typer.testing import CliRunner

from mediatorize import cli, load_model, sample
from mediatorize.cli import app
from mediatorize.formats.images import VAE_SCALE, to_pixels
from mediatorize.signatures import as_typer
from mediatorize.version import VERSION

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
    "--sampler-steps",
    "4",
    "--device",
    "cpu",
    "--family",
    "sit",
]


def unboxed(text: str) -> str:
    """What stands in Typer's boxes, as one line."""
    return " ".join(text.replace("│", " ").split())


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
    assert "'magic' is not one of 'pool', 'cluster-keys', 'cluster-queries'" in unboxed(stderr)


def test_debug_shows_where_an_error_came_from(tmp_path: Path) -> None:
    _, quiet = mediatorize("inspect", tmp_path, code=1)
    _, loud = mediatorize("inspect", tmp_path, "--debug", code=1)
    assert "Traceback" not in quiet
    assert "Traceback" in loud


COMMANDS = {
    "inspect": "--num-heads",
    "convert": "--init <pool|cluster-keys|cluster-queries>",
    "resize": "--image-size N|HxW",
    "finetune": "--sampler-steps",
    "calibrate": "--cost <flops|latency>",
    "sample": "--cfg-channels N|all",
    "evaluate": "--features",
    "compare": "--beside FILE,FILE,...",
    "export": "--to <diffusers|safetensors|torch-export|official|attention-mediators|scheduler>",
    "run": "--set",
}
"""An option of every command, with its choices where it has some."""


def test_every_command_is_tested_here() -> None:
    assert set(COMMANDS) == set(cli.COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_options_choices_groups_and_an_example_that_can_be_run(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    text = mediatorize(command, "--help")[0]
    assert COMMANDS[command] in " ".join(text.split())
    assert "Output" in text
    example = re.search(rf"Example: mediatorize {command} (.+)", text)
    assert example
    parser = typer.Typer(add_completion=False)
    parser.command()(as_typer(cli.COMMANDS[command].run, lambda **arguments: arguments))
    arguments = typer.main.get_command(parser).main(shlex.split(example[1]), standalone_mode=False)
    assert set(arguments) == set(inspect.signature(cli.COMMANDS[command].run).parameters)


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["finetune", "x", "--steps", "800"], "there is no --steps here; pass --train-steps or --sampler-steps."),
        (["convert", "x", "y", "--steps", "800"], "there is no --steps here; pass --fit-steps or --sampler-steps."),
        (["finetune", "x", "--batch-size", "4"], "there is no --batch-size here; pass --batch."),
        (["finetune", "x", "--lr", "1e-3"], "there is no --lr here; pass --learning-rate."),
        (["sample", "x", "--out", "y.png", "--guidance-scale", "4"], "there is no --guidance-scale here; pass --cfg-scale."),
        (["sample", "x", "--out", "y.png", "--num-inference-steps", "4"], "there is no --num-inference-steps here; pass --steps."),
        (["finetune", "x", "--cfg-scale", "4"], "there is no --cfg-scale here; pass --cfg-scales."),
    ],
)
def test_words_of_other_tools_are_answered_with_ours(arguments: list[str], answer: str) -> None:
    _, stderr = mediatorize(*arguments, code=2)
    assert answer in unboxed(stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["convert", "a", "b", "--levels", "1,four"],
            "'four' is no level. Levels are softmax, a count of mediators or an attention with an MLP",
        ),
        (["sample", "a", "--out", "b.png", "--classes", "1,x"], "'x' is not a whole number"),
        (["sample", "a", "--out", "b.png", "--cfg-channels", "some"], "'some' is not a whole number"),
        (["finetune", "a", "--train-steps", "0"], "greater than or equal to 1"),
    ],
)
def test_values_of_the_wrong_kind_are_refused_by_name(arguments: list[str], message: str) -> None:
    _, stderr = mediatorize(*arguments, code=2)
    assert message in unboxed(stderr)


def test_the_version_is_printed() -> None:
    assert mediatorize("--version")[0] == f"mediatorize {VERSION}\n"


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["convert", "--help"], ["evaluate", "--help"], ["finetune", "--nonsense"], ["inspect", "DiT-XL/2@256"]],
)
def test_nothing_heavy_is_imported_before_it_is_needed(arguments: list[str]) -> None:
    heavy = ("torch", "torchvision", "timm", "diffusers", "sklearn", "scipy", "matplotlib")
    code = f"""
import sys
from mediatorize import cli
from mediatorize.cli import app
try:
    app({arguments!r})
except SystemExit:
    pass
print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.splitlines()[-1] == "[]"


def test_completion_offers_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the shell asks for it: the values of an option whose choices are a table."""
    words = "mediatorize convert a b --init "
    environment = os.environ | {"_MEDIATORIZE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "5"}
    installed = shutil.which("mediatorize", path=sysconfig.get_path("scripts"))
    result = subprocess.run([str(installed)], env=environment, capture_output=True, text=True, check=False)
    assert result.stdout.split() == ["pool", "cluster-keys", "cluster-queries"]


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
        assert picture.size == (3 * 66 + 2, 2 * (66 + 15) + 2)
    mediatorize("sample", bundle, "--out", grid, *options, "--captions", "none", "--force")
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


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for the CPU with g++")
def test_compiled_samples_are_the_same(official_file: Callable[..., Path], tmp_path: Path) -> None:
    source = official_file(channels=1, learn_sigma=False)
    common = ["sample", source, "--family", "sit", "--num-heads", 3, "--classes", "3,4", "--steps", 3, "--device", "cpu"]
    mediatorize(*common, "--out", tmp_path / "eager.npz")
    torch.compiler.reset()
    mediatorize(*common, "--out", tmp_path / "compiled.npz", "--compile")
    torch.compiler.reset()
    eager, compiled = (np.load(tmp_path / f"{name}.npz")["arr_0"].astype(int) for name in ("eager", "compiled"))
    assert np.abs(eager - compiled).max() <= 1
    assert eager.std() > 10


def test_compiling_without_a_compiler_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    def none() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    _, stderr = mediatorize("sample", TEACHER, "--out", tmp_path / "x.png", "--device", "cpu", "--compile", code=1)
    assert stderr == "error: Compiling for the CPU needs a C++ compiler. Install g++, or leave --compile out.\n"


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
    rows = [line.split(" | ")[0] for line in (tmp_path / "out" / "report.md").read_text().splitlines() if line.startswith("| ")]
    assert rows[:4] == ["| row", "| softmax", "| m=4", "| m=1"]
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
