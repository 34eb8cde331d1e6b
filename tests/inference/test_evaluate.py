import pytest
import torch
from torch.nn import functional as F

from charlm.config import ModelConfig
from charlm.inference import evaluate as module
from charlm.inference.evaluate import (
    evaluate,
    evaluate_each,
    evaluate_records,
    record_surprisals,
    surprisals,
    text_surprisals,
)
from charlm.metrics import Score
from charlm.nn.model import CharLM, make_model
from charlm.text.vocab import UnknownClass


def make(**options):
    return make_model(9, ModelConfig(hidden_size=6, embedding_size=3, **options)).initialise(0)


@pytest.fixture
def short_segments(monkeypatch):
    monkeypatch.setattr(module, "SEGMENT_MIN", 100)
    monkeypatch.setattr(module, "SEGMENTS_MAX", {"cpu": 8})
    monkeypatch.setattr(module, "_MARK", 16)


@pytest.mark.parametrize("chunk", [1, 7, 99, 100, 4096])
def test_every_character_after_the_first_is_scored_once_with_the_state_carried(monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK", chunk)
    model = make().eval()
    ids = torch.randint(9, (100,), dtype=torch.uint8)
    naive, state = 0.0, model.initial_state(1)
    for now, following in zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True):
        logits, state = model(torch.tensor([[now]]), state)
        naive -= logits[0, 0].log_softmax(0)[following].item()
    score = evaluate(model, ids)
    assert score.characters == 99
    assert score.nats == pytest.approx(naive, rel=1e-6)


def test_texts_of_fewer_than_two_characters_have_no_score():
    model = make()
    assert evaluate(model, torch.tensor([3])) == evaluate(model, torch.tensor([])) == Score(0.0, 0)


def test_a_backward_model_reads_from_the_end():
    ids = torch.randint(9, (50,))
    assert evaluate(make(direction="backward"), ids) == evaluate(make(direction="forward"), ids.flip(0))


@pytest.mark.parametrize("chunk", [1, 7, 50, 4096])
def test_a_filling_model_scores_every_character_given_all_others(monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK", chunk)
    model = make(direction="both").eval()
    ids = torch.randint(9, (50,))
    logits, _ = model(ids[None], model.initial_state(1))
    naive = -logits[0].log_softmax(-1)[torch.arange(50), ids].sum().item()
    score = evaluate(model, ids)
    assert score.characters == 50
    assert score.nats == pytest.approx(naive, rel=1e-5)


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_texts_side_by_side_are_scored_like_each_alone(direction):
    model, counts = make(direction=direction), []
    texts = [torch.randint(9, (n,)) for n in (1, 40, 2, 700, 41, 0, 300)]
    for score, ids in zip(evaluate_each(model, texts, counts.append), texts, strict=True):
        alone = evaluate(model, ids)
        assert (score.characters, score.nats) == (alone.characters, pytest.approx(alone.nats, rel=1e-6))
    assert direction == "both" or sum(counts) == sum(max(len(ids) - 1, 0) for ids in texts)


@pytest.mark.parametrize("at_once", [1, 3, 4096])
def test_records_are_scored_each_alone_with_the_boundaries(monkeypatch, at_once):
    monkeypatch.setattr(module, "_RECORDS", at_once)
    model, boundary = make(), 8
    records = [torch.randint(8, (n,), dtype=torch.uint8) for n in (3, 1, 12, 1, 0, 7)]
    alone = [F.pad(ids, (1, 1), value=boundary) for ids in records]
    expected = [evaluate(model, ids) for ids in alone]
    ids = torch.cat([each[1:] for each in alone])
    score = evaluate_records(model, ids, boundary)
    assert score.characters == len(ids)
    assert score.nats == pytest.approx(sum(each.nats for each in expected), rel=1e-5)
    for nats, each in zip(record_surprisals(model, records, boundary), expected, strict=True):
        assert (len(nats), float(nats.sum())) == (each.characters, pytest.approx(each.nats, rel=1e-5))
    cut = evaluate_records(model, ids[:-3], boundary)
    assert cut.characters == len(ids) - 3 and cut.nats < score.nats


def test_the_probabilities_of_all_records_add_up_to_one_at_most():
    model, sums = make_model(3, ModelConfig(hidden_size=6, embedding_size=3)).initialise(0), []
    for length in range(7):
        records = (
            list(torch.cartesian_prod(*[torch.arange(2)] * length).view(-1, length))
            if length
            else [torch.empty(0, dtype=torch.int64)]
        )
        assert len(records) == 2**length
        nats = record_surprisals(model, records, boundary=2)
        sums.append(sum(float((-each.sum()).exp()) for each in nats))
    # The boundary ends a record with about 1/3 at each character.
    assert 0.8 < sum(sums) < 1 + 1e-6 and all(sums)


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_a_model_in_training_mode_is_scored_without_dropout_and_its_mode_is_restored(direction):
    model, ids = make(direction=direction, num_layers=2, dropout=0.5), torch.randint(9, (50,))

    def scores():
        return evaluate(model, ids), evaluate_each(model, [ids]), text_surprisals(model, ids).nansum()

    model.eval()
    expected = scores()
    model.train()
    assert scores() == expected
    assert model.training
    with pytest.raises(IndexError):
        evaluate(model, torch.tensor([1, 99]))
    assert model.training


def test_interleaved_scorings_are_without_dropout():
    model = make(num_layers=2, dropout=0.5).train()
    texts = [torch.randint(9, (4, 10)) for _ in range(2)]
    alone = [torch.cat(list(surprisals(model, text)))[1:] for text in texts]
    first, second = surprisals(model, texts[0][:2]), surprisals(model, texts[1])
    parts = [next(first), next(second)]
    assert model.training, "dropout is on between two blocks"
    found = [torch.cat([parts[0], *first])[1:], torch.cat([parts[1], *second])[1:]]
    assert torch.equal(found[0], alone[0][:19]) and torch.equal(found[1], alone[1])
    assert model.training


@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_a_character_of_the_unknown_class_costs_the_class_and_a_uniform_choice(direction):
    model = make(direction=direction).eval()
    model.unknown = UnknownClass(4, 3)
    ids = torch.randint(9, (1003,))
    read = ids.flip(0) if direction == "backward" else ids
    logits = model(read[None], model.initial_state(1))[0][0]
    if direction != "both":
        logits, read = logits[:-1], read[1:]
    probabilities = logits.detach().softmax(-1).double()
    each = probabilities.clone()
    each[:, 4] /= 3  # of each of the three kinds
    assert torch.allclose(each.sum(1) + 2 * each[:, 4], probabilities.sum(1))
    naive = -each[torch.arange(len(read)), read].log()
    expected = pytest.approx(float(naive.sum()), rel=1e-6)
    assert evaluate(model, ids).nats == expected
    assert evaluate_each(model, [ids[:40], ids])[1].nats == expected
    found = text_surprisals(model, ids)
    found = found.flip(0) if direction == "backward" else found
    assert torch.allclose(found[-len(naive) :], naive, atol=1e-4)


@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
@pytest.mark.parametrize("chunk", [33, 4096])
def test_segments_give_the_same_as_the_carried_state(cell, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    model = make(cell=cell, num_layers=2).eval()
    ids = torch.randint(9, (1003,))
    batch_sizes, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda x, state: batch_sizes.append(len(x)) or forward(x, state))
    with torch.inference_mode():
        start = tuple(torch.rand_like(part) for part in model.initial_state(1))
        found, state, settled = module.read_long(model, ids, start)
        assert 8 in batch_sizes and settled
        logits, expected = model(ids[None, :-1], start)
        nats = F.cross_entropy(logits[0], ids[1:], reduction="none").double()
    assert torch.allclose(found, nats, atol=1e-4)
    assert float(found.sum()) == pytest.approx(float(nats.sum()), rel=1e-6)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(state, expected, strict=True))


@pytest.mark.usefixtures("short_segments")
def test_a_model_that_does_not_forget_is_read_without_segments(monkeypatch):
    model = CharLM(9, ModelConfig(hidden_size=6, embedding_size=3)).initialise(0).eval()
    with torch.no_grad():  # the forget gates are open: the state depends on the whole past
        model.get_parameter("recurrent.bias_ih_l0")[6:12] = 30.0
    ids = torch.randint(9, (1003,))
    assert not module.read_long(model, ids, model.initial_state(1))[2]
    score = evaluate(model, ids)
    monkeypatch.setattr(module, "SEGMENTS_MAX", {"cpu": 1})
    assert score.nats == pytest.approx(evaluate(model, ids).nats, rel=1e-6)
