"""`charlm generate --interactive`: a prompt at which each line is a prefix, and : changes a setting."""

import contextlib
import itertools
import signal
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from charlm import text
from charlm.errors import CharlmError, ConfigError
from charlm.signals import caught_signals

if TYPE_CHECKING:
    from charlm.api import LanguageModel

PROMPT = "> "
WELCOME = "Each line is a prefix; :help shows the settings. Ctrl-C stops a text, Ctrl-D leaves."
SETTINGS = ("length", "temperature", "top-k", "top-p", "stop", "seed", "unknown", "quantize")


def converse(model: "LanguageModel", context: click.Context) -> None:
    """Read lines from stdin until it ends, and write a text for each.

    context: of the command whose options of the names `SETTINGS` are the settings to begin with; they also
    say what a setting may be.

    On a terminal there is a prompt, with a history that is not kept, and Ctrl-C stops a text. What is wrong
    with a line is told, and the next one is read; where the lines come from a pipe, `CharlmError` is raised
    at the end.
    """
    options = {name: each for each in context.command.params if (name := each.opts[0][2:]) in SETTINGS}
    settings = {name: context.params[str(options[name].name)] for name in SETTINGS}
    asks, failed = sys.stdin.isatty(), 0
    if asks:
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401 - input() then has editing and a history
        click.echo(WELCOME, err=True)
    while True:
        try:
            line = _ask() if asks else _read()
            if line is None or line.strip() in (":quit", ":q"):
                break
            if line.startswith(":") and not line.startswith("::"):
                click.echo(_command(line[1:], settings, options, context), err=True)
                continue
            arguments: dict[str, Any] = {name.replace("-", "_"): value for name, value in settings.items()}
            # A text that begins with a colon has two.
            pieces = model.stream(line.removeprefix(":"), **arguments)
            with caught_signals() as caught:  # raised anywhere, it could be lost
                show(itertools.takewhile(lambda _: not caught, pieces))
            if caught:
                signal.raise_signal(caught[0])
        except (CharlmError, click.UsageError) as error:
            message = error.format_message() if isinstance(error, click.UsageError) else str(error)
            click.echo(f"charlm: {message}", err=True)
            failed += 1
        except KeyboardInterrupt:
            if not asks:
                raise
            click.echo()
    if failed and not asks:
        raise CharlmError(f"{failed} of the lines could not be done")


def _ask() -> str | None:
    """A line that a person types; None after Ctrl-D."""
    try:
        if sys.stdout.isatty():
            return input(PROMPT)
        click.echo(PROMPT, nl=False, err=True)  # what is written goes to a file, the prompt does not
        return input()
    except EOFError:
        click.echo(err=True)
        return None


def _read() -> str | None:
    """A line from a pipe or a file; None after the last."""
    line = sys.stdin.buffer.readline()
    return text.decode(line, "stdin").removesuffix("\n") if line else None


def _command(
    line: str, settings: dict[str, Any], options: dict[str, click.Parameter], context: click.Context
) -> str:
    """Do what stands behind a colon, in `settings`; what to tell of it."""
    word, _, value = line.partition(" ")
    if word in ("", "h", "help"):
        return _help(settings, options)
    known = [name for name in SETTINGS if name.startswith(word)]
    name = word if word in known else known[0] if len(known) == 1 else None
    if name is None:
        raise ConfigError(
            f":{word} is no setting; there are :{', :'.join(known or SETTINGS)}; or :help, :quit"
        )
    option = options[name]
    value = value if name == "stop" else value.strip()
    if value:
        settings[name] = option.type.convert(value, option, context)
    else:  # click has a sentinel for an option without a default
        settings[name] = option.default if isinstance(option.default, str | int | float) else None
    return _shown(name, settings[name])


def _shown(name: str, value: Any) -> str:
    return f":{name} {'' if value is None else value}".rstrip(" ") if value != "" else f":{name}"


def _help(settings: dict[str, Any], options: dict[str, click.Parameter]) -> str:
    """The settings as they are, with what they mean."""
    rows = [
        f"  {_shown(name, settings[name]):<20} {str(getattr(options[name], 'help', '')).split('  [')[0]}"
        for name in SETTINGS
    ]
    return "\n".join(
        [
            *rows,
            "  :quit                Leave, as Ctrl-D.",
            "A name without a value puts its default back; its beginning is enough, as in :temp 0.5. "
            "A text that begins with a colon has two.",
        ]
    )


def show(parts: Iterable[str]) -> str:
    """Print a text as its parts come, and a line end if it has none; returns it."""
    shown, last = [], ""
    for part in parts:
        click.echo(part, nl=False)  # flushes
        shown.append(part)
        last = part or last
    if not last.endswith("\n"):
        click.echo()
    return "".join(shown)
