import gzip
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from charlm import stream, text
from charlm.errors import CharlmError

MARK = "*** {} OF THE PROJECT GUTENBERG EBOOK X ***\n"
BOOK = f"licence\n{MARK.format('START')}\n\nÉrase una\nvez\n\n{MARK.format('END')}more\n"


class Slow(io.BytesIO):
    """Gives a few bytes at a time."""

    def read1(self, size=-1):
        return self.read(3)


@given(
    st.text(alphabet="ab ñé\n\r\té\u0301\u0300Σ¿—ÁΩ漢", max_size=60),
    st.booleans(),
    st.sampled_from([None, "a-zñé", "a-z "]),
    st.sampled_from(["NFC", "NFD", "none"]),
)
def test_pieces_are_cleaned_as_the_whole(content, lowercase, keep, normalize):
    options = {"normalize": normalize, "lowercase": lowercase, "keep": keep}
    data = content.encode()
    whole = text.clean(text.decode(data, "x"), **options)
    assert "".join(stream.clean(stream.decode(Slow(data), "x"), **options)) == whole


@pytest.mark.parametrize("content", [BOOK, "\ufeff" + BOOK, BOOK.replace("END OF", "end"), "plain\n\n", ""])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_file_is_read_as_the_whole(tmp_path, monkeypatch, content, name):
    monkeypatch.setattr(stream, "SIZE", 5)
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else content.encode())
    whole = text.clean(text.strip_gutenberg(text.read_file(path)))
    assert "".join(stream.read_file(path, {})) == whole


@pytest.mark.parametrize(
    "data", ["señor\n".encode("latin-1") * 9, b"abc \0 d", "ab".encode("utf-16"), b"abc \xc3"]
)
def test_what_is_no_text_is_refused_in_the_same_words(data):
    with pytest.raises(CharlmError) as whole:
        text.decode(data, "x")
    with pytest.raises(CharlmError) as pieces:
        list(stream.decode(Slow(data), "x"))
    assert str(pieces.value) == str(whole.value)


def test_a_text_without_spaces_is_cut_where_nothing_is_joined(monkeypatch):
    monkeypatch.setattr(stream, "_LONG", 4)
    content = "e\u0301" * 40
    pieces = list(stream.clean(stream.decode(Slow(content.encode()), "x")))
    assert "".join(pieces) == text.clean(content) and len(pieces) > 5
