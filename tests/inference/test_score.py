import math

import pytest

from charlm.config import CorpusConfig, ModelConfig
from charlm.inference import score as scoring
from charlm.inference.evaluate import evaluate, evaluate_records
from charlm.inference.score import most_surprising, score, score_records
from charlm.nn.model import make_model
from charlm.text.vocab import Vocab

VOCAB = Vocab(" ab\nñ\tc")
TEXT = "  ab ba\n\nañ\tb  \nca" * 3


@pytest.fixture(params=["forward", "backward", "both"])
def model(request):
    options = ModelConfig(direction=request.param, hidden_size=6, embedding_size=3)
    return make_model(len(VOCAB), options).initialise(0)


@pytest.mark.parametrize("kind", ["char", "word", "line"])
@pytest.mark.parametrize("size", [1, 5, 100])
def test_units_join_to_the_text_and_their_bits_sum_to_those_of_evaluate(model, kind, size):
    pieces = (TEXT[k : k + size] for k in range(0, len(TEXT), size))
    units = list(score(model, VOCAB, pieces, kind))
    whole = evaluate(model, VOCAB.encode(TEXT))
    assert "".join(unit.text for unit in units) == TEXT
    assert [TEXT[unit.start :][: len(unit.text)] for unit in units] == [unit.text for unit in units]
    assert sum(unit.characters for unit in units) == whole.characters
    bits = sum(unit.bits or 0 for unit in units)
    assert bits == pytest.approx(whole.nats / math.log(2), rel=1e-6)
    if kind == "line":
        assert [unit.text for unit in units] == TEXT.splitlines(keepends=True)
    if kind == "word":
        assert [unit.text.strip() for unit in units] == TEXT.split()
    silent = [unit.start for unit in units if unit.bits is None]
    nowhere = {"forward": [0], "backward": [len(TEXT) - 1], "both": []}[model.config.direction]
    assert silent == (nowhere if kind == "char" else [])


@pytest.mark.parametrize("kind", ["char", "word", "line"])
@pytest.mark.parametrize("known", [0, 2**16])
def test_records_are_scored_alone_and_equal_ones_equally(monkeypatch, kind, known):
    monkeypatch.setattr(scoring, "_KNOWN", known)
    read, record_surprisals = [], scoring.record_surprisals
    monkeypatch.setattr(
        scoring, "record_surprisals", lambda m, ids, b: read.extend(ids) or record_surprisals(m, ids, b)
    )
    lines, corpus = ["ab ba", "", "a", "ñab", "ab ba", "b", "ab ba"], CorpusConfig(records="line")
    model = make_model(len(VOCAB), ModelConfig(hidden_size=6, embedding_size=3)).initialise(0)
    text = "\n".join(lines)
    units = list(score_records(model, VOCAB, [text[:9], text[9:]], corpus, kind))
    full = [line for line in lines if line]
    assert not known or len(read) == len(set(full)), "equal ones are read once"
    assert "".join(unit.text for unit in units) == "\n".join(full) + "\n"
    assert all(text[unit.start :].startswith(unit.text.removesuffix("\n")) for unit in units)
    assert sum(unit.characters for unit in units) == sum(len(line) + 1 for line in full)
    ids = VOCAB.encode("\n".join(full) + "\n")
    whole = evaluate_records(model, ids, VOCAB.characters.index("\n"))
    assert sum(unit.bits for unit in units) * math.log(2) == pytest.approx(whole.nats, rel=1e-5)
    if kind == "line":
        assert [unit.text[:-1] for unit in units] == full
        bits = [unit.bits for unit in units if unit.text == "ab ba\n"]
        assert len(bits) == 3 and bits == pytest.approx([bits[0]] * 3, rel=1e-6 if not known else 0)


def test_records_between_delimiters_can_have_line_ends():
    vocab, corpus = Vocab("ab\n\x1e"), CorpusConfig(records="<>")
    model = make_model(len(vocab), ModelConfig(hidden_size=6, embedding_size=3)).initialise(0)
    units = list(score_records(model, vocab, ["a\nb <", ">\nb"], corpus, "line"))
    assert [(unit.start, unit.text, unit.characters) for unit in units] == [
        (0, "a\nb\x1e", 4),
        (7, "b\x1e", 2),
    ]


@pytest.mark.parametrize("kind", ["word", "line"])
def test_a_unit_of_any_length_is_searched_once(monkeypatch, kind):
    seen, pattern = [], scoring._ENDS[kind]

    class Noting:
        def finditer(self, text, begin):
            seen.append(len(text))
            return pattern.finditer(text, begin)

    monkeypatch.setitem(scoring._ENDS, kind, Noting())
    pieces = [("abc", [1.0, 2.0, 3.0])] * 50
    (unit,) = scoring._units(iter([*pieces, ("", [])]), kind)
    assert (unit.text, unit.characters) == ("abc" * 50, 150) and sum(seen) <= 50 * 4 + 1


def test_unknown_characters_are_skipped_or_raise_an_error():
    model = make_model(len(VOCAB), ModelConfig(hidden_size=6, embedding_size=3)).initialise(0)
    units = list(score(model, VOCAB, ["aXb", "Y", "a"], unknown="skip"))
    assert "".join(unit.text for unit in units) == "aba"
    with pytest.raises(Exception, match="position 3"):
        list(score(model, VOCAB, ["abb", "Y"]))


@pytest.mark.parametrize("unknown", ["error", "skip"])
def test_a_character_of_the_unknown_class_is_shown_as_it_is_in_the_text(model, unknown):
    vocab = Vocab(" ab\n\ufffd\tc", 3)
    text = "ab Ωa\ufffdb" * 20
    units = list(score(model, vocab, [text[:30], text[30:]], unknown=unknown))
    kept = text if unknown == "error" else text.replace("Ω", "").replace("\ufffd", "")
    assert "".join(unit.text for unit in units) == kept


def test_most_surprising_ranks_by_bits_or_by_bits_per_character():
    model = make_model(len(VOCAB), ModelConfig(hidden_size=6, embedding_size=3)).initialise(0)
    lines = [("x", unit) for unit in score(model, VOCAB, [TEXT], "line")]
    found = most_surprising(lines, 2, each_character=True)
    assert found == sorted(lines, key=lambda row: -row[1].bits / row[1].characters)[:2]
    assert most_surprising(lines, 99, False) == sorted(lines, key=lambda row: -row[1].bits)
