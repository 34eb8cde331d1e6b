"""Reading of texts: finding files, decompressing and decoding them, removing Project Gutenberg's licence.

A source is the name of a bundled corpus, a file, a folder, a glob or a list of these; a file is plain
or compressed (.gz, .bz2, .xz). Files are read piece by piece, so that a file can be larger than the memory;
the result does not depend on where the pieces end. `read_clean` and `read_clean_stdin` also clean it.
"""

import bz2
import codecs
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

BUNDLED = ("sancho",)

_PIECE = 2**20  # bytes per read
_TICK = 2 * 10**9  # ns, at least the resolution of a file system's times, within which a change does not show
_DECOMPRESS: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file, mode="rb"),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}
_IN_FOLDERS = tuple(f".txt{ending}" for ending in ("", *_DECOMPRESS))
_BOM = codecs.BOM_UTF8
_OTHER_BOMS = {  # UTF-32 first: its little-endian mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}

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


def decode(data: bytes, name: str, encoding: str = "utf-8") -> str:
    """Return `data` as text with LF line ends; raises `CharlmError` with `name` as `decode_pieces` does."""
    return "".join(decode_pieces([data], name, encoding))


def decode_pieces(data: Iterable[bytes], name: str, encoding: str = "utf-8") -> Iterator[str]:
    """Yield `decode`'s result for data in pieces, in pieces.

    encoding: one of Python's; with ``bytes`` each byte is the character of its number, and nothing else is
    changed. Raises `CharlmError` for data that is not in it.
    """
    if encoding == "bytes":
        yield from (piece.decode("latin-1") for piece in data)
        return
    is_utf8 = codecs.lookup(encoding).name == "utf-8"
    decoder, before, end = codecs.getincrementaldecoder(encoding)(), 0, ""
    pieces = ((piece, False) for piece in _with_whole_beginning(data))
    first = True
    for piece, last in itertools.chain(pieces, [(b"", True)]):
        if is_utf8:
            _refuse_other_text(piece, before, name)
        waiting = len(decoder.getstate()[0])
        try:
            text = end + decoder.decode(piece, last)
        except UnicodeDecodeError as error:
            place = before - waiting + error.start
            raise CharlmError(
                f"{name} is not valid {encoding.upper()}: byte 0x{error.object[error.start]:02x} "
                f"at offset {place}; {_advice(error, last, is_utf8)}"
            ) from None
        before += len(piece)
        if first and text:
            text, first = text.removeprefix("\ufeff"), False
        end = "\r" if text.endswith("\r") and not last else ""  # the next piece may begin with its LF
        yield with_lf(text[:-1] if end else text)


def _refuse_other_text(piece: bytes, before: int, name: str) -> None:
    """Raise `CharlmError` if `piece`, at the offset `before`, is UTF-16 or UTF-32, or no text."""
    for mark, encoding in _OTHER_BOMS.items() if before == 0 else ():
        if piece.startswith(mark):
            raise CharlmError(
                f"{name} is {encoding}, not UTF-8; convert it with: iconv -f {encoding} -t UTF-8, "
                f"or train with --set corpus.encoding={encoding}"
            )
    if (nul := piece.find(b"\0")) >= 0:
        raise CharlmError(
            f"{name} is not a text file: it has a NUL byte at offset {before + nul}; "
            "a model of bytes reads any file: --set corpus.encoding=bytes"
        )


def _advice(error: UnicodeDecodeError, last: bool, is_utf8: bool) -> str:
    """What to do about a file that could not be decoded."""
    if last or error.reason == "unexpected end of data":
        return "the file ends inside a character: it was cut"
    if not is_utf8:
        return "set corpus.encoding to the text's encoding, or to bytes"
    named = [name for name in _CANDIDATES if _plausible(error.object, name)] or ["windows-1252"]
    return (
        f"if it is text in another encoding, perhaps {' or '.join(named)}, set corpus.encoding={named[0]}, "
        f"or convert it with: iconv -f {named[0].upper()} -t UTF-8"
    )


# Encodings of which texts consist of certain letters, the strictest first.
_CANDIDATES = {
    "shift_jis": "[\u3000-\u30ff\u4e00-\u9fff\uff00-\uff5e]",
    "euc_kr": "[\uac00-\ud7a3]",
    "gb18030": "[\u3000-\u3011\u4e00-\u9fff\uff00-\uff5e]",
    "big5": "[\u3000-\u3011\u4e00-\u9fff\uff00-\uff5e]",
    "koi8-r": "[а-яё]",
    "windows-1251": "[а-яё]",
    "windows-1252": "[\u00c0-\u00ff\u2010-\u2026]",
}


def _plausible(data: bytes, encoding: str) -> bool:
    """Whether most characters of `data` beyond ASCII are those that texts in `encoding` consist of.

    In Western texts they are the smaller part of all letters, in others the larger one.
    """
    decoder = codecs.getincrementaldecoder(encoding)()  # the data may be cut at its end
    try:
        text = decoder.decode(data)
    except UnicodeDecodeError:
        return False
    others = [char for char in text if char > "\x7f"]
    western = 2 * len(others) < sum(map(str.isalpha, text))
    if western != (encoding == "windows-1252"):
        return False
    return len(re.findall(_CANDIDATES[encoding], "".join(others))) > 0.8 * len(others)


def with_lf(text: str) -> str:
    """Return `text` with LF line ends."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _with_whole_beginning(data: Iterable[bytes]) -> Iterator[bytes]:
    """Yield `data`, its first pieces joined while they can be the beginning of a byte order mark."""
    marks, beginning, data = (_BOM, *_OTHER_BOMS), b"", iter(data)
    for piece in data:
        beginning += piece
        if not any(mark.startswith(beginning) and mark != beginning for mark in marks):
            break
    yield beginning
    yield from data


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
