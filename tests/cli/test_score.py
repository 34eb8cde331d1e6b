"""How often `charlm eval` and `charlm score` decode a file, and the errors that they report first."""

import json
from pathlib import Path

import pytest

from charlm.cli import score as commands
from charlm.text import read

START = "*** START OF THE PROJECT GUTENBERG EBOOK X ***\n"
END = "*** END OF THE PROJECT GUTENBERG EBOOK X ***\n"


@pytest.fixture
def decodings(monkeypatch):
    """The names of the files that are decoded, in order."""
    names, decode = [], read.decode_pieces

    def noted(data, name, encoding):
        names.append(name)
        yield from decode(data, name, encoding)

    monkeypatch.setattr(read, "decode_pieces", noted)
    return names


@pytest.mark.parametrize("held", [100, 10**6])
@pytest.mark.parametrize(
    ("frame", "without_end"), [("{}", 0), (f"Ω\n{START}{{}}\n{END}Ω", 0), (f"abc\n{START}{{}}", 1)]
)
def test_eval_decodes_a_short_file_once_and_a_long_one_twice(
    charlm, trained, words, monkeypatch, decodings, held, frame, without_end
):
    """Once more if a marker of Project Gutenberg begins a licence that has no end."""
    monkeypatch.setattr(commands, "_HELD", held)
    text = words[:-1] + "\n"
    Path("text.txt").write_text(frame.format(text), encoding="utf-8")
    options = ["--unknown", "skip"] if without_end else []
    assert charlm("score", "text.txt", *options).code == 0
    assert len(decodings) == 2
    decodings.clear()
    done = charlm("eval", "text.txt", "--json", *options)
    assert len(decodings) == (1 if held > len(words) else 2) + without_end
    assert json.loads(done.out)["total"]["characters"] >= len(text) - 2


@pytest.mark.parametrize("held", [100, 10**6])
def test_unknown_characters_are_reported_inside_the_text_only(charlm, trained, words, monkeypatch, held):
    monkeypatch.setattr(commands, "_HELD", held)
    Path("plain.txt").write_text(words, encoding="utf-8")
    Path("framed.txt").write_text(f"Ω{words}\n{START}{words}{END}Ω", encoding="utf-8")
    plain, framed = json.loads(charlm("eval", "plain.txt", "framed.txt", "--json").out)["files"]
    assert {**plain, "path": ""} == {**framed, "path": ""}
    Path("inside.txt").write_text(f"abc\n{START}{words}Ω\n{END}", encoding="utf-8")
    done = charlm("eval", "inside.txt")
    assert done.code == 1 and "U+03A9" in done.err
