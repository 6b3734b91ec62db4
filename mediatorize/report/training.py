"""The report of a training, while it runs and when it is done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mediatorize.model.levels import title
from mediatorize.report.tables import seconds_in_words, text_table

if TYPE_CHECKING:
    from mediatorize.compression.records import DistillSettings
    from mediatorize.compression.training import Estimate, Finetuning, Training, TrainingPlan

METRICS_FILE, BOARD_FOLDER = "finetune.jsonl", "tensorboard"


def words(found: Finetuning) -> str:
    distill = found.plan.distill
    lines = [
        f"{found.path}: {distill.steps} steps of {distill.batch} states from {_states(found.plan)}; "
        f"{found.trained_parameters / 1e6:.2f}M parameters are trained",
        *(f"  {note}" for note in found.notes),
    ]
    if found.estimate is not None:
        lines += _of_dry_run(found.estimate)
    if found.training is not None:
        lines += _of_training(found, found.training)
    return "\n".join(lines)


def _states(plan: TrainingPlan) -> str:
    """Where the states of a training come from."""
    if plan.data is not None:
        from mediatorize.formats.data import DataFacts

        how = f", at {_levels(plan.distill)} and without a teacher" if plan.distill.teacher == "none" else ""
        return f"{DataFacts(**plan.data)}{how}"
    guidance = ", ".join(f"{scale:g}" for scale in plan.cfg_scales)
    return f"its own trajectories ({plan.solver}, {plan.steps} steps, guidance {guidance})"


def _levels(distill: DistillSettings) -> str:
    return ", ".join(map(title, distill.levels)) or "every added level in turn"


def _of_dry_run(estimate: Estimate) -> list[str]:
    rows = [(str(batch), f"{size / 2**30:.2f}") for batch, size in estimate.peak_bytes.items()]
    return [
        f"Would take about {seconds_in_words(estimate.seconds)} at this device's rate. Nothing was done.",
        text_table(("states at a time", "GiB at most"), rows),
    ]


def _of_training(found: Finetuning, training: Training) -> list[str]:
    from mediatorize.compression.training import LOG_EVERY  # here, as it takes long to load

    resumed = f" (resumed at step {training.resumed_at})" if training.resumed_at else ""
    if found.plan.distill.teacher == "none":
        first, last = training.losses
        return [
            f"The training loss was {first:.4f} at first and {last:.4f} at last, each a mean over {LOG_EVERY} steps.",
            f"Took {seconds_in_words(found.seconds)}{resumed}. All weights were trained, without a teacher.",
        ]
    rows = [(title(level), f"{training.before[level]:.4f}", f"{after:.4f}") for level, after in training.after.items()]
    moved = found.plan.distill.train == "all"
    kept = "Level softmax moved too (--train all)." if moved else "Level softmax is unchanged, bit for bit."
    return [
        text_table(("whole model at", "error before", "after"), rows),
        "Errors are |student - teacher| / |teacher| of the model's output on held-out trajectories of the teacher.",
        f"Took {seconds_in_words(found.seconds)}{resumed}. {kept}",
    ]


def facts(found: Finetuning) -> dict[str, Any]:
    training, estimate = found.training, found.estimate
    return {
        "bundle": str(found.path),
        "dry_run": estimate is not None,
        "trained_parameters": found.trained_parameters,
        "plan": found.plan.to_json(),
        "before": dict(training.before) if training else None,
        "after": dict(training.after) if training else None,
        "losses": list(training.losses) if training else None,
        "seconds": round(found.seconds, 1),
        "resumed_at": training.resumed_at if training else 0,
        "estimated_seconds": estimate.seconds if estimate else None,
        "peak_bytes": estimate.peak_bytes if estimate else None,
        "notes": list(found.notes),
    }


class Metrics:
    """Loss and rate by step: JSON lines, and TensorBoard where it is installed."""

    def __init__(self, folder: Path, resumed_at: int) -> None:
        from mediatorize.formats.bundle import write_text

        self.folder, self.file = folder, folder / METRICS_FILE
        before = self.file.read_text().splitlines() if self.file.exists() else []
        kept = [line for line in before if json.loads(line)["step"] <= resumed_at]
        write_text(self.file, "".join(f"{line}\n" for line in kept))
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.board: Any = None
        else:
            self.board = SummaryWriter(str(folder / BOARD_FOLDER), purge_step=resumed_at)

    def write(self, step: int, loss: float, rate: float) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step, "loss": loss, "learning_rate": rate}) + "\n")
        if self.board is not None:
            self.board.add_scalar("loss", loss, step)
            self.board.add_scalar("learning rate", rate, step)

    def copy_to(self, folder: Path) -> None:
        """Puts all of it into another folder, in place of what was there."""
        shutil.copy(self.file, folder / METRICS_FILE)
        if self.board is not None:
            self.board.close()
            shutil.rmtree(folder / BOARD_FOLDER, ignore_errors=True)
            shutil.copytree(self.folder / BOARD_FOLDER, folder / BOARD_FOLDER)
