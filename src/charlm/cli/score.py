"""The commands that say how well a model knows a text: eval, score."""

import collections
import contextlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from charlm.cli.options import (
    device_option,
    implementation_option,
    json_option,
    load,
    model_option,
    unknown_option,
)
from charlm.errors import CharlmError, ConfigError
from charlm.files import json_text

if TYPE_CHECKING:
    from torch import Tensor

    from charlm.inference.score import Kind, Tally, Unit
    from charlm.metrics import Score
    from charlm.storage.model_file import Loaded
    from charlm.text.vocab import Unknown

_TEXTS = 256  # that eval has in memory at once,
_TOGETHER = 2**24  # and their characters
_LINES = 1000  # that score prints at once


@click.command("eval")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@json_option()
@unknown_option
@model_option
@implementation_option
@device_option
def evaluate(
    files: tuple[str, ...],
    as_json: bool,
    unknown: "Unknown",
    model: str | None,
    implementation: str | None,
    device: str,
) -> None:
    """Score texts: perplexity, bits per character and per byte.

    Each file is cleaned as the model's training text was and scored by itself, whole, the state carried:
    every character after the first once. The total is over all of these. FILE may be compressed, a
    folder, a glob, or - for stdin. charlm score shows what each character costs.

    A file is read piece by piece and may be of any length. Held in memory is all of stdin, and of a file for
    a model that reads from the end, or fills in.
    """
    from charlm.inference.evaluate import evaluate_each
    from charlm.metrics import Score

    loaded = load(model, implementation, device)
    kind = "pseudo_" if loaded.config.model.direction == "both" else ""  # not to be taken for the others'
    rows, total, total_bytes = [], Score(), 0
    texts = _texts(files, loaded, unknown)
    with _bar() as bar:
        # So many at a time that there is a batch, and no more than that in memory.
        while group := list(itertools.islice(_filling_up(texts), _TEXTS)):
            results = evaluate_each(loaded.model, [each.ids for each in group], bar)
            for each, result in zip(group, results, strict=True):
                row = _score_row(each.path, result, each.num_bytes, kind)
                rows.append({**row, "unknown": each.tally.unknown})
                total, total_bytes = total + result, total_bytes + each.num_bytes
    total_row = _score_row("total", total, total_bytes, kind)
    total_row["unknown"] = sum(row["unknown"] for row in rows)
    if as_json:
        click.echo(json_text({"files": rows, "total": total_row}, indent=2))
        return
    heads = ["characters", "nats/char", f"{kind}perplexity", f"{kind}bits/char", f"{kind}bits/byte"]
    heads += ["unknown"] * (unknown != "error")
    click.echo("".join(f"{head:>{max(len(head), 11) + 1}}" for head in heads) + "  file")
    for row in [*rows, total_row] if len(rows) > 1 else rows:
        figures = [f"{row['characters']:,}", f"{row['loss']:.4f}", f"{row[f'{kind}perplexity']:.4g}"]
        figures += [f"{row[f'{kind}bits_per_{unit}']:.4f}" for unit in ("character", "byte")]
        figures += [f"{row['unknown']:,}"] * (unknown != "error")
        pairs = zip(heads, figures, strict=True)
        click.echo("".join(f"{cell:>{max(len(head), 11) + 1}}" for head, cell in pairs) + f"  {row['path']}")


@dataclass
class _Text:
    """A text to score. What came of it is whole once it has been read.

    ids: (N,), or of a long one that is read forward, blocks of them.
    held: how many characters of it are in memory.
    tally: counts those that the model does not know.
    num_bytes: that the scored characters take in UTF-8.
    """

    path: str
    ids: "Tensor | Iterable[Tensor]"
    held: int
    tally: "Tally"
    num_bytes: int = 0


def _texts(files: Iterable[str], loaded: "Loaded", unknown: "Unknown") -> Iterator[_Text]:
    from charlm.inference.score import Tally, encoded
    from charlm.text import read
    from charlm.text.clean import clean

    cleaning = loaded.config.corpus.cleaning
    for name in files:
        paths, some = [Path("-")] if name == "-" else read.find_files(name), False
        for path in paths:
            if name == "-":
                content = read.strip_gutenberg(read.decode(sys.stdin.buffer.read(), "stdin"))
                pieces = iter([clean(content, **cleaning)])
            else:
                if unknown == "error" and path.is_file():  # what is unknown is told before anything is scored
                    pieces = read.read_clean_file(path, cleaning)
                    collections.deque(encoded(loaded.vocab, pieces, unknown, str(path), Tally()), maxlen=0)
                pieces = read.read_clean_file(path, cleaning)
            found = _text(path, pieces, loaded, unknown)
            if found.held < 2 and len(paths) > 1:
                click.echo(f"left out: {path} has {found.held} characters, too few to score", err=True)
                continue
            if found.held < 2:
                raise CharlmError(f"{path} has {found.held} characters to score; it takes two or more")
            yield found
            some = True
        if not some:
            raise CharlmError(f"no file of {name} has two characters or more to score")


def _text(path: Path, pieces: Iterator[str], loaded: "Loaded", unknown: "Unknown") -> _Text:
    """The clean text that comes in `pieces`."""
    import torch

    from charlm.inference.evaluate import in_blocks
    from charlm.inference.score import Tally, encoded

    vocab, direction, tally = loaded.vocab, loaded.config.model.direction, Tally()
    blocks = in_blocks(encoded(vocab, pieces, unknown, str(path), tally))
    begun = list(itertools.islice(blocks, 2 if direction == "forward" else None))
    ids = torch.cat(begun) if begun else torch.empty(0, dtype=torch.int32, device="cpu")
    found = _Text(str(path), ids, len(ids), tally)

    def counted(blocks: "Iterable[Tensor]") -> "Iterator[Tensor]":
        for k, block in enumerate(blocks):
            found.num_bytes += vocab.num_bytes(block[1:] if k == 0 else block)
            yield block

    if direction == "forward" and len(begun) > 1:
        found.ids = counted(itertools.chain(begun, blocks))
    else:
        scored = {"forward": slice(1, None), "backward": slice(None, -1), "both": slice(None)}[direction]
        found.num_bytes = vocab.num_bytes(ids[scored])
    return found


def _filling_up(texts: Iterator[_Text]) -> Iterator[_Text]:
    """From `texts` until they are as long together as is good to have in memory."""
    size = 0
    while size < _TOGETHER and (one := next(texts, None)):
        size += one.held
        yield one


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[int], object]]:
    """A count of the characters scored, on stderr where that is a terminal: what it gives is told of them."""
    from tqdm import tqdm

    with tqdm(
        unit=" characters",
        unit_scale=True,
        delay=1,
        leave=False,
        disable=not sys.stderr.isatty(),
        file=sys.stderr,
    ) as bar:
        yield bar.update


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


_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


@click.command("score")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option(
    "--unit",
    "-u",
    type=click.Choice(["char", "word", "line"]),
    help="What has a row: each character, word or line.  [default: char; with --top: line, or word where the "
    "model knows no line ends]",
)
@click.option(
    "--top",
    type=click.IntRange(1),
    metavar="N",
    help="Only the N most surprising, the most surprising first.",
)
@json_option(help="Print JSON lines.")
@unknown_option
@model_option
@implementation_option
@device_option
def score_texts(
    files: tuple[str, ...],
    unit: "Kind | None",
    top: int | None,
    as_json: bool,
    unknown: "Unknown",
    model: str | None,
    implementation: str | None,
    device: str,
) -> None:
    """Show how surprising each character, word or line is, in bits.

    Prints tab-separated columns under a line of their names: path; start, where in the clean text the unit
    begins, from 0; characters, how many of it were scored; bits, the sum of -log2 of their probabilities;
    text. In text a tab, a line end and a backslash are written \\t, \\n and \\\\: a row is a line. All texts
    together are the clean text: a word has the space that follows it, a line its line end. The first
    character has no prediction, and no bits. The bits sum to what charlm eval has.

    --top ranks lines by bits per character, words and characters by bits.

    FILE may be compressed, a folder, a glob, or - for stdin. A text is read piece by piece and may be of any
    length; rows come as it is read. A model that reads from the end, or fills in, has to read all of it
    first. The licence of Project Gutenberg is left out of files, not of stdin.

    \b
      charlm score book.txt --unit word > words.tsv
      tail -f notes.txt | charlm score - --unit line
      charlm score letters/ --top 20
    """  # noqa: D301 - click knows the backspace character by itself
    from charlm.inference.score import Tally, most_surprising, score
    from charlm.text import read

    loaded = load(model, implementation, device)
    lines_end = "\n" in loaded.vocab.characters
    if unit == "line" and not lines_end:
        raise ConfigError(
            "--unit line: this model knows no line ends, a text is one line (corpus.keep may have made "
            "spaces of them); take --unit word"
        )
    kind: Kind = unit or (("line" if lines_end else "word") if top else "char")
    bits = "pseudo_bits" if loaded.config.model.direction == "both" else "bits"
    cleaning, tally = loaded.config.corpus.cleaning, Tally()

    lines: list[str] = []

    def flush() -> None:
        if lines:
            click.echo("\n".join(lines))
            lines.clear()

    def before_more(pieces: Iterator[str]) -> Iterator[str]:
        for piece in pieces:
            yield piece
            flush()  # what is known does not wait for what is still to come

    def units() -> "Iterator[tuple[str, Unit]]":
        for name in files:
            for path in [Path("-")] if name == "-" else read.find_files(name):
                stdin = read.read_clean_stdin(sys.stdin.buffer, cleaning) if name == "-" else None
                pieces = before_more(stdin or read.read_clean_file(path, cleaning))
                for each in score(loaded.model, loaded.vocab, pieces, kind, unknown, str(path), tally):
                    yield str(path), each

    if not as_json:
        lines.append(f"path\tstart\tcharacters\t{bits}\ttext")
    for path, each in most_surprising(units(), top, kind == "line") if top else units():
        lines.append(_unit_row(path, each, bits, as_json))
        if len(lines) >= _LINES:
            flush()
    flush()
    if tally.unknown:
        what = "left out" if unknown == "skip" else f"read as {loaded.vocab.replacement!r}"
        click.echo(f"{tally.unknown:,} characters that the model does not know were {what}", err=True)


def _unit_row(path: str, unit: "Unit", bits: str, as_json: bool) -> str:
    """A unit as a line of JSON or of tab-separated columns."""
    if as_json:
        row = {"path": path, "start": unit.start, "characters": unit.characters, bits: unit.bits}
        return json_text({**row, "text": unit.text}, ensure_ascii=False)
    shown = "" if unit.bits is None else f"{unit.bits:.6f}"
    columns = (path.translate(_ESCAPES), str(unit.start), str(unit.characters), shown)
    return "\t".join((*columns, unit.text.translate(_ESCAPES)))
