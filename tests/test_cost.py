"""FLOPs in closed form: equal to torch's own count of what runs, and to the published tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from conftest import TINY
from torch.utils.flop_counter import FlopCounterMode

from mediatorize.model import cost, forms
from mediatorize.model.architecture import Architecture, default_local_rank, preset
from mediatorize.model.attention import MediatorAttention
from mediatorize.model.levels import Level, MediatorSettings
from mediatorize.model.transformer import DiffusionTransformer

SETTINGS = MediatorSettings((1, 4, 7, 16), local_rank=6, modulation_rank=5, mlp="own")
ALL_LEVELS: list[Level] = ["softmax", *SETTINGS.levels]
ABSORBED, PLAIN = 4, 16
"""Levels of `TINY` on either side of where the absorbed form stops paying."""

GMACS = {
    "S": (0.36, 1.41, 6.06, 1.43, 6.07, 31.44),
    "B": (1.42, 5.57, 23.01, 5.59, 23.03, 106.38),
    "L": (5.01, 19.70, 80.70, 19.73, 80.74, 360.98),
    "XL": (7.39, 29.04, 118.62, 29.09, 118.66, 524.54),
}
"""Published multiply-adds of one forward, in units of 1e9."""

COLUMNS = [(256, 8), (256, 4), (256, 2), (512, 8), (512, 4), (512, 2)]
"""Pixels and patch of each column of `GMACS`."""


def tiny(**changes: object) -> Architecture:
    return dataclasses.replace(TINY, **changes)  # type: ignore[arg-type]


def counted(
    arch: Architecture, levels: Level | Sequence[Level], settings: MediatorSettings | None = None, batch: int = 1
) -> FlopCounterMode:
    """torch's counter after one forward on the meta device."""
    with torch.device("meta"):
        model = DiffusionTransformer(arch, settings)
        inputs = torch.empty(batch, arch.channels, *arch.input_size), torch.empty(batch), torch.empty(batch, dtype=torch.long)
    counter = FlopCounterMode(display=False)
    with counter:
        model(*inputs, levels=levels)
    return counter


def test_both_forms_are_among_the_levels_under_test() -> None:
    absorbed = {m: forms.absorbed_is_cheaper(TINY.tokens, TINY.width, TINY.heads, m) for m in SETTINGS.levels}
    assert absorbed[ABSORBED]
    assert not absorbed[PLAIN]


@pytest.mark.parametrize("family", ["dit", "sit"])
@pytest.mark.parametrize("level", ALL_LEVELS)
def test_closed_form_equals_torchs_count_at_every_level(level: Level, family: str) -> None:
    arch = tiny(family=family)
    assert cost.forward_flops(arch, level, SETTINGS) == counted(arch, level, SETTINGS).get_total_flops()


@pytest.mark.parametrize("levels", [["softmax", ABSORBED, PLAIN], [PLAIN, 1, 1], [7, "softmax", "softmax"]])
def test_closed_form_equals_torchs_count_of_a_level_per_layer(levels: list[Level]) -> None:
    assert cost.forward_flops(TINY, levels, SETTINGS) == counted(TINY, levels, SETTINGS).get_total_flops()


@pytest.mark.parametrize(
    "changes",
    [
        {"grid": (3, 6)},
        {"grid": (20, 18)},
        {"patch": 1, "channels": 3},
        {"learn_sigma": False},
        {"mlp_width": 100},
        {"heads": 1},
        {"depth": 1},
        {"null_class": False},
    ],
)
@pytest.mark.parametrize("level", ["softmax", ABSORBED, PLAIN])
def test_closed_form_equals_torchs_count_at_other_sizes(level: Level, changes: dict[str, object]) -> None:
    arch = tiny(**changes)
    assert cost.forward_flops(arch, level, SETTINGS) == counted(arch, level, SETTINGS).get_total_flops()


@pytest.mark.parametrize("rank", [0, 1, 12])
@pytest.mark.parametrize("level", [ABSORBED, PLAIN])
def test_closed_form_counts_the_local_branch(level: Level, rank: int) -> None:
    settings = dataclasses.replace(SETTINGS, local_rank=rank)
    flops = cost.forward_flops(TINY, level, settings)
    assert flops == counted(TINY, level, settings).get_total_flops()
    bare = cost.forward_flops(TINY, level, dataclasses.replace(SETTINGS, local_rank=0))
    assert flops - bare == TINY.depth * forms.local_flops(TINY.tokens, TINY.width, rank)


def test_closed_form_is_of_one_sample() -> None:
    assert 3 * cost.forward_flops(TINY, ABSORBED, SETTINGS) == counted(TINY, ABSORBED, SETTINGS, batch=3).get_total_flops()


@pytest.mark.parametrize("levels", ["softmax", ABSORBED, ["softmax", ABSORBED, PLAIN]])
def test_every_part_equals_torchs_count_of_its_modules(levels: Level | list[Level]) -> None:
    counts = counted(TINY, levels, SETTINGS).get_flop_counts()

    def of(*modules: str) -> int:
        return sum(sum(counts.get(f"DiffusionTransformer.{module}", {}).values()) for module in modules)

    blocks = [f"blocks.{index}" for index in range(TINY.depth)]
    last = "final_layer.adaLN_modulation"
    assert cost.forward_flops_by_part(TINY, levels, SETTINGS) == {
        "patch embedding": of("x_embedder"),
        "timestep embedding": of("t_embedder"),
        "attention": of(*(f"{block}.attn" for block in blocks)),
        "mlp": of(*(f"{block}.{part}" for block in blocks for part in ("mlp", "mediator.mlp"))),
        "modulation": of(*(f"{block}.adaLN_modulation" for block in blocks), *(f"{block}.mediator.modulation" for block in blocks), last),
        "last layer": of("final_layer.linear"),
    }


@pytest.mark.parametrize("name", ["SiT-S/2@256", "DiT-XL/2@512"])
@pytest.mark.parametrize("level", ["softmax", 4, 256])
def test_closed_form_equals_torchs_count_at_published_sizes(name: str, level: Level) -> None:
    arch = dataclasses.replace(preset(name), depth=1)
    settings = MediatorSettings((4, 256), local_rank=default_local_rank(arch.width))
    assert cost.forward_flops(arch, level, settings) == counted(arch, level, settings).get_total_flops()


@pytest.mark.parametrize("family", ["DiT", "SiT"])
@pytest.mark.parametrize("size", GMACS)
def test_published_multiply_adds_are_half_the_flops(size: str, family: str) -> None:
    ours = [cost.forward_flops(preset(f"{family}-{size}/{patch}@{pixels}")) / 2e9 for pixels, patch in COLUMNS]
    assert ours == pytest.approx(GMACS[size], abs=0.0051)  # the tables are rounded to a hundredth


@pytest.mark.parametrize("name", ["DiT-S/2@256", "DiT-XL/2@256", "DiT-XL/2@512", "DiT-B/4@512"])
def test_a_level_costs_the_cheaper_of_its_two_forms(name: str) -> None:
    """Both forms are counted by torch as they run; the level's closed form is the smaller count, and the form that runs is that one."""
    arch = preset(name)
    cheaper = set()
    for mediators in (1, 2, 16, 64, 65, 72, 100, 256):
        with torch.device("meta"):
            layer = MediatorAttention(arch.width, arch.heads, arch.grid, MediatorSettings((mediators,)))
            x = torch.empty(1, arch.tokens, arch.width)
        counts = {}
        for form in (layer.absorbed, layer.plain, layer):
            with FlopCounterMode(display=False) as counter:
                form(x, mediators)
            counts[form] = counter.get_total_flops()
        assert cost.attention_flops(arch, mediators) == counts[layer] == min(counts.values())
        cheaper.add(counts[layer.absorbed] < counts[layer.plain])
    assert cheaper == {True, False}


@pytest.mark.parametrize(("mediators", "saved"), [(4, 0.32), (16, 0.23)])
def test_absorption_saves_of_an_xl_what_the_design_says(mediators: int, saved: float) -> None:
    arch = preset("DiT-XL/2@256")
    settings = MediatorSettings((4, 16), local_rank=64)
    assert 1 - cost.forward_flops(arch, mediators, settings) / cost.forward_flops(arch) == pytest.approx(saved, abs=0.005)


@pytest.mark.parametrize(
    ("name", "share"), [("SiT-XL/2@256", 0.036), ("SiT-XL/2@512", 0.129), ("SiT-S/2@256", 0.10), ("SiT-S/2@512", 0.31)]
)
def test_the_published_form_saves_less_than_the_two_token_by_token_products(name: str, share: float) -> None:
    arch = preset(name)
    whole = cost.forward_flops(arch)
    plain = forms.plain_flops(arch.tokens, arch.width, arch.heads, 1)
    saved = arch.depth * (forms.softmax_flops(arch.tokens, arch.width) - plain)
    ceiling = arch.depth * 4 * arch.tokens**2 * arch.width
    assert ceiling / whole == pytest.approx(share, abs=0.006)
    assert 0.9 * ceiling < saved < ceiling


@pytest.mark.parametrize(
    "settings",
    [
        None,
        MediatorSettings((4,)),
        MediatorSettings((1, 4, 16), local_rank=6),
        MediatorSettings((1,), modulation_rank=5),
        MediatorSettings((1, 2), local_rank=3, modulation_rank=2, mlp="own"),
    ],
)
@pytest.mark.parametrize("changes", [{}, {"grid": (20, 18)}, {"null_class": False, "learn_sigma": False}, {"mlp_width": 100, "depth": 1}])
def test_parameters_in_closed_form_are_those_of_the_model(changes: dict[str, object], settings: MediatorSettings | None) -> None:
    arch = tiny(**changes)
    with torch.device("meta"):
        model = DiffusionTransformer(arch, settings)
    assert cost.count_parameters(arch, settings) == sum(parameter.numel() for parameter in model.parameters())
    added = cost.added_parameters(arch, settings) if settings else 0
    assert added == sum(parameter.numel() for parameter in model.mediator_parameters().values())
