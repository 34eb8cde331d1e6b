"""Reading of texts: finding files, decompressing them, removing Project Gutenberg's licence.

A source is the name of a bundled corpus, a file, a folder, a glob or a list of these; a file is plain
or compressed (.gz, .bz2, .xz). Files are read piece by piece, so that a file can be larger than the memory;
the result does not depend on where the pieces end. `read_clean` and `read_clean_stdin` also clean it.
"""

import bz2
import contextlib
import glob
import gzip
import hashlib
import itertools
import lzma
import re
import shlex
import stat
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import IO, Any, NamedTuple

from charlm.config import shipped
from charlm.errors import CharlmError
from charlm.text.clean import Cleaner
from charlm.text.decode import decode_pieces

BUNDLED = ("sancho",)

_PIECE = 2**20  # bytes per read
_TICK = 2 * 10**9  # ns, at least the resolution of a file system's times, within which a change does not show
_DECOMPRESS: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file, mode="rb"),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}
_IN_FOLDERS = tuple(f".txt{ending}" for ending in ("", *_DECOMPRESS))

_STARS = "***"  # the beginning of Project Gutenberg's markers
_LONGEST_MARKER = 64  # characters; more than the expressions below need of a line
_GUTENBERG_START = re.compile(r"^\*\*\* ?START OF TH(?:E|IS) PROJECT GUTENBERG EBOOK.*$", re.M | re.I)
_GUTENBERG_END = re.compile(r"^\*\*\* ?END OF TH(?:E|IS) PROJECT GUTENBERG EBOOK", re.M | re.I)


class Found(NamedTuple):
    """The files of a source, in order, and how many files of its folders are not read."""

    files: tuple[Path, ...]
    left: int


def find_files(source: str | list[str]) -> Found:
    """Return the files that `source` names, in order, each once, those of folders and globs sorted.

    Of a folder these are the text files, without those whose name or folder begins with a dot.

    Raises `CharlmError` for a name without a file.
    """
    found = [_find(name) for name in ([source] if isinstance(source, str) else source)]
    files = dict.fromkeys(path for each in found for path in each.files)
    return Found(tuple(files), sum(each.left for each in found))


def _find(name: str) -> Found:
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # ~nobody
        raise CharlmError(f"cannot find {name}: {error}") from None
    if path.is_dir():
        return _in_folder(name, path)
    if path.exists():
        return Found((path,), 0)
    if name in BUNDLED:
        return Found((shipped("data") / f"{name}.txt",), 0)
    if glob.has_magic(name):
        found = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
        if found:
            return Found(tuple(found), 0)
        raise CharlmError(f"no file matches {name}")
    raise CharlmError(
        f"no such file or folder: {name}; give a path, a glob, or the bundled corpus {', '.join(BUNDLED)}"
    )


def _in_folder(name: str, folder: Path) -> Found:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    shown = [
        file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    texts = [file for file in shown if file.name.endswith(_IN_FOLDERS)]
    if not texts:
        endings = Counter(file.suffix for file in shown if file.suffix)
        hint = ""
        if endings:
            ((ending, count),) = endings.most_common(1)
            pattern = shlex.quote(f"{folder}/**/*{ending}")
            hint = f"; to read its {count} {ending} {'file' if count == 1 else 'files'}, give {pattern}"
        raise CharlmError(f"the folder {name} has no file that ends in {', '.join(_IN_FOLDERS)}{hint}")
    return Found(tuple(texts), len(files) - len(texts))


class TextFile:
    """A text file, plain or compressed.

    on_read: called with the number of bytes just read, of the file as it is on the disk.
    encoding: as in `decode_pieces`.
    stat: the file's stat when this object was made.
    identity: device, inode, size and times of last change, if any later change will show in them, else None.
    sha256: the SHA-256 of the bytes that `pieces` has read.
    Raises `CharlmError` if the file cannot be read.
    """

    def __init__(
        self, path: Path, on_read: Callable[[int], object] = lambda count: None, encoding: str = "utf-8"
    ):
        self.path, self.on_read, self.sha256, self.encoding = path, on_read, hashlib.sha256(), encoding
        with _reading(path):
            now, self.stat = time.time_ns(), path.stat()
            self.regular = stat.S_ISREG(self.stat.st_mode)
            times = self.stat.st_mtime_ns, self.stat.st_ctime_ns
            place = self.stat.st_dev, self.stat.st_ino, self.stat.st_size
            self.identity = [*place, *times] if max(times) < now - _TICK else None
            # A pipe can be read only once, and the text may be read twice.
            self._content = None if self.regular else path.read_bytes()

    @property
    def compressed(self) -> bool:
        """Whether the file is compressed, so that the size of its text is unknown."""
        return self.path.suffix in _DECOMPRESS

    def read(self, count: int = -1) -> bytes:
        """Return the next bytes as they are on the disk, for the decompressor."""
        data = self._file.read(count)
        self.sha256.update(data)
        self.on_read(len(data))
        return data

    def chunks(self) -> Iterator[bytes]:
        """Yield the decompressed bytes, from the beginning."""
        with _reading(self.path):
            self.sha256 = hashlib.sha256()
            self._file: IO[bytes] = (
                BytesIO(self._content) if self._content is not None else self.path.open("rb")
            )
            with self._file:
                opened = _DECOMPRESS[self.path.suffix](self) if self.compressed else self
                while chunk := opened.read(_PIECE):
                    yield chunk
                if self.compressed:
                    self.read()  # the end of the file, which a decompressor may not read

    def digest(self) -> str:
        """Return the SHA-256 of all bytes of the file as they are on the disk."""
        with _reading(self.path), self.path.open("rb") as self._file:
            self.sha256 = hashlib.sha256()
            while self.read(_PIECE):
                pass
        return self.sha256.hexdigest()

    def pieces(self) -> Iterator[str]:
        """Yield the decoded text with LF line ends; raises `CharlmError` if it is not in the encoding."""
        return decode_pieces(self.chunks(), str(self.path), self.encoding)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise CharlmError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def strip_pieces(pieces: Callable[[], Iterator[str]]) -> Iterator[str | None]:
    """Yield the text without Project Gutenberg's header and licence, if it has both of their markers.

    None takes back all pieces before it.

    pieces: a function that reads the text from its beginning. Whether there is a header is known only at its
    end, and whether it is to be removed only at the licence.
    """
    stream = _with_whole_markers(pieces())
    for text, at_line_start in stream:
        if start := _find_marker(_GUTENBERG_START, text, at_line_start):
            break
        yield text
    else:
        return
    yield None
    in_marker, begun, newlines = True, False, 0
    rest = text[start.end() :], False
    for piece, piece_at_start in itertools.chain([rest], stream):
        if in_marker:
            if (line_end := piece.find("\n")) < 0:
                continue
            piece, in_marker = piece[line_end:], False
        end = _find_marker(_GUTENBERG_END, piece, piece_at_start)
        body = piece[: end.start()] if end else piece
        if not begun:
            body = body.lstrip("\n")
        if kept := body.rstrip("\n"):
            yield from ("\n" * min(_PIECE, newlines - done) for done in range(0, newlines, _PIECE))
            yield kept
            begun, newlines = True, len(body) - len(kept)
        else:
            newlines += len(body)
        if end:
            yield "\n"
            for _ in stream:  # reads the licence, which must be UTF-8 too
                pass
            return
    yield None
    yield from pieces()


def _with_whole_markers(pieces: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Yield the text in pieces that cut no marker, each with whether it begins a line."""
    held, at_line_start = "", True
    for piece in pieces:
        text, held = held + piece, ""
        line = text.rfind("\n") + 1
        short = len(text) - line < _LONGEST_MARKER and (line or at_line_start)
        if short and (text.startswith(_STARS, line) or _STARS.startswith(text[line:])):
            text, held = text[:line], text[line:]
        if text:
            yield text, at_line_start
            at_line_start = text.endswith("\n")
    if held:
        yield held, at_line_start


def _find_marker(marker: re.Pattern[str], text: str, at_line_start: bool) -> re.Match[str] | None:
    """`marker.search(text)`, a hundred times as fast: the expression tries every line."""
    place = text.find(_STARS, 0 if at_line_start else 1)
    while place >= 0:
        if found := marker.match(text, place):
            return found
        place = text.find(_STARS, place + 1)
    return None


def clean_pieces(pieces: Callable[[], Iterator[str]], cleaning: dict[str, Any]) -> Iterator[str | None]:
    """Yield the clean text without Project Gutenberg's licence; None takes back all pieces before it.

    pieces: a function that reads the text from its beginning. cleaning: the arguments of `Cleaner`.
    """
    cleaner = Cleaner(**cleaning)
    for piece in strip_pieces(pieces):
        if piece is None:
            cleaner = Cleaner(**cleaning)
            yield None
        else:
            yield cleaner.feed(piece)
    yield cleaner.finish()


def read_clean(
    pieces: Callable[[], Iterator[str]], cleaning: dict[str, Any], taken_back: int | None = None
) -> Iterator[str]:
    """Yield the pieces of `clean_pieces` that are not taken back.

    taken_back: the number of None among them, if known; otherwise the text is read twice.
    """
    if taken_back is None:  # after a second None comes the whole text: there is no licence
        nones = (piece for piece in strip_pieces(pieces) if piece is None)
        taken_back = len(list(itertools.islice(nones, 2)))
    if taken_back != 1:
        return _cleaned(pieces(), cleaning)
    body = itertools.dropwhile(lambda piece: piece is not None, strip_pieces(pieces))
    return _cleaned((piece or "" for piece in body), cleaning)


def read_clean_stdin(file: IO[bytes], cleaning: dict[str, Any], encoding: str = "utf-8") -> Iterator[str]:
    """Yield the clean text of stdin as it comes; a licence of Gutenberg's is taken for text."""
    read = getattr(file, "read1", file.read)  # what is there, without waiting for more
    return _cleaned(decode_pieces(iter(lambda: read(_PIECE), b""), "stdin", encoding), cleaning)


def _cleaned(pieces: Iterable[str], cleaning: dict[str, Any]) -> Iterator[str]:
    cleaner = Cleaner(**cleaning)
    yield from map(cleaner.feed, pieces)
    yield cleaner.finish()
