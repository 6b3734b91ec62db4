"""`mediatorize convert`: softmax attention -> switchable mediator attention, fitted layer by layer, with or without data."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from mediatorize.compression.fit import FitSettings, LayerErrors, fit_layers
from mediatorize.compression.initialise import INITIALISERS
from mediatorize.compression.trajectories import States, batches_for, data_states, teacher_states
from mediatorize.diffusion.solvers import DEFAULT_SOLVER, Channels, call_times, find_solver, refuse_steps, rows_per_sample
from mediatorize.errors import UserError
from mediatorize.formats import bundle
from mediatorize.formats.checkpoint import Hints, open_checkpoint
from mediatorize.formats.latents import DataFacts, Latents, open_data
from mediatorize.model import cost
from mediatorize.model.architecture import (
    SOFTMAX,
    Architecture,
    MediatorSettings,
    MlpOwner,
    Space,
    coarse_grid,
    default_local_rank,
    default_modulation_rank,
    preset,
)
from mediatorize.model.transformer import DiffusionTransformer, count_parameters
from mediatorize.report.card import model_card
from mediatorize.stages.options import (
    ChannelsOption,
    ClassesOption,
    DataOption,
    DeviceOption,
    DryRunOption,
    FamilyOption,
    ForceOption,
    HeadsOption,
    Option,
    SeedOption,
    SolverOption,
    StepsOption,
    VaeOption,
    WeightsOption,
)
from mediatorize.stages.running import (
    gmacs,
    measured_flops_per_second,
    pick_device,
    progress_bar,
    refuse_below,
    seconds_in_words,
    text_table,
)
from mediatorize.version import VERSION


@dataclass(frozen=True)
class Plan:
    """What a conversion will do; the same plan on the same weights gives the same bundle."""

    arch: Architecture
    settings: MediatorSettings
    init: str
    fit: FitSettings
    states: int
    trajectories: int
    solver: str
    steps: int
    cfg_scale: float
    cfg_channels: Channels
    data: DataFacts | None = None
    """What states are made of; None is the model's own trajectories."""

    def fingerprint(self, weights_hash: str) -> dict[str, Any]:
        """Everything that the result depends on, as JSON keeps it."""
        fields = {
            "architecture": self.arch.to_json(),
            "mediators": self.settings.to_json(),
            "init": self.init,
            "fit": vars(self.fit),
            "states": [self.states, self.trajectories],
            "solver": [self.solver, self.steps, self.cfg_scale, self.cfg_channels],
            "data": vars(self.data) if self.data else None,
            "weights": weights_hash,
            "version": VERSION,
        }
        return json.loads(json.dumps(fields))

    def added_parameters(self) -> int:
        """Parameters that the mediators add."""
        return count_parameters(self.arch, self.settings) - count_parameters(self.arch)

    def flops(self) -> int:
        """FLOPs of the conversion: states, the teacher's pass over them, and fitting (a backward counts as two forwards)."""
        arch = self.arch
        forward = cost.forward_flops(arch)
        levels = sum(cost.attention_flops(arch, level, self.settings) for level in self.settings.levels)
        return self.states_flops() + 2 * self.states * forward + arch.depth * self.fit.steps * self.fit.batch * 3 * levels

    def states_flops(self) -> int:
        """FLOPs of sampling the teacher, or of encoding pictures; latents and pixels on disk cost none."""
        if self.data:
            return self.states * self.data.encode_flops
        calls = len(call_times(find_solver(self.arch, self.solver), self.steps))
        batches = batches_for(self.states, calls, self.trajectories, self.cfg_scale)
        return batches * calls * self.trajectories * rows_per_sample(self.cfg_scale) * cost.forward_flops(self.arch)

    def fitted_on(self) -> str:
        return f"noised data: {self.data}" if self.data else bundle.OWN_TRAJECTORIES

    def peak_bytes(self) -> int:
        """The model with its mediators, all states at one layer, and one step of fitting."""
        arch, widest = self.arch, self.settings.levels[-1]
        tokens = 4 * self.states * arch.tokens * arch.width
        step = 4 * self.fit.batch * arch.tokens * (6 * arch.width + 4 * arch.heads * widest + arch.mlp_width)
        return 4 * (count_parameters(arch) + self.added_parameters()) + 16 * self.added_parameters() // arch.depth + 3 * tokens + step


@dataclass(frozen=True)
class Conversion:
    """What `convert` did, or with `dry_run` would do."""

    out: Path
    plan: Plan
    notes: tuple[str, ...]
    errors: tuple[LayerErrors, ...] = ()
    seconds: float = 0.0
    estimated_seconds: float | None = None
    """Only of a dry run: FLOPs over this device's measured rate."""
    resumed_layers: int = 0
    relative_flops: dict[int, float] = field(default_factory=dict)
    """Of the whole model, every layer at one level."""

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "dry_run": self.estimated_seconds is not None,
            "architecture": self.plan.arch.to_json(),
            "mediators": self.plan.settings.to_json(),
            "init": self.plan.init,
            "fit": vars(self.plan.fit),
            "states": self.plan.states,
            "data": vars(self.plan.data) if self.plan.data else None,
            "added_parameters": self.plan.added_parameters(),
            "flops_of_conversion": self.plan.flops(),
            "peak_bytes": self.plan.peak_bytes(),
            "relative_flops": self.relative_flops,
            "layer_errors": [vars(errors) for errors in self.errors],
            "seconds": round(self.seconds, 1),
            "estimated_seconds": self.estimated_seconds,
            "resumed_layers": self.resumed_layers,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        plan = self.plan
        rows = [
            (f"m={m}", gmacs(cost.forward_flops(plan.arch, m, plan.settings)), f"{self.relative_flops[m]:.1%}")
            for m in plan.settings.levels
        ]
        rows.insert(0, (SOFTMAX, gmacs(cost.forward_flops(plan.arch)), "100%"))
        lines = [
            f"{plan.arch.name}: {plan.arch.depth} attention layers get levels {', '.join(map(str, plan.settings.levels))} beside softmax",
            f"  mediators from {plan.settings.space}, {plan.init}, local rank {plan.settings.local_rank}, {plan.settings.mlp} MLPs; "
            f"{plan.added_parameters() / 1e6:.1f}M parameters more",
            *(f"  {note}" for note in self.notes),
            "",
            text_table(("all layers at", "GMACs per forward", "of softmax's"), rows),
            "",
        ]
        if self.estimated_seconds is not None:
            how = f"guidance {plan.cfg_scale}" if plan.data else f"{plan.solver}, {plan.steps} steps, guidance {plan.cfg_scale}"
            lines += [
                f"Would take {plan.states} states of {plan.fitted_on()} ({how})",
                f"and fit {plan.fit.steps} steps of {plan.fit.batch} states per layer:",
                f"  {plan.flops() / 1e12:.1f} TFLOPs, about {seconds_in_words(self.estimated_seconds)} at this device's rate; "
                f"memory up to {plan.peak_bytes() / 2**30:.1f} GiB",
                f"  {self.out} would be written.",
            ]
            return "\n".join(lines)
        if plan.data:
            lines.append(f"States were of {plan.fitted_on()}.")
        if plan.fit.steps == 0:
            lines.append("Not fitted (--fit-steps 0): mediators are as initialised. Relative error of each layer's output:")
        else:
            lines.append("Relative error of each layer's output on held-out states, before -> after fitting:")
        levels = plan.settings.levels
        table = [(f"{e.layer}", *(f"{e.before[m]:.3f} -> {e.after[m]:.3f}" for m in levels)) for e in self.errors]
        means = [tuple(sum(getattr(e, when)[m] for e in self.errors) / len(self.errors) for when in ("before", "after")) for m in levels]
        table.append(("mean", *(f"{before:.3f} -> {after:.3f}" for before, after in means)))
        lines.append(text_table(("layer", *(f"m={m}" for m in plan.settings.levels)), table))
        resumed = f" ({self.resumed_layers} layers were there from before)" if self.resumed_layers else ""
        lines += ["", f"Wrote {self.out} in {seconds_in_words(self.seconds)}{resumed}. Level softmax is the pretrained model, bit for bit."]
        return "\n".join(lines)


def convert(
    checkpoint: Annotated[str, Option("a pretrained DiT or SiT; with --dry-run also a published size, such as DiT-XL/2@256")],
    out: Annotated[Path, Option("the bundle (a folder) to write")],
    *,
    levels: Annotated[tuple[int, ...], Option("mediator counts that every layer can run at")] = (1, 4, 16),
    init: Annotated[str, Option("where pooling starts", choices=INITIALISERS)] = "cluster-queries",
    mediators_from: Annotated[Space, Option("which projection makes mediators: queries or keys")] = "queries",
    local_rank: Annotated[int | None, Option("rank of the local branch, 0 for none; default: a quarter of the width, at most 64")] = None,
    modulation_rank: Annotated[
        int | None,
        Option("rank of the change to modulations, which finetune trains; default: a quarter of the width, at most 32"),
    ] = None,
    mlp: Annotated[MlpOwner, Option("own: mediator levels have MLPs of their own, which finetune trains; or shared")] = "own",
    data: DataOption = None,
    vae: VaeOption = None,
    states: Annotated[int, Option("states to fit on: of the model's own trajectories, or of --data")] = 1024,
    trajectories: Annotated[int, Option("samples drawn at a time to get them")] = 32,
    fit_steps: Annotated[int, Option("steps of fitting per layer; 0 leaves mediators as initialised")] = FitSettings.steps,
    batch: Annotated[int, Option("states per step of fitting")] = FitSettings.batch,
    learning_rate: Annotated[float, Option("peak rate of fitting")] = FitSettings.learning_rate,
    solver: SolverOption = None,
    steps: StepsOption = None,
    cfg_scale: Annotated[
        float,
        Option(
            "guidance of the trajectories, best what will be sampled with; 1 is none. With --data: half of the labels are null unless 1"
        ),
    ] = 1.5,
    cfg_channels: ChannelsOption = 3,
    seed: SeedOption = 0,
    family: FamilyOption = None,
    num_heads: HeadsOption = None,
    num_classes: ClassesOption = None,
    weights: WeightsOption = None,
    device: DeviceOption = "auto",
    dry_run: DryRunOption = False,
    force: ForceOption = False,
) -> Conversion:
    """Gives every attention layer a mediator path beside its softmax one, and fits it to the layer's own outputs. Resumes after a kill."""
    start = time.monotonic()
    if vae and not data:
        raise UserError(f"{vae}: without --data there is nothing for a VAE to encode.", hint="Pass --data, or leave --vae out.")
    source = Path(checkpoint)
    if bundle.is_bundle(source):
        raise UserError(f"{source}: is a bundle already; nothing was converted.", hint="Convert the checkpoint it was made from.")
    published = dry_run and "@" in checkpoint and not source.exists()
    opened = None if published else open_checkpoint(source, Hints(family, num_heads, num_classes), weights)
    arch = preset(checkpoint) if opened is None else opened.arch
    local = default_local_rank(arch.width) if local_rank is None else local_rank
    modulation = default_modulation_rank(arch.width) if modulation_rank is None else modulation_rank
    settings = MediatorSettings(tuple(sorted(set(levels))), mediators_from, local, modulation, mlp)
    name = solver or DEFAULT_SOLVER[arch.family]
    chosen = find_solver(arch, name)
    if chosen.adaptive:
        raise UserError(f"{name} takes as many steps as it needs; states are spread over a fixed number.", hint="Pass --solver euler.")
    fit = FitSettings(fit_steps, batch, learning_rate, seed)
    taken = chosen.default_steps if steps is None else steps
    refuse_steps(chosen, taken)
    guidance = cfg_scale if arch.null_class else 1.0
    plan = Plan(arch, settings, init, fit, states, trajectories, name, taken, guidance, cfg_channels)
    relative, notes = _check_plan(plan)
    notes += list(opened.notes) if opened else []
    dataset = open_data(data, arch, vae, pick_device(device)) if data else None
    plan = replace(plan, data=dataset.facts() if dataset else None)
    if dry_run:
        rate = measured_flops_per_second(pick_device(device), arch.width, arch.tokens)
        return Conversion(out, plan, tuple(notes), estimated_seconds=plan.flops() / rate, relative_flops=relative)

    assert opened is not None
    refuse_occupied(out, force)
    opened.verify()
    model = opened.load()
    weights_hash = bundle.hash_of_weights(model)
    partial = _open_partial(out, plan.fingerprint(weights_hash), force)
    model = model.to(pick_device(device))

    saved = bundle.saved_states(partial)
    collected = States(**saved) if saved else _collect(model, plan, dataset)
    if not saved:
        bundle.save_states(partial, vars(collected))
    del dataset  # and the VAE with it
    model.add_mediators(settings, seed)
    model.requires_grad_(False)
    restored = {
        index: (state, LayerErrors(index, errors["before"], errors["after"]))
        for index, (state, errors) in bundle.saved_layers(partial).items()
    }
    done: list[LayerErrors] = []
    with progress_bar((arch.depth - len(restored)) * max(fit_steps, 1), "fitting layers") as bar:
        for errors in fit_layers(model, collected, INITIALISERS[init], fit, restored=restored, on_step=lambda: bar.update()):
            done.append(errors)
            if errors.layer not in restored:
                state = {key: value.cpu() for key, value in model.attention_layers()[errors.layer].mediated().state_dict().items()}
                bundle.save_layer(partial, errors.layer, state, {"before": errors.before, "after": errors.after})

    result = Conversion(out, plan, tuple(notes), tuple(done), time.monotonic() - start, None, len(restored), relative)
    provenance = {"file": source.name, "format": opened.format, "weights": opened.part, "sha256": weights_hash}
    config = bundle.BundleConfig(arch, settings, provenance, [vars(errors) for errors in done], fitted_on=plan.fitted_on())
    bundle.write_bundle(partial, model.cpu(), config, model_card(config))
    arguments = {"checkpoint": checkpoint, "out": str(out), **plan.fingerprint(weights_hash)}
    (partial / bundle.LOG_FILE).unlink(missing_ok=True)  # of a try that was killed at the very end
    bundle.append_log(partial, "convert", arguments, {"seconds": round(result.seconds, 1), "resumed_layers": len(restored)})
    bundle.commit(partial, out)
    return result


def _collect(model: DiffusionTransformer, plan: Plan, dataset: Latents | None) -> States:
    if dataset is not None:
        with progress_bar(plan.states, "reading data", "item") as bar:
            return data_states(
                plan.arch, dataset, plan.states, cfg_scale=plan.cfg_scale, seed=plan.fit.seed, on_read=lambda count: bar.update(count)
            )[0]
    calls = len(call_times(find_solver(plan.arch, plan.solver), plan.steps))
    total = calls * batches_for(plan.states, calls, plan.trajectories, plan.cfg_scale)
    with progress_bar(total, "sampling the teacher", "call") as bar:
        return teacher_states(
            model,
            plan.states,
            solver=plan.solver,
            steps=plan.steps,
            cfg_scale=plan.cfg_scale,
            cfg_channels=plan.cfg_channels,
            trajectories=plan.trajectories,
            seed=plan.fit.seed,
            on_call=lambda: bar.update(),
        )


def _check_plan(plan: Plan) -> tuple[dict[int, float], list[str]]:
    """The model's relative cost per level; refuses a plan that saves nothing or cannot be."""
    arch, settings = plan.arch, plan.settings
    cells = coarse_grid(arch.grid)[0] * coarse_grid(arch.grid)[1]
    if settings.levels[-1] > cells:
        raise UserError(f"{settings.levels[-1]} mediators do not fit {cells} positions.", hint="Pass smaller --levels.")
    refuse_below({"fit-steps": plan.fit.steps, "seed": plan.fit.seed}, 0)
    refuse_below({"batch": plan.fit.batch, "trajectories": plan.trajectories}, 1)
    refuse_below({"states": plan.states}, 16)
    softmax = cost.forward_flops(arch)
    relative = {m: cost.forward_flops(arch, m, settings) / softmax for m in settings.levels}
    idle = [m for m, share in relative.items() if share >= 1]
    if len(idle) == len(relative):
        raise UserError(
            f"Nothing was converted: with {arch.tokens} tokens of width {arch.width} none of levels {list(settings.levels)} is cheaper "
            "than softmax.",
            hint="Pass smaller --levels or a smaller --local-rank.",
        )
    notes = [f"level {m} is no cheaper than softmax here ({relative[m]:.1%})" for m in idle]
    return relative, notes


def _open_partial(out: Path, fingerprint: dict[str, Any], force: bool) -> Path:
    """The folder that the bundle is prepared in: a new one, or an unfinished one of the same plan."""
    partial = bundle.partial_folder(out)
    plan_file = partial / bundle.PLAN_FILE
    if plan_file.exists():
        if json.loads(plan_file.read_text()) == fingerprint:
            return partial
        if not force:
            raise UserError(
                f"{partial}: an unfinished conversion with other settings, data or weights.",
                hint="Repeat its command, or pass --force to drop it.",
            )
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    bundle.write_json(plan_file, fingerprint)
    return partial


def refuse_occupied(out: Path, force: bool) -> None:
    """Only a bundle or an empty folder is ever replaced, and a bundle only by force."""
    bundle.recover(out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not bundle.is_bundle(out):
        raise UserError(f"{out}: exists and is not a bundle.", hint="Name another folder; --force replaces bundles only.")
    if not force:
        raise UserError(f"{out}: exists.", hint="Pass --force to replace it, or another path.")
