"""A text read and cleaned piece by piece, whatever its length, to what `text` makes of it whole."""

import bz2
import codecs
import gzip
import io
import lzma
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from charlm import text
from charlm.errors import CharlmError

SIZE = 2**18  # bytes that are asked for at once
_LONG = 2**20  # characters without a space, after which a text is cut at any that stands by itself

_OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def read_file(path: Path, cleaning: dict[str, Any]) -> Iterator[str]:
    """Yield the clean text of a file, as `text.clean` of `text.strip_gutenberg` of `text.read_file` has it.

    cleaning: the arguments of `text.clean`. The file is read twice: what is Gutenberg's shows at its end.
    Raises `CharlmError` for what cannot be read and what is no UTF-8 text.
    """
    book = _book(_file(path))
    return clean(_within(_file(path), *book) if book else _file(path), **cleaning)


def read_stdin(file: IO[bytes], cleaning: dict[str, Any]) -> Iterator[str]:
    """Yield the clean text of stdin as it comes; a licence of Gutenberg's is taken for text."""
    return clean(decode(file, "stdin"), **cleaning)


def _file(path: Path) -> Iterator[str]:
    try:
        with _OPEN.get(path.suffix, open)(path, "rb") as file:
            yield from decode(file, str(path))
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise CharlmError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def decode(file: IO[bytes], name: str) -> Iterator[str]:
    """Yield what `text.decode` makes of all that `file` holds, as it comes."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines = io.IncrementalNewlineDecoder(None, translate=True)
    read = getattr(file, "read1", file.read)  # what is there, without waiting for more
    offset = 0
    while True:
        data = read(SIZE)
        pending = decoder.getstate()[0]
        if not offset or b"\0" in data:
            first = data.find(b"\0")
            if data.startswith((b"\xff\xfe", b"\xfe\xff")) and not offset:
                text.decode(data, name)  # raises
            if first >= 0:
                raise CharlmError(
                    f"{name} is a binary file, not text: it has a NUL byte at offset {offset + first}"
                )
        try:
            piece = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            at = offset - len(pending) + error.start
            raise CharlmError(
                f"{name} is not valid UTF-8: byte 0x{error.object[error.start]:02x} at offset {at}; "
                "if it is text in another encoding, convert it, for example with: "
                "iconv -f ISO-8859-1 -t UTF-8"
            ) from None
        if offset - len(pending) == 0:
            piece = piece.removeprefix("\ufeff")
        offset += len(data)
        if piece := lines.decode(piece, final=not data):
            yield piece
        if not data:
            return


def clean(
    pieces: Iterable[str], normalize: str = "NFC", lowercase: bool = False, keep: str | None = None
) -> Iterator[str]:
    """Yield what `text.clean` makes of all `pieces` together, cut where that changes nothing."""
    others = re.compile(f"[^{keep}]+") if keep is not None else None
    in_others = False  # whether what was given ends in a space for a run of others, which may go on
    for piece in _cut(pieces):
        cleaned = text.clean(piece, normalize)
        if others:
            run = others.match(cleaned)
            if in_others and run:
                cleaned = cleaned[run.end() :]
            if cleaned:
                in_others = bool(others.fullmatch(cleaned[-1]))
            cleaned = others.sub(" ", cleaned)
        if lowercase:
            cleaned = cleaned.lower()
        if cleaned:
            yield cleaned


def _cut(pieces: Iterable[str]) -> Iterator[str]:
    """The same text in pieces that end behind a space or a line end, as nothing is joined across these."""
    rest = ""
    for piece in pieces:
        rest += piece
        end = max(rest.rfind(" "), rest.rfind("\n")) + 1
        if not end and len(rest) > _LONG:
            end = _alone(rest)
        if end:
            yield rest[:end]
            rest = rest[end:]
    if rest:
        yield rest


def _alone(piece: str) -> int:
    """Where the last character of `piece` that nothing before it is joined with begins, or 0."""
    for at in range(len(piece) - 1, 0, -1):
        joined = unicodedata.combining(piece[at]) or 0x1100 <= ord(piece[at]) <= 0x11FF  # Hangul's parts
        if not joined:
            return at
    return 0


def _book(pieces: Iterable[str]) -> tuple[int, int] | None:
    """From where to where the text stands that is between Project Gutenberg's markers, if both are there."""
    position, rest, begin = 0, "", None
    for piece in pieces:
        rest += piece
        end = rest.rfind("\n") + 1 or (len(rest) if len(rest) > _LONG else 0)
        lines, rest = rest[:end], rest[end:]
        if found := _find_book(lines, position, begin):
            begin = found[0]
            if found[1] is not None:
                return begin, found[1]
        position += len(lines)
    found = _find_book(rest, position, begin)
    return (found[0], found[1]) if found and found[1] is not None else None


def _find_book(lines: str, position: int, begin: int | None) -> tuple[int, int | None] | None:
    """Where the text begins and ends as far as `lines`, at `position`, tell."""
    search = 0
    if begin is None:
        start = text.find_marker(text.GUTENBERG_START, lines, 0)
        if not start:
            return None
        begin, search = position + start.end(), start.end()
    end = text.find_marker(text.GUTENBERG_END, lines, search)
    return begin, position + end.start() if end else None


def _within(pieces: Iterable[str], begin: int, end: int) -> Iterator[str]:
    """The text from `begin` to `end` without line ends around it, and one at its end."""
    position, started, held = 0, False, ""
    for piece in pieces:
        part = piece[max(begin - position, 0) : max(end - position, 0)]
        position += len(piece)
        if not started:
            part = part.lstrip("\n")
            started = bool(part)
        part = held + part
        body = part.rstrip("\n")
        held = part[len(body) :]
        if body:
            yield body
        if position >= end:
            break
    yield "\n"
