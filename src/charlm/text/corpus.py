"""`Corpus`: a text as encoded train, val and test splits, with the vocabulary of the train split.

A text is read, cleaned, counted and encoded in one pass, piece by piece. A short text is kept in memory. A
long one is written to the user's cache folder and mapped, so that the next run on it starts at once.

With ``corpus.records`` a text is a list of records, which are shuffled and then split. They are all held in
memory while they are read and encoded.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from charlm.config import CorpusConfig
from charlm.errors import CharlmError, ConfigError
from charlm.text import cache, read
from charlm.text.batches import shuffled
from charlm.text.clean import Cleaner
from charlm.text.encode import Encoded, Encoder, Split, memory
from charlm.text.records import Pieces, in_records
from charlm.text.vocab import Vocab

_PASSAGE = 64  # characters
_SEARCHED = 2**20  # characters copied at once
_BEGINNING = 2**24  # characters in which a marker of Project Gutenberg is searched, though no more are used
_SORTED = 2**17  # characters at the beginning of a text in which lines in order are searched
_SORTED_LINES = 200  # lines in order, at least, that are called so
_RECORDS_AT_ONCE = 2**14  # records that are joined to be encoded
IN_MEMORY = 2**26  # bytes of ids; a text of Latin letters has about as many

_Files = Sequence[read.TextFile]


@dataclass(frozen=True)
class Corpus:
    """Encoded splits: contiguous stretches of the clean text, in its order, or whole records.

    train, val, test: ids of shape (N,), in the smallest integer type that holds the vocabulary.
    boundary: with records, the id of the character that ends each of them; else None.
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
    boundary: int | None = None

    @classmethod
    def load(
        cls,
        config: CorpusConfig,
        on_read: Callable[[int, int], object] = lambda count, total: None,
        known: Vocab | None = None,
        seed: int = 0,
    ) -> "Corpus":
        """Read, clean, split and encode the text that `config` names.

        on_read: called with the number of bytes just read and the number of bytes of all files.
        known: characters with which the vocabulary begins, whether they occur or not; with
            ``corpus.vocabulary``, the vocabulary that it names (see `read_vocabulary`).
        seed: of the order of records; nothing else depends on it.
        Raises `CharlmError` for files that cannot be read, for an empty text, for fewer than two records, for
        a long text that cannot be written to the cache, and as `Encoder.finish` does.
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
        if fixed and known and config.boundary and config.boundary not in known.characters:
            kinds = known.unknown.kinds if known.unknown else 0
            known = Vocab(known.characters + config.boundary, kinds)
        settings = config.model_dump(mode="json", exclude={"source", "val", "test", "vocabulary"})
        counts = [len(each.files) for each in found]
        settings |= {"known": known and (known.characters, known.unknown), "fixed": fixed, "own": counts[:2]}
        settings |= {"seed": seed} if config.records else {}
        long = total > IN_MEMORY or any(file.compressed for file in files)
        if long and (mapped := cache.find(files, settings)):
            notes += _repeated(paths, [digest for digest, _ in mapped.files])
            return cls._of(config, mapped.encoded, mapped.ids, paths, mapped.release, notes)
        encoder = Encoder(IN_MEMORY, cache.folder)
        try:
            groups = files[: counts[0]], files[counts[0] : sum(counts[:2])], files[sum(counts[:2]) :]
            if config.records:
                used, own, split = _add_records(groups, config, encoder, seed)
            else:
                used, own, split = _add_text(groups, config, encoder)
            notes += _repeated(paths, [file.sha256.hexdigest() for file in files[:used]])
            encoded = encoder.finish(split, known, own, config.min_count, fixed)
            if not encoder.on_disk:
                return cls._of(config, encoded, encoded.in_memory(), paths, notes=notes)
            mapped = cache.write(encoded, files, used, settings)
            return cls._of(config, mapped.encoded, mapped.ids, paths, mapped.release, notes)
        finally:
            encoder.close()

    @classmethod
    def from_text(
        cls, content: str, split: Split = (0.9, 0.05, 0.05), records: str | None = None, seed: int = 0
    ) -> "Corpus":
        """Split and encode a clean text.

        split: the fractions of train, val and test. records: ``corpus.records``; seed: as in `load`.
        """
        config, encoder, own = CorpusConfig(split=split, records=records), Encoder(), (0, 0)
        if config.separator:
            parts = in_records([content, config.separator], config)
            records_in = [record for found in parts for _, record in found]
            own, split = _add_split(([], [], records_in), config, encoder, seed)
        else:
            encoder.add(content)
        encoded = encoder.finish(split, own=own)
        return cls._of(config, encoded, encoded.in_memory(), ())

    def texts(self, split: Tensor) -> list[str]:
        """Return the records of `split`, one of `train`, `val` and `test`."""
        assert self.boundary is not None
        return self.vocab.decode(split).split(self.vocab.characters[self.boundary])[:-1]

    @classmethod
    def _of(
        cls,
        config: CorpusConfig,
        encoded: Encoded,
        ids: Tensor,
        files: tuple[Path, ...],
        release: Callable[[], None] = lambda: None,
        notes: tuple[str, ...] = (),
    ) -> "Corpus":
        parts = torch.split(ids, [encoded.sizes[k] for k in encoded.order])
        train, val, test = (parts[encoded.order.index(k)] for k in range(3))
        copied = _copied(val, train)
        if config.boundary and len(train) <= 4 * _SEARCHED:
            known, held_out = (encoded.vocab.decode(part).split(config.boundary) for part in (train, val))
            copied = 2 * len(set(known).intersection(held_out)) > len(set(held_out)) > 1
        if copied:
            notes += ("most of val is in train too: its loss is not that of a new text",)
        beginning = encoded.vocab.decode(train[:_SORTED])
        if config.boundary is None and not config.val and len(val) and _in_order(beginning):
            notes += (
                "the lines are in order, so that val, the end of the text, is unlike train; "
                "if each line is a text, shuffle them with --set records=line",
            )
        boundary = None if config.boundary is None else encoded.vocab.characters.find(config.boundary)
        if boundary == -1:
            raise CharlmError(
                f"the vocabulary lacks {config.boundary!r}, which ends each record; use a smaller "
                "corpus.min_count"
            )
        fingerprint = encoded.fingerprint
        return cls(
            encoded.vocab, train, val, test, encoded.unseen, fingerprint, files, release, notes, boundary
        )


def _repeated(paths: Sequence[Path], digests: list[str]) -> tuple[str, ...]:
    """A note for each file with the content of an earlier one."""
    first: dict[str, Path] = {}
    pairs = [(path, first.setdefault(digest, path)) for path, digest in zip(paths, digests, strict=False)]
    return tuple(f"{path} has the same content as {other}" for path, other in pairs if path is not other)


def _in_order(text: str) -> bool:
    """Return whether over 95% of neighbouring lines are in alphabetical order, equal ones not counted."""
    lines = [line.casefold() for line in text.split("\n")[:-1] if line.strip()]
    pairs = [first < second for first, second in pairwise(lines) if first != second]
    return len(pairs) >= _SORTED_LINES and sum(pairs) > 0.95 * len(pairs)


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


def _add_text(
    groups: tuple[_Files, _Files, _Files], config: CorpusConfig, encoder: Encoder
) -> tuple[int, tuple[int, int], Split]:
    """Add the texts of val, test and source, each of the files in `groups`, to `encoder`.

    Returns the number of files read, and the lengths and the fractions that `Encoder.finish` takes.
    """
    whole, own, used = config.model_copy(update={"start": None, "max_chars": None}), [0, 0], 0
    for k, files in enumerate(groups[:2]):
        if files:
            before = encoder.length
            used += _encode(files, whole, encoder)
            own[k] = encoder.length - before
    used += _encode(groups[2], config, encoder)
    return used, (own[0], own[1]), _without(config.split, own[0] > 0, own[1] > 0)


def _without(split: Split, val: bool, test: bool) -> Split:
    """Return `split` with the parts of val and test, where they have a text, given to train."""
    train = split[0] + (split[1] if val else 0.0) + (split[2] if test else 0.0)
    return train, 0.0 if val else split[1], 0.0 if test else split[2]


def _add_records(
    groups: tuple[_Files, _Files, _Files], config: CorpusConfig, encoder: Encoder, seed: int
) -> tuple[int, tuple[int, int], Split]:
    """Do the same as `_add_text` for texts that are records; raises `CharlmError` for fewer than two."""
    whole, records, used = config.model_copy(update={"start": None, "max_chars": None}), list[list[str]](), 0
    for files, how in zip(groups, (whole, whole, config), strict=True):
        text = Pieces()
        used += _encode(files, how, text) if files else 0
        records.append([record for found in in_records(text.pieces, config) for _, record in found])
    own, split = _add_split((records[0], records[1], records[2]), config, encoder, seed)
    return used, own, split


def _add_split(
    records: tuple[list[str], list[str], list[str]], config: CorpusConfig, encoder: Encoder, seed: int
) -> tuple[tuple[int, int], Split]:
    """Shuffle and split the source's records, and add val, test and train to `encoder`.

    records: of the val and the test text, both possibly empty, and of source.
    Returns the lengths and the fractions that `Encoder.finish` takes: all of the rest is train.
    """
    val, test, source = records
    if len(source) < 2:
        raise CharlmError(
            f"corpus.records={config.records!r} splits the text into {len(source)}, and 2 records or more "
            'are needed; allowed: line, or a delimiter that occurs in it, as "\\n\\n" in double quotes, and '
            "that corpus.keep and corpus.normalize do not change"
        )
    source = [source[k] for k in shuffled(torch.arange(len(source)), len(source), seed, 0).tolist()]
    train_part, val_part, _ = _without(config.split, bool(val), bool(test))
    ends = [round(len(source) * part) for part in (train_part, train_part + val_part)]
    lengths = []
    for part in (val or source[ends[0] : ends[1]], test or source[ends[1] :], source[: ends[0]]):
        before = encoder.length
        for first in range(0, len(part), _RECORDS_AT_ONCE):
            some = part[first : first + _RECORDS_AT_ONCE]
            encoder.add("".join(f"{record}{config.boundary}" for record in some))
        lengths.append(encoder.length - before)
    return (lengths[0], lengths[1]), (1.0, 0.0, 0.0)


def _enough(cleaner: Cleaner, characters: int) -> bool:
    """Return whether the rest of a file, of which so many characters are read, cannot change the text."""
    return cleaner.full and characters > _BEGINNING


def _encode(files: _Files, config: CorpusConfig, encoder: Encoder | Pieces) -> int:
    """Encode the text of `files`, one after the other, each with a line end after its last line.

    With records, the end of a file is the end of a record.

    Returns the number of files read. Raises `CharlmError` for an empty text.
    """
    cleaner = Cleaner(**config.cleaning, start=config.start, max_chars=config.max_chars)
    used = 0
    while used < len(files) and not cleaner.full:
        before, take_back = copy(cleaner), encoder.mark()
        ended = True  # whether the last line has a line end; true for an empty file
        characters = 0
        for piece in read.strip_pieces(files[used].pieces):
            characters += len(piece or "")
            if _enough(cleaner, characters):
                break
            if piece is None:
                cleaner, ended = copy(before), True
                take_back()
            elif piece:
                encoder.add(cleaner.feed(piece))
                ended = piece.endswith("\n")
        if config.separator:
            encoder.add(cleaner.feed(config.separator))
        elif not ended and config.encoding != "bytes":
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
