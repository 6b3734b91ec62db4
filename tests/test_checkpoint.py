"""Checkpoints people have: every format gives the weights written, bit for bit; what the file does not tell is asked; damage is refused."""

from __future__ import annotations

import argparse
import functools
import json
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import model_inputs, official_state, tiny_model
from diffusers import DiTTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from mediatorize.errors import UserError
from mediatorize.formats import checkpoint
from mediatorize.formats.checkpoint import Hints, open_checkpoint
from mediatorize.formats.loading import load_model
from mediatorize.model.architecture import Architecture
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.stages.inspect import inspect

SMALL = {"depth": 2, "width": 16, "heads": 2, "mlp_width": 64, "classes": 5, "grid": (2, 2)}
SMALL_HINTS = {"family": "sit", "num_heads": 2}

State = dict[str, Tensor]


def small_state(**changes: Any) -> State:
    return official_state(tiny_model(**SMALL | changes))


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def save_flat(path: Path, state: State, metadata: dict[str, str] | None = None) -> Path:
    """A flat state dict as safetensors."""
    save_file({name: value.contiguous() for name, value in state.items()}, path, metadata)
    return path


def refusal(path: Path, **hints: Any) -> str:
    """What a checkpoint is refused with, after its path (whose words would match anything)."""
    with pytest.raises(UserError) as caught:
        load_model(path, **hints)
    assert str(path) in caught.value.message
    assert caught.value.hint
    return str(caught.value).replace(str(path), "")


def assert_same_weights(model: DiffusionTransformer, expected: State) -> None:
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], value.float()), name


def assert_same_model(model: DiffusionTransformer, original: DiffusionTransformer) -> None:
    """The same architecture, weights and outputs, bit for bit."""
    assert model.arch == original.arch
    assert_same_weights(model, official_state(original))
    assert torch.equal(model(*model_inputs(original)), original(*model_inputs(original)))


# --- official files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("family", ["dit", "sit"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_flat_official_file(tmp_path: Path, suffix: str, family: str, learn_sigma: bool) -> None:
    original = tiny_model(family=family, learn_sigma=learn_sigma)
    path = tmp_path / f"model{suffix}"
    (save if suffix == ".pt" else save_flat)(path, official_state(original))
    assert_same_model(load_model(path, family=family, num_heads=3), original)


def test_loaded_model_has_frozen_parameters_in_eval_mode(official_file: Callable[..., Path]) -> None:
    model = load_model(official_file(), family="sit", num_heads=3)
    assert dict(model.named_parameters()).keys() == official_state(tiny_model()).keys()
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_other_precisions_become_float32(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    state = {name: value.to(dtype) for name, value in small_state().items()}
    path = (save if suffix == ".pt" else save_flat)(tmp_path / f"model{suffix}", state)
    assert_same_weights(load_model(path, **SMALL_HINTS), state)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_whole_numbers_are_no_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    """They are quantised, and mean nothing without their scales."""
    state = small_state()
    state["blocks.1.mlp.fc1.weight"] = (state["blocks.1.mlp.fc1.weight"] * 10).to(dtype)
    assert "blocks.1.mlp.fc1.weight" in refusal(save(tmp_path / "model.pt", state), **SMALL_HINTS)


def test_views_of_other_tensors_and_shared_ones(tmp_path: Path) -> None:
    state = small_state()
    large = torch.cat([state["pos_embed"].flatten(), state["blocks.0.attn.proj.weight"].flatten(), torch.ones(7)])
    state["pos_embed"] = large[:64].view(1, 4, 16)
    state["blocks.0.attn.proj.weight"] = large[64 : 64 + 256].view(16, 16)
    state["blocks.0.attn.qkv.weight"] = state["blocks.0.attn.qkv.weight"].T.contiguous().T
    state["blocks.1.attn.proj.weight"] = state["blocks.0.attn.proj.weight"].T
    state["blocks.1.mlp.fc1.bias"] = state["blocks.0.mlp.fc1.bias"]
    assert not state["blocks.0.attn.qkv.weight"].is_contiguous()
    model = load_model(save(tmp_path / "model.pt", state), **SMALL_HINTS)
    assert_same_weights(model, state)
    model.blocks[1].mlp.fc1.bias.data.zero_()
    assert torch.equal(model.blocks[0].mlp.fc1.bias, state["blocks.0.mlp.fc1.bias"])


def test_loading_maps_the_file_and_never_writes_it(tmp_path: Path) -> None:
    path = save(tmp_path / "model.pt", small_state())
    stored = small_state()["blocks.1.attn.qkv.weight"].numpy().tobytes()
    offset = path.read_bytes().index(stored)
    model = load_model(path, **SMALL_HINTS)
    with path.open("rb+") as file:
        file.seek(offset)
        file.write(bytes(len(stored)))
    content = path.read_bytes()
    assert not model.blocks[1].attn.qkv.weight.any(), "the weights were copied"
    for parameter in model.parameters():
        parameter.data.add_(1)
    assert path.read_bytes() == content


# --- training checkpoints ------------------------------------------------------------------------------------------------------


def training_sets() -> dict[str, State]:
    return {"model": small_state(seed=1), "ema": small_state(seed=2)}


def training_checkpoint(**arguments: Any) -> dict[str, Any]:
    """What train.py of DiT and SiT saves."""
    optimiser = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    return {**training_sets(), "opt": optimiser, "args": argparse.Namespace(**arguments)}


@pytest.mark.parametrize(("weights", "expected"), [(None, "ema"), ("ema", "ema"), ("model", "model")])
def test_training_checkpoint(tmp_path: Path, weights: str | None, expected: str) -> None:
    path = save(tmp_path / "0400000.pt", training_checkpoint(model="SiT-XL/2", num_classes=5))
    assert_same_weights(load_model(path, num_heads=2, weights=weights), training_sets()[expected])
    opened = open_checkpoint(path, Hints(num_heads=2), weights)
    assert opened.part == expected
    assert opened.arch == tiny_model(**SMALL).arch


@pytest.mark.parametrize(("weights", "expected"), [(None, "ema"), ("model", "model")])
def test_training_checkpoint_as_safetensors(tmp_path: Path, weights: str | None, expected: str) -> None:
    state = {f"{part}.{name}": value for part, inside in training_sets().items() for name, value in inside.items()}
    path = save_flat(tmp_path / "model.safetensors", state)
    assert_same_weights(load_model(path, **SMALL_HINTS, weights=weights), training_sets()[expected])


def test_only_model_weights(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", {"model": training_sets()["model"]})
    assert_same_weights(load_model(path, **SMALL_HINTS), training_sets()["model"])


def test_weights_that_are_not_there_are_refused_by_those_that_are(tmp_path: Path) -> None:
    training = refusal(save(tmp_path / "a.pt", training_checkpoint()), **SMALL_HINTS, weights="nope")
    assert "nope" in training
    assert "ema or model" in training
    assert "one set of weights" in refusal(save(tmp_path / "b.pt", small_state()), **SMALL_HINTS, weights="ema")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_stripped(tmp_path: Path, prefix: str) -> None:
    wrapped = {part: {prefix + name: value for name, value in state.items()} for part, state in training_sets().items()}
    flat = {f"{part}.{name}": value for part, state in wrapped.items() for name, value in state.items()}
    expected = training_sets()["ema"]
    for path in (
        save(tmp_path / "training.pt", wrapped),
        save(tmp_path / "flat.pt", wrapped["ema"]),
        save_flat(tmp_path / "flat.safetensors", wrapped["ema"]),
        save_flat(tmp_path / "training.safetensors", flat),
    ):
        assert_same_weights(load_model(path, **SMALL_HINTS), expected)


def test_two_weights_of_one_bare_name_are_refused(tmp_path: Path) -> None:
    state = small_state(seed=1) | {f"module.{name}": value for name, value in small_state(seed=2).items()}
    refusal(save(tmp_path / "a.pt", state), **SMALL_HINTS)


# --- REPA ----------------------------------------------------------------------------------------------------------------------


def repa_checkpoint() -> dict[str, Any]:
    state = official_state(tiny_model(learn_sigma=False, seed=4))
    projectors = {
        "projectors.0.0.weight": torch.ones(8, 48),
        "projectors.0.0.bias": torch.ones(8),
        "projectors.0.2.weight": torch.ones(6, 8),
    }
    arguments = argparse.Namespace(model="SiT-XL/2", num_classes=10, enc_type="dinov2-vit-b", path_type="linear", prediction="v")
    return {"ema": state | projectors, "model": state | projectors, "opt": {}, "args": arguments, "steps": 400000}


def test_repa_runs_backwards_without_its_projectors(tmp_path: Path) -> None:
    path = save(tmp_path / "repa.pt", repa_checkpoint())
    original = tiny_model(learn_sigma=False, seed=4, reversed_time=True)
    assert_same_model(load_model(path, num_heads=3), original)
    assert open_checkpoint(path, Hints(num_heads=3)).format == "REPA SiT"


def test_flat_repa_needs_no_family(tmp_path: Path) -> None:
    path = save_flat(tmp_path / "repa.safetensors", repa_checkpoint()["ema"])
    assert load_model(path, num_heads=3).arch == tiny_model(learn_sigma=False, reversed_time=True).arch


def test_repa_is_no_dit(tmp_path: Path) -> None:
    assert "SiT" in refusal(save(tmp_path / "repa.pt", repa_checkpoint()), family="dit", num_heads=3)


# --- diffusers -----------------------------------------------------------------------------------------------------------------


@functools.cache
def diffusers_model() -> DiTTransformer2DModel:
    """diffusers' own DiT, of the sizes of `SMALL`, randomised; its per-block embedders all hold one block's numbers."""
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=5,
    )
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.12
    first, *others = [block.norm1.emb for block in model.transformer_blocks]
    for other in others:
        other.load_state_dict(first.state_dict())
    return model


def diffusers_state() -> State:
    return {name: value.clone() for name, value in diffusers_model().state_dict().items()}


def diffusers_config() -> dict[str, Any]:
    return json.loads(diffusers_model().to_json_string())


def write_diffusers(
    folder: Path, state: State | None = None, config: dict[str, Any] | None = None, file: str = "diffusion_pytorch_model.safetensors"
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(diffusers_config() if config is None else config))
    (save if file.endswith(".bin") else save_flat)(folder / file, diffusers_state() if state is None else state)
    return folder


def official_names_of(state: State, pos_embed: Tensor) -> State:
    """The table of official and diffusers names, written out for two blocks."""
    embedders = "transformer_blocks.0.norm1.emb"
    expected = {
        "pos_embed": pos_embed,
        "y_embedder.embedding_table.weight": state[f"{embedders}.class_embedder.embedding_table.weight"],
    }
    for kind in ("weight", "bias"):
        expected |= {
            f"x_embedder.proj.{kind}": state[f"pos_embed.proj.{kind}"],
            f"t_embedder.mlp.0.{kind}": state[f"{embedders}.timestep_embedder.linear_1.{kind}"],
            f"t_embedder.mlp.2.{kind}": state[f"{embedders}.timestep_embedder.linear_2.{kind}"],
            f"final_layer.adaLN_modulation.1.{kind}": state[f"proj_out_1.{kind}"],
            f"final_layer.linear.{kind}": state[f"proj_out_2.{kind}"],
        }
        for index in range(2):
            theirs, ours = f"transformer_blocks.{index}", f"blocks.{index}"
            expected |= {
                f"{ours}.adaLN_modulation.1.{kind}": state[f"{theirs}.norm1.linear.{kind}"],
                f"{ours}.attn.qkv.{kind}": torch.cat([state[f"{theirs}.attn1.to_{letter}.{kind}"] for letter in "qkv"]),
                f"{ours}.attn.proj.{kind}": state[f"{theirs}.attn1.to_out.0.{kind}"],
                f"{ours}.mlp.fc1.{kind}": state[f"{theirs}.ff.net.0.proj.{kind}"],
                f"{ours}.mlp.fc2.{kind}": state[f"{theirs}.ff.net.2.{kind}"],
            }
    return expected


@pytest.mark.parametrize("file", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"])
@pytest.mark.parametrize("class_name", ["DiTTransformer2DModel", "Transformer2DModel"])
@pytest.mark.parametrize("inside", ["pipeline/transformer", "transformer"])
def test_diffusers_folder(tmp_path: Path, inside: str, class_name: str, file: str) -> None:
    write_diffusers(tmp_path / inside, config=diffusers_config() | {"_class_name": class_name}, file=file)
    (tmp_path / "pipeline" / "vae").mkdir(parents=True, exist_ok=True)
    model = load_model(tmp_path / Path(inside).parts[0])
    pos_embed = diffusers_model().pos_embed.pos_embed
    loaded = model.pos_embed.detach()
    assert torch.allclose(loaded, pos_embed, atol=1e-6)
    assert_same_weights(model, official_names_of(diffusers_state(), loaded))
    assert model.arch == tiny_model(**SMALL, family="dit", frequency_shift=1, mlp_norm_eps=1e-5).arch


@torch.no_grad()
def test_diffusers_folder_computes_what_diffusers_does(tmp_path: Path) -> None:
    model = load_model(write_diffusers(tmp_path / "transformer"))
    x, t, y = model_inputs(model)
    expected = diffusers_model().eval()(x, timestep=t.long(), class_labels=y).sample
    assert (model(x, t.long(), y) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_current_folder_is_a_path_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_diffusers(tmp_path / "transformer"))
    assert load_model(".").arch.name == "DiT-2x16/2"


def test_diffusers_position_buffer_of_old_files_is_no_weight(tmp_path: Path) -> None:
    state = diffusers_state() | {"pos_embed.pos_embed": diffusers_model().pos_embed.pos_embed}
    folder = write_diffusers(tmp_path / "transformer", state)
    assert torch.equal(load_model(folder).x_embedder.proj.weight, state["pos_embed.proj.weight"])


def test_diffusers_blocks_with_embedders_of_their_own_are_refused(tmp_path: Path) -> None:
    for name in ("timestep_embedder.linear_2.bias", "class_embedder.embedding_table.weight"):
        state = diffusers_state()
        state[f"transformer_blocks.1.norm1.emb.{name}"].view(-1)[3] += 1e-6
        message = refusal(write_diffusers(tmp_path / "transformer", state))
        assert "block 1" in message
        assert name in message


def without(content: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != name}


BLOCK = "transformer_blocks.1."
DIFFUSERS_DAMAGE: dict[str, tuple[Callable[[State], State], str]] = {
    "no to_k": (lambda state: without(state, BLOCK + "attn1.to_k.weight"), "to_k"),
    "no attention": (lambda state: {k: v for k, v in state.items() if not k.startswith(BLOCK + "attn1.to_")}, "blocks.1.attn"),
    "no last layer": (lambda state: without(state, "proj_out_2.weight"), "final_layer.linear.weight"),
    "no block 0": (lambda state: {k: v for k, v in state.items() if ".0.ff." not in k}, "blocks.0.mlp"),
    "narrow to_k": (lambda state: state | {BLOCK + "attn1.to_k.weight": torch.ones(16, 15)}, "blocks.1.attn.qkv.weight"),
    "to_q and to_k of 12 and 20 rows": (
        lambda state: state | {BLOCK + "attn1.to_q.weight": torch.ones(12, 16), BLOCK + "attn1.to_k.weight": torch.ones(20, 16)},
        "blocks.1.attn.qkv.weight",
    ),
    "numbers for projections": (
        lambda state: state | {f"{BLOCK}attn1.to_{letter}.weight": torch.tensor(1.0) for letter in "qkv"},
        "blocks.1.attn.qkv.weight",
    ),
    "wide mlp": (lambda state: state | {BLOCK + "ff.net.2.bias": torch.ones(17)}, "blocks.1.mlp.fc2.bias"),
    "flat patches": (lambda state: state | {"pos_embed.proj.weight": torch.ones(16, 16)}, "x_embedder.proj.weight"),
    "more": (lambda state: state | {BLOCK + "attn1.norm_q.weight": torch.ones(8)}, "norm_q"),
    "nan": (lambda state: state | {BLOCK + "attn1.to_v.bias": torch.full((16,), torch.nan)}, "blocks.1.attn.qkv.bias"),
}


@pytest.mark.parametrize(("damage", "named"), DIFFUSERS_DAMAGE.values(), ids=DIFFUSERS_DAMAGE.keys())
def test_damaged_diffusers_weights_are_refused(tmp_path: Path, damage: Callable[[State], State], named: str) -> None:
    assert named in refusal(write_diffusers(tmp_path / "transformer", damage(diffusers_state())))


def with_field(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config | fields


DIFFUSERS_CONFIGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "list": lambda _: [1],
    "null": lambda _: None,
    "no class": lambda config: without(config, "_class_name"),
    "no patch size": lambda config: without(config, "patch_size"),
    "no sample size": lambda config: without(config, "sample_size"),
    "another class": with_field(_class_name="PixArtTransformer2DModel"),
    "another norm": with_field(_class_name="Transformer2DModel", norm_type="layer_norm"),
    "patches of nothing": with_field(patch_size=0),
    "other patches": with_field(patch_size=4),
    "sample size of text": with_field(sample_size="large"),
    "two sample sizes": with_field(sample_size=[4, 4]),
    "no input": with_field(sample_size=0),
    "epsilon of text": with_field(norm_eps="small"),
    "heads of text": with_field(num_attention_heads="two"),
    "other heads": with_field(num_attention_heads=3),
    "classes of text": with_field(num_embeds_ada_norm="five"),
    "other classes": with_field(num_embeds_ada_norm=3),
}


@pytest.mark.parametrize("change", DIFFUSERS_CONFIGS.values(), ids=DIFFUSERS_CONFIGS.keys())
def test_diffusers_config_that_does_not_fit_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    folder = write_diffusers(tmp_path / "transformer")
    assert load_model(folder).arch.heads == 2
    (folder / "config.json").write_text(json.dumps(change(diffusers_config())))
    refusal(folder)


@pytest.mark.parametrize("text", ["", "{", "not json", '{"_class_name": "DiTTransf'])
def test_folder_with_a_broken_config_is_refused(tmp_path: Path, text: str) -> None:
    folder = write_diffusers(tmp_path / "transformer")
    (folder / "config.json").write_text(text)
    assert "config.json" in refusal(folder)


def test_folder_without_weights_or_config_is_refused(tmp_path: Path) -> None:
    folder = write_diffusers(tmp_path / "transformer")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    assert "no diffusion_pytorch_model" in refusal(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize(
    "content",
    [[torch.ones(2)], torch.ones(2), {"step": 3}, {"weights": {"proj_out_1.weight": torch.ones(2)}}, {}],
    ids=["list", "tensor", "number", "nested", "empty"],
)
def test_diffusers_bin_that_is_no_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    folder = write_diffusers(tmp_path / "transformer", file="diffusion_pytorch_model.bin")
    save(folder / "diffusion_pytorch_model.bin", content)
    refusal(folder)


def test_diffusers_is_no_sit_and_has_one_set_of_weights(tmp_path: Path) -> None:
    folder = write_diffusers(tmp_path / "transformer")
    assert "is a DiT" in refusal(folder, family="sit")
    assert "one set of weights" in refusal(folder, weights="ema")


# --- what a file does not tell: family -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "flag", "expected"),
    [
        ({"model": "SiT-XL/2"}, None, "sit"),
        ({"model": "DiT-XL/2"}, None, "dit"),
        ({"path_type": "Linear", "prediction": "velocity"}, None, "sit"),
        ({"model": "SiT-XL/2", "path_type": "Linear"}, "dit", "dit"),
        ({"model": "DiT-B/4"}, "sit", "sit"),
        ({"image_size": 256}, "dit", "dit"),
    ],
)
def test_family_is_the_flag_then_the_arguments(tmp_path: Path, arguments: dict[str, Any], flag: Any, expected: str) -> None:
    path = save(tmp_path / "a.pt", training_checkpoint(**arguments))
    assert load_model(path, num_heads=2, family=flag).arch.family == expected


def with_zero_rows(rows: slice, per_patch: bool) -> State:
    """Zeroes rows of the last layer: of each patch position's 8 (per_patch), else of all 32."""
    state = small_state()
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        view = state[name].view(4, 8, -1) if per_patch else state[name].view(1, 32, -1)
        view[:, rows] = 0
    return state


def test_variance_rows_that_are_zero_make_a_sit(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", with_zero_rows(slice(4, 8), per_patch=True))
    assert load_model(path, num_heads=2).arch.family == "sit"
    assert load_model(path, num_heads=2, family="dit").arch.family == "dit"


@pytest.mark.parametrize(
    "state",
    [
        small_state(),
        small_state(learn_sigma=False),
        with_zero_rows(slice(0, 4), per_patch=True),
        with_zero_rows(slice(4, 7), per_patch=True),
        with_zero_rows(slice(16, 32), per_patch=False),
    ],
    ids=["trained rows", "no rows", "zero noise rows", "three of four zero", "the second half zero"],
)
def test_family_that_nothing_tells_is_asked(tmp_path: Path, state: State) -> None:
    assert "--family" in refusal(save(tmp_path / "a.pt", state), num_heads=2)


@pytest.mark.parametrize("arguments", [{"path_type": "VP"}, {"path_type": "Linear", "prediction": "noise"}])
def test_sit_of_another_path_or_prediction_is_refused(tmp_path: Path, arguments: dict[str, str]) -> None:
    message = refusal(save(tmp_path / "a.pt", training_checkpoint(**arguments)), num_heads=2)
    assert list(arguments.values())[-1].lower() in message.lower()


# --- what a file does not tell: heads, classes, grid ---------------------------------------------------------------------------


def test_published_width_has_known_heads(tmp_path: Path) -> None:
    state = official_state(tiny_model(depth=1, width=384, heads=6, mlp_width=32, classes=2, grid=(1, 1)))
    path = save(tmp_path / "a.pt", state)
    assert load_model(path, family="sit").arch.heads == 6
    assert load_model(path, family="sit", num_heads=4).arch.heads == 4


def test_other_width_asks_for_heads(tmp_path: Path) -> None:
    message = refusal(save(tmp_path / "a.pt", small_state()), family="sit")
    assert "width 16" in message
    assert "--num-heads" in message


def test_heads_in_metadata_are_taken_unless_told_otherwise(tmp_path: Path) -> None:
    path = save_flat(tmp_path / "a.safetensors", small_state(), {"num_heads": "4"})
    assert load_model(path, family="sit").arch.heads == 4
    assert load_model(path, family="sit", num_heads=8).arch.heads == 8


@pytest.mark.parametrize("heads", [0, -2])
def test_a_head_count_that_is_none_is_refused(tmp_path: Path, heads: int) -> None:
    path = save(tmp_path / "a.pt", small_state())
    with pytest.raises(UserError, match=f"{heads} is no number of heads"):
        load_model(path, family="sit", num_heads=heads)


@pytest.mark.parametrize("heads", [3, 32])
def test_heads_that_do_not_divide_the_width_are_refused(tmp_path: Path, heads: int) -> None:
    path = save(tmp_path / "a.pt", small_state())
    with pytest.raises(UserError, match=rf"16 does not divide into {heads} heads.*--num-heads"):
        load_model(path, family="sit", num_heads=heads)


def test_last_label_row_is_read_as_null_with_a_note(tmp_path: Path) -> None:
    opened = open_checkpoint(save(tmp_path / "a.pt", small_state()), Hints(**SMALL_HINTS))
    assert (opened.arch.classes, opened.arch.null_class) == (5, True)
    assert any("6 label rows" in note and "--num-classes" in note for note in opened.notes)


@pytest.mark.parametrize(("classes", "null_class"), [(5, True), (6, False)])
def test_classes_by_arguments_or_flag(tmp_path: Path, classes: int, null_class: bool) -> None:
    by_arguments = save(tmp_path / "a.pt", training_checkpoint(num_classes=classes))
    by_flag = save(tmp_path / "b.pt", training_checkpoint(num_classes=5 + 6 - classes))
    for opened in (
        open_checkpoint(by_arguments, Hints("sit", 2)),
        open_checkpoint(by_flag, Hints("sit", 2, num_classes=classes)),
    ):
        assert (opened.arch.classes, opened.arch.null_class) == (classes, null_class)
        assert not any("label rows" in note for note in opened.notes)


@pytest.mark.parametrize("classes", [4, 7, 1000])
def test_classes_that_do_not_fit_the_table_are_refused(tmp_path: Path, classes: int) -> None:
    path = save(tmp_path / "a.pt", small_state())
    message = refusal(path, **SMALL_HINTS, num_classes=classes)
    assert "6 label rows" in message
    assert f"{classes} classes" in message
    assert "--num-classes" in message


@pytest.mark.parametrize("grid", [(4, 6), (6, 4), (1, 3), (3, 1), (2, 8), (8, 2), (4, 4)], ids=str)
def test_grid_is_recognised_by_the_position_embedding(tmp_path: Path, grid: tuple[int, int]) -> None:
    """Also where the count is a square: (2, 8) has the 16 tokens of (4, 4)."""
    assert load_model(save(tmp_path / "a.pt", small_state(grid=grid)), **SMALL_HINTS).arch.grid == grid


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_grid_is_recognised_at_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {name: value.to(dtype) for name, value in small_state(grid=(4, 6)).items()}
    assert load_model(save(tmp_path / "a.pt", state), **SMALL_HINTS).arch.grid == (4, 6)


def test_learned_positions_of_a_square_count_are_square(tmp_path: Path) -> None:
    state = small_state() | {"pos_embed": torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0))}
    assert load_model(save(tmp_path / "a.pt", state), **SMALL_HINTS).arch.grid == (2, 2)


def test_learned_positions_of_another_count_are_refused(tmp_path: Path) -> None:
    state = small_state() | {"pos_embed": torch.randn(1, 24, 16, generator=torch.Generator().manual_seed(0))}
    assert "24 tokens" in refusal(save(tmp_path / "a.pt", state), **SMALL_HINTS)


@pytest.mark.parametrize(
    "arguments",
    [{"num_classes": [5]}, {"num_classes": "many"}, {"num_heads": "two"}, {"sample_size": 32}, {"model": None}, {"model": 3}],
    ids=str,
)
def test_arguments_of_another_kind_are_no_crash(tmp_path: Path, arguments: dict[str, Any]) -> None:
    path = save(tmp_path / "a.pt", training_checkpoint(**arguments))
    try:
        assert_same_weights(load_model(path, **SMALL_HINTS), training_sets()["ema"])
    except UserError as error:
        assert next(iter(arguments)) in error.message


# --- damage --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", [load_model, lambda path, **hints: inspect(str(path), **hints)], ids=["load", "inspect"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_non_finite_weight_is_named(tmp_path: Path, suffix: str, value: float, check: Callable[..., Any]) -> None:
    state = small_state()
    state["blocks.1.mlp.fc2.weight"][3, 5] = value
    path = (save if suffix == ".pt" else save_flat)(tmp_path / f"model{suffix}", state)
    with pytest.raises(UserError, match=r"blocks\.1\.mlp\.fc2\.weight has 1 value that"):
        check(path, **SMALL_HINTS)


DAMAGE: dict[str, tuple[Callable[[State], State], str]] = {
    "wrong shape": (lambda state: state | {"blocks.1.mlp.fc2.weight": torch.ones(16, 65)}, r"blocks\.1\.mlp\.fc2\.weight.*16, 65.*16, 64"),
    "transposed": (lambda state: state | {"blocks.0.mlp.fc2.weight": torch.ones(64, 16)}, r"blocks\.0\.mlp\.fc2\.weight"),
    "flat": (lambda state: state | {"t_embedder.mlp.2.weight": torch.ones(256)}, r"t_embedder\.mlp\.2\.weight"),
    "missing": (lambda state: without(state, "blocks.1.attn.proj.bias"), r"blocks\.1\.attn\.proj\.bias"),
    "no embedder": (lambda state: without(state, "x_embedder.proj.weight"), r"x_embedder\.proj\.weight"),
    "no positions": (lambda state: without(state, "pos_embed"), "pos_embed"),
    "extra": (lambda state: state | {"blocks.1.attn.gate": torch.ones(16)}, r"blocks\.1\.attn\.gate"),
    "gap": (
        lambda state: {name.replace("blocks.1.", "blocks.2."): value for name, value in state.items()},
        r"missing.*blocks\.1\.",
    ),
    "a block without a number": (lambda state: state | {"blocks.last.attn.proj.bias": torch.ones(16)}, r"blocks\.last"),
    "scalar table": (lambda state: state | {"y_embedder.embedding_table.weight": torch.tensor(1.0)}, r"y_embedder\.embedding_table"),
    "scalar mlp": (lambda state: state | {"blocks.0.mlp.fc1.weight": torch.tensor(1.0)}, r"blocks\.0\.mlp\.fc1\.weight"),
    "no label rows": (lambda state: state | {"y_embedder.embedding_table.weight": torch.ones(0, 16)}, "label rows|y_embedder"),
    "no tokens": (lambda state: state | {"pos_embed": torch.ones(1, 0, 16)}, "0 tokens|pos_embed"),
    "patches of nothing": (lambda state: state | {"x_embedder.proj.weight": torch.ones(16, 4, 0, 0)}, r"x_embedder\.proj\.weight"),
    "no channels": (lambda state: state | {"x_embedder.proj.weight": torch.ones(16, 0, 2, 2)}, r"x_embedder\.proj\.weight"),
    "no width": (lambda state: state | {"x_embedder.proj.weight": torch.ones(0, 4, 2, 2)}, r"x_embedder\.proj\.weight"),
    "oblong patches": (lambda state: state | {"x_embedder.proj.weight": torch.ones(16, 4, 2, 1)}, r"x_embedder\.proj\.weight"),
    "odd last rows": (lambda state: state | {"final_layer.linear.weight": torch.ones(31, 16)}, r"final_layer\.linear\.weight has 31 rows"),
    "complex": (lambda state: state | {"pos_embed": torch.ones(1, 4, 16, dtype=torch.complex64)}, "pos_embed"),
    "another network": (lambda _: {"conv1.weight": torch.ones(3), "fc.bias": torch.ones(3)}, r"not a DiT or SiT.*conv1\.weight"),
}


@pytest.mark.parametrize(("damage", "named"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_weights_are_refused_by_name(tmp_path: Path, damage: Callable[[State], State], named: str) -> None:
    path = save(tmp_path / "a.pt", damage(small_state()))
    with pytest.raises(UserError, match=named) as caught:
        load_model(path, **SMALL_HINTS)
    assert str(path) in caught.value.message


def test_block_of_absurd_number_builds_no_absurd_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(arch: Architecture) -> DiffusionTransformer:
        assert arch.depth < 100, "a model of a thousand layers was built to compare with"
        return DiffusionTransformer(arch)

    monkeypatch.setattr(checkpoint, "DiffusionTransformer", build)
    state = small_state() | {"blocks.1000.attn.proj.bias": torch.ones(16)}
    assert "blocks." in refusal(save(tmp_path / "a.pt", state), **SMALL_HINTS)


def outcome(path: Path) -> str:
    """What loading comes to: `loads`, `refused`, or the exception that escaped."""
    try:
        load_model(path, **SMALL_HINTS)
    except UserError as error:
        assert error.hint
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "loads"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_random_damage_loads_or_is_refused(tmp_path: Path, suffix: str) -> None:
    """A byte changed or the end cut off, half of the time among the names and sizes, which take a small part of the file."""
    state = small_state(depth=1)
    path = tmp_path / f"model{suffix}"
    if suffix == ".pt":
        save(path, {"ema": state, "args": argparse.Namespace(model="SiT-XL/2", num_classes=5)})
    else:
        save_flat(path, state, {"num_heads": "2", "num_classes": "5"})
    content = path.read_bytes()
    structure = zipfile.ZipFile(path).infolist()[1].header_offset if suffix == ".pt" else 8 + int.from_bytes(content[:8], "little")
    rng = random.Random(0)
    outcomes: dict[str, list[tuple[str, int, int]]] = {}
    for _ in range(200):
        position = rng.randrange(rng.choice((structure, len(content))))
        if rng.random() < 0.2:
            change = ("cut", position, 0)
            path.write_bytes(content[:position])
        else:
            change = ("byte", position, rng.randrange(256))
            path.write_bytes(content[:position] + bytes([change[2]]) + content[position + 1 :])
        outcomes.setdefault(outcome(path), []).append(change)
    assert outcomes.keys() == {"loads", "refused"}, {key: value for key, value in outcomes.items() if key not in ("loads", "refused")}
