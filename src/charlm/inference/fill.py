"""Filling in blanks: what a model of ``direction: both`` predicts between given characters.

K candidates, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from charlm.errors import CharlmError
from charlm.nn.model import CharLM, FillLM, evaluating
from charlm.text.vocab import Unknown, Vocab


def fill(
    model: CharLM, vocab: Vocab, parts: list[str], best: int = 5, beam: int = 20, unknown: Unknown = "error"
) -> list[tuple[list[str], float]]:
    """Return the most probable characters for the blanks between `parts`, with probabilities, best first.

    The probabilities for a single blank are the model's distribution over the vocabulary, whose unknown class
    is not an answer. Several blanks are filled by a beam search from left to right that leaves out the blanks
    not yet filled; the candidates found are then scored whole, each blank given all other characters, and the
    probabilities are relative to these candidates.

    parts: the text, cleaned and split at its blanks.
    Raises `CharlmError` for a model of another direction and for a text without blanks.
    """
    if not isinstance(model, FillLM):
        raise CharlmError(
            f"this model has model.direction: {model.config.direction} and cannot fill in blanks; "
            "train one with model.direction: both"
        )
    if len(parts) < 2:
        raise CharlmError("the text has no blank to fill in")
    pieces = [vocab.encode(part, unknown).long() for part in parts]
    with evaluating(model):
        found, scores = _search(model, vocab.writable, pieces, max(beam, best))
        if len(pieces) > 2:
            scores = _rescore(model, pieces, found).log_softmax(0)
    order = scores.argsort(descending=True)[:best]
    return [(list(vocab.decode(found[k])), float(scores[k].exp())) for k in order]


def joined(parts: list[str], characters: list[str]) -> str:
    """Return the text of `parts` with the blanks between them filled by `characters`."""
    return parts[0] + "".join(map(str.__add__, characters, parts[1:]))


def _search(model: FillLM, writable: Tensor, pieces: list[Tensor], beam: int) -> tuple[Tensor, Tensor]:
    """Return the ids (K, blanks) of up to `beam` candidates and their scores (K,), by a beam search.

    writable: the ids (V,) of which a candidate consists.
    """
    found = torch.zeros(1, 0, dtype=torch.long, device="cpu")  # (K, blanks filled)
    scores = torch.zeros(1, dtype=torch.float32, device="cpu")
    for i in range(1, len(pieces)):
        rest = torch.cat(pieces[i:])
        texts = _joined([*pieces[:i], rest], F.pad(found, (0, 1))).to(model.head.weight.device)
        logits, _ = model(texts, model.initial_state(len(texts)))
        at = texts.shape[1] - len(rest) - 1
        log_p = logits[:, at].float().cpu().log_softmax(-1).index_select(1, writable)
        candidates = scores[:, None] + log_p  # (K, V)
        scores, places = candidates.flatten().topk(min(beam, candidates.numel()))
        V = candidates.shape[1]
        found = torch.cat([found[places // V], writable[places % V][:, None]], 1)
    return found, scores


def _joined(pieces: list[Tensor], found: Tensor) -> Tensor:
    """Return the pieces with the characters of each row of `found` (K, blanks) between them: (K, N)."""
    columns = [pieces[0].expand(len(found), -1)]
    for blank, piece in zip(torch.split(found, 1, 1), pieces[1:], strict=True):
        columns += [blank, piece.expand(len(found), -1)]
    return torch.cat(columns, 1)


def _rescore(model: FillLM, pieces: list[Tensor], found: Tensor) -> Tensor:
    """Return for each row of `found` (K, blanks) the sum over its blanks of ln p(blank | all else): (K,)."""
    texts = _joined(pieces, found).to(model.head.weight.device)
    lengths = torch.tensor([len(piece) for piece in pieces[:-1]], device="cpu")
    places = lengths.cumsum(0) + torch.arange(len(lengths), device="cpu")
    logits, _ = model(texts, model.initial_state(len(texts)))
    log_p = logits[:, places].float().cpu().log_softmax(-1)  # (K, blanks, V)
    return torch.gather(log_p, 2, found[..., None]).sum((1, 2))
