import itertools

import pytest
import torch

from charlm.config import ModelConfig
from charlm.errors import CharlmError
from charlm.inference.fill import fill
from charlm.nn.model import CharLM, FillLM
from charlm.text.vocab import Vocab

VOCAB = Vocab("abc ")


@pytest.fixture
def model():
    config = ModelConfig(direction="both", hidden_size=6, embedding_size=3, cell="gru")
    return FillLM(4, config).initialise(3).eval()


def log_p(model, text):
    """ln p of every character given the others, by the model itself: (N, V)."""
    return model(VOCAB.encode(text).long()[None], model.initial_state(1))[0][0].log_softmax(-1)


def test_a_single_blank_gets_the_model_s_distribution(model):
    answers = fill(model, VOCAB, ["ab", "ca"], best=4)
    expected = log_p(model, "ab ca")[2].exp()
    assert [chars for chars, _ in answers] == [
        [VOCAB.characters[i]] for i in expected.argsort(descending=True)
    ]
    for (char,), probability in answers:
        assert probability == pytest.approx(expected[VOCAB.characters.index(char)].item(), rel=1e-5)
    assert sum(probability for _, probability in answers) == pytest.approx(1)


@pytest.mark.parametrize("parts", [["a", "b", "c a"], ["", "", ""], ["ab", "", ""], ["", "b", "", "a"]])
def test_several_blanks_are_ranked_by_their_probability_given_the_rest(model, parts):
    blanks = len(parts) - 1
    answers = fill(model, VOCAB, parts, best=4**blanks, beam=4**blanks)
    scores = {}
    for chars in itertools.product(VOCAB.characters, repeat=blanks):
        text = parts[0] + "".join(c + part for c, part in zip(chars, parts[1:], strict=True))
        places = [sum(len(part) for part in parts[: k + 1]) + k for k in range(blanks)]
        table = log_p(model, text)
        scores[chars] = sum(
            table[at, VOCAB.characters.index(c)].item() for at, c in zip(places, chars, strict=True)
        )
    assert [tuple(chars) for chars, _ in answers[:3]] == sorted(scores, key=scores.get, reverse=True)[:3]
    total = torch.tensor(list(scores.values())).logsumexp(0)
    assert answers[0][1] == pytest.approx((torch.tensor(max(scores.values())) - total).exp().item(), rel=1e-4)


def test_the_unknown_class_is_never_an_answer(model):
    vocab = Vocab("ab\ufffd ", 9)
    with torch.no_grad():
        model.head.bias[2] = 20.0
    for parts in (["ab", "Ωa"], ["a", "", "b"]):
        answers = fill(model, vocab, parts, best=9)
        assert len(answers) == 3 ** (len(parts) - 1)
        assert all("\ufffd" not in characters for characters, _ in answers)


def test_texts_and_models_that_cannot_be_filled_in_raise_an_error(model):
    with pytest.raises(CharlmError, match="blank"):
        fill(model, VOCAB, ["abc"])
    with pytest.raises(CharlmError, match="model.direction: both"):
        fill(CharLM(4, ModelConfig(hidden_size=3)), VOCAB, ["a", "b"])


def test_a_model_in_training_mode_fills_in_without_dropout():
    model = FillLM(4, ModelConfig(direction="both", hidden_size=6, dropout=0.5)).initialise(3).eval()
    expected = fill(model, VOCAB, ["a", "b", "c"])
    assert fill(model.train(), VOCAB, ["a", "b", "c"]) == expected
    assert model.training
