"""The bundle: a folder with the model, its mediators, its schedule and how it came to be. Written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mediatorize.compression.records import Distillation, LayerErrors
from mediatorize.diffusion.process import process_of
from mediatorize.diffusion.solvers import SOLVERS
from mediatorize.errors import UserError, about
from mediatorize.formats.tensors import Weight, load_weights, read_safetensors, refuse_non_finite, write_beside
from mediatorize.model.architecture import Architecture
from mediatorize.model.levels import KINDS, SOFTMAX, Level, MediatorSettings, levels_per_layer, refuse_lacking
from mediatorize.model.schedule import AnySchedule, Schedule, patterns_of, schedule_from_json
from mediatorize.model.transformer import DiffusionTransformer, is_mediator
from mediatorize.version import VERSION

BUNDLE_FORMAT = "mediatorize"
BUNDLE_VERSION = 1
LOG_FILE = "log.jsonl"
WORK_FOLDER = "work"
"""In a folder that becomes a bundle: what is kept of the work until it is done."""


RANDOM, TRAINED = "random", "trained"
"""`Origin.weights` of a model that began from random weights: before its level softmax is trained, and after."""

OWN_TRAJECTORIES = "the model's own sampling trajectories"
"""What layers are fitted on where no data are given."""


@dataclass(frozen=True)
class Origin:
    """The pretrained checkpoint that a bundle was made from, or what gave the sizes of a model of random weights."""

    file: str
    format: str = ""
    weights: str = ""
    """Which set of weights of a training checkpoint; empty if it held one; `RANDOM` or `TRAINED` if none was read."""
    sha256: str = ""
    """Of the weights (`hash_of_weights`)."""

    @property
    def began_random(self) -> bool:
        return self.weights in (RANDOM, TRAINED)

    def to_json(self) -> dict[str, str]:
        return vars(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Origin:
        return cls(**fields)


@dataclass(frozen=True)
class BundleConfig:
    """`config.json`: what is needed to build the model, and where it came from."""

    arch: Architecture
    settings: MediatorSettings
    source: Origin
    layer_errors: tuple[LayerErrors, ...] = ()
    finetuned: Distillation | None = None
    fitted_on: str = OWN_TRAJECTORIES
    """Where the states came from that layers were fitted and judged on."""

    def to_json(self) -> dict[str, Any]:
        return {
            "format": BUNDLE_FORMAT,
            "version": BUNDLE_VERSION,
            "architecture": self.arch.to_json(),
            "mediators": self.settings.to_json(),
            "source": self.source.to_json(),
            "layer_errors": [errors.to_json() for errors in self.layer_errors],
            "finetuned": self.finetuned.to_json() if self.finetuned else None,
            "fitted_on": self.fitted_on,
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> BundleConfig:
        finetuned = fields.get("finetuned")
        return cls(
            Architecture.from_json(fields["architecture"]),
            MediatorSettings.from_json(fields["mediators"]),
            Origin.from_json(fields["source"]),
            tuple(LayerErrors.from_json(errors) for errors in fields["layer_errors"]),
            Distillation.from_json(finetuned) if finetuned else None,
            str(fields.get("fitted_on", OWN_TRAJECTORIES)),
        )


def is_bundle(path: Path) -> bool:
    recover(path)
    try:
        return json.loads((path / "config.json").read_text()).get("format") == BUNDLE_FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def refuse_occupied(out: Path, force: bool) -> None:
    """Refuses every folder that exists, except an empty one and, with --force, a bundle."""
    recover(out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not is_bundle(out):
        raise UserError(f"{out}: exists and is not a bundle.", hint="Name another folder; --force replaces bundles only.")
    if not force:
        raise UserError(f"{out}: exists.", hint="Pass --force to replace it, or another path.")


def read_config(path: Path) -> BundleConfig:
    file = path / "config.json"
    try:
        content = json.loads(file.read_text())
        if content["version"] != BUNDLE_VERSION:
            raise UserError(f"{file}: bundle version {content['version']} is not known.", hint="Update mediatorize.")
        with about(file):
            return BundleConfig.from_json(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not a whole bundle config ({error}).", hint="Convert again, or copy the bundle again.") from error


def open_bundle(path: Path) -> tuple[BundleConfig, DiffusionTransformer, dict[str, Weight]]:
    """A bundle's config, its model on the meta device, and its weights, still in the file; names, shapes and finiteness checked."""
    recover(path)
    config = read_config(path)
    file = path / "model.safetensors"
    if not file.exists():
        raise UserError(f"{path}: has no model.safetensors.", hint="Convert again, or copy the bundle again.")
    weights = {name: Weight((stored,)) for name, stored in read_safetensors(file)[0].items()}
    with about(path / "config.json"), torch.device("meta"):
        model = DiffusionTransformer(config.arch, config.settings)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: weight.shape for name, weight in weights.items() if weight.parts[0].is_weight}
    if expected != found:
        name = next(name for name in {**expected, **found} if expected.get(name) != found.get(name))
        raise UserError(
            f"{file}: {name} is {found.get(name, 'missing')} where config.json says {expected.get(name, 'nothing')}.",
            hint="Convert again, or copy the bundle again.",
        )
    refuse_non_finite(weights.items())
    return config, model, weights


def load_bundle(path: Path) -> DiffusionTransformer:
    """The model of a bundle, with its mediators and its schedule: eval mode, float32, CPU, weights memory-mapped."""
    config, model, weights = open_bundle(path)
    model.load_state_dict(load_weights(weights), assign=True)
    model.schedule = read_schedule(path, config)
    return model.requires_grad_(False).eval()


def refuse_untrained(path: Path, config: BundleConfig) -> None:
    """Refuses a bundle whose level softmax was never trained where that is to be the teacher."""
    if config.source.weights == RANDOM:
        raise UserError(
            f"{path}: its level softmax began from random weights and was never trained; it can teach nothing.",
            hint="Train it by `finetune --teacher none --train-levels softmax`, or judge what was trained by `compare`.",
        )


def refuse_pruned(path: Path, config: BundleConfig) -> None:
    """Refuses an export that was pruned to its schedule where every level is needed."""
    if config.settings.kept is not None:
        raise UserError(f"{path}: was pruned to its schedule, and can only be sampled by it.", hint="Take the whole bundle.")


def origin_of_training(config: BundleConfig, model: DiffusionTransformer) -> Origin:
    """The origin of a bundle whose `model` was just trained on data alone, as `config.finetuned` says.

    A model that began from random weights is its own origin; one that came from a file no longer holds that file's weights.
    """
    if not config.source.began_random or config.finetuned is None:
        return config.source
    trained = SOFTMAX in config.finetuned.settings.levels
    return replace(config.source, weights=TRAINED if trained else RANDOM, sha256=hash_of_weights(model))


def only_level(levels: Sequence[Level], settings: MediatorSettings, depth: int) -> Schedule | None:
    """The schedule of a model that was trained at one level alone; None where that is softmax, or where there are several."""
    if len(levels) != 1 or tuple(levels) == (SOFTMAX,):
        return None
    return Schedule((), (tuple(levels_per_layer(levels[0], depth, settings)),))


def read_schedule(path: Path, config: BundleConfig) -> AnySchedule | None:
    """The bundle's schedule, where it has one: for its number of layers, of levels that it has."""
    file = path / "schedule.json"
    return read_schedule_file(file, config.arch, config.settings) if file.exists() else None


def read_schedule_file(file: Path, arch: Architecture, settings: MediatorSettings | None) -> AnySchedule:
    """The schedule in a JSON file: for the architecture's layers and process, of levels that a model with such settings has."""
    try:
        with about(file):
            content = json.loads(file.read_text())
            schedule = schedule_from_json(content)
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}).", hint="Calibrate again.") from error
    if schedule.depth != arch.depth:
        raise UserError(f"{file}: is for {schedule.depth} layers, the model has {arch.depth}.", hint="Calibrate again.")
    made_for = SOLVERS.get(str((content.get("calibrated_for") or {}).get("solver")))
    if made_for is not None and made_for.process != (own := process_of(arch)).name:
        solver = content["calibrated_for"]["solver"]
        raise UserError(f"{file}: was calibrated for {solver}, which does not sample a {own.title}.", hint="Calibrate again.")
    with about(file):
        for pattern in patterns_of(schedule, settings):
            refuse_lacking(pattern, settings, hint="Calibrate again.")
    return schedule


def read_schedules(files: Sequence[Path], model: DiffusionTransformer, reserved: Collection[str] = ()) -> dict[str, AnySchedule]:
    """Schedules for a model by file name, or by path if the name is `reserved`, taken, or reads as a level."""
    found: dict[str, AnySchedule] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such schedule.", hint="Pass the path of a schedule.json.")
        taken = file.stem in (*reserved, *found) or any(kind.read(file.stem) is not None for kind in KINDS.values())
        found[str(file) if taken else file.stem] = read_schedule_file(file, model.arch, model.settings)
    return found


def partial_folder(path: Path) -> Path:
    """Where a bundle is prepared before it is renamed to `path`."""
    return beside(path, "partial")


def _replaced_folder(path: Path) -> Path:
    return beside(path, "replaced")


def beside(path: Path, ending: str) -> Path:
    """`path` with an ending, where work on the bundle at `path` is kept."""
    path = path.absolute()
    if not path.name:
        raise UserError(f"{path}: is no place for a bundle.", hint="Name a folder.")
    return path.with_name(f"{path.name}.{ending}")


def recover(path: Path) -> None:
    """Puts the old bundle back if a kill came between moving it away and moving the new one in."""
    if not path.exists() and _replaced_folder(path).exists():
        _replaced_folder(path).rename(path)


def commit(partial: Path, path: Path) -> None:
    """Renames a prepared folder to `path`, then drops its work folder. An older bundle there is moved away first and deleted last."""
    replaced = _replaced_folder(path)
    if path.exists():
        if replaced.exists():
            shutil.rmtree(replaced)
        path.rename(replaced)
    partial.rename(path)
    shutil.rmtree(path / WORK_FOLDER, ignore_errors=True)
    if replaced.exists():
        shutil.rmtree(replaced)


def write_bundle(folder: Path, model: DiffusionTransformer, config: BundleConfig, card: str) -> None:
    """Writes the files of a bundle into `folder`."""
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    write_beside(folder / "model.safetensors", lambda path: save_tensors(state, path, {"format": "pt"}))
    write_json(folder / "config.json", config.to_json())
    write_text(folder / "README.md", card)


def save_tensors(state: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    try:
        save_file(state, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error})") from error


def append_log(folder: Path, command: str, arguments: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Adds a line to the bundle's log: what was done to it, when, by which versions."""
    file = folder / LOG_FILE
    entry = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "arguments": dict(arguments),
        "versions": {"mediatorize": VERSION, "torch": torch.__version__},
        "result": dict(result),
    }
    before = file.read_text() if file.exists() else ""
    write_text(file, before + json.dumps(entry, default=str) + "\n")


def read_log(folder: Path) -> list[dict[str, Any]]:
    """What was done to a bundle, first to last."""
    file = folder / LOG_FILE
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    write_beside(path, lambda beside: beside.write_text(text))


def hash_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
    """A safetensors file, whole or not at all; `metadata` is kept as JSON."""
    state = {name: value.contiguous() for name, value in tensors.items()}
    write_beside(path, lambda beside: save_tensors(state, beside, {"json": json.dumps(metadata or {})}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote."""
    tensors, metadata = read_safetensors(path)
    return {name: stored.read() for name, stored in tensors.items()}, json.loads(metadata["json"])


def hash_of_weights(model: DiffusionTransformer) -> str:
    """SHA-256 over the pretrained weights, float32, in the order of their names: the same for every format they may be stored in."""
    return hash_of_tensors({name: value for name, value in model.state_dict().items() if not is_mediator(name)})


def hash_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over tensors, float32, in the order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        flat: Any = value.detach().float().cpu().contiguous().view(-1).numpy()
        digest.update(memoryview(flat).cast("B"))
    return digest.hexdigest()
