"""LightningDiT and REPA-E: as in the original code, at all added levels, and refused in one line where a file does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import model_inputs, official_state, relative_error, tiny_model
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mediatorize
from mediatorize.compression.redundancy import attention_matrices
from mediatorize.diffusion.driver import Driver
from mediatorize.diffusion.process import LinearFlow
from mediatorize.diffusion.sampling import Sampler
from mediatorize.errors import UserError
from mediatorize.export.travelling.pipeline import flow_steps
from mediatorize.formats.checkpoint import Hints, open_checkpoint
from mediatorize.formats.images import decode, encode
from mediatorize.formats.samples import decoder_of
from mediatorize.model import cost
from mediatorize.model.architecture import Architecture, preset
from mediatorize.model.attention import Rotary, rotary_tables
from mediatorize.model.levels import Level, MediatorSettings
from mediatorize.model.resize import resized
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.stages.convert import convert
from mediatorize.stages.export import export
from mediatorize.stages.resize import resize

GOLDEN = Path(__file__).parent / "golden"
FILES = ("lightningdit", "lightningdit-qk-norm", "lightningdit-layer-norm")
"""As released; with RMSNorm of queries and keys; with LayerNorm everywhere and a GELU MLP. All have rotary positions."""

PARTS: dict[str, Any] = {"family": "lightningdit", "learn_sigma": False, "norm": "rms", "mlp": "swiglu", "rotary": True, "mlp_width": 128}
SETTINGS = MediatorSettings((1, 4, 16), local_rank=6, modulation_rank=5, projection_rank=3, mlp="own", mlp_widths=(8, 4))


def golden(file: str) -> tuple[DiffusionTransformer, dict[str, Tensor], dict[str, Any]]:
    """A model with a golden file's weights, the file's tensors, and what the original code's runs are."""
    path = GOLDEN / f"{file}.safetensors"
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    return mediatorize.load_model(path, num_heads=3), load_file(path), json.loads(metadata["model_t"])


# --- parity ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES)
def test_forward_equals_the_original_code(file: str) -> None:
    model, stored, _ = golden(file)
    assert model.arch.family == "lightningdit"
    assert relative_error(model(stored["x"], stored["t"], stored["y"]), stored["out"]) < 1e-5


@pytest.mark.parametrize("file", FILES)
def test_samples_equal_the_original_code(file: str) -> None:
    model, stored, _ = golden(file)
    latents = mediatorize.sample(model, stored["labels"], solver="euler", steps=10, noise=stored["noise"])
    assert relative_error(latents, stored["euler10"]) < 1e-5


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(("run", "solver"), [("euler10_shift", "euler"), ("heun10_shift", "heun"), ("euler10_cfg", "euler")])
def test_shifted_and_guided_samples_equal_the_original_code(file: str, run: str, solver: str) -> None:
    """Also where guidance begins at a time: its cfg_interval_start 0.125 is the noise level 0.875."""
    model, stored, times = golden(file)
    guided: dict[str, Any] = {"cfg_scale": 2.5, "cfg_interval": (0.0, 0.875)} if run == "euler10_cfg" else {}
    how: dict[str, Any] = {"solver": solver, "steps": 10, "timestep_shift": 0.3} | guided
    assert Sampler.resolve(model.arch, **how).times() == pytest.approx(times[run], abs=1e-6)
    latents = mediatorize.sample(model, stored["labels"], noise=stored["noise"], **how)
    assert relative_error(latents, stored[run]) < 1e-5
    assert relative_error(latents, stored["euler10"]) > 1e-3


def test_a_scheduler_with_the_inverse_shift_takes_the_same_steps() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1 / 0.3)
    times = flow_steps(LinearFlow(), scheduler, 10, torch.device("cpu"))[:10]
    assert times.tolist() == pytest.approx(Sampler.resolve(tiny_model(**PARTS).arch, steps=10, timestep_shift=0.3).times(), abs=1e-6)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"timestep_shift": 0.0}, r"shift of 0 cannot be.*1 is no shift"),
        ({"timestep_shift": float("nan")}, r"shift of nan cannot be"),
        ({"timestep_shift": 0.3, "solver": "sde"}, r"steps of sde cannot be shifted; those of euler, heun, unipc can.*--timestep-shift"),
        ({"cfg_interval": (0.9, 0.1)}, r"No noise level is in the interval 0\.9,0\.1"),
    ],
    ids=["no shift", "nan", "sde", "empty interval"],
)
def test_samplers_that_cannot_be_are_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampler.resolve(tiny_model(**PARTS).arch, **how)


def test_rotary_tables_equal_the_original_code_and_matter() -> None:
    model, stored, _ = golden("lightningdit")
    for name, table in zip(("freqs_cos", "freqs_sin"), rotary_tables(16, (4, 4)), strict=True):
        torch.testing.assert_close(table, stored[f"model.feat_rope.{name}"])
    assert model.feat_rope is not None
    model.feat_rope.freqs_sin.zero_()
    model.feat_rope.freqs_cos.fill_(1)
    assert relative_error(model(stored["x"], stored["t"], stored["y"]), stored["out"]) > 1e-3


def test_scores_of_rotated_queries_and_keys_depend_on_distances_alone() -> None:
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=draw).expand(-1, -1, -1, 15, -1)
    rotary = Rotary(16, (3, 5))
    scores = (rotary(q) @ rotary(k).mT).view(3, 5, 3, 5)
    torch.testing.assert_close(scores[0, 0, 1, 2], scores[1, 2, 2, 4])
    torch.testing.assert_close(scores[2, 3, 0, 1], scores[2, 4, 0, 2])
    assert not torch.isclose(scores[0, 0, 1, 2], scores[0, 0, 2, 1])


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_matrices_are_those_that_the_layer_attends_with(qk_norm: bool) -> None:
    layer = tiny_model(**PARTS, qk_norm=qk_norm).attention_layers()[1]
    x = torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(0))
    values = layer.qkv(x).unflatten(2, (3, 3, 16))[:, :, 2].transpose(1, 2)
    mixed = (attention_matrices(layer, x) @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer.proj(mixed), layer(x), rtol=1e-4, atol=1e-5)


# --- files -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def lightning_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a training checkpoint as LightningDiT does, some of its weights changed; gives its path."""

    def write(changed: dict[str, Tensor | None] | None = None, **changes: Any) -> Path:
        state = official_state(tiny_model(**PARTS | changes)) | (changed or {})
        path = tmp_path / "lightning.pt"
        kept = {name: value for name, value in state.items() if value is not None}
        torch.save({"model": {}, "ema": {f"module.{name}": value for name, value in kept.items()}, "opt": {}}, path)
        return path

    return write


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_what_blocks_are_made_of_is_read_from_the_names(lightning_file: Callable[..., Path], norm: str, qk_norm: bool) -> None:
    original = tiny_model(**PARTS | {"norm": norm}, qk_norm=qk_norm)
    model = mediatorize.load_model(lightning_file(norm=norm, qk_norm=qk_norm), num_heads=3)
    assert model.arch == original.arch
    assert torch.equal(model(*model_inputs(original)), original(*model_inputs(original)))


def test_a_sit_with_normalised_queries_and_keys_is_timms(lightning_file: Callable[..., Path]) -> None:
    from timm.layers import Attention

    model = tiny_model(qk_norm=True)
    theirs = Attention(48, 3, qkv_bias=True, qk_norm=True, norm_layer=torch.nn.LayerNorm).eval().requires_grad_(False)
    theirs.load_state_dict(model.attention_layers()[0].state_dict())
    x = torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.attention_layers()[0](x), theirs(x))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"feat_rope.freqs_cos": torch.ones(64, 16)}, r"feat_rope\.freqs_cos is \[64, 16\] where LightningDiT-3x48/2 needs \[16, 16\]"),
        ({"feat_rope.freqs_sin": None}, r"1 weights are missing: feat_rope\.freqs_sin"),
        ({"blocks.1.mlp.w12.weight": torch.ones(200, 48)}, r"blocks\.1\.mlp\.w12\.weight is \[200, 48\] where .* needs \[256, 48\]"),
        ({"blocks.0.mlp.w3.weight": torch.ones(48, 100)}, r"blocks\.0\.mlp\.w3\.weight is \[48, 100\] where .* needs \[48, 128\]"),
        ({"blocks.2.norm2.weight": None}, r"1 weights are missing: blocks\.2\.norm2\.weight"),
        ({"blocks.0.adaLN_modulation.1.weight": torch.ones(192, 48)}, "blocks have no shifts"),
    ],
    ids=["other tables", "half a table", "other w12", "other w3", "no norm", "no shifts"],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line(
    lightning_file: Callable[..., Path], changed: dict[str, Tensor | None], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        mediatorize.load_model(lightning_file(changed), num_heads=3)
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def test_a_lightningdit_is_no_sit_and_its_heads_are_of_a_width_for_rotations(lightning_file: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"a LightningDiT checkpoint is no SiT.*Leave --family out"):
        mediatorize.load_model(lightning_file(), num_heads=3, family="sit")
    with pytest.raises(UserError, match=r"Heads of width 6 do not divide into pairs.*--num-heads"):
        mediatorize.load_model(lightning_file(), num_heads=8)


# --- sizes and cost --------------------------------------------------------------------------------------------------------------


def test_the_published_sizes() -> None:
    arch = preset("LightningDiT-XL/1@256")
    assert (arch.name, arch.grid, arch.channels, arch.image_size) == ("LightningDiT-XL/1", (16, 16), 32, (256, 256))
    assert arch.mlp_width == int(2 / 3 * 4 * 1152)
    assert Architecture.from_json(json.loads(json.dumps(arch.to_json()))) == arch
    assert preset("lightningdit-1p0b/2@512").width == 1536


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_parameters_in_closed_form_are_those_of_the_model(norm: str, qk_norm: bool) -> None:
    model = tiny_model(SETTINGS, **PARTS | {"norm": norm}, qk_norm=qk_norm)
    assert cost.count_parameters(model.arch, SETTINGS) == sum(parameter.numel() for parameter in model.parameters())
    assert cost.added_parameters(model.arch, SETTINGS) == sum(p.numel() for p in model.mediator_parameters().values())


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("level", ["softmax", 1, 4, 16, "softmax|1/8", "4|1/4"])
def test_closed_form_equals_torchs_count(level: Level, qk_norm: bool) -> None:
    model = tiny_model(SETTINGS, **PARTS, qk_norm=qk_norm)
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        DiffusionTransformer(model.arch, SETTINGS)(torch.empty(1, 4, 8, 8), torch.empty(1), torch.zeros(1, dtype=torch.long), levels=level)
    assert cost.forward_flops(model.arch, level, SETTINGS) == counter.get_total_flops()


# --- levels ----------------------------------------------------------------------------------------------------------------------


def test_softmax_of_a_converted_model_is_the_model_bit_for_bit() -> None:
    plain, converted = tiny_model(**PARTS), tiny_model(**PARTS)
    converted.add_mediators(SETTINGS)
    assert torch.equal(converted(*model_inputs(plain)), plain(*model_inputs(plain)))


@pytest.mark.parametrize("space", ["queries", "keys"])
def test_absorbed_mediators_equal_plain_ones_without_rotations(space: Any) -> None:
    model = tiny_model(MediatorSettings((1, 4), space=space), **PARTS)
    x = torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(0))
    for level in (1, 4):
        layer = model.attention_layers()[0].mediated()
        assert relative_error(layer.absorbed(x, level), layer.plain(x, level)) < 1e-5
        assert model.feat_rope is not None
        before = layer(x, level)
        model.feat_rope.freqs_cos.zero_()
        assert torch.equal(layer(x, level), before)


@pytest.mark.parametrize("rotary", [False, True])
def test_as_many_sharp_mediators_as_tokens_are_softmax_attention_with_normalised_queries(rotary: bool) -> None:
    """Assignment by distance becomes softmax attention as mediators grow to the tokens: also where queries and keys are normalised, and
    then rotated."""
    model = tiny_model(MediatorSettings((16,)), **PARTS | {"rotary": rotary}, qk_norm=True)
    layer = model.attention_layers()[0]
    layer.mediator = None
    level = layer.add_mediators(MediatorSettings((16,))).count(16)
    level.log_query_scale.data.fill_(8.0)
    layer.requires_grad_(False)
    x = torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(0))
    assert relative_error(layer(x, 16), layer(x)) < 1e-4


def test_a_narrow_swiglu_of_all_units_is_the_mlp() -> None:
    """The widest narrow MLP starts from the first half of the units; with the other half silent that is the whole MLP."""
    model = tiny_model(**PARTS)
    block = model.layers()[0]
    block.mlp.w3.weight.data[:, 64:] = 0  # type: ignore[union-attr, operator]
    block.add_mediators(model.arch, MediatorSettings((1,), mlp_widths=(4, 2)), lambda: torch.Generator().manual_seed(0))
    model.requires_grad_(False)
    x = torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(block.run_mlp(x, "1/2"), block.run_mlp(x, "full"))
    assert relative_error(block.run_mlp(x, "1/4"), block.run_mlp(x, "full")) > 1e-2


# --- resolution ------------------------------------------------------------------------------------------------------------------


def test_another_resolution_has_tables_of_its_own_grid() -> None:
    model = tiny_model(SETTINGS, **PARTS)
    other, fresh = resized(model, (6, 4)), tiny_model(**PARTS, grid=(6, 4))
    of_grid = {name: value for name, value in fresh.state_dict().items() if name.startswith(("pos_embed", "feat_rope."))}
    fresh.load_state_dict(official_state(model) | of_grid)
    assert other(*model_inputs(other), levels=4).isfinite().all()
    assert torch.equal(other(*model_inputs(other)), fresh(*model_inputs(fresh)))


# --- held rests ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qk_norm", [False, True])
def test_held_rests_are_exact_where_nothing_changed_and_stated_flops_are_those_that_run(qk_norm: bool) -> None:
    model = tiny_model(SETTINGS, **PARTS, qk_norm=qk_norm)
    for layer in model.attention_layers():
        layer.fused_attn = False  # whose products the counter does not see on the CPU
    calls: list[tuple[Level, ...]] = [("softmax",) * 3, ("softmax", 4, "hold+1|full"), ("hold+4|full", "hold+4|1/8", "hold+1|1/4")]
    x, t, y = model_inputs(model, batch=1)
    with FlopCounterMode(display=False) as counter:
        driver = Driver(model, calls, [1] * 3)
        outputs = [driver(x, t, y) for _ in calls]
    assert counter.get_total_flops() == cost.calls_flops(model.arch, calls, [1] * 3, SETTINGS)
    assert torch.equal(outputs[0], model(x, t, y))
    held = Driver(model, [calls[0], ("hold+4|full", "hold+1|full", "hold+4|1/8")], [1] * 2)
    held(x, t, y)
    assert relative_error(held(x, t, y), model(x, t, y, levels=["softmax", "softmax", "softmax|1/8"])) < 1e-5
    assert relative_error(outputs[2], model(x, t, y, levels=["softmax", "softmax|1/8", "softmax|1/4"])) > 3e-5


# --- from a checkpoint to an export ----------------------------------------------------------------------------------------------


def test_a_converted_file_comes_back_from_every_export(lightning_file: Callable[..., Path], tmp_path: Path) -> None:
    file = lightning_file(depth=1, grid=(8, 8))
    conversion = convert(
        str(file),
        tmp_path / "out",
        num_heads=3,
        levels=(1,),
        states=16,
        trajectories=16,
        fit_steps=2,
        batch=8,
        sampler_steps=2,
        cfg_scale=1.0,
    )
    assert set(conversion.errors[0].after) == {1, "1/8", "1/4"}
    bundle = mediatorize.load_model(tmp_path / "out")
    for target in ("safetensors", "official", "diffusers"):
        assert export(tmp_path / "out", tmp_path / target, to=target).out == tmp_path / target
    back = mediatorize.load_model(tmp_path / "official" / "model.pt", num_heads=3)
    assert back.arch == bundle.arch
    assert torch.equal(back(*model_inputs(back)), bundle(*model_inputs(back)))
    written, read = torch.load(tmp_path / "official" / "model.pt"), torch.load(file)["ema"]
    assert {f"module.{name}" for name in written} == read.keys()  # the rotary tables too, which its code loads strictly
    with pytest.raises(UserError, match="runs SiTs, and this is a LightningDiT"):
        export(tmp_path / "out", tmp_path / "other", to="attention-mediators", level=1)


def test_a_sit_with_normalised_queries_is_not_exported_to_code_that_lacks_them(tmp_path: Path) -> None:
    torch.save(official_state(tiny_model(depth=1, grid=(8, 8), qk_norm=True)), tmp_path / "sit.pt")
    convert(
        str(tmp_path / "sit.pt"),
        tmp_path / "out",
        family="sit",
        num_heads=3,
        levels=(1,),
        local_rank=0,
        states=16,
        fit_steps=0,
        sampler_steps=2,
    )
    for target, message in (("official", "which SiT's code does not"), ("attention-mediators", "does not normalise queries and keys")):
        with pytest.raises(UserError, match=message):
            export(tmp_path / "out", tmp_path / target, to=target)
        assert not (tmp_path / target).exists()


# --- statistics of latents -------------------------------------------------------------------------------------------------------

MEAN, STD = torch.tensor([0.5, -1.0, 2.0, 0.25]), torch.tensor([1.5, 0.5, 3.0, 2.0])


class DoublingVae:
    """Stands for a VAE: three channels of its latents, doubled."""

    def to(self, device: torch.device) -> DoublingVae:
        return self

    def decode(self, latents: Tensor) -> Any:
        return SimpleNamespace(sample=2 * latents[:, :3])

    def encode(self, pixels: Tensor) -> Any:
        posterior = SimpleNamespace(mean=torch.cat([pixels, pixels[:, :1]], dim=1) / 2, std=torch.ones(()))
        return SimpleNamespace(latent_dist=posterior)


@pytest.fixture
def repa_e_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a training checkpoint as REPA-E does, with its VAE beside it; gives its path."""

    def write(**changed: Tensor | None) -> Path:
        bn = {"bn.running_mean": MEAN, "bn.running_var": STD.square(), "bn.num_batches_tracked": torch.tensor(7)}
        bn |= {name.replace("_", ".", 1): value for name, value in changed.items()}  # type: ignore[misc]
        state = official_state(tiny_model(learn_sigma=False, patch=1)) | {"projectors.0.0.weight": torch.ones(8, 48)} | bn
        path = tmp_path / "repa-e.pt"
        torch.save(
            {"ema": {name: value for name, value in state.items() if value is not None}, "vae": {"conv.weight": torch.ones(2)}}, path
        )
        return path

    return write


@pytest.fixture
def repa_e(tmp_path: Path) -> tuple[DiffusionTransformer, dict[str, Tensor]]:
    """The golden file's model, read from a training checkpoint such as REPA-E writes (projectors, statistics, VAE), and its tensors."""
    stored = load_file(GOLDEN / "repa-e.safetensors")
    state = {name.removeprefix("model."): value for name, value in stored.items() if name.startswith("model.")}
    torch.save({"ema": state, "vae": {"conv.weight": torch.ones(2)}}, tmp_path / "golden.pt")
    return mediatorize.load_model(tmp_path / "golden.pt", num_heads=3), stored


def test_repa_e_equals_the_original_code(repa_e: tuple[DiffusionTransformer, dict[str, Tensor]]) -> None:
    model, stored = repa_e
    assert (model.arch.patch, model.arch.channels, model.arch.reversed_time) == (1, 32, True)
    assert relative_error(model(stored["x"], stored["t"], stored["y"]), stored["out"]) < 1e-5


@pytest.mark.parametrize(
    ("run", "guidance"),
    [("euler10", {}), ("euler10_cfg", {"cfg_scale": 2.5, "cfg_channels": "all", "cfg_interval": (0.2, 0.75)})],
)
def test_samples_of_repa_e_equal_the_original_code(
    repa_e: tuple[DiffusionTransformer, dict[str, Tensor]], run: str, guidance: dict[str, Any]
) -> None:
    model, stored = repa_e
    latents = mediatorize.sample(model, stored["labels"], solver="euler", steps=10, noise=stored["noise"], **guidance)
    assert relative_error(latents, stored[run]) < 1e-5
    if not guidance:
        pictures = decode(DoublingVae(), latents, model.arch)
        assert relative_error(pictures, 2 * stored["denormalised"][:, :3]) < 1e-5


def test_the_statistics_of_a_repa_e_file_stay_with_the_model_and_its_vae_is_left_alone(
    repa_e_file: Callable[..., Path], tmp_path: Path
) -> None:
    opened = open_checkpoint(repa_e_file(), Hints(num_heads=3))
    assert opened.arch.reversed_time
    assert (opened.arch.latent_mean, opened.arch.latent_std) == (tuple(MEAN.tolist()), tuple(STD.tolist()))
    assert any("VAE in the file was left alone" in note for note in opened.notes)
    assert Architecture.from_json(json.loads(json.dumps(opened.arch.to_json()))) == opened.arch
    resize(str(repa_e_file()), tmp_path / "large.pt", image_size=(48, 48), num_heads=3)
    assert mediatorize.load_model(tmp_path / "large.pt").arch.latent_std == pytest.approx(opened.arch.latent_std)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bn_running_var": None}, "do not go together"),
        ({"bn_running_var": torch.zeros(4)}, "variance that is not above 0"),
        ({"bn_running_mean": torch.ones(5), "bn_running_var": torch.ones(5)}, "Latents of 4 channels have 5 means and 5 deviations"),
    ],
    ids=["one alone", "zero", "other channels"],
)
def test_statistics_that_cannot_be_are_refused(repa_e_file: Callable[..., Path], changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mediatorize.load_model(repa_e_file(**changed), num_heads=3)


def test_decoding_undoes_the_statistics_and_encoding_applies_them() -> None:
    arch = tiny_model(latent_mean=tuple(MEAN.tolist()), latent_std=tuple(STD.tolist())).arch
    draw = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, 2, 4, 8, 8, generator=draw)
    normalised = (z - MEAN.view(-1, 1, 1)) / STD.view(-1, 1, 1)
    torch.testing.assert_close(decode(DoublingVae(), normalised, arch), 2 * z[:, :3])
    pixels = 2 * z[:, :3]
    drawn = torch.cat([z[:, :3], z[:, :1]], dim=1) + noise
    torch.testing.assert_close(encode(DoublingVae(), pixels, noise, arch), (drawn - MEAN.view(-1, 1, 1)) / STD.view(-1, 1, 1))
    torch.testing.assert_close(decode(DoublingVae(), 0.18215 * z, tiny_model().arch), 2 * z[:, :3])


def test_statistics_are_asked_for_once_and_kept_in_the_bundle(lightning_file: Callable[..., Path], tmp_path: Path) -> None:
    file = lightning_file(depth=1, channels=32, grid=(8, 8))
    with pytest.raises(UserError, match=r"normalised latents of 32 channels.*--latent-stats latents_stats\.pt"):
        decoder_of(DoublingVae(), torch.device("cpu"), mediatorize.load_model(file, num_heads=3).arch)
    stats = {"mean": torch.arange(32.0).view(1, -1, 1, 1), "std": 1 + torch.arange(32.0).view(1, -1, 1, 1)}
    torch.save(stats, tmp_path / "latents_stats.pt")
    few: dict[str, Any] = {"states": 16, "trajectories": 16, "fit_steps": 0, "sampler_steps": 2}
    convert(str(file), tmp_path / "out", num_heads=3, levels=(1,), local_rank=0, latent_stats=tmp_path / "latents_stats.pt", **few)
    arch = mediatorize.load_model(tmp_path / "out").arch
    assert (arch.latent_mean, arch.latent_std) == (tuple(map(float, range(32))), tuple(map(float, range(1, 33))))
    assert decoder_of(DoublingVae(), torch.device("cpu"), arch)(torch.zeros(1, 32, 8, 8)).shape == (1, 8, 8, 3)
