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
from conftest import PIECES, ROOT, cut, strip_gutenberg


def test_line_ends_become_lf_and_the_byte_order_mark_is_removed():
    assert read.decode(b"\xef\xbb\xbfa\r\nb\rc\n", "x") == "a\nb\nc\n"


@pytest.mark.parametrize(
    ("pieces", "waits"),
    [([b"ab\n", b"c"], False), ([b"a", b"\xef"], False), ([b"\xef\xbb\xbf", b"a"], False),
     ([b"\xef", b"\xbb", b"\xbfa"], True)],
)  # fmt: skip
def test_only_a_byte_order_mark_is_waited_for(pieces, waits):
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
        (b"ELF\0\1", ["NUL", "offset 3"]),
    ],
)
def test_invalid_utf8_is_refused_with_its_offset(data, parts):
    with pytest.raises(CharlmError) as caught:
        read.decode(data, "book.txt")
    assert all(part in str(caught.value) for part in ["book.txt", *parts])


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
def test_decoding_in_pieces_equals_decoding_at_once(pieces, encoding, size):
    data = "".join(pieces).encode(encoding, "replace")
    try:
        assert b"\0" not in data
        whole = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except (UnicodeDecodeError, AssertionError) as error:
        with pytest.raises(CharlmError) as caught:
            "".join(read.decode_pieces(cut(data, size), "x"))
        if isinstance(error, UnicodeDecodeError) and encoding == "latin-1":
            at = int(str(caught.value).split("offset ")[1].split(";")[0])
            assert f"byte 0x{data[at]:02x} " in str(caught.value), "the offset is the byte's"
            data[:at].decode()
    else:
        assert "".join(read.decode_pieces(cut(data, size), "x")) == whole


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


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("gb18030", "天地玄黄，宇宙洪荒。"),
        ("big5", "天地玄黃宇宙洪荒"),
        ("shift_jis", "いろはにほへと ちりぬるを"),
        ("euc_kr", "나랏말싸미 듕귁에 달아"),
        ("koi8-r", "мама мыла раму"),
        ("windows-1251", "Мама мыла раму"),
        ("windows-1252", "“año” señor"),
    ],
)
def test_the_advice_names_the_encoding_of_the_text(encoding, text):
    data = (text + "\n").encode(encoding) * 20
    with pytest.raises(CharlmError, match=f"perhaps .*{encoding}.* set corpus.encoding="):
        read.decode(data, "a.txt")
    assert read.decode(data, "a.txt", encoding) == (text + "\n") * 20


def test_a_file_that_ends_inside_a_character_is_said_to_be_cut():
    with pytest.raises(CharlmError, match="offset 4; the file ends inside a character"):
        read.decode("año".encode() + b"\xc3", "a.txt")


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_pieces_in_any_encoding_give_the_text(size):
    text = "\ufeffaño €\r\n\r𝄞"
    for encoding in ("utf-8", "utf-16", "utf-16-le", "utf-32-be", "gb18030"):
        pieces = read.decode_pieces(cut(text.encode(encoding), size), "a.txt", encoding)
        assert "".join(pieces) == "año €\n\n𝄞"
    assert "".join(read.decode_pieces(cut(b"\xff\0\r\n", size), "a", "bytes")) == "\xff\0\r\n"
