"""`mediatorize export`: a bundle as files that other tools load, checked by loading them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

from mediatorize.errors import UserError
from mediatorize.formats import bundle
from mediatorize.formats.export.contract import Choices, Export, Subject, probe_of
from mediatorize.formats.export.targets import EXPORTS
from mediatorize.formats.export.weights import DTYPES
from mediatorize.model.architecture import Level
from mediatorize.report.card import export_card
from mediatorize.stages.options import ForceOption, Option
from mediatorize.stages.running import progress_bar
from mediatorize.stages.sample import refuse_unknown_level
from mediatorize.version import VERSION

TOLERANCE = 1e-4
"""Of an output's largest value: how far a loaded export may be from the model."""

RECORD_FILE = "export.json"
"""What was exported and what it was compared by; also the mark of a folder that may be replaced."""


@dataclass(frozen=True)
class ExportReport:
    out: Path
    name: str
    target: str
    differences: dict[str, float]
    """Largest difference to the model's output, as a share of its largest value, by what was called."""
    rounding: float
    """The same between the model and its weights rounded to the exported type."""
    dtype: str
    has_schedule: bool
    runs_softmax: bool
    """Whether it is the pretrained model until a level is chosen."""
    bytes: int

    @property
    def largest(self) -> float:
        return max(self.differences.values())

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "out": str(self.out), "largest_difference": self.largest}

    def checks(self) -> str:
        model = "the bundle's model" if self.dtype == "float32" else f"the bundle's model with its weights rounded to {self.dtype}"
        apart = f"differ by at most {self.largest:.1e} of their largest value" if self.largest else "are the same, bit for bit"
        text = f"Loaded back and compared with {model} at {', '.join(self.differences)}: outputs {apart}."
        return text if self.dtype == "float32" else f"{text} Rounding itself changes them by up to {self.rounding:.1e}."

    def __str__(self) -> str:
        lines = [f"{self.out}: {self.name}, exported to {self.target} ({self.bytes / 2**20:.1f} MiB)", self.checks()]
        if self.runs_softmax:
            lines.append("It has no schedule and runs at softmax until a level is chosen: calibrate first, or pass --level.")
        lines.append(f"{self.out / 'README.md'} says how to use it.")
        return "\n".join(lines)


def export(
    model: Annotated[Path, Option("a bundle")],
    out: Annotated[Path, Option("the folder to write")],
    *,
    to: Annotated[str, Option("what will load it", choices=EXPORTS)],
    dtype: Annotated[str, Option("safetensors: what weights are stored in", choices=DTYPES)] = Choices.dtype,
    adapter: Annotated[
        bool, Option("safetensors: only what was added to the pretrained checkpoint, for load_model(..., adapter=)")
    ] = False,
    vae: Annotated[Path | None, Option("diffusers: a VAE to put in, a folder on disk")] = None,
    level: Annotated[Level | None, Option("diffusers: one level for all in place of the schedule; can be set after loading too")] = None,
    evaluation: Annotated[Path | None, Option("a folder of `mediatorize evaluate`, whose results go into the model card")] = None,
    force: ForceOption = False,
) -> ExportReport:
    """Writes a bundle as files that other tools load, loads them and compares outputs at every level, and adds a model card."""
    target = EXPORTS[to]
    choices = Choices(dtype, adapter, vae, level)
    refuse_idle_choices(to, target, choices)
    if not bundle.is_bundle(model):
        raise UserError(f"{model}: is no bundle.", hint="Make one with `mediatorize convert`.")
    refuse_foreign_folder(out, force)
    judged = read_evaluation(model if evaluation is None else evaluation, required=evaluation is not None)
    subject = Subject(bundle.read_config(model), bundle.load_bundle(model))
    refuse_unknown_level(subject.model, level)

    partial = bundle.partial_folder(out)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    bundle.write_json(partial / RECORD_FILE, {})
    try:
        with progress_bar(3, f"exporting to {to}", "part") as bar:
            target.write(partial, subject, choices)
            bar.update()
            differences, rounding = verify(partial, target, subject, choices)
            bar.update()
            size = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
            schedule = subject.model.schedule
            runs_softmax = "level" in target.heeds and schedule is None and level is None
            shown = f"{to} ({'adapter, ' if adapter else ''}{dtype})" if "dtype" in target.heeds else to
            report = ExportReport(out, subject.arch.name, shown, differences, rounding, dtype, schedule is not None, runs_softmax, size)
            card = export_card(
                subject.config,
                schedule,
                target=shown,
                usage=target.usage(subject, choices).replace("DEST", out.name),
                checks=report.checks(),
                history=bundle.read_log(model),
                evaluation=judged,
            )
            bundle.write_text(partial / "README.md", card)
            bundle.write_json(partial / RECORD_FILE, {"version": VERSION, "bundle": model.name, **report.to_json(), "out": out.name})
            bundle.commit(partial, out)
            bar.update()
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def verify(folder: Path, target: Export, subject: Subject, choices: Choices) -> tuple[dict[str, float], float]:
    """Differences of a written export to the model by what was called, and what rounding alone makes; refuses what is not the model."""
    probe = probe_of(subject)
    found = target.outputs(folder, subject, choices, probe)
    probe = replace(probe, cases=tuple(case for case in probe.cases if case.name in found))
    exact = probe.outputs(subject.model)
    expected = exact if choices.dtype == "float32" else probe.outputs(target.reference(subject, choices))
    assert found.keys() == expected.keys()
    assert found

    def apart(one: Any, other: Any) -> float:
        return float((one - other).abs().max() / other.abs().max())

    differences = {name: apart(found[name], expected[name]) for name in expected}
    for name, difference in differences.items():
        if not difference <= TOLERANCE:
            raise UserError(f"The export is not the model: outputs at {name} differ by {difference:.1e}.", hint="Please report it.")
    return differences, max(apart(expected[name], exact[name]) for name in exact)


def refuse_idle_choices(to: str, target: Export, choices: Choices) -> None:
    """An option that would change nothing is a mistake."""
    for choice in fields(Choices):
        if getattr(choices, choice.name) != choice.default and choice.name not in target.heeds:
            heeding = [name for name, export in EXPORTS.items() if choice.name in export.heeds]
            raise UserError(f"--{choice.name} says nothing to --to {to}.", hint=f"It goes with --to {' or '.join(heeding)}.")


def refuse_foreign_folder(out: Path, force: bool) -> None:
    """Only an export or an empty folder is ever replaced, and an export only by force."""
    bundle.recover(out)
    partial = bundle.partial_folder(out)
    if partial.exists() and not (partial / RECORD_FILE).exists():
        raise UserError(f"{partial}: stands in the way and is no unfinished export.", hint="Name another folder.")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / RECORD_FILE).exists():
        raise UserError(f"{out}: exists and is no export.", hint="Name another folder; --force replaces exports only.")
    if not force:
        raise UserError(f"{out}: exists.", hint="Pass --force to replace it, or another path.")


def read_evaluation(folder: Path, *, required: bool) -> str:
    """The Markdown of an evaluation; nothing where the bundle has none."""
    file = folder / "report.md"
    if file.exists():
        return file.read_text()
    if required:
        raise UserError(f"{folder}: has no report.md.", hint="Pass the folder that `mediatorize evaluate` wrote.")
    return ""
