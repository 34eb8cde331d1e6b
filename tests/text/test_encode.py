import hashlib
from collections import Counter

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from charlm.errors import CharlmError
from charlm.text.encode import Encoder, smallest_dtype
from charlm.text.vocab import UNKNOWN, Vocab

TEXTS = st.lists(st.text(st.sampled_from("abc ñ中\U0010ffff"), max_size=9), max_size=6)
SPLITS = st.sampled_from([(0.9, 0.05, 0.05), (0.5, 0.25, 0.25), (0.6, 0.4, 0.0)])


@pytest.fixture(autouse=True, scope="module")
def _pieces():
    """Short texts take several pieces too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("charlm.text.encode._CHUNK", 3)
        yield


def naive(content, split, min_count=1):
    """The vocabulary, the three splits' ids, the number of characters left out."""
    first, second = round(len(content) * split[0]), round(len(content) * (split[0] + split[1]))
    counts = Counter(content[:first])
    kept = [char for char in counts if counts[char] >= min_count and (char != UNKNOWN or min_count == 1)]
    vocab = "".join(sorted(kept, key=lambda char: (-counts[char], char)))
    parts = content[:first], content[first:second], content[second:]
    if len(kept) < len(counts):
        parts = ["".join(char if char in kept else UNKNOWN for char in part) for part in parts]
        vocab += UNKNOWN
    ids = [[vocab.index(char) for char in part if char in vocab] for part in parts]
    return vocab, ids, len(content) - sum(map(len, ids))


@pytest.mark.parametrize("count", [252, 253, 254, 255, 300])
def test_pieces_in_latin_1_among_many_characters(count):
    pieces = ["ab" + "".join(chr(0x4E00 + k) for k in range(count)), "abba", "é", "éab"]
    encoder = Encoder()
    for piece in pieces:
        encoder.add(piece)
    vocab, ids, _ = naive("".join(pieces), (1.0, 0.0, 0.0))
    encoded = encoder.finish((1.0, 0.0, 0.0))
    assert (encoded.vocab.characters, encoded.in_memory().tolist()) == (vocab, ids[0])


@settings(max_examples=40, deadline=None)
@given(TEXTS, SPLITS, TEXTS, st.sampled_from([None, 0, 8]))
@example(["abcñ"], (0.5, 0.25, 0.25), [], 0)
def test_ids_equal_those_of_a_naive_loop(tmp_path_factory, pieces, split, taken_back, limit):
    content = "".join(pieces)
    encoder = Encoder(limit, tmp_path_factory.getbasetemp)
    half = len(pieces) // 2
    for piece in pieces[:half]:
        encoder.add(piece)
    take_back = encoder.mark()
    for piece in taken_back:
        encoder.add(piece)
    take_back()
    for piece in pieces[half:]:
        encoder.add(piece)
    assert encoder.blank == (not content or content.isspace())
    vocab, ids, unseen = naive(content, split)
    if not vocab:
        with pytest.raises(CharlmError, match="empty"):
            encoder.finish(split)
        encoder.close()
        return
    encoded = encoder.finish(split)
    assert encoded.vocab.characters == vocab
    assert (encoded.sizes, encoded.unseen) == (tuple(map(len, ids)), unseen)
    assert encoded.in_memory().tolist() == [*ids[0], *ids[1], *ids[2]]
    assert encoded.fingerprint == hashlib.sha256(content.encode()).hexdigest()
    encoder.close()


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("aaaabbc ñ中\U0010ffff\ufffd"), min_size=1), SPLITS, st.integers(2, 4))
@example("aab\ufffd\ufffd\ufffd", (0.6, 0.4, 0.0), 2)
@example("aabbcc中", (0.9, 0.05, 0.05), 2)
def test_rare_characters_become_one_class_and_then_none_is_left_out(content, split, min_count):
    encoder = Encoder()
    encoder.add(content)
    vocab, ids, unseen = naive(content, split, min_count)
    if vocab in ("", UNKNOWN):
        with pytest.raises(CharlmError, match="min_count|empty"):
            encoder.finish(split, min_count=min_count)
        return
    encoded = encoder.finish(split, min_count=min_count)
    assert encoded.vocab.characters == vocab
    assert encoded.in_memory().tolist() == [*ids[0], *ids[1], *ids[2]] and encoded.unseen == unseen
    merged = set(content[: len(ids[0])]) - set(encoded.vocab.decode(encoded.vocab.writable))
    assert encoded.vocab.unknown == ((len(vocab) - 1, len(merged)) if merged else None)
    assert unseen == 0 or not merged


@pytest.mark.parametrize(
    ("known", "min_count", "expected", "kinds"),
    [
        (Vocab("ba"), 2, "ba\ufffd", 2),  # "c" occurs twice, and the vocabulary is fixed
        (Vocab("abcd"), 2, "abcd\ufffd", 1),  # always a class
        (Vocab("b\ufffda", 7), 1, "b\ufffda", 7),
        (Vocab("zdbca"), 1, "zdbca", 0),
    ],
)
def test_a_fixed_vocabulary_stays_as_it_is(known, min_count, expected, kinds):
    encoder = Encoder()
    encoder.add("aabbcc" * 3 + "d")
    encoded = encoder.finish((1.0, 0.0, 0.0), known, min_count=min_count, fixed=True)
    assert encoded.vocab.characters == expected
    assert (encoded.vocab.unknown.kinds if kinds else encoded.vocab.unknown) == (kinds or None)
    again = encoder.finish((1.0, 0.0, 0.0), encoded.vocab, min_count=min_count, fixed=True)
    assert (again.vocab.characters, again.vocab.unknown) == (expected, encoded.vocab.unknown)


def test_a_fixed_vocabulary_that_lacks_characters_is_refused():
    encoder = Encoder()
    encoder.add("ab" * 20 + "".join(map(chr, range(0x4E00, 0x4E0A))))
    with pytest.raises(CharlmError, match=r"10 characters.*U\+4E00.*and 2 more.*min_count") as caught:
        encoder.finish((0.5, 0.25, 0.25), Vocab("ab"), fixed=True)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_with_a_class_takes_the_frequent_characters_of_another_text():
    encoder = Encoder()
    encoder.add("aaa" + "ccc" + "dd" + "e")
    encoded = encoder.finish((1.0, 0.0, 0.0), Vocab("\ufffdab", 5), min_count=2)
    assert encoded.vocab.characters == "\ufffdabcd" and encoded.vocab.unknown == (0, 5)
    assert encoded.in_memory().tolist() == [1] * 3 + [3] * 3 + [4] * 2 + [0]


def test_the_type_of_ids_grows_with_the_vocabulary(tmp_path, monkeypatch):
    monkeypatch.setattr("charlm.text.encode._CHUNK", 1000)
    content = "".join(map(chr, (*range(0x4E00, 0x4E00 + 200), *range(0x10000, 0x10000 + 33_000)))) * 2
    for limit in (None, 5000):
        encoder = Encoder(limit, lambda: tmp_path)
        encoder.add(content)
        encoded = encoder.finish((0.5, 0.5, 0.0))
        assert encoded.dtype == torch.int32 == smallest_dtype(33_200)
        assert encoded.vocab.characters == content[:33_200]
        ids = encoded.in_memory()
        assert torch.equal(ids[:33_200], ids[33_200:])
        assert encoded.vocab.decode(ids[:33_200]) == content[:33_200]
        encoder.close()
    assert not list(tmp_path.iterdir()), "the file has no name"


def test_characters_unseen_in_train_are_left_out():
    many = "".join(chr(0x4E00 + k) for k in range(300))  # two bytes an id at first, one in the end
    encoder = Encoder()
    encoder.add("ab" * 900 + many)
    encoded = encoder.finish((0.75, 0.25, 0.0))
    assert (encoded.vocab.characters, encoded.sizes, encoded.unseen) == ("ab", (1575, 225, 0), 300)
    assert encoded.dtype == torch.uint8
    assert encoded.in_memory().tolist() == [0, 1] * 900
