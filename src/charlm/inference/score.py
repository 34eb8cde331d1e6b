"""The surprisal of each character, word or line of a text, in bits, read in pieces of bounded size."""

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

# The end of each unit. A word includes the space that follows it: it ends where the next word begins.
_ENDS = {
    "char": re.compile(r".", re.S),
    "word": re.compile(r"(?<=\s)(?=\S)"),
    "line": re.compile(r"\n"),
}
_Nats = list[float | None]  # of each character; None for the character without a prediction


@dataclass(frozen=True)
class Unit:
    """A part of the text; the units of a text joined together are the text.

    start: its position in the clean text, from 0.
    characters: the number of its characters with a prediction: all but the first of the text, or the last for
    a
        model of ``direction: backward``.
    bits: the sum of their -log2 p; None if there are none.
    """

    start: int
    characters: int
    bits: float | None
    text: str


@dataclass
class Tally:
    """Sums over the text read so far: characters scored, their bits, and unknown characters."""

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
    """Yield the units of a clean text, read in `pieces`, as soon as they are complete.

    A model of ``direction: backward`` or ``both`` reads the whole text before the first unit.
    tally: updated while the text is read.
    Raises `UnknownCharactersError` at the first unknown character, as `Vocab.encode` does.
    """
    tally = Tally() if tally is None else tally
    blocks = encoded(vocab, pieces, unknown, name, tally)
    if model.config.direction == "forward":
        return _units(_streamed(model, vocab, blocks), kind, tally)
    return _units(_whole(model, vocab, blocks), kind, tally)


def most_surprising(
    units: Iterable[tuple[str, Unit]], count: int, each_character: bool
) -> list[tuple[str, Unit]]:
    """Return the `count` named units with the most bits (or bits per character), sorted."""
    return heapq.nlargest(count, units, key=lambda named: _surprise(named[1], each_character))


def _surprise(unit: Unit, each_character: bool) -> float:
    if unit.bits is None:
        return -math.inf
    return unit.bits / unit.characters if each_character else unit.bits


def encoded(
    vocab: Vocab, pieces: Iterable[str], unknown: Unknown, name: str, tally: Tally
) -> Iterator[Tensor]:
    """Yield the ids (n,) of each of `pieces` of a clean text; raises as `score` does."""
    begin = 0
    for piece in pieces:
        yield encode_piece(vocab, piece, begin, unknown, name, tally)
        begin += len(piece)


def encode_piece(vocab: Vocab, piece: str, begin: int, unknown: Unknown, name: str, tally: Tally) -> Tensor:
    """Return the ids (n,) of the piece at `begin` of a text; count its unknown characters in `tally`."""
    ids = vocab.encode(piece, unknown, name, begin=begin)
    tally.unknown += 0 if unknown == "error" else vocab.count_unknown(piece)
    return ids


def _streamed(model: CharLM, vocab: Vocab, blocks: Iterable[Tensor]) -> Iterator[tuple[str, _Nats]]:
    """Yield the text and the nats of each block that is not empty."""
    ids: list[Tensor] = []

    def remember() -> Iterator[Tensor]:
        for block in blocks:
            if len(block):
                ids.append(block)
                yield block

    for k, nats in enumerate(surprisals(model, remember())):
        yield vocab.decode(ids.pop()), [None, *nats[1:].tolist()] if k == 0 else nats.tolist()


def _whole(model: CharLM, vocab: Vocab, blocks: Iterable[Tensor]) -> Iterator[tuple[str, _Nats]]:
    """Yield the whole text and its nats."""
    ids = torch.cat([torch.empty(0, dtype=torch.int32, device="cpu"), *blocks])
    nats: _Nats = text_surprisals(model, ids).tolist()
    if model.config.direction == "backward" and nats:
        nats[-1] = None
    yield vocab.decode(ids), nats


def _units(scored: Iterable[tuple[str, _Nats]], kind: Kind, tally: Tally) -> Iterator[Unit]:
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
