import bz2
import gzip
import hashlib
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
from conftest import PIECES, ROOT, cut


def test_line_ends_and_byte_order_mark():
    assert read.decode(b"\xef\xbb\xbfa\r\nb\rc\n", "x") == "a\nb\nc\n"


@pytest.mark.parametrize(
    ("pieces", "waits"),
    [([b"ab\n", b"c"], False), ([b"a", b"\xef"], False), ([b"\xef\xbb\xbf", b"a"], False),
     ([b"\xef", b"\xbb", b"\xbfa"], True)],
)  # fmt: skip
def test_a_beginning_waits_only_for_a_byte_order_mark(pieces, waits):
    """What is typed is shown, however short."""
    given = []
    first = next(read.decode_pieces((given.append(piece) or piece for piece in pieces), "x"))
    assert len(given) == (3 if waits else 1) and first == ("a" if waits else pieces[0].decode("utf-8-sig"))


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (b"abc\xff", ["0xff", "offset 3"]),
        (b"\xef\xbb\xbfab\xe9 c", ["0xe9", "offset 5"]),
        (b"\xc3", ["0xc3", "offset 0"]),
        ("año".encode("utf-16"), ["UTF-16", "iconv"]),
        (b"ELF\0\1", ["binary file", "offset 3"]),
    ],
)
def test_what_is_no_utf8_is_refused_with_its_place(data, parts):
    with pytest.raises(CharlmError) as caught:
        read.decode(data, "book.txt")
    assert all(part in str(caught.value) for part in ["book.txt", *parts])


@pytest.mark.parametrize(
    ("ending", "compress"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), ("", bytes)],
)
def test_compressed_files(tmp_path, ending, compress):
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(compress("él\r\n".encode() * 50))
    assert read.read_file(path) == "él\n" * 50
    if ending:
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(CharlmError, match="cannot read .*a.txt"):
            read.read_file(path)


@pytest.mark.parametrize(
    ("data", "encoding"),
    [("a".encode("utf-32"), "UTF-32"), (b"\0\0\xfe\xff\0\0\0a", "UTF-32"), (b"\xfe\xff\0a", "UTF-16")],
)
def test_other_encodings_are_named(data, encoding):
    with pytest.raises(CharlmError, match=f"is {encoding}, .* iconv -f {encoding}"):
        read.decode(data, "x")


@settings(max_examples=60, deadline=None)
@given(PIECES, st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1"]), st.integers(1, 5))
@example(["a\r", "\n\r\r\n\r"], "utf-8-sig", 1)
@example(["\ufeff", "a\ufeff"], "utf-8", 1)
def test_decoding_in_pieces(pieces, encoding, size):
    data = "".join(pieces).encode(encoding, "replace")
    try:
        assert b"\0" not in data
        whole = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except (UnicodeDecodeError, AssertionError) as error:
        with pytest.raises(CharlmError) as caught:
            "".join(read.decode_pieces(cut(data, size), "x"))
        if isinstance(error, UnicodeDecodeError) and encoding == "latin-1":
            at = int(str(caught.value).split("offset ")[1].split(";")[0])
            assert f"byte 0x{data[at]:02x} " in str(caught.value), "the byte is where it is said to be"
            data[:at].decode()
    else:
        assert "".join(read.decode_pieces(cut(data, size), "x")) == whole


def test_gutenberg_frame_is_stripped_only_whole():
    start, end = (
        "*** START OF THE PROJECT GUTENBERG EBOOK X ***",
        "*** END OF THE PROJECT GUTENBERG EBOOK X ***",
    )
    framed = f"Licence\n{start}\n\n\nThe text.\nIts end.\n\n{end}\nMore licence\n"
    assert read.strip_gutenberg(framed) == "The text.\nIts end.\n"
    assert (
        read.strip_gutenberg(framed.replace("THE P", "THIS P").replace("*** ", "***"))
        == "The text.\nIts end.\n"
    )
    stars = f"***\n****\nof a line: {start}\n"
    assert read.strip_gutenberg(f"{stars}{start}\nIt.\n***\nso {end}\n{end}\n") == f"It.\n***\nso {end}\n"
    for part in (f"{start}\nThe text\n", f"The text\n{end}\n", f"{end}\nThe text\n{start}\n", "The text\n"):
        assert read.strip_gutenberg(part) == part


START = "*** START OF THE PROJECT GUTENBERG EBOOK"
END = "***END of this project Gutenberg ebook"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([START, END, "\n", "\n\n", "***", "* ", "a", f"\n{START} X ***\n", f"\n{END}"]))
)
@example([START, " of a line", "\n", "\n\n", END])
def test_gutenberg_in_pieces(pieces):
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


def test_sources(folder):
    (folder / "books/deep").mkdir(parents=True)
    for name in ("books/b.txt", "books/deep/a.txt.gz", "books/notes.md"):
        (folder / name).write_bytes(b"x")

    def found(source):
        return [path.as_posix() for path in read.find_files(source)]

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


@pytest.mark.parametrize("source", ["no.txt", "no/*.txt", "empty"])
def test_sources_that_name_nothing(folder, source):
    (folder / "empty").mkdir()
    with pytest.raises(CharlmError, match=source.replace("*", r"\*")):
        read.find_files(source)


def test_files_are_joined_line_by_line(folder):
    for name, content in (("1.txt", "uno"), ("2.txt", ""), ("3.txt", "tres\n")):
        (folder / name).write_text(content)
    corpus = Corpus.load(CorpusConfig(source="?.txt", split=(0.9, 0.1, 0)))
    assert corpus.vocab.decode(torch.cat([corpus.train, corpus.val])) == "uno\ntres\n"


def test_the_bundled_corpus_is_what_its_readme_says():
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
