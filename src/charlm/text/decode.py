"""Decoding of texts: from bytes to characters with LF line ends, with advice for text in another encoding."""

import codecs
import itertools
import re
from collections.abc import Iterable, Iterator

from charlm.errors import CharlmError

_BOM = codecs.BOM_UTF8
_OTHER_BOMS = {  # UTF-32 first: its little-endian mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def decode(data: bytes, name: str, encoding: str = "utf-8") -> str:
    """Return `data` as text with LF line ends; raises `CharlmError` with `name` as `decode_pieces` does."""
    return "".join(decode_pieces([data], name, encoding))


def decode_pieces(data: Iterable[bytes], name: str, encoding: str = "utf-8") -> Iterator[str]:
    """Yield `decode`'s result for data in pieces, in pieces.

    encoding: one of Python's; with ``bytes`` each byte is the character of its number, and nothing else is
    changed. Raises `CharlmError` for data that is not in it.
    """
    if encoding == "bytes":
        yield from (piece.decode("latin-1") for piece in data)
        return
    is_utf8 = codecs.lookup(encoding).name == "utf-8"
    decoder, before, end = codecs.getincrementaldecoder(encoding)(), 0, ""
    pieces = ((piece, False) for piece in _with_whole_beginning(data))
    first = True
    for piece, last in itertools.chain(pieces, [(b"", True)]):
        if is_utf8:
            _refuse_other_text(piece, before, name)
        waiting = len(decoder.getstate()[0])
        try:
            text = end + decoder.decode(piece, last)
        except UnicodeDecodeError as error:
            place = before - waiting + error.start
            raise CharlmError(
                f"{name} is not valid {encoding.upper()}: byte 0x{error.object[error.start]:02x} "
                f"at offset {place}; {_advice(error, last, is_utf8)}"
            ) from None
        before += len(piece)
        if first and text:
            text, first = text.removeprefix("\ufeff"), False
        end = "\r" if text.endswith("\r") and not last else ""  # the next piece may begin with its LF
        yield with_lf(text[:-1] if end else text)


def _refuse_other_text(piece: bytes, before: int, name: str) -> None:
    """Raise `CharlmError` if `piece`, at the offset `before`, is UTF-16 or UTF-32, or no text."""
    for mark, encoding in _OTHER_BOMS.items() if before == 0 else ():
        if piece.startswith(mark):
            raise CharlmError(
                f"{name} is {encoding}, not UTF-8; convert it with: iconv -f {encoding} -t UTF-8, "
                f"or train with --set corpus.encoding={encoding}"
            )
    if (nul := piece.find(b"\0")) >= 0:
        raise CharlmError(
            f"{name} is not a text file: it has a NUL byte at offset {before + nul}; "
            "a model of bytes reads any file: --set corpus.encoding=bytes"
        )


def _advice(error: UnicodeDecodeError, last: bool, is_utf8: bool) -> str:
    """Return advice about data that could not be decoded."""
    if last or error.reason == "unexpected end of data":
        return "the file ends inside a character: it was cut"
    if not is_utf8:
        return "set corpus.encoding to the text's encoding, or to bytes"
    named = [name for name in _CANDIDATES if _plausible(error.object, name)] or ["windows-1252"]
    return (
        f"if it is text in another encoding, perhaps {' or '.join(named)}, set corpus.encoding={named[0]}, "
        f"or convert it with: iconv -f {named[0].upper()} -t UTF-8"
    )


# Encodings, with the characters of which their texts mostly consist; the strictest first.
_CANDIDATES = {
    "shift_jis": "[\u3000-\u30ff\u4e00-\u9fff\uff00-\uff5e]",
    "euc_kr": "[\uac00-\ud7a3]",
    "gb18030": "[\u3000-\u3011\u4e00-\u9fff\uff00-\uff5e]",
    "big5": "[\u3000-\u3011\u4e00-\u9fff\uff00-\uff5e]",
    "koi8-r": "[а-яё]",
    "windows-1251": "[а-яё]",
    "windows-1252": "[\u00c0-\u00ff\u2010-\u2026]",
}


def _plausible(data: bytes, encoding: str) -> bool:
    """Return whether `data` looks like a text in `encoding`, by its characters outside ASCII.

    Most of them must be in the encoding's class of `_CANDIDATES`. For windows-1252 they must be fewer than
    half of all letters, for the other encodings at least half.
    """
    decoder = codecs.getincrementaldecoder(encoding)()  # the data may be cut at its end
    try:
        text = decoder.decode(data)
    except UnicodeDecodeError:
        return False
    others = [char for char in text if char > "\x7f"]
    western = 2 * len(others) < sum(map(str.isalpha, text))
    if western != (encoding == "windows-1252"):
        return False
    return len(re.findall(_CANDIDATES[encoding], "".join(others))) > 0.8 * len(others)


def with_lf(text: str) -> str:
    """Return `text` with LF line ends."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _with_whole_beginning(data: Iterable[bytes]) -> Iterator[bytes]:
    """Yield `data`, its first pieces joined while they can be the beginning of a byte order mark."""
    marks, beginning, data = (_BOM, *_OTHER_BOMS), b"", iter(data)
    for piece in data:
        beginning += piece
        if not any(mark.startswith(beginning) and mark != beginning for mark in marks):
            break
    yield beginning
    yield from data
