"""A diffusers pipeline for class-conditional DiT and SiT: with a VAE or without, any number of classes, any scheduler of the process."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from mediatorize.diffusion.process import alphas_cumprod
from mediatorize.export.travelling.code import SavedWithCode

SLACK = 1e-6
"""Noise levels are in an interval that they miss by no more."""

PIXEL_CHANNELS = (1, 3)
"""Models of these many channels make pictures themselves; others make latents."""


def ddpm_steps(process: Any, scheduler: Any, steps: int, device: torch.device) -> Tensor:
    """Sets the steps of a scheduler of noise prediction; the model's own time at each of them, float32."""
    name, kept, own = type(scheduler).__name__, getattr(scheduler, "alphas_cumprod", None), alphas_cumprod().float()
    if kept is None or kept.shape != own.shape or not torch.allclose(kept.cpu().float(), own, rtol=1e-2):
        raise ValueError(
            f"{name} does not have the noise levels of this model, 1000 steps of linear betas from 0.0001 to 0.02: make it with "
            "from_config(pipe.scheduler.config)."
        )
    if (predicts := getattr(scheduler.config, "prediction_type", "epsilon")) != "epsilon":
        raise ValueError(f"{name} takes predictions of {predicts!r}, and this model predicts noise: pass prediction_type='epsilon'.")
    scheduler.set_timesteps(steps, device=device)
    return scheduler.timesteps.float()


def ddpm_output(process: Any, scheduler: Any, output: Tensor, channels: int) -> Tensor:
    """The predicted noise, with the variance where the scheduler takes it."""
    learned = str(getattr(scheduler.config, "variance_type", "")).startswith("learned")
    return output if learned else output[:, :channels]


def flow_steps(process: Any, scheduler: Any, steps: int, device: torch.device) -> Tensor:
    """Sets the steps of a scheduler of flow matching; the model's own time at each of them, float32."""
    settings, name = scheduler.config, type(scheduler).__name__
    by_setting = getattr(settings, "use_flow_sigmas", False) and settings.prediction_type == "flow_prediction"
    if not hasattr(scheduler, "sigmas") or (hasattr(scheduler, "alphas_cumprod") and not by_setting):
        raise ValueError(f"{name} is none of flow matching, which this model needs: use one such as FlowMatchEulerDiscreteScheduler.")
    if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:  # an even grid from noise to data, as SiT's own sampler takes
        even = (1 - torch.linspace(0, 1, steps + 1))[:-1].numpy()
        scheduler.set_timesteps(sigmas=np.asarray(even), device=device)
    else:
        scheduler.set_timesteps(steps, device=device)
    return process.time_at(scheduler.sigmas.to(device=device, dtype=torch.float32))


def flow_output(process: Any, scheduler: Any, output: Tensor, channels: int) -> Tensor:
    """The velocity as noise - data, the other way round than SiT's own solvers take it."""
    return -process.told_to_solver(output)


SCHEDULING = {"ddpm": (ddpm_steps, ddpm_output), "flow": (flow_steps, flow_output)}
"""How a scheduler's steps are set, and what it is told of the model's output, by the name of the model's process."""


class MediatorPipeline(SavedWithCode, DiffusionPipeline):
    """Samples pictures or latents.

    Args:
        transformer: a `MediatorTransformer2DModel`.
        scheduler: DiT: one of noise prediction, such as DDIM, DDPM or DPM-Solver++. SiT: one of flow matching, which has `sigmas`.
        vae: an `AutoencoderKL`, for a model of latents; without one its latents are the result.
    """

    __module__ = "mediator_pipeline"
    _optional_components = ["vae"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012
    model_cpu_offload_seq = "transformer->vae"  # type: ignore[assignment, unused-ignore]

    def __init__(self, transformer: Any, scheduler: Any, vae: Any = None) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self._interrupt = False

    def to_json_string(self) -> str:
        """What `save_pretrained` writes as `model_index.json`: the class is named with its file, as for all code that is not diffusers'."""
        index = json.loads(super().to_json_string()) | {"_class_name": [type(self).__module__, type(self).__name__]}
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    @property
    def interrupt(self) -> bool:
        """Whether the run at hand ends before its next step; a callback may set `pipe._interrupt`, as in diffusers' pipelines."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int],
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        guided_channels: int | None = 3,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        output_type: str | None = None,
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Samples a batch.

        Args:
            class_labels: one class per sample.
            guidance_scale: classifier-free guidance; 1 is none, and costs half. Default: a plan's own, else 1.
            num_inference_steps: of the scheduler. Default: the most calls that a plan has, else 50.
            generator: of the noise.
            latents: the initial noise (b, channels, height, width); drawn where it is not given.
            guided_channels: how many channels are guided: DiT and SiT guide the first 3, `None` all. A plan has its own.
            guidance_interval: the lowest and the highest noise level (0 data, 1 noise) at which calls are guided; the others cost half.
            output_type: "pil", "np" (b, height, width, channels), "pt" (b, channels, height, width), each in [0, 1], or "latent": the
                model's own values. Default: pil where pictures can be made, else latent.
            callback_on_step_end: called after every step as (pipeline, step, timestep, tensors); may return tensors in their place.
            callback_on_step_end_tensor_inputs: which tensors it is given: "latents".

        Raises:
            ValueError: the model, the scheduler or the arguments do not fit together.
        """
        arch = self.transformer.arch
        device, dtype = self._execution_device, self.transformer.dtype
        pictures = self.vae is not None or arch.channels in PIXEL_CHANNELS
        output_type = output_type or ("pil" if pictures else "latent")
        if output_type != "latent" and not pictures:
            raise ValueError(
                f"This model makes latents of {arch.channels} channels and has no VAE: pass output_type='latent', or load a vae."
            )
        if unknown := [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]:
            raise ValueError(f"callback_on_step_end_tensor_inputs has {unknown[0]!r}: only {self._callback_tensor_inputs} can be given.")
        if (plans := getattr(self.scheduler, "plans", None)) is not None:
            num_inference_steps = max(plans) if num_inference_steps is None else num_inference_steps
            plan = plans.get(num_inference_steps, plans[max(plans)])
            if guidance_scale not in (None, plan.cfg_scale):
                raise ValueError(f"The plan is for guidance {plan.cfg_scale:g}: leave guidance_scale out, or set another scheduler.")
            guidance_scale, guidance_interval = plan.cfg_scale, plan.cfg_interval
            guided_channels = None if plan.cfg_channels == "all" else int(plan.cfg_channels)
        guidance_scale = 1.0 if guidance_scale is None else guidance_scale
        num_inference_steps = 50 if num_inference_steps is None else num_inference_steps
        labels = torch.tensor([class_labels] if isinstance(class_labels, int) else list(class_labels), device=device)
        count, guided = len(labels), guidance_scale != 1
        if guided and not arch.null_class:
            raise ValueError("This model has no null class, which guidance needs: pass guidance_scale=1.")
        both = torch.cat([labels, torch.full_like(labels, arch.classes)]) if guided else labels
        shape = (count, arch.channels, *arch.input_size)
        x = randn_tensor(shape, generator=generator, device=device) if latents is None else latents.to(device).float()

        process = self.transformer.process
        set_steps, for_scheduler = SCHEDULING[process.name]
        times = set_steps(process, self.scheduler, num_inference_steps, device)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if takes_generator else {}
        own_times = times[: len(self.scheduler.timesteps)].tolist()
        low, high = guidance_interval
        rows = [2 if guided and low - SLACK <= float(process.noise_level(torch.tensor(t))) <= high + SLACK else 1 for t in own_times]
        if plans is not None:
            rows = list(plan.rows)
        order = getattr(self.scheduler, "order", 1)
        call = self.transformer.driver(own_times, rows, count, order, self.transformer)  # its memory is of this run alone
        x = x * getattr(self.scheduler, "init_noise_sigma", 1.0)
        self._interrupt = False
        for step, (own_time, doubled, t) in enumerate(self.progress_bar(list(zip(own_times, rows, self.scheduler.timesteps, strict=True)))):
            if self.interrupt:
                break
            call.look(x)
            scaled = self.scheduler.scale_model_input(x, t) if hasattr(self.scheduler, "scale_model_input") else x
            batch = torch.cat([scaled] * doubled).to(dtype)
            output = call(batch, torch.full((len(batch),), own_time, device=device), both[: len(batch)]).float()
            if doubled == 2:
                channels = arch.channels if guided_channels is None else guided_channels
                conditional, unconditional = output.chunk(2)
                change = guidance_scale * (conditional[:, :channels] - unconditional[:, :channels])
                output = torch.cat([unconditional[:, :channels] + change, conditional[:, channels:]], dim=1)
            x = self.scheduler.step(for_scheduler(process, self.scheduler, output, arch.channels), t, x, **extra, return_dict=False)[0]
            if callback_on_step_end is not None:
                given = {"latents": x} if callback_on_step_end_tensor_inputs else {}
                x = (callback_on_step_end(self, step, t, given) or {}).get("latents", x)

        images = self._pictures(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _pictures(self, x: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return x
        if self.vae is not None:
            arch = self.transformer.arch
            if arch.latent_std:
                mean, std = (x.new_tensor(values).view(-1, 1, 1) for values in (arch.latent_mean, arch.latent_std))
                x = x * std + mean
            else:
                x = x / self.vae.config.scaling_factor
            x = self.vae.decode(x.to(self.vae.dtype)).sample
        images = (x.float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        arrays = images.permute(0, 2, 3, 1).cpu().numpy()
        return self.numpy_to_pil(arrays) if output_type == "pil" else arrays
