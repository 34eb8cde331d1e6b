"""`Corpus`: a text as encoded train, val and test splits, with the vocabulary of the train split.

A text is read, cleaned, counted and encoded in one pass, piece by piece. A short text is kept in memory. A
long one is written to the user's cache folder and mapped, so that the next run on it starts at once.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from charlm.config import CorpusConfig
from charlm.errors import CharlmError, ConfigError
from charlm.text import cache, read
from charlm.text.clean import Cleaner
from charlm.text.encode import Encoded, Encoder, Split, memory
from charlm.text.vocab import Vocab

_PASSAGE = 64  # characters
_SEARCHED = 2**20  # characters copied at once
IN_MEMORY = 2**26  # bytes of ids; a text of Latin letters has about as many


@dataclass(frozen=True)
class Corpus:
    """Encoded splits: contiguous stretches of the clean text, in its order.

    train, val, test: ids of shape (N,), in the smallest integer type that holds the vocabulary.
    unseen, fingerprint: as in `Encoded`.
    files: those that the text was read from. notes: lines for the user about them.
    release: frees the memory that reading a mapped text has taken; can be called at any time.
    """

    vocab: Vocab
    train: Tensor
    val: Tensor
    test: Tensor
    unseen: int
    fingerprint: str
    files: tuple[Path, ...]
    release: Callable[[], None] = lambda: None
    notes: tuple[str, ...] = ()

    @classmethod
    def load(
        cls,
        config: CorpusConfig,
        on_read: Callable[[int, int], object] = lambda count, total: None,
        known: Vocab | None = None,
    ) -> "Corpus":
        """Read, clean, split and encode the text that `config` names.

        on_read: called with the number of bytes just read and the number of bytes of all files.
        known: characters with which the vocabulary begins, whether they occur or not; with
            ``corpus.vocabulary``, the vocabulary that it names (see `read_vocabulary`).
        Raises `CharlmError` for files that cannot be read, for an empty text, for a long text that cannot be
        written to the cache, and as `Encoder.finish` does.
        """
        # First the val and test texts, so that those files are always read, whatever max_chars is.
        found = [read.find_files(source or []) for source in (config.val, config.test, config.source)]
        paths, left = tuple(path for each in found for path in each.files), sum(each.left for each in found)
        notes: tuple[str, ...] = ()
        if left:
            notes = (f"{left} other files in the folder are not read: hidden, or no text",)
        files = [read.TextFile(path, lambda count: on_read(count, total), config.encoding) for path in paths]
        total = sum(file.stat.st_size for file in files)
        if config.encoding == "bytes":
            known = known or Vocab("".join(map(chr, range(256))))  # no byte is ever unknown
        fixed = config.vocabulary is not None
        if fixed and not known:
            raise ConfigError("corpus.vocabulary needs the argument known, which read_vocabulary returns")
        settings = config.model_dump(mode="json", exclude={"source", "val", "test", "vocabulary"})
        counts = [len(each.files) for each in found]
        settings |= {"known": known and (known.characters, known.unknown), "fixed": fixed, "own": counts[:2]}
        long = total > IN_MEMORY or any(file.compressed for file in files)
        if long and (mapped := cache.find(files, settings)):
            notes += _repeated(paths, [digest for digest, _ in mapped.files])
            return cls._of(mapped.encoded, mapped.ids, paths, mapped.release, notes)
        encoder = Encoder(IN_MEMORY, cache.folder)
        try:
            whole, own = config.model_copy(update={"start": None, "max_chars": None}), [0, 0]
            for k, first in enumerate((0, counts[0])):
                if counts[k]:
                    before = encoder.length
                    _encode(files[first : first + counts[k]], whole, encoder)
                    own[k] = encoder.length - before
            used = sum(counts[:2]) + _encode(files[sum(counts[:2]) :], config, encoder)
            notes += _repeated(paths, [file.sha256.hexdigest() for file in files[:used]])
            train, val, test = config.split
            train, val = (train + val, 0.0) if own[0] else (train, val)
            train, test = (train + test, 0.0) if own[1] else (train, test)
            encoded = encoder.finish((train, val, test), known, (own[0], own[1]), config.min_count, fixed)
            if not encoder.on_disk:
                return cls._of(encoded, encoded.in_memory(), paths, notes=notes)
            mapped = cache.write(encoded, files, used, settings)
            return cls._of(mapped.encoded, mapped.ids, paths, mapped.release, notes)
        finally:
            encoder.close()

    @classmethod
    def from_text(cls, content: str, split: Split = (0.9, 0.05, 0.05)) -> "Corpus":
        """Split and encode a clean text; `split` is the fractions of train, val and test."""
        encoder = Encoder()
        encoder.add(content)
        encoded = encoder.finish(split)
        return cls._of(encoded, encoded.in_memory(), ())

    @classmethod
    def _of(
        cls,
        encoded: Encoded,
        ids: Tensor,
        files: tuple[Path, ...],
        release: Callable[[], None] = lambda: None,
        notes: tuple[str, ...] = (),
    ) -> "Corpus":
        parts = torch.split(ids, [encoded.sizes[k] for k in encoded.order])
        train, val, test = (parts[encoded.order.index(k)] for k in range(3))
        if _copied(val, train):
            notes += ("most of val stands in train too: its loss is not that of a new text",)
        return cls(
            encoded.vocab, train, val, test, encoded.unseen, encoded.fingerprint, files, release, notes
        )


def _repeated(paths: Sequence[Path], digests: list[str]) -> tuple[str, ...]:
    """A note for each file with the content of an earlier one."""
    first: dict[str, Path] = {}
    pairs = [(path, first.setdefault(digest, path)) for path, digest in zip(paths, digests, strict=False)]
    return tuple(f"{path} has the same content as {other}" for path, other in pairs if path is not other)


def _copied(val: Tensor, train: Tensor) -> bool:
    """Return whether at least half of 16 passages of `val` occur in `train`.

    If `train` has more than 16 million characters, it is not searched, and the result is False.
    """
    if len(val) < 16 * _PASSAGE or len(train) > 16 * _SEARCHED:
        return False
    starts = range(0, len(val) - _PASSAGE, len(val) // 16)
    passages = [bytes(memory(val[start : start + _PASSAGE])) for start in starts]
    found = set[int]()
    for start in range(0, len(train), _SEARCHED):
        text = bytes(memory(train[start : start + _SEARCHED + _PASSAGE]))
        found |= {k for k, passage in enumerate(passages) if passage in text}
    return 2 * len(found) >= len(passages)


def _encode(files: list[read.TextFile], config: CorpusConfig, encoder: Encoder) -> int:
    """Encode the text of `files`, one after the other, each with a line end after its last line.

    Returns the number of files read. Raises `CharlmError` for an empty text.
    """
    cleaner = Cleaner(**config.cleaning, start=config.start, max_chars=config.max_chars)
    used = 0
    while used < len(files) and not cleaner.full:
        before, take_back = copy(cleaner), encoder.mark()
        ended = True  # whether the last line has a line end; true for an empty file
        for piece in read.strip_pieces(files[used].pieces):
            if piece is None:
                cleaner, ended = copy(before), True
                take_back()
            elif piece:
                encoder.add(cleaner.feed(piece))
                ended = piece.endswith("\n")
        if not ended and config.encoding != "bytes":
            encoder.add(cleaner.feed("\n"))
        used += 1
    encoder.add(cleaner.finish())
    names = ", ".join(str(file.path) for file in files[:4])
    if cleaner.missed:
        raise CharlmError(
            f"corpus.start is {config.start!r}, which does not occur in {names}; take other words, or null"
        )
    if encoder.blank:
        raise CharlmError(f"the corpus is empty: there is no text in {names}")
    return used
