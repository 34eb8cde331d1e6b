import pytest
import torch

from charlm.config import ModelConfig
from charlm.errors import CharlmError
from charlm.inference import sample as module
from charlm.inference.sample import choose, draw, generate, generate_batch
from charlm.nn.model import CharLM
from charlm.text.vocab import Vocab


@pytest.fixture(params=["kernels", "torch"], autouse=True)
def draws(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(module, "kernels", lambda dtype: None)
        monkeypatch.setattr("charlm.nn.fused.kernels", lambda dtype: None)


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


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.6}, {"top_k": 4, "top_p": 0.9}])
def test_the_chances_alone_decide(options, monkeypatch):
    """With and without kernels the same, from end to end of what a chance can be, for each row by itself."""
    logits, chances = torch.randn(1000, 50), torch.rand(1000, dtype=torch.float64)
    chances[:2] = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    found = choose(logits, chances, 0.8, **options)
    monkeypatch.setattr(module, "kernels", lambda dtype: None)
    assert torch.equal(choose(logits, chances, 0.8, **options), found)
    alone = [
        choose(row[None], chance[None], 0.8, **options) for row, chance in zip(logits, chances, strict=True)
    ]
    assert torch.equal(torch.cat(alone), found)


def test_greedy_and_extreme_temperatures():
    assert draw(LOGITS, temperature=0) == 1
    assert draw(LOGITS, temperature=1e-300) == 1
    assert draw(LOGITS * 1e30, temperature=1e-5) == 1
    assert torch.allclose(frequencies(temperature=1e300), torch.full((5,), 0.2), atol=0.03)


def test_predictions_that_are_not_finite_are_refused():
    with pytest.raises(CharlmError, match="not finite"):
        draw(torch.tensor([0.0, torch.nan]))
    for wrong in (torch.inf, -torch.inf):
        with pytest.raises(CharlmError, match="not finite"):
            draw(torch.tensor([0.0, wrong]), top_p=0.5)


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
    assert any(write(model, "", seed=seed) != write(model, "b", seed=seed) for seed in range(20))


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


def test_texts_side_by_side_are_those_of_each_alone(model):
    alone = [write(model, seed=seed, stop="ba") for seed in range(9)]
    assert len({len(text) for text in alone}) > 1
    generators = [torch.Generator().manual_seed(seed) for seed in range(9)]
    together = generate_batch(model, VOCAB, VOCAB.encode("ab"), 20, stop="ba", generators=generators)
    assert together == alone


@pytest.mark.parametrize("how", ["bf16", "int8"])
def test_a_quantised_model_writes_nearly_the_same(model, how, monkeypatch):
    asked, plain = [], write(model, temperature=0)
    stepper = module.Stepper
    monkeypatch.setattr(module, "Stepper", lambda *given: asked.append(given[1]) or stepper(*given))
    assert write(model, temperature=0, quantize=how) == plain
    assert asked == [how]
