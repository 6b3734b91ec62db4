"""Plans from the command line: calibrate, sample, inspect, export; and the scheduler in diffusers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import in_two_processes, tiny_model
from safetensors.torch import save_file
from torch import Tensor

import mediatorize as mz
from mediatorize import cli
from mediatorize.diffusion.plan import Plan
from mediatorize.errors import UserError
from mediatorize.export import scheduler as exporting
from mediatorize.formats.plans import read_plans, write_plans
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.planning.fit import analytic
from mediatorize.planning.search import Wanted
from mediatorize.report import plans as told
from mediatorize.stages.calibrate import calibrate
from mediatorize.stages.convert import convert
from mediatorize.stages.export import export
from mediatorize.stages.inspect import inspect
from mediatorize.stages.plans import calls_within
from mediatorize.stages.sample import sample

QUICK: dict[str, Any] = {"samples": 8, "verify": 4, "device": "cpu", "family": "sit", "num_heads": 3}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SiT of pictures."""
    file = tmp_path_factory.mktemp("checkpoint") / "sit.safetensors"
    model = tiny_model(family="sit", learn_sigma=False, channels=1)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, file)
    return file


@pytest.fixture(scope="module")
def planned(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its plans of 3 and 4 calls."""
    out = tmp_path_factory.mktemp("plans") / "plan.json"
    calibrate(checkpoint, calls=(3, 4), out=out, cfg_scale=2.0, **QUICK)
    return out


def plan_of(calls: int = 3, process: str = "flow", channels: int = 4, **wanted: Any) -> Plan:
    asked = Wanted(process=process, shape=(channels, 8, 8), **wanted)
    return analytic(asked.plan(asked.times(calls, 1.0, 1.4)), asked.shape)


# --- calibrate -----------------------------------------------------------------------------------------------------------------


def test_calibrate_writes_plans_that_say_what_they_were_made_for(checkpoint: Path, planned: Path) -> None:
    plans = read_plans(planned)
    assert set(plans) == {3, 4}
    for count, plan in plans.items():
        assert len(plan.calls) == count
        assert plan.cfg_scale == 2.0
        assert plan.rows == (2,) * count
        assert plan.errors["samples"] == 8
        assert plan.errors["interval"][0] <= plan.errors["median"] <= plan.errors["interval"][1]
        assert plan.made_for["dtype"] == "float32"
        assert len(plan.made_for["weights"]) == 64
        assert plan.made_for["reference"]["calls"] >= 60
    assert not planned.with_name("plan.json.work").exists()


def test_calibrate_tells_errors_beside_other_solvers(checkpoint: Path, tmp_path: Path) -> None:
    result = calibrate(checkpoint, calls=(4,), out=tmp_path / "plan.json", **QUICK)
    words, facts = told.words(result), told.facts(result)
    found = result.plans.found[4]  # type: ignore[union-attr]
    assert set(found.others) == {"euler", "heun", "unipc"}
    assert f"{found.reported.median:.4f}" in words
    assert f"euler with 50 steps: median error {result.plans.many['euler'].median:.4f}." in words  # type: ignore[union-attr]
    assert facts["plans"][0]["error"]["median"] == found.reported.median < found.others["euler"].median
    assert json.loads(json.dumps(facts)) == facts


def test_the_same_command_gives_the_same_plans(checkpoint: Path, planned: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.json"
    calibrate(checkpoint, calls=(3, 4), out=again, cfg_scale=2.0, **QUICK)
    assert read_plans(again) == read_plans(planned)


def test_calibrate_resumes_after_a_kill(checkpoint: Path, planned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mediatorize.planning import search

    out, real, found = tmp_path / "plan.json", search.find, []

    def find(denoise: Any, wanted: Any, count: int, *sets: Any) -> Any:
        found.append(count)
        if len(found) == 2:
            raise KeyboardInterrupt
        return real(denoise, wanted, count, *sets)

    monkeypatch.setattr(search, "find", find)
    with pytest.raises(KeyboardInterrupt):
        calibrate(checkpoint, calls=(3, 4), out=out, cfg_scale=2.0, **QUICK)
    assert not out.exists()
    calibrate(checkpoint, calls=(3, 4), out=out, cfg_scale=2.0, **QUICK)
    assert found == [3, 4, 4]
    assert read_plans(out) == read_plans(planned)


def test_two_processes_find_the_plans_of_one(checkpoint: Path, planned: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    arguments = ["--calls", "3,4", "--cfg-scale", "2", "--samples", "8", "--verify", "4", "--family", "sit", "--num-heads", "3"]
    in_two_processes("calibrate", str(checkpoint), *arguments, "--out", str(out), "--device", "cpu")
    for count, plan in read_plans(planned).items():
        other = read_plans(out)[count]
        assert [call.t for call in other.calls] == pytest.approx([call.t for call in plan.calls], abs=1e-3)
        assert other.errors["median"] == pytest.approx(plan.errors["median"], rel=0.05)


def test_a_dry_run_predicts_and_writes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    result = calibrate(checkpoint, calls=(4, 6), out=tmp_path / "plan.json", dry_run=True, **QUICK)
    assert result.plans is None  # type: ignore[union-attr]
    assert result.model_rows > 0  # type: ignore[union-attr]
    assert "Nothing was written" in told.words(result)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_budget_of_a_checkpoint_is_a_number_of_calls(checkpoint: Path, tmp_path: Path) -> None:
    result = calibrate(checkpoint, budgets=("8%", 0.06), out=tmp_path / "plan.json", dry_run=True, **QUICK)
    assert result.calls == (3, 4)  # type: ignore[union-attr]
    assert calls_within([0.08], 50) == (4,)
    assert calls_within([0.5], 25) == (12,)
    with pytest.raises(UserError, match=r"pays for 1; a plan has at least 2.*--budget 0\.04"):
        calls_within([0.03], 50)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calls": (1,)}, "at least 2 calls"),
        ({"calls": (4,), "budget": 0.5}, "A number of calls is a budget"),
        ({"calls": (4,), "steps": 10}, "--steps says nothing to plans"),
        ({"calls": (4,), "kinds": ("mediators",)}, "--calls is for plans, and --kinds or --rule ask for a schedule"),
        ({}, "No number of calls and no budget"),
        ({"calls": (4,), "samples": 0}, "--samples 0 is too small"),
        ({"calls": (4,), "out": Path("nowhere/plan.json")}, "its folder does not exist"),
    ],
)
def test_bad_input_is_refused_before_work(checkpoint: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        calibrate(checkpoint, **{**QUICK, **arguments})


def test_guidance_without_a_null_class_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "sit.safetensors"
    model = tiny_model(family="sit", learn_sigma=False, channels=1, null_class=False)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, file)
    with pytest.raises(UserError, match="no null class"):
        calibrate(file, calls=(4,), cfg_scale=2.0, num_classes=10, **QUICK)


def test_plans_are_not_replaced_without_force(checkpoint: Path, planned: Path) -> None:
    before = planned.read_text()
    with pytest.raises(UserError, match=r"exists.*--force"):
        calibrate(checkpoint, calls=(3,), out=planned, **QUICK)
    assert planned.read_text() == before


# --- sample --------------------------------------------------------------------------------------------------------------------


def test_sample_by_a_plan_is_the_library_s(checkpoint: Path, planned: Path, tmp_path: Path) -> None:
    import numpy as np

    out = tmp_path / "x.npz"
    result = sample(str(checkpoint), out=out, plan=planned, calls=3, classes=(1, 2), family="sit", num_heads=3, seed=7, device="cpu")
    model = mz.load_model(checkpoint, family="sit", num_heads=3)
    expected = mz.sample(model, [1, 2], plan=mz.load_plan(planned, calls=3), seed=7)
    pixels = ((expected.clamp(-1, 1) + 1) * 127.5).round()
    assert np.abs(np.load(out)["arr_0"][..., 0].astype(float) - pixels[:, 0].numpy()).max() <= 1
    assert result.plan == f"{planned}, 3 calls"
    assert result.flops == pytest.approx(result.softmax_flops * 3 / 50)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calls": 5}, "no plan of 5 calls; there are plans of 3, 4"),
        ({"cfg_scale": 4.0}, r"cfg-scale is 2, not 4\. Run `mediatorize calibrate --calls 4 --cfg-scale 4`"),
        ({"cfg_channels": "all"}, "cfg-channels is 3, not all"),
        ({"cfg_interval": (0.0, 0.5)}, "cfg-interval is 0,1, not 0,0.5"),
        ({"timestep_shift": 0.3}, "timestep-shift is 1, not 0.3"),
        ({"steps": 9}, "so does --steps"),
        ({"solver": "dopri5"}, "so does --solver"),
        ({"level": "softmax"}, "so does --level"),
    ],
)
def test_what_a_plan_does_not_have_is_refused(
    checkpoint: Path, planned: Path, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    out = tmp_path / "x.npz"
    with pytest.raises(UserError, match=message):
        sample(str(checkpoint), out=out, plan=planned, family="sit", num_heads=3, device="cpu", **arguments)
    assert not out.exists()


def test_a_plan_of_other_weights_is_refused(planned: Path, tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    model = tiny_model(family="sit", learn_sigma=False, channels=1, seed=1)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, file)
    with pytest.raises(UserError, match="fitted to other weights"):
        sample(str(file), out=tmp_path / "x.npz", plan=planned, family="sit", num_heads=3, device="cpu")


def test_another_precision_warns(checkpoint: Path, planned: Path, tmp_path: Path) -> None:
    result = sample(
        str(checkpoint), out=tmp_path / "x.npz", plan=planned, classes=(1,), family="sit", num_heads=3, device="cpu", dtype="bfloat16"
    )
    assert result.warnings == ("the plan was fitted in float32, and this sampled in bfloat16",)


def test_a_model_without_a_plan_says_how_to_make_one(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no plan.*calibrate .* --calls 4"):
        sample(str(checkpoint), out=tmp_path / "x.npz", calls=4, family="sit", num_heads=3, device="cpu")


def test_a_bundle_is_sampled_by_its_plan_without_flags(checkpoint: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    convert(
        str(checkpoint), bundle, family="sit", num_heads=3, levels=(1,), fit_steps=2, states=16, trajectories=2, cfg_scale=1.0, device="cpu"
    )
    calibrate(bundle, calls=(3,), samples=8, verify=4, device="cpu")
    assert (bundle / "plan.json").exists()
    assert sample(str(bundle), out=tmp_path / "x.npz", classes=(1,), device="cpu").plan == f"{bundle / 'plan.json'}, 3 calls"
    assert sample(str(bundle), out=tmp_path / "y.npz", classes=(1,), level="softmax", device="cpu").plan is None
    with pytest.raises(UserError, match="--out is for plans"):
        calibrate(bundle, budget=0.9, kinds=("mediators",), out=tmp_path / "plan.json", device="cpu")


# --- Python, inspect -----------------------------------------------------------------------------------------------------------


def test_calibrate_in_python_gives_plans_by_calls() -> None:
    model = tiny_model(family="sit", learn_sigma=False, channels=1)
    plans = mz.calibrate(model, calls=[2, 3], samples=8)
    assert set(plans) == {2, 3}
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    converged = mz.sample(model, [1, 2], solver="euler", steps=1000, noise=noise)
    far = [float((mz.sample(model, [1, 2], plan=plan, noise=noise) - converged).norm()) for plan in plans.values()]
    euler = float((mz.sample(model, [1, 2], solver="euler", steps=3, noise=noise) - converged).norm())
    assert far[1] < euler


def test_inspect_tells_what_is_in_a_plan_file(planned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = inspect(str(planned))
    text = cli.COMMANDS["inspect"].words(result)
    assert "process flow, 1 channels" in text
    assert "guided" in text
    facts = cli.COMMANDS["inspect"].facts(result)
    assert [len(plan["calls"]) for plan in facts["plans"]] == [3, 4]
    assert json.loads(json.dumps(facts)) == facts


# --- the scheduler -------------------------------------------------------------------------------------------------------------


def by_scheduler(scheduler: Any, model: DiffusionTransformer, labels: Tensor, noise: Tensor, calls: int, scale: float) -> Tensor:
    """As pipelines sample: guidance of all channels, timesteps as the scheduler gives them."""
    flow = model.arch.family == "sit"
    scheduler.set_timesteps(calls)
    x = noise * scheduler.init_noise_sigma
    null = torch.full_like(labels, model.arch.classes)
    for timestep in scheduler.timesteps:
        t = 1 - timestep / 1000 if flow else timestep
        output = model(torch.cat([x, x]), t.expand(2 * len(x)), torch.cat([labels, null]))[:, : model.arch.channels]
        cond, uncond = output.chunk(2)
        guided = uncond + scale * (cond - uncond)
        x = scheduler.step(-guided if flow else guided, timestep, scheduler.scale_model_input(x, timestep), return_dict=False)[0]
    return x


@pytest.mark.parametrize(("family", "process"), [("sit", "flow"), ("dit", "ddpm")])
def test_the_scheduler_in_a_pipeline_s_loop_is_the_plan(family: str, process: str, tmp_path: Path) -> None:
    model = tiny_model(family=family, learn_sigma=family == "dit")
    plans = {count: plan_of(count, process, cfg_scale=2.0, cfg_channels="all") for count in (3, 5)}
    write_plans(tmp_path / "plan.json", plans)
    result = export(tmp_path / "plan.json", tmp_path / "scheduler", to="scheduler")
    assert result.calls == (3, 5)  # type: ignore[union-attr]
    scheduler = exporting.load(tmp_path / "scheduler")
    labels, noise = torch.tensor([1, 2]), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for count in (5, 3, 5):
        expected = mz.sample(model, labels, plan=plans[count], noise=noise)
        found = by_scheduler(scheduler, model, labels, noise, count, 2.0)
        assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


def test_the_scheduler_is_saved_and_loaded_again(tmp_path: Path) -> None:
    write_plans(tmp_path / "plan.json", {3: plan_of()})
    export(tmp_path / "plan.json", tmp_path / "scheduler", to="scheduler")
    scheduler = exporting.load(tmp_path / "scheduler")
    scheduler.save_pretrained(tmp_path / "again")
    code = (tmp_path / "again" / "mediator_plan_scheduler.py").read_text()
    assert "import mediatorize" not in code
    assert "from mediatorize" not in code
    again = exporting.load(tmp_path / "again")
    assert {count: plan.to_json() for count, plan in again.plans.items()} == {3: plan_of().to_json()}
    assert torch.equal(again.timesteps, scheduler.timesteps)


def test_the_scheduler_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    write_plans(tmp_path / "plan.json", {3: plan_of()})
    export(tmp_path / "plan.json", tmp_path / "scheduler", to="scheduler")
    scheduler, x = exporting.load(tmp_path / "scheduler"), torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match=r"no plan of 20 calls: pass num_inference_steps of 3\."):
        scheduler.set_timesteps(20)
    with pytest.raises(ValueError, match="leave `strength` out"):
        scheduler.step(x, scheduler.timesteps[1], x)
    scheduler.set_timesteps(3)
    for timestep in scheduler.timesteps:
        scheduler.step(x, timestep, x)
    with pytest.raises(ValueError, match="set_timesteps before every run"):
        scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="not all among"):
        scheduler.add_noise(x, x, torch.tensor([123.0]))


def test_the_scheduler_adds_noise_as_the_plan_has_it(tmp_path: Path) -> None:
    plan = plan_of(process="ddpm")
    write_plans(tmp_path / "plan.json", {3: plan})
    export(tmp_path / "plan.json", tmp_path / "scheduler", to="scheduler")
    scheduler, data, noise = exporting.load(tmp_path / "scheduler"), torch.ones(2, 4, 8, 8), torch.full((2, 4, 8, 8), 2.0)
    found = scheduler.add_noise(data, noise, scheduler.timesteps[torch.tensor([2, 0])])
    for row, call in zip(found, (plan.calls[2], plan.calls[0]), strict=True):
        assert torch.allclose(row, torch.full_like(row, call.signal + 2 * call.noise), atol=1e-5)


def test_plans_with_both_halves_or_levels_are_not_schedulers(tmp_path: Path) -> None:
    halves = plan_of(cfg_scale=2.0, streams="halves")
    levels = replace(plan_of(), calls=tuple(replace(call, levels=("softmax", 4, 1)) for call in plan_of().calls))
    for plan in (halves, levels):
        write_plans(tmp_path / "plan.json", {3: plan})
        with pytest.raises(UserError, match="both halves of guidance, or levels"):
            export(tmp_path / "plan.json", tmp_path / "scheduler", to="scheduler")
        assert not (tmp_path / "scheduler").exists()
    with pytest.raises(UserError, match="--prune says nothing to --to scheduler"):
        export(tmp_path / "plan.json", tmp_path / "scheduler", to="scheduler", prune=True)
    with pytest.raises(UserError, match="cannot be read"):
        export(tmp_path / "none.json", tmp_path / "scheduler", to="scheduler")


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
def test_the_stock_dit_pipeline_samples_by_a_plan(tmp_path: Path) -> None:
    """diffusers' own DiT, pipeline and VAE, of random weights; beside the same weights loaded here, sampled by the plan."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8
    )
    for parameter in transformer.parameters():
        parameter.data = 0.1 * torch.randn_like(parameter)
    for block in transformer.transformer_blocks[1:]:  # as trained ones have them: a copy in every block
        block.norm1.emb.load_state_dict(transformer.transformer_blocks[0].norm1.emb.state_dict())
    vae = AutoencoderKL(block_out_channels=(32,), latent_channels=4)
    transformer.save_pretrained(tmp_path / "pipeline" / "transformer")
    pipe = DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler())
    pipe.save_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    plan = plan_of(4, "ddpm", cfg_scale=3.0, cfg_channels="all")
    write_plans(tmp_path / "plan.json", {4: plan})
    export(tmp_path / "plan.json", tmp_path / "scheduler", to="scheduler")
    pipe.scheduler = exporting.load(tmp_path / "scheduler")
    draw = torch.Generator().manual_seed(5)
    found = torch.from_numpy(pipe([1, 7], num_inference_steps=4, guidance_scale=3.0, generator=draw, output_type="np").images)

    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    latents = mz.sample(mz.load_model(tmp_path / "pipeline"), [1, 7], plan=plan, noise=noise)
    with torch.no_grad():
        pictures = vae.decode(latents / vae.config.scaling_factor).sample
    expected = (pictures / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert float(expected.std()) > 0.05
    assert torch.allclose(found, expected, atol=1e-3)
