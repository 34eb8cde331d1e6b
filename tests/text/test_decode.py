import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from charlm.errors import CharlmError
from charlm.text.decode import decode, decode_pieces
from conftest import PIECES, cut


def test_line_ends_become_lf_and_the_byte_order_mark_is_removed():
    assert decode(b"\xef\xbb\xbfa\r\nb\rc\n", "x") == "a\nb\nc\n"


@pytest.mark.parametrize(
    ("pieces", "waits"),
    [([b"ab\n", b"c"], False), ([b"a", b"\xef"], False), ([b"\xef\xbb\xbf", b"a"], False),
     ([b"\xef", b"\xbb", b"\xbfa"], True)],
)  # fmt: skip
def test_only_a_byte_order_mark_is_waited_for(pieces, waits):
    given = []
    first = next(decode_pieces((given.append(piece) or piece for piece in pieces), "x"))
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
        decode(data, "book.txt")
    assert all(part in str(caught.value) for part in ["book.txt", *parts])


@pytest.mark.parametrize(
    ("data", "encoding"),
    [("a".encode("utf-32"), "UTF-32"), (b"\0\0\xfe\xff\0\0\0a", "UTF-32"), (b"\xfe\xff\0a", "UTF-16")],
)
def test_other_encodings_are_named(data, encoding):
    with pytest.raises(CharlmError, match=f"is {encoding}, .* iconv -f {encoding}"):
        decode(data, "x")


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
            "".join(decode_pieces(cut(data, size), "x"))
        if isinstance(error, UnicodeDecodeError) and encoding == "latin-1":
            at = int(str(caught.value).split("offset ")[1].split(";")[0])
            assert f"byte 0x{data[at]:02x} " in str(caught.value), "the offset is the byte's"
            data[:at].decode()
    else:
        assert "".join(decode_pieces(cut(data, size), "x")) == whole


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
        decode(data, "a.txt")
    assert decode(data, "a.txt", encoding) == (text + "\n") * 20


def test_a_file_that_ends_inside_a_character_is_said_to_be_cut():
    with pytest.raises(CharlmError, match="offset 4; the file ends inside a character"):
        decode("año".encode() + b"\xc3", "a.txt")


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_pieces_in_any_encoding_give_the_text(size):
    text = "\ufeffaño €\r\n\r𝄞"
    for encoding in ("utf-8", "utf-16", "utf-16-le", "utf-32-be", "gb18030"):
        pieces = decode_pieces(cut(text.encode(encoding), size), "a.txt", encoding)
        assert "".join(pieces) == "año €\n\n𝄞"
    assert "".join(decode_pieces(cut(b"\xff\0\r\n", size), "a", "bytes")) == "\xff\0\r\n"
