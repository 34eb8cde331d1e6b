"""Encoded texts kept on the disk, and mapped into memory from there.

They are in ``corpora`` in the user's cache folder (``$XDG_CACHE_HOME/charlm`` or ``~/.cache/charlm``), which
only its owner may write to; not in a run's folder, since all runs on a text share them. Any may be deleted.

A text's name there is made of its content and of all that decides what becomes of it. The content is known
by the SHA-256 of the files' bytes. Files that are still the same to the file system (device, inode, size,
times of last change, all older than the reading) are taken to be so; all others are hashed again, whatever
their names. The ids are written whole or not at all, by as many processes at once as may be: each puts the
same file in the same place. What is damaged, in size or header, or of another format, counts as not there.
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

FORMAT = 1  # of the file, and of what reading and cleaning make of a text: raise it when either changes

_MAGIC = b"charlm corpus\n"
_PAGE = 2**16  # where the ids begin: a multiple of any system's page
_MOST = 2**26  # bytes of a header
_DAY = 24 * 3600


@dataclass(frozen=True)
class _Seen:
    """A file as it was when it was read: what the file system said, the hash of its bytes."""

    stat: list[int]
    settled: bool
    sha256: str


class Mapped:
    """A text's splits as they are on the disk.

    ids: all three, one after the other, (N,): a view of the file.
    """

    def __init__(self, path: Path, encoded: Encoded, offset: int):
        self.encoded = encoded
        with path.open("rb") as file:
            # Not shared: torch wants memory that it could write to.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if hasattr(mmap, "MADV_RANDOM"):
            self._map.madvise(mmap.MADV_RANDOM)
        self.ids: Tensor = torch.frombuffer(self._map, dtype=encoded.dtype, offset=offset)

    def release(self) -> None:
        """Give back the memory of what was read of `ids`; what is read again comes from the file again.

        The kernel does so when it needs it; this is for those who watch or limit the process's size.
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
    """The encoded text of `files`, if it was made before under the same `settings`."""
    place = cache_folder("corpora")
    if place is None or not all(file.regular for file in files):
        return None
    hashes: dict[int, str] = {}  # of the files that had to be read

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
                os.utime(path)  # of what is not used for long, the cache is freed
                return mapped
    return None


def write(encoded: Encoded, files: list[TextFile], used: int, settings: dict[str, Any]) -> Mapped:
    """Put a text, read from the first `used` of `files` just now, on the disk, and map it.

    Raises `CharlmError` where that cannot be done; then nothing is left behind.
    """
    place = folder()
    _sweep(place)
    seen = [_Seen(_stat(file), file.settled, file.sha256.hexdigest()) for file in files[:used]]
    content = hashlib.sha256("".join(each.sha256 for each in seen).encode()).hexdigest()
    path = place / f"{_stem(files, settings)}-{content[:24]}"
    try:
        write_atomically(path, lambda temporary: _write(temporary, encoded, seen))
    except CharlmError as error:
        raise CharlmError(f"{error}, by XDG_CACHE_HOME") from None
    written, _, offset = _read(path)
    mapped = Mapped(path, written, offset)
    if not all(file.regular for file in files):
        path.unlink()  # could not be found again; the map stays valid
    shrink_cache(keep=path)
    return mapped


def _stem(files: list[TextFile], settings: dict[str, Any]) -> str:
    """The part of the name that is known before the files are read."""
    parts = FORMAT, unicodedata.unidata_version, settings, [file.stat.st_size for file in files]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _stat(file: TextFile) -> list[int]:
    found = file.stat
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _write(path: Path, encoded: Encoded, seen: list[_Seen]) -> None:
    """The magic, the header's hash and length, the header as JSON, and from the next page on the ids."""
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
    """An encoded text without its ids, what it was read from, and where in the file the ids begin.

    Raises `ValueError`, `KeyError` or `TypeError` for a damaged file.
    """
    begin = len(_MAGIC) + 65 + 17
    with path.open("rb") as file:
        head = file.read(begin)
        if not head.startswith(_MAGIC):
            raise ValueError("no encoded text")
        digest, length = head[len(_MAGIC) :].split()
        if not 0 < int(length) <= _MOST:
            raise ValueError("an absurd header")
        data = file.read(int(length))
        size = os.fstat(file.fileno()).st_size
    if hashlib.sha256(data).hexdigest().encode() != digest:
        raise ValueError("a damaged header")
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
    """Delete what processes that were killed while they wrote have left."""
    with contextlib.suppress(OSError):
        for path in place.glob(".*"):
            if path.stat().st_mtime < time.time() - _DAY:
                path.unlink()
