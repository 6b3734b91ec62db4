"""The one exception that the command line turns into a line and exit code 1."""


class UserError(Exception):
    """Something the user can mend: `message` says what and where, `hint` what to do next."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(f"{message} {hint}".strip())
        self.message = message
        self.hint = hint
