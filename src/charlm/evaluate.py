"""Scoring text: the sum of every character's surprisal, the state carried from the first to the last."""

import torch
from torch import Tensor
from torch.nn import functional as F

from charlm.metrics import Score
from charlm.model import CharLM, FillLM

# Characters a forward pass: bounds the memory; the result does not depend on it but for rounding.
CHUNK = 4096


@torch.inference_mode()
def evaluate(model: CharLM, ids: Tensor) -> Score:
    """Score every character of `ids` (N,) after the first exactly once, in float32.

    A model of ``direction: backward`` reads the text from its end: it scores all but the last character. One
    of ``direction: both`` scores every character given all the others: a pseudo-likelihood (Besag 1975),
    which is no likelihood of the text and must not be compared with one.

    Returns a `Score` over N - 1 characters, or N for ``direction: both``; over none where N < 2.
    """
    was_training = model.training
    model.eval()
    try:
        return _evaluate_filling(model, ids) if isinstance(model, FillLM) else _evaluate(model, ids)
    finally:
        model.train(was_training)


def _evaluate(model: CharLM, ids: Tensor) -> Score:
    """Score every character but the first that the model reads, given those before it."""
    backward = model.config.direction == "backward"
    device = model.head.weight.device
    state, nats = model.initial_state(1), 0.0
    for start in range(0, len(ids) - 1, CHUNK):
        end = len(ids) - start
        # `ids` may be mapped from the disk: only a piece of it is copied.
        piece = ids[max(end - CHUNK - 1, 0) : end].flip(0) if backward else ids[start : start + CHUNK + 1]
        window = piece.long().to(device)
        logits, state = model(window[None, :-1], state)
        surprisals = F.cross_entropy(logits[0], window[1:], reduction="none")
        nats += float(surprisals.cpu().double().sum())
    return Score(nats, max(len(ids) - 1, 0))


def _evaluate_filling(model: FillLM, ids: Tensor) -> Score:
    """Score every character given the text left and right of it, both states carried over the whole text."""
    device = model.head.weight.device
    chunks = torch.split(ids, CHUNK)  # views: the text may be larger than the memory

    def load(chunk: Tensor) -> Tensor:
        return chunk.long().to(device)[None]

    zeros = model.initial_state(1)
    half = len(zeros) // 2
    rights = [zeros[half:]]  # the state right of each chunk, from the last chunk to the first
    for chunk in reversed(chunks[1:]):
        rights.append(model.reverse(model.embed(load(chunk).flip(1)), rights[-1])[1])
    left, nats = zeros[:half], 0.0
    for chunk, right in zip(chunks, reversed(rights), strict=True):
        chunk = load(chunk)
        logits, state = model(chunk, left + right)
        left = state[:half]
        nats += float(F.cross_entropy(logits[0], chunk[0], reduction="none").cpu().double().sum())
    return Score(nats, len(ids)) if len(ids) > 1 else Score()
