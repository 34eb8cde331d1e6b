"""The commands that write with a model: generate, fill."""

import math
from typing import TYPE_CHECKING, Any

import click

from charlm.cli.options import (
    corpus_option,
    device_option,
    implementation_option,
    json_option,
    load,
    model_option,
    stdin_for_dash,
    unknown_option,
)
from charlm.errors import ConfigError
from charlm.files import json_text

if TYPE_CHECKING:
    from charlm.api import LanguageModel
    from charlm.nn.stepper import Quantize
    from charlm.text.corpus import Corpus
import contextlib
import itertools
import signal
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from charlm.errors import CharlmError

if TYPE_CHECKING:
    from charlm.api import LanguageModel


_BATCH = 64  # texts that are written side by side


class Finite(click.FloatRange):
    """A range of floats that NaN and infinity are not in."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number that `value` is."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


@click.command()
@click.option(
    "--prefix", "-p", default="", metavar="TEXT", help="What the text begins with; - reads it from stdin."
)
@click.option(
    "--length", "-n", type=click.IntRange(0), default=500, show_default=True, help="Characters to write."
)
@click.option(
    "--temperature",
    "-t",
    type=Finite(0),
    default=0.7,
    show_default=True,
    help="Below 1 plainer, above 1 wilder; 0 always takes the most probable character.",
)
@click.option("--top-k", type=click.IntRange(1), help="Draw among the K most probable characters.")
@click.option(
    "--top-p",
    type=Finite(0, 1, min_open=True),
    help="Draw among the fewest that hold P of the probability.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), help="The same seed, the same text.  [default: by chance]"
)
@click.option("--num-samples", type=click.IntRange(1), default=1, show_default=True, help="How many texts.")
@click.option(
    "--quantize",
    type=click.Choice(["bf16", "int8"]),
    help="Write with the weights in fewer bits, on the CPU. On Don Quijote the perplexity is up to 0.06% "
    "higher with int8, the same with bf16.",
)
@click.option(
    "--novelty",
    is_flag=True,
    help="Show on stderr what of the text stands word for word in the training text: its longest "
    "such stretch, and the share of its stretches of 8, 16 and 32 characters; beside it as much "
    "of the held-out text.",
)
@corpus_option(help="The path of the training text, for --novelty, if the text has been moved.")
@click.option("--stop", default="", metavar="TEXT", help="End a text once TEXT has been written.")
@click.option("--interactive", "-i", is_flag=True, help="Ask for prefixes and settings at a prompt.")
@unknown_option
@model_option
@implementation_option
@device_option
def generate(
    prefix: str,
    length: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    num_samples: int,
    quantize: "Quantize | None",
    novelty: bool,
    corpus: str | None,
    stop: str,
    interactive: bool,
    unknown: str,
    model: str | None,
    implementation: str | None,
    device: str,
) -> None:
    """Write text with a trained model.

    A model of model.direction: backward writes what stands before the prefix. The text goes to stdout as it
    is made; several are written side by side, sample k with seed + k, and printed when they are done, parted
    by a line of dashes. A run that is still training can be used.

    With --interactive each line typed is a prefix, and lines such as ":temperature 0.5" change the settings;
    ":help" shows them. Ctrl-C stops a text, Ctrl-D leaves. Lines may come from a pipe.
    """
    from charlm.api import LanguageModel
    from charlm.nn.stepper import Stepper
    from charlm.storage import run as runs

    if interactive and (prefix or num_samples > 1 or novelty):
        raise ConfigError(
            "--interactive asks for the prefixes and writes one text for each: "
            "leave out --prefix, --num-samples and --novelty"
        )
    if quantize and device == "auto":
        device = "cpu"  # which alone has steps with fewer bits
    writer = LanguageModel(load(model, implementation, device))
    options: dict[str, Any] = {
        **{"temperature": temperature, "top_k": top_k, "top_p": top_p},
        **{"stop": stop, "unknown": unknown, "quantize": quantize},
    }
    prefix = stdin_for_dash(prefix)
    start = writer.generate(prefix, 0, **options)  # what is wrong is told before anything is written
    if quantize:
        Stepper(writer.model, quantize)
    if interactive:
        converse(writer, click.get_current_context())
        return
    known = None
    if novelty:
        from charlm.inference.novelty import training_text

        known = training_text(runs.find_model(model), writer.config, writer.vocab.characters, corpus)
    if num_samples == 1:
        written = [show(writer.stream(prefix, length, seed=seed, **options))]
    else:
        written = _show_many(writer, num_samples, seed, prefix=prefix, length=length, **options)
    if known:
        backward = writer.config.model.direction == "backward"
        parts = slice(0, -len(start) or None) if backward else slice(len(start), None)
        _show_novelty([text[parts] for text in written], known)


def _show_many(writer: "LanguageModel", count: int, seed: int | None, **options: Any) -> list[str]:
    """Write texts side by side and print them, parted by lines of dashes; returns them."""
    written: list[str] = []
    for first in range(0, count, _BATCH):
        together = min(_BATCH, count - first)
        for text in writer.generate_batch(
            together, seed=None if seed is None else (seed + first) % 2**63, **options
        ):
            if written:
                click.echo("-" * 20)
            written.append(show([text]))
    return written


def _show_novelty(texts: list[str], corpus: "Corpus") -> None:
    """What of `texts`, and of as much held-out text, stands in the training text: a table on stderr."""
    from charlm.inference.novelty import SIZES, novelty

    rows = {f"text {k}" if len(texts) > 1 else "the text": each for k, each in enumerate(texts, 1)}
    encoded = {name: corpus.vocab.encode(each) for name, each in rows.items()}
    encoded["held-out text"] = corpus.val[: max(map(len, texts))]
    click.echo("in the training text  longest" + "".join(f"{size:>7} chars" for size in SIZES), err=True)
    for name, ids in encoded.items():
        found = novelty(ids, corpus.train)
        shares = (f"{found.shares[size]:>13.1%}" if size in found.shares else f"{'–':>13}" for size in SIZES)
        click.echo(f"{name:<20}{found.longest:>9}" + "".join(shares), err=True)
        if name != "held-out text" and found.longest:
            stretch = corpus.vocab.decode(ids[found.start : found.start + found.longest])
            click.echo(f"  {stretch[:200]!r}{' ...' if len(stretch) > 200 else ''}", err=True)


@click.command()
@click.argument("text_with_blanks", metavar="TEXT")
@click.option("--blank", default="_", show_default=True, metavar="CHARACTER", help="What stands for a blank.")
@click.option(
    "--best", type=click.IntRange(1), default=5, show_default=True, help="How many answers to show."
)
@json_option()
@unknown_option
@model_option
@implementation_option
@device_option
def fill(
    text_with_blanks: str,
    blank: str,
    best: int,
    as_json: bool,
    unknown: str,
    model: str | None,
    implementation: str | None,
    device: str,
) -> None:
    """Fill in the blanks of a text, best first, with probabilities.

    Each blank (_) is one character. It takes a model that was trained with model.direction: both, as
    fill.yaml has it.
    """
    from charlm.inference.fill import fill as fill_in
    from charlm.inference.fill import joined
    from charlm.text.clean import clean

    if len(blank) != 1:
        raise ConfigError(f"--blank {blank!r} must be one character")
    loaded = load(model, implementation, device)
    text_with_blanks = stdin_for_dash(text_with_blanks)
    parts = [clean(part, **loaded.config.corpus.cleaning) for part in text_with_blanks.split(blank)]
    answers = fill_in(loaded.model, loaded.vocab, parts, best, unknown=unknown)  # type: ignore[arg-type]
    shown = [
        {"text": joined(parts, chars), "characters": chars, "probability": probability}
        for chars, probability in answers
    ]
    if as_json:
        click.echo(json_text(shown, indent=2, ensure_ascii=False))
        return
    for row in shown:
        click.echo(f"{row['probability']:7.4f}  {row['text']}")


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
    from charlm.training.reporting import caught_signals

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
    from charlm.text import read

    line = sys.stdin.buffer.readline()
    return read.decode(line, "stdin").removesuffix("\n") if line else None


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
