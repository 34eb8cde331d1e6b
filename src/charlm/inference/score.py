"""The surprisal of each character, word or line of a text, in bits, read in pieces of bounded size."""

import heapq
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from charlm.config import CorpusConfig
from charlm.inference.evaluate import record_surprisals, surprisals, text_surprisals
from charlm.nn.model import CharLM
from charlm.text.records import in_records
from charlm.text.vocab import Unknown, Vocab

Kind = Literal["char", "word", "line"]

# The end of each unit. A word includes the space that follows it: it ends where the next word begins.
_ENDS = {"char": re.compile(r".", re.S), "word": re.compile(r"(?<=\s)(?=\S)"), "line": re.compile(r"\n")}
_Nats = list[float | None]  # of each character; None for the character without a prediction
_KNOWN = 2**20  # characters of records whose nats are kept, for the equal records after them


@dataclass(frozen=True)
class Unit:
    """A part of the text; the units of a text joined together are the text.

    start: its position in the clean text, from 0.
    characters: the number of its characters with a prediction: all but the first of the text, or the last for
        a model of ``direction: backward``.
    bits: the sum of their -log2 p; None if there are none.
    """

    start: int
    characters: int
    bits: float | None
    text: str


def score(
    model: CharLM,
    vocab: Vocab,
    pieces: Iterable[str],
    kind: Kind = "char",
    unknown: Unknown = "error",
    name: str = "the text",
) -> Iterator[Unit]:
    """Yield the units of a clean text, read in `pieces`, as soon as they are complete.

    A model of ``direction: backward`` or ``both`` reads the whole text before the first unit.
    Raises `UnknownCharactersError` at the first unknown character, as `Vocab.encode` does.
    """
    texts, read = itertools.tee(pieces)
    blocks = zip(texts, encoded(vocab, read, unknown, name), strict=True)
    # With ``error`` the ids are those of all characters, which are shown as they are, unknown or not.
    shown = ((text if unknown == "error" else vocab.decode(ids), ids) for text, ids in blocks)
    return _units(_scored(model, shown), kind)


def score_records(
    model: CharLM,
    vocab: Vocab,
    pieces: Iterable[str],
    corpus: CorpusConfig,
    kind: Kind = "char",
    unknown: Unknown = "error",
    name: str = "the text",
) -> Iterator[Unit]:
    """Yield the units of the records of a clean text, for a model that was trained on records.

    Each record is read alone, after a boundary; its first character and the boundary after it are scored, and
    equal records have equal bits. The unit ``line`` is a whole record with its boundary, even one that has
    line ends.

    corpus: the configuration of the text that the model was trained on.
    """
    assert corpus.separator and corpus.boundary
    boundary, known, size = vocab.characters.index(corpus.boundary), dict[str, _Nats](), 0
    for found in in_records(itertools.chain(pieces, [corpus.separator]), corpus):
        if size > _KNOWN:
            known, size = {}, 0
        ids = {text: vocab.encode(text, unknown, name, begin=at) for at, text in found if text not in known}
        read = record_surprisals(model, [*ids.values()], boundary)
        known |= {text: nats.tolist() for text, nats in zip(ids, read, strict=True)}
        size += sum(map(len, read))
        for start, text in found:
            shown = vocab.decode(vocab.encode(text, unknown)) if unknown != "error" else text
            record = shown + corpus.boundary, known[text]
            for unit in [_unit(*record, 0)] if kind == "line" else _units([record], kind):
                yield replace(unit, start=start + unit.start)


def most_surprising(
    units: Iterable[tuple[str, Unit]], count: int, each_character: bool
) -> list[tuple[str, Unit]]:
    """Return the `count` named units with the most bits (or bits per character), sorted."""

    def surprise(named: tuple[str, Unit]) -> float:
        unit = named[1]
        if unit.bits is None:
            return -math.inf
        return unit.bits / unit.characters if each_character else unit.bits

    return heapq.nlargest(count, units, key=surprise)


def encoded(vocab: Vocab, pieces: Iterable[str], unknown: Unknown, name: str) -> Iterator[Tensor]:
    """Yield the ids (n,) of each of `pieces` of a clean text; raises as `score` does."""
    begin = 0
    for piece in pieces:
        yield vocab.encode(piece, unknown, name, begin=begin)
        begin += len(piece)


def _scored(model: CharLM, blocks: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, _Nats]]:
    """Yield the text and the nats of each block, a text and its ids, that is not empty, or of all at once."""
    if model.config.direction == "forward":
        shown, read = itertools.tee(block for block in blocks if len(block[1]))
        nats_of_blocks = surprisals(model, (ids for _, ids in read))
        for k, ((text, _), nats) in enumerate(zip(shown, nats_of_blocks, strict=True)):
            yield text, [None, *nats[1:].tolist()] if k == 0 else nats.tolist()
        return
    texts, all_ids = [""], [torch.empty(0, dtype=torch.int32, device="cpu")]
    for text, ids in blocks:
        texts.append(text)
        all_ids.append(ids)
    all_nats: _Nats = text_surprisals(model, torch.cat(all_ids)).tolist()
    if model.config.direction == "backward" and all_nats:
        all_nats[-1] = None
    yield "".join(texts), all_nats


def _units(scored: Iterable[tuple[str, _Nats]], kind: Kind) -> Iterator[Unit]:
    """Split the text and its nats into units; a unit is yielded once its end is known."""
    held, held_nats, start, last = list[str](), list[float | None](), 0, ""
    for more, nats in scored:
        begin = 0
        for found in _ENDS[kind].finditer(last + more, len(last)):
            end = found.end() - len(last)
            held.append(more[begin:end])
            held_nats += nats[begin:end]
            begin = end
            # Space before the first word is part of it.
            if kind != "word" or start or any(part.strip() for part in held):
                unit = _unit("".join(held), held_nats, start)
                yield unit
                start += len(unit.text)
                held, held_nats = [], []
        held.append(more[begin:])
        held_nats += nats[begin:]
        last = more[-1:] or last
    if held_nats:
        yield _unit("".join(held), held_nats, start)


def _unit(text: str, nats: _Nats, start: int) -> Unit:
    predicted = [each for each in nats if each is not None]
    bits = math.fsum(predicted) / math.log(2) if predicted else None
    return Unit(start, len(predicted), bits, text)
