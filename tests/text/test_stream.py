import gzip
import io

import pytest

from charlm.text import read
from charlm.text.clean import clean

MARK = "*** {} OF THE PROJECT GUTENBERG EBOOK X ***\n"
BOOK = f"licence\n{MARK.format('START')}\n\nÉrase una\nvez\n\n{MARK.format('END')}more\n"


@pytest.mark.parametrize("content", [BOOK, "\ufeff" + BOOK, BOOK.replace("END OF", "end"), "plain\n\n", ""])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_file_is_read_as_the_whole(tmp_path, monkeypatch, content, name):
    monkeypatch.setattr(read, "_PIECE", 5)
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else content.encode())
    whole = clean(read.strip_gutenberg(read.read_file(path)), keep="a-zÉ ")
    assert "".join(read.read_clean_file(path, {"keep": "a-zÉ "})) == whole


@pytest.mark.parametrize("line", ["señor mío\n", "hola ", "ΟΔΟΣ\n"])
def test_what_stdin_has_does_not_wait_for_more(line):
    class Typed(io.BytesIO):
        """Gives a line at a time, and tells what was given back before."""

        def read1(self, size=-1):
            shown.append("".join(given))
            return self.readline() if line.endswith("\n") else self.read(len(line.encode()))

    given, shown = [], []
    for piece in read.read_clean_stdin(Typed(line.encode() * 3), {"lowercase": True}):
        given.append(piece)
    assert shown == [line.lower() * count for count in range(4)]
