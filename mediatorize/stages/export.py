"""`mediatorize export` writes a bundle as files that other tools load, and checks them by loading them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mediatorize.errors import UserError, about
from mediatorize.export.contract import Choices, Subject
from mediatorize.export.targets import EXPORTS, refuse_idle_choices
from mediatorize.model.levels import Level, read_level
from mediatorize.planning.results import ExportedScheduler
from mediatorize.report.tables import left_out
from mediatorize.signatures import OneOf, given, one
from mediatorize.stages import options
from mediatorize.stages.options import DATA, WHAT, option
from mediatorize.stages.plans import added_hash
from mediatorize.stages.running import progress_bar
from mediatorize.version import VERSION

if TYPE_CHECKING:
    from mediatorize.export.verification import Verification
    from mediatorize.model.transformer import DiffusionTransformer

SCHEDULER = "scheduler"
"""The target of plans; all others are of bundles."""

TARGETS = "; ".join([*(f"{name}: {target.help}" for name, target in EXPORTS.items()), f"{SCHEDULER}: plans as a diffusers scheduler"])

RECORD_FILE = "export.json"
"""Says what was exported and how it was checked. It also marks the folder as one that may be replaced."""


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """How many parameters are left of a bundle's, and what is gone, in words."""

    parameters: int
    of: int
    without: str

    @classmethod
    def of_models(cls, kept: DiffusionTransformer, whole: DiffusionTransformer) -> Pruned:
        count, total = (sum(value.numel() for value in model.state_dict().values()) for model in (kept, whole))
        return cls(parameters=count, of=total, without=left_out(kept.added()))


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written, and how much its outputs differ from the model's."""

    out: Path
    name: str
    target: str
    verified: Verification
    dtype: str
    has_schedule: bool
    runs_softmax: bool
    """Whether it is the pretrained model until a level is chosen."""
    plans: tuple[int, ...]
    """Numbers of calls of the plans that travel with it."""
    left: Mapping[int, str]
    """Of the plans that stay behind, and why."""
    pruned: Pruned | None
    bytes: int


LARGEST_DIFFERENCE = 1e-4
"""Between samples by a plan and by its scheduler."""


def export(
    model: Annotated[Path, typer.Argument(help="a bundle; for a scheduler, a plan file")],
    out: Annotated[Path, typer.Argument(help="the folder to write")],
    *,
    to: Annotated[str, option(f"the tool that will load it. {TARGETS}", WHAT), OneOf((*EXPORTS, SCHEDULER))],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], option("diffusers, safetensors: precision of the stored weights", WHAT)
    ] = "float32",
    adapter: Annotated[
        bool,
        option("safetensors: write only the weights added to the checkpoint, for load_model(..., adapter=)", WHAT, "--adapter"),
    ] = False,
    vae: Annotated[Path | None, option("diffusers: folder of a VAE to include", DATA)] = None,
    level: Annotated[
        Level | None,
        option(
            "one level for all layers and model calls. diffusers: in place of the schedule; attention-mediators: the level to write",
            WHAT,
            parser=one(read_level),
            metavar="LEVEL",
        ),
    ] = None,
    schedule: Annotated[
        Path | None, option("diffusers, safetensors, torch-export: a schedule file in place of the bundle's own", WHAT)
    ] = None,
    prune: Annotated[
        bool,
        option("diffusers, safetensors: leave out all weights that the schedule never uses; no other level can run then", WHAT, "--prune"),
    ] = False,
    evaluation: Annotated[Path | None, option("folder that `mediatorize evaluate` wrote; its results go into the model card", DATA)] = None,
    base_model: Annotated[
        str | None, option("the pretrained model's name on the Hugging Face Hub, such as facebook/DiT-XL-2-256, for the model card", DATA)
    ] = None,
    license: Annotated[str | None, option("its licence as the Hub names it, such as cc-by-nc-4.0, for the model card", DATA)] = None,
    force: options.Force = False,
) -> Exported | ExportedScheduler:
    """Writes a bundle as files that other tools load. Loads them back, compares outputs at every level, and adds a model card.

    Example: mediatorize export out dit-xl-diffusers --to diffusers --vae sd-vae-ft-ema
    """
    from mediatorize.diffusion.sampling import refuse_unknown_level
    from mediatorize.export import scheduler
    from mediatorize.export.pruning import pruned
    from mediatorize.export.verification import verify
    from mediatorize.formats import bundle
    from mediatorize.formats.bundle import hash_of_weights
    from mediatorize.formats.plans import PLAN_NAME, read_plans
    from mediatorize.report.card import export_card, hub_header
    from mediatorize.report.exporting import checks, facts

    if to == SCHEDULER:
        idle = [name for name in given(export, dict(locals())) if name not in ("model", "out", "to", "force")]
        if idle:
            raise UserError(f"--{idle[0].replace('_', '-')} says nothing to --to {SCHEDULER}.", hint="Leave it out.")
        return export_scheduler(model, out, force)
    chosen, choices = EXPORTS[to], Choices(dtype=dtype, adapter=adapter, vae=vae, level=level, schedule=schedule, prune=prune)
    refuse_idle_choices(to, choices)
    header = hub_header("diffusers" if to == "diffusers" else "mediatorize", license, base_model)
    if not bundle.is_bundle(model):
        raise UserError(f"{model}: is no bundle.", hint="Make one with `mediatorize convert`.")
    refuse_foreign_folder(out, force)
    judged = read_evaluation(model if evaluation is None else evaluation, required=evaluation is not None)
    config = bundle.read_config(model)
    bundle.refuse_pruned(model, config)
    whole = bundle.load_bundle(model)
    refuse_unknown_level(whole, level)
    if schedule is not None:
        (whole.schedule,) = bundle.read_schedules((schedule,), whole).values()
    own_plans = model / PLAN_NAME
    carried = chosen.carries_plans and not adapter and level is None and schedule is None and not prune
    there = read_plans(own_plans) if carried and own_plans.is_file() else {}
    weights, added = (hash_of_weights(whole), added_hash(whole)) if there else (None, None)
    left: dict[int, str] = {}
    for calls, plan in there.items():
        if plan.made_for.get("weights", weights) != weights or plan.made_for.get("added") not in (None, added):
            left[calls] = "the weights have changed since it was fitted"
        elif to == "diffusers" and not scheduler.travels({calls: plan}):
            left[calls] = "it needs both halves of guidance or levels, which a pipeline's scheduler does not see"
        elif to == "safetensors" and dtype != "float32":
            left[calls] = f"it was not fitted to weights in {dtype}"
    plans = {calls: plan for calls, plan in there.items() if calls not in left}
    with about(model):
        subject = pruned(Subject(config, whole)) if prune else Subject(config, whole, plans)

    with staged(out) as partial, progress_bar(3, f"exporting to {to}", "part") as bar:
        chosen.target.write(partial, subject, choices)
        bar.update()
        verified = verify(partial, chosen, subject, choices, whole)
        bar.update()
        result = Exported(
            out=out,
            name=subject.arch.name,
            target=f"{to} ({'adapter, ' if adapter else ''}{dtype})" if "dtype" in chosen.heeds else to,
            verified=verified,
            dtype=dtype,
            has_schedule=whole.schedule is not None,
            runs_softmax=chosen.level_later and whole.schedule is None and level is None,
            plans=tuple(plans),
            left=left,
            pruned=Pruned.of_models(subject.model, whole) if prune else None,
            bytes=sum(file.stat().st_size for file in partial.rglob("*") if file.is_file()),
        )
        card = export_card(
            subject.config,
            whole.schedule,
            target=result.target,
            usage=chosen.target.usage(subject, choices).replace("DEST", out.name),
            checks=checks(result),
            history=bundle.read_log(model),
            evaluation=judged,
        )
        bundle.write_text(partial / "README.md", header + card)
        bundle.write_json(partial / RECORD_FILE, {"version": VERSION, "bundle": model.name, **facts(result), "out": out.name})
        bar.update()
    return result


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write an export into; it takes the place of `out` once all is written, and is gone if that fails."""
    from mediatorize.formats import bundle

    partial = bundle.partial_folder(out)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    bundle.write_json(partial / RECORD_FILE, {})
    try:
        yield partial
        bundle.commit(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def export_scheduler(file: Path, out: Path, force: bool) -> ExportedScheduler:
    """Writes the plans in a file, or in a bundle, as a diffusers scheduler, and samples by it once."""
    from mediatorize.export import scheduler
    from mediatorize.formats import bundle
    from mediatorize.formats.plans import PLAN_NAME, read_plans

    file = file / PLAN_NAME if file.is_dir() else file
    plans = read_plans(file)
    refuse_foreign_folder(out, force)
    with staged(out) as partial:
        with about(file):
            scheduler.write(partial, plans)
        difference = scheduler.difference(partial, plans)
        if difference > LARGEST_DIFFERENCE:
            raise UserError(f"{out}: the written scheduler differs from the plan by {difference:.1g}.", hint="Please report this.")
        usage = scheduler.usage(out.name, plans)
        bundle.write_text(partial / "README.md", f"# Plans for diffusers, of {', '.join(map(str, plans))} model calls\n\n{usage}\n")
        bundle.write_json(partial / RECORD_FILE, {"version": VERSION, "plans": list(plans), "difference": difference})
    return ExportedScheduler(out=out, calls=tuple(plans), difference=difference, usage=usage)


def refuse_foreign_folder(out: Path, force: bool) -> None:
    """Refuses every folder that exists, except an empty one and, with --force, an export."""
    from mediatorize.formats import bundle

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
    """The Markdown of an evaluation; an empty string if there is none."""
    file = folder / "report.md"
    if file.exists():
        return file.read_text()
    if required:
        raise UserError(f"{folder}: has no report.md.", hint="Pass the folder that `mediatorize evaluate` wrote.")
    return ""
