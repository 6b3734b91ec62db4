"""What CONTRIBUTING promises: each table takes the smallest real example, registered from this file alone, and the tool uses it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch
import typer
from conftest import official_state, tiny_model
from torch import Tensor

from mediatorize import UserError, load_model, sample
from mediatorize.compression import costs
from mediatorize.compression.costs import CallCosts
from mediatorize.compression.initialise import INITIALISERS
from mediatorize.diffusion import process, solvers
from mediatorize.diffusion.process import LinearFlow
from mediatorize.diffusion.sampling import Sampler
from mediatorize.diffusion.solvers import Solver
from mediatorize.evaluation.features import Extractor
from mediatorize.formats import checkpoint, data, judges
from mediatorize.formats.checkpoint import Format, Source
from mediatorize.formats.data import Layout, Shape
from mediatorize.model import architecture
from mediatorize.model.levels import SOFTMAX
from mediatorize.stages.calibrate import calibrate
from mediatorize.stages.convert import convert
from mediatorize.stages.evaluate import evaluate
from mediatorize.stages.options import WHAT, option
from mediatorize.stages.recipes import read_recipe
from mediatorize.stages.run import run
from mediatorize.stages.table import STAGES, Stage

TEACHER = Path(__file__).parent.parent / "recipes" / "digits" / "sit.safetensors"
QUICK: dict[str, Any] = {
    "levels": (1, 4),
    "states": 64,
    "trajectories": 8,
    "sampler_steps": 4,
    "cfg_scale": 1.0,
    "device": "cpu",
}


@pytest.fixture
def register() -> Iterator[Callable[[dict[str, Any], str, Any], None]]:
    """Puts an entry into a table for the length of a test."""
    entries: list[tuple[dict[str, Any], str]] = []

    def put(table: dict[str, Any], name: str, entry: Any) -> None:
        table[name] = entry
        entries.append((table, name))

    yield put
    for table, name in entries:
        del table[name]


Register = Callable[[dict[str, Any], str, Any], None]


def test_a_checkpoint_format(register: Register, tmp_path: Path) -> None:
    """Every official name behind `net/`."""

    def opened(name: str, source: Source, hints: checkpoint.Hints) -> checkpoint.Checkpoint:
        bare = {key.removeprefix("net/"): value for key, value in source.tensors.items()}
        return checkpoint.FORMATS["official"].open(name, Source(source.path, bare, source.facts, source.part), hints)

    register(checkpoint.FORMATS, "net", Format(lambda source: all(key.startswith("net/") for key in source.tensors), opened))
    state = official_state(tiny_model())
    torch.save({f"net/{name}": value for name, value in state.items()}, tmp_path / "model.pt")
    model = load_model(tmp_path / "model.pt", family="sit", num_heads=3)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_an_initialiser(register: Register, tmp_path: Path) -> None:
    """Every mediator is one token, the m-th."""

    def single_tokens(layer: Any, inputs: Tensor, mediators: int, seed: int) -> Tensor:
        rows, columns = layer.grid
        one = torch.eye(rows * columns)[:mediators].view(1, mediators, rows, columns)
        return one.repeat(layer.num_heads, 1, 1, 1)

    register(INITIALISERS, "tokens", single_tokens)
    convert(str(TEACHER), tmp_path / "bundle", init="tokens", fit_steps=0, **QUICK)
    pool = load_model(tmp_path / "bundle").attention_layers()[0].mediated().count(4).pool
    assert torch.equal(pool[0].flatten(1), torch.eye(64)[:4])


def test_a_solver(register: Register) -> None:
    """The midpoint method: second order, two calls a step."""

    def midpoint(predict: Any, x: Tensor, steps: int, draw: Any) -> Tensor:
        for step in range(steps):
            middle = x + predict(x, step / steps) / steps / 2
            x = x + predict(middle, (step + 0.5) / steps) / steps
        return x

    register(solvers.SOLVERS, "midpoint", Solver(midpoint, "flow", 10))
    model = tiny_model(depth=1)
    assert Sampler.resolve(model.arch, solver="midpoint").times() == pytest.approx([place / 20 for place in range(20)])
    exact = sample(model, [1, 2], solver="heun", steps=400)
    errors = [float((sample(model, [1, 2], solver="midpoint", steps=steps) - exact).norm()) for steps in (10, 20, 40)]
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert orders == pytest.approx([2, 2], abs=0.3)
    with pytest.raises(UserError, match="midpoint"):
        sample(tiny_model(family="dit", depth=1), [1], solver="midpoint")


def test_a_family(register: Register) -> None:
    """A flow whose time runs the other way, by its entries alone, samples as REPA's SiT does by its flag."""
    register(architecture.FAMILIES, "backwards", architecture.FamilyFacts("Backwards", keeps_variance=False))  # type: ignore[arg-type]
    register(process.PROCESSES, "backwards", lambda arch: LinearFlow(reversed_time=True))  # type: ignore[arg-type]
    model, known = tiny_model(family="backwards"), tiny_model(family="sit", reversed_time=True)
    assert model.arch.name == "Backwards-3x48/2"
    assert torch.equal(sample(model, [1, 2], steps=3), sample(known, [1, 2], steps=3))


def test_a_cost(register: Register, tmp_path: Path) -> None:
    """Layers that run at softmax, over all calls."""

    def softmax_layers(model: Any, settings: Any, rows: int, batch: int) -> CallCosts:
        return CallCosts(rest=0, block=lambda level: int(level == SOFTMAX), attention=lambda level: 0)

    register(costs.COSTS, "layers", costs.Unit("softmax layers", softmax_layers, prefix="layers-"))
    convert(str(TEACHER), tmp_path / "bundle", fit_steps=0, **QUICK)
    calibrate(tmp_path / "bundle", budget=0.5, kinds=("mediators",), cost="layers", steps=4, trajectories=4, verify=4, device="cpu")
    assert (tmp_path / "bundle" / "schedules" / "layers-0.50.json").exists()
    model = load_model(tmp_path / "bundle")
    calls = Sampler.resolve(model.arch, steps=4).calls(model.arch, model.schedule, model.settings)
    assert sum(level == SOFTMAX for levels in calls for level in levels) <= 4 * 6 // 2


def test_a_data_layout(register: Register, tmp_path: Path) -> None:
    """One `.raw` file of float32 pictures, all of class 3."""

    @dataclass(frozen=True)
    class RawItems:
        shape: tuple[int, ...]
        path: Path
        pictures: Tensor

        def __len__(self) -> int:
            return len(self.pictures)

        def name(self, index: int) -> str:
            return f"{self.path}: picture {index}"

        def stored(self, index: int) -> tuple[Tensor, int]:
            return self.pictures[index], 3

        def clean(self, stored: Tensor, generator: torch.Generator) -> Tensor:
            return stored

    def opened(path: Path, shape: Shape, classes: int) -> RawItems:
        return RawItems(shape, path, torch.from_numpy(np.fromfile(path, dtype=np.float32)).view(-1, *shape))

    register(data.LAYOUTS, "raw", Layout(lambda path: path.suffix == ".raw", opened, True, "a .raw file"))
    pictures = torch.randn(20, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    pictures.numpy().tofile(tmp_path / "data.raw")
    read, labels = data.open_data(tmp_path / "data.raw", load_model(TEACHER).arch).read([5, 2], seed=0)
    assert torch.equal(read, pictures[[5, 2]])
    assert labels.tolist() == [3, 3]
    plan = convert(str(TEACHER), tmp_path / "bundle", data=tmp_path / "data.raw", fit_steps=1, **QUICK).plan
    assert "raw" in str(plan.data)


def test_a_judge(register: Register, tmp_path: Path) -> None:
    """Mean and spread of a picture."""

    def extract(images: Tensor) -> tuple[Any, None]:
        flat = images.flatten(1).double()
        return torch.stack([flat.mean(1), flat.std(1)], 1).numpy(), None

    register(judges.JUDGES, "brightness", judges.Judge(lambda device: Extractor(name="brightness", extract=extract)))
    result = evaluate(str(TEACHER), tmp_path / "out", features="brightness", samples=20, steps=4, pairs=0, device="cpu")
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert result is not None
    assert found["features"] == "brightness"
    assert found["results"][0]["frechet_distance"] == pytest.approx(0, abs=1e-9)  # of the teacher to its own samples


@dataclass(frozen=True)
class Count:
    """The result of the stage below."""

    parameters: int


def count(
    checkpoint: Annotated[Path, typer.Argument(help="a checkpoint")],
    *,
    times: Annotated[int, option("how often each counts", WHAT, min=1)] = 1,
) -> Count:
    """Counts parameters.

    Example: mediatorize count model.pt
    """
    return Count(times * sum(parameter.numel() for parameter in load_model(checkpoint).parameters()))


def words(result: Count) -> str:
    return f"{result.parameters} parameters"


def facts(result: Count) -> dict[str, Any]:
    return {"parameters": result.parameters}


def test_a_stage(register: Register, tmp_path: Path) -> None:
    register(STAGES, "count", Stage(count, __name__))
    (tmp_path / "recipe.toml").write_text(f"[count]\ncheckpoint = '{TEACHER}'\ntimes = 2\n")
    told = run(tmp_path / "recipe.toml", out=tmp_path / "out").told["count"]
    expected = 2 * sum(parameter.numel() for parameter in load_model(TEACHER).parameters())
    assert told.facts == {"parameters": expected}
    assert told.words == f"{expected} parameters"
    (tmp_path / "recipe.toml").write_text(f"[count]\ncheckpoint = '{TEACHER}'\ntimes = 0\n")
    with pytest.raises(UserError, match=r"\[count\] .*--times"):
        read_recipe(tmp_path / "recipe.toml", (), None)
