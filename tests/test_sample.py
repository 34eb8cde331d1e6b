import pytest
import torch

from charlm import sample as module
from charlm.config import ModelConfig
from charlm.errors import CharlmError
from charlm.model import CharLM
from charlm.sample import draw, generate
from charlm.vocab import Vocab

LOGITS = torch.tensor([0.1, 2.0, -1.0, 1.5, 0.0])


def frequencies(n=4000, **options):
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(len(LOGITS))
    for _ in range(n):
        counts[draw(LOGITS, **options, generator=generator)] += 1
    return counts / n


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax_at_a_temperature(temperature):
    expected = (LOGITS / temperature).softmax(0)
    assert torch.allclose(frequencies(temperature=temperature), expected, atol=0.03)


def test_top_k_keeps_the_k_best():
    expected = torch.tensor([0, 2.0, 0, 1.5, 0]).masked_fill(torch.tensor([1, 0, 1, 0, 1]).bool(), -torch.inf)
    assert torch.allclose(frequencies(top_k=2), expected.softmax(0), atol=0.03)
    assert frequencies(10, top_k=99).sum() == pytest.approx(1)


def test_top_p_keeps_the_fewest_that_hold_p():
    p = LOGITS.softmax(0)
    assert frequencies(200, top_p=float(p[1]) - 0.01)[1] == 1
    kept = frequencies(top_p=float(p[1]) + 0.01)
    assert kept[[0, 2, 4]].sum() == 0 and kept[3] == pytest.approx(float(p[3] / (p[1] + p[3])), abs=0.03)
    assert torch.allclose(frequencies(top_p=1.0), p, atol=0.03)


def test_greedy_and_extreme_temperatures():
    assert draw(LOGITS, temperature=0) == 1
    assert draw(LOGITS, temperature=1e-300) == 1
    assert draw(LOGITS * 1e30, temperature=1e-5) == 1
    assert torch.allclose(frequencies(temperature=1e300), torch.full((5,), 0.2), atol=0.03)


def test_predictions_that_are_not_finite_are_refused():
    with pytest.raises(CharlmError, match="not finite"):
        draw(torch.tensor([0.0, torch.nan]))


@pytest.fixture
def model():
    return CharLM(4, ModelConfig(hidden_size=6, embedding_size=3)).initialise(0)


VOCAB = Vocab(" ab\n")


def write(model, prefix="ab", length=20, seed=1, **options):
    generator = torch.Generator().manual_seed(seed)
    return "".join(generate(model, VOCAB, VOCAB.encode(prefix), length, generator=generator, **options))


def test_each_character_is_drawn_from_all_before_it(model):
    text = write(model, length=15, temperature=0)
    assert len(text) == 15
    for n in range(15):
        logits, _ = model.eval()(VOCAB.encode("ab" + text[:n]).long()[None], model.initial_state(1))
        assert VOCAB.characters[int(logits[0, -1].argmax())] == text[n]


def test_seeds(model):
    assert write(model) == write(model)
    assert write(model) != write(model, seed=2)


def test_an_empty_prefix_begins_as_after_a_line_end(model):
    assert write(model, "") == write(model, "\n")
    assert write(model, "") != write(model, "b")


def test_stop_ends_a_text_that_has_it(model):
    text = write(model, length=200)
    stop = text[50:53]
    shorter = write(model, length=200, stop=stop)
    assert shorter == text[: text.index(stop) + 3]
    assert write(model, length=30, stop="never there") == text[:30]


def test_text_comes_as_it_is_made_and_leaves_the_model_as_it_was(model):
    stream = generate(model.train(), VOCAB, VOCAB.encode("a"), 10**9)
    assert len(next(stream)) == 1
    stream.close()
    assert model.training


def test_a_long_prefix_is_read_in_parts(model, monkeypatch):
    whole = write(model, "ab a\nb" * 9, temperature=0)
    monkeypatch.setattr(module, "PREFIX_CHUNK", 7)
    assert write(model, "ab a\nb" * 9, temperature=0) == whole
