"""The cache of encoded texts: files that are mapped into memory.

They are in ``corpora`` in the user's cache folder (``$XDG_CACHE_HOME/charlm`` or ``~/.cache/charlm``), to
which only its owner can write, and not in a run's folder, because all runs on a text use them. Each can be
deleted at any time; `files.shrink_cache` keeps them under a limit.

The name of an entry is made from the content of the text and from the settings that decide how it is cleaned,
split and encoded. The content is identified by the SHA-256 of the files' bytes. A file that is unchanged
for the file system (device, inode, size, times of last change, all older than the reading) is not hashed
again. An entry is written whole or not at all; several processes that write it at once write the same file to
the same place. An entry with a damaged header, a wrong size or another format is ignored and written again.
"""

import contextlib
import hashlib
import json
import mmap
import os
import time
import unicodedata
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from charlm.errors import CharlmError
from charlm.files import cache_folder, cache_limit, safe_cache_folder, shrink_cache, write_atomically
from charlm.text.encode import Encoded, memory
from charlm.text.read import TextFile
from charlm.text.vocab import Vocab

FORMAT = 1  # increase it when the file's layout changes, or the result of reading and cleaning a text

_MAGIC = b"charlm corpus\n"
_PAGE = 2**16  # the ids begin at a multiple of it, which is one of every system's page size
_MAX_HEADER = 2**26  # bytes
_DAY = 24 * 3600


@dataclass(frozen=True)
class _Seen:
    """A file as it was read: its stat, whether that shows later changes, and the SHA-256 of its bytes."""

    stat: list[int]
    settled: bool
    sha256: str


class Mapped:
    """The splits of a text, in a file that is mapped into memory.

    ids: train, val and test, one after the other, (N,): a view of the file.
    """

    def __init__(self, path: Path, encoded: Encoded, offset: int):
        self.encoded = encoded
        with path.open("rb") as file:
            # A private mapping, because torch wants memory that can be written to.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if hasattr(mmap, "MADV_RANDOM"):
            self._map.madvise(mmap.MADV_RANDOM)
        self.ids: Tensor = torch.frombuffer(self._map, dtype=encoded.dtype, offset=offset)

    def release(self) -> None:
        """Free the memory of the pages read so far; they are read from the file again when needed.

        The kernel frees them when memory is short; this keeps the size of the process small before that.
        """
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def folder() -> Path:
    """Return the folder of encoded texts; raises `CharlmError` if there is none, or none that is safe."""
    cache_limit()  # an invalid one is an error before the text is read
    try:
        return safe_cache_folder("corpora")
    except CharlmError as error:
        raise CharlmError(f"a text as long as this is encoded on the disk, but there is {error}") from None


def find(files: list[TextFile], settings: dict[str, Any]) -> Mapped | None:
    """Return the cached text of `files` under the same `settings`, or None."""
    place = cache_folder("corpora")
    if place is None or not all(file.regular for file in files):
        return None
    hashes: dict[int, str] = {}  # of the files hashed in this call

    def same(seen: _Seen, k: int) -> bool:
        if seen.settled and seen.stat == _stat(files[k]):
            return True
        if k not in hashes:
            hashes[k] = files[k].digest()
        return hashes[k] == seen.sha256

    for path in sorted(place.glob(f"{_stem(files, settings)}-*")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            encoded, seen, offset = _read(path)
            if all(same(each, k) for k, each in enumerate(seen)):
                mapped = Mapped(path, encoded, offset)
                os.utime(path)  # the time of its last use, by which the cache is shrunk
                return mapped
    return None


def write(encoded: Encoded, files: list[TextFile], used: int, settings: dict[str, Any]) -> Mapped:
    """Write a text, just read from the first `used` of `files`, to the cache, and map it.

    Raises `CharlmError` if it cannot be written; no file is left then.
    """
    place = folder()
    _sweep(place)
    seen = [_Seen(_stat(file), file.settled, file.sha256.hexdigest()) for file in files[:used]]
    content = hashlib.sha256("".join(each.sha256 for each in seen).encode()).hexdigest()
    path = place / f"{_stem(files, settings)}-{content[:24]}"
    try:
        write_atomically(path, lambda temporary: _write(temporary, encoded, seen))
    except CharlmError as error:
        raise CharlmError(f"{error}, with XDG_CACHE_HOME") from None
    written, _, offset = _read(path)
    mapped = Mapped(path, written, offset)
    if not all(file.regular for file in files):
        path.unlink()  # could not be found again; the map stays valid
    shrink_cache(keep=path)
    return mapped


def _stem(files: list[TextFile], settings: dict[str, Any]) -> str:
    """The part of an entry's name that is known before the files are read."""
    parts = FORMAT, unicodedata.unidata_version, settings, [file.stat.st_size for file in files]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _stat(file: TextFile) -> list[int]:
    found = file.stat
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _write(path: Path, encoded: Encoded, seen: list[_Seen]) -> None:
    """Write the magic, the header's SHA-256 and length, the header as JSON and, on the next page, the ids."""
    header = {
        "format": FORMAT,
        "files": [asdict(each) for each in seen],
        "characters": encoded.vocab.characters,
        "sizes": encoded.sizes,
        "unseen": encoded.unseen,
        "fingerprint": encoded.fingerprint,
    }
    data = json.dumps(header).encode()
    head = b"%s%s\n%016d\n%s" % (_MAGIC, hashlib.sha256(data).hexdigest().encode(), len(data), data)
    with path.open("wb") as file:
        file.write(head.ljust(-(-len(head) // _PAGE) * _PAGE, b"\0"))
        for piece in encoded.ids:
            file.write(memory(piece))


def _read(path: Path) -> tuple[Encoded, list[_Seen], int]:
    """Return an encoded text without its ids, the files it was read from, and the offset of the ids.

    Raises `ValueError`, `KeyError` or `TypeError` for a damaged file.
    """
    begin = len(_MAGIC) + 65 + 17
    with path.open("rb") as file:
        head = file.read(begin)
        if not head.startswith(_MAGIC):
            raise ValueError("not an encoded text")
        digest, length = head[len(_MAGIC) :].split()
        if not 0 < int(length) <= _MAX_HEADER:
            raise ValueError("the header is too long")
        data = file.read(int(length))
        size = os.fstat(file.fileno()).st_size
    if hashlib.sha256(data).hexdigest().encode() != digest:
        raise ValueError("the header is damaged")
    header = json.loads(data)
    if header["format"] != FORMAT:
        raise ValueError("another format")
    encoded = Encoded(
        Vocab(header["characters"]), tuple(header["sizes"]), header["unseen"], header["fingerprint"], ()
    )
    offset = -(-(begin + len(data)) // _PAGE) * _PAGE
    if size != offset + sum(encoded.sizes) * encoded.dtype.itemsize:
        raise ValueError("too short or too long")
    return encoded, [_Seen(**each) for each in header["files"]], offset


def _sweep(place: Path) -> None:
    """Delete the temporary files of processes that were killed."""
    with contextlib.suppress(OSError):
        for path in place.glob(".*"):
            if path.stat().st_mtime < time.time() - _DAY:
                path.unlink()
