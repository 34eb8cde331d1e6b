"""`Encoder`: encodes a clean text piece by piece, in constant memory.

A character's final id depends on the counts in the train split, whose end is known only after the whole text.
Characters therefore get preliminary ids in the order in which they first appear, which are stored, in a
temporary file if there are many; a table maps them to the final ids at the end.
"""

import contextlib
import ctypes
import hashlib
import io
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor
from torch.nn import functional as F

from charlm.errors import CharlmError
from charlm.text.vocab import Vocab, ascii_name, code_points

_CHUNK = 2**18  # characters encoded together: the tensors made for them stay in the processor's cache
_NAMED = 8  # characters that an error names
_UNKNOWN = 255  # marks a character whose id is unknown or does not fit into a byte

Split = tuple[float, float, float]


def smallest_dtype(vocab_size: int) -> torch.dtype:
    """Return the smallest integer type that holds ids below `vocab_size`: uint8, int16 or int32.

    Not uint16: torch can neither flip it nor index by it, and few texts have over 32,768 distinct characters.
    """
    if vocab_size <= 2**8:
        return torch.uint8
    return torch.int16 if vocab_size <= 2**15 else torch.int32


def memory(ids: Tensor) -> memoryview:
    """Return the bytes of contiguous CPU ids (N,), without a copy; `ids` must outlive them."""
    return memoryview((ctypes.c_char * (ids.numel() * ids.element_size())).from_address(ids.data_ptr()))


def _tensor(data: bytearray, dtype: torch.dtype) -> Tensor:
    """The ids whose bytes are `data`, without a copy."""
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


class Encoder:
    """Counts and encodes a text that is added in pieces.

    limit: bytes of ids held in memory; if there are more, all are moved to an unnamed temporary file.
    folder: returns the folder for that file; called when it is needed.
    Raises `CharlmError` if the file cannot be written.
    """

    def __init__(self, limit: int | None = None, folder: Callable[[], Path] = Path):
        self.limit, self.folder = limit, folder
        self.length, self.size = 0, 0  # in characters, in bytes
        self.on_disk: Path | None = None
        self._file: IO[bytes] = io.BytesIO()
        # The types of the ids, and the number of characters with each, in order.
        self._runs: list[tuple[torch.dtype, int]] = []
        self._ids = torch.full((sys.maxunicode + 1,), -1, dtype=torch.int32)  # by code point
        self._points = torch.empty(0, dtype=torch.int32)  # by id
        self._counts = torch.empty(0, dtype=torch.int64)  # by id
        self._latin_ids = bytes([_UNKNOWN]) * 256  # by code point, as bytes
        self._digest = hashlib.sha256()

    def add(self, text: str) -> None:
        """Count and encode `text`."""
        for start in range(0, len(text), _CHUNK):
            piece = text[start : start + _CHUNK]
            self._digest.update(piece.encode("utf-8", "surrogatepass"))
            ids, counts = self._latin(piece) or self._any(piece)
            self._counts += counts
            self._put(ids)

    def _latin(self, piece: str) -> tuple[Tensor, Tensor] | None:
        """`_any` in half the time if all characters are known and below U+0100, else None."""
        try:
            data = bytearray(piece, "latin-1")
        except UnicodeEncodeError:
            return None
        ids = _tensor(data.translate(self._latin_ids), torch.uint8)
        counts = torch.bincount(ids, minlength=max(256, len(self._points)))
        return None if counts[_UNKNOWN] else (ids, counts[: len(self._points)])

    def _any(self, piece: str) -> tuple[Tensor, Tensor]:
        """The ids of `piece` and the number of occurrences of each; new characters get ids."""
        points = code_points(piece)
        ids = self._ids.index_select(0, points)  # ten times as fast as indexing
        if ids.min() < 0:
            self._learn(torch.unique(points[ids < 0]))
            ids = self._ids.index_select(0, points)
        ids = ids.to(smallest_dtype(len(self._points)))
        return ids, torch.bincount(ids, minlength=len(self._points))

    def _learn(self, points: Tensor) -> None:
        known = len(self._points)
        self._points = torch.cat([self._points, points])
        self._counts = torch.cat([self._counts, torch.zeros(len(points), dtype=torch.int64)])
        self._ids[points] = torch.arange(known, known + len(points), dtype=torch.int32)
        narrow = self._ids[:256]
        self._latin_ids = bytes(narrow.where(narrow.ge(0) & narrow.lt(_UNKNOWN), _UNKNOWN).tolist())

    def _put(self, ids: Tensor) -> None:
        data = memory(ids)
        with self._writing():
            if self.on_disk is None and self.limit is not None and self.size + len(data) > self.limit:
                self._to_disk()
            self._file.write(data)
        before = self._runs.pop() if self._runs and self._runs[-1][0] == ids.dtype else (ids.dtype, 0)
        self._runs.append((ids.dtype, before[1] + len(ids)))
        self.length, self.size = self.length + len(ids), self.size + len(data)

    def _to_disk(self) -> None:
        self.on_disk = self.folder()
        # It is deleted when it is closed, however the process ends.
        file = tempfile.TemporaryFile(dir=self.on_disk)  # noqa: SIM115 - `close` does
        file.write(self._file.getbuffer())  # type: ignore[attr-defined]
        self._file = file

    def mark(self) -> Callable[[], None]:
        """Return a function that removes all text added after this call; its characters stay known."""
        length, size, runs = self.length, self.size, list(self._runs)
        counts, digest = self._counts.clone(), self._digest.copy()

        def take_back() -> None:
            with self._writing():
                self._file.seek(size)
                self._file.truncate()
            self.length, self.size, self._runs, self._digest = length, size, list(runs), digest.copy()
            self._counts = torch.zeros(len(self._points), dtype=torch.int64)
            self._counts[: len(counts)] = counts

        return take_back

    @property
    def blank(self) -> bool:
        """Whether the text is empty or only white space."""
        return all(chr(point).isspace() for point in self._points[self._counts > 0].tolist())

    def finish(
        self,
        split: Split,
        known: Vocab | None = None,
        own: tuple[int, int] = (0, 0),
        min_count: int = 1,
        fixed: bool = False,
    ) -> "Encoded":
        """Return the text, split by the fractions of train, val and test, encoded by train's vocabulary.

        known, min_count, fixed: as in `Vocab.from_counts`.
        own: the lengths of a val and a test text that were added before the text that is split.
        Raises `CharlmError` as `Vocab.from_counts` does, and for a fixed vocabulary without an unknown class
        that lacks characters of the text.
        """
        begin = sum(own)
        ends = [begin + round((self.length - begin) * part) for part in (split[0], split[0] + split[1])]
        places = [
            (begin, ends[0]),
            (0, own[0]) if own[0] else (ends[0], ends[1]),
            (own[0], begin) if own[1] else (ends[1], self.length),
        ]
        held_out = [self._count(*place) for place in places[1:]]
        counts = self._counts - held_out[0] - held_out[1]
        vocab = Vocab.from_counts(self._points, counts, known, min_count, fixed)
        table = vocab.look_up(self._points.clone())
        if vocab.unknown:
            table[table < 0] = vocab.unknown.id
        unseen = table < 0
        if fixed and (lacking := self._points[unseen & (self._counts > 0)].tolist()):
            raise _too_small(lacking)
        missing = [0, *(int(count[unseen].sum()) for count in held_out)]
        train, val, test = (end - first - lost for (first, end), lost in zip(places, missing, strict=True))
        order = sorted(range(3), key=lambda k: places[k])
        ids = self._final(table, smallest_dtype(len(vocab)))
        return Encoded(vocab, (train, val, test), order, sum(missing), self._digest.hexdigest(), ids)

    def _count(self, begin: int, end: int) -> Tensor:
        counts = torch.zeros(len(self._points), dtype=torch.int64)
        for ids in self._read(begin, end):
            counts += torch.bincount(ids, minlength=len(counts))
        return counts

    def _final(self, table: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
        """The final ids of the text, in pieces.

        table: the final id of each preliminary id, -1 for a character to leave out. dtype: of the final ids.
        """
        missing = (table[:256] < 0).nonzero().flatten()
        as_bytes = bytes(F.pad(table[:256], (0, 256 - len(table[:256]))).to(torch.uint8).tolist())
        for ids in self._read(0, self.length):
            if ids.dtype == dtype == torch.uint8:  # three times as fast
                yield _tensor(bytearray(memory(ids)).translate(as_bytes, bytes(missing.tolist())), dtype)
            else:
                final = table.index_select(0, ids.int())
                yield (final[final >= 0] if final.min() < 0 else final).to(dtype)

    def _read(self, begin: int, end: int) -> Iterator[Tensor]:
        """The preliminary ids of the characters from `begin` to `end`, in pieces."""
        place, offset = 0, 0
        for dtype, count in self._runs:
            size = dtype.itemsize
            for first in range(max(begin, place), min(end, place + count), _CHUNK):
                last = min(first + _CHUNK, end, place + count)
                with self._writing():
                    self._file.seek(offset + (first - place) * size)
                    data = bytearray(self._file.read((last - first) * size))
                yield _tensor(data, dtype)
            place, offset = place + count, offset + count * size

    def close(self) -> None:
        """Free the ids, in memory and on the disk."""
        with contextlib.suppress(OSError):  # of buffered ids, which are no longer needed
            self._file.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.close()
            raise CharlmError(
                f"cannot write the encoded text to {self.on_disk}: {error.strerror}; "
                "free some space, or set XDG_CACHE_HOME to a folder that has it"
            ) from None


def _too_small(lacking: list[int]) -> CharlmError:
    """Return the error for a fixed vocabulary without the code points `lacking` of the text."""
    named = ", ".join(ascii_name(chr(point)) for point in lacking[:_NAMED])
    more = f" and {len(lacking) - _NAMED} more" if len(lacking) > _NAMED else ""
    return CharlmError(
        f"the text has {len(lacking)} characters that corpus.vocabulary lacks: {named}{more}; set "
        "corpus.min_count to 2 or more, so that they become one unknown, or name a file that has them"
    )


@dataclass(frozen=True)
class Encoded:
    """The encoded splits of a text.

    sizes: the numbers of characters of train, val and test.
    order: their order in `ids`, by their indices in `sizes`.
    unseen: the number of characters in val and test that are not in the vocabulary; they are left out. With
        an unknown class, none are.
    fingerprint: SHA-256 of the text in UTF-8.
    ids: the splits, one after the other, in pieces.
    """

    vocab: Vocab
    sizes: tuple[int, int, int]
    order: list[int]
    unseen: int
    fingerprint: str
    ids: Iterable[Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """The type of `ids`."""
        return smallest_dtype(len(self.vocab))

    def in_memory(self) -> Tensor:
        """Return all ids, (N,); can be called once."""
        whole, place = torch.empty(sum(self.sizes), dtype=self.dtype), 0
        for ids in self.ids:
            whole[place : place + len(ids)] = ids
            place += len(ids)
        return whole
