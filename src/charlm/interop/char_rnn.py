"""A character model that charlm exported, in plain PyTorch: this file needs nothing but torch."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class CharRNN(nn.Module):
    """Ids (B, T) in; logits (B, T, V) for the characters that follow, and the state, out."""

    def __init__(self, cell: str, vocab_size: int, embedding_size: int, hidden_size: int, **options: Any):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding_size)
        self.recurrent = getattr(nn, cell)(embedding_size, hidden_size, batch_first=True, **options)
        self.head = nn.Linear(hidden_size, vocab_size)

    def forward(self, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Read on from `state`; where there is none, from zeros."""
        y, state = self.recurrent(self.embedding(ids), state)
        return self.head(y), state


def load(path: str) -> tuple[CharRNN, list[str]]:
    """The model in `path` and its characters, in the order of their ids; NAME.json lies beside NAME.pt."""
    about = json.loads(Path(path).with_suffix(".json").read_text(encoding="utf-8"))
    model = CharRNN(**about["model"])
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval(), about["vocab"]
