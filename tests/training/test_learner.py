import ctypes
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from charlm.nn.kernels import native
from charlm.text.corpus import Corpus
from charlm.text.encode import Encoder
from charlm.training.learner import Learner
from conftest import configure


def test_streams_carry_the_state_and_windows_do_not(words):
    for sampling, carried in (("contiguous", True), ("sliding", False)):
        learner = Learner(configure(f"batches.sampling={sampling}"), Corpus.from_text(words))
        starts = []
        forward = learner.model.forward
        learner.model.forward = lambda x, state, f=forward, s=starts: (s.append(state), f(x, state))[1]
        for _, (x, y) in zip(range(3), learner.remaining_batches(), strict=False):
            learner.step(x, y)
        assert not starts[0][0].any()
        assert bool(starts[1][0].any()) == bool(starts[2][0].any()) == carried
        assert not any(state[0].requires_grad for state in starts)


def test_learner_leaves_the_allocator_alone(words, monkeypatch):
    monkeypatch.setattr(native, "keep_memory", lambda: pytest.fail("the allocator was changed"))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail(f"{name} was opened"))
    Learner(configure("model.implementation=scratch"), Corpus.from_text(words))


def test_bfloat16_trains_float32_weights(words):
    learner = Learner(configure("model.implementation=scratch"), Corpus.from_text(words))
    learner.precision = torch.bfloat16  # which `choose_precision` refuses on a CPU that emulates it
    predictions = []
    learner.prediction.register_forward_hook(lambda module, inputs, output: predictions.append(output[0]))
    before = [parameter.detach().clone() for parameter in learner.model.parameters()]
    learner.step(*next(iter(learner.batches.loader(1, 0))))
    assert [logits.dtype for logits in predictions] == [torch.bfloat16]
    for parameter, old in zip(learner.model.parameters(), before, strict=True):
        assert parameter.dtype == torch.float32 and not torch.equal(parameter, old)


def test_small_step_lowers_the_loss_of_its_batch(words):
    overrides = ["train.optimizer=sgd", "train.lr=0.01", "model.dropout=0.0", "train.precision=float32"]
    learner = Learner(configure(*overrides, "train.schedule=constant"), Corpus.from_text(words))
    batch = next(iter(learner.batches.loader(1, 0)))
    first, second = learner.step(*batch)[0], learner.step(*batch)[0]
    assert second < first


def test_loss_on_last_trains_on_the_last_character_of_each_window(words):
    overrides = ["train.loss_on=last", "model.dropout=0.0", "train.precision=float32"]
    learner = Learner(configure(*overrides), Corpus.from_text(words))
    x, y = next(iter(learner.batches.loader(1, 0)))
    logits, _ = learner.model.eval()(x, learner.model.initial_state(len(x)))
    expected = F.cross_entropy(logits[:, -1], y[:, -1]).item()
    loss, characters, _ = learner.step(x, y)
    assert (loss, characters) == (pytest.approx(expected, rel=1e-5), len(x))


@pytest.mark.parametrize("loss_on", ["all", "last"])
def test_the_loss_counts_the_unknown_class_and_a_uniform_choice(words, loss_on):
    encoder = Encoder()
    encoder.add(words)
    encoded = encoder.finish((1.0, 0.0, 0.0), min_count=190)
    corpus = replace(Corpus.from_text(words), vocab=encoded.vocab, train=encoded.in_memory())
    overrides = ["model.dropout=0.0", "train.precision=float32", f"train.loss_on={loss_on}"]
    learner = Learner(configure(*overrides), corpus)
    unknown, kinds = encoded.vocab.unknown
    x, y = next(iter(learner.batches.loader(1, 0)))
    counted = slice(-1, None) if loss_on == "last" else slice(None)
    assert kinds > 1 and (y[:, counted] == unknown).any()
    logits, _ = learner.model.eval()(x, learner.model.initial_state(len(x)))
    each = logits[:, counted].softmax(-1).detach()
    each[..., unknown] /= kinds
    expected = -each.gather(-1, y[:, counted, None]).log().mean().item()
    assert learner.step(x, y)[0] == pytest.approx(expected, rel=1e-5)


def test_a_step_on_records_has_the_loss_of_each_record_alone_and_no_gradient_of_padding():
    names = [" ana", "bo", "carla", "d", "eva maria"]
    corpus = Corpus.from_text("\n".join(names), (1.0, 0.0, 0.0), records="line")
    learner = Learner(
        configure(
            "model.dropout=0.0",
            "train.precision=float32",
            "corpus.records=line",
            "batches.batch_size=5",
            "train.clip=none",
        ),
        corpus,
    )
    expected = []
    for name in names:
        ids = corpus.vocab.encode(f"\n{name}\n").long()[None]
        logits, _ = learner.model(ids[:, :-1], learner.model.initial_state(1))
        expected.append(F.cross_entropy(logits[0], ids[0, 1:], reduction="sum"))
    characters = sum(len(name) + 1 for name in names)
    mean = sum(expected) / characters
    gradients = torch.autograd.grad(mean, list(learner.model.parameters()))
    ((x, y),) = learner.batches.loader(1, 0)
    assert (y < 0).any()
    loss, counted, _ = learner.step(x, y)
    assert (loss, counted) == (pytest.approx(mean.item(), rel=1e-5), characters)
    for parameter, gradient in zip(learner.model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_backward_model_trains_on_the_text_reversed(words):
    forward, backward = (
        Learner(configure(f"model.direction={d}", "batches.shuffle=false"), Corpus.from_text(words))
        for d in ("forward", "backward")
    )
    for learner, expected in ((forward, words[:9]), (backward, words[1799:1790:-1])):
        x, y = next(iter(learner.batches.loader(1, 0)))
        assert learner.corpus.vocab.decode(torch.cat([x[0], y[0, -1:]])) == expected
