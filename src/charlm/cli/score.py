"""The commands that measure how well a model predicts a text: eval, score."""

import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import click

from charlm.cli.options import json_option, load, model_options, unknown_option
from charlm.errors import CharlmError, ConfigError, UnknownCharactersError
from charlm.files import json_text

if TYPE_CHECKING:
    from torch import Tensor

    from charlm.inference.score import Kind, Unit
    from charlm.metrics import Score
    from charlm.storage.model_file import Loaded
    from charlm.text.vocab import Unknown

_BATCH_TEXTS = 256  # texts that eval holds in memory at once, at most
_BATCH_CHARACTERS = 2**24  # characters from which on no more texts are read before these are scored
_HELD = 2**23  # characters of a text read forward from which on it is read twice, not held in memory
_LINES = 1000  # lines that score prints at once
_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r", "\x1e": "\\x1e"})


@click.command("eval")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@json_option()
@unknown_option
@model_options
def evaluate(
    files: tuple[str, ...],
    as_json: bool,
    unknown: "Unknown",
    model: str | None,
    implementation: str | None,
    device: str,
    threads: int | None,
) -> None:
    """Score texts: perplexity, bits per character and per byte.

    Each file is cleaned like the training text and scored separately, with the state carried through the
    whole file: every character after the first is scored once. The total is over all files. FILE can be
    compressed, a folder, a glob, or - for stdin. charlm score shows the surprisal of each character.

    A model trained with corpus.min_count reads characters that it does not know as its unknown, at the cost
    of the unknown and of a uniform choice among the rare characters of its training text; their number is
    shown.

    A file can have any length; it is read in pieces. Only stdin, and files for a model of direction backward
    or both or of corpus.records, are held in memory whole. A model of corpus.records reads a file as records:
    all characters of a record and its end are scored, without the records before it.
    """
    from tqdm import tqdm

    from charlm.inference.evaluate import evaluate_each, evaluate_records
    from charlm.metrics import Score

    loaded = load(model, implementation, device, threads, 16)
    prefix = _metric_prefix(loaded)
    rows, total, total_bytes = [], Score(), 0
    texts = _texts(files, loaded, unknown)
    # disable=None: shown only on a terminal.
    with tqdm(unit=" characters", unit_scale=True, delay=1, leave=False, disable=None) as bar:
        while batch := list(_next_batch(texts)):
            if (boundary := loaded.config.corpus.boundary) is None:
                scores = evaluate_each(loaded.model, [text.ids for text in batch], bar.update)
            else:
                end = loaded.vocab.characters.index(boundary)
                scores = [
                    evaluate_records(loaded.model, cast("Tensor", text.ids), end, bar.update)
                    for text in batch
                ]
            for text, score in zip(batch, scores, strict=True):
                rows.append(_metrics(text.path, score, text.num_bytes, text.unknown, prefix))
                total, total_bytes = total + score, total_bytes + text.num_bytes
    total_row = _metrics("total", total, total_bytes, sum(row["unknown"] for row in rows), prefix)
    if as_json:
        click.echo(json_text({"files": rows, "total": total_row}, indent=2))
    else:
        with_unknown = unknown != "error" or loaded.vocab.unknown is not None
        _print_table([*rows, total_row] if len(rows) > 1 else rows, prefix, with_unknown)


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


class _Text(NamedTuple):
    """A text to score, which has been read once.

    ids: (N,), or blocks of ids that are read again while they are scored; records, each with the boundary.
    num_bytes: the size of the scored characters in UTF-8, or for a model of bytes their number.
    """

    path: str
    ids: "Tensor | Iterable[Tensor]"
    characters: int
    num_bytes: int
    unknown: int


def _texts(files: Iterable[str], loaded: "Loaded", unknown: "Unknown") -> Iterator[_Text]:
    """Yield the texts of `files`; raises for unknown characters before a text is yielded."""
    from charlm.text import read
    from charlm.text.decode import decode

    encoding = loaded.config.corpus.encoding
    for name in files:
        paths, found = [Path("-")] if name == "-" else read.find_files(name).files, False
        for path in paths:
            pieces: Callable[[], Iterator[str]]
            if name == "-":
                pieces = functools.partial(iter, [decode(sys.stdin.buffer.read(), "stdin", encoding)])
            else:
                pieces = read.TextFile(path, encoding=encoding).pieces
            read_text = _read_records if loaded.config.corpus.records else _read
            text = read_text(path, pieces, loaded, unknown)
            if text.characters >= 2:
                found = True
                yield text
                continue
            reason = f"{path} has {text.characters} characters to score; two or more are needed"
            if len(paths) == 1:
                raise CharlmError(reason)
            click.echo(f"skipped: {reason}", err=True)
        if not found:
            raise CharlmError(f"no file of {name} has two or more characters to score")


def _read(path: Path, pieces: Callable[[], Iterator[str]], loaded: "Loaded", unknown: "Unknown") -> _Text:
    """Read a text, check its characters, and hold its ids if they are few or needed all at once."""
    import torch

    from charlm.inference.evaluate import in_blocks
    from charlm.inference.score import encoded
    from charlm.text import read

    vocab, cleaning = loaded.vocab, loaded.config.corpus.cleaning
    size: Callable[[str], int] = len if loaded.config.corpus.encoding == "bytes" else _num_bytes
    forward, taken_back = loaded.config.model.direction == "forward", -1
    for piece in itertools.chain([None], read.clean_pieces(pieces, cleaning)):
        if piece is None:  # the text begins, or all pieces before are taken back
            held, error = [torch.empty(0, dtype=torch.int32, device="cpu")], None
            begin = characters = num_bytes = num_unknown = 0
            last = ""
            taken_back += 1
        elif error is None:
            try:
                ids = vocab.encode(piece, unknown, str(path), begin=begin)
            except UnknownCharactersError as caught:  # raised at the end: the piece can still be taken back
                error = caught
                continue
            scored = piece if unknown == "error" else vocab.decode(ids)
            num_bytes += size(scored[1:] if forward and not characters else scored)
            num_unknown += vocab.count_unknown(piece)
            last = scored[-1:] or last
            begin, characters = begin + len(piece), characters + len(ids)
            held.append(ids)
            if characters > _HELD and forward:
                held.clear()
    if error:
        raise error
    if characters > _HELD and forward:
        again = read.read_clean(pieces, cleaning, taken_back)
        blocks = in_blocks(encoded(vocab, again, unknown, str(path)))
        return _Text(str(path), blocks, characters, num_bytes, num_unknown)
    whole = torch.cat(held)
    if loaded.config.model.direction == "backward":
        num_bytes -= size(last)
    return _Text(str(path), whole, characters, num_bytes, num_unknown)


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _read_records(
    path: Path, pieces: Callable[[], Iterator[str]], loaded: "Loaded", unknown: "Unknown"
) -> _Text:
    """Read the records of a text, each followed by the boundary."""
    import torch

    from charlm.text import read
    from charlm.text.records import in_records

    vocab, corpus = loaded.vocab, loaded.config.corpus
    assert corpus.separator and corpus.boundary
    clean = itertools.chain(read.read_clean(pieces, corpus.cleaning), [corpus.separator])
    size: Callable[[str], int] = len if corpus.encoding == "bytes" else _num_bytes
    held, num_bytes, num_unknown = [torch.empty(0, dtype=torch.int32, device="cpu")], 0, 0
    for found in in_records(clean, corpus):
        text = "".join(f"{record}{corpus.boundary}" for _, record in found)
        missing = vocab.count_unknown(text)
        for begin, record in found if missing and unknown == "error" else ():
            vocab.encode(record, unknown, str(path), begin=begin)  # names the place of the first in the file
        held.append(vocab.encode(text, unknown, str(path)))
        num_bytes += size(text if unknown == "error" else vocab.decode(held[-1]))
        num_unknown += missing
    ids = torch.cat(held)
    return _Text(str(path), ids, len(ids), num_bytes, num_unknown)


def _next_batch(texts: Iterator[_Text]) -> Iterator[_Text]:
    """Yield the texts to score next."""
    size = 0
    for text in itertools.islice(texts, _BATCH_TEXTS):
        yield text
        size += text.characters
        if size >= _BATCH_CHARACTERS:
            return


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
@model_options
def score_texts(
    files: tuple[str, ...],
    unit: "Kind | None",
    top: int | None,
    as_json: bool,
    unknown: "Unknown",
    model: str | None,
    implementation: str | None,
    device: str,
    threads: int | None,
) -> None:
    """Show how surprising each character, word or line is, in bits.

    Prints tab-separated columns with a header: path; start, the position of the unit in the clean text, from
    0; characters, how many of its characters are scored; bits, the sum of -log2 of their probabilities; text.
    In text a tab, a line end, a backslash and the end of a record are written \\t, \\n, \\\\ and \\x1e: each
    row is one line. All texts together are the clean text, with records each followed by its end: a word
    includes the space that follows it, a line its line end. The first character of a text without records has
    no prediction and no bits. The sum of the bits is that of charlm eval.

    A model of corpus.records reads each record alone: its first character and its end are scored, and equal
    records have equal bits. With --unit line a row is a record.

    --top ranks lines by bits per character, words and characters by bits.

    FILE can be compressed, a folder, a glob, or - for stdin. A text can have any length; rows are printed
    while it is read. A model of direction backward or both reads the whole text first. The licence of Project
    Gutenberg is stripped from files, not from stdin.

    \b
      charlm score book.txt --unit word > words.tsv
      tail -f notes.txt | charlm score - --unit line
      charlm score letters/ --top 20
    """  # noqa: D301 - \b is for click
    from charlm.inference.score import most_surprising

    loaded = load(model, implementation, device, threads, 16)
    has_lines = bool(loaded.config.corpus.records) or "\n" in loaded.vocab.characters
    if unit == "line" and not has_lines:
        raise ConfigError(
            "--unit line is not possible: the model knows no line ends, so that a text is one line "
            "(corpus.keep can have replaced them by spaces); use --unit word"
        )
    kind = unit or (("line" if has_lines else "word") if top else "char")
    bits = f"{_metric_prefix(loaded)}bits"
    lines = [] if as_json else [f"path\tstart\tcharacters\t{bits}\ttext"]
    units = _units(files, loaded, kind, unknown, lines)
    for path, each in most_surprising(units, top, kind == "line") if top else units:
        lines.append(_unit_row(path, each, bits, as_json))
        if len(lines) >= _LINES:
            _print(lines)
    _print(lines)


def _print(lines: list[str]) -> None:
    """Print `lines` and remove them from the list."""
    if lines:
        click.echo("\n".join(lines))
        lines.clear()


def _units(
    files: Iterable[str], loaded: "Loaded", kind: "Kind", unknown: "Unknown", lines: list[str]
) -> "Iterator[tuple[str, Unit]]":
    """Yield the units of all `files` with their paths; prints `lines` before it waits for more text.

    Reports the number of unknown characters at the end.
    """
    from charlm.inference.score import score, score_records
    from charlm.text import read

    vocab, cleaning, unknown_counts = loaded.vocab, loaded.config.corpus.cleaning, list[int]()
    encoding = loaded.config.corpus.encoding

    def watched(pieces: Iterator[str]) -> Iterator[str]:
        for piece in pieces:
            unknown_counts.append(vocab.count_unknown(piece) if unknown != "error" or vocab.unknown else 0)
            yield piece
            _print(lines)

    for name in files:
        for path in [Path("-")] if name == "-" else read.find_files(name).files:
            stdin = read.read_clean_stdin(sys.stdin.buffer, cleaning, encoding) if name == "-" else None
            pieces = watched(
                stdin or read.read_clean(read.TextFile(path, encoding=encoding).pieces, cleaning)
            )
            if loaded.config.corpus.records:
                corpus = loaded.config.corpus
                units = score_records(loaded.model, vocab, pieces, corpus, kind, unknown, str(path))
            else:
                units = score(loaded.model, vocab, pieces, kind, unknown, str(path))
            for each in units:
                yield str(path), each
    if num_unknown := sum(unknown_counts):
        how = {"skip": "skipped", "replace": f"read as {vocab.replacement!r}", "error": "read as its unknown"}
        click.echo(f"{num_unknown:,} characters that the model does not know were {how[unknown]}", err=True)


def _unit_row(path: str, unit: "Unit", bits: str, as_json: bool) -> str:
    """Return a unit as a line of JSON or of tab-separated columns."""
    if as_json:
        row = {"path": path, "start": unit.start, "characters": unit.characters, bits: unit.bits}
        return json_text({**row, "text": unit.text}, ensure_ascii=False)
    shown_bits = "" if unit.bits is None else f"{unit.bits:.6f}"
    columns = (path.translate(_ESCAPES), str(unit.start), str(unit.characters), shown_bits)
    return "\t".join((*columns, unit.text.translate(_ESCAPES)))
