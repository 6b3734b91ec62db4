"""Redundancy of attention: against numpy's SVD, at its two extremes, and as the command writes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model
from PIL import Image

from mediatorize import UserError
from mediatorize.compression.redundancy import Redundancy, attention_matrices, attention_redundancy, best_rank_error, effective_rank
from mediatorize.report import inspection
from mediatorize.report.inspection import facts, words
from mediatorize.stages.inspect import inspect


def test_measures_are_those_of_the_truncated_svd() -> None:
    matrix = np.random.default_rng(0).random((7, 7))
    u, s, v = np.linalg.svd(matrix)
    singular = torch.from_numpy(s)
    for rank in (1, 3, 7):
        best = (u[:, :rank] * s[:rank]) @ v[:rank]
        expected = np.linalg.norm(matrix - best) / np.linalg.norm(matrix)
        assert float(best_rank_error(singular, rank)) == pytest.approx(expected, abs=1e-9)
    shares = s / s.sum()
    assert float(effective_rank(singular)) == pytest.approx(float(np.exp(-(shares * np.log(shares)).sum())))


def test_no_mediator_attention_is_closer_than_the_bound() -> None:
    layer = tiny_model().attention_layers()[0]
    x = torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(0))
    attention = attention_matrices(layer, x)
    bound = best_rank_error(torch.linalg.svdvals(attention), 4)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        through = torch.randn(2, 3, 16, 4, generator=generator).softmax(-1) @ torch.randn(2, 3, 4, 16, generator=generator).softmax(-1)
        errors = (attention - through).norm(dim=(-2, -1)) / attention.norm(dim=(-2, -1))
        assert (errors >= bound).all()


def test_matrices_are_those_that_the_layer_attends_with() -> None:
    layer = tiny_model().attention_layers()[1]
    x = torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(0))
    values = layer.qkv(x).unflatten(2, (3, 3, 16))[:, :, 2].transpose(1, 2)
    mixed = (attention_matrices(layer, x) @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer.proj(mixed), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["sit", "dit"])
def test_attention_that_looks_nowhere_has_rank_one_and_that_which_looks_at_itself_has_all(family: str) -> None:
    model = tiny_model(family=family, heads=1)
    first, second, _ = model.attention_layers()
    for layer in (first, second):
        layer.qkv.weight.data[:96] = 0  # queries and keys
        layer.qkv.bias.data[:96] = 0
    second.qkv.weight.data[:48] = second.qkv.weight.data[48:96] = 30 * torch.eye(48)
    for parameter in model.layers()[1].adaLN_modulation.parameters():
        parameter.data.zero_()  # tokens come normalised, each most like itself
    calls = []
    found = attention_redundancy(model, (1, 4, 16, 64), calls=4, states_per_call=2, on_step=lambda: calls.append(1))
    assert len(calls) == 4 + 3
    assert found.states == 8
    assert len(found.noise_levels) == 4
    assert list(found.noise_levels) == sorted(found.noise_levels, reverse=True)
    assert list(found.errors) == [1, 4]  # 16 tokens: more mediators than 15 miss nothing
    assert found.effective_rank[0] == pytest.approx((1.0,) * 4, abs=1e-3)
    assert found.errors[1][0] == pytest.approx((0.0,) * 4, abs=1e-3)
    assert all(rank > 14 for rank in found.effective_rank[1])
    assert all(error > 0.8 for error in found.errors[4][1])
    assert all(0 <= four <= one <= 1 for one, four in zip(found.errors[1][2], found.errors[4][2], strict=True))
    again = attention_redundancy(model, (1, 4), calls=4, states_per_call=2)
    assert again.effective_rank == found.effective_rank


def test_inspect_writes_heat_maps_and_tables(official_file: Callable[..., Path], tmp_path: Path) -> None:
    source, picture = official_file(), tmp_path / "r.png"
    report = inspect(str(source), family="sit", num_heads=3, redundancy=picture, device="cpu")
    content = json.loads(json.dumps(facts(report)))["redundancy"]
    assert np.array(content["effective_rank"]).shape == (3, 10)
    assert set(content["errors"]) == {"1", "4"}
    assert set(content) == {"noise_levels", "states", "effective_rank", "effective_rank_of_heads", "errors"}
    by_head = np.array(content["effective_rank_of_heads"])
    assert by_head.shape == (3, 10, 3)
    assert np.allclose(by_head.mean(2), content["effective_rank"])
    assert by_head.std(2).max() > 0.01
    assert "effective rank" in words(report)
    assert f"Wrote {picture}." in words(report)
    with Image.open(picture) as image:
        assert image.width > image.height
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 50
    assert facts(inspect(str(source), family="sit", num_heads=3))["redundancy"] is None


@pytest.mark.parametrize(("ranks", "verdict"), [((2.0, 3.0, 5.0), "more redundant"), ((6.0, 4.0, 3.0), "less redundant")])
def test_inspect_says_whether_early_attention_is_the_more_redundant(ranks: tuple[float, ...], verdict: str) -> None:
    of_heads = tuple((rank - 1, rank + 1) for rank in ranks)
    found = Redundancy(noise_levels=(1.0, 0.5, 0.1), states=3, effective_rank_of_heads=(of_heads, of_heads), errors={})
    assert found.effective_rank == (ranks,) * 2
    assert found.early_and_late() == [(ranks[0], ranks[-1])] * 2
    told = inspection._redundancy(found, 16)
    assert f"Early attention is {verdict}" in told
    assert f"is {ranks[0]:.1f} in the noisy half of the calls and {ranks[-1]:.1f} in the other" in told
    assert f"smaller early in {2 if verdict.startswith('more') else 0} of 2 layers" in told


def test_what_has_no_weights_or_no_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no weights"):
        inspect("DiT-XL/2@256", redundancy=tmp_path / "r.png")
    with pytest.raises(UserError, match=r"not a \.png"):
        inspect("DiT-XL/2@256", redundancy=tmp_path / "r.jpg")
    assert not list(tmp_path.iterdir())
