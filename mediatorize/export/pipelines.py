"""Export as a folder for `diffusers.DiffusionPipeline.from_pretrained(DEST, trust_remote_code=True)`; its code travels with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mediatorize.diffusion.plan import Plan
from mediatorize.diffusion.process import BETAS, TRAIN_STEPS, process_of
from mediatorize.diffusion.sampling import EVERYWHERE
from mediatorize.errors import UserError
from mediatorize.export import scheduler
from mediatorize.export.contract import Choices, Probe, Subject
from mediatorize.export.safetensors import reference as reference  # the weights are rounded the same way
from mediatorize.export.safetensors import stored_weights
from mediatorize.export.standalone import standalone
from mediatorize.formats.bundle import save_tensors, write_json, write_text
from mediatorize.formats.images import load_vae, refuse_unknown_scale
from mediatorize.formats.tensors import write_beside
from mediatorize.model.architecture import Architecture
from mediatorize.model.levels import SOFTMAX, holds
from mediatorize.model.schedule import AnySchedule, RuleSchedule
from mediatorize.version import VERSION

if TYPE_CHECKING:
    from mediatorize.export.travelling.pipeline import MediatorPipeline
    from mediatorize.model.transformer import DiffusionTransformer

TRANSFORMER_FILE, TRANSFORMER_CLASS = "mediator_transformer", "MediatorTransformer2DModel"
PIPELINE_FILE, PIPELINE_CLASS = "mediator_pipeline", "MediatorPipeline"
TRAVELLING = "mediatorize.export.travelling"

STOCK_NULL_CLASS = 1000
"""What DiTPipeline sends as the null class; the transformer reads it as its own where it has fewer classes."""


STOCK_PROCESS = "ddpm"
"""The process of the models that DiTPipeline samples."""


def _ddpm_scheduler() -> Any:
    from mediatorize.export.travelling.scheduler import RespacedDDIMScheduler

    return RespacedDDIMScheduler(
        num_train_timesteps=TRAIN_STEPS,
        beta_start=float(BETAS[0]),
        beta_end=float(BETAS[-1]),
        beta_schedule="linear",
        clip_sample=False,
        timestep_spacing="linspace",
    )


def _flow_scheduler() -> Any:
    import diffusers

    return diffusers.FlowMatchEulerDiscreteScheduler()


SCHEDULERS: dict[str, Callable[[], Any]] = {"ddpm": _ddpm_scheduler, "flow": _flow_scheduler}
"""The scheduler that an export comes with, by the process of its model."""


def pipeline_of(model: DiffusionTransformer, schedule: AnySchedule | None) -> MediatorPipeline:
    """What an export of a converted model loads as, in this process: a copy of the weights, the schedule inside, no progress bar."""
    from mediatorize.export.travelling.pipeline import MediatorPipeline
    from mediatorize.export.travelling.transformer import MediatorTransformer2DModel

    plan = None if schedule is None else schedule.to_json()
    transformer = MediatorTransformer2DModel(model.arch.to_json(), model.added().to_json(), plan, version=VERSION)
    transformer.load_state_dict(model.state_dict())
    pipe = MediatorPipeline(transformer.eval(), SCHEDULERS[process_of(model.arch).name]())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def suits_stock_pipeline(arch: Architecture, vae: Path | None, schedule: AnySchedule | None = None, plans: Collection[Plan] = ()) -> bool:
    """Whether diffusers' own DiTPipeline can sample the model: it needs a VAE, a null class that it can name, and square latents.

    It guides all channels everywhere, so that plans must, too.
    """
    if any(sum(map(len, plan.groups[:1])) < arch.channels or plan.cfg_interval != EVERYWHERE for plan in plans if plan.cfg_scale != 1):
        return False
    if isinstance(schedule, RuleSchedule) or (schedule is not None and any(map(holds, schedule.used))):
        return False  # held rests, and the rule, need a driver for each run
    fits = arch.null_class and arch.classes <= STOCK_NULL_CLASS and arch.input_size[0] == arch.input_size[1]
    return process_of(arch).name == STOCK_PROCESS and vae is not None and fits


def write(folder: Path, subject: Subject, choices: Choices) -> None:
    import diffusers

    arch, model = subject.arch, subject.model
    vae = None if choices.vae is None else _copy_vae(choices.vae, folder / "vae", arch)

    transformer = folder / "transformer"
    transformer.mkdir()
    write_text(transformer / f"{TRANSFORMER_FILE}.py", standalone(f"{TRAVELLING}.transformer", _title("Mediator-attention DiT and SiT")))
    size = arch.input_size
    config = {
        "_class_name": TRANSFORMER_CLASS,
        "_diffusers_version": diffusers.__version__,
        "architecture": arch.to_json(),
        "mediators": subject.config.settings.to_json(),
        "schedule": None if model.schedule is None else model.schedule.to_json(),
        "level": SOFTMAX if choices.level is None and subject.plans else choices.level,
        "version": VERSION,
        "sample_size": size[0] if size[0] == size[1] else list(size),
        "in_channels": arch.channels,
        "out_channels": arch.output_channels,
    }
    write_json(transformer / "config.json", config)
    state = stored_weights(subject, choices)
    file = transformer / "diffusion_pytorch_model.safetensors"
    write_beside(file, lambda path: save_tensors(state, path, {"format": "pt"}))

    if subject.plans:
        library, name = scheduler.CODE, "PlanScheduler"
        (folder / "scheduler").mkdir()
        scheduler.write(folder / "scheduler", subject.plans)
    else:
        usual = SCHEDULERS[process_of(arch).name]()
        usual.save_pretrained(folder / "scheduler")
        library, name = type(usual).__module__.partition(".")[0], type(usual).__name__
        if library != "diffusers":
            write_text(folder / "scheduler" / f"{library}.py", standalone(f"{TRAVELLING}.scheduler", _title("DDIM on the steps of DiT")))

    index: dict[str, Any] = {"_class_name": "DiTPipeline", "_diffusers_version": diffusers.__version__}
    if not suits_stock_pipeline(arch, choices.vae, model.schedule, subject.plans.values()):
        index["_class_name"] = [PIPELINE_FILE, PIPELINE_CLASS]
        write_text(folder / f"{PIPELINE_FILE}.py", standalone(f"{TRAVELLING}.pipeline", _title("A pipeline for DiT and SiT")))
    index["scheduler"] = [library, name]
    index["transformer"] = [TRANSFORMER_FILE, TRANSFORMER_CLASS]
    index["vae"] = ["diffusers", vae] if vae else [None, None]
    write_json(folder / "model_index.json", index)


def _title(what: str) -> str:
    return f"{what}, for diffusers. Put together by mediatorize {VERSION} from its own modules; it needs torch and diffusers alone."


def _copy_vae(path: Path, folder: Path, arch: Architecture) -> str:
    """Copies a VAE that loads and fits; gives its class."""
    vae = load_vae(path, torch.device("cpu"))
    if vae.config.latent_channels != arch.channels:
        raise UserError(
            f"{path}: a VAE of {vae.config.latent_channels} channels, where the model has {arch.channels}.",
            hint="Pass the one it was made with.",
        )
    refuse_unknown_scale(arch)
    vae.save_pretrained(folder)
    return type(vae).__name__


RELOAD = f"""
import json, sys
sys.modules.update(mediatorize=None, timm=None)
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
folder, probe, found, cases = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, local_files_only=True, torch_dtype=torch.float32)
pipeline.set_progress_bar_config(disable=True)
inputs, outputs, transformer = load_file(probe), {{}}, pipeline.transformer
assert type(transformer).__name__ == "{TRANSFORMER_CLASS}"
with torch.no_grad():
    for name, t, level in json.loads(cases):
        transformer.level = level
        times = torch.full((len(inputs["x"]),), t)
        outputs[name] = transformer(inputs["x"], timestep=times, class_labels=inputs["y"]).sample.contiguous()
save_file(outputs, found)
"""
"""Loads a folder in a process that has neither mediatorize nor timm, and calls its transformer."""


def outputs(folder: Path, subject: Subject, choices: Choices, probe: Probe) -> Mapping[str, Tensor]:
    """The transformer's outputs in another process, where mediatorize and timm cannot be imported."""
    cases = json.dumps([(case.name, case.t, None if case.scheduled else case.levels) for case in probe.cases])
    with tempfile.TemporaryDirectory() as scratch:
        inputs, found = Path(scratch) / "probe.safetensors", Path(scratch) / "found.safetensors"
        save_file({"x": probe.x, "y": probe.y}, inputs)
        environment = os.environ | {"HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", RELOAD, str(folder.absolute()), str(inputs), str(found), cases]
        done = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(
                f"The export does not load back in diffusers: {last.rstrip('.')}.", hint="Check the installed diffusers, or report it."
            )
        return load_file(found)


def usage(subject: Subject, choices: Choices) -> str:
    arch = subject.arch
    stock = suits_stock_pipeline(arch, choices.vae, subject.model.schedule, subject.plans.values())
    pictures = choices.vae is not None or arch.channels in (1, 3)
    labels = f"class_labels=[0, {min(1, arch.classes - 1)}]"
    planned = bool(subject.plans)
    steps = "" if stock else ", guidance_scale=1.5" if arch.null_class else ""
    if planned:  # this folder's own pipeline takes the plan's guidance and the most calls by itself
        most = subject.plans[max(subject.plans)]
        steps = f", num_inference_steps={len(most.calls)}" + (f", guidance_scale={most.cfg_scale:g}" if stock else "")
    result = f'pipe({labels}{steps}).images[0].save("sample.png")' if pictures else f"latents = pipe({labels}{steps}).images"
    if choices.level is not None:
        ready = f"is at level {choices.level}"
    else:
        rule = isinstance(subject.model.schedule, RuleSchedule)
        ready = (
            "is at softmax"
            if planned or subject.model.schedule is None
            else "follows the step-wise rule"
            if rule
            else "follows the schedule"
        )
    asked = ""
    if subject.levels:
        level, softmax = json.dumps(subject.levels[-1]), ', or "softmax"' if SOFTMAX in subject.levels else ""
        asked = f"\npipe.transformer.level = {level}  # one level for all layers and times{softmax}; as loaded it {ready}"
    torch_import, loaded_in = ("", "") if choices.dtype == "float32" else ("import torch\n", f", torch_dtype=torch.{choices.dtype}")
    beside = "" if choices.vae is None else f"\n\n`vae` is a copy of `{choices.vae.name}`, under its own licence."
    return f"""```python
{torch_import}from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("DEST", trust_remote_code=True{loaded_in})
{result}{asked}
```

The Python files in this folder are all that it needs beside torch and diffusers.{beside}"""
