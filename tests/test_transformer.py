"""The whole model: equal to the original code's and diffusers' outputs, levels per layer, grids that are not square."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import model_inputs, randomise, relative_error, tiny_model
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

import mediatorize
from mediatorize import sample
from mediatorize.diffusion.sampling import Sampler, guide
from mediatorize.errors import UserError
from mediatorize.model.block import Block
from mediatorize.model.levels import SOFTMAX, Level, MediatorSettings
from mediatorize.model.schedule import Schedule
from mediatorize.model.transformer import DiffusionTransformer, sincos_position_embedding

GOLDEN = Path(__file__).parent / "golden"
SETTINGS = MediatorSettings((1, 4, 16), local_rank=6)


def golden(family: str) -> tuple[DiffusionTransformer, dict[str, Tensor]]:
    """A model with the golden file's weights, and its tensors: inputs to and outputs of the original code (see its metadata)."""
    file = GOLDEN / f"{family}.safetensors"
    return mediatorize.load_model(file, family=family, num_heads=3), load_file(file)  # type: ignore[arg-type]


# --- parity ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["dit", "sit"])
def test_forward_equals_the_original_code(family: str) -> None:
    model, stored = golden(family)
    assert relative_error(model(stored["x"], stored["t"], stored["y"]), stored["out"]) < 1e-6


@pytest.mark.parametrize("family", ["dit", "sit"])
def test_guided_forward_equals_the_original_code(family: str) -> None:
    model, stored = golden(family)
    null = torch.full_like(stored["cfg_y"], model.arch.classes)
    twice = (torch.cat([stored[name], stored[name]]) for name in ("cfg_x", "cfg_t"))
    output = model(*twice, torch.cat([stored["cfg_y"], null]))
    assert relative_error(guide(output, 2.5, 3)[:2], stored["cfg_out"]) < 5e-6  # guidance enlarges rounding
    assert relative_error(guide(output, 2.5, 4)[:2], stored["cfg_out"]) > 1e-3


@pytest.mark.parametrize("family", ["dit", "sit"])
def test_position_embedding_equals_the_original_code(family: str) -> None:
    model, stored = golden(family)
    torch.testing.assert_close(sincos_position_embedding(model.arch.width, model.arch.grid), stored["model.pos_embed"])


def test_position_embedding_of_an_oblong_is_cut_from_the_squares() -> None:
    square = sincos_position_embedding(48, (5, 5)).view(5, 5, 48)
    assert torch.equal(sincos_position_embedding(48, (2, 5)).view(2, 5, 48), square[:2])
    assert torch.equal(sincos_position_embedding(48, (5, 3)).view(5, 3, 48), square[:, :3])


def diffusers_dit() -> DiTTransformer2DModel:
    """A shrunken, randomised DiT of diffusers, with the same embedders in every block, as converted checkpoints have."""
    model = DiTTransformer2DModel(
        num_attention_heads=3, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8, num_embeds_ada_norm=10
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1, generator=generator)
    first, *others = model.transformer_blocks
    for block in others:
        block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("subfolder", ["", "transformer"], ids=["model folder", "pipeline folder"])
def test_a_diffusers_dit_gives_diffusers_output(tmp_path: Path, subfolder: str) -> None:
    theirs = diffusers_dit()
    theirs.save_pretrained(tmp_path / subfolder)
    ours = mediatorize.load_model(tmp_path)
    x, t, y = model_inputs(ours)
    t = t.long()
    expected = theirs(x, t, y).sample
    assert relative_error(ours(x, t, y), expected) < 1e-5

    official = DiffusionTransformer(dataclasses.replace(ours.arch, frequency_shift=0, mlp_norm_eps=1e-6)).eval()
    official.load_state_dict(ours.state_dict())
    assert relative_error(official.requires_grad_(False)(x, t, y), expected) > 1e-4


def test_a_diffusers_dit_keeps_diffusers_epsilon(tmp_path: Path) -> None:
    """At timestep 0 frequencies do not matter, and in float64 both compute the same: the epsilon is all that could differ."""
    theirs = diffusers_dit()
    theirs.save_pretrained(tmp_path)
    ours = mediatorize.load_model(tmp_path).double()
    x, _, y = model_inputs(ours)
    inputs = x.double(), torch.zeros(3, dtype=torch.long), y
    expected = theirs.double()(*inputs).sample
    assert relative_error(ours(*inputs), expected) < 1e-10

    official = DiffusionTransformer(dataclasses.replace(ours.arch, mlp_norm_eps=1e-6)).double().eval()
    official.load_state_dict(ours.state_dict())
    assert relative_error(official.requires_grad_(False)(*inputs), expected) > 1e-6


# --- levels ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["softmax", 1, 4, 16])
def test_one_level_for_all_layers_equals_a_list_of_it(level: Level) -> None:
    model = tiny_model(SETTINGS)
    inputs = model_inputs(model)
    assert torch.equal(model(*inputs, levels=level), model(*inputs, levels=[level] * 3))


def test_softmax_levels_are_the_unconverted_model_bit_for_bit() -> None:
    model = tiny_model()
    inputs = model_inputs(model)
    expected = model(*inputs)
    model.add_mediators(SETTINGS)
    for layer in model.attention_layers():
        randomise(layer.mediated(), seed=1)
    for levels in ("softmax", ["softmax"] * 3):
        assert torch.equal(model(*inputs, levels=levels), expected)
    assert torch.equal(model(*inputs), expected)


def test_a_blocks_own_mlp_starts_as_the_pretrained_one_and_runs_at_mediator_levels_alone() -> None:
    model, shared = tiny_model(), tiny_model()
    inputs = model_inputs(model)
    shared.add_mediators(SETTINGS)
    model.add_mediators(dataclasses.replace(SETTINGS, mlp="own"))
    model.requires_grad_(False)
    assert torch.equal(model(*inputs, levels=4), shared(*inputs, levels=4))
    before = {levels: model(*inputs, levels=list(levels)) for levels in ((4, "softmax", 16), ("softmax", "softmax", "softmax"))}
    for block in model.layers():
        assert block.mediator is not None
        block.mediator.mlp.fc2.bias.data += 0.1
    softmax = ("softmax",) * 3
    assert torch.equal(model(*inputs, levels=list(softmax)), before[softmax])
    assert relative_error(model(*inputs, levels=[4, "softmax", 16]), before[4, "softmax", 16]) > 1e-3


def test_every_layer_runs_at_its_own_level(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(SETTINGS)
    ran = []
    for index, layer in enumerate(model.attention_layers()):

        def record(x: Tensor, level: Level, index: int = index, forward=layer.forward) -> Tensor:  # type: ignore[no-untyped-def]
            ran.append((index, level))
            return forward(x, level)

        monkeypatch.setattr(layer, "forward", record)
    model(*model_inputs(model), levels=(4, "softmax", 1))
    assert ran == [(0, 4), (1, "softmax"), (2, 1)]


def test_which_layer_has_which_level_matters() -> None:
    model = tiny_model(SETTINGS)
    inputs = model_inputs(model)
    patterns: list[list[Level]] = [["softmax", 4, 1], ["softmax", 1, 4], [4, "softmax", 1], [4, 4, 4], ["softmax", 4, 4]]
    outputs = [model(*inputs, levels=levels) for levels in patterns]
    for index, output in enumerate(outputs):
        assert all(relative_error(output, other) > 1e-5 for other in outputs[:index])


@pytest.mark.parametrize("levels", [[], [4, 4], [4] * 4])
def test_a_wrong_number_of_levels_is_refused(levels: list[Level]) -> None:
    model = tiny_model(SETTINGS)
    with pytest.raises(UserError, match=rf"^{len(levels)} levels were given for 3 layers\. Pass one level, or one per layer\.$"):
        model(*model_inputs(model), levels=levels)


def test_mediator_levels_of_an_unconverted_model_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(UserError, match=r"^This model has no mediators, only level softmax\. Run `mediatorize convert` first\.$"):
        model(*model_inputs(model), levels=["softmax", "softmax", 4])


# --- grids -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(4, 4), (2, 5), (5, 2)])
@pytest.mark.parametrize(("family", "rows"), [("dit", 8), ("sit", 4)])
def test_unpatchify_puts_every_patch_where_it_was_cut(family: str, rows: int, grid: tuple[int, int]) -> None:
    """Against torch's unfold, whose patches are (channel, row, column) where DiT's are (row, column, channel)."""
    model = tiny_model(family=family, grid=grid, depth=1)
    image = torch.randn(2, 8, *model.arch.input_size, generator=torch.Generator().manual_seed(0))
    patches = F.unfold(image, kernel_size=2, stride=2).unflatten(1, (8, 2, 2)).permute(0, 4, 2, 3, 1).flatten(2)
    assert torch.equal(model.unpatchify(patches), image[:, :rows])


@pytest.mark.parametrize("grid", [(4, 4), (2, 5), (5, 2)])
def test_embedding_cuts_patches_in_the_order_of_unpatchify(grid: tuple[int, int]) -> None:
    """With an embedding that copies the patch and no positions, unpatchify undoes embed."""
    model = tiny_model(width=48, grid=grid, depth=1, learn_sigma=False)
    model.pos_embed.data.zero_()
    model.x_embedder.proj.bias.data.zero_()
    copy = torch.eye(16).view(2, 2, 4, 16).permute(3, 2, 0, 1)  # (row, column, channel) of a patch, as the last layer orders them
    model.x_embedder.proj.weight.data = torch.cat([copy, torch.zeros(32, 4, 2, 2)])
    image = torch.randn(2, 4, *model.arch.input_size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.unpatchify(model.embed(image)[..., :16]), image)


@pytest.mark.parametrize("levels", ["softmax", 1, 4, 7, [7, "softmax", 4]])
@pytest.mark.parametrize("family", ["dit", "sit"])
def test_a_transposed_model_on_a_transposed_image_gives_the_transposed_output(family: str, levels: Level | list[Level]) -> None:
    settings = MediatorSettings((1, 4, 7), local_rank=6)
    model = tiny_model(settings, family=family, grid=(2, 5))
    mirror = tiny_model(settings, family=family, grid=(5, 2))
    state = model.state_dict()
    for name, value in state.items():
        if name == "pos_embed":
            state[name] = value.unflatten(1, (2, 5)).transpose(1, 2).flatten(1, 2)
        elif name.startswith("final_layer.linear"):
            state[name] = value.unflatten(0, (2, 2, -1)).transpose(0, 1).flatten(0, 2)
        elif name.endswith(("x_embedder.proj.weight", "depthwise.weight", "pool", "key_bias", "query_bias")):
            state[name] = value.transpose(2, 3)
    mirror.load_state_dict(state)
    x, t, y = model_inputs(model)
    expected = model(x, t, y, levels=levels).mT
    assert relative_error(mirror(x.mT, t, y, levels=levels), expected) < 1e-5
    assert relative_error(mirror(x.mT.flip(2), t, y, levels=levels), expected) > 1e-3


# --- conventions -----------------------------------------------------------------------------------------------------------------


def test_sit_drops_the_variance_rows_that_dit_keeps() -> None:
    dit, sit = tiny_model(family="dit"), tiny_model(family="sit")
    inputs = model_inputs(sit)
    assert torch.equal(dit(*inputs)[:, :4], sit(*inputs))
    assert dit(*inputs)[:, 4:].abs().max() > 0


def test_samples_of_a_batch_do_not_see_each_other() -> None:
    model = tiny_model(SETTINGS)
    x, t, y = model_inputs(model)
    levels: list[Level] = [4, "softmax", 16]
    together = model(x, t, y, levels=levels)
    for index in range(len(x)):
        alone = model(x[index : index + 1], t[index : index + 1], y[index : index + 1], levels=levels)
        assert relative_error(alone, together[index : index + 1]) < 1e-5


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.4, 0.9)])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_compiled_blocks_share_a_graph_for_each_way_they_run_and_compile_no_more_after_a_trajectory(
    solver: str, interval: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = MediatorSettings((1, 4), local_rank=3, modulation_rank=2, mlp_widths=(8, 4))
    model = tiny_model(settings, family="sit", channels=1)
    rows = [(SOFTMAX,) * 3, ("hold+4|1/8", 4, "hold+1|full"), ("hold+4|full",) * 3, (4, 1, "4|1/4")]
    how: dict[str, Any] = {"solver": solver, "steps": 4, "cfg_scale": 1.5, "cfg_interval": interval}
    noise_levels = Sampler.resolve(model.arch, **how).noise_levels(model.arch)
    cells = list(dict.fromkeys(noise_levels))
    how["schedule"] = Schedule.through(noise_levels, [rows[cells.index(noise_level) % 4] for noise_level in noise_levels])
    ways: set[Any] = set()
    compute = Block.compute

    def record(block: Block, x: Tensor, conditioning: Tensor, attention: Level, mlp: Level, changed: bool, rest: Any, watched: Any) -> Any:
        ways.add((attention, mlp, changed, rest is None, watched, len(x)))
        return compute(block, x, conditioning, attention, mlp, changed, rest, watched)

    with monkeypatch.context() as patched:
        patched.setattr(Block, "compute", record)
        expected = sample(model, [1, 2], seed=3, **how)
    assert {rest for *_, rest, _, _ in ways} == {True, False}
    assert {watched for *_, watched, _ in ways} > {()}
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, example: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    model.compile_blocks(backend=count)
    torch.testing.assert_close(sample(model, [1, 2], seed=3, **how), expected)
    assert len(graphs) == len(ways)
    sample(model, [2, 0], seed=4, **how)
    assert len(graphs) == len(ways)
