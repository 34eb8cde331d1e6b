"""How much of a text occurs word for word in another: of a written text in the training text.

The passages of one size are hashed, all at once, and looked up in the other text. Each match of hashes is
compared character by character, so that a collision is never reported.
n characters of the text, N of the known text.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from charlm.config import Config
from charlm.errors import CharlmError
from charlm.storage.header import read_header
from charlm.text.corpus import Corpus
from charlm.text.vocab import Vocab

SIZES = (8, 16, 32)  # characters of a passage
_PIECE = 2**20  # characters of the known text searched at once
_BITS = 20  # log2 of the size of the table that excludes most passages of the known text at once
_ODD = 0x5851F42D4C957F2D  # a multiplier with irregular bits; int64 wraps around


@dataclass(frozen=True)
class Novelty:
    """How much of a text of `characters` characters occurs in another.

    longest, start: the length of the longest passage that does, and its position in the text.
    shares: for each of `SIZES`, the share of the passages of this size; absent if the text is shorter.
    """

    characters: int
    longest: int
    start: int
    shares: dict[int, float]


def novelty(text: Tensor, known: Tensor) -> Novelty:
    """Return how much of `text` (n,) occurs in `known` (N,), ids of the same vocabulary.

    Memory is bounded by a piece of `known` and its passages that occur in `text`.
    """
    text = text.long().cpu()
    shares, size, found, regions = {}, 0, torch.empty(0), known
    for size_ in (*SIZES, *range(SIZES[0] - 1, 0, -1)):
        if size_ < SIZES[0] and size:
            break  # shorter passages matter only if no longer one occurs
        if len(text) < size_:
            continue
        # A longer passage occurs only where a shorter one does.
        matched, covered = _matches(text, regions, size_)
        if size_ in SIZES:
            shares[size_] = float(matched.double().mean())
        if matched.any():
            size, found, regions = size_, matched, covered
    if not size:
        return Novelty(len(text), 0, 0, shares)
    low, high = size, len(text)  # bisect for the longest
    while low < high:
        middle = min((low + high + 1) // 2, low * 2)
        matched, covered = _matches(text, regions, middle)
        if matched.any():
            low, found, regions = middle, matched, covered
        else:
            high = middle - 1
    return Novelty(len(text), low, int(found.long().argmax()), shares)


def training_text(path: Path, config: Config, vocab: Vocab, source: str | None = None) -> Corpus:
    """Return the corpus that the model file at `path` was trained on.

    vocab: of the model. source: the path of its text, if not that in `config`.
    Raises `CharlmError` for a text that is not found, and for another text: its fingerprint is not the one in
    the model's header, or its vocabulary, which is in the order of the characters' counts, is another.
    """
    corpus_config = config.corpus.model_copy(update={"source": source} if source else {})
    given = config.corpus.vocabulary or config.train.init_from  # a vocabulary not in the order of the counts
    try:
        corpus = Corpus.load(corpus_config, known=vocab if given else None, seed=config.train.seed)
    except CharlmError as error:
        raise CharlmError(
            f"this takes the text that the model was trained on: {error}; say where it is now: --corpus PATH"
        ) from None
    same = corpus.vocab.characters == vocab.characters
    if not same or read_header(path).fingerprint not in ("", corpus.fingerprint):
        raise CharlmError(
            f"{corpus_config.source} is not, or no longer, the text that {path} was trained on; "
            "say where that is: --corpus PATH"
        )
    return corpus


def _matches(text: Tensor, known: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return which passages of `size` of `text` occur in `known`, (n - size + 1,), and what they cover of it.

    The regions covered are one after the other with a -1 after each: no passage crosses from one to the next.
    """
    hashes = _hashes(text, size)
    distinct, which = torch.unique(hashes, return_inverse=True)
    first = torch.full_like(distinct, len(text)).scatter_reduce_(0, which, torch.arange(len(which)), "amin")
    table = torch.zeros(2**_BITS, dtype=torch.bool)
    table[distinct >> (64 - _BITS)] = True  # a negative index counts from the end: all indices differ
    seen, places = torch.zeros(len(distinct), dtype=torch.bool), [torch.empty(0, dtype=torch.int64)]
    for begin in range(0, len(known) - size + 1, _PIECE):
        piece = known[begin : begin + _PIECE + size - 1].long()
        hashed = _hashes(piece, size)
        at = table.index_select(0, (hashed >> (64 - _BITS)) & (2**_BITS - 1)).nonzero()[:, 0]
        place = torch.searchsorted(distinct, hashed[at]).clamp_(max=len(distinct) - 1)
        at, place = at[distinct[place] == hashed[at]], place[distinct[place] == hashed[at]]
        starts, same = first[place], torch.ones(len(at), dtype=torch.bool)
        for step in range(size):  # two passages can have the same hash
            same &= piece[at + step] == text[starts + step]
        at, place = at[same], place[same]
        seen[place] = True
        places.append(begin + at)
    return seen[which], _regions(known, torch.cat(places), size)


def _hashes(ids: Tensor, size: int) -> Tensor:
    """Hash each passage of `size` of `ids` (M,), int64 (M - size + 1,), from the hashes of its halves."""
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


def _regions(known: Tensor, at: Tensor, size: int) -> Tensor:
    """Return the regions of `known` covered by passages of `size` that begin at `at`, a -1 after each."""
    if not len(at):
        return torch.empty(0, dtype=torch.int32)
    begins = torch.ones(len(at), dtype=torch.bool)
    begins[1:] = at.diff() > 1  # adjacent passages form one longer region
    runs = begins.nonzero()[:, 0]
    lengths = torch.cat([runs[1:], torch.tensor([len(at)])]) - runs + size - 1
    ends = (lengths + 1).cumsum(0)
    starts = ends - lengths - 1
    where = torch.arange(int(ends[-1])) - starts.repeat_interleave(lengths + 1)
    source = at[runs].repeat_interleave(lengths + 1) + where
    covered = known[source.clamp_(max=len(known) - 1)].int()
    covered[ends - 1] = -1
    return covered
