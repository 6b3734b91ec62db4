"""Kinds of level: the table's own promises, and a new kind, registered from this file alone, goes through the whole tool."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import model_inputs, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from mediatorize import Schedule, UserError, load_model, sample
from mediatorize.cli import app
from mediatorize.model import cost
from mediatorize.model.attention import MediatorAttention
from mediatorize.model.levels import (
    KINDS,
    Kind,
    MediatorSettings,
    Parts,
    changes_modulation,
    holds,
    in_full,
    in_order,
    is_level,
    is_pretrained,
    kind_of,
    mlp_share,
    most_mediators,
    parts_of,
    read_level,
    refuse_lacking,
    title,
)

TEACHER = Path(__file__).parent.parent / "recipes" / "digits" / "sit.safetensors"
QUICK = ["--device", "cpu", "--batch", 16]


class Mean(nn.Module):
    """Every token gets the mean of all values, times a number that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, layer: MediatorAttention) -> Tensor:
        """(b, n, c) -> (b, n, c)"""
        width = x.shape[2]
        value = F.linear(x.mean(1, keepdim=True), layer.qkv.weight[2 * width :], layer.qkv.bias[2 * width :])
        return (self.scale * layer.proj(value)).expand_as(x)


@pytest.fixture
def mean() -> Iterator[None]:
    """A level that has no mediators at all."""
    KINDS["mean"] = Kind(
        looks="mean",
        read=lambda value: "mean" if value == "mean" else None,
        rank=lambda level: 0.5,
        title=lambda level: "mean of values",
        flops=lambda arch, level, settings: 4 * arch.width**2,
        parameters=lambda arch, level, settings: 1,
        module=lambda level, width, heads, grid, settings: Mean(),
    )
    yield
    del KINDS["mean"]


def mediatorize(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stdout


def told(*arguments: object) -> dict[str, Any]:
    return json.loads(mediatorize(*arguments, "--json"))


@pytest.mark.parametrize(
    ("written", "level"),
    [
        ("softmax", "softmax"),
        ("4", 4),
        (4, 4),
        ("16", 16),
        ("softmax|full", "softmax"),
        ("4|own", 4),
        ("softmax|1/8", "softmax|1/8"),
        ("4|full", "4|full"),
        ("hold+4|full", "hold+4|full"),
        ("hold+04|1/8", "hold+4|1/8"),
        ("hold+4|own", "hold+4|own"),
        ("4|1/8", "4|1/8"),
        ("softmax|own", "softmax|own"),
        ("04|1/8", "4|1/8"),
        ("1/8|full", None),
        *((forecast, None) for forecast in ("hold", "linear", "quadratic", "linear+4|full", "hold+4|hold", "softmax|linear", "hold|full")),
        *((bad, None) for bad in ("0", "-1", "4.0", "", 0, True, None)),
        *((bad, None) for bad in ("4|4", "1/8", "4|1/1", "4|1/0", "4|", "|1/8", "4|1/8|1/8", "softmax|1/-8", "full|softmax")),
        *((bad, None) for bad in ("hold+4", "4+hold|1/8", "hold+|full", "hold+softmax|full", "hold+hold+4|full", "hold+4|", "hold+0|full")),
    ],
)
def test_levels_are_read_as_they_are_written(written: object, level: object) -> None:
    if level is None:
        looks = "is no level. Levels are softmax, a count of mediators or an attention with an MLP (softmax|1/8 or hold+4|full)."
        with pytest.raises(UserError, match=re.escape(looks)):
            read_level(written)
    else:
        assert read_level(written) == level
        assert read_level(json.loads(json.dumps(level))) == level


@pytest.mark.parametrize("level", ["04", "hold+04|full", "softmax|full", "4|own", True])
def test_only_one_way_of_writing_a_level_is_a_level(level: Any) -> None:
    assert not is_level(level)
    if level is not True:
        with pytest.raises(UserError, match="is no level"):
            kind_of(level)


@pytest.mark.parametrize(
    ("level", "attention", "mlp", "held", "full"),
    [
        ("softmax", "softmax", "full", False, "softmax"),
        (4, 4, "own", False, 4),
        ("4|full", 4, "full", False, "4|full"),
        ("softmax|1/8", "softmax", "1/8", False, "softmax|1/8"),
        ("hold+4|full", 4, "full", True, "softmax"),
        ("hold+16|1/8", 16, "1/8", True, "softmax|1/8"),
        ("hold+4|own", 4, "own", True, "softmax|own"),
    ],
)
def test_a_level_says_how_attention_and_mlp_run(level: Any, attention: Any, mlp: str, held: bool, full: Any) -> None:
    parts = parts_of(level)
    assert parts == Parts(attention, mlp, held)
    assert parts.level == level
    assert is_level(level)
    assert holds(level) == held
    assert in_full(level) == full
    assert changes_modulation(level) == (attention != "softmax" and not held)


def test_a_level_lacks_what_its_model_does_not_have() -> None:
    settings = MediatorSettings((1, 4), mlp_widths=(8,))
    for level in (4, "softmax", "softmax|1/8", "4|full", "hold+4|full", "hold+1|1/8", "softmax|own"):
        refuse_lacking([level], settings)
    lacking = {16: 16, "16|1/8": 16, "4|1/4": "1/4", "hold+2|full": 2, "hold+4|1/2": "1/2", "2|1/4": 2}
    for level, what in lacking.items():
        with pytest.raises(UserError, match=rf"^Layer 0 has no level {what}\. It has 1, 4, softmax, 1/8\.$"):
            refuse_lacking([level], settings)
    only_mediators = replace(settings, kept=((4, "full"),))
    refuse_lacking(["4|full"], only_mediators)
    with pytest.raises(UserError, match=r"^Layer 0 has no level softmax\."):  # whose rest is held
        refuse_lacking(["hold+4|full"], only_mediators)
    assert [mlp_share(level) for level in ("full", "own", "1/8", "1/16")] == [1, 1, 8, 16]


def test_levels_are_ranked_from_the_fewest_mediators_to_softmax() -> None:
    assert in_order(["softmax", 16, 1, 4, 4]) == [1, 4, 16, "softmax"]
    assert in_order(["softmax", 1, "softmax|1/8", "4|1/8", "1|1/8"]) == ["1|1/8", "4|1/8", "softmax|1/8", 1, "softmax"]
    assert in_order(["hold+4|full", "4|full", "softmax", "hold+1|full"]) == ["4|full", "hold+1|full", "hold+4|full", "softmax"]
    narrow = [f"{attention}|1/{width}" for attention in (1, "softmax") for width in (16, 8, 4, 2)]
    assert in_order(reversed(narrow)) == narrow  # of equal rank but for the MLP: not by the hashes of their names, which processes draw
    assert MediatorSettings((1, 4)).all_levels == (1, 4, "softmax")
    assert [is_pretrained(level) for level in (1, 256, "softmax")] == [False, False, True]
    assert most_mediators((1, 64, "softmax")) == 64
    assert [title(level) for level in (4, "softmax")] == ["m=4", "softmax"]


@pytest.mark.parametrize("hash_seed", ["1", "2", "3", "4"])
def test_levels_of_equal_rank_stand_in_the_same_order_in_every_process(hash_seed: str) -> None:
    """A table of errors is kept on disk in this order, and read by another process."""
    levels = ["softmax|1/8", "1|1/4", "softmax|1/4", "1|1/8"]
    code = f"from mediatorize.model.levels import in_order; print(in_order({levels}))"
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
    assert told.strip() == "['1|1/8', '1|1/4', 'softmax|1/8', 'softmax|1/4']"


@pytest.mark.parametrize("levels", [(4, 1), (1, 1), (), (1, "softmax"), (0, 1), ("mean",), ("hold+4|full",), ("4|1/8",)])
def test_settings_hold_added_levels_in_order_and_no_others(levels: Any) -> None:
    with pytest.raises(UserError, match="not distinct, ascending"):
        MediatorSettings(levels)


@pytest.mark.parametrize("widths", [(4, 8), (8, 8), (1,), (0,), (8, -4)])
def test_settings_hold_shares_of_mlps_in_order_and_no_others(widths: Any) -> None:
    assert MediatorSettings((1,), mlp_widths=(8, 4)).mlp_levels == ("1/8", "1/4")
    with pytest.raises(UserError, match="not distinct, descending shares of at least 2"):
        MediatorSettings((1,), mlp_widths=widths)


def test_settings_come_back_from_json() -> None:
    settings = MediatorSettings((1, 4), space="keys", local_rank=3, modulation_rank=2, mlp="own", mlp_widths=(8, 4))
    assert MediatorSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    before = {"levels": [1, 4], "space": "queries", "local_rank": 0, "modulation_rank": 0, "mlp": "shared"}  # without narrow MLPs
    assert MediatorSettings.from_json(before) == MediatorSettings((1, 4))


def test_a_new_kind_costs_what_its_entry_says(mean: None) -> None:
    settings = MediatorSettings(("mean", 4))
    model = tiny_model(settings)
    x, t, y = model_inputs(model, batch=1)
    with FlopCounterMode(display=False) as counter:
        model(x, t, y, levels=["mean", 4, "mean"])
    assert counter.get_total_flops() == cost.forward_flops(model.arch, ["mean", 4, "mean"], settings)
    assert cost.added_parameters(model.arch, settings) == sum(p.numel() for p in model.mediator_parameters().values())


def test_a_new_kind_goes_through_the_whole_tool(mean: None, tmp_path: Path) -> None:
    """inspect, convert, sample, finetune, calibrate, evaluate and export, as a user runs them; only this file knows of the kind."""
    bundle = tmp_path / "bundle"
    fit = ["--states", 64, "--trajectories", 8, "--fit-steps", 4, "--sampler-steps", 4, "--cfg-scale", 1]
    converted = told("convert", TEACHER, bundle, "--levels", "4,mean", *fit, *QUICK)
    assert [set(errors["after"]) for errors in converted["layer_errors"]] == [{"mean", "4", "1/8", "1/4"}] * 6
    model = load_model(bundle)
    assert model.added().levels == ("mean", 4)

    inspected = told("inspect", bundle)
    reachable = next(row for row in inspected["reachable"] if row["input_size"] == [16, 16])
    assert reachable["relative"]["mean"] == cost.forward_flops(model.arch, "mean", model.settings) / cost.forward_flops(model.arch)
    assert "mean of values" in mediatorize("inspect", bundle)

    mediatorize("sample", bundle, "--out", tmp_path / "mean.png", "--level", "mean", "--steps", 4, "--device", "cpu")
    assert not torch.equal(sample(model, [1], steps=4, schedule="mean"), sample(model, [1], steps=4, schedule="softmax"))

    train = ["--train-steps", 4, "--trajectories", 4, "--sampler-steps", 4, "--cfg-scales", 1]
    trained = told("finetune", bundle, *train, *QUICK)
    assert trained["before"].keys() == trained["after"].keys() == {"mean", "4"}

    calibrated = told(
        "calibrate", bundle, "--budget", 0.7, "--kinds", "mediators", "--steps", 4, "--trajectories", 4, "--verify", 4, *QUICK
    )
    assert calibrated["schedules"][0]["relative_cost"] <= 0.7
    schedule = Schedule.from_json(json.loads((bundle / "schedule.json").read_text()))
    assert "mean" in schedule.used  # at 4 mediators throughout it would cost more

    judged = told("evaluate", bundle, tmp_path / "report", "--samples", 40, "--steps", 4, "--pairs", 0, *QUICK)
    assert [row["level"] for row in judged["results"]] == ["softmax", "schedule", "4", "mean"]
    assert "mean of values" in (tmp_path / "report" / "report.md").read_text()

    exported = told("export", bundle, tmp_path / "weights", "--to", "safetensors")
    assert "level mean" in exported["differences"]
