import pytest
import torch

from charlm.config import ModelConfig
from charlm.inference import evaluate as module
from charlm.inference.evaluate import evaluate
from charlm.metrics import Score
from charlm.nn.model import CharLM, make_model


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


def test_a_backward_model_reads_from_the_end():
    options = {"hidden_size": 6, "embedding_size": 3}
    forward, backward = (
        CharLM(9, ModelConfig(direction=d, **options)).initialise(0) for d in ("forward", "backward")
    )
    ids = torch.randint(9, (50,))
    assert evaluate(backward, ids) == evaluate(forward, ids.flip(0))


@pytest.mark.parametrize("chunk", [1, 7, 50, 4096])
def test_a_filling_model_scores_every_character_given_all_others(monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK", chunk)
    model = make_model(9, ModelConfig(direction="both", hidden_size=6, embedding_size=3)).initialise(0).eval()
    ids = torch.randint(9, (50,))
    logits, _ = model(ids[None], model.initial_state(1))
    naive = -logits[0].log_softmax(-1)[torch.arange(50), ids].sum().item()
    score = evaluate(model, ids)
    assert score.characters == 50
    assert score.nats == pytest.approx(naive, rel=1e-5)


def test_a_filling_model_is_left_as_it_was_whatever_happens():
    model = make_model(9, ModelConfig(direction="both", hidden_size=6)).initialise(0).train()
    with pytest.raises(IndexError):
        evaluate(model, torch.tensor([1, 9]))
    assert model.training
