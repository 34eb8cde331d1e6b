"""Filling in blanks: the characters that a model of ``direction: both`` puts between those that are there."""

import torch
from torch import Tensor

from charlm.errors import CharlmError
from charlm.nn.model import CharLM, FillLM
from charlm.text.vocab import Unknown, Vocab


@torch.inference_mode()
def fill(
    model: CharLM, vocab: Vocab, parts: list[str], best: int = 5, beam: int = 20, unknown: Unknown = "error"
) -> list[tuple[list[str], float]]:
    """The likeliest characters for the blanks between `parts`, best first, with their probabilities.

    A single blank has the model's distribution over the vocabulary. Several are searched for by a beam from
    left to right, the blanks still open left out of what is read; what the beam has found is then scored
    again whole, each blank given all else, and the probabilities are shares among it.

    parts: the text, cleaned, cut at its blanks.
    Raises `CharlmError` for a model that does not fill in and a text without blanks.
    """
    if not isinstance(model, FillLM):
        raise CharlmError(
            "this model predicts in one direction; to fill in, train one with model.direction: both"
        )
    if len(parts) < 2:
        raise CharlmError("there is no blank in the text to fill in")
    device = model.head.weight.device
    pieces = [vocab.encode(part, unknown).long() for part in parts]
    found = torch.zeros(1, 0, dtype=torch.long, device="cpu")  # (K, blanks so far)
    scores = torch.zeros(1, dtype=torch.float32, device="cpu")  # (K,)
    for i in range(1, len(pieces)):
        rest = torch.cat(pieces[i:])
        rows = [torch.cat([_join(pieces[:i], row), row.new_zeros(1), rest]) for row in found]
        at = len(rows[0]) - len(rest) - 1
        logits, _ = model(torch.stack(rows).to(device), model.initial_state(len(rows)))
        candidates = scores[:, None] + logits[:, at].float().cpu().log_softmax(-1)  # (K, V)
        scores, places = candidates.flatten().topk(min(max(beam, best), candidates.numel()))
        found = torch.cat([found[places // len(vocab)], (places % len(vocab))[:, None]], 1)
    if len(pieces) > 2:
        scores = _rescore(model, pieces, found)
        scores = scores.log_softmax(0)
    order = scores.argsort(descending=True)[:best]
    return [(list(vocab.decode(found[k])), float(scores[k].exp())) for k in order]


def joined(parts: list[str], characters: list[str]) -> str:
    """The text of `parts` with one of `characters` in each blank between them."""
    return parts[0] + "".join(map(str.__add__, characters, parts[1:]))


def _join(pieces: list[Tensor], row: Tensor) -> Tensor:
    """The pieces with the characters of `row` between them."""
    joined = [pieces[0]]
    for character, piece in zip(row, pieces[1:], strict=True):
        joined += [character[None], piece]
    return torch.cat(joined)


def _rescore(model: FillLM, pieces: list[Tensor], found: Tensor) -> Tensor:
    """For each row of `found` (K, blanks) the sum over its blanks of ln p(blank | all else): (K,)."""
    texts = torch.stack([_join(pieces, row) for row in found]).to(model.head.weight.device)
    lengths = torch.tensor([len(piece) for piece in pieces[:-1]], device="cpu")
    places = lengths.cumsum(0) + torch.arange(len(lengths), device="cpu")
    logits, _ = model(texts, model.initial_state(len(texts)))
    log_p = logits[:, places].float().cpu().log_softmax(-1)  # (K, blanks, V)
    return torch.gather(log_p, 2, found[..., None]).sum((1, 2))
