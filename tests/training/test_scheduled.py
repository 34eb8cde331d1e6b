import pytest
import torch

from charlm.config import ModelConfig, TrainConfig
from charlm.nn.model import CharLM
from charlm.training import learner as scheduled
from charlm.training.learner import true_character_probability

SHAPES = ["linear", "exponential", "inverse_sigmoid"]


@pytest.mark.parametrize("shape", SHAPES)
def test_probability_falls_from_1_to_teacher_forcing(shape):
    config = TrainConfig(teacher_forcing=0.25, teacher_forcing_schedule=shape)
    shares = [true_character_probability(k / 100, config) for k in range(101)]
    assert shares[0] == pytest.approx(1) and shares[-1] == pytest.approx(0.25)
    assert shares == sorted(shares, reverse=True)


def test_schedules_are_those_of_the_paper():
    def probability(progress, shape):
        config = TrainConfig(teacher_forcing=0.0, teacher_forcing_schedule=shape)
        return true_character_probability(progress, config)

    middle = {shape: probability(0.5, shape) for shape in SHAPES}
    assert middle["linear"] == pytest.approx(0.5) == middle["inverse_sigmoid"]
    assert middle["exponential"] < 0.1
    assert probability(0.2, "inverse_sigmoid") > 0.95, "flat at first"


@pytest.fixture
def model():
    return CharLM(9, ModelConfig(hidden_size=7, embedding_size=4)).initialise(0).eval()


def test_probability_1_equals_the_model(model):
    x = torch.randint(9, (3, 6))
    ours, state = scheduled.scheduled_forward(model, x, model.initial_state(3), 1.0)
    theirs, last = model(x, model.initial_state(3))
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(state, last, strict=True))


def test_probability_0_feeds_the_predictions(model, monkeypatch):
    fed = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda x, state: (fed.append(x), forward(x, state))[1])
    with torch.no_grad():
        model.head.bias[5] = 1e9  # it always predicts 5
    x = torch.zeros(2, 4, dtype=torch.long)
    scheduled.scheduled_forward(model, x, model.initial_state(2), 0.0)
    assert torch.cat(fed, 1).tolist() == [[0, 5, 5, 5]] * 2


def test_each_character_is_drawn_separately(model, monkeypatch):
    fed = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda x, state: (fed.append(x), forward(x, state))[1])
    with torch.no_grad():
        model.head.bias[5] = 1e9
    x = torch.zeros(200, 11, dtype=torch.long)
    torch.manual_seed(0)
    logits, _ = scheduled.scheduled_forward(model, x, model.initial_state(200), 0.7)
    share = (torch.cat(fed[1:], 1) == 0).float().mean().item()
    assert share == pytest.approx(0.7, abs=0.05)
    logits.sum().backward()
    assert model.embedding.weight.grad is not None


@pytest.mark.parametrize("implementation", ["builtin", "scratch", "fused"])
def test_masks_of_a_sequence_are_kept_for_all_its_characters(implementation):
    config = ModelConfig(
        hidden_size=7,
        embedding_size=4,
        num_layers=3,
        implementation=implementation,
        locked_dropout=True,
        dropout=0.4,
        weight_dropout=0.4,
        embedding_dropout=0.4,
    )
    model = CharLM(9, config).initialise(0)
    x = torch.randint(9, (3, 6))
    torch.manual_seed(1)
    whole, _ = model(x, model.initial_state(3))
    torch.manual_seed(1)  # the masks are drawn at the first character, before a character is drawn
    stepped, _ = scheduled.scheduled_forward(model, x, model.initial_state(3), 1.0)
    assert torch.allclose(stepped, whole, atol=1e-6)
    again, _ = scheduled.scheduled_forward(model, x, model.initial_state(3), 1.0)
    assert not torch.allclose(again, whole, atol=1e-6), "the next sequence has others"


def test_predictions_that_are_nan_give_logits_that_are_nan():
    model = CharLM(5, ModelConfig(hidden_size=4)).initialise(1)
    with torch.no_grad():
        model.head.bias.fill_(torch.nan)
    x = torch.zeros(2, 3, dtype=torch.long)
    assert scheduled.scheduled_forward(model, x, model.initial_state(2), 0.0)[0].isnan().all()
