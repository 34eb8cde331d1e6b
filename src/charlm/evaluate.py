"""Scoring text: the sum of every character's surprisal, the state carried from the first to the last."""

import torch
from torch import Tensor
from torch.nn import functional as F

from charlm.metrics import Score
from charlm.model import CharLM

CHUNK = (
    4096  # characters a forward pass: bounds the memory; the result does not depend on it but for rounding
)


@torch.inference_mode()
def evaluate(model: CharLM, ids: Tensor) -> Score:
    """Score every character of `ids` (N,) after the first exactly once, in float32.

    Returns a `Score` over N - 1 characters; over none where N < 2.
    """
    device = model.head.weight.device
    was_training = model.training
    model.eval()
    try:
        state, nats = model.initial_state(1), 0.0
        for start in range(0, len(ids) - 1, CHUNK):
            window = ids[start : start + CHUNK + 1].long().to(device)
            logits, state = model(window[None, :-1], state)
            surprisals = F.cross_entropy(logits[0], window[1:], reduction="none")
            nats += float(surprisals.cpu().double().sum())
    finally:
        model.train(was_training)
    return Score(nats, max(len(ids) - 1, 0))
