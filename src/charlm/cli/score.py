"""The commands that measure how well a model predicts a text: eval, score."""

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
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
from charlm.errors import CharlmError, ConfigError, UnknownCharactersError
from charlm.files import json_text

if TYPE_CHECKING:
    from torch import Tensor

    from charlm.inference.score import Kind, Tally, Unit
    from charlm.metrics import Score
    from charlm.storage.model_file import Loaded
    from charlm.text.vocab import Unknown

_BATCH_TEXTS = 256  # texts that eval holds in memory at once, at most
_BATCH_CHARACTERS = 2**24  # characters of these texts, at most
_HELD = 2**23  # characters of a text read forward from which on it is read twice, not held in memory
_LINES = 1000  # lines that score prints at once
_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


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

    Each file is cleaned like the training text and scored separately, with the state carried through the
    whole
    file: every character after the first is scored once. The total is over all files. FILE can be compressed,
    a folder, a glob, or - for stdin. charlm score shows the surprisal of each character.

    A file can have any length; it is read in pieces. Only stdin, and files for a model of direction backward
    or both, are held in memory whole.
    """
    from charlm.inference.evaluate import evaluate_each
    from charlm.metrics import Score

    loaded = load(model, implementation, device)
    prefix = _metric_prefix(loaded)
    rows, total, total_bytes = [], Score(), 0
    texts = _texts(files, loaded, unknown)
    with _progress_bar() as update:
        while batch := list(_next_batch(texts)):
            scores = evaluate_each(loaded.model, [text.ids for text in batch], update)
            for text, score in zip(batch, scores, strict=True):
                rows.append(_metrics(text.path, score, text.num_bytes, text.tally.unknown, prefix))
                total, total_bytes = total + score, total_bytes + text.num_bytes
    total_row = _metrics("total", total, total_bytes, sum(row["unknown"] for row in rows), prefix)
    if as_json:
        click.echo(json_text({"files": rows, "total": total_row}, indent=2))
    else:
        _print_table([*rows, total_row] if len(rows) > 1 else rows, prefix, with_unknown=unknown != "error")


def _metric_prefix(loaded: "Loaded") -> str:
    """Return the prefix of the metrics' names: a pseudo-likelihood must not be compared with a likelihood."""
    return "pseudo_" if loaded.config.model.direction == "both" else ""


def _metrics(path: str, score: "Score", num_bytes: int, unknown: int, prefix: str) -> dict[str, Any]:
    return {
        "path": path,
        "characters": score.characters,
        "nats": score.nats,
        "loss": score.loss,
        f"{prefix}perplexity": score.perplexity,
        f"{prefix}bits_per_character": score.bits_per_character,
        f"{prefix}bits_per_byte": score.bits_per_byte(num_bytes),
        "unknown": unknown,
    }


def _print_table(rows: list[dict[str, Any]], prefix: str, with_unknown: bool) -> None:
    columns = {
        "characters": ("characters", ","),
        "nats/char": ("loss", ".4f"),
        f"{prefix}perplexity": (f"{prefix}perplexity", ".4g"),
        f"{prefix}bits/char": (f"{prefix}bits_per_character", ".4f"),
        f"{prefix}bits/byte": (f"{prefix}bits_per_byte", ".4f"),
    }
    if with_unknown:
        columns["unknown"] = ("unknown", ",")
    click.echo("".join(f"{head:>{max(len(head), 11) + 1}}" for head in columns) + "  file")
    for row in rows:
        cells = (f"{row[key]:>{max(len(head), 11) + 1}{how}}" for head, (key, how) in columns.items())
        click.echo("".join(cells) + f"  {row['path']}")


@dataclass
class _Text:
    """A text to score.

    ids: (N,), or blocks of ids for a long text that is read forward.
    held: the number of characters in memory.
    tally: counts the unknown characters; complete once the ids have been read.
    num_bytes: the size of the scored characters in UTF-8; complete once the ids have been read.
    """

    path: str
    ids: "Tensor | Iterable[Tensor]"
    held: int
    tally: "Tally"
    num_bytes: int = 0


def _texts(files: Iterable[str], loaded: "Loaded", unknown: "Unknown") -> Iterator[_Text]:
    """Yield the texts of `files`; raises for unknown characters before a text is yielded."""
    from charlm.text import read

    for name in files:
        paths, count = [Path("-")] if name == "-" else read.find_files(name), 0
        for path in paths:
            pieces = _stdin() if name == "-" else read.TextFile(path).pieces
            text = _first_reading(path, pieces, loaded, unknown)
            if text.held < 2 and len(paths) > 1:
                click.echo(f"skipped: {path} has {text.held} characters, too few to score", err=True)
                continue
            if text.held < 2:
                raise CharlmError(f"{path} has {text.held} characters to score; two or more are needed")
            yield text
            count += 1
        if not count:
            raise CharlmError(f"no file of {name} has two or more characters to score")


def _stdin() -> Callable[[], Iterator[str]]:
    from charlm.text import read

    content = read.decode(sys.stdin.buffer.read(), "stdin")
    return lambda: iter([content])


def _first_reading(
    path: Path, pieces: Callable[[], Iterator[str]], loaded: "Loaded", unknown: "Unknown"
) -> _Text:
    """Read a text, check its characters, and hold its ids if they are few or needed all at once."""
    import torch

    from charlm.inference.score import Tally, encode_piece
    from charlm.text import read

    vocab, cleaning = loaded.vocab, loaded.config.corpus.cleaning
    forward, taken_back = loaded.config.model.direction == "forward", 0
    held, begin, size, tally, error = list[torch.Tensor](), 0, 0, Tally(), None
    for piece in read.clean_pieces(pieces, cleaning):
        if piece is None:
            held, begin, size, tally, error, taken_back = [], 0, 0, Tally(), None, taken_back + 1
        elif error is None:
            try:
                ids = encode_piece(vocab, piece, begin, unknown, str(path), tally)
            except UnknownCharactersError as caught:  # raised at the end: the piece can still be taken back
                error = caught
                continue
            begin, size = begin + len(piece), size + len(ids)
            if size <= _HELD or not forward:
                held.append(ids)
            else:
                held.clear()
    if error:
        raise error
    if size > _HELD and forward:
        return _second_reading(path, read.read_clean(pieces, cleaning, taken_back), loaded, unknown)
    whole = torch.cat(held) if held else torch.empty(0, dtype=torch.int32, device="cpu")
    scored = {"forward": slice(1, None), "backward": slice(None, -1), "both": slice(None)}
    num_bytes = vocab.num_bytes(whole[scored[loaded.config.model.direction]])
    return _Text(str(path), whole, len(whole), tally, num_bytes)


def _second_reading(path: Path, pieces: Iterator[str], loaded: "Loaded", unknown: "Unknown") -> _Text:
    """Return a long text whose ids are read from the clean `pieces` while they are scored."""
    from charlm.inference.evaluate import BLOCK, in_blocks
    from charlm.inference.score import Tally, encoded

    text = _Text(str(path), (), 2 * BLOCK, Tally())

    def blocks() -> "Iterator[Tensor]":
        first = True
        for block in in_blocks(encoded(loaded.vocab, pieces, unknown, str(path), text.tally)):
            text.num_bytes += loaded.vocab.num_bytes(block[1:] if first else block)
            first = False
            yield block

    text.ids = blocks()
    return text


def _next_batch(texts: Iterator[_Text]) -> Iterator[_Text]:
    """Yield the next of `texts`, up to `_BATCH_TEXTS` and `_BATCH_CHARACTERS`."""
    size = 0
    for text in itertools.islice(texts, _BATCH_TEXTS):
        yield text
        size += text.held
        if size >= _BATCH_CHARACTERS:
            return


@contextlib.contextmanager
def _progress_bar() -> Iterator[Callable[[int], object]]:
    """Show a count of characters on stderr if it is a terminal; yields the function to increase it."""
    from tqdm import tqdm

    hidden = not sys.stderr.isatty()
    with tqdm(
        unit=" characters", unit_scale=True, delay=1, leave=False, disable=hidden, file=sys.stderr
    ) as bar:
        yield bar.update


@click.command("score")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option(
    "--unit",
    "-u",
    type=click.Choice(["char", "word", "line"]),
    help="The unit of a row.  [default: char; with --top: line, or word if the model knows no line ends]",
)
@click.option(
    "--top",
    type=click.IntRange(1),
    metavar="N",
    help="Print only the N most surprising units, the most surprising first.",
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

    Prints tab-separated columns with a header: path; start, the position of the unit in the clean text, from
    0; characters, how many of its characters are scored; bits, the sum of -log2 of their probabilities; text.
    In text a tab, a line end and a backslash are written \\t, \\n and \\\\: each row is one line. All texts
    together
    are the clean text: a word includes the space that follows it, a line its line end. The first character
    has no prediction and no bits. The sum of the bits is that of charlm eval.

    --top ranks lines by bits per character, words and characters by bits.

    FILE can be compressed, a folder, a glob, or - for stdin. A text can have any length; rows are printed
    while it is read. A model of direction backward or both reads the whole text first. The licence of Project
    Gutenberg is stripped from files, not from stdin.

    \b
      charlm score book.txt --unit word > words.tsv
      tail -f notes.txt | charlm score - --unit line
      charlm score letters/ --top 20
    """  # noqa: D301 - \b is for click
    from charlm.inference.score import Tally, most_surprising

    loaded = load(model, implementation, device)
    kind, tally, lines = _choose_kind(unit, top, loaded), Tally(), _Lines()
    bits = f"{_metric_prefix(loaded)}bits"
    if not as_json:
        lines.add(f"path\tstart\tcharacters\t{bits}\ttext")
    units = _units(files, loaded, kind, unknown, tally, lines)
    for path, each in most_surprising(units, top, kind == "line") if top else units:
        lines.add(_unit_row(path, each, bits, as_json))
    lines.flush()
    if tally.unknown:
        how = "skipped" if unknown == "skip" else f"read as {loaded.vocab.replacement!r}"
        click.echo(f"{tally.unknown:,} characters that the model does not know were {how}", err=True)


def _choose_kind(unit: "Kind | None", top: int | None, loaded: "Loaded") -> "Kind":
    has_lines = "\n" in loaded.vocab.characters
    if unit == "line" and not has_lines:
        raise ConfigError(
            "--unit line is not possible: the model knows no line ends, so that a text is one line "
            "(corpus.keep can have replaced them by spaces); use --unit word"
        )
    return unit or (("line" if has_lines else "word") if top else "char")


@dataclass
class _Lines:
    """Lines to print, many at once."""

    lines: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        self.lines.append(line)
        if len(self.lines) >= _LINES:
            self.flush()

    def flush(self) -> None:
        if self.lines:
            click.echo("\n".join(self.lines))
            self.lines.clear()


def _units(
    files: Iterable[str], loaded: "Loaded", kind: "Kind", unknown: "Unknown", tally: "Tally", lines: _Lines
) -> "Iterator[tuple[str, Unit]]":
    """Yield the units of all `files` with their paths; prints `lines` before it waits for more text."""
    from charlm.inference.score import score
    from charlm.text import read

    cleaning = loaded.config.corpus.cleaning

    def flushing(pieces: Iterator[str]) -> Iterator[str]:
        for piece in pieces:
            yield piece
            lines.flush()

    for name in files:
        for path in [Path("-")] if name == "-" else read.find_files(name):
            stdin = read.read_clean_stdin(sys.stdin.buffer, cleaning) if name == "-" else None
            pieces = flushing(stdin or read.read_clean(read.TextFile(path).pieces, cleaning))
            for each in score(loaded.model, loaded.vocab, pieces, kind, unknown, str(path), tally):
                yield str(path), each


def _unit_row(path: str, unit: "Unit", bits: str, as_json: bool) -> str:
    """Return a unit as a line of JSON or of tab-separated columns."""
    if as_json:
        row = {"path": path, "start": unit.start, "characters": unit.characters, bits: unit.bits}
        return json_text({**row, "text": unit.text}, ensure_ascii=False)
    shown_bits = "" if unit.bits is None else f"{unit.bits:.6f}"
    columns = (path.translate(_ESCAPES), str(unit.start), str(unit.characters), shown_bits)
    return "\t".join((*columns, unit.text.translate(_ESCAPES)))
