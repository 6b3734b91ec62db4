"""`mediatorize evaluate`: the teacher against every level, from the same seeds."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from mediatorize.diffusion.solvers import SOLVERS, find_solver
from mediatorize.errors import UserError
from mediatorize.evaluation.digits import SIDE, digit_classifier, digit_images
from mediatorize.evaluation.metrics import distance_of_halves, frechet_distance
from mediatorize.formats.bundle import write_json, write_text
from mediatorize.formats.images import to_pixels
from mediatorize.formats.loading import load_model
from mediatorize.model.architecture import SOFTMAX, Level
from mediatorize.report.pictures import write_comparison
from mediatorize.stages.options import (
    BatchOption,
    ChannelsOption,
    ClassesOption,
    DeviceOption,
    FamilyOption,
    ForceOption,
    GuidanceOption,
    HeadsOption,
    Option,
    SeedOption,
    SolverOption,
    StepsOption,
    WeightsOption,
)
from mediatorize.stages.running import gmacs, pick_device, refuse_below, text_table
from mediatorize.stages.sample import Sampling, refuse_unknown_level, sample_many, sampling_flops


@dataclass(frozen=True)
class LevelResult:
    """One level's samples against the teacher's from the same noise."""

    level: str
    flops: float
    """Of one sample, guidance included."""
    relative_flops: float
    sample_error: float
    """|student - teacher| / |teacher| of the final samples."""
    seconds: float
    accuracy: float | None
    frechet_distance: float | None


@dataclass(frozen=True)
class Evaluation:
    model: str
    samples: int
    sampling: Sampling
    results: tuple[LevelResult, ...]
    distance_of_halves: float | None
    """Of the real data: what distances are to be read against."""
    out: Path
    has_pictures: bool

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "out": str(self.out)}

    def rows(self) -> list[tuple[str, ...]]:
        return [
            (
                result.level,
                gmacs(result.flops),
                f"{result.relative_flops:.1%}",
                f"{result.sample_error:.3f}",
                "-" if result.accuracy is None else f"{result.accuracy:.3f}",
                "-" if result.frechet_distance is None else f"{result.frechet_distance:.2f}",
            )
            for result in self.results
        ]

    def __str__(self) -> str:
        header = ("all layers at", "GMACs per sample", "of softmax's", "sample error", "class accuracy", "Frechet distance")
        how = self.sampling
        lines = [
            f"{self.model}: {self.samples} samples per level from the same noise, {how.solver} {how.steps} steps, guidance {how.cfg_scale}",
            text_table(header, self.rows()),
        ]
        if self.distance_of_halves is not None:
            lines.append(
                f"Frechet distances are to the real digits; two halves of the real digits are {self.distance_of_halves:.2f} apart."
            )
        pictures = ", comparison.png" if self.has_pictures else ""
        lines.append(f"Wrote evaluation.json, evaluation.md{pictures} in {self.out}.")
        return "\n".join(lines)

    def markdown(self) -> str:
        names = ("all layers at", "GMACs per sample", "of softmax's FLOPs", "sample error", "class accuracy", "Frechet distance")
        header = f"| {' | '.join(names)} |\n{'|---' * len(names)}|"
        rows = "\n".join(f"| {' | '.join(row)} |" for row in self.rows())
        how = self.sampling
        picture = "\n![Samples at every level](comparison.png)\n" if self.has_pictures else ""
        return (
            f"# {self.model}\n\n{self.samples} samples per level from the same noise (seed {how.seed}), {how.solver}, {how.steps} steps, "
            f"guidance {how.cfg_scale}.\n\n{header}\n{rows}\n{picture}"
        )


FEATURES = ("digits", "none")
"""What samples are judged by."""


def evaluate(
    model: Annotated[str, Option("a bundle, or a checkpoint to judge alone")],
    out: Annotated[Path, Option("a folder for evaluation.json, evaluation.md and comparison.png")],
    *,
    levels: Annotated[tuple[int, ...] | None, Option("which levels to judge; default: all that the bundle has")] = None,
    samples: Annotated[int, Option("samples per level")] = 2000,
    features: Annotated[str, Option("what judges samples: the digits classifier, or none", choices=FEATURES)] = "digits",
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
    force: ForceOption = False,
) -> Evaluation:
    """Samples the teacher (level softmax) and every level from the same noise and compares cost, samples and quality."""
    refuse_below({"samples": samples}, 2)
    refuse_below({"batch": batch}, 1)
    if (out / "evaluation.json").exists() and not force:
        raise UserError(f"{out}: has an evaluation.", hint="Pass --force to replace it, or another folder.")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file.", hint="Name a folder.")
    out.mkdir(parents=True, exist_ok=True)
    loaded = load_model(model, family=family, num_heads=num_heads, num_classes=num_classes, weights=weights)
    arch = loaded.arch
    chosen = find_solver(arch, solver)
    if chosen.adaptive:
        raise UserError(f"{solver} has no fixed cost to compare.", hint="Choose a solver with fixed steps.")
    solver = next(name for name, known in SOLVERS.items() if known is chosen)
    sampling = Sampling(solver, chosen.default_steps if steps is None else steps, cfg_scale, cfg_channels, seed, batch)
    available = loaded.settings.levels if loaded.settings else ()
    judged: list[Level] = [SOFTMAX, *sorted(set(levels or available), reverse=True)]
    for level in judged:
        refuse_unknown_level(loaded, level)
    if features == "digits" and (arch.channels, arch.input_size, arch.classes) != (1, (SIDE, SIDE), 10):
        raise UserError(f"{model}: the digits classifier judges 16x16 digits, not {arch.name}.", hint="Pass --features none.")
    loaded = loaded.to(pick_device(device))
    labels = torch.arange(samples) % arch.classes

    results: list[LevelResult] = []
    pictures: dict[str, Tensor] = {}
    teacher = torch.empty(0)
    for level in judged:
        start = time.monotonic()
        images = sample_many(loaded, labels, sampling, level, f"level {level}")
        seconds = time.monotonic() - start
        teacher = images if level == SOFTMAX else teacher
        flops = sampling_flops(arch, sampling, level, loaded.settings) or 0.0
        error = float((images - teacher).norm() / teacher.norm())
        accuracy, distance = judge(images, labels) if features == "digits" else (None, None)
        relative = flops / (results[0].flops if results else flops)
        results.append(LevelResult(str(level), flops, relative, error, seconds, accuracy, distance))
        pictures["teacher (softmax)" if level == SOFTMAX else f"m = {level}"] = images[:20]

    halves = distance_of_halves(digit_classifier().features(digit_images()[0])) if features == "digits" else None
    report = Evaluation(model, samples, sampling, tuple(results), halves, out, arch.channels in (1, 3))
    write_json(out / "evaluation.json", report.to_json())
    write_text(out / "evaluation.md", report.markdown())
    if report.has_pictures:
        write_comparison(out / "comparison.png", {name: to_pixels(images) for name, images in pictures.items()}, captions(results))
    return report


def judge(images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Class accuracy and Frechet distance to all real digits, by the digits classifier."""
    classifier = digit_classifier()
    real = classifier.features(digit_images()[0])
    return classifier.accuracy(images, labels), frechet_distance(classifier.features(images), real)


def captions(results: list[LevelResult]) -> list[str]:
    texts = []
    for result in results:
        judged = "" if result.frechet_distance is None else f", distance {result.frechet_distance:.2f}, accuracy {result.accuracy:.3f}"
        texts.append(f"{result.relative_flops:.0%} of FLOPs{judged}")
    return texts
