"""The commands that use a model: generate, fill, eval, info."""

import itertools
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from charlm.completion import complete_runs
from charlm.errors import CharlmError, ConfigError
from charlm.interactive import converse, show

if TYPE_CHECKING:
    import torch

    from charlm.checkpoint import Loaded
    from charlm.metrics import Score
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


_model_option = click.option(
    "--model",
    "-m",
    metavar="PATH",
    shell_complete=complete_runs,
    help="A model file, a run's folder or name.  [default: the newest run]",
)
_device_option = click.option(
    "--device", default="auto", metavar="NAME", show_default=True, help="auto, cpu, cuda, cuda:N or mps."
)
_implementation_option = click.option(
    "--implementation",
    type=click.Choice(["auto", "scratch", "builtin", "fused"]),
    help="Load the model in this implementation.  [default: the run's setting]",
)
_unknown_option = click.option(
    "--unknown",
    type=click.Choice(["error", "skip", "replace"]),
    default="error",
    show_default=True,
    help="Characters that the model does not know: refuse, leave out, or put a space for each.",
)


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
@click.option("--stop", default="", metavar="TEXT", help="End a text once TEXT has been written.")
@click.option("--interactive", "-i", is_flag=True, help="Ask for prefixes and settings at a prompt.")
@_unknown_option
@_model_option
@_implementation_option
@_device_option
def generate(
    prefix: str,
    length: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    num_samples: int,
    quantize: "Quantize | None",
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
    from charlm import sample, text
    from charlm.api import LanguageModel
    from charlm.stepper import Stepper

    if interactive and (prefix or num_samples > 1):
        raise ConfigError(
            "--interactive asks for the prefixes and writes one text for each: "
            "leave out --prefix and --num-samples"
        )
    if quantize and device == "auto":
        device = "cpu"  # which alone has steps with fewer bits
    loaded = _load(model, implementation, device)
    if loaded.config.model.direction == "both":
        raise CharlmError(
            "this model was trained with model.direction: both, to fill in characters between others; it "
            "has no prediction of what follows a text: use charlm fill, or another --model"
        )
    if interactive:
        converse(LanguageModel(loaded), click.get_current_context())
        return
    cleaning = loaded.config.corpus.cleaning
    prefix = text.clean(_stdin_for_dash(prefix), **cleaning)
    ids = loaded.vocab.encode(prefix, unknown, "the prefix")  # type: ignore[arg-type]
    shown = loaded.vocab.decode(ids)
    stop = text.clean(stop, **{**cleaning, "keep": None})
    if never := sorted(set(stop) - set(loaded.vocab.characters)):
        raise ConfigError(f"--stop {stop!r} can never be written: the model does not know {never}")
    if quantize:
        Stepper(loaded.model, quantize)  # refuses before anything is written
    backward = loaded.config.model.direction == "backward"
    arguments = (
        *(loaded.model, loaded.vocab, ids.flip(0) if backward else ids, length),
        *(temperature, top_k, top_p, stop[::-1] if backward else stop),
    )
    for first in range(0, num_samples, _BATCH):
        generators = [_generator(seed, k) for k in range(first, min(first + _BATCH, num_samples))]
        if num_samples == 1 and not backward:
            show(itertools.chain([shown], sample.generate(*arguments, generators[0], quantize)))
            return
        texts = sample.generate_batch(*arguments, generators, quantize)
        for k, written in enumerate(texts, first):
            if k:
                click.echo("-" * 20)
            # Of a backward text what is written last stands first.
            show([written[::-1] + shown if backward else shown + written])


def _generator(seed: int | None, k: int) -> "torch.Generator":
    """The source of chance for text `k`."""
    import torch

    generator = torch.Generator()
    generator.manual_seed((seed + k) % 2**63) if seed is not None else generator.seed()
    return generator


@click.command()
@click.argument("text_with_blanks", metavar="TEXT")
@click.option("--blank", default="_", show_default=True, metavar="CHARACTER", help="What stands for a blank.")
@click.option(
    "--best", type=click.IntRange(1), default=5, show_default=True, help="How many answers to show."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_unknown_option
@_model_option
@_implementation_option
@_device_option
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
    from charlm import text
    from charlm.fill import fill as fill_in

    if len(blank) != 1:
        raise ConfigError(f"--blank {blank!r} must be one character")
    loaded = _load(model, implementation, device)
    text_with_blanks = _stdin_for_dash(text_with_blanks)
    parts = [text.clean(part, **loaded.config.corpus.cleaning) for part in text_with_blanks.split(blank)]
    answers = fill_in(loaded.model, loaded.vocab, parts, best, unknown=unknown)  # type: ignore[arg-type]
    shown = [
        {
            "text": parts[0] + "".join(char + part for char, part in zip(chars, parts[1:], strict=True)),
            "characters": chars,
            "probability": probability,
        }
        for chars, probability in answers
    ]
    if as_json:
        click.echo(json.dumps(shown, indent=2, ensure_ascii=False))
        return
    for row in shown:
        click.echo(f"{row['probability']:7.4f}  {row['text']}")


@click.command("eval")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_unknown_option
@_model_option
@_implementation_option
@_device_option
def evaluate(
    files: tuple[str, ...],
    as_json: bool,
    unknown: str,
    model: str | None,
    implementation: str | None,
    device: str,
) -> None:
    """Score texts: perplexity, bits per character and per byte.

    Each file is cleaned as the model's training text was and scored whole, the state carried: every character
    after the first once. FILE may be compressed, a folder, a glob, or - for stdin.
    """
    from charlm import text
    from charlm.evaluate import evaluate as score
    from charlm.metrics import Score

    loaded = _load(model, implementation, device)
    direction = loaded.config.model.direction
    kind = "pseudo_" if direction == "both" else ""  # not to be taken for the others' figures
    scored = {"forward": slice(1, None), "backward": slice(None, -1), "both": slice(None)}[direction]
    rows, total, total_bytes = [], Score(), 0
    for name in files:
        paths = [Path("-")] if name == "-" else text.find_files(name)
        for path in paths:
            content = text.decode(sys.stdin.buffer.read(), "stdin") if name == "-" else text.read_file(path)
            content = text.clean(text.strip_gutenberg(content), **loaded.config.corpus.cleaning)
            ids = loaded.vocab.encode(content, unknown, str(path))  # type: ignore[arg-type]
            if len(ids) < 2 and len(paths) > 1:
                click.echo(f"left out: {path} has {len(ids)} characters, too few to score", err=True)
                continue
            if len(ids) < 2:
                raise CharlmError(f"{path} has {len(ids)} characters to score; it takes two or more")
            result = score(loaded.model, ids)
            num_bytes = len(loaded.vocab.decode(ids[scored]).encode())
            rows.append(_score_row(str(path), result, num_bytes, kind))
            total, total_bytes = total + result, total_bytes + num_bytes
    total_row = _score_row("total", total, total_bytes, kind)
    if as_json:
        finite = [{k: v if v != math.inf else None for k, v in row.items()} for row in (*rows, total_row)]
        click.echo(json.dumps({"files": finite[:-1], "total": finite[-1]}, indent=2))
        return
    heads = ["characters", "nats/char", f"{kind}perplexity", f"{kind}bits/char", f"{kind}bits/byte"]
    click.echo("".join(f"{head:>{max(len(head), 11) + 1}}" for head in heads) + "  file")
    for row in [*rows, total_row] if len(rows) > 1 else rows:
        figures = [f"{row['characters']:,}", f"{row['loss']:.4f}", f"{row[f'{kind}perplexity']:.4g}"]
        figures += [f"{row[f'{kind}bits_per_{unit}']:.4f}" for unit in ("character", "byte")]
        pairs = zip(heads, figures, strict=True)
        click.echo("".join(f"{cell:>{max(len(head), 11) + 1}}" for head, cell in pairs) + f"  {row['path']}")


def _score_row(path: str, score: "Score", num_bytes: int, kind: str) -> dict[str, Any]:
    return {
        "path": path,
        "characters": score.characters,
        "nats": score.nats,
        "loss": score.loss,
        f"{kind}perplexity": score.perplexity,
        f"{kind}bits_per_character": score.bits_per_character,
        f"{kind}bits_per_byte": score.bits_per_byte(num_bytes),
    }


@click.command()
@click.argument("model", required=False, metavar="[MODEL]", shell_complete=complete_runs)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(model: str | None, as_json: bool) -> None:
    """Show what is in a model file: configuration, parameters, vocabulary, figures.

    MODEL is a model file, a run's folder or name; the newest run by default. Only the file's header is read.
    """
    from math import prod

    from charlm import runs
    from charlm.checkpoint import read_header
    from charlm.config import to_yaml

    path = runs.find_model(model)
    header = read_header(path)
    parameters = sum(prod(shape) for shape in header.tensors.values())
    if as_json:
        shown = {
            "path": str(path),
            "parameters": parameters,
            "tensors": {name: list(shape) for name, shape in header.tensors.items()},
            "vocab": header.vocab,
            "config": header.config.model_dump(mode="json"),
            "figures": header.figures,
        }
        click.echo(json.dumps(shown, indent=2, ensure_ascii=False))
        return
    click.echo(f"{path}: {parameters:,} parameters")
    for name, shape in header.tensors.items():
        click.echo(f"  {name:<28} {' × '.join(map(str, shape))}")
    click.echo(f"\nvocabulary: {len(header.vocab)} characters, the most frequent first\n  {header.vocab!r}")
    click.echo("\nfigures" + "".join(f"\n  {key:<28} {value}" for key, value in header.figures.items()))
    click.echo(f"\nconfiguration\n{to_yaml(header.config)}", nl=False)


def _stdin_for_dash(argument: str) -> str:
    """`argument`, or where it is - what stdin holds, without the line end that echo adds."""
    from charlm import text

    return text.decode(sys.stdin.buffer.read(), "stdin").removesuffix("\n") if argument == "-" else argument


def _load(model: str | None, implementation: str | None, device: str) -> "Loaded":
    """The model that the options name, on the device that they name."""
    from charlm import runs
    from charlm.checkpoint import load_model
    from charlm.device import choose_device

    place: torch.device = choose_device(device)
    return load_model(runs.find_model(model), implementation, place)
