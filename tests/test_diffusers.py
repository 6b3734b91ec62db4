"""What diffusers can do with its own transformers and pipelines, on ours: hooks, caches, schedulers, callbacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import model_inputs, relative_error
from diffusers import DDIMScheduler, DiTPipeline, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.hooks import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_first_block_cache,
)
from test_export import SMALL, holding, small_model, tiny_vae
from torch import Tensor

from mediatorize import sample
from mediatorize.export import pipelines
from mediatorize.export.travelling.transformer import CACHES, MediatorTransformer2DModel
from mediatorize.model.levels import SOFTMAX
from mediatorize.model.schedule import Schedule
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.version import VERSION

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]
"""Of diffusers' schedulers under numpy 2."""

STEPS = 8


def pipeline_of(model: DiffusionTransformer, scheduler: Any = None) -> Any:
    """The pipeline of an export, in this process."""
    pipe = pipelines.pipeline_of(model, model.schedule)
    if scheduler is not None:
        pipe.scheduler = scheduler
    return pipe


def samples(pipe: Any, **how: Any) -> Tensor:
    noise, _, _ = model_inputs(pipe.transformer, batch=2)
    given = {"num_inference_steps": STEPS, "latents": noise, "output_type": "latent", "guidance_scale": 1.5} | how
    return pipe([1, 7], **given).images


def deep(schedule: Any = None, **changes: Any) -> DiffusionTransformer:
    """Three blocks: a first, one between and a last, as the caches tell them apart."""
    return small_model(schedule, **{"depth": 3} | changes)


# --- caches --------------------------------------------------------------------------------------------------------------------

NEVER = [
    FirstBlockCacheConfig(threshold=0.0),
    TaylorSeerCacheConfig(disable_cache_before_step=STEPS),
    MagCacheConfig(threshold=0.0, mag_ratios=[2.0] * STEPS, num_inference_steps=STEPS),
]
SKIPPING = [
    FirstBlockCacheConfig(threshold=10.0),
    TaylorSeerCacheConfig(cache_interval=3, taylor_factors_dtype=torch.float32),
    MagCacheConfig(mag_ratios=[1.0] * STEPS, num_inference_steps=STEPS),
]
NAMES = [type(config).__name__ for config in NEVER]


def calls_of(module: Any) -> list[int]:
    """Grows by one at every call of a module."""
    seen: list[int] = []
    module.register_forward_hook(lambda *_: seen.append(1))
    return seen


@pytest.mark.parametrize("level", [SOFTMAX, 4])
@pytest.mark.parametrize(("never", "skipping"), list(zip(NEVER, SKIPPING, strict=True)), ids=NAMES)
def test_caches_find_the_blocks(never: Any, skipping: Any, level: Any) -> None:
    """One that never skips changes nothing; one that does saves calls; the second run is the first, and without it all is as before."""
    pipe = pipeline_of(deep())
    pipe.transformer.level = level
    expected = samples(pipe)
    pipe.transformer.enable_cache(never)
    assert torch.equal(samples(pipe), expected)
    pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(skipping)
    last = pipe.transformer.blocks[-1]
    seen = calls_of(last.attn.mediator if level == 4 else last.attn.qkv)
    skipped = samples(pipe)
    assert 0 < len(seen) < STEPS
    assert relative_error(skipped, expected) > 1e-6
    assert torch.equal(samples(pipe), skipped)
    assert samples(pipe, guidance_interval=(0.3, 0.8)).isfinite().all()  # batches of two sizes in one run
    pipe.transformer.disable_cache()
    assert torch.equal(samples(pipe), expected)


def test_a_cache_that_finds_nothing_is_refused() -> None:
    assert set(NAMES) == set(CACHES)
    pipe = pipeline_of(deep())
    with pytest.raises(ValueError, match=r"^PyramidAttentionBroadcastConfig finds nothing to cache in this model: pass one of FirstBlock"):
        pipe.transformer.enable_cache(PyramidAttentionBroadcastConfig())
    assert not pipe.transformer.is_cache_enabled


def test_caches_beside_held_rests_are_refused() -> None:
    pipe = pipeline_of(holding())
    assert pipe.transformer.remembers
    expected = samples(pipe)
    for config in NEVER:
        with pytest.raises(ValueError, match=f"^{type(config).__name__}: this model's schedule itself holds what attention gave"):
            pipe.transformer.enable_cache(config)
    pipe.transformer.level = SOFTMAX
    assert not pipe.transformer.remembers
    pipe.transformer.enable_cache(SKIPPING[0])
    assert samples(pipe).isfinite().all()
    pipe.transformer.level = None
    with pytest.raises(ValueError, match="itself holds what attention gave, which a second cache would skip"):
        samples(pipe)
    pipe.transformer.disable_cache()
    assert torch.equal(samples(pipe), expected)
    apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig())  # the other way to the same hooks
    with pytest.raises(ValueError, match=r"^fbc_leader_block_hook: this model's schedule itself holds"):
        samples(pipe)


def test_a_cache_works_in_the_stock_pipeline_within_one_context(tmp_path: Any) -> None:
    model = deep(family="dit")
    ours = pipeline_of(model)
    pipe = DiTPipeline(ours.transformer, tiny_vae(tmp_path), ours.scheduler)
    pipe.set_progress_bar_config(disable=True)

    def pictures() -> Tensor:
        with pipe.transformer.cache_context("all"):
            images = pipe([1, 7], num_inference_steps=STEPS, generator=torch.Generator().manual_seed(5), output_type="np").images
            return torch.from_numpy(images)

    expected = pictures()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    seen = calls_of(pipe.transformer.blocks[-1].attn)
    cached = pictures()
    assert len(seen) == 1
    assert not torch.equal(cached, expected)
    assert torch.equal(pictures(), cached)


class Joined(torch.nn.Module):
    """Blocks that are called as one, as cache-dit does it: all with the same arguments."""

    def __init__(self, blocks: Any) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, hidden_states: Tensor, *others: Any) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states, *others)
        return hidden_states


def test_blocks_that_another_tool_joins_run_at_one_level() -> None:
    schedule = Schedule((0.5,), ((SOFTMAX, 4, 1), (4, 4, 4)))
    for pipe in (pipeline_of(deep(schedule)), pipeline_of(holding())):
        pipe.transformer.level = 4
        expected = samples(pipe)
        pipe.transformer.blocks = torch.nn.ModuleList([Joined(pipe.transformer.blocks)])
        assert torch.equal(samples(pipe), expected)
        pipe.transformer.level = None
        with pytest.raises(ValueError, match=r"^Another tool runs this model's blocks as one, and the schedule is of each: set a level"):
            samples(pipe)


# --- memory and speed ----------------------------------------------------------------------------------------------------------


def models() -> list[Any]:
    return [pytest.param(deep(), SOFTMAX, id="softmax"), pytest.param(deep(), 4, id="4"), pytest.param(holding(), None, id="holds")]


@pytest.mark.parametrize(("model", "level"), models())
def test_layerwise_casting_rounds_what_it_casts_and_nothing_else(model: DiffusionTransformer, level: Any) -> None:
    pipe, rounded = pipeline_of(model), pipeline_of(model)
    pipe.transformer.level = rounded.transformer.level = level
    exact = samples(pipe)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    cast = {name for name, weight in pipe.transformer.named_parameters() if weight.dtype == torch.float8_e4m3fn}
    assert {name.split(".", 2)[2] for name in cast if "blocks" in name} == {f"mlp.{part}" for part in WEIGHTS}
    for name, weight in rounded.transformer.named_parameters():
        if name in cast:
            weight.data = weight.data.to(torch.float8_e4m3fn).float()
    found = samples(pipe)
    assert torch.equal(found, samples(rounded))
    assert relative_error(found, exact) > 0


WEIGHTS = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


@pytest.mark.parametrize(("model", "level"), models())
def test_blocks_are_offloaded_in_groups(model: DiffusionTransformer, level: Any) -> None:
    pytest.importorskip("accelerate", reason="diffusers offloads with it")
    pipe = pipeline_of(model)
    pipe.transformer.level = level
    expected = samples(pipe)
    how = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu")}
    with pytest.raises(ValueError, match=r"^Leaf by leaf this model cannot be offloaded"):
        pipe.transformer.enable_group_offload(**how, offload_type="leaf_level")
    pipe.transformer.enable_group_offload(**how, num_blocks_per_group=1)
    assert all(hasattr(block, "_diffusers_hook") for block in pipe.transformer.blocks)
    assert torch.equal(samples(pipe), expected)


@pytest.mark.parametrize(("model", "level"), models())
def test_repeated_blocks_are_compiled(model: DiffusionTransformer, level: Any) -> None:
    pipe = pipeline_of(model)
    pipe.transformer.level = level
    expected = samples(pipe)
    torch.compiler.reset()
    pipe.transformer.compile_repeated_blocks(backend="eager")
    assert all("compute" in vars(block) for block in pipe.transformer.blocks)
    assert relative_error(samples(pipe), expected) < 1e-5


# --- the pipeline --------------------------------------------------------------------------------------------------------------


def test_ddim_takes_the_steps_of_ours() -> None:
    model = deep(family="dit")
    pipe = pipeline_of(model)
    noise, _, _ = model_inputs(model, batch=2)
    for steps in (1, 7, 50):
        found = samples(pipe, num_inference_steps=steps)
        assert relative_error(found, sample(model, [1, 7], solver="ddim", steps=steps, cfg_scale=1.5, noise=noise)) < 1e-4
    with pytest.raises(ValueError, match=r"^1001 steps cannot be taken"):
        samples(pipe, num_inference_steps=1001)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)  # the same method, at times that it does not round
    assert relative_error(samples(pipe, num_inference_steps=50), found) < 0.02


def test_unipc_of_diffusers_takes_the_steps_of_ours() -> None:
    model = deep(family="sit")
    pipe = pipeline_of(model, UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True))
    noise, _, _ = model_inputs(model, batch=2)
    found = samples(pipe, num_inference_steps=8)
    assert relative_error(found, sample(model, [1, 7], solver="unipc", steps=8, cfg_scale=1.5, noise=noise)) < 1e-3
    assert relative_error(found, sample(model, [1, 7], solver="euler", steps=8, cfg_scale=1.5, noise=noise)) > 1e-2


@pytest.mark.parametrize(
    ("family", "scheduler", "message"),
    [
        ("sit", DDIMScheduler(), "DDIMScheduler is none of flow matching"),
        ("sit", EulerDiscreteScheduler(), "EulerDiscreteScheduler is none of flow matching"),
        ("dit", FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler does not have the noise levels of this model"),
        ("dit", DDIMScheduler(beta_schedule="scaled_linear"), "DDIMScheduler does not have the noise levels of this model"),
        ("dit", DDIMScheduler(prediction_type="v_prediction"), "DDIMScheduler takes predictions of 'v_prediction'"),
    ],
)
def test_schedulers_of_another_process_are_refused(family: str, scheduler: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        samples(pipeline_of(deep(family=family), scheduler))


def test_a_callback_sees_and_changes_every_step_and_can_stop() -> None:
    pipe = pipeline_of(deep())
    expected, seen = samples(pipe), []

    def watch(pipeline: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tensors["latents"])
        return tensors

    assert torch.equal(samples(pipe, callback_on_step_end=watch), expected)
    assert len(seen) == STEPS
    assert torch.equal(seen[-1], expected)

    def halve(pipeline: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipeline._interrupt = step == 2
        return {"latents": tensors["latents"] / 2} if step == 2 else {}

    assert torch.equal(samples(pipe, callback_on_step_end=halve), seen[2] / 2)
    assert torch.equal(samples(pipe), expected)  # the next run is not stopped
    with pytest.raises(ValueError, match=r"^callback_on_step_end_tensor_inputs has 'embeds': only"):
        samples(pipe, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["embeds"])


def test_a_level_that_the_model_does_not_have_is_refused() -> None:
    pipe = pipeline_of(deep())
    with pytest.raises(ValueError, match=r"^This model has no level 16\. It has 1, 4, 'softmax', or None: its schedule\.$"):
        pipe.transformer.level = 16
    assert pipe.transformer.level is None


def test_code_and_weights_of_two_versions_are_refused() -> None:
    model = small_model()
    for version, told in (("0.0.1", "0.0.1"), (None, "of an older form")):
        with pytest.raises(ValueError, match=f"exported by mediatorize {told}, and this code by {VERSION}: take both from one export"):
            MediatorTransformer2DModel(model.arch.to_json(), version=version)


def test_weights_that_are_not_the_configs_are_refused(tmp_path: Any) -> None:
    """diffusers itself only warns, and fills in random numbers."""
    pipe = pipeline_of(deep())
    pipe.transformer.save_pretrained(tmp_path)
    assert MediatorTransformer2DModel.from_pretrained(tmp_path).config.version == VERSION
    pipeline_of(deep(depth=SMALL["depth"])).transformer.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "config.json").write_bytes((tmp_path / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"the weights are not of this config and code \(\d+ missing, such as blocks\.2\."):
        MediatorTransformer2DModel.from_pretrained(tmp_path / "other")
