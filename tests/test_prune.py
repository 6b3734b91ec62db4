"""Pruned exports: what the schedule never uses is gone, nothing else is, and samples stay the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import model_inputs, tiny_model
from test_export import SMALL, assert_close, elsewhere, files, make_bundle
from torch import Tensor

from mediatorize import UserError, load_model, sample
from mediatorize.export.contract import Subject
from mediatorize.export.pruning import pruned
from mediatorize.formats import bundle
from mediatorize.model.levels import SOFTMAX, Level, MediatorSettings
from mediatorize.model.schedule import AnySchedule, RuleSchedule, Schedule, SwitchRule
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.report import exporting
from mediatorize.report.inspection import words
from mediatorize.stages.calibrate import calibrate
from mediatorize.stages.evaluate import evaluate
from mediatorize.stages.export import export
from mediatorize.stages.finetune import finetune
from mediatorize.stages.inspect import inspect
from mediatorize.stages.resize import resize
from mediatorize.stages.sample import sample as sample_stage

STEPS = 5
HOW: dict[str, Any] = {"solver": "euler", "steps": STEPS, "cfg_scale": 2.0}

OWN = MediatorSettings((1, 4), local_rank=3, modulation_rank=2, mlp="own", mlp_widths=(8, 4, 2))
LOW_RANK = MediatorSettings((1, 4), local_rank=3, modulation_rank=2, projection_rank=2, mlp_widths=(4, 2))
PUBLISHED = MediatorSettings((1, 4), form="published", projection_rank=None)


MEDIATED = Schedule((0.3, 0.7), ((4, "softmax|1/4"), ("4|full", "1|1/8"), (4, "softmax|1/4")))
"""Layer 0 is always mediated, never at 1, and has no narrow MLP; layer 1 has neither level 4 nor an MLP of its own, nor its narrow MLP's
widest hidden units."""
HELD = Schedule((0.5,), (("hold+4|full", "hold+4|1/2"), ("hold+4|full", "softmax|1/4")))
"""Mediators to which their rest is added alone, which do not change the modulation; layer 0 names softmax nowhere, and begins with it."""
RULE = RuleSchedule(SwitchRule(levels=(4, 1), ratios=(99.0,), first=1), Schedule((0.5,), ((4, 4), (1, 1))))

CASES: dict[str, tuple[MediatorSettings, AnySchedule, set[str]]] = {
    "always mediated": (
        OWN,
        MEDIATED,
        {
            *("blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias", "blocks.0.attn.proj.weight", "blocks.0.attn.proj.bias"),
            *(f"blocks.0.attn.mediator.levels.1.{name}" for name in ("pool", "key_bias", "query_bias", "log_key_scale", "log_query_scale")),
            *(f"blocks.1.attn.mediator.levels.4.{name}" for name in ("pool", "key_bias", "query_bias", "log_key_scale", "log_query_scale")),
            *(f"blocks.0.mediator.narrow.{name}" for name in ("fc1.weight", "fc1.bias", "fc2.weight", "biases.8", "biases.4", "biases.2")),
            *(f"blocks.1.{mlp}.{name}" for mlp in ("mlp", "mediator.mlp") for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")),
            "blocks.1.mediator.narrow.biases.2",
        },
    ),
    "held": (
        LOW_RANK,
        HELD,
        {
            *(f"blocks.{i}.mediator.modulation.{name}" for i in (0, 1) for name in ("down.weight", "up.weight", "up.bias")),
            *(f"blocks.{i}.attn.mediator.levels.1.pool" for i in (0, 1)),
            "blocks.0.mediator.narrow.fc1.weight",
            "blocks.1.mlp.fc1.weight",
        },
    ),
    "always mediated, low rank": (
        LOW_RANK,
        Schedule((0.5,), (("4|1/4", 1), ("4|1/4", 4))),
        {*(f"blocks.{i}.attn.{name}.bias" for i in (0, 1) for name in ("qkv", "proj")), "blocks.0.mlp.fc1.weight"},
    ),
    "never mediated": (LOW_RANK, Schedule((), ((SOFTMAX, "softmax|1/2"),)), {"blocks.0.attn.mediator.local.up.weight"}),
    "published": (PUBLISHED, Schedule((0.5,), ((4, SOFTMAX), (4, 4))), {"blocks.0.attn.mediator.levels.1.dwc.weight"}),
    "some layers": (
        MediatorSettings((1, 4), mlp="own", layers=(1,)),
        Schedule((), ((SOFTMAX, 4),)),
        {"blocks.1.attn.qkv.weight", "blocks.1.mlp.fc1.weight"},
    ),
    "rule": (
        OWN,
        RULE,
        {f"blocks.{i}.{name}" for i in (0, 1) for name in ("attn.proj.weight", "mlp.fc1.weight", "mediator.narrow.fc1.bias")},
    ),
}
"""Settings, a schedule, and weights that must be gone: of the first case all of them."""


def scheduled(settings: MediatorSettings, schedule: AnySchedule, **changes: Any) -> DiffusionTransformer:
    model = tiny_model(settings, **SMALL | changes)
    model.schedule = schedule
    return model


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, set[str]]:
    settings, schedule, gone = CASES[request.param]
    return make_bundle(tmp_path / "bundle", scheduled(settings, schedule)), gone


@pytest.fixture
def mediated(tmp_path: Path) -> Path:
    """A bundle with a schedule that never runs softmax in layer 0."""
    return make_bundle(tmp_path / "bundle", scheduled(OWN, MEDIATED))


def test_a_pruned_export_samples_as_the_bundle_and_is_smaller(case: tuple[Path, set[str]], tmp_path: Path) -> None:
    source, gone = case
    result = export(source, tmp_path / "out", to="safetensors", prune=True)
    whole, found = load_model(source), load_model(tmp_path / "out")
    for steps in (STEPS, 8):
        how = HOW | {"steps": steps}
        assert torch.equal(sample(found, [1, 7], **how), sample(whole, [1, 7], **how))
    before, after = whole.state_dict(), found.state_dict()
    missing = before.keys() - after.keys()
    assert gone <= missing
    assert after.keys() <= before.keys()
    if len(gone) > 10:
        assert gone == missing
    numbers = [sum(value.numel() for value in state.values()) for state in (after, before)]
    assert result.pruned is not None
    assert [result.pruned.parameters, result.pruned.of] == numbers
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path / "out", source)]
    assert 0 <= sizes[1] - sizes[0] - 4 * (numbers[1] - numbers[0]) < 200 * len(missing) + 100  # names go with their numbers


def filled(model: DiffusionTransformer, state: dict[str, Tensor]) -> DiffusionTransformer:
    """A model with other values of some weights."""
    other = DiffusionTransformer(model.arch, model.settings)
    other.load_state_dict(model.state_dict() | state)
    other.schedule = model.schedule
    return other.eval().requires_grad_(False)


def outside(value: Tensor, kept: Tensor | None) -> Tensor:
    """A weight with NaN everywhere but in the part that is kept."""
    empty = torch.full_like(value, torch.nan)
    if kept is not None:
        empty[tuple(map(slice, kept.shape))] = kept
    return empty


def test_what_is_left_out_is_unused_and_what_is_kept_is_used(case: tuple[Path, set[str]]) -> None:
    source, _ = case
    whole = load_model(source)
    left = pruned(Subject(bundle.read_config(source), whole)).model
    expected, kept = sample(whole, [1, 7], **HOW), left.state_dict()
    unused = {name: outside(value, kept.get(name)) for name, value in whole.state_dict().items()}
    assert sum(int(value.isnan().sum()) for value in unused.values()) > 0
    assert torch.equal(sample(filled(whole, unused), [1, 7], **HOW), expected)
    for name, value in kept.items():
        ends = torch.full_like(value, torch.nan)
        if "narrow.fc" in name:  # of hidden units, the last one that is kept
            ends = value.clone()
            (ends if name.endswith("bias") or "fc1" in name else ends.mT)[-1] = torch.nan
        assert not sample(filled(left, {name: ends}), [1, 7], **HOW).isfinite().all(), name


def test_the_whole_model_and_the_bundle_stay_as_they_are(mediated: Path, tmp_path: Path) -> None:
    before = files(mediated)
    whole = load_model(mediated)
    state = {name: value.clone() for name, value in whole.state_dict().items()}
    left = pruned(Subject(bundle.read_config(mediated), whole)).model
    assert whole.settings == OWN
    assert left.settings != OWN
    for name, value in whole.state_dict().items():
        assert torch.equal(value, state.pop(name))
    assert not state
    export(mediated, tmp_path / "out", to="safetensors", prune=True)
    assert files(mediated) == before


def test_nothing_is_left_out_where_all_is_used(tmp_path: Path) -> None:
    everything: list[Level] = [1, 4, SOFTMAX]
    settings = MediatorSettings((1, 4), local_rank=3, modulation_rank=2, mlp="own")
    schedule = Schedule((0.3, 0.6), tuple((level, level) for level in everything))
    result = export(make_bundle(tmp_path / "bundle", scheduled(settings, schedule)), tmp_path / "out", to="safetensors", prune=True)
    assert result.pruned is not None
    assert result.pruned.parameters == result.pruned.of
    assert "Gone: nothing." in exporting.words(result)
    assert load_model(tmp_path / "out").all_levels == (1, 4, SOFTMAX)


def test_what_is_gone_is_said(mediated: Path, tmp_path: Path) -> None:
    result = export(mediated, tmp_path / "out", to="safetensors", prune=True)
    gone = "m=1 in layer 0; softmax in layer 0; MLP 1/8 in layer 0; MLP 1/4 in layer 0; MLP 1/2 in layers 0-1"
    for text in (exporting.words(result), (tmp_path / "out" / "README.md").read_text(), words(inspect(str(tmp_path / "out")))):
        for part in gone.split("; "):
            assert part in text, (part, text)
        assert "m=4 in layer 1" in text
        assert "the pretrained MLP in layer 1" in text
        assert "levels=" not in text  # no level runs in all layers
    assert result.pruned is not None
    record = json.loads((tmp_path / "out" / "export.json").read_text())["pruned"]
    assert record == vars(result.pruned)
    assert "Gone" not in exporting.words(export(mediated, tmp_path / "whole", to="safetensors"))


def test_levels_that_are_gone_are_refused_by_name(mediated: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(mediated, out, to="safetensors", prune=True)
    model = load_model(out)
    x, t, y = model_inputs(model)
    has = r"It was pruned to 4, modulation, full, own\. Take the whole bundle, or export it again with --prune --schedule\.$"
    asked: dict[Any, str] = {
        SOFTMAX: "no level softmax",
        (SOFTMAX, SOFTMAX): "no level softmax",
        ("1|own", SOFTMAX): "no level 1",
        ("4|1/8", SOFTMAX): "no level 1/8",
        ("hold+4|own", SOFTMAX): "no level softmax",  # without a memory, or at first, it would run as that
    }
    for levels, lacking in asked.items():
        with pytest.raises(UserError, match=rf"^Layer 0 has {lacking}\. {has}"):
            model(x, t, y, levels=levels if isinstance(levels, str) else list(levels))
    for level, lacking in ((4, "Layer 1 has no level 4"), (16, r"This model has no level 16\. It has 1, 4, softmax\.")):
        with pytest.raises(UserError, match=lacking):
            sample_stage(str(out), out=tmp_path / "x.npz", level=level)
    with pytest.raises(UserError, match="Layer 0 has no level softmax"):
        sample(model, [1], schedule=SOFTMAX)
    other = tmp_path / "other.json"
    bundle.write_json(other, Schedule((), ((4, 4),)).to_json())
    with pytest.raises(UserError, match=r"other\.json: Layer 1 has no level 4\. It was pruned to"):
        sample_stage(str(out), out=tmp_path / "x.npz", schedule=other)
    assert not (tmp_path / "x.npz").exists()


def test_mediators_whose_rest_is_held_do_not_run_bare_where_their_modulation_is_gone(tmp_path: Path) -> None:
    source = make_bundle(tmp_path / "bundle", scheduled(LOW_RANK, HELD))
    export(source, tmp_path / "out", to="safetensors", prune=True)
    model = load_model(tmp_path / "out")
    x, t, y = model_inputs(model)
    with pytest.raises(UserError, match=r"^Layer 0 has no change of its modulation\. It was pruned to 4, softmax, full\."):
        model(x, t, y, levels=[4, "softmax|1/2"])
    whole = load_model(source)
    for levels in ([SOFTMAX, "softmax|1/2"], ["hold+4|full", "hold+4|1/2"]):
        assert torch.equal(model(x, t, y, levels=levels), whole(x, t, y, levels=levels))


def test_commands_that_need_the_whole_bundle_refuse_a_pruned_one(mediated: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(mediated, out, to="safetensors", prune=True)
    before = files(out)
    for command in (
        lambda: calibrate(out, budget="0.5"),
        lambda: evaluate(str(out), tmp_path / "report"),
        lambda: finetune(out),
        lambda: resize(str(out), tmp_path / "larger", image_size=(128, 128)),
        lambda: export(out, tmp_path / "again", to="official"),
        lambda: inspect(str(out), redundancy=tmp_path / "redundancy.png"),
    ):
        with pytest.raises(UserError, match=r"out: was pruned to its schedule, and can only be sampled by it\. Take the whole bundle\.$"):
            command()
    assert files(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "out"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "official"}, "--prune says nothing to --to official. It goes with --to diffusers or safetensors."),
        ({"to": "torch-export"}, "--prune says nothing to --to torch-export."),
        ({"to": "safetensors", "adapter": True}, "An adapter is put on the whole checkpoint, and --prune leaves parts of it out."),
        ({"to": "diffusers", "level": 4}, "--level takes the place of a schedule"),
        (
            {"to": "safetensors"},
            "bundle: The bundle has no schedule to prune to. Run `mediatorize calibrate` first, or pass --schedule FILE.",
        ),
        ({"to": "safetensors", "schedule": Path("nothing.json")}, "nothing.json: no such schedule."),
    ],
)
def test_what_cannot_be_pruned_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = make_bundle(tmp_path / "bundle", tiny_model(OWN, **SMALL))
    with pytest.raises(UserError) as refused:
        export(source, tmp_path / "out", prune=True, **options)
    assert message in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


@pytest.mark.parametrize("prune", [False, True])
def test_a_schedule_file_stands_in_for_the_bundles_own(prune: bool, mediated: Path, tmp_path: Path) -> None:
    schedule = Schedule((), ((1, 4),))
    bundle.write_json(tmp_path / "other.json", schedule.to_json())
    export(mediated, tmp_path / "out", to="safetensors", prune=prune, schedule=tmp_path / "other.json")
    found, whole = load_model(tmp_path / "out"), load_model(mediated)
    assert found.schedule == schedule
    assert torch.equal(sample(found, [1], **HOW), sample(whole, [1], **HOW, schedule=schedule))
    assert len(found.state_dict()) < len(whole.state_dict()) if prune else found.settings == whole.settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda kept: kept.pop(), "Parts of 1 layers are said to be kept, the model has 2"),
        (lambda kept: kept[0].append(16), "Layer 0 cannot have kept 16"),
        (lambda kept: kept[0].remove("own"), r"blocks\.0\.mediator\.mlp\.\w+\.\w+ is \(.*\) where config.json says nothing"),
        (lambda kept: kept[1].append("full"), r"blocks\.1\.mlp\.\w+\.\w+ is missing where config.json says \("),
    ],
)
def test_a_record_of_other_parts_is_refused(change: Any, message: str, mediated: Path, tmp_path: Path) -> None:
    export(mediated, tmp_path / "out", to="safetensors", prune=True)
    file = tmp_path / "out" / "config.json"
    content = json.loads(file.read_text())
    assert content["mediators"]["kept"] == [[4, "modulation", "full", "own"], [1, SOFTMAX, "modulation", "1/8", "1/4"]]
    change(content["mediators"]["kept"])
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "out")


SCRIPT = """
how = dict(latents=given["noise"], output_type="latent")
results["guided"] = pipe([1, 7], **how, num_inference_steps=5, guidance_scale=2.0).images
names = [name for name, _ in pipe.transformer.named_parameters()]
assert not any(name.startswith(("blocks.0.attn.qkv", "blocks.1.mlp")) for name in names), names
for ask, message in (
    (lambda: setattr(pipe.transformer, "level", 4), "This model has no level 4."),
    (lambda: pipe.transformer(given["noise"], torch.ones(1), torch.tensor([1, 7]), levels="softmax"), "Layer 0 has no level softmax."),
):
    try:
        ask()
    except Exception as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)
"""


def test_a_pruned_pipeline_samples_in_diffusers_as_the_bundle_here(mediated: Path, tmp_path: Path) -> None:
    export(mediated, tmp_path / "out", to="diffusers", prune=True)
    export(mediated, tmp_path / "whole", to="diffusers")
    model = load_model(mediated)
    noise, _, _ = model_inputs(model, batch=2)
    found = elsewhere(tmp_path / "out", SCRIPT, tmp_path, noise=noise)
    assert_close(found["guided"], sample(model, [1, 7], **HOW, noise=noise))
    weights = Path("transformer") / "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / weights).stat().st_size < 0.8 * (tmp_path / "whole" / weights).stat().st_size
    assert "pipe.transformer.level" not in (tmp_path / "out" / "README.md").read_text()


def test_a_pruned_export_can_be_rounded_and_is_judged_by_samples(mediated: Path, tmp_path: Path) -> None:
    result = export(mediated, tmp_path / "out", to="safetensors", prune=True, dtype="bfloat16")
    apart = result.verified.samples
    assert apart is not None
    how: dict[str, Any] = {"solver": apart.solver, "steps": apart.steps}
    labels = range(apart.count)
    one, other = (sample(load_model(folder), list(labels), **how).flatten(1) for folder in (tmp_path / "out", mediated))
    errors = (one - other).norm(dim=1) / other.norm(dim=1)
    assert 1e-4 < float(errors.mean()) < 0.1
    assert [apart.mean, apart.largest] == [float(errors.mean()), float(errors.max())]
    assert f"differ from those of the unrounded model, from the same noise, by {apart.mean:.1e}" in (tmp_path / "out/README.md").read_text()
    assert exporting.facts(result)["samples"] == vars(apart)
    assert export(mediated, tmp_path / "exact", to="safetensors").verified.samples is None
