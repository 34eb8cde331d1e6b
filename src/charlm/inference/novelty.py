"""What of a text stands word for word in another, as what a model wrote in what it learned from.

The stretches of a size are hashed, all at once, and looked up among the other text's; what is found is
compared character for character, so that what is said to stand there does.

n characters of the text, N of the known one.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from charlm.config import Config
from charlm.errors import CharlmError
from charlm.storage.header import read_header
from charlm.text.corpus import Corpus

SIZES = (8, 16, 32)  # characters of a stretch
_PIECE = 2**20  # characters of the known text that are looked at at once
_BITS = 20  # the size of the table that says of most stretches at once that they are not in the text
_ODD = 0x5851F42D4C957F2D  # a multiplier without a pattern; int64 wraps around


@dataclass(frozen=True)
class Novelty:
    """What of a text of so many `characters` stands in another.

    longest, start: the longest stretch that does, and where in the text it begins.
    shares: for each of `SIZES`, the share of the stretches of so many characters; absent where it has none.
    """

    characters: int
    longest: int
    start: int
    shares: dict[int, float]


def novelty(text: Tensor, known: Tensor) -> Novelty:
    """What of `text` (n,) stands in `known` (N,): ids of one vocabulary.

    Memory is bounded by a piece of `known` and what of it stands in `text`.
    """
    text = text.long().cpu()
    shares, size, found, regions = {}, 0, torch.empty(0), known
    for size_ in (*SIZES, *range(SIZES[0] - 1, 0, -1)):
        if size_ < SIZES[0] and size:
            break  # shorter ones are of interest only where nothing longer stands there
        if len(text) < size_:
            continue
        # A longer stretch can only stand where a shorter one does.
        there, parts = _standing(text, regions, size_)
        if size_ in SIZES:
            shares[size_] = float(there.double().mean())
        if there.any():
            size, found, regions = size_, there, parts
    if not size:
        return Novelty(len(text), 0, 0, shares)
    low, high = size, len(text)  # between them the longest is: by halves
    while low < high:
        middle = min((low + high + 1) // 2, low * 2)
        there, parts = _standing(text, regions, middle)
        if there.any():
            low, found, regions = middle, there, parts
        else:
            high = middle - 1
    return Novelty(len(text), low, int(found.long().argmax()), shares)


def training_text(path: Path, config: Config, vocab: str, source: str | None = None) -> Corpus:
    """The corpus that the model file at `path` was trained on.

    source: where its text is now, if not where `config` has it.
    Raises `CharlmError` for a text that is not found, and for another text: its fingerprint is not the one in
    the model's header, or its vocabulary, which is in the order of the characters' counts, is another.
    """
    corpus_config = config.corpus.model_copy(update={"source": source} if source else {})
    try:
        corpus = Corpus.load(corpus_config)
    except CharlmError as error:
        raise CharlmError(
            f"this takes the text that the model was trained on: {error}; say where it is now: --corpus PATH"
        ) from None
    if corpus.vocab.characters != vocab or read_header(path).fingerprint not in ("", corpus.fingerprint):
        raise CharlmError(
            f"{corpus_config.source} is not, or no longer, the text that {path} was trained on; "
            "say where that is: --corpus PATH"
        )
    return corpus


def _standing(text: Tensor, known: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Which stretches of `size` of `text` stand in `known`, (n - size + 1,), and the parts that do.

    The parts are one after the other, with -1 between them: no stretch crosses from one to the next.
    """
    hashes = _hashes(text, size)
    distinct, which = torch.unique(hashes, return_inverse=True)
    first = torch.full_like(distinct, len(text)).scatter_reduce_(0, which, torch.arange(len(which)), "amin")
    table = torch.zeros(2**_BITS, dtype=torch.bool)
    table[distinct >> (64 - _BITS)] = True  # a negative index counts from the end: each its own place
    seen, places = torch.zeros(len(distinct), dtype=torch.bool), [torch.empty(0, dtype=torch.int64)]
    for begin in range(0, len(known) - size + 1, _PIECE):
        piece = known[begin : begin + _PIECE + size - 1].long()
        hashed = _hashes(piece, size)
        at = table.index_select(0, (hashed >> (64 - _BITS)) & (2**_BITS - 1)).nonzero()[:, 0]
        place = torch.searchsorted(distinct, hashed[at]).clamp_(max=len(distinct) - 1)
        at, place = at[distinct[place] == hashed[at]], place[distinct[place] == hashed[at]]
        same = _equal(piece, at, text, first[place], size)
        at, place = at[same], place[same]
        seen[place] = True
        places.append(begin + at)
    return seen[which], _parts(known, torch.cat(places), size)


def _hashes(ids: Tensor, size: int) -> Tensor:
    """A hash of each stretch of `size` of `ids` (M,), int64 (M - size + 1,): from those of half its size."""
    if size == 1:
        mixed = (ids + 2) * _ODD
        return (mixed ^ (mixed >> 29)) * _ODD
    half = size // 2
    short = _hashes(ids, half)
    count = len(ids) - size + 1
    pair = short[:count] * (_ODD + 2 * size) + short[half : half + count]
    if size % 2:
        pair = pair * (_ODD - 2) + _hashes(ids[size - 1 :], 1)
    return pair ^ (pair >> 31)


def _equal(known: Tensor, at: Tensor, text: Tensor, begin: Tensor, size: int) -> Tensor:
    """Whether known[at : at + size] is text[begin : begin + size], for each `at` (K,) and `begin` (K,)."""
    same = torch.ones(len(at), dtype=torch.bool)
    for step in range(size):
        same &= known[at + step] == text[begin + step]
    return same


def _parts(known: Tensor, at: Tensor, size: int) -> Tensor:
    """What of `known` the stretches of `size` that begin at `at` cover, each part with a -1 behind it."""
    if not len(at):
        return torch.empty(0, dtype=torch.int32)
    begins = torch.ones(len(at), dtype=torch.bool)
    begins[1:] = at.diff() > 1  # stretches that begin side by side may be one longer one
    runs = begins.nonzero()[:, 0]
    lengths = torch.cat([runs[1:], torch.tensor([len(at)])]) - runs + size - 1
    ends = (lengths + 1).cumsum(0)
    starts = ends - lengths - 1
    where = torch.arange(int(ends[-1])) - starts.repeat_interleave(lengths + 1)
    source = at[runs].repeat_interleave(lengths + 1) + where
    covered = known[source.clamp_(max=len(known) - 1)].int()
    covered[ends - 1] = -1
    return covered
