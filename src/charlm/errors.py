"""What a user did or met that stops the work, said in one sentence with the fix."""

NOT_FINITE = "the model's predictions are not finite: its training diverged; train with a smaller lr"


class CharlmError(Exception):
    """Shown as one line on stderr, with no traceback; the command exits with `exit_code`."""

    exit_code = 1


class ConfigError(CharlmError):
    """The configuration or the command's arguments are wrong."""

    exit_code = 2


class UnknownCharactersError(CharlmError):
    """A text has characters that the vocabulary lacks."""


class Interrupted(CharlmError):  # noqa: N818 - what happened, not a mistake
    """The user asked for a stop; `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


class Told(CharlmError):  # noqa: N818 - what happened, not a mistake
    """What ended this process of several; another one shows it, and this one ends in silence."""

    def __init__(self, exit_code: int):
        super().__init__("")
        self.exit_code = exit_code


def one_line(text: str, longest: int = 200) -> str:
    """What a file or a library said, as a part of a message: on one line, not too long, and printable."""
    line = " ".join(text.split())
    line = line if len(line) <= longest else f"{line[:longest]}…"
    return line if line.isprintable() else ascii(line)
