"""Scoring text: every character's surprisal, the state carried from the first to the last.

N characters, B texts side by side, V vocabulary, L layers, H hidden.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from charlm import segments
from charlm.cells import State
from charlm.metrics import Score
from charlm.model import CharLM, FillLM

# Characters a forward pass: bounds the memory; the result does not depend on it but for rounding.
CHUNK = 4096
BLOCK = 2**20  # characters of a long text that are scored at once
_SIDE_BY_SIDE = 64  # texts that are scored in one batch
_LONG = 4 * segments.SHORTEST  # characters from which on a text is scored by itself

OnScored = Callable[[int], object]


def _nobody(count: int) -> None:
    """Whom nothing is told."""


@torch.inference_mode()
def evaluate(model: CharLM, ids: Tensor, on_scored: OnScored = _nobody) -> Score:
    """Score every character of `ids` (N,) after the first exactly once, in float32.

    A model of ``direction: backward`` reads the text from its end: it scores all but the last character. One
    of ``direction: both`` scores every character given all the others: a pseudo-likelihood (Besag 1975),
    which is no likelihood of the text and must not be compared with one.

    on_scored: told of so many more characters, on the way.
    Returns a `Score` over N - 1 characters, or N for ``direction: both``; over none where N < 2.
    """
    if len(ids) < 2:
        return Score()
    if isinstance(model, FillLM):
        return Score(sum(float(part.sum()) for part in _filling(model, ids)), len(ids))
    return _over_blocks(model, _as_read(model, ids), on_scored)


def _over_blocks(model: CharLM, blocks: Iterable[Tensor], on_scored: OnScored) -> Score:
    nats, read = 0.0, 0
    for part in surprisals(model, blocks, on_scored):
        nats += float(part[1:].sum() if read == 0 else part.sum())
        read += len(part)
    return Score(nats, max(read - 1, 0))


@torch.inference_mode()
def evaluate_each(
    model: CharLM, texts: Sequence[Tensor | Iterable[Tensor]], on_scored: OnScored = _nobody
) -> list[Score]:
    """What `evaluate` gives for each of `texts` by itself, short ones side by side.

    texts: ids (N,) of each; for a model of ``direction: forward`` also blocks (n,) of them, as `in_blocks`
    cuts them, which are read when their turn has come, no more than one in memory.
    """
    scores = [Score()] * len(texts)
    short: dict[int, Tensor] = {}
    for k, text in enumerate(texts):
        if not isinstance(text, Tensor):
            scores[k] = _over_blocks(model, text, on_scored)
        elif isinstance(model, FillLM) or not 1 < len(text) < _LONG:
            scores[k] = evaluate(model, text, on_scored)
        else:
            short[k] = text
    order = sorted(short, key=lambda k: -len(short[k]))  # of like lengths in one batch
    with _evaluating(model):
        for first in range(0, len(order), _SIDE_BY_SIDE):
            batch = order[first : first + _SIDE_BY_SIDE]
            nats = _side_by_side(model, [short[k] for k in batch], on_scored)
            for k, sum_of_nats in zip(batch, nats.tolist(), strict=True):
                scores[k] = Score(sum_of_nats, len(short[k]) - 1)
    return scores


def in_blocks(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """The ids in `pieces` (n,) in blocks of `BLOCK`, of which the last may be shorter."""
    held, count = list[Tensor](), 0
    for piece in pieces:
        held.append(piece)
        count += len(piece)
        if count >= BLOCK:
            *whole, rest = torch.split(torch.cat(held), BLOCK)
            yield from whole
            held, count = [rest], len(rest)
    if count:
        yield torch.cat(held)


def _side_by_side(model: CharLM, texts: list[Tensor], on_scored: OnScored) -> Tensor:
    """The nats (B,) of `texts`, the longest first, each from a state of its own; one that ends drops out."""
    if model.config.direction == "backward":
        texts = [ids.flip(0) for ids in texts]
    device, lengths = model.head.weight.device, [len(ids) - 1 for ids in texts]
    state, nats = model.initial_state(len(texts)), torch.zeros(len(texts), dtype=torch.float64, device="cpu")
    steps = max(CHUNK // len(texts), 1)
    for start in range(0, lengths[0], steps):
        rows = sum(length > start for length in lengths)
        windows = torch.full((rows, min(steps, lengths[0] - start) + 1), -1, device="cpu")
        for window, ids in zip(windows, texts, strict=False):
            part = ids[start : start + len(window)]
            window[: len(part)] = part
        windows = windows.to(device)
        logits, state = model(windows[:, :-1].clamp(min=0), tuple(part[:, :rows] for part in state))
        targets = windows[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-1)
        nats[:rows] += losses.view(targets.shape).cpu().double().sum(1)
        on_scored(int((targets >= 0).sum()))
    return nats


@torch.inference_mode()
def surprisals(model: CharLM, blocks: Iterable[Tensor], on_scored: OnScored = _nobody) -> Iterator[Tensor]:
    """Yield -ln p of each character, in nats, float64 (n,), for blocks (n,) of ids of one text, in order.

    The text's first character has no prediction: NaN. No more than a block is in memory.
    model: of one direction; for ``backward`` the blocks come from the text's end, each last to first.
    """
    state, last, fast = model.initial_state(1), None, True
    with _evaluating(model):
        for block in blocks:
            if not len(block):
                yield torch.empty(0, dtype=torch.float64, device="cpu")
                continue
            ids = block.long() if last is None else torch.cat([last, block.long()])
            nats, state, fast = segments.read(model, ids, state, CHUNK, fast, on_scored)
            yield torch.cat([nats.new_full((1,), torch.nan), nats]) if last is None else nats
            last = ids[-1:]


@torch.inference_mode()
def text_surprisals(model: CharLM, ids: Tensor, on_scored: OnScored = _nobody) -> Tensor:
    """-ln p of each character of a whole text `ids` (N,), in nats, float64 (N,), whatever the direction.

    NaN for the one that has no prediction: the first, or for ``direction: backward`` the last.
    """
    if not len(ids):
        return torch.empty(0, dtype=torch.float64, device="cpu")
    if isinstance(model, FillLM):
        return torch.cat(list(_filling(model, ids)))
    nats = torch.cat(list(surprisals(model, _as_read(model, ids), on_scored)))
    return nats.flip(0) if model.config.direction == "backward" else nats


def _as_read(model: CharLM, ids: Tensor) -> Iterator[Tensor]:
    """`ids` (N,) in blocks, in the order in which `model`, of one direction, reads them.

    `ids` may be mapped from the disk: a block of it is copied at a time.
    """
    if model.config.direction == "backward":
        for end in range(len(ids), 0, -BLOCK):
            yield ids[max(end - BLOCK, 0) : end].flip(0)
    else:
        yield from torch.split(ids, BLOCK)


def _filling(model: FillLM, ids: Tensor) -> Iterator[Tensor]:
    """The nats of each character given the text left and right of it, both states carried, chunk by chunk."""
    device = model.head.weight.device
    chunks = torch.split(ids, CHUNK)  # views: the text may be larger than the memory

    def load(chunk: Tensor) -> Tensor:
        return chunk.long().to(device)[None]

    with _evaluating(model):
        zeros = model.initial_state(1)
        half = len(zeros) // 2
        rights = [zeros[half:]]  # the state right of each chunk, from the last chunk to the first
        for chunk in reversed(chunks[1:]):
            rights.append(model.reverse(model.embed(load(chunk).flip(1)), rights[-1])[1])
        left: State = zeros[:half]
        for chunk, right in zip(chunks, reversed(rights), strict=True):
            chunk = load(chunk)
            logits, state = model(chunk, left + right)
            left = state[:half]
            yield F.cross_entropy(logits[0], chunk[0], reduction="none").cpu().double()


@contextmanager
def _evaluating(model: CharLM) -> Iterator[None]:
    """`model` without dropout, and then as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
