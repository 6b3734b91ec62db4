"""The one exception that the command line turns into a line and exit code 1."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """Something the user can mend: `message` says what and where, `hint` what to do next."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(f"{message} {hint}".strip())
        self.message = message
        self.hint = hint


@contextmanager
def about(path: Path) -> Iterator[None]:
    """Puts `path` before the message of a `UserError` that does not name it yet."""
    try:
        yield
    except UserError as error:
        if str(path) in error.message:
            raise
        raise UserError(f"{path}: {error.message}", hint=error.hint) from error


def refuse_below(values: Mapping[str, int], least: int) -> None:
    """Refuses counts that are too small, by the name of their option."""
    for name, value in values.items():
        if value < least:
            raise UserError(f"--{name} {value} is too small.", hint=f"Pass at least {least}.")
