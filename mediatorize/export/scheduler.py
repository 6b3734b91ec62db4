"""Exports plans as a diffusers scheduler: its code and `scheduler_config.json`, for stock pipelines."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from mediatorize.diffusion.plan import PREDICTIONS, Plan, run_plan
from mediatorize.errors import UserError
from mediatorize.export.standalone import standalone
from mediatorize.formats.bundle import write_json, write_text

CODE = "mediator_plan_scheduler"
"""The module in the folder."""
CONFIG_FILE = "scheduler_config.json"
PREDICTION_TYPES = {"noise": "epsilon", "velocity": "flow_prediction"}


def travels(plans: Mapping[int, Plan]) -> bool:
    """Whether a pipeline's scheduler sees all that plans need: guided outputs at softmax."""
    return bool(plans) and all(plan.streams == "guided" and all(call.levels is None for call in plan.calls) for plan in plans.values())


def write(folder: Path, plans: Mapping[int, Plan]) -> None:
    """Writes the scheduler's files into a folder.

    Raises:
        UserError: a plan needs more than a pipeline's scheduler sees.
    """
    for count, plan in plans.items():
        if plan.streams != "guided" or any(call.levels is not None for call in plan.calls):
            raise UserError(
                f"The plan of {count} calls needs both halves of guidance, or levels, which a pipeline's scheduler does not have.",
                hint="Calibrate with guided features on the checkpoint.",
            )
    process = next(iter(plans.values())).process
    write_text(folder / f"{CODE}.py", standalone("mediatorize.export.travelling.plan_scheduler", "Plans of mediatorize for diffusers."))
    config = {"_class_name": "PlanScheduler", "prediction_type": PREDICTION_TYPES[PREDICTIONS[process]]}
    write_json(folder / CONFIG_FILE, config | {"plans": [plan.to_json() for plan in plans.values()]})


def load(folder: Path) -> Any:
    """The scheduler in a folder, by its own code."""
    spec = importlib.util.spec_from_file_location(CODE, folder / f"{CODE}.py")
    assert spec is not None and spec.loader is not None, "the file is there"
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[CODE] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module.PlanScheduler.from_config(json.loads((folder / CONFIG_FILE).read_text()))


def difference(folder: Path, plans: Mapping[int, Plan]) -> float:
    """The largest difference between samples by the written scheduler and by the plans, of a stand-in for a model, as a share of the
    largest value."""
    scheduler, worst = load(folder), 0.0
    for count, plan in plans.items():
        channels = sum(map(len, plan.groups))
        noise = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(count))

        def output(x: torch.Tensor, t: float) -> torch.Tensor:
            return torch.tanh(x) * (1 + 1e-3 * t)

        expected = run_plan(plan, lambda x, t, uncond, levels: (output(x, t), None), noise)
        scheduler.set_timesteps(count)
        x = noise
        for call, timestep in zip(plan.calls, scheduler.timesteps, strict=True):
            sign = 1 if plan.process == "ddpm" else -1
            x = scheduler.step(sign * output(x, call.t), timestep, x).prev_sample
        worst = max(worst, float((x - expected).abs().max() / expected.abs().max()))
    return worst


def usage(name: str, plans: Mapping[int, Plan]) -> str:
    """A few lines that use the folder."""
    plan = plans[max(plans)]
    scale = "" if plan.cfg_scale == 1 else f", guidance_scale={plan.cfg_scale:g}"
    channels = sum(map(len, plan.groups))
    some = plan.cfg_scale != 1 and plan.cfg_channels != "all" and int(plan.cfg_channels) < channels
    note = (
        f"\n# The plans are for guidance of {plan.cfg_channels} of {channels} channels; most pipelines guide all of them." if some else ""
    )
    return f"""```python
import sys
sys.path.insert(0, "{name}")
from {CODE} import PlanScheduler

pipe.scheduler = PlanScheduler.from_pretrained("{name}")
pipe(..., num_inference_steps={max(plans)}{scale})  # there are plans of {", ".join(map(str, plans))} calls{note}
```"""
