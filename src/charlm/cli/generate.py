"""The commands that write with a model: generate, with its interactive prompt, and fill.

The sampling options of the command and the settings of the prompt are made from the fields of `Sampling`:
a new field is a new option and a new setting.
"""

import contextlib
import itertools
import re
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click

from charlm.cli.options import corpus_option, json_option, load, model_options, stdin_for_dash, unknown_option
from charlm.cli.records import of_bytes, print_record_novelty, write_records
from charlm.errors import CharlmError, ConfigError
from charlm.files import json_text
from charlm.inference.sampling import Sampling, value_type

if TYPE_CHECKING:
    from charlm.api import LanguageModel
    from charlm.nn.stepper import Quantize
    from charlm.text.corpus import Corpus
    from charlm.text.vocab import Unknown

PROMPT = "> "
SETTINGS = ("length", *(field.name for field in fields(Sampling)), "seed", "unknown", "quantize")

_BATCH = 64  # texts written side by side


class Escaped(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    r"""A text in which ``\n``, ``\t`` and ``\\`` mean a line end, a tab and a backslash."""

    name = "text"

    def convert(self, value: str, parameter: click.Parameter | None, context: click.Context | None) -> str:
        """Return the text that `value` means."""
        meant = {"n": "\n", "t": "\t", "\\": "\\"}
        return re.sub(r"\\([nt\\])", lambda escape: meant[escape[1]], value)


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option for each field of `Sampling`; the command receives them as keyword arguments."""
    for field in reversed(fields(Sampling)):
        allowed = "" if field.type is str else f"  [{field.metadata['allowed']}]"
        command = click.option(
            f"--{field.name.replace('_', '-')}",
            *(["-t"] if field.name == "temperature" else []),
            type=Escaped() if field.type is str else value_type(field.type),
            default=field.default,
            show_default=bool(field.default),
            help=field.metadata["help"] + allowed,
        )(command)
    return command


@click.command()
@click.option(
    "--prefix",
    "-p",
    default="",
    show_default=False,
    metavar="TEXT",
    help="The beginning of the text; - reads it from stdin.",
)
@click.option("--length", "-n", type=click.IntRange(0), default=500, help="Characters to write.")
@sampling_options
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), help="The same seed gives the same text.  [default: random]"
)
@click.option("--num-samples", type=click.IntRange(1), default=1, help="Number of texts.")
@click.option(
    "--quantize",
    type=click.Choice(["bf16", "int8"]),
    help="Write with the weights in fewer bits, on the CPU. On Don Quijote the perplexity is up to 0.06% "
    "higher with int8, the same with bf16.",
)
@click.option(
    "--novelty",
    is_flag=True,
    help="Show on stderr how much of the text is copied from the training text: the longest copied passage, "
    "and the share of its passages of 8, 16 and 32 characters that occur there; for comparison, the same for "
    "as much held-out text. With a model of records: how many of them are in the training text.",
)
@click.option("--unique", is_flag=True, help="With a model of records: write no record twice.")
@click.option("--new", is_flag=True, help="With a model of records: write none that is in the training text.")
@corpus_option(help="The path of the training text, for --novelty and --new, if the text has been moved.")
@click.option("--interactive", "-i", is_flag=True, help="Read prefixes and settings at a prompt.")
@unknown_option
@model_options
def generate(
    prefix: str,
    length: int,
    seed: int | None,
    num_samples: int,
    quantize: "Quantize | None",
    novelty: bool,
    unique: bool,
    new: bool,
    corpus: str | None,
    interactive: bool,
    unknown: "Unknown",
    model: str | None,
    implementation: str | None,
    device: str,
    threads: int | None,
    **sampling_values: Any,
) -> None:
    """Write text with a trained model.

    The text is printed as it is written. Several texts are written side by side, sample k with seed + k, and
    printed when they are complete, separated by lines of dashes. A model of model.direction: backward writes
    the text before the prefix. A run that is still training can be used.

    A model of corpus.records writes whole records of up to --length characters, as many as --num-samples, one
    a line or with the delimiter between them. --prefix begins each of them.

    With --interactive each line is a prefix, and lines such as ":temperature 0.5" change the settings;
    ":help" shows them. Ctrl-C stops a text, Ctrl-D leaves. The lines can come from a pipe.
    """
    from charlm.api import LanguageModel
    from charlm.inference.novelty import training_text
    from charlm.nn.stepper import Stepper
    from charlm.storage.run import find_model

    _check_interactive(interactive, prefix or num_samples > 1 or novelty or unique or new)
    sampling = Sampling(**sampling_values)
    if quantize and device == "auto":
        device = "cpu"  # other devices cannot write with fewer bits
    writer = LanguageModel(load(model, implementation, device, threads, num_samples))
    if (unique or new) and not writer.config.corpus.records:
        raise ConfigError("--unique and --new need a model that was trained with corpus.records")
    options: dict[str, Any] = {"sampling": sampling, "unknown": unknown, "quantize": quantize}
    prefix = stdin_for_dash(prefix)
    start = writer.generate(prefix, 0, **options)  # raises for invalid arguments before anything is written
    if quantize:
        Stepper(writer.model, quantize)
    if interactive:
        converse(writer, click.get_current_context())
        return
    path, options = find_model(model), {**options, "prefix": prefix, "length": length}
    trained_on = training_text(path, writer.config, writer.vocab, corpus) if novelty or new else None
    if writer.config.corpus.records:
        written = write_records(writer, num_samples, seed, unique, new, trained_on, **options)
    elif num_samples == 1:
        written = [print_parts(writer.stream(seed=seed, **options), of_bytes(writer))]
    else:
        written = _print_batches(writer, num_samples, seed, **options)
    if novelty and trained_on:
        _print_novelty(writer, written, len(start), trained_on)


def _check_interactive(interactive: bool, other: object) -> None:
    """Raise `ConfigError` if --interactive is given with an option that is not for it."""
    if interactive and other:
        raise ConfigError(
            "--interactive reads the prefixes from a prompt and writes one text for each: "
            "leave out --prefix, --num-samples, --novelty, --unique and --new"
        )


def print_parts(parts: Iterable[str], raw: bool = False) -> str:
    """Print a text as its parts come, and a line end if it lacks one; return the text.

    raw: the characters are bytes, which are written as they are, without a line end.
    """
    text = ""
    for part in parts:
        click.echo(part.encode("latin-1") if raw else part, nl=False)  # flushes
        text += part
    if not raw and not text.endswith("\n"):
        click.echo()
    return text


def _print_batches(writer: "LanguageModel", count: int, seed: int | None, **options: Any) -> list[str]:
    """Write texts side by side, print them with lines of dashes between them, and return them."""
    written: list[str] = []
    for first in range(0, count, _BATCH):
        batch_seed = None if seed is None else (seed + first) % 2**63
        for text in writer.generate_batch(min(_BATCH, count - first), seed=batch_seed, **options):
            if written:
                click.echo("-" * 20)
            written.append(print_parts([text], of_bytes(writer)))
    return written


def _print_novelty(writer: "LanguageModel", texts: list[str], prefix: int, corpus: "Corpus") -> None:
    """Print on stderr how much of `texts`, and of as much held-out text, occurs in the training text.

    prefix: the length of the prefix, which does not count.
    """
    from charlm.inference.novelty import SIZES, novelty

    if writer.config.corpus.records:
        print_record_novelty(texts, corpus)
        return
    backward = writer.config.model.direction == "backward"
    without_prefix = slice(0, -prefix or None) if backward else slice(prefix, None)
    texts = [text[without_prefix] for text in texts]
    names = [f"text {k}" for k in range(1, len(texts) + 1)] if len(texts) > 1 else ["the text"]
    encoded = dict(zip(names, map(corpus.vocab.encode, texts), strict=True))
    if len(corpus.val):
        encoded["held-out text"] = corpus.val[: max(map(len, texts))]
    click.echo("in the training text  longest" + "".join(f"{size:>7} chars" for size in SIZES), err=True)
    for name, ids in encoded.items():
        found = novelty(ids, corpus.train)
        shares = (f"{found.shares[size]:>13.1%}" if size in found.shares else f"{'–':>13}" for size in SIZES)
        click.echo(f"{name:<20}{found.longest:>9}" + "".join(shares), err=True)
        if name != "held-out text" and found.longest:
            passage = corpus.vocab.decode(ids[found.start : found.start + found.longest])
            click.echo(f"  {passage[:200]!r}{' ...' if len(passage) > 200 else ''}", err=True)


def converse(model: "LanguageModel", context: click.Context) -> None:
    """Read lines from stdin until it ends, and write a text for each, or change a setting.

    context: of the command whose options named in `SETTINGS` give the initial settings and convert new ones.
    Raises `CharlmError` at the end if a line of a pipe failed; an error is reported and the next line read.
    """
    options = {str(each.name): each for each in context.command.params if isinstance(each, click.Option)}
    settings = {name: context.params[name] for name in SETTINGS}
    at_terminal, failed = sys.stdin.isatty(), 0
    if at_terminal:
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401 - gives input() line editing and a history
        click.echo(
            "Each line is a prefix; :help shows the settings. Ctrl-C stops a text, Ctrl-D leaves.", err=True
        )
    while True:
        try:
            line = _next_line(at_terminal)
            if line is None or line.strip() in (":quit", ":q"):
                break
            if line.startswith(":") and not line.startswith("::"):
                click.echo(_change_setting(line[1:], settings, options, context), err=True)
            else:
                _write(model, line.removeprefix(":"), settings)  # "::" begins a text with a colon
        except (CharlmError, click.UsageError) as error:
            message = error.format_message() if isinstance(error, click.UsageError) else str(error)
            click.echo(f"charlm: {message}", err=True)
            failed += 1
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            click.echo()
    if failed and not at_terminal:
        raise CharlmError(f"{failed} {'line' if failed == 1 else 'lines'} failed")


def _next_line(at_terminal: bool) -> str | None:
    """Return the line that the user types, or the next of a pipe or a file; None at the end."""
    from charlm.text.decode import decode

    if not at_terminal:
        line = sys.stdin.buffer.readline()
        return decode(line, "stdin").removesuffix("\n") if line else None
    try:
        if sys.stdout.isatty():
            return input(PROMPT)
        click.echo(PROMPT, nl=False, err=True)  # the texts go to a file, the prompt to the terminal
        return input()
    except EOFError:
        click.echo(err=True)
        return None


def _write(model: "LanguageModel", prefix: str, settings: dict[str, Any]) -> None:
    """Write a text until it ends or a signal comes."""
    from charlm.training.reporting import caught_signals

    parts = model.stream(prefix, **settings)
    with caught_signals() as caught:  # an exception raised in the middle of a step could be lost
        print_parts(itertools.takewhile(lambda _: not caught, parts), of_bytes(model))
    if caught:
        signal.raise_signal(caught[0])


def _change_setting(
    line: str, settings: dict[str, Any], options: dict[str, click.Option], context: click.Context
) -> str:
    """Carry out the command `line`, typed after a colon; return the message to print."""
    word, _, value = line.partition(" ")
    if word in ("", "h", "help"):
        rows = [
            f"  {_setting_line(name, now):<20} {str(options[name].help).split('  [')[0]}"
            for name, now in settings.items()
        ]
        return "\n".join(
            [
                *rows,
                "  :quit                Leave; so does Ctrl-D.",
                "A name without a value restores the default. A name can be shortened, as in :temp 0.5. "
                'Begin a text that starts with a colon with "::".',
            ]
        )
    matching = [name for name in SETTINGS if name.startswith(word.replace("-", "_"))]
    if len(matching) != 1:
        candidates = ", ".join(map(_setting_line, matching or SETTINGS))
        raise ConfigError(f"unknown setting :{word}; allowed: {candidates}; :help, :quit")
    (name,) = matching
    option = options[name]
    value = value if name == "stop" else value.strip()
    if value:
        new = option.type.convert(value, option, context)
    else:  # click has a sentinel for an option without a default
        new = option.default if isinstance(option.default, str | int | float) else None
    changed = {**settings, name: new}
    Sampling(**{field.name: changed[field.name] for field in fields(Sampling)})  # refuses wrong values
    settings[name] = new
    return _setting_line(name, value if name == "stop" else new)


def _setting_line(name: str, value: Any = None) -> str:
    return f":{name.replace('_', '-')}" + ("" if value in (None, "") else f" {value}".rstrip(" "))


@click.command()
@click.argument("text_with_blanks", metavar="TEXT")
@click.option("--blank", default="_", metavar="CHARACTER", help="The character that marks a blank.")
@click.option("--best", type=click.IntRange(1), default=5, help="Number of answers to show.")
@json_option()
@unknown_option
@model_options
def fill(
    text_with_blanks: str,
    blank: str,
    best: int,
    as_json: bool,
    unknown: "Unknown",
    model: str | None,
    implementation: str | None,
    device: str,
    threads: int | None,
) -> None:
    """Fill in the blanks of a text; prints the answers with their probabilities, best first.

    Each blank (_) is one character. This takes a model trained with model.direction: both, as in fill.yaml.
    """
    from charlm.inference.fill import fill as fill_in
    from charlm.inference.fill import joined
    from charlm.text.clean import clean_input

    if len(blank) != 1:
        raise ConfigError(f"--blank {blank!r} is not allowed; it must be one character")
    loaded = load(model, implementation, device, threads, 1)
    text_with_blanks = stdin_for_dash(text_with_blanks)
    parts = [clean_input(part, loaded.config.corpus) for part in text_with_blanks.split(blank)]
    rows = [
        {"text": joined(parts, characters), "characters": characters, "probability": probability}
        for characters, probability in fill_in(loaded.model, loaded.vocab, parts, best, unknown=unknown)
    ]
    if as_json:
        click.echo(json_text(rows, indent=2, ensure_ascii=False))
        return
    for row in rows:
        click.echo(f"{row['probability']:7.4f}  {row['text']}")
