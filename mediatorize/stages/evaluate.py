"""`mediatorize evaluate`: the teacher against every level and schedule, from the same noise; one report."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mediatorize.diffusion.solvers import SOLVERS, call_noise_levels, find_solver, refuse_steps, refuse_unknown_labels, rows_per_sample
from mediatorize.errors import UserError
from mediatorize.evaluation import features as judging
from mediatorize.evaluation.digits import SIDE, digit_images
from mediatorize.evaluation.metrics import distance_of_halves, statistics_of
from mediatorize.evaluation.results import Evaluation, RowResult, Timing
from mediatorize.evaluation.timing import paired_time, peak_bytes
from mediatorize.formats import bundle
from mediatorize.formats.bundle import write_json, write_text
from mediatorize.formats.images import Pixels, decode, load_vae, to_pixels, write_arrays
from mediatorize.formats.loading import load_model
from mediatorize.formats.tensors import write_beside
from mediatorize.model.architecture import SOFTMAX, Architecture, Level
from mediatorize.model.schedule import Schedule
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.report import evaluation as words
from mediatorize.report.document import markdown
from mediatorize.report.html import html_page
from mediatorize.report.pictures import write_comparison, write_error_cost, write_schedule_map, write_trajectory_errors
from mediatorize.stages.distributed import World, processes
from mediatorize.stages.options import (
    BatchOption,
    ChannelsOption,
    ClassesOption,
    DeviceOption,
    DtypeOption,
    FamilyOption,
    ForceOption,
    GuidanceOption,
    HeadsOption,
    Option,
    SeedOption,
    SolverOption,
    StepsOption,
    WeightsOption,
    as_command,
)
from mediatorize.stages.running import hardware, pick_device, pick_dtype, progress_bar, refuse_below, text_table, versions
from mediatorize.stages.sample import (
    Sampling,
    levels_of_calls,
    refuse_unknown_level,
    sample_part,
    sampling_flops,
)
from mediatorize.version import VERSION

RESULT_FILE = "evaluation.json"
SAMPLES_FOLDER = "samples"
"""In the report's folder: what has been sampled, in parts."""


@dataclass(frozen=True)
class Report:
    """What `evaluate` found and wrote."""

    found: Evaluation

    def to_json(self) -> dict[str, Any]:
        return self.found.to_json()

    def __str__(self) -> str:
        found = self.found
        table = words.table(found, words.SHORT)
        files = ", ".join(["report.html", "report.md", RESULT_FILE, *found.pictures, *found.arrays])
        blocks = [words.title(found), text_table(table.header, table.rows), words.lead(found), *found.notes]
        return "\n\n".join([*blocks, f"Wrote {files} in {found.out}."])


@dataclass(frozen=True)
class Contribution:
    """What a process under torchrun did that is not the first, which writes the report."""

    rank: int
    processes: int
    drawn: int

    def to_json(self) -> dict[str, Any]:
        return vars(self)

    def __str__(self) -> str:
        return f"Process {self.rank} of {self.processes} drew {self.drawn} samples per level; process 0 reports."


@dataclass(frozen=True)
class Row:
    """One way to run the model."""

    name: str
    levels: Schedule | Level

    @property
    def key(self) -> str:
        """A file name of its own for what it does, whatever it is called."""
        if isinstance(self.levels, Schedule):
            return f"schedule-{hashlib.sha256(json.dumps(self.levels.to_json()).encode()).hexdigest()[:12]}"
        return str(self.levels)


@dataclass(frozen=True)
class Parts:
    """Samples on disk, a file per row and batch. A part depends on the plan and its place alone, so any process can make any of them."""

    folder: Path
    labels: Tensor
    batch: int

    def firsts(self) -> range:
        """Index of each part's first sample."""
        return range(0, len(self.labels), self.batch)

    def labels_at(self, first: int) -> Tensor:
        return self.labels[first : first + self.batch]

    def file(self, row: Row, first: int) -> Path:
        return self.folder / row.key / f"{first:07d}-{len(self.labels_at(first))}.npz"

    def read(self, row: Row, *names: str) -> Iterator[tuple[NDArray[Any], ...]]:
        """The named arrays of every part of a row, in order."""
        for first in self.firsts():
            file = self.file(row, first)
            try:
                with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:  # np.load leaves a broken file open
                    yield tuple(arrays[name] for name in names)
            except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
                raise UserError(
                    f"{file}: is not there or not whole ({error}).",
                    hint="Delete it and run the same command again; with torchrun, all nodes must share the folder.",
                ) from error


def evaluate(
    model: Annotated[str, Option("a bundle, or a checkpoint to judge alone")],
    out: Annotated[Path, Option("a folder for report.html, report.md, evaluation.json, pictures and the samples themselves")],
    *,
    levels: Annotated[tuple[int, ...] | None, Option("which levels to judge; default: all that the bundle has")] = None,
    schedule: Annotated[tuple[Path, ...], Option("schedules (JSON) to judge beside the bundle's own")] = (),
    samples: Annotated[int, Option("samples per level")] = 2000,
    features: Annotated[
        str,
        Option("what judges pictures: digits (their classifier), none, or a torch.export .pt2: images in [-1, 1] to features[, scores]"),
    ] = "digits",
    inception_weights: Annotated[
        Path | None, Option("pytorch-fid's pt_inception-2015-12-05 file; judges by FID's Inception in place of --features")
    ] = None,
    reference: Annotated[
        Path | None, Option("a .npz of mu and sigma, or of pictures in arr_0; default: the real digits, else the teacher's own samples")
    ] = None,
    npz: Annotated[bool, Option("write every row's pictures for the ADM evaluator: teacher.npz and the others'")] = False,
    vae: Annotated[Path | None, Option("a diffusers AutoencoderKL folder that decodes latents")] = None,
    pairs: Annotated[int, Option("timed model calls per level, each beside one of softmax; 0 measures no time")] = 10,
    timing_batch: Annotated[int, Option("samples in a timed model call")] = 32,
    solver: SolverOption = None,
    steps: StepsOption = None,
    cfg_scale: GuidanceOption = 1.0,
    cfg_channels: ChannelsOption = 3,
    seed: SeedOption = 0,
    batch: BatchOption = 128,
    family: FamilyOption = None,
    num_heads: HeadsOption = None,
    weights: WeightsOption = None,
    num_classes: ClassesOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    force: ForceOption = False,
) -> Report | Contribution:
    """Judges the teacher (level softmax), every level and the schedule from the same noise. Resumes after a kill; runs under torchrun."""
    command = as_command("evaluate", evaluate, dict(locals()))
    refuse_below({"samples": samples}, 2)
    refuse_below({"batch": batch, "timing-batch": timing_batch}, 1)
    if pairs:
        refuse_below({"pairs": pairs}, 2)
    if (out / RESULT_FILE).exists() and not force:
        raise UserError(f"{out}: has an evaluation.", hint="Pass --force to replace it, or another folder.")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file.", hint="Name a folder.")
    loaded = load_model(model, family=family, num_heads=num_heads, num_classes=num_classes, weights=weights)
    arch = loaded.arch
    chosen = find_solver(arch, solver)
    if chosen.adaptive:
        raise UserError(f"{solver} has no fixed cost to compare.", hint="Choose a solver with fixed steps.")
    solver = next(name for name, known in SOLVERS.items() if known is chosen)
    steps = chosen.default_steps if steps is None else steps
    refuse_steps(chosen, steps)
    sampling = Sampling(solver, steps, cfg_scale, cfg_channels, seed, batch)
    labels = torch.arange(samples) % arch.classes
    refuse_unknown_labels(arch, labels, guided=cfg_scale != 1)
    rows = _rows(loaded, levels, schedule)
    where = pick_device(device)
    _refuse_features(model, arch, features, inception_weights, reference, vae, npz)
    decoder = load_vae(vae, torch.device("cpu")) if vae else None

    with processes(where) as world:
        extractor = _open_extractor(features, inception_weights, world.device) if world.is_first else None
        if extractor is not None and reference is not None:
            compared: judging.Reference | None = judging.read_reference(reference, extractor, batch)
        else:
            compared = None
        plan = {
            "weights": bundle.hash_of_tensors(loaded.state_dict()),
            "vae": bundle.hash_of_tensors(decoder.state_dict()) if decoder is not None else None,
            "sampling": vars(sampling),
            "device": world.device.type,
            "dtype": dtype,
            "version": VERSION,
        }
        parts = Parts(out / SAMPLES_FOLDER, labels, batch)
        if world.is_first:
            _open_samples(parts.folder, plan, force)
        world.barrier()
        loaded = loaded.to(device=world.device, dtype=pick_dtype(dtype))
        drawn = _draw(loaded, rows, sampling, parts, decoder.to(world.device) if decoder is not None else None, world)
        world.barrier()
        if not world.is_first:
            return Contribution(world.rank, world.size, drawn)

        results, judged_by, halves = _compare(arch, rows, sampling, parts, loaded, extractor, compared)
        timing = None
        if pairs:
            results, timing = _measure(loaded, rows, sampling, results, pairs, min(timing_batch, samples), world.device)
        config = bundle.read_config(Path(model)) if bundle.is_bundle(Path(model)) else None
        noise_levels = call_noise_levels(arch, chosen, steps)
        found = Evaluation(
            model=model,
            name=arch.name,
            out=out,
            samples=samples,
            sampling={**vars(sampling), "dtype": dtype, "processes": world.size, "vae": None if vae is None else str(vae)},
            command=command,
            results=tuple(results),
            timing=timing,
            features=None if extractor is None else extractor.name,
            reference=judged_by.name if judged_by else None,
            distance_of_halves=halves,
            hardware=hardware(world.device),
            versions=versions(),
            source=config.source if config else None,
            log=tuple(bundle.read_log(Path(model))) if config else (),
            notes=tuple(_notes(samples, judged_by)),
            pictures=_write_pictures(out, rows, results, parts, noise_levels),
            arrays=tuple(_write_array(out, row, parts) for row in rows) if npz else (),
            noise_levels=tuple(noise_levels),
        )
        document = words.document(found)
        write_text(out / "report.md", markdown(document))
        write_text(out / "report.html", html_page(document))
        write_json(out / RESULT_FILE, found.to_json())
        return Report(found)


def _rows(model: DiffusionTransformer, levels: tuple[int, ...] | None, files: tuple[Path, ...]) -> list[Row]:
    """The teacher, the bundle's schedule, other schedules, then levels from the dearest."""
    available = model.settings.levels if model.settings else ()
    rows = [Row(SOFTMAX, SOFTMAX)]
    if model.schedule is not None:
        rows.append(Row("schedule", model.schedule))
    for file in files:
        name = file.stem if file.stem not in {row.name for row in rows} and not file.stem.isdigit() else str(file)
        if not file.is_file():
            raise UserError(f"{file}: no such schedule.", hint="Pass the path of a schedule.json.")
        rows.append(Row(name, bundle.read_schedule_file(file, model.arch.depth, available)))
    for level in sorted(set(available if levels is None else levels), reverse=True):
        refuse_unknown_level(model, level)
        rows.append(Row(str(level), level))
    return rows


def _refuse_features(
    model: str, arch: Architecture, features: str, inception: Path | None, reference: Path | None, vae: Path | None, npz: bool
) -> None:
    """Refuses, before anything is sampled, what cannot judge this model's samples."""
    if features == "digits" and inception is None and (arch.channels, arch.input_size, arch.classes) != (1, (SIDE, SIDE), 10):
        raise UserError(f"{model}: the digits classifier judges 16x16 digits, not {arch.name}.", hint="Pass --features none.")
    has_pictures = arch.channels in (1, 3) or vae is not None
    if vae is not None and arch.channels in (1, 3):
        raise UserError(f"{model}: makes pixels, which no VAE decodes.", hint="Leave --vae out.")
    if not has_pictures and (npz or inception is not None or features != "none"):
        raise UserError(f"{model}: makes latents of {arch.channels} channels, which are no pictures.", hint="Pass --vae PATH.")
    if reference is not None and features == "none" and inception is None:
        raise UserError("--reference is of no use with --features none.", hint="Pass --inception-weights or --features.")
    for path in (inception, reference):
        if path is not None and not path.is_file():
            raise UserError(f"{path}: no such file.", hint="Nothing is downloaded: give a file on disk.")


def _open_extractor(features: str, inception: Path | None, device: torch.device) -> judging.Extractor | None:
    if inception is not None:
        return judging.inception_extractor(inception, device)
    if features == "none":
        return None
    return judging.digits_extractor() if features == "digits" else judging.program_extractor(Path(features), device)


def _open_samples(folder: Path, plan: dict[str, Any], force: bool) -> None:
    """The folder of parts: a new one, or one of the same plan, whose samples are taken up."""
    file = folder / bundle.PLAN_FILE
    known = json.loads(file.read_text()) if file.exists() else None
    wanted = json.loads(json.dumps(plan))
    if known == wanted:
        return
    if folder.exists() and known is None and any(folder.iterdir()):
        raise UserError(f"{folder}: holds files that are no samples of an evaluation.", hint="Name another folder.")
    if known is not None:
        differing = ", ".join(key for key in wanted if known.get(key) != wanted[key])
        if not force:
            raise UserError(
                f"{folder}: has samples of another plan ({differing}).", hint="Pass --force to draw them anew, or another folder."
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, plan)


def _draw(model: DiffusionTransformer, rows: list[Row], sampling: Sampling, parts: Parts, decoder: Any, world: World) -> int:
    """Draws this process's share of the parts that are not there yet; gives how many samples per row that share has.

    A part of the teacher's holds its samples and |x|^2 of every sample at every model call, a student's holds |x - teacher's x|^2.
    """
    mine = parts.firsts()[world.rank :: world.size]
    for row in rows:
        (parts.folder / row.key).mkdir(exist_ok=True)
    count = sum(len(parts.labels_at(first)) for first in mine)
    there = sum(len(parts.labels_at(first)) for first in mine for row in rows if parts.file(row, first).exists())
    with progress_bar(count * len(rows), f"sampling {len(rows)} rows", "sample") as bar:
        bar.update(there)
        for first in mine:
            missing = [row for row in rows if not parts.file(row, first).exists()]
            if not missing:
                continue
            labels = parts.labels_at(first)
            samples, trajectory = _follow(model, labels, first, sampling, SOFTMAX, lambda x, call: x)
            for row in missing:
                if row.levels == SOFTMAX:
                    squares = [_squares(x) for x in trajectory]
                else:
                    samples, squares = _follow(model, labels, first, sampling, row.levels, partial(_squares_apart, trajectory))
                _write_part(parts.file(row, first), samples, squares, decoder)
                bar.update(len(labels))
    return count


def _follow(
    model: DiffusionTransformer,
    labels: Tensor,
    first: int,
    sampling: Sampling,
    levels: Schedule | Level,
    keep: Callable[[Tensor, int], Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """A batch of samples, and what `keep` makes of the state at every model call, on the model's device."""
    kept: list[Tensor] = []

    def observe(x: Tensor, t: Tensor, y: Tensor) -> None:
        kept.append(keep(x[: len(labels)], len(kept)))

    return sample_part(model, labels, first, sampling, levels, observe), kept


def _squares_apart(trajectory: list[Tensor], x: Tensor, call: int) -> Tensor:
    return _squares(x - trajectory[call])


def _squares(x: Tensor) -> Tensor:
    """(b, c, h, w) -> sums of squares (b,)"""
    return x.float().square().flatten(1).sum(1)


def _write_part(file: Path, samples: Tensor, squares: list[Tensor], decoder: Any) -> None:
    pictures = {}
    if decoder is not None:
        device = next(decoder.parameters()).device
        pictures = {"pixels": np.concatenate([to_pixels(decode(decoder, few.to(device))) for few in samples.split(8)])}
    write_arrays(file, samples=samples.numpy(), squares=torch.stack(squares, 1).cpu().numpy(), **pictures)


def _pixels(row: Row, parts: Parts) -> Iterator[Pixels]:
    """The pictures of every part of a row: decoded ones, else the samples as bytes."""
    with np.load(parts.file(row, 0), allow_pickle=False) as arrays:
        decoded = "pixels" in arrays.files
    for (values,) in parts.read(row, "pixels" if decoded else "samples"):
        yield values if decoded else to_pixels(torch.from_numpy(values))


def _compare(
    arch: Architecture,
    rows: list[Row],
    sampling: Sampling,
    parts: Parts,
    model: DiffusionTransformer,
    extractor: judging.Extractor | None,
    reference: judging.Reference | None,
) -> tuple[list[RowResult], judging.Reference | None, float | None]:
    """Errors, FLOPs and quality of every row; what they were compared with; how far apart its halves are."""
    teacher = rows[0]
    sizes = sum(squares.sum(0, dtype=np.float64) for (squares,) in parts.read(teacher, "squares"))
    softmax_flops = float(sampling_flops(arch, sampling, SOFTMAX, model.settings) or 0)
    results: list[RowResult] = []
    halves = None
    if extractor is not None and reference is None and not extractor.of_bytes:
        real = extractor.extract(digit_images()[0])[0]
        reference = judging.Reference("the real digits", statistics_of(real), real)
    if reference is not None and reference.features is not None:
        halves = distance_of_halves(reference.features)
    for row in rows:
        flops = float(sampling_flops(arch, sampling, row.levels, model.settings) or 0)
        apart = np.zeros_like(sizes)
        if row is not teacher:
            apart = sum(squares.sum(0, dtype=np.float64) for (squares,) in parts.read(row, "squares"))
        by_call = np.sqrt(apart / sizes)
        quality = None
        if extractor is not None:
            found, scores = _features(row, parts, extractor)
            if reference is None:
                reference = judging.Reference("the teacher's own samples", statistics_of(found), found)
            quality = judging.judge(found, scores, parts.labels.numpy(), reference)
        results.append(
            RowResult(
                level=row.name,
                flops=flops,
                macs=flops / 2,
                relative_flops=flops / softmax_flops,
                trajectory_error=float(by_call.mean()),
                sample_error=_sample_error(row, teacher, parts),
                errors_by_call=tuple(by_call.tolist()),
                **(vars(quality) if quality else {}),
            )
        )
    return results, reference, halves


def _sample_error(row: Row, teacher: Row, parts: Parts) -> float:
    apart = size = 0.0
    for (student,), (expected,) in zip(parts.read(row, "samples"), parts.read(teacher, "samples"), strict=True):
        apart += float(np.square(student.astype(np.float64) - expected).sum())
        size += float(np.square(expected.astype(np.float64)).sum())
    return (apart / size) ** 0.5


def _features(row: Row, parts: Parts, extractor: judging.Extractor) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Features and class scores of all samples of a row."""
    if extractor.of_bytes:
        images: Iterator[Tensor] = (judging.as_images(pictures) for pictures in _pixels(row, parts))
    else:
        images = (torch.from_numpy(values) for (values,) in parts.read(row, "samples"))
    with progress_bar(len(parts.labels), f"judging {row.name}", "picture") as bar:
        found = []
        for part in images:
            found.append(extractor.extract(part))
            bar.update(len(part))
    features, scores = zip(*found, strict=True)
    return np.concatenate(features), None if scores[0] is None else np.concatenate(scores)


@torch.inference_mode()
def _measure(
    model: DiffusionTransformer, rows: list[Row], sampling: Sampling, results: list[RowResult], pairs: int, batch: int, device: torch.device
) -> tuple[list[RowResult], Timing]:
    """Time and memory of model calls; a schedule's is over the different calls that it makes, by how often it makes them."""
    arch = model.arch
    count = batch * rows_per_sample(sampling.cfg_scale)
    generator = torch.Generator().manual_seed(sampling.seed)
    x = torch.randn(count, arch.channels, *arch.input_size, generator=generator).to(device, next(model.parameters()).dtype)
    t = torch.full((count,), 500.0 if arch.family == "dit" else 0.5, device=device)
    y = torch.arange(count, device=device) % arch.classes

    def call(levels: tuple[Level, ...]) -> Any:
        return lambda: model(x, t, y, levels=levels)

    softmax: tuple[Level, ...] = (SOFTMAX,) * arch.depth
    wanted = [Counter(levels_of_calls(arch, sampling, row.levels)) for row in rows]
    calls = sum(wanted[0].values())
    ratios: dict[tuple[Level, ...], float] = {softmax: 1.0}
    memory: dict[tuple[Level, ...], int | None] = {softmax: peak_bytes(call(softmax), device)}
    with progress_bar(1 + len({levels for counts in wanted for levels in counts} - {softmax}), "timing", "call") as bar:
        control = paired_time(call(softmax), call(softmax), pairs, device)
        bar.update()
        for counts in wanted:
            for levels in counts.keys() - ratios.keys():
                # The mean over a schedule's calls evens out what a few pairs of each leave uncertain.
                ratios[levels] = paired_time(call(levels), call(softmax), max(3, -(-pairs // len(counts))), device).ratio
                memory[levels] = peak_bytes(call(levels), device)
                bar.update()
    timed = []
    for counts, result in zip(wanted, results, strict=True):
        ratio = sum(ratios[levels] * times for levels, times in counts.items()) / calls
        latency = ratio * control.reference_seconds
        peaks = [peak for levels in counts if (peak := memory[levels]) is not None]
        timed.append(
            replace(
                result,
                relative_time=ratio,
                latency_ms=1000 * latency,
                images_per_second=batch / (calls * latency),
                peak_bytes=max(peaks) if peaks else None,
            )
        )
    return timed, Timing(pairs, batch, 1000 * control.reference_seconds, control.ratio, control.quartiles)


def _notes(samples: int, reference: judging.Reference | None) -> list[str]:
    notes = []
    if reference is not None and (width := len(reference.statistics.mean)) >= samples:
        notes.append(f"Frechet distances of {samples} samples in {width} features are far too rough: take several times as many samples.")
    return notes


def _write_pictures(out: Path, rows: list[Row], results: list[RowResult], parts: Parts, noise_levels: list[float]) -> dict[str, str]:
    """The pictures of the report: file name -> caption."""
    written = {}
    shown = _shown_pixels(rows, parts)
    if shown is not None:
        names = {SOFTMAX: "teacher (softmax)"} | {row.name: f"m = {row.name}" for row in rows if isinstance(row.levels, int)}
        write_comparison(out / "comparison.png", {names.get(name, name): p for name, p in shown.items()}, words.captions(results))
        written["comparison.png"] = "Samples, the same noise and class in each column"
    if len(rows) > 1:
        write_error_cost(out / "error-cost.png", results)
        written["error-cost.png"] = "Error against cost: each level and schedule"
        write_trajectory_errors(out / "trajectory.png", results, noise_levels)
        written["trajectory.png"] = "Where along the trajectory the students leave the teacher"
    for index, row in enumerate(row for row in rows if isinstance(row.levels, Schedule)):
        assert isinstance(row.levels, Schedule)
        file = f"schedule-{index}.png" if index else "schedule.png"
        write_schedule_map(out / file, row.levels, row.name)
        written[file] = f"{row.name}: the level of every layer at every noise level"
    return written


def _shown_pixels(rows: list[Row], parts: Parts) -> dict[str, Pixels] | None:
    """The first samples of every row, where they are pictures: twenty small ones or eight large."""
    shown = {}
    for row in rows:
        first = next(_pixels(row, parts))
        if first.shape[-1] not in (1, 3):
            return None
        wanted = 20 if first.shape[1] <= 64 else 8
        kept, have = [], 0
        for pictures in _pixels(row, parts):
            kept.append(pictures)
            have += len(pictures)
            if have >= wanted:
                break
        shown[row.name] = np.concatenate(kept)[:wanted]
    return shown


def _write_array(out: Path, row: Row, parts: Parts) -> str:
    """Writes a row's pictures as the ADM evaluator takes them, a part at a time: arr_0, uint8 (n, h, w, 3), in an uncompressed .npz."""
    name = "teacher" if row.levels == SOFTMAX else f"level-{row.name}" if isinstance(row.levels, int) else row.name
    path = out / f"{name.replace('/', '-')}.npz"
    shape = next(_pixels(row, parts)).shape[1:3]

    def write(beside: Path) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(parts.labels), *shape, 3)}
        with zipfile.ZipFile(beside, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for pictures in _pixels(row, parts):
                file.write((pictures.repeat(3, -1) if pictures.shape[-1] == 1 else pictures).tobytes())

    write_beside(path, write)
    return path.name
