"""The command line: each command parses its options, calls one function and prints the result.

Modules that import torch or pydantic are imported inside the commands, so that ``--help`` is fast. Results go
to stdout, all other output to stderr.
"""

import contextlib
import io
import os
import re
import sys
from pathlib import Path

import click

from charlm import __version__
from charlm.cli import generate, runs, score, settings, share, study, train
from charlm.errors import CharlmError

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True}


def main(args: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    _prepare_streams()
    try:
        cli.main(args=args, prog_name="charlm", standalone_mode=False)
        sys.stdout.flush()
        return 0
    except CharlmError as error:
        return _fail(str(error), error.exit_code)
    except click.ClickException as error:
        # All processes of torchrun have the same arguments: only the first prints the error.
        first = os.environ.get("RANK", "0") == "0"
        return _fail(
            " ".join(error.format_message().split()) + _hint(error) if first else "", error.exit_code
        )
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", 130)
    except (BrokenPipeError, SystemExit):
        # The reader of the output has closed it; click exits then. The last flush must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(f"{error.strerror}: {error.filename}" if error.filename else str(error), 1)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise  # a bug, which needs its traceback
        return _fail(
            "out of memory; use a smaller model.hidden_size, batches.batch_size or batches.seq_len", 1
        )


_WORDS = {  # names that other programs have for a command, and ours
    **dict.fromkeys(("sample", "write", "predict"), "generate"),
    **dict.fromkeys(("evaluate", "test"), "eval"),
    **dict.fromkeys(("finetune", "fit", "resume"), "train"),
}
_TEXT_OPTIONS = ("--corpus", "--data", "--dataset", "--file", "--input", "--text")


def _hint(error: click.ClickException) -> str:
    """Return a suggestion for an unknown option, command or argument, or an empty text."""
    context = getattr(error, "ctx", None)
    command = context.info_name if context else None
    if isinstance(error, click.NoSuchOption) and command in ("train", "compare"):
        from charlm.config import KEYS

        key = error.option_name.lstrip("-").replace("-", "_")
        if command == "train" and error.option_name in _TEXT_OPTIONS:
            return " The text is an argument: charlm train book.txt"
        if key in {each.partition(".")[2] for each in KEYS}:
            return f" It is a setting: --set {key}=VALUE"
    if match := re.match("No such command '(.*?)'.*", error.format_message(), re.S):
        if meant := _WORDS.get(match[1]):
            return f" Did you mean {meant!r}?"
        return "" if "Did you mean" in match[0] else f" The commands are {', '.join(cli.commands)}"
    if command == "generate" and "unexpected extra argument" in error.format_message():
        return " The beginning of the text is given with --prefix"
    return ""


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether an allocation failed. torch's CPU allocator raises a plain RuntimeError."""
    torch = sys.modules.get("torch")  # not imported here, so that --help starts fast
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    message = str(error)
    return "DefaultCPUAllocator" in message and "memory" in message


def _prepare_streams() -> None:
    """Use UTF-8 for files and pipes whatever the locale, and ? for characters that a terminal lacks.

    A closed stream is opened on the null device, so that no file opened later gets its number.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - stays open
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # invalid UTF-8 becomes unknown characters
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            if stream.isatty():
                stream.reconfigure(errors="replace")
            else:
                stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def _fail(message: str, exit_code: int) -> int:
    if message:
        with contextlib.suppress(OSError):
            click.echo(f"charlm: {message}", err=True)
    return exit_code


@click.group(context_settings=CONTEXT, invoke_without_command=True)
@click.version_option(__version__, prog_name="charlm")
@click.pass_context
def cli(context: click.Context) -> None:
    """Train character-level language models with recurrent networks, and write text with them.

    \b
      charlm train --config lstm.yaml
      charlm generate --prefix "quijote "
    """  # noqa: D301 - click needs the backspace character itself
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (
    train.train,
    generate.generate,
    generate.fill,
    score.evaluate,
    score.score_texts,
    runs.info,
    runs.report,
    runs.log,
    runs.plot,
    study.gradcheck,
    study.gradflow,
    study.compare,
    study.bench,
    share.export,
    share.import_model,
    settings.show_config,
    settings.show_cache,
):
    cli.add_command(command)
