"""The published form of arXiv 2408.05710: files of LeapLabTHU/Attention-Mediators, read and written, against what the original code gave.

`golden/mediators.safetensors` holds small SiTs with 4, 16 and 64 mediators and random weights, made by the original code, and its outputs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import model_inputs, official_state, randomise, relative_error, tiny_model
from safetensors import safe_open
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mediatorize
from mediatorize.diffusion.sampling import Sampler, flops_by_rule, sample_batch, switcher_of
from mediatorize.diffusion.solvers import SOLVERS
from mediatorize.errors import UserError
from mediatorize.formats import bundle
from mediatorize.formats.checkpoint import open_checkpoint
from mediatorize.model.cost import count_parameters, forward_flops
from mediatorize.model.levels import SOFTMAX, MediatorSettings
from mediatorize.model.schedule import SwitchRule
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.report import conversion, inspection, resizing, sampling
from mediatorize.stages.calibrate import calibrate
from mediatorize.stages.convert import convert
from mediatorize.stages.evaluate import evaluate
from mediatorize.stages.export import export
from mediatorize.stages.finetune import finetune
from mediatorize.stages.inspect import inspect
from mediatorize.stages.resize import resize
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
    with pytest.raises(UserError, match="has no softmax attention"):
        inspect(str(source), redundancy=tmp_path / "redundancy.png")
    convert(str(source), out, levels=(1,), fit_steps=20, **(QUICK | {"num_heads": None}))
    given, model = stored(""), mediatorize.load_model(out)
    with torch.no_grad():
        assert relative_error(model(given["x"], given["t"], given["y"]), given["out.16"]) < 1e-5
    calibrate(out, budget=0.6, kinds=("mediators",), steps=6, trajectories=4, verify=4, batch=4, device="cpu")
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


# --- the step-wise rule --------------------------------------------------------------------------------------------------------


def golden_case(name: str) -> dict[str, Any]:
    """Ratios, first changes, steps, and the mediators that the original used in each of its model calls."""
    with safe_open(GOLDEN, "pt") as file:
        return json.loads(file.metadata()[name])


@pytest.mark.parametrize(("name", "measure"), [("mae", "mean-absolute"), ("mse", "mean-square")])
def test_the_rule_switches_where_the_original_does(name: str, measure: Any, tmp_path: Path) -> None:
    case, given = golden_case(name), stored(f"{name}.")
    counts = (4, 16, 64)
    models = [mediatorize.load_model(original_file(tmp_path / f"{count}.pt", count)) for count in counts]
    rule = SwitchRule(levels=(SOFTMAX,) * 3, ratios=tuple(case["ratios"]), first=case["first"], measure=measure)
    sampler = Sampler.resolve(models[0].arch, solver="sde", steps=case["steps"])
    switcher, used = switcher_of(rule, models, sampler, 2), []

    def predict(x: Tensor, t: float) -> Tensor:
        switcher.look(x)
        output = switcher(x, torch.full((2,), t), given["labels"])
        used.append(counts[int(switcher.stage[0])])
        return output

    with torch.no_grad():
        found = SOLVERS["sde"].run(predict, given["noise"], case["steps"], lambda count: given["steps"][count])
    assert used == case["used"]
    assert 4 in used[:10] and 64 in used[-3:]
    assert relative_error(found, given["sample"]) < 1e-5
    assert switcher.switches.tolist() == [[used.index(16), used.index(64)]] * 2
    flops = {count: forward_flops(model.arch) for count, model in zip(counts, models, strict=True)}
    assert flops_by_rule(rule, models, sampler, switcher.switches) == 2 * sum(flops[count] for count in used)


class Moving(DiffusionTransformer):
    """Velocities of a size that is known at every time, so that changes of the latents are."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor, levels: Any = SOFTMAX, memory: Any = None) -> Tensor:
        size = (1 - t) * torch.where(y == 1, 1.0, 2.0 * t)  # class 1 slows down steadily, others in the second half alone
        self.calls.append((len(x), levels))
        return size.view(-1, 1, 1, 1).expand_as(x)


def moving() -> Moving:
    model = Moving(tiny_model(MediatorSettings((1, 4))).arch, MediatorSettings((1, 4)))
    model.calls = []
    return model


@pytest.mark.parametrize(("solver", "calls"), [("euler", 1), ("heun", 2)])
def test_the_rule_counts_steps_whatever_calls_they_take(solver: str, calls: int) -> None:
    """Euler's change of step i is 1 - i / 20, of a base (of steps 1 to 3) of 1 - 2 / 20: below half of it from step 12 on."""
    model = moving()
    rule = SwitchRule(levels=(1, SOFTMAX), ratios=(0.5,))
    sampler = Sampler.resolve(model.arch, solver=solver, steps=20)
    switcher = switcher_of(rule, [model] * 2, sampler, 2)
    sample_batch(model, [1, 1], sampler, drive=switcher)
    began = switcher.switches.tolist()
    assert began[0] == began[1]
    assert len(model.calls) == 20 * calls
    assert [levels for _, levels in model.calls] == [1] * (began[0][0] * calls) + [SOFTMAX] * ((20 - began[0][0]) * calls)
    if solver == "euler":
        assert began[0] == [13]  # step 12's change is known when step 13 begins


def test_the_rule_looks_at_the_solvers_own_state_in_any_precision() -> None:
    steps = []
    for dtype in (torch.float32, torch.bfloat16):
        model = moving().to(dtype)
        rule = SwitchRule(levels=(1, SOFTMAX), ratios=(0.5,), measure="mean-square")
        sampler = Sampler.resolve(model.arch, solver="euler", steps=400)
        switcher = switcher_of(rule, [model] * 2, sampler, 1)
        sample_batch(model, [1], sampler, drive=switcher)
        steps.append(int(switcher.switches))
    assert abs(steps[0] - steps[1]) <= 4  # the model's own rounding is left


def test_samples_that_switch_for_themselves_do_not_depend_on_their_batch() -> None:
    model = moving()
    sampler = Sampler.resolve(model.arch, solver="euler", steps=20, cfg_scale=2.0)

    def began(labels: list[int], per: Any) -> list[list[int]]:
        rule = SwitchRule(levels=(1, 4, SOFTMAX), ratios=(0.5, 0.1), per=per)
        switcher = switcher_of(rule, [model] * 3, sampler, len(labels))
        sample_batch(model, labels, sampler, drive=switcher)
        return switcher.switches.tolist()

    alone = began([1], "sample") + began([2], "sample")
    assert began([1, 2], "sample") == alone
    assert alone[0] != alone[1]
    together = began([1, 2], "batch")
    assert together[0] == together[1]
    assert began([1], "batch") == alone[:1]


def test_rules_that_cannot_be_are_refused() -> None:
    model = moving()
    for changes, match in (
        ({"ratios": (0.3, 0.6)}, "Ratios 0.3,0.6 do not descend"),
        ({"ratios": (0.3,)}, "1 ratios do not switch between 3 stages"),
        ({"levels": (1,), "ratios": ()}, "fewer than two stages"),
        ({"levels": (1, 4, "many")}, "many"),
        ({"first": 0}, "of 0 changes"),
        ({"measure": "median"}, "by median per batch"),
        ({"ratios": (float("nan"), 0.3)}, "do not descend above 0"),
    ):
        with pytest.raises(UserError, match=match):
            SwitchRule(**({"levels": (1, 4, SOFTMAX), "ratios": (0.6, 0.3)} | changes))  # type: ignore[arg-type]
    rule, euler = SwitchRule(levels=(1, SOFTMAX), ratios=(0.6,)), Sampler.resolve(model.arch, solver="euler", steps=5)
    for other in ({"grid": (6, 6)}, {"reversed_time": True}, {"null_class": False}, {"family": "dit"}):
        with pytest.raises(UserError, match="not for the same latents"):
            switcher_of(rule, [model, tiny_model(**other)], euler, 1)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="dopri5 takes as many steps"):
        switcher_of(rule, [model] * 2, Sampler.resolve(model.arch, solver="dopri5"), 1)


def test_sample_switches_between_levels_and_says_when(official_file: Callable[..., Path], tmp_path: Path) -> None:
    convert(str(official_file(channels=1)), tmp_path / "out", levels=(1, 4), form="published", family="sit", fit_steps=5, **QUICK)
    how: dict[str, Any] = {"classes": (1, 2, 3), "steps": 12, "solver": "sde", "switch": "mean-absolute", "device": "cpu", "first": 2}
    found = sample(str(tmp_path / "out"), out=tmp_path / "a.png", ratios=(0.99, 0.95), batch=2, **how)
    assert found.stages == ("m=1", "m=4", "softmax")
    assert len(found.switches) == 3 and found.switches[0] == found.switches[1]
    assert all(second >= 3 for second, _ in found.switches)  # after two first changes
    told = sampling.words(found)
    assert "by the step-wise rule (m=1, then m=4, then softmax)" in told
    model = mediatorize.load_model(tmp_path / "out")
    costs = [forward_flops(model.arch, level, model.settings) for level in (1, 4, SOFTMAX)]
    expected = 0
    for second, third in found.switches:
        ends = [0, *(step if step >= 0 else 12 for step in (second, third)), 12]
        expected += sum(cost * (after - before) for cost, before, after in zip(costs, ends, ends[1:], strict=False))
    assert found.flops == expected
    never = sample(str(tmp_path / "out"), out=tmp_path / "b.png", ratios=(1e-9,), switch_levels=(4, SOFTMAX), **how)
    assert never.switches == ((-1,),) * 3
    assert "softmax: began never, in 0 of 3 samples" in sampling.words(never)
    whole = sample(str(tmp_path / "out"), out=tmp_path / "c.png", level=4, **(how | {"switch": None, "first": 3}))
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "c.png").read_bytes()
    assert whole.flops == never.flops
    alone = how | {"switch_per": "sample", "ratios": (0.99, 0.95)}
    one = [sample(str(tmp_path / "out"), out=tmp_path / f"{batch}.npz", batch=batch, **alone).switches for batch in (1, 3)]
    assert one[0] == one[1]


def test_sample_switches_between_checkpoints(tmp_path: Path) -> None:
    files = [str(original_file(tmp_path / f"{count}.pt", count)) for count in (4, 16, 64)]
    how: dict[str, Any] = {"classes": (1, 2), "steps": 12, "solver": "sde", "device": "cpu", "switch": "mean-absolute", "first": 2}
    found = sample(files[0], out=tmp_path / "a.npz", checkpoints=tuple(files), ratios=(0.99, 0.9), **how)
    assert found.stages == tuple(files)
    assert any(second >= 3 for second, _ in found.switches)
    same = sample(files[0], out=tmp_path / "b.npz", checkpoints=tuple(files[1:]), ratios=(0.99, 0.9), **how)
    assert same.switches == found.switches
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with pytest.raises(UserError, match="2 ratios do not switch between 2 stages"):
        sample(files[0], out=tmp_path / "c.npz", checkpoints=tuple(files[1:2]), **how)
    for options, match in (
        ({"switch": None, "checkpoints": (files[1],)}, "Pass --switch mean-absolute"),
        ({"level": SOFTMAX}, "Pass one of them"),
        ({"switch_levels": (4,), "checkpoints": (files[1],)}, "or checkpoints"),
        ({"switch_levels": (9, SOFTMAX)}, "no level 9"),
    ):
        with pytest.raises(UserError, match=match):
            sample(files[0], out=tmp_path / "c.npz", **(how | options))  # type: ignore[arg-type]


# --- resolutions ---------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_resized_as_the_original_does(tmp_path: Path) -> None:
    source, given = original_file(tmp_path / "model.pt", 16), stored("big.")
    found = resize(str(source), tmp_path / "big.pt", image_size=(8 * 28, 8 * 28))
    model, inputs = mediatorize.load_model(tmp_path / "big.pt"), stored("")
    for name in ("ah_bias", "aw_bias", "ha_bias", "wa_bias"):
        assert relative_error(model.state_dict()[f"blocks.1.attn.published.levels.16.{name}"], given[name]) < 1e-6
    with torch.no_grad():
        assert relative_error(model(given["x"], inputs["t"][:2], inputs["y"][:2]), given["out"]) < 1e-5
    assert "10x10" in resizing.words(found) and "14x14" in resizing.words(found)
    assert resizing.facts(found)["flops"]["softmax"]["after"] == forward_flops(model.arch)
    repa = official_state(tiny_model(learn_sigma=False)) | {"projectors.0.weight": torch.zeros(4, 4)}
    torch.save(repa, tmp_path / "repa.pt")
    resize(str(tmp_path / "repa.pt"), tmp_path / "large.pt", image_size=(96, 96), num_heads=3)
    assert mediatorize.load_model(tmp_path / "large.pt").arch.reversed_time
    with pytest.raises(UserError, match="16 mediators do not fit 9 tokens"):
        resize(str(source), tmp_path / "small.pt", image_size=(48, 48))


@pytest.mark.parametrize("form", ["learned", "published"])
@pytest.mark.parametrize("size", [(96, 96), (64, 112), (48, 112)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_a_bundle_is_resized_and_goes_on(form: Any, size: tuple[int, int], official_file: Callable[..., Path], tmp_path: Path) -> None:
    """From 4x4 tokens to more of them, not square, and an odd number."""
    convert(str(official_file(grid=(5, 4))), tmp_path / "out", levels=(1,), form=form, family="sit", fit_steps=20, **QUICK)
    resize(str(tmp_path / "out"), tmp_path / "other", image_size=size)
    before, after = mediatorize.load_model(tmp_path / "out"), mediatorize.load_model(tmp_path / "other")
    assert after.arch.grid == (size[0] // 16, size[1] // 16)
    kept = {name for name, value in before.state_dict().items() if torch.equal(value, after.state_dict()[name])}
    assert all(name in kept for name in before.state_dict() if not re.search("pos_embed|pool|bias$", name))
    if form == "learned":
        pools = [value for name, value in after.state_dict().items() if name.endswith("pool")]
        assert pools
        for name, pool in after.state_dict().items():  # weights of a mean
            if name.endswith("pool"):
                torch.testing.assert_close(pool.sum((2, 3)), before.state_dict()[name].sum((2, 3)), rtol=0.05, atol=0.05)
    calibrate(tmp_path / "other", budget=0.98, kinds=("mediators",), steps=4, trajectories=2, verify=2, batch=2, device="cpu")
    finetune(tmp_path / "other", train_steps=2, batch=2, trajectories=2, sampler_steps=3, cfg_scales=(1.0,), device="cpu")
    assert "| - | - |" in (tmp_path / "other" / "README.md").read_text()  # no layer errors at this resolution


def test_the_same_size_changes_nothing(official_file: Callable[..., Path], tmp_path: Path) -> None:
    convert(str(official_file()), tmp_path / "out", levels=(1,), family="sit", fit_steps=5, **QUICK)
    resize(str(tmp_path / "out"), tmp_path / "same", image_size=(64, 64))
    before, after = (mediatorize.load_model(tmp_path / name).state_dict() for name in ("out", "same"))
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_teacher_of_the_new_size_takes_the_place_of_the_old(official_file: Callable[..., Path], tmp_path: Path) -> None:
    convert(str(official_file()), tmp_path / "out", levels=(1,), family="sit", fit_steps=5, **QUICK)
    large = official_file("large.pt", grid=(6, 6), seed=3)
    told: dict[str, Any] = {"family": "sit", "num_heads": 3}
    resize(str(tmp_path / "out"), tmp_path / "large", image_size=(96, 96), teacher=str(large), **told)
    model, teacher = mediatorize.load_model(tmp_path / "large"), mediatorize.load_model(large, **told)
    x, t, y = model_inputs(model)
    with torch.no_grad():
        assert torch.equal(model(x, t, y), teacher(x, t, y))
    assert bundle.read_config(tmp_path / "large").source.sha256 == bundle.hash_of_weights(teacher)
    export(tmp_path / "large", tmp_path / "official", to="official")
    with pytest.raises(UserError, match="is no SiT-3x48/2 of 8x8 tokens"):
        resize(str(tmp_path / "out"), tmp_path / "other", image_size=(128, 128), teacher=str(large), **told)


def test_sizes_that_cannot_be_are_refused_and_leave_nothing(official_file: Callable[..., Path], tmp_path: Path) -> None:
    source = str(official_file())
    convert(source, tmp_path / "out", levels=(4,), family="sit", fit_steps=0, **QUICK)
    told: dict[str, Any] = {"family": "sit", "num_heads": 3}
    for model, out, options, match in (
        ("out", "other", {"image_size": (100, 96)}, "100x96 pixels are no grid of patches of 16"),
        ("out", "out", {"image_size": (96, 96)}, "is the bundle itself"),
        ("model.pt", "big.pt", {"image_size": (96, 96), "teacher": source} | told, "--teacher is for bundles"),
        ("model.pt", "big", {"image_size": (96, 96)} | told, "is a .pt file"),
        ("model.pt", "model.pt", {"image_size": (96, 96)} | told, "exists"),
    ):
        with pytest.raises(UserError, match=match):
            resize(str(tmp_path / model), tmp_path / out, **options)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "out"]
