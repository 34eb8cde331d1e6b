import bz2
import gzip
import hashlib
import io
import lzma
import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from charlm.config import CorpusConfig
from charlm.errors import CharlmError
from charlm.text import read
from charlm.text.clean import clean
from charlm.text.corpus import Corpus
from conftest import ROOT, cut, strip_gutenberg


@pytest.mark.parametrize(
    ("ending", "compress"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), ("", bytes)],
)
def test_compressed_files_are_read(tmp_path, ending, compress):
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(compress("él\r\n".encode() * 50))
    assert "".join(read.TextFile(path).pieces()) == "él\n" * 50
    if ending:
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(CharlmError, match="cannot read .*a.txt"):
            "".join(read.TextFile(path).pieces())


def test_gutenberg_licence_is_removed_only_with_both_markers():
    start, end = (
        "*** START OF THE PROJECT GUTENBERG EBOOK X ***",
        "*** END OF THE PROJECT GUTENBERG EBOOK X ***",
    )
    framed = f"Licence\n{start}\n\n\nThe text.\nIts end.\n\n{end}\nMore licence\n"
    assert strip_gutenberg(framed) == "The text.\nIts end.\n"
    assert (
        strip_gutenberg(framed.replace("THE P", "THIS P").replace("*** ", "***")) == "The text.\nIts end.\n"
    )
    stars = f"***\n****\nof a line: {start}\n"
    assert strip_gutenberg(f"{stars}{start}\nIt.\n***\nso {end}\n{end}\n") == f"It.\n***\nso {end}\n"
    for part in (f"{start}\nThe text\n", f"The text\n{end}\n", f"{end}\nThe text\n{start}\n", "The text\n"):
        assert strip_gutenberg(part) == part


START = "*** START OF THE PROJECT GUTENBERG EBOOK"
END = "***END of this project Gutenberg ebook"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([START, END, "\n", "\n\n", "***", "* ", "a", f"\n{START} X ***\n", f"\n{END}"]))
)
@example([START, " of a line", "\n", "\n\n", END])
def test_gutenberg_licence_is_removed_in_pieces(pieces):
    whole = "".join(pieces)
    start = re.search(r"^\*\*\* ?START OF THE PROJECT GUTENBERG EBOOK.*$", whole, re.M)
    end = (
        re.compile(r"^\*\*\*END of this project Gutenberg ebook", re.M).search(whole, start.end())
        if start
        else None
    )
    expected = whole[start.end() : end.start()].strip("\n") + "\n" if end else whole
    for size in (1, 5, 1000):
        found = []
        for piece in read.strip_pieces(lambda size=size: cut(whole, size)):
            found = [] if piece is None else [*found, piece]
        assert "".join(found) == expected


def test_sources_are_files_folders_globs_and_lists(folder):
    (folder / "books/deep").mkdir(parents=True)
    for name in ("books/b.txt", "books/deep/a.txt.gz", "books/notes.md"):
        (folder / name).write_bytes(b"x")

    def found(source):
        return [path.as_posix() for path in read.find_files(source).files]

    assert found("books") == ["books/b.txt", "books/deep/a.txt.gz"]
    assert found("books/*") == ["books/b.txt", "books/notes.md"]
    assert found("**/*.txt") == ["books/b.txt", "corpus.txt"]
    assert found(["corpus.txt", "books", "corpus.txt"]) == [
        "corpus.txt",
        "books/b.txt",
        "books/deep/a.txt.gz",
    ]
    assert found("books/notes.md") == ["books/notes.md"]
    assert found("sancho")[0].endswith("data/sancho.txt")
    (folder / "sancho").write_text("a file goes before the bundled name")
    assert found("sancho") == ["sancho"]


def test_hidden_files_of_a_folder_are_not_read(folder):
    for name in ("a.txt", "._a.txt", ".ipynb_checkpoints/a-checkpoint.txt", "b.md"):
        path = folder / "books" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    found = read.find_files("books")
    assert [path.as_posix() for path in found.files] == ["books/a.txt"] and found.left == 3


def test_a_folder_of_other_files_names_the_glob_that_reads_them(folder):
    for name in ("a.py", "b.py", "c.md", ".d.rst"):
        (folder / "src").mkdir(exist_ok=True)
        (folder / "src" / name).write_bytes(b"x")
    with pytest.raises(CharlmError, match=r"2 \.py files, give 'src/\*\*/\*\.py'"):
        read.find_files("src")
    assert len(read.find_files("src/**/*.py").files) == 2


@pytest.mark.parametrize("source", ["no.txt", "no/*.txt", "empty"])
def test_a_source_without_files_is_refused(folder, source):
    (folder / "empty").mkdir()
    with pytest.raises(CharlmError, match=source.replace("*", r"\*")):
        read.find_files(source)


def test_files_are_joined_with_a_line_end_between(folder):
    for name, content in (("1.txt", "uno"), ("2.txt", ""), ("3.txt", "tres\n")):
        (folder / name).write_text(content)
    corpus = Corpus.load(CorpusConfig(source="?.txt", split=(0.9, 0.1, 0)))
    assert corpus.vocab.decode(torch.cat([corpus.train, corpus.val])) == "uno\ntres\n"


def test_the_bundled_corpus_agrees_with_its_readme():
    data = (ROOT / "data/sancho.txt").read_bytes()
    readme = (ROOT / "data/README.md").read_text()
    content = data.decode()
    assert clean(content) == content, "NFC, and nothing to clean"
    assert f"| {len(content):,} |" in readme and f"| {len(data):,} |" in readme
    assert hashlib.sha256(data).hexdigest() in readme
    ratio = len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)
    assert len(content) >= 90_000 and ratio > 0.32, "prose, not repetition"
    paragraphs = content.split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs)


MARK = "*** {} OF THE PROJECT GUTENBERG EBOOK X ***\n"
BOOK = f"licence\n{MARK.format('START')}\n\nÉrase una\nvez\n\n{MARK.format('END')}more\n"


@pytest.mark.parametrize("content", [BOOK, "\ufeff" + BOOK, BOOK.replace("END OF", "end"), "plain\n\n", ""])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_file_read_in_pieces_equals_the_clean_text(tmp_path, monkeypatch, content, name):
    monkeypatch.setattr(read, "_PIECE", 5)
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else content.encode())
    whole = clean(strip_gutenberg("".join(read.TextFile(path).pieces())), keep="a-zÉ ")
    assert "".join(read.read_clean(read.TextFile(path).pieces, {"keep": "a-zÉ "})) == whole


@pytest.mark.parametrize("line", ["señor mío\n", "hola ", "ΟΔΟΣ\n"])
def test_stdin_is_read_without_waiting_for_more(line):
    class Typed(io.BytesIO):
        """Returns a line at a time, and records the text yielded before each read."""

        def read1(self, size=-1):
            shown.append("".join(given))
            return self.readline() if line.endswith("\n") else self.read(len(line.encode()))

    given, shown = [], []
    for piece in read.read_clean_stdin(Typed(line.encode() * 3), {"lowercase": True}):
        given.append(piece)
    assert shown == [line.lower() * count for count in range(4)]
