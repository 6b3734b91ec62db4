"""Exports: what is written loads in other tools, where mediatorize is not, and computes the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import model_inputs, official_state, randomise, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from mediatorize import UserError, load_model, sample
from mediatorize.compression.records import LayerErrors
from mediatorize.diffusion import sampling
from mediatorize.diffusion.process import BETAS, process_of
from mediatorize.diffusion.sampling import Sampler
from mediatorize.diffusion.switching import Switcher
from mediatorize.export import safetensors
from mediatorize.export.contract import Choices, Export, Probe, Subject
from mediatorize.export.standalone import standalone
from mediatorize.export.targets import EXPORTS
from mediatorize.formats import bundle
from mediatorize.formats.tensors import read_safetensors
from mediatorize.model.levels import SOFTMAX, MediatorSettings, in_full
from mediatorize.model.schedule import AnySchedule, RuleSchedule, Schedule, SwitchRule
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.report import exporting
from mediatorize.report.card import hub_header, model_card
from mediatorize.signatures import typed_signature
from mediatorize.stages.export import export

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
"""Of diffusers' schedulers under numpy 2."""

SETTINGS = MediatorSettings((1, 4), local_rank=3, modulation_rank=2, mlp="own")
SMALL = {"depth": 2, "width": 16, "heads": 2, "mlp_width": 32}
SCHEDULE = Schedule((0.25, 0.5), ((SOFTMAX, 4), (4, SOFTMAX), (1, 1)))
"""Its edges lie on the steps of the samplers below."""

NARROW = MediatorSettings((1, 4), local_rank=3, modulation_rank=2, mlp="own", mlp_widths=(4, 2))
HOLDING = Schedule((0.3, 0.45, 0.7), (("hold+4|full", "hold+1|1/4"), (SOFTMAX, 4), ("hold+4|1/2", SOFTMAX), (SOFTMAX, "softmax|1/2")))
"""Held rests of mediators after softmax attention at earlier calls, of one layer and of both; its edges lie between steps of eight."""


IN_FULL = Schedule(HOLDING.edges, tuple(tuple(map(in_full, piece)) for piece in HOLDING.levels))
"""The same with softmax attention in place of held rests."""


def holding(**changes: Any) -> DiffusionTransformer:
    """A model whose schedule holds what mediators left out."""
    return small_model(HOLDING, NARROW, **changes)


def by_rule(per: Any, ratios: tuple[float, float], **changes: Any) -> DiffusionTransformer:
    """A model whose schedule is a step-wise rule."""
    rule = SwitchRule(levels=(1, 4, SOFTMAX), ratios=ratios, first=2, per=per)
    return small_model(RuleSchedule(rule, Schedule((0.5,), ((SOFTMAX,) * 2, (1,) * 2))), **changes)


DIFFUSERS_CONVENTIONS = {"frequency_shift": 1, "mlp_norm_eps": 1e-5}


def small_model(schedule: AnySchedule | None = SCHEDULE, settings: MediatorSettings = SETTINGS, **changes: Any) -> DiffusionTransformer:
    model = tiny_model(settings, **SMALL | changes)
    for layer in model.attention_layers():
        assert layer.mediator is not None
        randomise(layer.mediator, seed=9)
    for block in model.layers():
        assert block.mediator is not None
        randomise(block.mediator, seed=10)
    model.schedule = schedule
    return model.requires_grad_(False)


def make_bundle(path: Path, model: DiffusionTransformer) -> Path:
    """A bundle as conversion and calibration leave it."""
    errors = tuple(LayerErrors(i, before={1: 0.7, 4: 0.4}, after={1: 0.3, 4: 0.1}) for i in range(model.arch.depth))
    source = bundle.Origin(file="source.pt", format="official", weights="ema", sha256=bundle.hash_of_weights(model))
    assert model.settings is not None
    config = bundle.BundleConfig(model.arch, model.settings, source, errors)
    path.mkdir()
    bundle.write_bundle(path, model, config, model_card(config))
    bundle.append_log(path, "convert", {}, {})
    if model.schedule:
        bundle.write_json(path / "schedule.json", model.schedule.to_json())
    return path


@pytest.fixture
def sit(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "sit", small_model())


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def tiny_vae(path: Path) -> Any:
    """A VAE of diffusers that halves the sides, random weights, on disk at `path`."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(3)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 8),
            latent_channels=4,
            norm_num_groups=2,
            scaling_factor=0.18215,
        )
    vae.save_pretrained(path)
    return vae.eval()


BLOCKED = """
import sys
sys.modules.update(mediatorize=None, timm=None)  # importing them, or anything in them, raises
for name in ("mediatorize", "timm"):
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(f"{name} can be imported")
import torch
from safetensors.torch import load_file, save_file
import diffusers
from diffusers import DiffusionPipeline
folder, given, found = sys.argv[1:]
given, results = load_file(given), {}
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
"""


def elsewhere(folder: Path, script: str, tmp_path: Path, **given: Tensor) -> dict[str, Tensor]:
    """Runs `script` on a loaded pipeline `pipe` in a process that cannot import mediatorize or timm; gives its `results`."""
    scratch = tmp_path / "elsewhere"
    scratch.mkdir(exist_ok=True)
    save_file({"nothing": torch.zeros(1), **given}, scratch / "given.safetensors")
    environment = os.environ | {"HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_OFFLINE": "1"}
    code = f"{BLOCKED}\n{script}\nsave_file({{name: value.contiguous() for name, value in results.items()}}, found)"
    command = [sys.executable, "-c", code, str(folder), str(scratch / "given.safetensors"), str(scratch / "found.safetensors")]
    done = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return load_file(scratch / "found.safetensors")


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert expected.std() > 0.05
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


OF_ANY_BUNDLE = [name for name in EXPORTS if name != "attention-mediators"]  # that needs the published form: see test_published.py


# --- every target --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [SCHEDULE, None], ids=["scheduled", "unscheduled"])
@pytest.mark.parametrize("target", OF_ANY_BUNDLE)
def test_every_export_is_checked_and_says_what_it_is(target: str, schedule: Schedule | None, tmp_path: Path) -> None:
    source = make_bundle(tmp_path / "bundle", small_model(schedule))
    before = files(source)
    result = export(source, tmp_path / "out", to=target)
    assert files(source) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "out"]
    levels = {"level softmax", "level 1", "level 4"}
    pieces = {f"schedule at noise level {middle}" for middle in ("0.125", "0.375", "0.75")} if schedule else set()
    expected = {"official": {"level softmax"}, "torch-export": pieces or levels}.get(target, levels | pieces)
    assert set(result.verified.differences) == expected
    assert result.verified.largest <= 1e-4
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "source.pt",
        "ema",
        bundle.read_config(source).source.sha256,
        "mediatorize convert",
        "Licence",
        "GMACs",
        "Loaded back",
        '"out',
    ):
        assert part in card, part
    assert "DEST" not in card
    assert ("schedule chooses" in card) == (schedule is not None)
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["differences"] == result.verified.differences
    assert str(tmp_path) not in card + json.dumps(record)
    assert set(exporting.facts(result)) == set(record) - {"version", "bundle"}
    told = exporting.words(result)
    assert f"exported to {result.target}" in told
    assert ("pass --level" in told) == (target == "diffusers" and schedule is None)


@pytest.mark.parametrize("target", [name for name in OF_ANY_BUNDLE if name != "torch-export"])
def test_every_export_of_a_schedule_with_held_rests_is_checked(target: str, tmp_path: Path) -> None:
    """Without a memory softmax attention runs, in the export as here."""
    source = make_bundle(tmp_path / "bundle", holding())
    result = export(source, tmp_path / "out", to=target)
    pieces = {f"schedule at noise level {middle}" for middle in ("0.15", "0.375", "0.575", "0.85")}
    levels = {"level softmax", "level 1", "level 4"}
    assert set(result.verified.differences) == ({"level softmax"} if target == "official" else levels | pieces)
    assert result.verified.largest <= 1e-4
    card = (tmp_path / "out" / "README.md").read_text()
    assert "DEST" not in card
    assert "a level for every layer by noise level, in 4 pieces" in card


def test_no_program_holds_what_attention_left(tmp_path: Path) -> None:
    source = make_bundle(tmp_path / "bundle", holding())
    with pytest.raises(UserError, match=r"holds what attention left, which no program remembers.*safetensors or diffusers"):
        export(source, tmp_path / "out", to="torch-export")
    assert not (tmp_path / "out").exists()


def test_an_export_whose_schedule_alone_is_wrong_is_refused(sit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, wrong = safetensors.outputs, "schedule at noise level 0.375"

    def outputs(*arguments: Any) -> dict[str, Tensor]:
        found = dict(own(*arguments))
        found[wrong] = found[wrong] * (1 + 5e-4)
        return found

    monkeypatch.setattr(safetensors, "outputs", outputs)
    with pytest.raises(UserError, match=f"outputs at {wrong} differ by"):
        export(sit, tmp_path / "out", to="safetensors")
    assert not (tmp_path / "out").exists()


def test_an_evaluation_goes_into_the_card(sit: Path, tmp_path: Path) -> None:
    judged = tmp_path / "judged"
    judged.mkdir()
    with pytest.raises(UserError, match=r"has no report\.md"):
        export(sit, tmp_path / "out", to="official", evaluation=judged)
    (judged / "report.md").write_text("# Title\n\n| level | distance |\n![grid](comparison.png)\n")
    export(sit, tmp_path / "out", to="official", evaluation=judged)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "### Title" in card
    assert "| level | distance |" in card
    assert "comparison.png" not in card


def test_only_exports_are_replaced_and_only_by_force(sit: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(sit, out, to="official")
    before = files(out)
    with pytest.raises(UserError, match="exists"):
        export(sit, out, to="safetensors")
    assert files(out) == before
    export(sit, out, to="safetensors", force=True)
    assert "model.safetensors" in files(out)
    assert "model.pt" not in files(out)
    before = files(sit)
    with pytest.raises(UserError, match="is no export"):
        export(sit, sit, to="official", force=True)
    assert files(sit) == before


def test_an_unfinished_export_is_begun_again_and_nothing_else_is_dropped(sit: Path, tmp_path: Path) -> None:
    partial = bundle.partial_folder(tmp_path / "out")
    partial.mkdir()
    (partial / "plan.json").write_text("{}")
    with pytest.raises(UserError, match="no unfinished export"):
        export(sit, tmp_path / "out", to="official")
    assert (partial / "plan.json").exists()
    (partial / "export.json").write_text("{}")
    export(sit, tmp_path / "out", to="official")
    assert set(files(tmp_path / "out")) == {"README.md", "export.json", "model.pt"}


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The export as safetensors, writing what the next load finds wrong."""
    own = safetensors.outputs

    def outputs(*arguments: Any) -> dict[str, Tensor]:
        return {name: value + 2e-4 * value.abs().max() for name, value in own(*arguments).items()}

    monkeypatch.setattr(safetensors, "outputs", outputs)
    yield


@pytest.mark.usefixtures("broken")
def test_an_export_that_is_not_the_model_is_refused_and_leaves_nothing(sit: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"outputs at level softmax differ by 2\.0e-04"):
        export(sit, out, to="safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sit"]
    export(sit, out, to="official")
    before = files(out)
    with pytest.raises(UserError, match="not the model"):
        export(sit, out, to="safetensors", force=True)
    assert files(out) == before


@pytest.mark.parametrize(
    ("target", "option", "fitting"),
    [
        ("official", {"dtype": "bfloat16"}, "diffusers or safetensors"),
        ("diffusers", {"adapter": True}, "safetensors"),
        ("torch-export", {"vae": Path("vae")}, "diffusers"),
        ("safetensors", {"level": 4}, "diffusers"),
    ],
)
def test_options_that_would_change_nothing_are_refused(
    target: str, option: dict[str, Any], fitting: str, sit: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"--to {fitting}"):
        export(sit, tmp_path / "out", to=target, **option)
    assert not (tmp_path / "out").exists()


def test_bad_input_is_refused(sit: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no bundle"):
        export(tmp_path / "nothing", tmp_path / "out", to="official")
    with pytest.raises(UserError, match="no level 16"):
        export(sit, tmp_path / "out", to="diffusers", level=16)
    with pytest.raises(UserError, match="no VAE"):
        export(sit, tmp_path / "out", to="diffusers", vae=sit.parent)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sit"]


# --- a target of one's own -----------------------------------------------------------------------------------------------------


def write(folder: Path, subject: Subject, choices: Choices) -> None:
    """Together with `outputs` and `usage`: a target, which is this module."""
    torch.save(subject.model.state_dict(), folder / "toy.pt")


def outputs(folder: Path, subject: Subject, choices: Choices, probe: Probe) -> Mapping[str, Tensor]:
    model = DiffusionTransformer(subject.arch, subject.config.settings)
    model.load_state_dict(torch.load(folder / "toy.pt", weights_only=True))
    return probe.outputs(model.eval())


def usage(subject: Subject, choices: Choices) -> str:
    return 'torch.load("DEST/toy.pt")'


def test_a_target_is_a_module_and_an_entry(sit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXPORTS, "toy", Export(module=__name__))
    result = export(sit, tmp_path / "out", to="toy")
    assert result.verified.largest == 0
    assert {"level softmax", "level 1", "level 4"} < set(result.verified.differences)
    assert set(files(tmp_path / "out")) == {"README.md", "export.json", "toy.pt"}
    assert 'torch.load("out/toy.pt")' in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(UserError, match="--level says nothing to --to toy"):
        export(sit, tmp_path / "another", to="toy", level=4)

    def other(*arguments: Any) -> DiffusionTransformer:
        return tiny_model(SETTINGS, seed=1, **SMALL)

    monkeypatch.setitem(EXPORTS, "toy", Export(module=__name__, heeds=frozenset({"dtype"})))
    monkeypatch.setattr(sys.modules[__name__], "reference", other, raising=False)
    with pytest.raises(UserError, match="not the model"):
        export(sit, tmp_path / "another", to="toy", dtype="bfloat16")


def test_the_command_line_tells_targets_apart_without_importing_them() -> None:
    to = next(parameter for parameter in typed_signature(export) if parameter.name == "to")
    info = to.annotation.__metadata__[0]
    for name, target in EXPORTS.items():
        assert f"{name}: {target.help}" in info.help
    heavy = ["torch", "diffusers", "timm", "safetensors"]
    code = f"import sys; import mediatorize.export.targets; found = set({heavy}) & set(sys.modules); sys.exit(str(found) if found else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- diffusers -----------------------------------------------------------------------------------------------------------------

SIT_SCRIPT = """
assert type(pipe).__name__ == "MediatorPipeline"
how = dict(num_inference_steps=8, guidance_scale=1.5, latents=given["noise"], output_type="latent")
results["scheduled"] = pipe([1, 7], **how).images
pipe.transformer.level = 4
results["level 4"] = pipe([1, 7], **how).images
results["all channels"] = pipe([1, 7], **how, guided_channels=None).images
results["drawn"] = pipe(3, num_inference_steps=2, generator=torch.Generator().manual_seed(5)).images
try:
    pipe(3, output_type="pil")
    raise SystemExit("latents became pictures")
except ValueError as error:
    assert "no VAE" in str(error)
"""


@pytest.mark.parametrize("changes", [{}, {"reversed_time": True, "grid": (2, 4)}], ids=["sit", "wide repa"])
def test_a_sit_samples_in_diffusers_as_here(changes: dict[str, Any], tmp_path: Path) -> None:
    source = make_bundle(tmp_path / "bundle", small_model(**changes))
    export(source, tmp_path / "out", to="diffusers")
    model = load_model(source)
    noise, _, _ = model_inputs(model, batch=2)
    found = elsewhere(tmp_path / "out", SIT_SCRIPT, tmp_path, noise=noise)
    how: dict[str, Any] = {"solver": "euler", "steps": 8, "cfg_scale": 1.5, "noise": noise}
    assert_close(found["scheduled"], sample(model, [1, 7], **how))
    assert_close(found["level 4"], sample(model, [1, 7], **how, schedule=4))
    assert_close(found["all channels"], sample(model, [1, 7], **how, schedule=4, cfg_channels="all"))
    drawn = torch.randn(noise[:1].shape, generator=torch.Generator().manual_seed(5))
    assert_close(found["drawn"], sample(model, [3], solver="euler", steps=2, noise=drawn, schedule=4))


def test_a_sit_with_a_vae_makes_pictures_in_diffusers(sit: Path, tmp_path: Path) -> None:
    vae = tiny_vae(tmp_path / "vae")
    export(sit, tmp_path / "out", to="diffusers", vae=tmp_path / "vae", level=1)
    assert "as loaded it is at level 1" in (tmp_path / "out" / "README.md").read_text()
    model = load_model(sit)
    noise, _, _ = model_inputs(model, batch=2)
    script = """
results["pt"] = pipe([1, 7], num_inference_steps=4, latents=given["noise"], output_type="pt").images
assert pipe.transformer.config.level == 1
assert pipe([1, 7], num_inference_steps=4).images[0].size == (16, 16)
"""
    found = elsewhere(tmp_path / "out", script, tmp_path, noise=noise)
    latents = sample(model, [1, 7], solver="euler", steps=4, noise=noise, schedule=1)
    with torch.no_grad():
        pictures = (vae.decode(latents / 0.18215).sample / 2 + 0.5).clamp(0, 1)
    assert_close(found["pt"], pictures)


DIT_SCRIPT = """
from diffusers import DPMSolverMultistepScheduler
assert type(pipe) is diffusers.DiTPipeline
decoded = []
def decode(latents):
    decoded.append(latents)
    return original(latents)
original, pipe.vae.decode = pipe.vae.decode, decode
how = dict(class_labels=[1, 7], guidance_scale=4.0, output_type="np")
def sampled(name, steps):
    images = pipe(**how, num_inference_steps=steps, generator=torch.Generator().manual_seed(5)).images
    results[name + ", pictures"] = torch.from_numpy(images).permute(0, 3, 1, 2)
    results[name] = decoded.pop() * pipe.vae.config.scaling_factor
sampled("ddim", 5)
betas = given["betas"].double().numpy()
pipe.scheduler = DPMSolverMultistepScheduler(num_train_timesteps=1000, trained_betas=betas, timestep_spacing="linspace")
sampled("dpm", 6)
pipe.transformer.level = "softmax"
sampled("dpm at softmax", 6)
"""


@pytest.mark.parametrize("changes", [{}, DIFFUSERS_CONVENTIONS | {"learn_sigma": False}], ids=["official", "from diffusers"])
def test_a_dit_with_a_vae_samples_in_the_stock_pipeline_as_here(changes: dict[str, Any], tmp_path: Path) -> None:
    vae = tiny_vae(tmp_path / "vae")
    source = make_bundle(tmp_path / "bundle", small_model(family="dit", **changes))
    export(source, tmp_path / "out", to="diffusers", vae=tmp_path / "vae")
    assert not list((tmp_path / "out").glob("*.py"))
    found = elsewhere(tmp_path / "out", DIT_SCRIPT, tmp_path, betas=torch.from_numpy(BETAS))

    model = load_model(source)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    how: dict[str, Any] = {"solver": "dpm-solver++", "steps": 6, "cfg_scale": 4.0, "cfg_channels": "all", "noise": noise}
    assert_close(found["dpm"], sample(model, [1, 7], **how))
    assert_close(found["dpm at softmax"], sample(model, [1, 7], **how, schedule=SOFTMAX))
    assert not torch.allclose(found["dpm"], found["dpm at softmax"], atol=1e-2)
    with torch.no_grad():
        assert_close(found["dpm, pictures"], (vae.decode(found["dpm"] / 0.18215).sample / 2 + 0.5).clamp(0, 1))

    assert_close(found["ddim"], sample(model, [1, 7], **how | {"solver": "ddim", "steps": 5}))


BARE_DIT_SCRIPT = """
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
assert type(pipe).__name__ == "MediatorPipeline"
betas = given["betas"].double().numpy()
how = dict(class_labels=[1, 7], latents=given["noise"], output_type="latent")
pipe.scheduler = DPMSolverMultistepScheduler(num_train_timesteps=1000, trained_betas=betas, timestep_spacing="linspace")
results["dpm"] = pipe(**how, guidance_scale=1.5, num_inference_steps=6).images
pipe.scheduler = DDPMScheduler(trained_betas=betas, variance_type="learned_range", timestep_spacing="linspace", clip_sample=False)
results["ddpm"] = pipe(**how, num_inference_steps=5, generator=torch.Generator().manual_seed(5)).images
picture = pipe([1], num_inference_steps=2).images[0]
assert picture.size == (8, 8) and picture.mode == "RGB", picture
"""


def test_a_dit_of_pixels_samples_in_diffusers_without_a_vae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_bundle(tmp_path / "bundle", small_model(family="dit", channels=3))
    export(source, tmp_path / "out", to="diffusers")
    model = load_model(source)
    noise, _, _ = model_inputs(model, batch=2)
    found = elsewhere(tmp_path / "out", BARE_DIT_SCRIPT, tmp_path, noise=noise, betas=torch.from_numpy(BETAS))
    assert_close(found["dpm"], sample(model, [1, 7], solver="dpm-solver++", steps=6, cfg_scale=1.5, noise=noise))

    generator = torch.Generator().manual_seed(5)  # the scheduler draws from it once a step

    def drawn(sampler: Any, samples: Any, shape: Any, device: Any, count: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator)

    monkeypatch.setattr(sampling, "draw_noise", drawn)
    assert_close(found["ddpm"], sample(model, [1, 7], solver="ddpm", steps=5, noise=noise))


def test_a_vae_of_other_channels_is_refused(tmp_path: Path) -> None:
    tiny_vae(tmp_path / "vae")
    source = make_bundle(tmp_path / "bundle", small_model(channels=3))
    with pytest.raises(UserError, match="a VAE of 4 channels, where the model has 3"):
        export(source, tmp_path / "out", to="diffusers", vae=tmp_path / "vae")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "vae"]


HOLDING_SCRIPT = """
assert type(pipe).__name__ == "MediatorPipeline"
how = dict(latents=given["noise"], output_type="latent")
results["guided"] = pipe([1, 7], **how, num_inference_steps=8, guidance_scale=1.5).images
results["again"] = pipe([1, 7], **how, num_inference_steps=8, guidance_scale=1.5).images
results["unguided"] = pipe([1, 7], **how, num_inference_steps=8).images
results["other steps"] = pipe([1, 7], **how, num_inference_steps=13, guidance_scale=1.5).images
within = dict(guidance_scale=2.0, guidance_interval=(0.1, 0.6))  # softmax attention before it was of fewer rows
results["interval"] = pipe([1, 7], **how, num_inference_steps=8, **within).images
one = dict(latents=given["noise"][1:], output_type="latent")
results["one"] = pipe([7], **one, num_inference_steps=8, guidance_scale=1.5).images
pipe.transformer.level = 4
results["level 4"] = pipe([1, 7], **how, num_inference_steps=8).images
pipe.transformer.level = None
results["without a driver"] = pipe.transformer(given["noise"], timestep=given["t"], class_labels=torch.tensor([1, 7])).sample
"""


@pytest.mark.parametrize("changes", [{}, {"reversed_time": True}], ids=["sit", "repa"])
def test_a_sit_holds_in_diffusers_as_here(changes: dict[str, Any], tmp_path: Path) -> None:
    source = make_bundle(tmp_path / "bundle", holding(**changes))
    export(source, tmp_path / "out", to="diffusers")
    model = load_model(source)
    noise, _, _ = model_inputs(model, batch=2)
    t = process_of(model.arch).time_at(torch.tensor([0.125]))
    found = elsewhere(tmp_path / "out", HOLDING_SCRIPT, tmp_path, noise=noise, t=t)
    how: dict[str, Any] = {"solver": "euler", "noise": noise}
    guided = sample(model, [1, 7], **how, steps=8, cfg_scale=1.5)
    assert_close(found["guided"], guided)
    assert torch.equal(found["again"], found["guided"])  # nothing is left of the first run
    assert (guided - sample(model, [1, 7], **how, steps=8, cfg_scale=1.5, schedule=IN_FULL)).abs().max() > 2e-3
    assert_close(found["unguided"], sample(model, [1, 7], **how, steps=8))
    assert_close(found["other steps"], sample(model, [1, 7], **how, steps=13, cfg_scale=1.5))
    within: dict[str, Any] = {"cfg_scale": 2.0, "cfg_interval": (0.1, 0.6)}
    assert_close(found["interval"], sample(model, [1, 7], **how, steps=8, **within))
    assert_close(found["one"], guided[1:])
    assert_close(found["level 4"], sample(model, [1, 7], **how, steps=8, schedule=4))
    expected = model(noise, t.expand(2), torch.tensor([1, 7]), levels=[SOFTMAX, "softmax|1/4"])
    assert_close(found["without a driver"], expected)


HOLDING_DIT_SCRIPT = """
from diffusers import DPMSolverMultistepScheduler
assert type(pipe).__name__ == "MediatorPipeline"
how = dict(class_labels=[1, 7], guidance_scale=1.5, latents=given["noise"], output_type="latent", guided_channels=None)
results["ddim"] = pipe(**how, num_inference_steps=8).images
betas = given["betas"].double().numpy()
pipe.scheduler = DPMSolverMultistepScheduler(num_train_timesteps=1000, trained_betas=betas, timestep_spacing="linspace")
results["dpm"] = pipe(**how, num_inference_steps=8).images
results["again"] = pipe(**how, num_inference_steps=8).images
"""


def test_a_dit_holds_in_diffusers_as_here_with_a_vae_too(tmp_path: Path) -> None:
    """The stock pipeline keeps no memory: with a VAE too the pipeline that travels is exported."""
    tiny_vae(tmp_path / "vae")
    source = make_bundle(tmp_path / "bundle", holding(family="dit"))
    export(source, tmp_path / "out", to="diffusers", vae=tmp_path / "vae")
    model = load_model(source)
    noise, _, _ = model_inputs(model, batch=2)
    found = elsewhere(tmp_path / "out", HOLDING_DIT_SCRIPT, tmp_path, noise=noise, betas=torch.from_numpy(BETAS))
    how: dict[str, Any] = {"solver": "dpm-solver++", "steps": 8, "cfg_scale": 1.5, "cfg_channels": "all", "noise": noise}
    assert_close(found["dpm"], sample(model, [1, 7], **how))
    assert torch.equal(found["again"], found["dpm"])
    assert (found["dpm"] - sample(model, [1, 7], **how, schedule=IN_FULL)).abs().max() > 2e-3
    assert_close(found["ddim"], sample(model, [1, 7], **how | {"solver": "ddim"}))


RULE_SCRIPT = """
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
made, original = [], pipe.transformer.driver
def driver(*arguments):
    made.append(original(*arguments))
    return made[-1]
pipe.transformer.driver = driver
assert type(pipe).__name__ == "MediatorPipeline"
if "betas" in given:
    betas = given["betas"].double().numpy()
    pipe.scheduler = DPMSolverMultistepScheduler(num_train_timesteps=1000, trained_betas=betas, timestep_spacing="linspace")
how = dict(num_inference_steps=16, guidance_scale=1.5, latents=given["noise"], output_type="latent", guided_channels=None)
for name in ("sampled", "again"):
    results[name] = pipe([1, 7, 3], **how).images
    results[f"{name}, switches"] = made[-1].switches
"""


@pytest.mark.parametrize("per", ["batch", "sample"])
@pytest.mark.parametrize(("family", "solver", "ratios"), [("sit", "euler", (0.999, 0.99)), ("dit", "dpm-solver++", (3.0, 1.92))])
def test_the_step_wise_rule_switches_in_diffusers_as_here(family: str, solver: str, ratios: Any, per: Any, tmp_path: Path) -> None:
    """The pipeline that travels has the rule with a VAE too; a second run begins anew."""
    tiny_vae(tmp_path / "vae")
    source = make_bundle(tmp_path / "bundle", by_rule(per, ratios, family=family))
    export(source, tmp_path / "out", to="diffusers", vae=tmp_path / "vae")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "step-wise rule of arXiv 2408.05710: m=1, then m=4, then softmax; first 2" in card
    assert "as loaded it follows the step-wise rule" in card
    model, (noise, _, _) = load_model(source), model_inputs(small_model(None), batch=3)
    betas = {"betas": torch.from_numpy(BETAS)} if family == "dit" else {}
    found = elsewhere(tmp_path / "out", RULE_SCRIPT, tmp_path, noise=noise, **betas)
    sampler = Sampler.resolve(model.arch, solver=solver, steps=16, cfg_scale=1.5, cfg_channels="all")
    drive = sampling.driver_of(model, sampler, model.schedule, 3)
    assert isinstance(drive, Switcher)
    assert_close(found["sampled"], sampling.sample_batch(model, [1, 7, 3], sampler, noise=noise, drive=drive))
    assert found["sampled, switches"].tolist() == drive.switches.tolist()
    assert (drive.switches >= 4).any()  # after two first changes
    assert (len(set(map(tuple, drive.switches.tolist()))) > 1) == (per == "sample")
    assert torch.equal(found["again"], found["sampled"])
    assert torch.equal(found["again, switches"], found["sampled, switches"])


@pytest.mark.parametrize("adapter", [False, True])
def test_a_step_wise_rule_comes_back_from_safetensors_and_no_program_has_it(adapter: bool, tmp_path: Path) -> None:
    source = make_bundle(tmp_path / "bundle", by_rule("sample", (0.9, 0.5)))
    export(source, tmp_path / "out", to="safetensors", adapter=adapter)
    base = tmp_path / "base.pt"
    torch.save(official_state(load_model(source)), base)
    told: dict[str, Any] = {"family": "sit", "num_heads": 2, "adapter": tmp_path / "out"} if adapter else {}
    back = load_model(base if adapter else tmp_path / "out", **told)
    assert back.schedule == load_model(source).schedule
    with pytest.raises(UserError, match="which no program does"):
        export(source, tmp_path / "programs", to="torch-export")
    assert not (tmp_path / "programs").exists()


TRANSFORMER_SCRIPT = """
x, y = given["x"], given["y"]
transformer = pipe.transformer
assert (transformer.config.sample_size, transformer.config.in_channels, transformer.config.out_channels) == (8, 4, 8)
for t in (0, 249, 250, 999):
    results[str(t)] = transformer(x, timestep=torch.tensor(t), class_labels=y, return_dict=False)[0]
results["null"] = transformer(x, timestep=torch.tensor([700]), class_labels=torch.full_like(y, 1000)).sample
try:
    transformer(x, timestep=torch.tensor([0, 999, 0]), class_labels=y)
    raise SystemExit("two pieces in one call")
except ValueError as error:
    assert "cannot mix" in str(error)
half = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.bfloat16)
assert half.transformer.dtype == torch.bfloat16
results["half"] = half.transformer(x.bfloat16(), timestep=torch.tensor([700]), class_labels=y).sample.float()
results["latents"] = half(class_labels=[1], num_inference_steps=2).images
"""


def test_the_transformer_takes_its_level_from_the_timestep(tmp_path: Path) -> None:
    source = make_bundle(tmp_path / "bundle", small_model(family="dit"))
    export(source, tmp_path / "out", to="diffusers")
    model = load_model(source)
    x, _, y = model_inputs(model)
    found = elsewhere(tmp_path / "out", TRANSFORMER_SCRIPT, tmp_path, x=x, y=y)
    for t, piece in ((0, 0), (249, 0), (250, 1), (999, 2)):
        expected = model(x, torch.full((3,), float(t)), y, levels=SCHEDULE.levels[piece])
        assert torch.equal(found[str(t)], expected)
    at_700 = {"t": torch.full((3,), 700.0), "levels": SCHEDULE.levels[2]}
    assert torch.equal(found["null"], model(x, y=torch.full((3,), 10), **at_700))
    half = model(x, y=y, **at_700)
    assert (found["half"] - half).norm() < 0.05 * half.norm()
    assert found["latents"].isfinite().all()


AGAIN_SCRIPT = """
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
def sampled(pipe):
    return pipe([1, 7], num_inference_steps=4, generator=torch.Generator().manual_seed(5), output_type="np").images
first = sampled(pipe)
pipe.save_pretrained("again")
again = DiffusionPipeline.from_pretrained("again", trust_remote_code=True)
again.set_progress_bar_config(disable=True)
assert type(again) is not type(pipe) or type(pipe) is diffusers.DiTPipeline
assert (sampled(again) == first).all()
again.save_pretrained("once more")
assert (sampled(DiffusionPipeline.from_pretrained("once more", trust_remote_code=True)) == first).all()
backends, used, math = _AttentionBackendRegistry._backends, [], AttentionBackendName._NATIVE_MATH
own = backends[math]
backends[math] = lambda **given: (used.append(1), own(**given))[1]
again.transformer.level = "softmax"
results["softmax"] = torch.from_numpy(sampled(again))
assert not used
again.transformer.set_attention_backend("_native_math")
results["math"] = torch.from_numpy(sampled(again))
assert len(used) == 4 * 2, used
"""


@pytest.mark.parametrize(("family", "vae"), [("sit", False), ("dit", True)], ids=["ours", "stock"])
def test_pipelines_are_saved_again_with_their_code(family: str, vae: bool, tmp_path: Path) -> None:
    """The copy and its copy load elsewhere and sample the same; attention at softmax runs by the backend that is chosen."""
    if vae:
        tiny_vae(tmp_path / "vae")
    source = make_bundle(tmp_path / "bundle", small_model(family=family, channels=4 if vae else 3))
    export(source, tmp_path / "out", to="diffusers", vae=tmp_path / "vae" if vae else None)
    found = elsewhere(tmp_path / "out", AGAIN_SCRIPT, tmp_path)
    assert_close(found["math"], found["softmax"])


def test_a_pipeline_in_bfloat16_has_weights_of_half_the_size(sit: Path, tmp_path: Path) -> None:
    result = export(sit, tmp_path / "out", to="diffusers", dtype="bfloat16")
    stored = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    assert result.verified.largest <= 1e-4 < result.verified.rounding
    assert "torch_dtype=torch.bfloat16" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_begins_with_what_the_hub_reads(sit: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    export(sit, tmp_path / "named", to="safetensors", base_model="someone/SiT-XL-2", license="mit")
    found = ModelCard((tmp_path / "named" / "README.md").read_text()).data
    assert (found.license, found.base_model, found.library_name) == ("mit", "someone/SiT-XL-2", "mediatorize")
    unnamed = ModelCard(hub_header("diffusers", None, None) + "# Title").data
    assert (unnamed.license, unnamed.base_model, unnamed.library_name) == ("other", None, "diffusers")
    for wrong, message in (({"license": "My Own"}, "no name of a licence"), ({"base_model": "SiT.pt"}, "no name on the Hub")):
        with pytest.raises(UserError, match=message):
            export(sit, tmp_path / "out", to="official", **wrong)
    assert not (tmp_path / "out").exists()


# --- the code that travels -----------------------------------------------------------------------------------------------------


def test_the_code_that_travels_needs_neither_mediatorize_nor_timm() -> None:
    for entry in ("transformer", "pipeline"):
        code = standalone(f"mediatorize.export.travelling.{entry}", "title")
        compile(code, entry, "exec")
        assert "import mediatorize" not in code
        assert "from mediatorize" not in code
        assert "timm.layers" not in code


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("from mediatorize.model.architecture import Family\n\ndef preset():\n    pass\n", "preset comes from"),
        ("import mediatorize.errors\n", "write `from mediatorize.errors import"),
        ("def f():\n    import mediatorize.errors as e\n", "line 2: write `from mediatorize.errors import"),
        ("def f():\n    from mediatorize.errors import UserError as E\n", "line 2: inside a function"),
        ("def f():\n    from mediatorize.model import forms\n", "line 2: inside a function"),
    ],
)
def test_code_that_cannot_travel_is_refused(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stranger.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(NotImplementedError, match=message):
        standalone("stranger", "title")


def run_alone(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a module of that text defines when it is made standalone and run where mediatorize cannot be imported."""
    (tmp_path / "stranger.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    code = standalone("stranger", "title")
    for name in [name for name in sys.modules if name.partition(".")[0] in ("mediatorize", "timm")]:
        monkeypatch.setitem(sys.modules, name, None)
    names: dict[str, Any] = {"__name__": __name__}
    exec(code, names)
    return names


def test_modules_and_renamed_names_resolve_in_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imports = "from mediatorize.model import forms\nfrom mediatorize.model.architecture import coarse_grid as cells\n"
    names = run_alone(imports + "\nVALUE = (forms.local_flops(4, 2, 1), cells((3, 40)))\n", tmp_path, monkeypatch)
    assert names["VALUE"] == (4 * 4 * 2 + 18 * 4, (3, 16))


def test_imports_inside_functions_and_for_types_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mediatorize.model.forms import (
        local_flops,
        plain_flops,
    )


def cells(grid):
    from mediatorize.model.architecture import coarse_grid
    if grid:
        from mediatorize.model.schedule import Schedule  # in a block of its own

    return coarse_grid(grid), Schedule.__name__


def mlp() -> str:
    import math

    from timm.layers import Mlp

    return f"{Mlp.__name__} {math.pi:.2f}"
"""
    names = run_alone(text, tmp_path, monkeypatch)
    assert names["cells"]((3, 40)) == ((3, 16), "Schedule")
    assert names["mlp"]() == "Mlp 3.14"
    assert names["local_flops"](4, 2, 1) == 4 * 4 * 2 + 18 * 4


# --- safetensors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_safetensors_load_again_as_they_were_rounded(dtype: str, sit: Path, tmp_path: Path) -> None:
    verified = export(sit, tmp_path / "out", to="safetensors", dtype=dtype).verified
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    assert {tensor.dtype for tensor in read_safetensors(tmp_path / "out" / "model.safetensors")[0].values()} == {kind}
    assert (verified.rounding == 0) == (dtype == "float32")
    assert verified.rounding < 0.1
    found, model = load_model(tmp_path / "out"), load_model(sit)
    assert found.schedule == model.schedule
    for name, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value.to(kind).float()), name


def test_values_that_a_type_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = small_model()
    model.final_layer.linear.weight[0, 0] = 1e6
    source = make_bundle(tmp_path / "bundle", model)
    with pytest.raises(UserError, match=r"final_layer\.linear\.weight does not fit float16"):
        export(source, tmp_path / "out", to="safetensors", dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("adapter", [False, True])
def test_a_schedule_with_held_rests_comes_back_from_safetensors(adapter: bool, tmp_path: Path) -> None:
    model = holding()
    source = make_bundle(tmp_path / "bundle", model)
    export(source, tmp_path / "out", to="safetensors", adapter=adapter)
    torch.save(official_state(model), tmp_path / "base.pt")
    if adapter:
        found = load_model(tmp_path / "base.pt", family="sit", num_heads=2, adapter=tmp_path / "out")
    else:
        found = load_model(tmp_path / "out")
    assert found.schedule == HOLDING
    assert found.settings == NARROW
    how: dict[str, Any] = {"steps": 8, "cfg_scale": 1.5}
    assert torch.equal(sample(found, [1, 7], **how), sample(model, [1, 7], **how))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_what_was_added_and_fits_its_base_alone(dtype: str, sit: Path, tmp_path: Path) -> None:
    export(sit, tmp_path / "out", to="safetensors", adapter=True, dtype=dtype)
    model = load_model(sit)
    stored = read_safetensors(tmp_path / "out" / "adapter.safetensors")[0]
    assert set(stored) == {name for name in model.state_dict() if ".mediator." in name}

    torch.save(official_state(model), tmp_path / "base.pt")
    hints: dict[str, Any] = {"family": "sit", "num_heads": 2, "adapter": tmp_path / "out"}
    found = load_model(tmp_path / "base.pt", **hints)
    assert found.schedule == SCHEDULE
    assert found.settings == SETTINGS
    for name, value in model.state_dict().items():
        expected = value.bfloat16().float() if dtype == "bfloat16" and ".mediator." in name else value
        assert torch.equal(found.state_dict()[name], expected), name

    other = official_state(model)
    other["blocks.0.attn.qkv.bias"][0] += 1e-6
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"belongs to another base .* Load it on source\.pt") as caught:
        load_model(tmp_path / "other.pt", **hints)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="another architecture"):
        load_model(tmp_path / "base.pt", **hints | {"num_heads": 4})
    with pytest.raises(UserError, match="has mediators already"):
        load_model(sit, adapter=tmp_path / "out")
    with pytest.raises(UserError, match="is no adapter"):
        load_model(tmp_path / "base.pt", **hints | {"adapter": sit})


def test_a_damaged_adapter_is_refused(sit: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(sit, out, to="safetensors", adapter=True)
    torch.save(official_state(load_model(sit)), tmp_path / "base.pt")
    file = out / "adapter.safetensors"
    whole = file.read_bytes()

    def refusal() -> str:
        with pytest.raises(UserError) as caught:
            load_model(tmp_path / "base.pt", family="sit", num_heads=2, adapter=out)
        assert str(out) in caught.value.message
        return caught.value.message

    file.write_bytes(whole[:-10])
    assert "not a whole safetensors file" in refusal()
    file.write_bytes(whole)
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    assert f"{name} is missing" in refusal()
    save_file(tensors | {name: torch.full_like(tensors[name], torch.nan)}, file)
    assert "NaN" in refusal()


# --- torch-export --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sit", "dit"])
def test_programs_repeat_the_model_for_any_batch(family: Any, tmp_path: Path) -> None:
    source = make_bundle(tmp_path / "bundle", small_model(family=family))
    export(source, tmp_path / "out", to="torch-export")
    model = load_model(source)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert len(index["programs"]) == 3
    for noise, piece in ((0.0, 0), (0.25, 1), (0.3, 1), (0.5, 2), (1.0, 2)):
        name = [entry["program"] for entry in index["pieces"] if entry["noise_from"] <= noise][-1]
        assert tuple(index["programs"][name]) == SCHEDULE.at(noise) == SCHEDULE.levels[piece]
        program = torch.export.load(tmp_path / "out" / name)
        assert {len(value.users) > 0 for value in program.graph.nodes if value.op == "placeholder"} == {True}
        for batch in (1, 2, 5):
            x, t, y = model_inputs(model, batch)
            expected = model(x, t, y, levels=SCHEDULE.levels[piece])
            assert_close(program.module()(x, t, y), expected)


def test_one_program_serves_pieces_of_the_same_levels(tmp_path: Path) -> None:
    schedule = Schedule((0.25, 0.5), ((1, 4), (4, 4), (1, 4)))
    source = make_bundle(tmp_path / "bundle", small_model(schedule))
    export(source, tmp_path / "out", to="torch-export")
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert [entry["program"] for entry in index["pieces"]] == ["program-000.pt2", "program-001.pt2", "program-000.pt2"]
    assert len(list((tmp_path / "out").glob("*.pt2"))) == 2


# --- official ------------------------------------------------------------------------------------------------------------------


def test_official_weights_come_back_bit_for_bit(sit: Path, tmp_path: Path) -> None:
    export(sit, tmp_path / "out", to="official")
    found = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    expected = official_state(small_model())
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("changes", "whose"), [(DIFFUSERS_CONVENTIONS | {"family": "dit"}, "diffusers' DiT"), ({"reversed_time": True}, "REPA's SiT")]
)
def test_weights_that_official_code_would_misread_are_refused(changes: dict[str, Any], whose: str, tmp_path: Path) -> None:
    source = make_bundle(tmp_path / "bundle", small_model(**changes))
    with pytest.raises(UserError, match=whose):
        export(source, tmp_path / "out", to="official")


@pytest.mark.parametrize("options", [{"to": "official"}, {"to": "safetensors", "adapter": True}], ids=["official", "adapter"])
def test_weights_that_changed_are_not_called_the_pretrained(options: dict[str, Any], sit: Path, tmp_path: Path) -> None:
    file = sit / "model.safetensors"
    tensors = load_file(file)
    tensors["pos_embed"][0, 0, 0] += 1e-3
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"no longer those of source\.pt"):
        export(sit, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
