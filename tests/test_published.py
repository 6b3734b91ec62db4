"""The published form of arXiv 2408.05710: files of LeapLabTHU/Attention-Mediators, read and written, against what the original code gave.

`golden/mediators.safetensors` holds small SiTs with 4, 16 and 64 mediators and random weights, made by the original code, and its outputs.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import relative_error
from safetensors import safe_open
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mediatorize
from mediatorize.errors import UserError
from mediatorize.formats.checkpoint import open_checkpoint
from mediatorize.model.cost import count_parameters, forward_flops

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
