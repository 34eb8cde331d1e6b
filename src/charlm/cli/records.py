"""Writing with a model of records: whole records, none twice and none of the training text if so asked."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from charlm.errors import CharlmError

if TYPE_CHECKING:
    from charlm.api import LanguageModel
    from charlm.text.corpus import Corpus

_BATCH = 64  # records written side by side
_ATTEMPTS = 20  # records written for each that is asked for, at most, where not all of them count
_MORE = 100  # attempts in addition


def write_records(
    writer: "LanguageModel",
    count: int,
    seed: int | None,
    unique: bool,
    new: bool,
    trained_on: "Corpus | None",
    **options: Any,
) -> list[str]:
    """Print `count` records, one a line or with the delimiter between them, and return them.

    unique: print no record twice. new: print none of the corpus `trained_on`. Neither prints an empty one.
    options: arguments of `LanguageModel.generate_batch`.
    Raises `CharlmError` after a bounded number of attempts.
    """
    written, seen = list[str](), set[str]()
    if new and trained_on:
        seen = {
            text
            for ids in (trained_on.train, trained_on.val, trained_on.test)
            for text in trained_on.texts(ids)
        }
    limit = _ATTEMPTS * count + _MORE if unique or new else count
    for text in _attempts(writer, count if limit == count else max(count, 16), limit, seed, options):
        if (unique or new) and (not text or text in seen):
            continue
        _print_record(writer, text, first=not written)
        written.append(text)
        if unique:
            seen.add(text)
        if len(written) == count:
            break
    if writer.config.corpus.records != "line" and not of_bytes(writer):
        click.echo()
    if len(written) < count:
        others = " or ".join(["empty", *["written already"] * unique, *["in the training text"] * new])
        raise CharlmError(
            f"{len(written):,} of {count:,} records in {limit:,} attempts: the others are {others}; "
            "use a higher --temperature or a smaller --num-samples"
        )
    return written


def _attempts(
    writer: "LanguageModel", together: int, limit: int, seed: int | None, options: dict[str, Any]
) -> Iterator[str]:
    """Yield up to `limit` records, the first of `seed`, the next of seed + 1 and so on."""
    for first in range(0, limit, min(together, _BATCH)):
        batch_seed = None if seed is None else (seed + first) % 2**63
        yield from writer.generate_batch(min(together, _BATCH, limit - first), seed=batch_seed, **options)


def _print_record(writer: "LanguageModel", text: str, first: bool) -> None:
    """Print a record, with a line end after it or the delimiter before it."""
    records = writer.config.corpus.records
    whole = f"{text}\n" if records == "line" else text if first else f"{records}{text}"
    click.echo(whole.encode("latin-1") if of_bytes(writer) else whole, nl=False)


def of_bytes(writer: "LanguageModel") -> bool:
    """Return whether the characters of `writer` are bytes."""
    return writer.config.corpus.encoding == "bytes"


def print_record_novelty(written: list[str], corpus: "Corpus") -> None:
    """Print on stderr how many of the records `written`, and of the held-out ones, are in the train split."""
    train, held_out = set(corpus.texts(corpus.train)), corpus.texts(corpus.val)
    click.echo("in the training text  records", err=True)
    for name, records in {"written": written, "held-out text": held_out}.items():
        if records:
            known = sum(record in train for record in records)
            click.echo(f"{name:<22}{known:,} of {len(records):,} ({known / len(records):.1%})", err=True)
