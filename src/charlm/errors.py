"""Errors that end a command: a sentence that says what happened and how to fix it."""

NOT_FINITE = "the model's predictions are not finite: its training diverged; train with a smaller lr"


class CharlmError(Exception):
    """An error shown as one line on stderr, without a traceback; the command exits with `exit_code`."""

    exit_code = 1


class ConfigError(CharlmError):
    """An invalid configuration or invalid arguments of a command."""

    exit_code = 2


class UnknownCharactersError(CharlmError):
    """A text with characters that the vocabulary lacks."""


class Interrupted(CharlmError):  # noqa: N818 - a request, not a mistake
    """A stop that the user asked for; `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


class EndedElsewhere(CharlmError):  # noqa: N818 - an event, not a mistake
    """The end of this process because another process of its group met an error, which shows it."""

    def __init__(self, exit_code: int):
        super().__init__("")
        self.exit_code = exit_code


def one_line(text: str, longest: int = 200) -> str:
    """Return `text`, from a file or a library, as one printable line of at most `longest` characters."""
    line = " ".join(text.split())
    line = line if len(line) <= longest else f"{line[:longest]}…"
    return line if line.isprintable() else ascii(line)
