"""A plan as a diffusers scheduler: few model calls at fitted times, with fitted weights. It needs nothing of the network."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from mediatorize.diffusion.plan import Plan, PlanCall, Setting
from mediatorize.diffusion.process import TRAIN_STEPS, alphas_cumprod
from mediatorize.export.travelling.code import SavedWithCode


class PlanScheduler(SavedWithCode, SchedulerMixin, ConfigMixin):  # type: ignore[misc, unused-ignore]
    """Samples by plans that `mediatorize calibrate --calls` fitted. Deterministic.

    Args:
        plans: as a plan file has them, for one model and one guidance scale, of different numbers of calls.
        prediction_type: what the pipeline passes to `step`: `epsilon` (a DDPM's noise), or `flow_prediction` (noise - data).
        num_train_timesteps: that a flow's timesteps are shares of.

    Raises:
        ValueError: a plan has features of both halves of guidance, which pipelines do not show to their scheduler, or levels.
    """

    __module__ = "mediator_plan_scheduler"
    order = 1
    init_noise_sigma = 1.0

    @register_to_config  # type: ignore[untyped-decorator, unused-ignore]
    def __init__(self, plans: list[dict[str, Any]], prediction_type: str = "epsilon", num_train_timesteps: int = TRAIN_STEPS) -> None:
        read = [Plan.from_json(plan) for plan in plans]
        self.plans = {len(plan.calls): plan for plan in read}
        for plan in read:
            if plan.streams != "guided" or any(call.levels is not None for call in plan.calls):
                raise ValueError("This scheduler takes plans of guided outputs without levels: `mediatorize sample` takes the others.")
        self.flow = prediction_type == "flow_prediction"
        if not self.flow:
            self.alphas_cumprod = alphas_cumprod().float()
        self.set_timesteps(max(self.plans))

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Takes the plan of so many calls, and forgets what was sampled before.

        Raises:
            ValueError: there is no such plan.
        """
        if num_inference_steps not in self.plans:
            there = ", ".join(map(str, sorted(self.plans)))
            raise ValueError(f"There is no plan of {num_inference_steps} calls: pass num_inference_steps of {there}.")
        self.plan = self.plans[num_inference_steps]
        self.num_inference_steps = num_inference_steps
        calls = self.plan.calls
        sigmas = [call.noise / (call.signal + call.noise) for call in calls]
        times = [sigma * len(self) for sigma in sigmas] if self.flow else [call.t for call in calls]
        self.timesteps = torch.tensor(times, dtype=torch.float32, device=device)
        self.sigmas = torch.tensor([*sigmas, 0.0], dtype=torch.float32, device=device)
        self.setting: Setting | None = None
        self.outputs: dict[tuple[str, int], Tensor] = {}
        self.index = 0

    @property
    def step_index(self) -> int:
        """Number of the call at hand."""
        return self.index

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The model takes states as they are."""
        return sample

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = True, **unused: Any
    ) -> SchedulerOutput | tuple[Tensor]:
        """From the model's output (b, c, ...), guidance applied, at one of the timesteps to the state of the next one; sums in float32.

        Raises:
            ValueError: the timestep is not the plan's next one, as with image-to-image `strength`; or all calls were made.
        """
        calls = self.plan.calls
        if self.index >= len(calls) or abs(float(timestep) - float(self.timesteps[self.index])) > 1e-3:
            raise ValueError(
                f"Timestep {float(timestep):g} is not the next one of this plan, which begins at noise and makes all of its calls in turn: "
                "call set_timesteps before every run, and leave `strength` out."
            )
        call, channels = calls[self.index], sample.shape[1]
        if self.setting is None or self.setting.group.device != sample.device or self.index == 0:
            unguided = replace(self.plan, cfg_scale=1.0)  # the pipeline has applied guidance
            self.setting, self.outputs = Setting.of(unguided, sample.shape[1:], sample.device), {}
        setting = self.setting
        output = model_output[:, :channels].float()
        z = setting.bands.to(sample.float() / (call.signal + call.noise))
        found = setting.features(z, -output if self.flow else output, None, call.signal, call.noise)
        self.outputs["c", self.index] = found["c"]
        weights = torch.tensor(call.weights, dtype=torch.float32)
        z = setting.update(weights, [z, *(self.outputs[key] for key in call.features)])
        self.index += 1
        needed = {key for later in calls[self.index :] for key in later.features}
        self.outputs = {key: value for key, value in self.outputs.items() if key in needed}
        after = calls[self.index] if self.index < len(calls) else PlanCall(t=0.0, signal=1.0, noise=0.0)
        x = (setting.bands.back(z) * (after.signal + after.noise)).to(sample.dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """States (b, c, ...) of data and noise at timesteps (b,) of the plan.

        Raises:
            ValueError: a timestep is none of the plan's.
        """
        places = (timesteps.float().cpu().unsqueeze(1) - self.timesteps.cpu()).abs()
        nearest, places = places.min(dim=1).values, places.argmin(dim=1)
        if (nearest > 1e-3).any():
            raise ValueError(f"Timesteps {timesteps.tolist()} are not all among this plan's {self.timesteps.tolist()}.")
        calls = [self.plan.calls[place] for place in places.tolist()]
        signal, sigma = (
            original_samples.new_tensor(values).view(-1, *(1,) * (original_samples.ndim - 1))
            for values in ([call.signal for call in calls], [call.noise for call in calls])
        )
        return signal * original_samples + sigma * noise

    def __len__(self) -> int:
        config: Any = self.config
        return int(config.num_train_timesteps)
