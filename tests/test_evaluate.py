import pytest
import torch

from charlm import evaluate as module
from charlm.config import ModelConfig
from charlm.evaluate import evaluate
from charlm.metrics import Score
from charlm.model import CharLM


@pytest.mark.parametrize("chunk", [1, 7, 99, 100, 4096])
def test_every_character_after_the_first_once_with_the_state_carried(monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK", chunk)
    model = CharLM(9, ModelConfig(hidden_size=6, embedding_size=3)).initialise(0).train()
    ids = torch.randint(9, (100,), dtype=torch.uint8)
    naive, state = 0.0, model.eval().initial_state(1)
    for now, following in zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True):
        logits, state = model(torch.tensor([[now]]), state)
        naive -= logits[0, 0].log_softmax(0)[following].item()
    score = evaluate(model.train(), ids)
    assert score.characters == 99
    assert score.nats == pytest.approx(naive, rel=1e-6)
    assert model.training, "left as it was"


def test_nothing_to_score():
    model = CharLM(9, ModelConfig(hidden_size=6)).initialise(0)
    assert evaluate(model, torch.tensor([3])) == evaluate(model, torch.tensor([])) == Score(0.0, 0)
