"""The surprisal of each character, word or line of a text, in bits, in memory that does not grow with it."""

import heapq
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from charlm.inference.evaluate import surprisals, text_surprisals
from charlm.nn.model import CharLM
from charlm.text.vocab import Unknown, Vocab

Kind = Literal["char", "word", "line"]

# Where one unit ends: a word with the space that follows it, as it is the next that tells that it is over.
_ENDS = {
    "char": re.compile(r".", re.S),
    "word": re.compile(r"(?<=\s)(?=\S)"),
    "line": re.compile(r"\n"),
}
_Nats = list[float | None]  # of each character; None for the one that has no prediction


@dataclass(frozen=True)
class Unit:
    """A stretch of the text, the same with all others joined together.

    start: where in the clean text it begins, from 0.
    characters: how many of it have a prediction: all but the text's first, or its last read backward.
    bits: the sum of their -log2 p; None where there is none.
    """

    start: int
    characters: int
    bits: float | None
    text: str


@dataclass
class Tally:
    """What came of a text on the way: characters that were scored, bits, characters that are unknown."""

    characters: int = 0
    bits: float = 0.0
    unknown: int = 0


def score(
    model: CharLM,
    vocab: Vocab,
    pieces: Iterable[str],
    kind: Kind = "char",
    unknown: Unknown = "error",
    name: str = "the text",
    tally: Tally | None = None,
) -> Iterator[Unit]:
    """Yield the units of a clean text that comes in `pieces`, as they end.

    A model that reads from the end, or from both sides, needs all of the text first.
    tally: is kept up to date.
    Raises `UnknownCharactersError` as `Vocab.encode` does, on the way.
    """
    tally = Tally() if tally is None else tally
    blocks = encoded(vocab, pieces, unknown, name, tally)
    if model.config.direction == "forward":
        return _units(_streamed(model, vocab, blocks), kind, tally)
    return _units(_whole(model, vocab, blocks), kind, tally)


def most_surprising(
    units: Iterable[tuple[str, Unit]], count: int, each_character: bool
) -> list[tuple[str, Unit]]:
    """The `count` named units of most bits, or of most bits a character, the most surprising first."""
    return heapq.nlargest(count, units, key=lambda named: _surprise(named[1], each_character))


def _surprise(unit: Unit, each_character: bool) -> float:
    if unit.bits is None:
        return -math.inf
    return unit.bits / unit.characters if each_character else unit.bits


def encoded(
    vocab: Vocab, pieces: Iterable[str], unknown: Unknown, name: str, tally: Tally
) -> Iterator[Tensor]:
    """The ids (n,) of each of `pieces` of a clean text; raises as `score` does. tally: counts the unknown."""
    begin = 0
    for piece in pieces:
        ids = vocab.encode(piece, unknown, name, begin=begin)
        tally.unknown += 0 if unknown == "error" else vocab.count_unknown(piece)
        begin += len(piece)
        yield ids


def _streamed(model: CharLM, vocab: Vocab, blocks: Iterable[Tensor]) -> Iterator[tuple[str, _Nats]]:
    """Each block's text and its nats."""
    texts: list[str] = []

    def noted() -> Iterator[Tensor]:
        for block in blocks:
            if len(block):
                texts.append(vocab.decode(block))
                yield block

    for k, nats in enumerate(surprisals(model, noted())):
        yield texts.pop(), [None, *nats[1:].tolist()] if k == 0 else nats.tolist()


def _whole(model: CharLM, vocab: Vocab, blocks: Iterable[Tensor]) -> Iterator[tuple[str, _Nats]]:
    """The whole text and its nats."""
    kept = list(blocks)
    ids = torch.cat(kept) if kept else torch.empty(0, dtype=torch.int32)
    nats: _Nats = text_surprisals(model, ids).tolist()
    if model.config.direction == "backward" and nats:
        nats[-1] = None
    yield vocab.decode(ids), nats


def _units(scored: Iterable[tuple[str, _Nats]], kind: Kind, tally: Tally) -> Iterator[Unit]:
    """Cut text and its nats into units, each given once it is known to be over."""
    held, held_nats, start, last = list[str](), list[float | None](), 0, ""
    for more, nats in scored:
        begin = 0
        for found in _ENDS[kind].finditer(last + more, len(last)):
            end = found.end() - len(last)
            held.append(more[begin:end])
            held_nats += nats[begin:end]
            begin = end
            # The space before the first word belongs to it.
            if kind != "word" or start or any(part.strip() for part in held):
                unit = _unit("".join(held), held_nats, start, tally)
                yield unit
                start += len(unit.text)
                held, held_nats = [], []
        held.append(more[begin:])
        held_nats += nats[begin:]
        last = more[-1:] or last
    if held_nats:
        yield _unit("".join(held), held_nats, start, tally)


def _unit(text: str, nats: _Nats, start: int, tally: Tally) -> Unit:
    predicted = [each for each in nats if each is not None]
    bits = math.fsum(predicted) / math.log(2) if predicted else None
    tally.characters += len(predicted)
    tally.bits += bits or 0.0
    return Unit(start, len(predicted), bits, text)
