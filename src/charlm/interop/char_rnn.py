"""A character model that charlm exported, in plain PyTorch; this module needs only torch."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class CharRNN(nn.Module):
    """Maps ids (B, T) and a state to the logits (B, T, V) of the next characters and the next state."""

    def __init__(self, cell: str, vocab_size: int, embedding_size: int, hidden_size: int, **options: Any):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding_size)
        self.recurrent = getattr(nn, cell)(embedding_size, hidden_size, batch_first=True, **options)
        self.head = nn.Linear(hidden_size, vocab_size)

    def forward(self, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Compute the logits and the state after `ids`, from `state` or from zeros."""
        y, state = self.recurrent(self.embedding(ids), state)
        return self.head(y), state


def load(path: str) -> tuple[CharRNN, list[str]]:
    """Load a model from NAME.pt, and its characters in the order of their ids from NAME.json beside it."""
    description = json.loads(Path(path).with_suffix(".json").read_text(encoding="utf-8"))
    model = CharRNN(**description["model"])
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval(), description["vocab"]
