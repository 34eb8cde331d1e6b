"""The cache of encoded texts: files that are mapped into memory.

They are in ``corpora`` in the user's cache folder (``$XDG_CACHE_HOME/charlm`` or ``~/.cache/charlm``), to
which only its owner can write, and not in a run's folder, because all runs on a text use them. Each can be
deleted at any time; `files.shrink_cache` keeps them under a limit.

The name of an entry is made from the content of the text (the SHA-256 of the files' bytes) and from the
settings that decide how it is cleaned, split and encoded. A file that is unchanged for the file system is not
hashed again. Several processes that write an entry at once write the same file to the same place. An entry
with a damaged header or a wrong size is ignored and written again.

An entry is a line with the SHA-256 of its header and the header as JSON and, on the next page, the ids.
"""

import contextlib
import functools
import hashlib
import json
import mmap
import os
import time
import unicodedata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from charlm.errors import CharlmError
from charlm.files import cache_folder, cache_limit, safe_cache_folder, shrink_cache, write_atomically
from charlm.text.encode import Encoded, memory
from charlm.text.read import TextFile
from charlm.text.vocab import Vocab

FORMAT = 3  # increase it when the file's layout changes, or the result of reading and cleaning a text

_PAGE = 2**16  # the ids begin at a multiple of it, which is one of every system's page size
_MAX_HEADER = 2**26  # bytes
_DAY = 24 * 3600


class Mapped:
    """The splits of a text, in a file that is mapped into memory.

    encoded: the text without its ids.
    ids: the splits, one after the other, (N,): a view of the file.
    files: the SHA-256 and the `identity` of each file that the text was read from.
    Raises `OSError`, `ValueError`, `KeyError` or `TypeError` for a damaged file.
    """

    def __init__(self, path: Path):
        with path.open("rb") as file:
            head = file.readline(_MAX_HEADER)
            digest, _, data = head.rstrip(b"\n").partition(b" ")
            if hashlib.sha256(data).hexdigest().encode() != digest:
                raise ValueError("the header is damaged")
            # A private mapping, because torch wants memory that can be written to.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        header = json.loads(data)
        self.files: list[tuple[str, list[int] | None]] = header.pop("files")
        self.encoded = Encoded(Vocab(header.pop("characters"), header.pop("kinds")), ids=(), **header)
        offset, dtype = _padded(len(head)), self.encoded.dtype
        if len(self._map) != offset + sum(self.encoded.sizes) * dtype.itemsize:
            raise ValueError("too short or too long")
        if hasattr(mmap, "MADV_RANDOM"):
            self._map.madvise(mmap.MADV_RANDOM)
        self.ids: Tensor = torch.frombuffer(self._map, dtype=dtype, offset=offset)

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
    digest = functools.cache(lambda file: file.digest())
    for path in sorted(place.glob(f"{_stem(files, settings)}-*")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            mapped = Mapped(path)
            if all(
                (identity and identity == file.identity) or sha256 == digest(file)
                for file, (sha256, identity) in zip(files, mapped.files, strict=False)
            ):
                os.utime(path)  # the time of its last use, by which the cache is shrunk
                return mapped
    return None


def write(encoded: Encoded, files: list[TextFile], used: int, settings: dict[str, Any]) -> Mapped:
    """Write a text, just read from the first `used` of `files`, to the cache, and map it.

    Raises `CharlmError` if it cannot be written; no file is left then.
    """
    place = folder()
    for path in place.glob(".*"):  # temporary files of processes that were killed
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < time.time() - _DAY:
                path.unlink()
    hashes = [file.sha256.hexdigest() for file in files[:used]]
    header = {
        "files": [(sha256, file.identity) for sha256, file in zip(hashes, files, strict=False)],
        "characters": encoded.vocab.characters,
        "kinds": encoded.vocab.unknown.kinds if encoded.vocab.unknown else 0,
        "sizes": encoded.sizes,
        "order": encoded.order,
        "unseen": encoded.unseen,
        "fingerprint": encoded.fingerprint,
    }
    data = json.dumps(header).encode()
    head = b"%s %s\n" % (hashlib.sha256(data).hexdigest().encode(), data)

    def write_to(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(head.ljust(_padded(len(head)), b"\0"))
            for piece in encoded.ids:
                file.write(memory(piece))

    path = place / f"{_stem(files, settings)}-{hashlib.sha256(''.join(hashes).encode()).hexdigest()[:24]}"
    try:
        write_atomically(path, write_to)
    except CharlmError as error:
        raise CharlmError(f"{error}, with XDG_CACHE_HOME") from None
    mapped = Mapped(path)
    if not all(file.regular for file in files):
        path.unlink()  # could not be found again; the map stays valid
    shrink_cache(keep=path)
    return mapped


def _stem(files: list[TextFile], settings: dict[str, Any]) -> str:
    """The part of an entry's name that is known before the files are read."""
    parts = FORMAT, unicodedata.unidata_version, settings, [file.stat.st_size for file in files]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _padded(size: int) -> int:
    return -(-size // _PAGE) * _PAGE
