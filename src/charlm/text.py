"""Files to clean text: finding them, decoding them, taking off what is not the text.

Sources are a bundled corpus's name, a file, a folder, a glob or a list of these; files are plain UTF-8 or
compressed (.gz, .bz2, .xz).
"""

import bz2
import glob
import gzip
import lzma
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, cast

from charlm.errors import CharlmError
from charlm.resources import shipped

NormalForm = Literal["NFC", "NFD", "NFKC", "NFKD"]

BUNDLED = ("sancho",)

_DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}
_IN_FOLDERS = tuple(f".txt{ending}" for ending in ("", *_DECOMPRESS))

_STARS = "***"  # how Project Gutenberg's markers begin
GUTENBERG_START = re.compile(r"^\*\*\* ?START OF TH(?:E|IS) PROJECT GUTENBERG EBOOK.*$", re.M | re.I)
GUTENBERG_END = re.compile(r"^\*\*\* ?END OF TH(?:E|IS) PROJECT GUTENBERG EBOOK", re.M | re.I)


def find_files(source: str | list[str]) -> list[Path]:
    """The files that `source` names, in order, each once; folders and globs give theirs sorted.

    Raises `CharlmError` for what names nothing.
    """
    names = [source] if isinstance(source, str) else source
    return list(dict.fromkeys(path for name in names for path in _find(name)))


def _find(name: str) -> list[Path]:
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # ~nobody
        raise CharlmError(f"cannot find {name}: {error}") from None
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.name.endswith(_IN_FOLDERS) and file.is_file())
        if not found:
            raise CharlmError(
                f"the folder {name} holds no text: no file in it ends in {', '.join(_IN_FOLDERS)}"
            )
        return found
    if path.exists():
        return [path]
    if name in BUNDLED:
        return [shipped("data") / f"{name}.txt"]
    if glob.has_magic(name):
        found = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
        if found:
            return found
        raise CharlmError(f"no file matches {name}")
    raise CharlmError(
        f"no such file or folder: {name}; give a path, a glob, or the bundled corpus {', '.join(BUNDLED)}"
    )


def read_file(path: Path) -> str:
    """The text in a file, decompressed and decoded, with LF line ends.

    Raises `CharlmError` for what cannot be read and what is no UTF-8 text.
    """
    try:
        data = path.read_bytes()
        if path.suffix in _DECOMPRESS:
            data = _DECOMPRESS[path.suffix](data)
    except (OSError, ValueError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise CharlmError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    return decode(data, str(path))


def decode(data: bytes, name: str) -> str:
    """`data` as text with LF line ends; `name` names it in the `CharlmError` for what is no UTF-8 text."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise CharlmError(f"{name} is UTF-16, not UTF-8; convert it with: iconv -f UTF-16 -t UTF-8")
    if (nul := data.find(b"\0")) >= 0:
        raise CharlmError(f"{name} is a binary file, not text: it has a NUL byte at offset {nul}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The decoder counts from behind a byte order mark.
        offset = error.start + 3 * data.startswith(b"\xef\xbb\xbf")
        raise CharlmError(
            f"{name} is not valid UTF-8: byte 0x{data[offset]:02x} at offset {offset}; "
            "if it is text in another encoding, convert it, for example with: iconv -f ISO-8859-1 -t UTF-8"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def strip_gutenberg(text: str) -> str:
    """`text` without Project Gutenberg's header and licence, where both of its markers stand in it."""
    start = find_marker(GUTENBERG_START, text, 0)
    end = find_marker(GUTENBERG_END, text, start.end()) if start else None
    return text[start.end() : end.start()].strip("\n") + "\n" if start and end else text


def find_marker(marker: re.Pattern[str], text: str, begin: int) -> re.Match[str] | None:
    """What ``marker.search(text, begin)`` finds, a hundred times as fast: an expression tries every line."""
    place = text.find(_STARS, begin)
    while place >= 0:
        if found := marker.match(text, place):
            return found
        place = text.find(_STARS, place + 1)
    return None


def clean(text: str, normalize: str = "NFC", lowercase: bool = False, keep: str | None = None) -> str:
    """`text` as the model sees it.

    normalize: the Unicode normal form, or ``none``.
    keep: the inside of a regular expression's character class; each run of other characters becomes a space.
    """
    if normalize != "none" and not text.isascii():
        text = unicodedata.normalize(cast(NormalForm, normalize), text)
    if keep is not None:
        text = re.sub(f"[^{keep}]+", " ", text)
    return text.lower() if lowercase else text


def read(files: Iterable[Path]) -> str:
    """The text of `files`, one after the other, each ending its last line."""
    texts = (strip_gutenberg(read_file(path)) for path in files)
    return "".join(text if text.endswith("\n") else text + "\n" for text in texts if text)
