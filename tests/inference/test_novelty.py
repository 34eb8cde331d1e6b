import random

import pytest
import torch

from charlm.config import from_data
from charlm.errors import CharlmError
from charlm.inference import novelty as module
from charlm.inference.novelty import novelty, training_text
from charlm.nn.model import CharLM
from charlm.storage.model_file import save_model
from charlm.text.corpus import Corpus


def ids(text):
    return torch.tensor([ord(char) for char in text], dtype=torch.uint8)


def naive(text, known):
    longest, start = 0, 0
    for begin in range(len(text)):
        while begin + longest < len(text) and text[begin : begin + longest + 1] in known:
            longest, start = longest + 1, begin
    shares = {}
    for size in (8, 16, 32):
        windows = [text[k : k + size] for k in range(len(text) - size + 1)]
        if windows:
            shares[size] = sum(window in known for window in windows) / len(windows)
    return longest, start, shares


@pytest.mark.parametrize("piece", [7, 50, 2**20])
@pytest.mark.parametrize("copied", [0, 5, 9, 31, 32, 33, 100])
def test_novelty_finds_what_a_naive_search_finds(monkeypatch, piece, copied):
    """Also across the ends of pieces, and in a text that repeats itself."""
    monkeypatch.setattr(module, "_PIECE", piece)
    draw = random.Random(copied)
    known = "".join(draw.choices("abcd", k=400)) + "la de la de " * 5
    text = "".join(draw.choices("abcdx", k=60)) + known[120 : 120 + copied] + "y" + "la de " * 3 + "z"
    found = novelty(ids(text), ids(known))
    longest, _, shares = naive(text, known)
    assert (found.longest, found.shares, found.characters) == (longest, pytest.approx(shares), len(text))
    assert text[found.start : found.start + longest] in known
    assert longest >= copied


def test_short_texts_and_texts_with_nothing_in_common():
    assert novelty(ids(""), ids("abc")).longest == 0
    assert novelty(ids("abc"), ids("")) == module.Novelty(3, 0, 0, {})
    assert novelty(ids("xyz"), ids("abc")).longest == 0
    assert novelty(ids("xbz"), ids("abc")) == module.Novelty(3, 1, 1, {})


def test_a_collision_of_hashes_is_not_a_match(monkeypatch):
    monkeypatch.setattr(
        module, "_hashes", lambda ids, size: torch.zeros(len(ids) - size + 1, dtype=torch.long)
    )
    assert novelty(ids("xyz"), ids("abc")).longest == 0


def test_training_text_is_recognised_by_the_fingerprint_in_the_model(tmp_path):
    text, model = tmp_path / "text", tmp_path / "m.safetensors"
    text.write_text("abc " * 500)
    config = from_data({}, "", [f"corpus.source={text}", "model.hidden_size=4", "model.embedding_size=4"])
    corpus = Corpus.load(config.corpus)
    network, vocab = CharLM(len(corpus.vocab), config.model), corpus.vocab
    save_model(model, network, vocab, config, {}, corpus.fingerprint)
    assert training_text(model, config, vocab).fingerprint == corpus.fingerprint
    text.write_text("abc " * 499 + "acb ")  # of the same vocabulary
    with pytest.raises(CharlmError, match="--corpus"):
        training_text(model, config, vocab)
    save_model(model, network, vocab, config, {})  # as an imported model, whose text is not known
    training_text(model, config, vocab)
