"""Errors that end a command: a sentence that says what happened and how to fix it."""

NOT_FINITE = "the model's predictions are not finite: its training diverged; train with a smaller lr"


class CharlmError(Exception):
    """An error shown as one line on stderr, without a traceback; the command exits with `exit_code`."""

    exit_code = 1

    def __init__(self, message: str = "", exit_code: int | None = None):
        super().__init__(message)
        self.exit_code = self.exit_code if exit_code is None else exit_code


class ConfigError(CharlmError):
    """An invalid configuration or invalid arguments of a command."""

    exit_code = 2


class UnknownCharactersError(CharlmError):
    """A text with characters that the vocabulary lacks."""


class Interrupted(CharlmError):  # noqa: N818 - a request, not a mistake
    """A stop that the user asked for; its exit code is 128 + the signal's number."""


class EndedElsewhere(CharlmError):  # noqa: N818 - an event, not a mistake
    """The end of this process because another process of its group met an error, which shows it."""


def one_line(text: str, longest: int = 200) -> str:
    """Return `text`, from a file or a library, as one printable line of at most `longest` characters."""
    line = " ".join(text.split())
    line = line if len(line) <= longest else f"{line[:longest]}…"
    return line if line.isprintable() else ascii(line)
