"""`charlm.load`: its examples run, and its results are those of the commands and of the network."""

import doctest
import functools
import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import charlm as package
from charlm import api
from charlm.config import from_data
from charlm.errors import CharlmError, ConfigError
from charlm.inference.evaluate import evaluate_each
from charlm.inference.sampling import Sampling
from charlm.nn.model import make_model
from charlm.storage import run as runs
from charlm.storage.model_file import save_model
from charlm.storage.run import Run
from charlm.text.vocab import Vocab
from conftest import TINY

VOCAB = Vocab(" abcdefg\nñ")
TEXT = "ab cd\nefgañ" * 9


def save(folder, direction="forward", cell="lstm"):
    """Save a model of small random weights in the folder of a run; return its path."""
    config = from_data({}, "", [*TINY, f"model.direction={direction}", f"model.cell={cell}", "train.seed=3"])
    model = make_model(len(VOCAB), config.model).initialise(0)
    run = runs.create(Run(folder / "runs" / direction), config)
    save_model(run.best, model, VOCAB, config, {"step": 7})
    return run.best


@pytest.fixture(params=["forward", "backward", "both"])
def direction(request):
    return request.param


def test_the_docstrings_examples_run(folder):
    save(folder).parent.rename("runs/first")
    save(folder, "both").parent.rename("runs/filling")
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    shared: dict = {}
    tests = sorted(doctest.DocTestFinder().find(api), key=lambda test: test.lineno or 0)
    (loading,) = doctest.DocTestFinder().find(package.load, "charlm.load")
    assert loading.examples
    for test in (loading, *tests):
        test.globs = shared  # `model` comes from the class's own example
        runner.run(test, clear_globs=False)
    assert runner.summarize(verbose=False) == (0, runner.tries) and runner.tries > 15


def test_load_accepts_the_arguments_of_the_option_model(folder):
    path = save(folder)
    for given in (None, "forward", "runs/forward", path, str(path)):
        assert package.load(given, device="cpu").figures == {"step": 7}
    assert package.load(path, implementation="scratch").model.config.implementation == "scratch"
    for nothing in ("nothing", "x" * 300, "a\nb", "a\0b"):
        with pytest.raises(ConfigError, match="no model '(nothing|x{199}…|a.nb|a.x00b)") as caught:
            package.load(nothing)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_generate_returns_the_command_s_text(charlm, folder, way):
    model = package.load(save(folder, way))
    options = {
        "temperature": 1.3,
        "top_k": 8,
        "top_p": 0.9,
        "min_p": 0.02,
        "seed": 5,
        "unknown": "skip",
        "stop": "ad",
    }
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    written = model.generate("abΩ", 40, **options)
    assert charlm("generate", "-p", "abΩ", "-n", 40, *arguments).out.rstrip("\n") == written.rstrip("\n")
    assert "".join(model.stream("abΩ", 40, **options)) == written
    parts = list(model.stream("ab", 9))
    assert len(parts) == 10 and (way == "forward" or not any(parts[:-1])), "the caller can stop at each"
    second = model.generate("abΩ", 40, **{**options, "seed": 6})
    assert model.generate_batch(2, "abΩ", 40, **options) == [written, second] and written != second
    assert (written.startswith if way == "forward" else written.endswith)("ab")


def test_scores_equal_those_of_the_commands(charlm, folder, direction, monkeypatch):
    model = package.load(save(folder, direction))
    scored = model.score(TEXT)
    Path("text.txt").write_text(TEXT)
    total = json.loads(charlm("eval", "text.txt", "--json").out)["total"]
    assert len(scored) == total["characters"]
    assert math.fsum(bits for _, bits in scored) * math.log(2) == pytest.approx(total["nats"], rel=1e-6)
    first = 1 if direction == "forward" else 0
    assert "".join(character for character, _ in scored) == TEXT[first : first + len(scored)]
    if direction == "both":
        with pytest.raises(CharlmError, match="perplexity"):
            model.perplexity(TEXT)
        return
    assert model.perplexity(TEXT) == pytest.approx(total["perplexity"], rel=1e-6)
    monkeypatch.setattr(api, "CHUNK", 7)
    assert [bits for _, bits in model.score(TEXT)] == pytest.approx([bits for _, bits in scored], abs=1e-5)


def test_each_surprisal_belongs_to_its_character(folder, direction):
    """Compared with the network, which reads from its own end."""
    model = package.load(save(folder, direction))
    ids = VOCAB.encode("abcañ").long()
    network = model.model
    read = ids.flip(0) if direction == "backward" else ids
    with torch.no_grad():
        logits, _ = network(read[None], network.initial_state(1))
    log_p = F.log_softmax(logits[0], -1) / math.log(2)
    if direction == "both":
        expected = [-float(log_p[t, ids[t]]) for t in range(5)]
    else:
        expected = [-float(log_p[t, read[t + 1]]) for t in range(4)]
        expected = expected[::-1] if direction == "backward" else expected
    assert [bits for _, bits in model.score("abcañ")] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_embeddings_are_the_states_of_the_last_layer(folder, direction, cell, monkeypatch):
    """Compared with the state after each prefix, read alone."""
    model = package.load(save(folder, direction, cell))
    network = model.model
    found = model.embed(TEXT[:9])

    def state_after(stack, text):
        ids = VOCAB.encode(text).long()[None]
        with torch.no_grad():
            _, state = stack(network.embed(ids), network.initial_state(1)[: 2 if cell == "lstm" else 1])
        return state[0][-1, 0]

    rows = []
    for t in range(9):
        left = [state_after(network.recurrent, TEXT[: t + 1])] if direction != "backward" else []
        stack = network.reverse if direction == "both" else network.recurrent
        right = [state_after(stack, TEXT[t:9][::-1])] if direction != "forward" else []
        rows.append(torch.cat([*left, *right]))
    assert torch.allclose(found, torch.stack(rows), atol=1e-6)
    assert found.dtype == torch.float32 and not found.is_inference()
    monkeypatch.setattr(api, "CHUNK", 4)
    assert torch.allclose(model.embed(TEXT[:9]), found, atol=1e-6)


def test_short_texts(folder, direction):
    model = package.load(save(folder, direction))
    assert model.embed("").shape == (0, 24 if direction == "both" else 12)
    assert model.score("") == [] and len(model.score("a")) == (direction == "both")
    if direction != "both":
        with pytest.raises(CharlmError, match="1 characters"):
            model.perplexity("a")


def test_texts_are_cleaned_like_the_training_text(folder):
    path = save(folder)
    model = package.load(path)
    assert [character for character, _ in model.score("an\u0303")] == ["ñ"]
    with pytest.raises(CharlmError, match=r"'Ω' \(U\+03A9\) at position 1.*unknown='skip'"):
        model.score("aΩ")
    assert model.embed("aΩb", unknown="skip").shape == (2, 12)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"])
@pytest.mark.parametrize("implementation", ["auto", "builtin", "scratch"])
def test_torch_s_default_device_and_dtype_do_not_matter(folder, direction, implementation, default):
    path = save(folder, direction)

    def results():
        model = package.load(path, device="cpu", implementation=implementation)
        if direction == "both":
            return model.fill("ab_d_"), model.score(TEXT), model.embed("abc")
        written = [model.generate("ab", 9, seed=1, quantize=how) for how in (None, "bf16", "int8")]
        each = evaluate_each(model.model, [model.vocab.encode("abc"), model.vocab.encode(TEXT)])
        texts = [*written, *model.generate_batch(2, length=9, seed=2, top_k=3)]
        return texts, model.score(TEXT), model.embed("abc"), model.perplexity(TEXT), each

    expected = results()
    try:
        (torch.set_default_device if default == "meta" else torch.set_default_dtype)(default)
        found = results()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found[2], expected[2]) and found[2].dtype == torch.float32
    assert [*found[:2], *found[3:]] == [*expected[:2], *expected[3:]]


@pytest.mark.parametrize(
    "wrong",
    [
        *[
            {"temperature": -1},
            {"temperature": math.nan},
            {"top_k": 0},
            {"top_p": 0},
            {"min_p": 0},
            {"length": -1},
        ],
        *[{"seed": -1}, {"seed": 2**63}, {"quantize": "int4"}, {"unknown": "ignore"}],
    ],
)
def test_values_that_are_not_allowed_raise_a_configuration_error(folder, wrong):
    model = package.load(save(folder))
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        model.stream("a", **wrong)
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        model.generate_batch(2, "a", **wrong)
    with pytest.raises(ConfigError, match="n 0"):
        model.generate_batch(0, "a")


def test_an_unknown_keyword_is_named(folder):
    model = package.load(save(folder))
    for write in (model.generate, model.stream, functools.partial(model.generate_batch, 2)):
        with pytest.raises(TypeError, match="'tempreature'"):
            write("a", tempreature=0.5)


def test_a_sampling_record_does_the_same_as_its_fields_by_name(folder):
    model = package.load(save(folder))
    sampling = Sampling(temperature=1.3, top_k=4)
    expected = model.generate("ab", 30, temperature=1.3, top_k=4, seed=1)
    assert model.generate("ab", 30, sampling, seed=1) == expected
    assert model.generate("ab", 30, Sampling(top_k=4), temperature=1.3, seed=1) == expected
    assert model.generate_batch(1, "ab", 30, sampling, seed=1) == [expected]


def test_fill_returns_the_best_fillings(folder):
    model = package.load(save(folder, "both"))
    answers = model.fill("ab_ña", best=3)
    assert len(answers) == 3 and answers[0][1] == max(probability for _, probability in answers)
    assert all(text[:2] + text[3:] == "abña" for text, _ in answers)
    ((text, _),) = model.fill("aΩ_a", best=1, unknown="skip")
    assert text[:2] + text[3:] == "aΩa"
    for wrong in ({"blank": ""}, {"blank": "__"}, {"best": 0}, {"unknown": "ignore"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            model.fill("ab_ña", **wrong)
    with pytest.raises(CharlmError, match="model.direction: both"):
        model.generate("a")
    with pytest.raises(CharlmError, match="direction: both"):
        package.load(save(folder)).fill("a_")
