import hashlib
import tracemalloc
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from charlm.config import CorpusConfig
from charlm.errors import CharlmError
from charlm.text import corpus as corpus_module
from charlm.text.clean import clean
from charlm.text.corpus import Corpus
from charlm.text.decode import decode
from charlm.text.vocab import Vocab
from conftest import PIECES, strip_gutenberg


def test_splits_are_contiguous_and_complete(words):
    corpus = Corpus.from_text(words, (0.8, 0.15, 0.05))
    assert (len(corpus.train), len(corpus.val), len(corpus.test)) == (1600, 300, 100)
    assert corpus.vocab.decode(torch.cat([corpus.train, corpus.val, corpus.test])) == words
    assert corpus.unseen == 0


def test_the_vocabulary_is_that_of_the_train_split():
    corpus = Corpus.from_text("ab" * 40 + "aZbabababa" + "bZZa!!!abb", (0.8, 0.1, 0.1))
    assert corpus.vocab.characters == "ab"
    assert corpus.vocab.decode(corpus.val) == "ababababa"
    assert corpus.vocab.decode(corpus.test) == "baabb"
    assert corpus.unseen == 6


@pytest.mark.parametrize(("size", "dtype"), [(256, torch.uint8), (257, torch.int16), (40_000, torch.int32)])
def test_ids_have_the_smallest_type(size, dtype):
    content = "".join(chr(0x10000 + i) for i in range(size))
    corpus = Corpus.from_text(content * 2, (0.5, 0.5, 0.0))
    assert corpus.train.dtype == dtype
    assert corpus.vocab.decode(corpus.val) == content


def test_load_reads_cleans_and_limits(folder):
    (folder / "a.txt").write_text("Él dijo: ¡SÍ!\n" * 30)
    corpus = Corpus.load(CorpusConfig(source="a.txt", keep="A-ZÍÉa-zíé", lowercase=True, max_chars=100))
    assert (
        corpus.vocab.decode(torch.cat([corpus.train, corpus.val, corpus.test])) == ("él dijo sí " * 30)[:100]
    )
    assert [path.name for path in corpus.files] == ["a.txt"]


def test_corpus_start_skips_the_text_before_it(folder):
    (folder / "a.txt").write_text("Licence.\nPrologue.\nEn un lugar: " + "uno dos " * 20)
    corpus = Corpus.load(CorpusConfig(source="a.txt", start="En un lugar", lowercase=True, max_chars=40))
    assert (
        corpus.vocab.decode(torch.cat([corpus.train, corpus.val, corpus.test]))
        == ("en un lugar: " + "uno dos " * 9)[:40]
    )
    with pytest.raises(CharlmError, match=r"corpus\.start is 'Érase'.*a\.txt"):
        Corpus.load(CorpusConfig(source="a.txt", start="Érase"))


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_text_is_refused(folder, content):
    (folder / "void.txt").write_text(content)
    with pytest.raises(CharlmError, match=r"empty.*void\.txt"):
        Corpus.load(CorpusConfig(source="void.txt"))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(PIECES, min_size=1, max_size=3),
    st.sampled_from(["NFC", "NFKD", "none"]),
    st.booleans(),
    st.sampled_from([None, "A-ZÉΣa-zéσς"]),
    st.sampled_from([None, "a"]),
    st.sampled_from([None, 12]),
    st.booleans(),
)
def test_reading_in_pieces_equals_reading_at_once(
    tmp_path_factory, files, normalize, lowercase, keep, start, max_chars, framed
):
    with (
        pytest.MonkeyPatch.context() as patch,
        TemporaryDirectory(dir=tmp_path_factory.getbasetemp()) as name,
    ):
        for what, value in (("read._PIECE", 5), ("encode._CHUNK", 4), ("corpus.IN_MEMORY", 20)):
            patch.setattr(f"charlm.text.{what}", value)
        patch.setenv("XDG_CACHE_HOME", name)
        whole = ""
        for number, pieces in enumerate(files):
            content = "".join(pieces)
            frame = (
                f"*** START OF THE PROJECT GUTENBERG EBOOK\n{content}\n*** END OF THE PROJECT GUTENBERG EBOOK"
            )
            Path(name, f"{number}.txt").write_bytes((frame if framed else content).encode())
            content = decode((content if not framed else frame).encode(), "")
            content = strip_gutenberg(content)
            whole += content + "\n" * (content != "" and content[-1] != "\n")
        begin = whole.find(start or "")  # in the text before cleaning
        whole = clean(whole[begin:], normalize, lowercase, keep)[:max_chars] if begin >= 0 else ""
        config = CorpusConfig(
            source=name, normalize=normalize, lowercase=lowercase, keep=keep, start=start, max_chars=max_chars
        )
        try:
            expected = Corpus.from_text(whole)
            assert whole.strip()
        except (CharlmError, AssertionError):
            with pytest.raises(CharlmError):
                Corpus.load(config)
            return
        corpus = Corpus.load(config)
        for split in ("train", "val", "test"):
            assert torch.equal(getattr(corpus, split), getattr(expected, split))
        assert corpus.vocab.characters == expected.vocab.characters
        assert (corpus.unseen, corpus.fingerprint) == (expected.unseen, expected.fingerprint)


def test_the_fingerprint_depends_on_the_text_only(words):
    assert Corpus.from_text(words).fingerprint == Corpus.from_text(words).fingerprint
    assert Corpus.from_text(words).fingerprint != Corpus.from_text(words + "a").fingerprint


def test_a_long_text_is_split_and_encoded_in_little_memory(words):
    content = words * 2000  # ñ and é: a byte a character in Python's memory, two in UTF-8
    tracemalloc.start()
    corpus = Corpus.from_text(content)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * len(content), "the splits' text, and no other copy"
    assert corpus.fingerprint == hashlib.sha256(content.encode()).hexdigest()


def test_repeated_files_and_val_inside_train_are_noted(folder, words):
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text(words)
    corpus = Corpus.load(CorpusConfig(source=["a.txt", "b.txt"]))
    assert any("b.txt has the same content as a.txt" in note for note in corpus.notes)
    corpus = Corpus.load(CorpusConfig(source=["a.txt", "b.txt"], split=(0.5, 0.5, 0.0)))
    assert any("val is in train" in note for note in corpus.notes)
    assert Corpus.load(CorpusConfig(source="a.txt", split=(0.4, 0.6, 0.0))).notes == ()


def test_a_vocabulary_can_begin_with_known_characters(folder):
    (folder / "a.txt").write_text("cab" * 60 + "d")
    corpus = Corpus.load(CorpusConfig(source="a.txt", split=(0.5, 0.5, 0.0)), known=Vocab("zdb"))
    assert corpus.vocab.characters == "zdbca"
    assert corpus.unseen == 1 and corpus.vocab.decode(corpus.val).endswith("d"), "only the line end is unseen"


@pytest.mark.parametrize(
    ("own", "sizes"), [({"val"}, (950, 5, 50)), ({"test"}, (950, 50, 7)), ({"val", "test"}, (1000, 5, 7))]
)
def test_val_and_test_can_be_texts_of_their_own(folder, own, sizes):
    text = "abcdefghij" * 100
    for name, content in (("a", text), ("val", "jjbb\n"), ("test", "ccddZd\n")):
        (folder / f"{name}.txt").write_text(content)
    given = {name: f"{name}.txt" for name in own}
    corpus = Corpus.load(CorpusConfig(source="a.txt", max_chars=1000, **given))
    splits = {"train": corpus.train, "val": corpus.val, "test": corpus.test}
    decoded = {name: corpus.vocab.decode(ids) for name, ids in splits.items()}
    unseen = {"val": 1, "test": 2}  # the line end, and Z
    assert tuple(map(len, decoded.values())) == tuple(
        size - unseen[name] * (name in own) if name in unseen else size
        for name, size in zip(decoded, sizes, strict=True)
    )
    assert decoded["train"] == text[: sizes[0]]
    assert "val" not in own or decoded["val"] == "jjbb"
    assert "test" not in own or decoded["test"] == "ccddd"


def test_a_long_file_is_not_read_beyond_max_chars(folder, monkeypatch):
    monkeypatch.setattr(corpus_module, "_BEGINNING", 10)
    Path("long.txt").write_text("a line of text\n" * 10**6)
    read = []
    config = CorpusConfig(source="long.txt", max_chars=1000)
    found = Corpus.load(config, lambda count, total: read.append(count))
    assert len(found.train) + len(found.val) + len(found.test) == 1000
    assert sum(read) < 8 * 10**6
