"""How far samples by calibrated schedules are from the teacher's, beside what one could do without a search, on noise of their own.

    python benchmarks/samples.py runs/digits/bundle --steps 10 --budgets 0.61,0.41 --json digits-10.json
    python benchmarks/samples.py runs/digits-dit/bundle --steps 50 --cfg-scale 1.2 --budgets 0.53,0.37 --frechet 2000

Searches as `mediatorize calibrate` does, then samples anew, from a seed that the search has not seen: the teacher, what was chosen, and the
best candidate of every other kind within the budget. An error is |sample - teacher's| / |teacher's| of one sample. With --frechet, also the
Frechet distance of so many samples to the real digits, as a share of the teacher's (bundles of digits alone).
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from mediatorize.compression.costs import kinds_of
from mediatorize.compression.judging import Candidate, Errors
from mediatorize.compression.search import EVALUATIONS, Outcomes, costs_of, search
from mediatorize.diffusion.sampling import Sampler, sample_many
from mediatorize.evaluation.digits import distance_to_digits
from mediatorize.formats.bundle import load_bundle, read_log
from mediatorize.model.levels import SOFTMAX
from mediatorize.randomness import spread_labels
from mediatorize.report.tables import text_table

OTHER_SEED = 90210
"""Of the samples that errors are measured on."""


def shown(found: Outcomes, budget: float, chosen: Candidate) -> list[Candidate]:
    """The chosen candidate, then the best of every other kind within the budget."""
    within = sorted((each for each in found.candidates if each.share <= budget + 1e-12), key=lambda each: each.error)
    best: dict[str, Candidate] = {}
    for each in within:
        best.setdefault(each.kind, each)
    return [chosen, *(each for kind, each in best.items() if kind != chosen.kind)]


def main(
    bundle: Path,
    solver: str | None = None,
    steps: int | None = None,
    cfg_scale: float = 1.0,
    budgets: str = "0.5,0.33",
    kinds: str = "",
    evaluations: int = EVALUATIONS,
    samples: int = 200,
    frechet: int = 0,
    batch: int = 100,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    begun = time.perf_counter()
    model = load_bundle(bundle)
    arch = model.arch
    sampler = Sampler.resolve(arch, solver=solver, steps=steps, cfg_scale=cfg_scale)
    usable = kinds_of(model.added(), tuple(kind for kind in kinds.split(",") if kind))
    wanted = [float(budget) for budget in budgets.split(",")]
    found = search(model, sampler, wanted, costs_of("flops", model, sampler), kinds=usable, evaluations=evaluations)
    searched = time.perf_counter() - begun

    labels = spread_labels(arch.classes, max(samples, frechet), OTHER_SEED)

    def draw(candidate: Candidate | None, count: int) -> Tensor:
        how = replace(sampler, seed=OTHER_SEED, steps=candidate.steps if candidate else sampler.steps)
        return sample_many(model, labels[:count], how, candidate.schedule if candidate else SOFTMAX, batch)

    teacher = draw(None, len(labels))
    base = distance_to_digits(teacher) if frechet else None
    rows: list[dict[str, Any]] = []
    for outcome in found.outcomes:
        for candidate in shown(found, outcome.budget, outcome.chosen):
            is_chosen = candidate is outcome.chosen
            drawn = draw(candidate, len(labels) if is_chosen else samples)
            errors = Errors.of(drawn[:samples], teacher[:samples])
            ratio = distance_to_digits(drawn) / base if is_chosen and base else None
            rows.append(
                vars(errors)
                | {"budget": outcome.budget, "chosen": is_chosen, "kind": candidate.kind, "name": candidate.name, "share": candidate.share}
                | {"frechet_of_the_teachers": ratio}
            )
    header = ("budget", "kind", "FLOPs", "median", "geometric", "mean", "flipped", "Frechet")
    table = [
        (
            f"{row['budget']:.0%}",
            row["kind"] + (" (chosen)" if row["chosen"] else ""),
            f"{row['share']:.1%}",
            *(f"{row[name]:.4f}" for name in ("median", "geometric", "mean")),
            f"{row['flipped']:.1%}",
            "-" if row["frechet_of_the_teachers"] is None else f"{row['frechet_of_the_teachers']:.3f}",
        )
        for row in rows
    ]
    typer.echo(text_table(header, table))
    typer.echo(f"The search took {searched:.0f} s, of which the error table {found.table_seconds or 0:.0f} s.")
    if json_file is not None:
        facts = {
            "model": arch.name,
            "sampler": sampler.to_json(),
            "finetuned": any(line["command"] == "finetune" for line in read_log(bundle)),
        }
        facts |= {"teacher_frechet": base, "frechet_samples": frechet, "search_seconds": searched, "table_seconds": found.table_seconds}
        facts |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
        json_file.write_text(json.dumps(facts | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
