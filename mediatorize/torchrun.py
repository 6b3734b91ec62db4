"""What torchrun tells the processes that it starts. No torch here."""

from __future__ import annotations

import os


def started_by_torchrun() -> bool:
    """Whether this process is one of several, or of one, that torchrun started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first_process() -> bool:
    """Whether this process is the one that reports."""
    return not started_by_torchrun() or os.environ["RANK"] == "0"
