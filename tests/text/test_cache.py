import os
import resource
import threading

import pytest
import torch

from charlm.config import CorpusConfig
from charlm.errors import CharlmError
from charlm.text import cache, corpus, read
from charlm.text.corpus import Corpus
from charlm.text.vocab import Vocab

CONFIG = CorpusConfig(source="corpus.txt", lowercase=True)


@pytest.fixture
def kept(folder, monkeypatch):
    """The folder of encoded texts; every text counts as long, every file as old."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setattr(corpus, "IN_MEMORY", 100)
    monkeypatch.setattr(read, "_TICK", -1)
    return folder / "cache/charlm/corpora"


@pytest.fixture
def built(monkeypatch):
    """How often a text was read and encoded."""
    times = []
    encode = corpus._encode
    monkeypatch.setattr(corpus, "_encode", lambda *arguments: times.append(1) or encode(*arguments))
    return times


def same(one, other):
    splits = all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("train", "val", "test"))
    return splits and (one.vocab.characters, one.unseen, one.fingerprint) == (
        other.vocab.characters,
        other.unseen,
        other.fingerprint,
    )


def test_a_mapped_text_equals_the_text_and_is_used_again(kept, built, words, monkeypatch):
    first = Corpus.load(CONFIG)
    assert same(first, Corpus.from_text(words.lower()))
    assert len(list(kept.iterdir())) == 1 and kept.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(read.TextFile, "digest", None)  # an unchanged file is not read
    second = Corpus.load(CONFIG)
    second.release()
    assert same(first, second) and len(built) == 1


def test_a_mapped_text_has_its_unknown_class(kept, built, folder):
    (folder / "corpus.txt").write_text("abc" * 200 + "def" + "abx" * 30)
    config = CONFIG.model_copy(update={"min_count": 3})
    for _ in range(2):
        assert Corpus.load(config).vocab.unknown == (4, 3)
    fixed = config.model_copy(update={"vocabulary": "abc.txt"})
    for known in (Vocab("abc"), Vocab("abx\n"), Vocab("abc\ufffd", 9), Vocab("abc\ufffd")):
        assert Corpus.load(fixed, known=known).vocab.characters == "".join(
            dict.fromkeys(known.characters + "\ufffd")
        )
    assert len(built) == 5


def test_other_content_or_settings_make_another_entry(kept, built, folder, words):
    Corpus.load(CONFIG)
    for change in ({"lowercase": False}, {"split": (0.8, 0.1, 0.1)}, {"max_chars": 900}, {"keep": "a-z"}):
        Corpus.load(CONFIG.model_copy(update=change))
    assert len(built) == 5
    other = words[-2::-1] + "\n"  # as long
    (folder / "corpus.txt").write_text(other)
    assert same(Corpus.load(CONFIG), Corpus.from_text(other.lower()))
    (folder / "moved.txt").write_text(other)
    Corpus.load(CONFIG.model_copy(update={"source": "moved.txt"}))
    assert len(built) == 6, "the same content under another name is the same text"


def test_a_file_that_may_have_changed_is_hashed_again(kept, built, monkeypatch):
    monkeypatch.setattr(read, "_TICK", 10**12)
    digest, seen = read.TextFile.digest, []
    monkeypatch.setattr(read.TextFile, "digest", lambda file: seen.append(file.path) or digest(file))
    for _ in range(2):
        Corpus.load(CONFIG)
    assert len(built) == len(seen) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[:40],
        lambda data: b"",
        lambda data: data.replace(b'"unseen": 0', b'"unseen": 9'),
        lambda data: b"C" + data[1:],
        lambda data: data[:79] + b"9" * 16 + data[95:],
    ],
)
def test_a_damaged_entry_is_written_again(kept, built, words, damage):
    Corpus.load(CONFIG)
    (path,) = kept.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert path.read_bytes() != whole
    assert same(Corpus.load(CONFIG), Corpus.from_text(words.lower()))
    assert len(built) == 2 and path.read_bytes() == whole


def test_an_entry_of_another_format_is_written_again(kept, built, monkeypatch):
    Corpus.load(CONFIG)
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    Corpus.load(CONFIG)
    assert len(built) == 2


def test_several_processes_can_write_the_same_entry(kept, words):
    begin, found = threading.Barrier(4), []

    def load():
        begin.wait()
        found.append(Corpus.load(CONFIG))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(same(each, Corpus.from_text(words.lower())) for each in found)
    assert len(list(kept.iterdir())) == 1


@pytest.mark.parametrize("most", [3_000, 70_000])
def test_a_full_disk_leaves_no_file(kept, folder, words, most):
    (folder / "corpus.txt").write_text(words * 8)  # 16 KB of ids, put aside; 64 KiB more with the header
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        with pytest.raises(
            CharlmError, match="cannot write .*corpora.*free some space.*XDG_CACHE_HOME"
        ) as caught:
            Corpus.load(CONFIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value) and not list(kept.iterdir())


def test_a_folder_that_others_can_write_to_is_not_used(kept, words, monkeypatch):
    kept.mkdir(parents=True)
    kept.chmod(0o777)
    with pytest.raises(CharlmError, match="XDG_CACHE_HOME"):
        Corpus.load(CONFIG)
    monkeypatch.setattr(corpus, "IN_MEMORY", 10**6)
    assert same(Corpus.load(CONFIG), Corpus.from_text(words.lower())), "a short text needs none"


def test_temporary_files_of_killed_processes_are_removed(kept):
    kept.mkdir(mode=0o700, parents=True)
    for name, age in ((".old.x", 2 * 24 * 3600), (".new.y", 60)):
        (kept / name).write_text("half")
        os.utime(kept / name, (0, (kept / name).stat().st_mtime - age))
    Corpus.load(CONFIG)
    assert {path.name for path in kept.iterdir() if path.name.startswith(".")} == {".new.y"}


def test_the_least_recently_used_texts_are_removed(kept, built, folder, words, monkeypatch):
    monkeypatch.setenv("CHARLM_CACHE_GB", "0.00015")  # two texts: each has a header of 64 KiB
    sources = [CONFIG.model_copy(update={"max_chars": 1000 + k}) for k in range(3)]
    for age, config in zip((2000, 3000), sources, strict=False):
        before = set(kept.iterdir()) if kept.exists() else set()
        Corpus.load(config)
        (path,) = set(kept.iterdir()) - before
        os.utime(path, (0, path.stat().st_mtime - age))
    Corpus.load(sources[1])  # used again, it stays
    Corpus.load(sources[2])
    assert len(list(kept.iterdir())) == 2 and len(built) == 3
    Corpus.load(sources[1])
    assert len(built) == 3
    Corpus.load(sources[0])
    assert len(built) == 4
    assert len(list(kept.iterdir())) == 3, "those used a moment ago stay, whatever the limit"


def test_a_text_larger_than_the_limit_is_cached(kept, built, monkeypatch):
    monkeypatch.setenv("CHARLM_CACHE_GB", "0")
    monkeypatch.setattr("charlm.files._RECENT", -1)
    for _ in range(2):
        Corpus.load(CONFIG)
    assert len(built) == 1


def test_a_pipe_is_read_and_not_cached(kept, folder, words):
    os.mkfifo(folder / "pipe")
    writer = threading.Thread(target=lambda: (folder / "pipe").write_text(words))
    writer.start()
    found = Corpus.load(CONFIG.model_copy(update={"source": "pipe"}))
    writer.join()
    assert same(found, Corpus.from_text(words.lower())) and not list(kept.iterdir())
