"""The published form of arXiv 2408.05710: files of LeapLabTHU/Attention-Mediators, read and written, against what the original code gave.

`golden/mediators.safetensors` holds small SiTs with 4, 16 and 64 mediators and random weights, made by the original code, and its outputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import model_inputs, randomise, relative_error
from safetensors import safe_open
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mediatorize
from mediatorize.errors import UserError
from mediatorize.formats import bundle
from mediatorize.formats.checkpoint import open_checkpoint
from mediatorize.model.cost import count_parameters, forward_flops
from mediatorize.model.levels import SOFTMAX
from mediatorize.report import conversion, inspection
from mediatorize.stages.calibrate import calibrate
from mediatorize.stages.convert import convert
from mediatorize.stages.evaluate import evaluate
from mediatorize.stages.export import export
from mediatorize.stages.inspect import inspect
from mediatorize.stages.sample import sample

GOLDEN = Path(__file__).parent / "golden" / "mediators.safetensors"


def stored(prefix: str) -> dict[str, Tensor]:
    """Tensors of the golden file whose names begin so, without it."""
    with safe_open(GOLDEN, "pt") as file:
        return {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118


def original_file(path: Path, mediators: int, nested: bool = False) -> Path:
    """A checkpoint as the original code saves it, flat or from training."""
    state = stored(f"model.{mediators}.")
    torch.save({"model": state, "ema": state, "opt": {}} if nested else state, path)
    return path


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "from training"])
@pytest.mark.parametrize("mediators", [4, 16, 64])
def test_a_file_of_the_original_gives_its_outputs(mediators: int, nested: bool, tmp_path: Path) -> None:
    model = mediatorize.load_model(original_file(tmp_path / "model.pt", mediators, nested))
    given = stored("")
    with torch.no_grad():
        found = model(given["x"], given["t"], given["y"])
        again = model(given["x"], given["t"], given["y"])
    assert relative_error(found, given[f"out.{mediators}"]) < 1e-5
    assert torch.equal(found, again)
    assert (model.arch.mediators, model.arch.heads, model.arch.family) == (mediators, 3, "sit")


def test_its_cost_and_its_parameters_are_counted(tmp_path: Path) -> None:
    model = mediatorize.load_model(original_file(tmp_path / "model.pt", 16))
    given = stored("")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(given["x"][:1], given["t"][:1], given["y"][:1])
    assert counter.get_total_flops() == forward_flops(model.arch)
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(model.arch)


def test_a_changed_weight_changes_the_position_terms(tmp_path: Path) -> None:
    model = mediatorize.load_model(original_file(tmp_path / "model.pt", 4))
    given = stored("")
    with torch.no_grad():
        before = model(given["x"], given["t"], given["y"])
        for block in model.layers():
            assert block.attn.published is not None
            block.attn.published.count(4).ah_bias.add_(torch.linspace(0, 1, 10).view(10, 1))
        changed = model(given["x"], given["t"], given["y"])
        state = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict({name: value + (0.1 if "na_bias" in name else 0.0) * torch.rand_like(value) for name, value in state.items()})
        other = model(given["x"], given["t"], given["y"])
        model.load_state_dict(state)
        assert torch.equal(model(given["x"], given["t"], given["y"]), changed)
    assert relative_error(changed, before) > 1e-3
    assert relative_error(other, changed) > 1e-5


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    def refused(changes: dict[str, Tensor], match: str, **hints: object) -> None:
        torch.save(stored("model.16.") | changes, tmp_path / "damaged.pt")
        with pytest.raises(UserError, match=match):
            mediatorize.load_model(tmp_path / "damaged.pt", **hints)  # type: ignore[arg-type]

    refused({"blocks.0.attn.an_bias": torch.zeros(3, 5, 7, 7)}, "5 mediators")
    refused({"blocks.1.attn.na_bias": torch.zeros(3, 4, 7, 7)}, r"na_bias is \[3, 4, 7, 7\] where SiT-2x24/2 needs \[3, 16, 7, 7\]")
    refused({"blocks.0.attn.an_bias": torch.zeros(3, 16, 49)}, "needs 4 axes")
    refused({}, "is a SiT", family="dit")
    refused({}, "are of 3 heads", num_heads=6)
    assert open_checkpoint(original_file(tmp_path / "good.pt", 16)).format == "Attention-Mediators SiT"


# --- converting and writing ----------------------------------------------------------------------------------------------------


QUICK: dict[str, Any] = {"states": 48, "trajectories": 4, "batch": 8, "sampler_steps": 4, "num_heads": 3, "cfg_scale": 1.0}


def names_of(state: dict[str, Tensor]) -> set[str]:
    """Parameter names, those of all blocks as one."""
    return {re.sub(r"blocks\.\d+\.", "", name) for name in state}


@pytest.mark.parametrize("mlp", ["own", "shared"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_conversion_in_the_published_form_is_written_for_the_original(
    mlp: Any, rank: int, official_file: Callable[..., Path], tmp_path: Path
) -> None:
    result = convert(
        str(official_file()),
        tmp_path / "out",
        levels=(1, 4),
        form="published",
        mlp=mlp,
        projection_rank=rank,
        family="sit",
        fit_steps=150,
        **QUICK,
    )
    for errors in result.errors:
        assert all(errors.after[level] < errors.before[level] for level in (1, 4))
    assert "as the paper has them" in conversion.words(result)
    model = mediatorize.load_model(tmp_path / "out")
    randomise(model, seed=5)  # as training may leave it
    bundle.write_bundle(tmp_path / "out", model, bundle.read_config(tmp_path / "out"), "")
    export(tmp_path / "out", tmp_path / "four", to="attention-mediators", level=4)
    state = torch.load(tmp_path / "four" / "model.pt", weights_only=True)
    assert names_of(state) == names_of(stored("model.4."))
    assert {name: value.ndim for name, value in state.items() if "_bias" in name} == {
        name: stored("model.4.")[re.sub(r"blocks\.\d", "blocks.0", name)].ndim for name in state if "_bias" in name
    }
    alone, (x, t, y) = mediatorize.load_model(tmp_path / "four" / "model.pt"), model_inputs(model)
    assert alone.arch.mediators == 4
    with torch.no_grad():
        assert relative_error(alone(x, t, y), model(x, t, y, levels=4)) < 1e-5
        assert relative_error(alone(x, t, y), model(x, t, y, levels=1)) > 1e-2


def test_what_the_paper_cannot_hold_is_refused(official_file: Callable[..., Path], tmp_path: Path) -> None:
    source = str(official_file())
    for options, match in (
        ({"levels": (5,)}, "5 mediators are no square"),
        ({"init": "cluster-keys"}, "--init cluster-keys says nothing"),
        ({"mediators_from": "keys"}, "come from queries"),
        ({"local_rank": 8}, "a convolution in place"),
    ):
        with pytest.raises(UserError, match=match):
            convert(source, tmp_path / "out", form="published", family="sit", fit_steps=0, **(QUICK | options))  # type: ignore[arg-type]
    convert(source, tmp_path / "learned", levels=(4,), family="sit", fit_steps=0, **QUICK)
    convert(source, tmp_path / "published", levels=(1,), form="published", family="sit", fit_steps=0, **QUICK)
    for name, level, match in (
        ("learned", 4, "not in the published form"),
        ("published", None, "Pass --level 1"),
        ("published", SOFTMAX, "Export to official"),
    ):
        with pytest.raises(UserError, match=match):
            export(tmp_path / name, tmp_path / "written", to="attention-mediators", level=level)
    dit = official_file("dit.pt", family="dit")
    convert(str(dit), tmp_path / "dit", levels=(1,), form="published", fit_steps=0, family="dit", **QUICK)
    with pytest.raises(UserError, match="runs SiTs"):
        export(tmp_path / "dit", tmp_path / "written", to="attention-mediators", level=1)


def test_a_checkpoint_of_the_paper_goes_through_every_command(tmp_path: Path) -> None:
    """Its own attention is what level softmax stands for: the model that others are compared with."""
    source, out = original_file(tmp_path / "model.pt", 16), tmp_path / "out"
    assert "16 mediators per head" in inspection.words(inspect(str(source)))
    convert(str(source), out, levels=(1,), fit_steps=20, **(QUICK | {"num_heads": None}))
    given, model = stored(""), mediatorize.load_model(out)
    with torch.no_grad():
        assert relative_error(model(given["x"], given["t"], given["y"]), given["out.16"]) < 1e-5
    calibrate(out, budget=0.6, steps=6, trajectories=4, verify=4, batch=4, device="cpu")
    drawn = sample(str(out), out=tmp_path / "drawn.npz", classes=(1, 2), per_class=2, device="cpu", steps=6)
    assert drawn.flops <= 0.6 * 4 * 6 * forward_flops(model.arch)
    found = evaluate(str(out), tmp_path / "report", features="none", samples=4, steps=6, device="cpu", pairs=0)
    assert [row.level for row in found.comparison.results][:2] == [SOFTMAX, "schedule"]
    export(out, tmp_path / "diffusers", to="diffusers")
    export(out, tmp_path / "original", to="attention-mediators")
    state = torch.load(tmp_path / "original" / "model.pt", weights_only=True)
    assert all(torch.equal(value, state[name]) for name, value in stored("model.16.").items())
    with pytest.raises(UserError, match="attention-mediators"):
        export(out, tmp_path / "official", to="official")
