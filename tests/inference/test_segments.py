import pytest
import torch

from charlm.config import ModelConfig
from charlm.inference import evaluate as segments
from charlm.inference.evaluate import evaluate
from charlm.nn.model import CharLM


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(segments, "SHORTEST", 100)
    monkeypatch.setattr(segments, "MOST", {"cpu": 8})
    monkeypatch.setattr(segments, "_MARK", 16)


def count_rows(monkeypatch, model):
    """The batch sizes of all forward passes to come."""
    rows, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda x, state: rows.append(len(x)) or forward(x, state))
    return rows


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
@pytest.mark.parametrize("chunk", [33, 4096])
def test_segments_give_what_the_carried_state_gives(cell, chunk, monkeypatch):
    options = ModelConfig(cell=cell, hidden_size=6, embedding_size=3, num_layers=2)
    model = CharLM(9, options).initialise(0).eval()
    ids = torch.randint(9, (1003,))
    rows = count_rows(monkeypatch, model)
    with torch.inference_mode():
        begun = tuple(torch.rand_like(part) for part in model.initial_state(1))
        found, state, fast = segments.read_long(model, ids, begun, chunk)
        assert 8 in rows and fast
        logits, expected = model(ids[None, :-1], begun)
        nats = torch.nn.functional.cross_entropy(logits[0], ids[1:], reduction="none").double()
    assert torch.allclose(found, nats, atol=1e-4)
    assert float(found.sum()) == pytest.approx(float(nats.sum()), rel=1e-6)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(state, expected, strict=True))


def test_a_network_that_does_not_forget_is_read_straight_through(monkeypatch):
    model = CharLM(9, ModelConfig(hidden_size=6, embedding_size=3)).initialise(0).eval()
    with torch.no_grad():  # every cell counts for ever
        model.get_parameter("recurrent.bias_ih_l0")[6:12] = 30.0
    ids = torch.randint(9, (1003,))
    fast = segments.read_long(model, ids, model.initial_state(1), 4096)[2]
    assert not fast
    score = evaluate(model, ids)
    monkeypatch.setattr(segments, "MOST", {"cpu": 1})
    assert score.nats == pytest.approx(evaluate(model, ids).nats, rel=1e-6)
