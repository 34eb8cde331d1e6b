"""`charlm generate --interactive`, on a terminal and through a pipe."""

import io
import os
import pty
import select
import subprocess
import sys
import time

import pytest

from charlm.cli import generate as interactive
from conftest import settings


@pytest.fixture
def typed(charlm, trained, monkeypatch):
    """Pipe lines into the prompt: typed("abc", ":seed 1") -> (code, out, err)."""

    def run(*lines, options=()):
        content = "".join(f"{line}\n" for line in lines)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
        return charlm("generate", "--interactive", *options)

    return run


def test_each_line_is_a_prefix_and_gives_the_command_s_text(typed, charlm):
    options = ("--seed", "3", "-n", "20")
    done = typed("abc", "ñe ", options=options)
    assert (done.code, done.err) == (0, "")
    assert done.out == "".join(charlm("generate", "-p", prefix, *options).out for prefix in ("abc", "ñe "))


def test_a_line_with_a_colon_changes_a_setting(typed, charlm):
    lines = [
        ":length 9",
        ":seed 4",
        ":temp 1.5",
        ":top-k 5",
        ":top-p 0.9",
        ":min-p 0.1",
        ":unknown skip",
        "aΩb",
        ":stop a",
    ]
    lines += ["b", ":top-k", ":quit", "not reached"]
    done = typed(*lines)
    same = ["-n", "9", "--seed", "4", "-t", "1.5", "--top-k", "5", "--top-p", "0.9", "--min-p", "0.1"]
    assert done.out == charlm("generate", "-p", "ab", *same).out + (
        charlm("generate", "-p", "b", *same, "--stop", "a").out
    )
    assert done.err.splitlines() == [
        ":length 9", ":seed 4", ":temperature 1.5", ":top-k 5", ":top-p 0.9", ":min-p 0.1", ":unknown skip",
        ":stop a", ":top-k",
    ]  # fmt: skip


def test_an_error_in_a_line_ends_that_line_only(typed):
    wrong = [":temperature -1", ":temperature warm", ":t 1", ":warmth 1", "aΩ", ":stop Ω", "a"]
    done = typed(*wrong, ":length 5", ":stop", "abc", ":help")
    assert done.code == 1 and done.out.startswith("abc") and len(done.out) in (8, 9)
    messages = done.err.splitlines()
    for line, part in zip(
        messages,
        ("-1", "'warm'", ":temperature, :top-k, :top-p", ":length, :temp", "U+03A9", ":stop Ω", "never"),
        strict=False,
    ):
        assert part in line
    assert messages[-1] == "charlm: 6 lines failed"
    assert "  :temperature 0.7     Divide" in done.err and "  :length 5 " in done.err


def test_two_colons_begin_a_text_with_a_colon(typed):
    assert typed(":unknown skip", "::ab", ":length 3").out.startswith("ab")


@pytest.mark.parametrize("options", [["--prefix", "a"], ["--num-samples", "2"], ["--novelty"]])
def test_options_that_conflict_with_interactive_are_refused(typed, options):
    done = typed("a", options=options)
    assert done.code == 2 and all(each in done.err for each in ("--prefix", "--num-samples", "--novelty"))


@pytest.mark.parametrize(
    ("model", "options", "part"),
    [
        (["model.direction=both"], (), "model.direction: both"),
        ([], ("--stop", "Ω"), "stop 'Ω'"),
        (["model.cell=gru", "model.gru_reset=before"], ("--quantize", "int8"), "gru_reset"),
    ],
)
def test_options_that_fail_for_every_line_are_refused_at_once(charlm, typed, model, options, part):
    changes = settings("corpus.source=corpus.txt", "train.max_steps=1", *model)
    assert charlm("train", *changes).code == 0
    done = typed("a", "b", options=options)
    assert part in done.err and done.err.count("charlm: ") == 1 and done.out == ""


def test_prompt_history_and_signals_on_a_terminal(folder, trained, request):
    """A prompt and a history; Ctrl-C stops a text, Ctrl-D leaves."""
    outer, inner = pty.openpty()
    # The first process of a new session to open a terminal controls it: Ctrl-C then sends a signal.
    begin = "import os, sys; os.close(os.open(os.ttyname(0), os.O_RDWR)); "
    begin += "from charlm.cli import main; sys.exit(main())"
    running = subprocess.Popen(
        [sys.executable, "-c", begin, "generate", "-i", "-n", "4", "--seed", "1"],
        cwd=folder,
        stdin=inner,
        stdout=inner,
        stderr=inner,
        start_new_session=True,
        env={**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8:strict"},
    )
    os.close(inner)
    request.addfinalizer(running.wait)
    request.addfinalizer(running.kill)
    shown, deadline = "", time.monotonic() + 60

    def until(part):
        nonlocal shown
        begun = len(shown)
        while part not in shown[begun:]:
            ready, _, _ = select.select([outer], [], [], max(deadline - time.monotonic(), 0))
            assert ready, shown
            shown += os.read(outer, 4096).decode(errors="replace")
        return shown[begun:]

    def enter(keys):
        os.write(outer, keys.encode())

    assert ":help" in until(interactive.PROMPT)
    enter("abcΩ\r")
    assert "U+03A9" in until(interactive.PROMPT)
    os.write(outer, b"a\xff\r")  # not UTF-8
    assert "U+DCFF" in until(interactive.PROMPT)
    enter("abc\r")
    text = until(interactive.PROMPT).replace("\r", "").split("\n", 1)[1]
    enter("\x1b[A\r")  # the arrow up: the line before
    assert until(interactive.PROMPT).replace("\r", "").split("\n", 1)[1] == text
    enter(":length 1000000000\r")
    until(interactive.PROMPT)
    enter("de\r")
    until("\n")
    until("a")
    enter("\x03")  # Ctrl-C
    until("\n" + interactive.PROMPT)
    enter("\x04")  # Ctrl-D
    assert running.wait(timeout=30) == 0
    os.close(outer)
    assert "Traceback" not in shown
    assert not list(folder.rglob("*hist*"))
