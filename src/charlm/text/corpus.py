"""`Corpus`: a text as encoded train, val and test splits, with the vocabulary of the train split.

A text is read, cleaned, counted and encoded in one pass, piece by piece. A short text is kept in memory. A
long one is written to the user's cache folder and mapped, so that the next run on it starts at once.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from charlm.config import CorpusConfig
from charlm.errors import CharlmError
from charlm.text import cache, read
from charlm.text.clean import Cleaner
from charlm.text.encode import Encoded, Encoder, Split
from charlm.text.vocab import Vocab

IN_MEMORY = 2**26  # bytes of ids; a text of Latin letters has about as many


@dataclass(frozen=True)
class Corpus:
    """Encoded splits: contiguous stretches of the clean text, in its order.

    train, val, test: ids of shape (N,), in the smallest integer type that holds the vocabulary.
    unseen, fingerprint: as in `Encoded`.
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

    @classmethod
    def load(
        cls, config: CorpusConfig, on_read: Callable[[int, int], object] = lambda count, total: None
    ) -> "Corpus":
        """Read, clean, split and encode the text that `config` names.

        on_read: called with the number of bytes just read and the number of bytes of all files.
        Raises `CharlmError` for files that cannot be read, for an empty text, and for a long text that cannot
        be written to the cache.
        """
        paths = tuple(read.find_files(config.source))
        files = [read.TextFile(path, lambda count: on_read(count, total)) for path in paths]
        total = sum(file.stat.st_size for file in files)
        settings = config.model_dump(mode="json", exclude={"source"})
        long = total > IN_MEMORY or any(file.compressed for file in files)
        if long and (mapped := cache.find(files, settings)):
            return cls._of(mapped.encoded, mapped.ids, paths, mapped.release)
        encoder = Encoder(IN_MEMORY, cache.folder)
        try:
            used = _encode(files, config, encoder)
            encoded = encoder.finish(config.split)
            if not encoder.on_disk:
                return cls._of(encoded, encoded.in_memory(), paths)
            mapped = cache.write(encoded, files, used, settings)
            return cls._of(mapped.encoded, mapped.ids, paths, mapped.release)
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
    ) -> "Corpus":
        train, val, test = torch.split(ids, list(encoded.sizes))
        return cls(encoded.vocab, train, val, test, encoded.unseen, encoded.fingerprint, files, release)


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
        if not ended:
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
