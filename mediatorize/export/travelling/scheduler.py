"""DDIM on DiT's own steps, for diffusers. Its own DDIMScheduler takes other steps, or steps of another length than its timesteps say."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler, DDIMSchedulerOutput
from torch import Tensor

from mediatorize.diffusion.process import TRAIN_STEPS, ddim_step, respaced_timesteps
from mediatorize.export.travelling.code import SavedWithCode


class RespacedDDIMScheduler(SavedWithCode, DDIMScheduler):  # type: ignore[misc, unused-ignore]
    """Even steps from 999 to 0, rounded, the last of them to the data: `mediatorize sample --solver ddim`. Deterministic (eta is 0).

    Its config is DDIMScheduler's, so that other schedulers are made from it: `DPMSolverMultistepScheduler.from_config(scheduler.config)`.
    """

    __module__ = "mediator_scheduler"

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """
        Raises:
            ValueError: fewer than 1 or more than 1000 steps.
        """
        if not 1 <= num_inference_steps <= TRAIN_STEPS:
            raise ValueError(f"{num_inference_steps} steps cannot be taken: pass num_inference_steps from 1 to {TRAIN_STEPS}.")
        times = respaced_timesteps(num_inference_steps)
        self._before = dict(zip(times[1:], times, strict=False))
        self.timesteps = torch.tensor(times[::-1], device=device)

    def step(  # type: ignore[override, unused-ignore]
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> DDIMSchedulerOutput | tuple[Tensor]:
        """From the noise that the model predicts (b, c, h, w) at one of the timesteps to the sample at the next one."""
        time, kept = int(timestep), self.alphas_cumprod
        after = float(kept[self._before[time]]) if time in self._before else 1.0
        result = ddim_step(sample, model_output, float(kept[time]), after)
        return DDIMSchedulerOutput(prev_sample=result) if return_dict else (result,)
