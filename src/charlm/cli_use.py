"""The commands that write with a model: generate, fill."""

import math
from typing import TYPE_CHECKING, Any

import click

from charlm.cli_options import (
    device_option,
    implementation_option,
    load,
    model_option,
    stdin_for_dash,
    unknown_option,
)
from charlm.errors import ConfigError
from charlm.interactive import converse, show
from charlm.json_text import json_text

if TYPE_CHECKING:
    from charlm.api import LanguageModel
    from charlm.corpus import Corpus
    from charlm.stepper import Quantize


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
@click.option(
    "--corpus", metavar="PATH", help="Where the training text is, for --novelty, if it has been moved."
)
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
    from charlm import runs
    from charlm.api import LanguageModel
    from charlm.stepper import Stepper

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
        from charlm.novelty import training_text

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
    from charlm.novelty import SIZES, novelty

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
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
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
    from charlm.clean import clean
    from charlm.fill import fill as fill_in
    from charlm.fill import joined

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
