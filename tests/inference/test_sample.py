from fractions import Fraction

import pytest
import torch

from charlm.config import ModelConfig
from charlm.errors import CharlmError, ConfigError
from charlm.inference import sample as module
from charlm.inference.sample import Sampling, choose, generate, generate_batch
from charlm.nn.model import CharLM
from charlm.text.vocab import Vocab


@pytest.fixture(params=["kernels", "torch"], autouse=True)
def draws(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(module, "kernels", lambda dtype: None)
        monkeypatch.setattr("charlm.nn.kernels.native.kernels", lambda dtype: None)


def draw(logits, generator=None, **options):
    """Draw one id from logits (V,)."""
    uniform = torch.rand(1, dtype=torch.float64, generator=generator)
    return int(choose(logits[None], uniform, Sampling(**{"temperature": 1.0, **options})))


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


def test_top_k_keeps_the_k_most_probable_characters():
    expected = torch.tensor([0, 2.0, 0, 1.5, 0]).masked_fill(torch.tensor([1, 0, 1, 0, 1]).bool(), -torch.inf)
    assert torch.allclose(frequencies(top_k=2), expected.softmax(0), atol=0.03)
    assert frequencies(10, top_k=99).sum() == pytest.approx(1)


def test_top_p_keeps_the_fewest_characters_that_hold_p():
    p = LOGITS.softmax(0)
    assert frequencies(200, top_p=float(p[1]) - 0.01)[1] == 1
    kept = frequencies(top_p=float(p[1]) + 0.01)
    assert kept[[0, 2, 4]].sum() == 0 and kept[3] == pytest.approx(float(p[3] / (p[1] + p[3])), abs=0.03)
    assert torch.allclose(frequencies(top_p=1.0), p, atol=0.03)


KNOWN = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"min_p": 0.1}, [0, 1, 2, 3, 4]),
        ({"min_p": 0.2}, [1, 2, 3, 4]),  # 0.08 and more
        ({"min_p": 0.45}, [1, 3, 4]),  # 0.18 and more
        ({"min_p": 0.6}, [1, 3]),
        ({"min_p": 1}, [1]),
        ({"min_p": 0.2, "top_k": 3}, [1, 3, 4]),
        ({"min_p": 0.6, "top_k": 4}, [1, 3]),
        ({"min_p": 0.2, "top_p": 0.6}, [1, 3]),
        ({"min_p": 0.45, "top_p": 0.9}, [1, 3, 4]),
        ({"min_p": 0.1, "top_k": 3, "top_p": 0.7}, [1, 3]),  # top_p of what top_k keeps: 0.65 / 0.85 = 0.76
        ({"min_p": 0.6, "top_p": 0.6}, [1, 3]),  # top_p comes first: of what min_p keeps, 0.4 / 0.65 > 0.6
        ({"min_p": 0.3, "temperature": 2.0}, [0, 1, 2, 3, 4]),  # at 2 the least is 0.35 times as probable
        ({"min_p": 0.3, "temperature": 0.5}, [1, 3]),  # at 0.5 the third is 0.25 times as probable
    ],
)
def test_min_p_keeps_the_characters_at_least_p_times_as_probable_as_the_best(options, kept):
    sampling = Sampling(**{"temperature": 1.0, **options})
    expected = (KNOWN.log() / sampling.temperature).softmax(0)
    expected = expected[kept] / expected[kept].sum()
    uniforms = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    drawn = choose(KNOWN.log().expand(2000, -1), uniforms, sampling).bincount(minlength=5) / 2000
    assert drawn.nonzero()[:, 0].tolist() == kept
    assert torch.allclose(drawn[kept], expected, atol=1e-3)


def test_min_p_of_1_keeps_ties_of_the_best():
    logits = torch.tensor([[1.0, 3.0, 2.9, 3.0]]).expand(100, -1)
    uniforms = (torch.arange(100, dtype=torch.float64) + 0.5) / 100
    drawn = choose(logits, uniforms, Sampling(min_p=1.0))
    assert drawn.bincount(minlength=4).tolist() == [0, 50, 0, 50]


FILTERS = [{}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.9, "min_p": 0.1}]


@pytest.mark.parametrize("options", FILTERS)
def test_the_uniform_numbers_alone_decide_what_is_drawn(options, monkeypatch):
    """The same with and without kernels, up to the largest number below 1, and for each row alone."""
    sampling = Sampling(temperature=0.8, **options)
    logits, uniforms = torch.randn(1000, 50), torch.rand(1000, dtype=torch.float64)
    uniforms[:2] = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    found = choose(logits, uniforms, sampling)
    monkeypatch.setattr(module, "kernels", lambda dtype: None)
    assert torch.equal(choose(logits, uniforms, sampling), found)
    alone = [
        choose(row[None], uniform[None], sampling) for row, uniform in zip(logits, uniforms, strict=True)
    ]
    assert torch.equal(torch.cat(alone), found)


def test_greedy_and_extreme_temperatures():
    assert draw(LOGITS, temperature=0) == 1
    assert draw(LOGITS, temperature=1e-300) == 1
    assert draw(LOGITS * 1e30, temperature=1e-5) == 1
    assert torch.allclose(frequencies(temperature=1e300), torch.full((5,), 0.2), atol=0.03)


def test_predictions_that_are_not_finite_raise_an_error():
    with pytest.raises(CharlmError, match="not finite"):
        draw(torch.tensor([0.0, torch.nan]))
    for wrong in (torch.inf, -torch.inf):
        with pytest.raises(CharlmError, match="not finite"):
            draw(torch.tensor([0.0, wrong]), top_p=0.5)


@pytest.fixture
def model():
    return CharLM(4, ModelConfig(hidden_size=6, embedding_size=3)).initialise(0)


VOCAB = Vocab(" ab\n")


def write(model, prefix="ab", length=20, seed=1, quantize=None, **options):
    generator, sampling = torch.Generator().manual_seed(seed), Sampling(**{"temperature": 1.0, **options})
    return "".join(generate(model, VOCAB, VOCAB.encode(prefix), length, sampling, generator, quantize))


def test_each_character_is_drawn_given_all_before_it(model):
    text = write(model, length=15, temperature=0)
    assert len(text) == 15
    for n in range(15):
        logits, _ = model.eval()(VOCAB.encode("ab" + text[:n]).long()[None], model.initial_state(1))
        assert VOCAB.characters[int(logits[0, -1].argmax())] == text[n]


def test_the_same_seed_gives_the_same_text(model):
    assert write(model) == write(model)
    assert write(model) != write(model, seed=2)


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 1}, {"top_p": 0.5}, {"min_p": 1.0}, {"temperature": 0}, {"temperature": 1e6}]
)
def test_the_unknown_class_is_never_written(model, options):
    vocab = Vocab(" a\ufffd\n", 9)
    with torch.no_grad():
        model.head.bias[2] = 1e4
    text = "".join(
        generate(model, vocab, vocab.encode("aΩ"), 60, Sampling(**{"temperature": 1.0, **options}))
    )
    assert len(text) == 60 and set(text) <= set(" a\n")
    with torch.no_grad():
        model.head.bias[2] = -1e30  # the others are drawn as without it
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    sampling = Sampling(**{"temperature": 1.0, **options})
    with_class = "".join(generate(model, vocab, vocab.encode("a"), 60, sampling, generators[0]))
    assert with_class == "".join(
        generate(model, Vocab(" a\ufffd\n"), vocab.encode("a"), 60, sampling, generators[1])
    )


def test_an_empty_prefix_is_read_as_a_line_end(model):
    assert write(model, "") == write(model, "\n")
    assert any(write(model, "", seed=seed) != write(model, "b", seed=seed) for seed in range(20))


def test_stop_ends_the_text(model):
    text = write(model, length=200)
    stop = text[50:53]
    shorter = write(model, length=200, stop=stop)
    assert shorter == text[: text.index(stop) + 3]
    assert write(model, length=30, stop="never there") == text[:30]


def test_characters_are_yielded_as_they_are_drawn_and_the_mode_is_restored(model):
    stream = generate(model.train(), VOCAB, VOCAB.encode("a"), 10**9, Sampling())
    assert len(next(stream)) == 1
    stream.close()
    assert model.training


@pytest.mark.parametrize("gru_reset", ["before", "after"])
def test_interleaved_texts_are_written_without_dropout(gru_reset):
    config = ModelConfig(
        cell="gru", gru_reset=gru_reset, hidden_size=6, embedding_size=3, num_layers=2, dropout=0.5
    )
    model = CharLM(4, config).initialise(0).train()
    alone = [write(model, seed=seed) for seed in (1, 2)]

    def start(seed, length):
        generator = torch.Generator().manual_seed(seed)
        return generate(model, VOCAB, VOCAB.encode("ab"), length, Sampling(temperature=1.0), generator)

    first, second = start(1, 10), start(2, 20)
    texts = [next(first), next(second)]
    assert model.training, "dropout is on between two characters"
    texts[0] += "".join(first)
    texts[1] += "".join(second)
    assert texts == [alone[0][:10], alone[1]]
    assert model.training


def test_a_long_prefix_is_read_in_chunks(model, monkeypatch):
    whole = write(model, "ab a\nb" * 9, temperature=0)
    monkeypatch.setattr(module, "PREFIX_CHUNK", 7)
    assert write(model, "ab a\nb" * 9, temperature=0) == whole


def test_texts_written_side_by_side_equal_those_written_alone(model):
    alone = [write(model, seed=seed, stop="ba") for seed in range(9)]
    assert len({len(text) for text in alone}) > 1
    generators = [torch.Generator().manual_seed(seed) for seed in range(9)]
    sampling = Sampling(temperature=1.0, stop="ba")
    together = generate_batch(model, VOCAB, VOCAB.encode("ab"), 20, sampling, generators)
    assert together == alone


@pytest.mark.parametrize("how", ["bf16", "int8"])
def test_a_quantised_model_writes_the_same_at_temperature_0(model, how, monkeypatch):
    asked, plain = [], write(model, temperature=0)
    stepper = module.Stepper
    monkeypatch.setattr(module, "Stepper", lambda *given: asked.append(given[1]) or stepper(*given))
    assert write(model, temperature=0, quantize=how) == plain
    assert asked == [how]


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        ("temperature", [-0.1, float("nan"), float("inf"), "warm", None], [0, 0.7, 1e300]),
        ("top_k", [0, -1, 2.5, "3", 2**63], [None, 1, 2**63 - 1]),
        ("top_p", [0, -0.1, 1.1, float("nan"), "half"], [None, 1e-9, 1, Fraction(1, 2)]),
        ("min_p", [0, -0.1, 1.1, float("nan"), "half"], [None, 1e-9, 1]),
        ("stop", [None, 3], ["", "ab"]),
    ],
)
def test_sampling_checks_its_values(name, wrong, right):
    for value in right:
        assert getattr(Sampling(**{name: value}), name) == value
    for value in wrong:
        with pytest.raises(ConfigError) as caught:
            Sampling(**{name: value})
        assert name in str(caught.value) and repr(value) in str(caught.value)
