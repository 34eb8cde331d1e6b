"""A clean text as it is read: a file of any length, or stdin as its text comes."""

from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from charlm import text
from charlm.clean import Cleaner

_SIZE = 2**18  # bytes of stdin that are asked for at once


def read_file(path: Path, cleaning: dict[str, Any]) -> Iterator[str]:
    """Yield the clean text of a file, without Project Gutenberg's licence.

    cleaning: the arguments of `Cleaner`. The file is read twice: what is Gutenberg's shows at its end.
    Raises `CharlmError` for what cannot be read and what is no UTF-8 text.
    """
    file, cleaner = text.TextFile(path), Cleaner(**cleaning)
    taken_back = sum(piece is None for piece in text.strip_pieces(file.pieces))
    for piece in text.strip_pieces(file.pieces):
        if piece is None:
            taken_back -= 1
        elif not taken_back:
            yield cleaner.feed(piece)
    yield cleaner.finish()


def read_stdin(file: IO[bytes], cleaning: dict[str, Any]) -> Iterator[str]:
    """Yield the clean text of stdin as it comes; a licence of Gutenberg's is taken for text."""
    cleaner = Cleaner(**cleaning)
    read = getattr(file, "read1", file.read)  # what is there, without waiting for more
    for piece in text.decode_pieces(iter(lambda: read(_SIZE), b""), "stdin"):
        yield cleaner.feed(piece)
    yield cleaner.finish()
