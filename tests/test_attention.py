"""Mediator attention: absorbed and plain are one function, softmax is timm's, pooling is a partition of the tokens."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import randomise, relative_error
from timm.layers import Attention
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mediatorize.errors import UserError
from mediatorize.model import forms
from mediatorize.model.architecture import preset
from mediatorize.model.attention import ChangedLinear, LocalBranch, MediatorAttention
from mediatorize.model.block import SwitchableAttention
from mediatorize.model.forms import change_in_weight, interpolation_flops, plain_change_flops, plain_flops
from mediatorize.model.levels import SOFTMAX, MediatorSettings, Space
from mediatorize.model.mediators import grid_partition

WIDTH, HEADS = 48, 3
LEVELS = (1, 4, 7, 16)
GRIDS = [(4, 4), (3, 6), (20, 18)]
"""Square, oblong, and larger than the coarse grid in both directions."""

SPACES: list[Space] = ["queries", "keys"]


def mediator_attention(
    grid: tuple[int, int] = (4, 4), space: Space = "queries", levels: tuple[int, ...] = LEVELS, local_rank: int = 0
) -> MediatorAttention:
    attention = MediatorAttention(WIDTH, HEADS, grid, MediatorSettings(levels, space, local_rank))
    randomise(attention)
    return attention.requires_grad_(False)


def switchable_attention(grid: tuple[int, int] = (4, 4)) -> SwitchableAttention:
    attention = SwitchableAttention(WIDTH, HEADS, grid)
    randomise(attention)
    return attention.eval()


def tokens(grid: tuple[int, int] = (4, 4), batch: int = 2) -> Tensor:
    return torch.randn(batch, math.prod(grid), WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("space", SPACES)
def test_absorbed_equals_plain(space: Space, grid: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    attention, x = mediator_attention(grid, space).to(dtype), tokens(grid).to(dtype)
    for mediators in LEVELS:
        assert relative_error(attention.absorbed(x, mediators), attention.plain(x, mediators)) < tolerance


@pytest.mark.parametrize("space", SPACES)
def test_a_low_rank_change_is_a_layer_with_changed_projections(space: Space) -> None:
    """Factored, in either form, it gives what copies of the projections with the change added to them give; it starts as the copies."""
    layer = switchable_attention().double()
    layer.requires_grad_(False)
    x = tokens().double()
    copied = layer.add_mediators(MediatorSettings(LEVELS, space))
    own = copied.state_dict()
    changed = layer.add_mediators(MediatorSettings(LEVELS, space, projection_rank=3))
    assert isinstance(changed.qkv, ChangedLinear)
    assert isinstance(changed.proj, ChangedLinear)
    levels = {name: value for name, value in own.items() if name.startswith("levels.")}
    changed.load_state_dict(levels, strict=False)
    for part in (copied, changed):
        part.requires_grad_(False)
    for mediators in LEVELS:
        assert relative_error(changed.absorbed(x, mediators), copied.absorbed(x, mediators)) < 1e-12
    for layer_part in (changed.qkv, changed.proj):
        layer_part.up.data = torch.randn(layer_part.up.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        layer_part.bias.data += 0.3
    copied.load_state_dict(
        own
        | {
            "qkv.weight": changed.qkv.weight,
            "qkv.bias": changed.qkv.bias,
            "proj.weight": changed.proj.weight,
            "proj.bias": changed.proj.bias,
        }
    )
    for mediators in LEVELS:
        for form in ("absorbed", "plain"):
            assert relative_error(getattr(changed, form)(x, mediators), copied.plain(x, mediators)) < 1e-12
    assert not any("pretrained" in name for name in changed.state_dict())
    assert relative_error(layer(x), layer(x, SOFTMAX)) == 0


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("space", SPACES)
def test_forward_is_either_form_plus_the_local_branch(space: Space, grid: tuple[int, int]) -> None:
    attention, x = mediator_attention(grid, space, local_rank=5), tokens(grid)
    assert attention.local is not None
    local = attention.local(x, grid)
    assert local.abs().max() > 0
    for mediators in LEVELS:
        for form in (attention.absorbed, attention.plain):
            assert relative_error(attention(x, mediators), form(x, mediators) + local) < 1e-5


def test_forward_runs_the_form_that_costs_less(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, x = mediator_attention(), tokens()
    monkeypatch.setattr(attention, "absorbed", lambda x, mediators, onto: "absorbed")
    monkeypatch.setattr(attention, "plain", lambda x, mediators: "plain")
    ran = [attention(x, mediators) for mediators in LEVELS]
    cheaper = [forms.absorbed_flops(16, WIDTH, HEADS, m) <= forms.plain_flops(16, WIDTH, HEADS, m) for m in LEVELS]
    assert ran == ["absorbed" if absorbed else "plain" for absorbed in cheaper]
    assert set(ran) == {"absorbed", "plain"}


@pytest.mark.parametrize("space", SPACES)
def test_levels_of_one_layer_are_different_functions(space: Space) -> None:
    attention, x = mediator_attention(space=space), tokens()
    outputs = [attention(x, mediators) for mediators in LEVELS]
    for index, output in enumerate(outputs):
        assert all(relative_error(output, other) > 1e-3 for other in outputs[:index])


def test_one_mediator_gives_every_token_the_same() -> None:
    output = mediator_attention()(tokens(), 1)
    torch.testing.assert_close(output, output[:, :1].expand_as(output))
    assert relative_error(output[0], output[1]) > 1e-3


@pytest.mark.parametrize("grid", [(4, 4), (3, 6)])
def test_a_mediator_per_token_and_sharp_queries_converge_to_softmax_attention(grid: tuple[int, int]) -> None:
    """With R = identity T is Q, S1 is softmax attention's own matrix, and S2 becomes the identity (design 2.2)."""
    count = math.prod(grid)
    layer = switchable_attention(grid).double()
    mediator = layer.add_mediators(MediatorSettings((count,)))
    layer.requires_grad_(False)
    x = tokens(grid).double()
    exact = layer(x)
    errors = []
    for sharpness in (1, 2, 4, 8, 16):
        mediator.level(count).log_query_scale.data.fill_(math.log(sharpness * (WIDTH // HEADS) ** -0.5))
        errors.append(float((layer(x, count) - exact).norm() / exact.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1
    assert errors[-1] < 1e-4


@pytest.mark.parametrize("grid", [(4, 4), (3, 6)])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("mediators", [4, 16])
def test_permuting_tokens_with_their_positions_permutes_the_output(space: Space, grid: tuple[int, int], mediators: int) -> None:
    attention, x = mediator_attention(grid, space), tokens(grid)
    expected = attention(x, mediators)
    order = torch.randperm(math.prod(grid), generator=torch.Generator().manual_seed(2))
    moved_alone = attention(x[:, order], mediators)
    level = attention.level(mediators)
    for positions in (level.pool, level.key_bias, level.query_bias):
        positions.data = positions.flatten(2)[..., order].view_as(positions)
    assert relative_error(attention(x[:, order], mediators), expected[:, order]) < 1e-5
    assert relative_error(moved_alone, expected[:, order]) > 1e-3


def test_local_branch_is_a_low_rank_convolution_of_the_token_grid() -> None:
    grid, rank = (3, 5), 4
    branch = LocalBranch(WIDTH, rank).requires_grad_(False)
    randomise(branch)
    x = tokens(grid)
    kernel = torch.einsum("or,ryx,ri->oiyx", branch.up.weight, branch.depthwise.weight.squeeze(1), branch.down.weight)
    image = x.mT.unflatten(2, grid)
    expected = F.conv2d(image, kernel, padding=1).flatten(2).mT
    assert relative_error(branch(x, grid), expected) < 1e-5


def test_local_branch_starts_as_zero() -> None:
    assert not LocalBranch(WIDTH, 4)(tokens(), (4, 4)).any()


# --- pooling ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mediators", "grid", "cells"),
    [
        (1, (8, 8), (1, 1)),
        (4, (8, 8), (2, 2)),
        (16, (8, 8), (4, 4)),
        (9, (12, 12), (3, 3)),
        (4, (4, 16), (1, 4)),
        (16, (4, 16), (2, 8)),
    ],
)
def test_grid_partition_is_average_pooling_where_cells_are_whole(mediators: int, grid: tuple[int, int], cells: tuple[int, int]) -> None:
    image = torch.randn(1, 3, *grid, generator=torch.Generator().manual_seed(0))
    expected = F.adaptive_avg_pool2d(image, cells).flatten(2).mT
    torch.testing.assert_close(grid_partition(mediators, grid) @ image.flatten(2).mT, expected)


@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (8, 8), (5, 12), (12, 5)])
def test_a_mediator_per_token_pools_by_the_identity(grid: tuple[int, int]) -> None:
    count = math.prod(grid)
    torch.testing.assert_close(grid_partition(count, grid), torch.eye(count))


@pytest.mark.parametrize("grid", [(8, 8), (5, 12), (12, 5), (16, 16)])
@pytest.mark.parametrize("mediators", [1, 2, 3, 4, 5, 7, 13, 16, 31, 60])
def test_grid_partition_cuts_the_grid_into_equal_areas(mediators: int, grid: tuple[int, int]) -> None:
    partition = grid_partition(mediators, grid)
    count = math.prod(grid)
    assert (partition >= 0).all()
    torch.testing.assert_close(partition.sum(1), torch.ones(mediators))
    torch.testing.assert_close(partition.sum(0), torch.full((count,), mediators / count))


def test_grid_partition_refuses_more_mediators_than_tokens() -> None:
    with pytest.raises(UserError, match=r"^61 mediators do not fit 60 tokens \(5x12\)\. Pass smaller --levels\.$"):
        grid_partition(61, (5, 12))


@pytest.mark.parametrize("grid", [(32, 32), (16, 32), (24, 48), (20, 18), (17, 40)])
@pytest.mark.parametrize("mediators", [1, 4, 7])
def test_interpolated_pooling_rows_still_sum_to_one(mediators: int, grid: tuple[int, int]) -> None:
    attention = mediator_attention(grid, levels=(mediators,)).double()
    level = attention.level(mediators)
    for pool in (grid_partition(mediators, (16, 16)).double().view(1, mediators, 16, 16).expand_as(level.pool), level.pool.abs()):
        level.pool.data = pool / pool.sum((2, 3), keepdim=True)
        rows = level.on_tokens(attention.grid)[0].sum(1)
        torch.testing.assert_close(rows, torch.ones_like(rows), rtol=1e-6, atol=1e-6)


def test_interpolated_position_terms_keep_a_plane() -> None:
    """Bilinear interpolation at token centres: a position term that is linear in the place stays so, away from the clamped rim."""
    grid = (32, 48)
    attention = mediator_attention(grid, levels=(4,))
    level = attention.level(4)
    rows, columns = torch.meshgrid((torch.arange(16) + 0.5) / 16, (torch.arange(16) + 0.5) / 16, indexing="ij")
    level.key_bias.data[:] = rows + 3 * columns
    level.query_bias.data[:] = 2 * rows - columns
    _, key_bias, query_bias = (maps.view(HEADS * 4, *grid)[:, 2:-2, 2:-2] for maps in level.on_tokens(attention.grid))
    fine_rows, fine_columns = torch.meshgrid((torch.arange(32) + 0.5) / 32, (torch.arange(48) + 0.5) / 48, indexing="ij")
    torch.testing.assert_close(key_bias, (fine_rows + 3 * fine_columns)[2:-2, 2:-2].expand_as(key_bias))
    torch.testing.assert_close(query_bias, (2 * fine_rows - fine_columns)[2:-2, 2:-2].expand_as(query_bias))


# --- switching -------------------------------------------------------------------------------------------------------------------


def test_softmax_level_is_timm_attention_bit_for_bit_before_and_after_conversion() -> None:
    layer = switchable_attention()
    original = Attention(WIDTH, num_heads=HEADS, qkv_bias=True).eval()
    original.load_state_dict(layer.state_dict())
    x = tokens()
    expected = original(x)
    assert torch.equal(layer(x), expected)
    randomise(layer.add_mediators(MediatorSettings((1, 4), local_rank=8)), seed=3)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x, "softmax"), expected)
    assert not torch.equal(layer(x, 4), expected)


def test_unknown_level_is_refused_with_the_levels_there_are() -> None:
    layer = switchable_attention()
    layer.add_mediators(MediatorSettings((1, 4)))
    with pytest.raises(UserError, match=r"^This model has no level 5\. It has 1, 4, softmax\.$"):
        layer(tokens(), 5)


def test_mediator_level_of_an_unconverted_layer_is_refused() -> None:
    with pytest.raises(UserError, match=r"^This model has no mediators, only level softmax\. Run `mediatorize convert` first\.$"):
        switchable_attention()(tokens(), 4)


def test_mediator_path_starts_as_a_copy_of_the_layers_own_projections() -> None:
    layer = switchable_attention().double()
    mediator = layer.add_mediators(MediatorSettings((4,)))
    for copy, own in ((mediator.qkv, layer.qkv), (mediator.proj, layer.proj)):
        for kind in ("weight", "bias"):
            assert torch.equal(getattr(copy, kind), getattr(own, kind))
    assert {parameter.dtype for parameter in mediator.parameters()} == {torch.float64}
    before = layer.qkv.weight.clone()
    mediator.qkv.weight.data.zero_()
    assert torch.equal(layer.qkv.weight, before)


@pytest.mark.parametrize("space", SPACES)
def test_gradients_reach_every_mediator_weight_and_no_softmax_weight(space: Space) -> None:
    layer = switchable_attention()
    mediator = layer.add_mediators(MediatorSettings((4,), space, local_rank=6))
    randomise(mediator, seed=3)
    output = layer(tokens(), 4)
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(4))).sum().backward()
    for name, parameter in mediator.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    assert mediator.qkv.weight.grad is not None
    assert all(part.any() for part in mediator.qkv.weight.grad.chunk(3))
    assert mediator.qkv.bias.grad is not None
    reached = [bool(part.any()) for part in mediator.qkv.bias.grad.chunk(3)]
    assert reached == ([True, False, True] if space == "queries" else [True, True, True])  # T.bk is constant along a row (design 2.1)
    assert all(parameter.grad is None for parameter in (*layer.qkv.parameters(), *layer.proj.parameters()))


@pytest.mark.parametrize("form", ["absorbed", "plain"])
def test_key_bias_of_the_projection_has_no_effect_in_query_space(form: str) -> None:
    attention, x = mediator_attention(), tokens()
    run = getattr(attention, form)
    before = run(x, 4)
    attention.qkv.bias.data[WIDTH : 2 * WIDTH] += 1
    assert torch.equal(run(x, 4), before)


@pytest.mark.parametrize(("tokens", "in_weight"), [(5, False), (6, True)])
def test_a_low_rank_change_is_added_to_the_weight_where_that_costs_no_more(tokens: int, in_weight: bool) -> None:
    """Of 8 inputs and 24 outputs: 192 numbers of a weight, or 32 for every token. The output is the same."""
    torch.manual_seed(0)
    layer = ChangedLinear(torch.nn.Linear(8, 24), 3)
    torch.nn.init.normal_(layer.down)
    torch.nn.init.normal_(layer.up)
    x = torch.randn(1, tokens, 8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        found = layer.without_bias(x)
    torch.testing.assert_close(found, x @ (layer.pretrained[0].weight + layer.up @ layer.down).T)
    assert change_in_weight(tokens, 8, 24) == in_weight
    change = 8 * 24 if in_weight else tokens * (8 + 24)
    assert counter.get_total_flops() == 2 * tokens * 8 * 24 + 2 * 3 * change


@pytest.mark.parametrize("name", ["DiT-S/2@256", "DiT-S/2@512", "DiT-XL/2@256", "DiT-XL/2@512"])
def test_the_published_order_with_a_low_rank_change_costs_what_is_stated(name: str) -> None:
    arch = preset(name)
    with torch.device("meta"):
        pretrained = torch.nn.Linear(arch.width, 3 * arch.width), torch.nn.Linear(arch.width, arch.width)
        layer = MediatorAttention(arch.width, arch.heads, arch.grid, MediatorSettings((64,), projection_rank=32), pretrained)
        with FlopCounterMode(display=False) as counter:
            layer.plain(torch.empty(1, arch.tokens, arch.width), 64)
    stated = plain_flops(arch.tokens, arch.width, arch.heads, 64) + plain_change_flops(arch.tokens, arch.width, 32)
    assert counter.get_total_flops() == stated + interpolation_flops(arch.grid, arch.heads, 64)
