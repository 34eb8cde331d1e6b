"""Texts that are records: how they are split at line ends or a delimiter, shuffled and encoded."""

from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from charlm.config import CorpusConfig
from charlm.errors import CharlmError
from charlm.text.corpus import Corpus
from charlm.text.records import in_records
from conftest import cut

NAMES = [f"{first}{second}{third}" for first in "abcde" for second in "fghij" for third in ("", "k", "lm")]
DELIMITERS = st.sampled_from(["line", "\n\n", "aba", "<|end|>", "\x1e"])


@given(st.text("ab \n\x1e<|end>", max_size=60), DELIMITERS, st.integers(1, 9))
def test_records_in_pieces_are_those_of_the_whole_text(text, records, size):
    config = CorpusConfig(records=records)
    text += config.separator
    found = list(chain.from_iterable(in_records(cut(text, size), config)))
    naive = text.split(config.separator)[:-1]
    if records != "line":
        naive = [part.strip().replace("\x1e", " ") for part in naive]
    assert [record for _, record in found] == [part for part in naive if part.strip()]
    for place, record in found:
        assert text[place : place + len(record)].replace("\x1e", " ") == record.replace("\x1e", " ")


@pytest.mark.parametrize(("records", "boundary"), [("line", "\n"), ("\n\n", "\x1e")])
def test_whole_records_are_shuffled_and_split(records, boundary):
    separator = "\n" if records == "line" else "\n\n\n"
    corpus = Corpus.from_text(separator.join(NAMES), (0.8, 0.12, 0.08), records)
    splits = [corpus.texts(split) for split in (corpus.train, corpus.val, corpus.test)]
    assert [len(split) for split in splits] == [60, 9, 6]
    assert sorted(chain(*splits)) == sorted(NAMES)
    assert splits[0] != sorted(splits[0])
    for split in (corpus.train, corpus.val, corpus.test):
        assert corpus.vocab.decode(split[-1:]) == boundary == corpus.vocab.characters[corpus.boundary]
    other = Corpus.from_text(separator.join(NAMES), (0.8, 0.12, 0.08), records, seed=1)
    assert other.fingerprint != corpus.fingerprint and other.texts(other.val) != splits[1]


def load(seed=0, **keys):
    return Corpus.load(CorpusConfig(**{"records": "line", **keys}), seed=seed)


def test_a_file_ends_a_record_and_blank_ones_are_left_out(folder):
    Path("a.txt").write_text("one\r\n\r\n  \ntwo")
    Path("b.txt").write_text("three\n\nfour\n")
    corpus = load(source=["a.txt", "b.txt"], split=(1, 0, 0))
    assert sorted(corpus.texts(corpus.train)) == ["four", "one", "three", "two"]
    corpus = load(source=["a.txt", "b.txt"], split=(1, 0, 0), records="\n\n")
    assert sorted(corpus.texts(corpus.train)) == ["four", "one", "three", "two"]


def test_a_record_that_max_chars_cuts_is_left_out(folder):
    Path("a.txt").write_text("one\ntwo\nthree\n")
    corpus = load(source="a.txt", split=(1, 0, 0), max_chars=11)
    assert sorted(corpus.texts(corpus.train)) == ["one", "two"]


def test_val_and_test_texts_are_records_too(folder):
    for name, text in (("a", "\n".join(NAMES)), ("v", "afk\n\nbg"), ("t", "ci\n")):
        Path(f"{name}.txt").write_text(text)
    corpus = load(source="a.txt", val="v.txt", test="t.txt")
    assert corpus.texts(corpus.val) == ["afk", "bg"] and corpus.texts(corpus.test) == ["ci"]
    assert sorted(corpus.texts(corpus.train)) == sorted(NAMES)


def test_records_on_the_disk_are_those_in_memory(folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    Path("a.txt").write_text("\n".join(NAMES))
    expected = load(source="a.txt")
    monkeypatch.setattr("charlm.text.corpus.IN_MEMORY", 20)
    for _ in range(2):  # written to the cache, and found there
        corpus = load(source="a.txt")
        assert (corpus.fingerprint, corpus.boundary) == (expected.fingerprint, expected.boundary)
        for name in ("train", "val", "test"):
            assert torch.equal(getattr(corpus, name), getattr(expected, name))
    other = load(source="a.txt", seed=1)
    assert other.fingerprint != expected.fingerprint


def test_the_seed_changes_records_only(folder):
    Path("a.txt").write_text("\n".join(NAMES))
    plain = [load(source="a.txt", records=None, seed=seed).fingerprint for seed in (0, 1)]
    assert plain[0] == plain[1]


def test_a_text_of_one_record_is_refused(folder):
    Path("a.txt").write_text("a\nb\n")
    with pytest.raises(CharlmError, match=r"corpus\.records='\\\\n\\\\n'.* 1,") as caught:
        load(source="a.txt", records="\\n\\n")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "noted"),
    [
        ([f"Name {k:04}" for k in range(400)], True),
        ([f"name {k:04}" for k in range(400)][::-1], False),
        ([f"Name {k * 7919 % 400:04}" for k in range(400)], False),
        ([f"Name {k:04}" for k in range(200)], False),
        (["the same"] * 400, False),
    ],
)
def test_lines_in_order_are_noted(folder, lines, noted):
    Path("a.txt").write_text("\n".join(lines))
    for keys in ({"records": None}, {}, {"records": None, "val": "a.txt"}):
        notes = [note for note in load(source="a.txt", **keys).notes if "records=line" in note]
        assert len(notes) == (noted and keys == {"records": None})
