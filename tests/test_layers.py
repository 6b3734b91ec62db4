"""Bundles of which some layers alone are converted: what they have, at what cost, and that everything else knows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import model_inputs, official_state, randomise, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from mediatorize import UserError, load_model, sample
from mediatorize.cli import app
from mediatorize.compression import proposals
from mediatorize.compression.costs import KINDS_OF_SAVING, bare_levels, latency_costs
from mediatorize.compression.distill import levels_of_step
from mediatorize.compression.search import costs_of, search
from mediatorize.compression.sensitivity import adjoint_products, probe_all
from mediatorize.compression.tables import measured_tables
from mediatorize.diffusion.sampling import Sampler
from mediatorize.formats import bundle as bundles
from mediatorize.model import cost
from mediatorize.model.levels import (
    SOFTMAX,
    MediatorSettings,
    layers_in_short,
    levels_per_layer,
    read_layers,
    refuse_lacking,
)
from mediatorize.model.memory import Memory
from mediatorize.model.schedule import Schedule
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.report.conversion import words
from mediatorize.stages.convert import convert
from mediatorize.stages.export import export
from mediatorize.stages.finetune import finetune
from mediatorize.stages.inspect import inspect
from mediatorize.stages.resize import resize
from mediatorize.store import InMemory

SETTINGS = MediatorSettings((1, 4), local_rank=3, modulation_rank=2, projection_rank=3, mlp="own", mlp_widths=(8, 4), layers=(0, 2))
"""Of the three layers of a tiny model, the first and the last."""

WHOLE = replace(SETTINGS, layers=None)
HELD = "hold+4|1/8"
QUICK: dict[str, Any] = {
    "levels": (1, 4),
    "states": 32,
    "trajectories": 4,
    "fit_steps": 3,
    "batch": 8,
    "sampler_steps": 3,
    "device": "cpu",
    "family": "sit",
    "num_heads": 3,
}


def told(*arguments: object) -> dict[str, Any]:
    """What a command says."""
    result = CliRunner().invoke(app, [str(argument) for argument in (*arguments, "--json")])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def counted(model: DiffusionTransformer, run: Callable[[], object]) -> int:
    """FLOPs of what runs the model, by torch's counter."""
    for layer in model.attention_layers():
        layer.fused_attn = False  # whose products the counter does not see on the CPU
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def model_of(settings: MediatorSettings = SETTINGS, **changes: Any) -> DiffusionTransformer:
    return tiny_model(settings, **changes)


# --- the set -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "layers", "short"),
    [
        ("0-3", (0, 1, 2, 3), "0-3"),
        ("0,2,5", (0, 2, 5), "0,2,5"),
        ("8, 0-3", (0, 1, 2, 3, 8), "0-3,8"),
        ("1-1,1,2", (1, 2), "1-2"),
    ],
)
def test_layers_are_numbers_and_ranges(text: str, layers: tuple[int, ...], short: str) -> None:
    assert read_layers(text) == layers
    assert layers_in_short(layers) == short
    assert read_layers(short) == layers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3-0", r"^The range of layers 3-0 descends\. Pass 0-3\.$"),
        ("0,two", r"^'two' is neither a layer nor a range of layers\. Pass for instance 0-3 or 0,2,5\.$"),
        ("-1", "'-1' is neither a layer"),
        ("1-2-3", "'1-2-3' is neither a layer"),
        ("1,,2", "'' is neither a layer"),
        ("2-", "'2-' is neither a layer"),
    ],
)
def test_what_is_no_set_of_layers_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_layers(text)


def test_settings_know_their_layers_through_json() -> None:
    content = json.loads(json.dumps(SETTINGS.to_json()))
    assert MediatorSettings.from_json(content) == SETTINGS
    del content["layers"]  # a bundle from before there was a choice
    assert MediatorSettings.from_json(content) == WHOLE
    assert (WHOLE.converted(3), SETTINGS.converted(3)) == ((0, 1, 2), (0, 2))
    assert [SETTINGS.converts(layer) for layer in range(3)] == [True, False, True]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((), "The set of layers to convert is empty.*--layers 0-3"),
        ((2, 0), "not distinct, ascending"),
        ((0, 0), "not distinct, ascending"),
        ((-1, 0), "ascending numbers from 0"),
        ((0, 3), r"The model has no layer 3\. Its layers are 0 to 2\."),
    ],
)
def test_a_model_refuses_a_set_that_it_cannot_have(layers: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_model().add_mediators(MediatorSettings((4,), layers=layers))


def test_the_set_of_all_layers_is_as_none() -> None:
    named, whole = tiny_model(), tiny_model()
    named.add_mediators(replace(SETTINGS, layers=(0, 1, 2)), seed=3)
    whole.add_mediators(WHOLE, seed=3)
    assert named.settings == whole.settings == WHOLE
    assert named.state_dict().keys() == whole.state_dict().keys()
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in named.state_dict().items())


# --- the model -----------------------------------------------------------------------------------------------------------------


def test_nothing_is_added_to_the_other_layers() -> None:
    model, plain = model_of(), tiny_model()
    assert {name.split(".")[1] for name in model.mediator_parameters()} == {"0", "2"}
    assert official_state(model).keys() == plain.state_dict().keys()
    added = sum(parameter.numel() for parameter in model.mediator_parameters().values())
    assert cost.added_parameters(model.arch, SETTINGS) == added
    assert 3 * added == 2 * cost.added_parameters(model.arch, WHOLE)
    assert cost.count_parameters(model.arch, SETTINGS) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("level", [1, 4, "4|1/8", "softmax|1/4", SOFTMAX])
def test_one_level_is_softmax_where_a_layer_does_not_have_it(level: Any) -> None:
    model = model_of()
    x, t, y = model_inputs(model, batch=1)
    found = model(x, t, y, levels=level)
    assert torch.equal(found, model(x, t, y, levels=[level, SOFTMAX, level]))
    assert torch.equal(found, model(x, t, y)) == (level == SOFTMAX)
    flops = cost.forward_flops(model.arch, level, SETTINGS)
    assert flops == counted(model, lambda: model(x, t, y, levels=level))
    assert flops == cost.forward_flops(model.arch, [level, SOFTMAX, level], SETTINGS)
    assert (flops < cost.forward_flops(model.arch)) == (cost.forward_flops(model.arch, level, WHOLE) < cost.forward_flops(model.arch))


def test_a_level_for_all_is_softmax_where_a_layer_has_none_whatever_its_mlp() -> None:
    for level in (4, "4|1/8", "softmax|1/4", HELD, "hold+1|full"):
        assert levels_per_layer(level, 3, SETTINGS) == [level, SOFTMAX, level]


@pytest.mark.parametrize(
    ("levels", "lacking"),
    [([4, 4, 4], "4"), ([4, "softmax|1/8", 4], "1/8"), ([SOFTMAX, "hold+1|full", SOFTMAX], "1"), ([1, "1|1/4", 1], "1")],
)
def test_a_level_that_its_layer_does_not_have_is_refused_by_the_layers_name(levels: Any, lacking: str, tmp_path: Path) -> None:
    model = model_of()
    x, t, y = model_inputs(model)
    message = rf"Layer 1 has no level {lacking}\."
    with pytest.raises(UserError, match=rf"^{message} It has softmax\.$"):
        model(x, t, y, levels=levels)
    (tmp_path / "schedule.json").write_text(json.dumps(Schedule((), (tuple(levels),)).to_json()))
    with pytest.raises(UserError, match=rf"schedule\.json: {message} Calibrate again\."):
        bundles.read_schedule_file(tmp_path / "schedule.json", model.arch, SETTINGS)
    assert model_of(WHOLE)(x, t, y, levels=levels).isfinite().all()


def test_a_level_that_no_layer_has_is_refused_too() -> None:
    model = model_of()
    with pytest.raises(UserError, match=r"^This model has no level 16\. It has 1, 4, softmax\.$"):
        model(*model_inputs(model), levels=16)
    with pytest.raises(UserError, match=r"^Layer 2 has no level 16\. It has 1, 4, softmax, 1/8, 1/4\.$"):
        model(*model_inputs(model), levels=[4, SOFTMAX, 16])


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_sampling_at_one_level_is_by_the_layers_that_have_it(cfg_scale: float) -> None:
    model = model_of()
    how: dict[str, Any] = {"steps": 4, "cfg_scale": cfg_scale}
    by_hand = Schedule((), ((4, SOFTMAX, 4),))
    assert torch.equal(sample(model, [1, 2], schedule=4, **how), sample(model, [1, 2], schedule=by_hand, **how))
    sampler = Sampler.resolve(model.arch, **how)
    assert sampler.flops(model.arch, 4, SETTINGS) == sampler.flops(model.arch, by_hand, SETTINGS)
    adaptive: dict[str, Any] = {"solver": "dopri5", "steps": 2, "cfg_scale": cfg_scale}
    assert torch.equal(sample(model, [1, 2], schedule=4, **adaptive), sample(model, [1, 2], schedule=by_hand, **adaptive))


def test_rests_are_left_by_converted_layers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    sampler = Sampler.resolve(model.arch, steps=4)
    held = tuple(levels_per_layer(HELD, 3, SETTINGS))
    schedule = Schedule.through(sampler.noise_levels(model.arch), [(SOFTMAX,) * 3, (SOFTMAX,) * 3, held, held])
    seen: list[list[int]] = []
    begin = Memory.begin

    def looked_at(self: Memory, watched: Any) -> None:
        seen.append([len(block.rests) for block in self.blocks])
        begin(self, watched)

    monkeypatch.setattr(Memory, "begin", looked_at)
    flops = counted(model, lambda: sample(model, [1], steps=4, schedule=schedule))
    assert seen == [[0, 0, 0], [0, 0, 0], [1, 0, 1], [1, 0, 1]]
    assert flops == sampler.flops(model.arch, schedule, SETTINGS)
    assert torch.equal(sample(model, [1], steps=4, schedule=HELD), sample(model, [1], steps=4, schedule=Schedule((), (held,))))


# --- conversion and training ---------------------------------------------------------------------------------------------------


def test_chosen_layers_are_fitted_as_in_a_whole_conversion_and_the_others_not_at_all(
    official_file: Callable[..., Path], tmp_path: Path
) -> None:
    source = str(official_file())
    some = convert(source, tmp_path / "some", layers=(0, 1), **QUICK)
    convert(source, tmp_path / "all", **QUICK)
    named = convert(source, tmp_path / "named", layers=(0, 1, 2), **QUICK)
    one, whole = load_model(tmp_path / "some"), load_model(tmp_path / "all")
    assert (one.added().layers, named.plan.settings.layers) == ((0, 1), None)
    assert [errors.layer for errors in some.errors] == [0, 1]
    for name, value in one.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name
    assert {name for name in whole.state_dict() if name not in one.state_dict()} == {
        name for name in whole.mediator_parameters() if name.startswith("blocks.2.")
    }
    for file in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "named" / file).read_bytes() == (tmp_path / "all" / file).read_bytes()
    inputs = model_inputs(one)
    assert torch.equal(one(*inputs, levels=4), whole(*inputs, levels=[4, 4, SOFTMAX]))
    assert torch.equal(one(*inputs), whole(*inputs))
    assert "layers 0-1 of 3 get levels m=1, m=4" in words(some)
    assert "3 layers get levels m=1, m=4" in words(named)
    card = (tmp_path / "some" / "README.md").read_text()
    assert "Every other level runs layers 0-1 of 3 through a few mediator tokens" in card


def test_a_dry_run_counts_chosen_layers_alone(official_file: Callable[..., Path], tmp_path: Path) -> None:
    source = str(official_file())
    plans = [convert(source, tmp_path / "out", layers=layers, dry_run=True, **QUICK).plan for layers in ((0,), (2,), None)]
    first, last, whole = plans
    assert first.added_parameters() == last.added_parameters() == whole.added_parameters() // 3
    assert first.flops() < last.flops() < whole.flops()  # the last layer's inputs take all blocks before it
    longer = [replace(plan, fit=replace(plan.fit, steps=plan.fit.steps + 10)).flops() - plan.flops() for plan in plans]
    assert longer[0] == longer[1] == longer[2] // 3  # what fitting takes
    assert first.peak_bytes() < whole.peak_bytes()
    assert first.relative_flops()[4] == cost.forward_flops(first.arch, [4, SOFTMAX, SOFTMAX], first.settings) / cost.forward_flops(
        first.arch
    )


def test_a_killed_conversion_of_some_layers_goes_on(
    official_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(official_file())
    convert(source, tmp_path / "whole", layers=(0, 2), **QUICK)
    with monkeypatch.context() as patch:
        patch.setattr(bundles, "write_bundle", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out", layers=(0, 2), **QUICK)
    with pytest.raises(UserError, match="an unfinished conversion with other settings"):
        convert(source, tmp_path / "out", layers=(0, 1), **QUICK)
    assert convert(source, tmp_path / "out", layers=(0, 2), **QUICK).resumed_layers == 2
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("3-0", "The range of layers 3-0 descends. Pass 0-3."),
        ("1,7", "The model has no layer 7. Its layers are 0 to 2."),
        ("", "The set of layers to convert is empty. Pass for instance --layers 0-3, or leave it out to convert all."),
    ],
)
def test_wrong_layers_are_refused_in_one_line(layers: str, message: str, official_file: Callable[..., Path], tmp_path: Path) -> None:
    command = ["convert", str(official_file()), str(tmp_path / "out"), "--layers", layers, "--family", "sit", "--num-heads", "3"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code in (1, 2)
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt"]


def test_random_levels_of_training_are_of_converted_layers() -> None:
    settings = replace(SETTINGS, layers=(1, 3))
    for step in range(60):
        drawn = levels_of_step(settings, 5, seed=0, step=step)
        refuse_lacking(drawn, settings)
        assert {drawn[layer] for layer in (0, 2, 4)} == {SOFTMAX}
        assert [drawn[1], drawn[3]] == levels_of_step(replace(settings, layers=None), 2, seed=0, step=step)


@pytest.mark.parametrize("train", ["mediators", "all"])
def test_finetuning_trains_what_converted_layers_have(train: Any, official_file: Callable[..., Path], tmp_path: Path) -> None:
    convert(str(official_file()), tmp_path / "out", layers=(0, 2), mlp="own", **QUICK)
    before = {name: value.clone() for name, value in load_model(tmp_path / "out").state_dict().items()}
    how: dict[str, Any] = {"train_steps": 8, "batch": 4, "trajectories": 2, "renoised": 0, "sampler_steps": 3, "cfg_scales": (1.0,)}
    report = finetune(tmp_path / "out", train=train, feature_weight=0.1, device="cpu", **how)
    after = load_model(tmp_path / "out").state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    added = {name for name in after if ".mediator." in name}
    assert {name.split(".")[1] for name in added} == {"0", "2"}
    assert {name.split(".")[1] for name in moved & added} == {"0", "2"}
    assert (moved <= added) == (train == "mediators")
    sizes = {name: value.numel() for name, value in after.items()}
    assert report.trained_parameters == sum(sizes[name] for name in (added if train == "mediators" else sizes))
    assert report.training is not None
    assert report.training.after.keys() == {1, 4}


# --- costs, errors and the search ----------------------------------------------------------------------------------------------


def test_costs_are_of_the_layers_that_have_a_level() -> None:
    model = model_of(channels=1, learn_sigma=False)
    sampler = Sampler.resolve(model.arch, steps=4, cfg_scale=2.0)
    costs = costs_of("flops", model, sampler)
    for level in (1, 4, "4|1/8", SOFTMAX):
        assert costs.of(level) == sampler.flops(model.arch, level, SETTINGS)
    cheapest = min(costs.share(level) for level in (1, 4, SOFTMAX))
    assert costs.least(["mediators"]) == pytest.approx(cheapest)
    assert costs.least(["mediators", "mlps"]) == pytest.approx(costs.share("1|1/8"))
    whole = costs_of("flops", model_of(WHOLE, channels=1, learn_sigma=False), sampler)
    saved, saved_by_all = (1 - each.share("1|1/8") for each in (costs, whole))
    assert saved == pytest.approx(saved_by_all * 2 / 3)
    timed = latency_costs(model, SETTINGS, rows=1, batch=2)
    assert timed.block("4|1/8") > timed.attention(4) > 0
    assert timed.block(HELD) == timed.block("4|1/8")
    held = Schedule.through(costs.noise_levels, [(SOFTMAX,) * 3, *[(HELD, SOFTMAX, HELD)] * 3])
    assert costs.of(held) == sampler.flops(model.arch, held, SETTINGS)


def test_the_error_table_is_that_of_the_whole_bundle_where_layers_are_converted_and_nothing_elsewhere() -> None:
    some, whole = model_of(channels=1, learn_sigma=False), model_of(WHOLE, channels=1, learn_sigma=False)
    whole.load_state_dict(whole.state_dict() | some.state_dict())
    sampler = Sampler.resolve(some.arch, steps=3)
    probes = probe_all(some, 2, sampler, directions=2, batch=2)
    found, expected = (
        adjoint_products(model, sampler, probes, torch.arange(2), [1, "4|1/8"]).levels.movedim(1, 0) for model in (some, whole)
    )
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
    assert not found[1].any()
    assert expected[1].any()


@pytest.mark.parametrize("kinds", [("mediators",), ("mlps",), tuple(KINDS_OF_SAVING)])
def test_a_search_offers_levels_where_they_are(kinds: tuple[str, ...]) -> None:
    model = model_of(channels=1, learn_sigma=False)
    sampler = Sampler.resolve(model.arch, steps=6)
    costs = costs_of("flops", model, sampler)
    budget = max(0.5, costs.least(kinds) * 1.05)
    found = search(model, sampler, [budget], costs, kinds=kinds, trajectories=2, verify=0, batch=2)
    usable = set(bare_levels(SETTINGS, kinds))
    for candidate in found.candidates:
        for pattern in candidate.schedule.patterns:
            refuse_lacking(pattern, SETTINGS)
            assert candidate.kind == proposals.WHOLE or set(pattern) <= usable
        if candidate.steps == sampler.steps:
            spent = sampler.flops(model.arch, candidate.schedule, SETTINGS)
            assert spent is not None
            assert candidate.share == spent / costs.softmax
    assert found.outcomes[0].chosen.share <= budget
    bare = {level for c in found.candidates for pattern in c.schedule.patterns for level in (pattern[0], pattern[2])}
    assert bare - {SOFTMAX}  # something is offered where it is


def test_the_search_predicts_for_other_layers_what_softmax_does() -> None:
    model = model_of(channels=1, learn_sigma=False)
    sampler = Sampler.resolve(model.arch, steps=6)
    table = measured_tables(model, sampler, 2, 2, InMemory()).errors
    assert len(table.options) > 3
    assert not table.products[:, 1].any()
    softmax = table.options.index(SOFTMAX)
    others = [option for option in range(len(table.options)) if option != softmax]
    for layer in (0, 2):
        assert not table.products[:, layer, softmax].any()
        assert np.abs(table.products[:, layer, others]).max(-1).min() > 0


# --- what is made of a bundle ----------------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(official_file: Callable[..., Path], tmp_path: Path) -> Path:
    """A converted bundle whose added weights are far from the pretrained ones."""
    convert(str(official_file()), tmp_path / "bundle", layers=(0, 2), mlp="own", **QUICK)
    model = load_model(tmp_path / "bundle")
    for layer in (0, 2):
        block = model.layers()[layer]
        randomise(block.attn.mediated(), seed=layer)
        assert block.mediator is not None
        randomise(block.mediator, seed=layer + 5)
    bundles.write_bundle(tmp_path / "bundle", model, bundles.read_config(tmp_path / "bundle"), "card")
    return tmp_path / "bundle"


def test_inspect_says_which_layers(bundle: Path) -> None:
    found = inspect(str(bundle))
    assert "levels m=1, m=4, softmax in layers 0,2 of 3" in found.notes[0]
    here = next(row for row in found.reachable if row.arch == found.arch)
    assert here.relative[4] == cost.forward_flops(found.arch, [4, SOFTMAX, 4], found.settings) / here.flops


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize(
    "options", [{"to": "safetensors"}, {"to": "safetensors", "adapter": True}, {"to": "diffusers"}, {"to": "torch-export"}]
)
def test_exports_of_such_a_bundle_are_the_model(
    options: dict[str, Any], held: bool, bundle: Path, official_file: Any, tmp_path: Path
) -> None:
    """Every export is loaded back and compared at every level and piece; its samples are the bundle's."""
    bare = Schedule((0.5,), ((4, SOFTMAX, 1), (1, SOFTMAX, SOFTMAX)))
    remembering = Schedule((0.3, 0.7), ((HELD, SOFTMAX, "1|1/4"), ("hold+1|own", SOFTMAX, HELD), (SOFTMAX,) * 3))
    bundles.write_json(bundle / "schedule.json", (remembering if held else bare).to_json())
    if held and options["to"] == "torch-export":
        with pytest.raises(UserError, match=r"The schedule holds what attention left, which no program remembers\."):
            export(bundle, tmp_path / "export", **options)
        assert not (tmp_path / "export").exists()
        return
    done = export(bundle, tmp_path / "export", **options)
    assert done.verified.largest < 1e-4
    if options["to"] == "safetensors":
        base = {"path": official_file(), "family": "sit", "num_heads": 3, "adapter": tmp_path / "export"}
        loaded = load_model(**base) if "adapter" in options else load_model(tmp_path / "export")
        for level in (None, 4):
            assert torch.equal(sample(loaded, [1, 2], steps=4, schedule=level), sample(load_model(bundle), [1, 2], steps=4, schedule=level))


def test_the_papers_code_gets_bundles_that_are_converted_throughout(official_file: Callable[..., Path], tmp_path: Path) -> None:
    source = str(official_file(learn_sigma=False))
    some = convert(source, tmp_path / "some", form="published", layers=(0, 1), **QUICK)
    assert (
        some.plan.added_parameters() * 3
        == convert(source, tmp_path / "out", form="published", **QUICK, dry_run=True).plan.added_parameters() * 2
    )
    model = load_model(tmp_path / "some")
    inputs = model_inputs(model, batch=1)
    assert torch.equal(model(*inputs, levels=4), model(*inputs, levels=[4, 4, SOFTMAX]))
    assert counted(model, lambda: model(*inputs, levels=4)) == cost.forward_flops(model.arch, 4, model.settings)
    with pytest.raises(UserError, match=r"^.*Level 4 is in layers 0-1 alone, .* Convert without --layers, or export to"):
        export(tmp_path / "some", tmp_path / "export", to="attention-mediators", level=4)
    assert not (tmp_path / "export").exists()


def test_another_resolution_keeps_the_layers(bundle: Path, tmp_path: Path) -> None:
    found = resize(str(bundle), tmp_path / "other", image_size=(96, 96))
    assert found.settings == bundles.read_config(tmp_path / "other").settings == load_model(bundle).settings
    model = load_model(tmp_path / "other")
    inputs = model_inputs(model)
    assert torch.equal(model(*inputs, levels=4), model(*inputs, levels=[4, SOFTMAX, 4]))


def test_the_whole_tool_runs_on_such_a_bundle(tmp_path: Path) -> None:
    """As a user runs it, on the digits SiT."""
    teacher, out = Path(__file__).parent.parent / "recipes" / "digits" / "sit.safetensors", tmp_path / "out"
    common = ["--device", "cpu"]
    fit = ["--states", 64, "--trajectories", 8, "--fit-steps", 4, "--sampler-steps", 4, "--cfg-scale", 1]
    converted = told("convert", teacher, out, "--layers", "0-2", *fit, *common)
    assert converted["mediators"]["layers"] == [0, 1, 2]
    assert [errors["layer"] for errors in converted["layer_errors"]] == [0, 1, 2]
    told("finetune", out, "--train-steps", 4, "--trajectories", 4, "--sampler-steps", 4, "--cfg-scales", 1, *common)
    model = load_model(out)
    assert torch.equal(
        sample(model, [1, 2], steps=4, schedule=4), sample(model, [1, 2], steps=4, schedule=Schedule((), ((4,) * 3 + (SOFTMAX,) * 3,)))
    )
    calibrated = told(
        "calibrate", out, "--budget", 0.6, "--kinds", "mediators,mlps", "--steps", 5, "--trajectories", 4, "--verify", 4, *common
    )
    assert calibrated["converted_layers"] == [0, 1, 2]
    assert calibrated["schedules"][0]["relative_cost"] <= 0.6
    judged = told("evaluate", out, tmp_path / "report", "--samples", 40, "--steps", 5, "--pairs", 2, *common)
    rows = {row["level"]: row for row in judged["results"]}
    assert rows.keys() == {"softmax", "schedule", "1", "4", "16"}
    sampler = Sampler.resolve(model.arch, steps=5)
    assert rows["4"]["flops"] == sampler.flops(model.arch, 4, model.settings)
    for target in ("diffusers", "safetensors"):
        assert told("export", out, tmp_path / target, "--to", target)["differences"]
