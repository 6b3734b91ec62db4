"""How soon the command line answers: whole processes from start to exit, in seconds. A quiet machine is needed; nothing is asserted.

python benchmarks/startup.py            # writes benchmarks/startup.json
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

COMMANDS: dict[str, list[str]] = {
    "python that does nothing": ["-c", "pass"],
    "mediatorize --help": ["-m", "mediatorize", "--help"],
    "mediatorize --version": ["-m", "mediatorize", "--version"],
    "mediatorize convert --help": ["-m", "mediatorize", "convert", "--help"],
    "mediatorize finetune --nonsense": ["-m", "mediatorize", "finetune", "--nonsense"],
    "mediatorize inspect DiT-XL/2@256": ["-m", "mediatorize", "inspect", "DiT-XL/2@256"],
    "import mediatorize": ["-c", "import mediatorize"],
    "import torch": ["-c", "import torch"],
}
"""What is timed; the first and the last show what Python itself and torch take here."""

HEAVY = ("torch", "timm", "diffusers", "sklearn", "scipy", "matplotlib")


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
    return time.perf_counter() - start


def imported_by(arguments: list[str]) -> list[str]:
    """Which heavy libraries a command imports."""
    found = subprocess.run([sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, check=False).stderr
    names = {line.rpartition("|")[2].strip() for line in found.splitlines() if line.startswith("import time:")}
    return [name for name in HEAVY if name in names]


def main(
    runs: Annotated[int, typer.Option(min=1, help="of each command, in turn, after one that is not counted")] = 9,
    out: Annotated[Path | None, typer.Option(help="JSON to write; default: startup.json beside this file")] = None,
) -> None:
    """Times every command, in turn, so that a busy moment hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(runs + 1):
        for name, arguments in COMMANDS.items():
            took = seconds(arguments)
            if turn:
                times[name].append(took)
    rows: dict[str, dict[str, Any]] = {
        name: {
            "median": round(statistics.median(taken), 3),
            "least": round(min(taken), 3),
            "most": round(max(taken), 3),
            "imports": imported_by(COMMANDS[name]),
        }
        for name, taken in times.items()
    }
    for name, row in rows.items():
        print(f"{name:36} {row['median']:6.3f} s  ({row['least']:.3f} to {row['most']:.3f})  {', '.join(row['imports']) or '-'}")
    machine = {"python": platform.python_version(), "cores": os.cpu_count(), "system": platform.platform(), "runs": runs}
    (out or Path(__file__).with_suffix(".json")).write_text(json.dumps({"machine": machine, "seconds": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
