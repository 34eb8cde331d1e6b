"""The commands that examine a model: eval, score, info, and generate --novelty."""

import io
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from charlm.cli import score as score_command
from charlm.inference import evaluate as scoring
from charlm.storage.model_file import load_model, save_model
from charlm.text import read
from conftest import process, settings


def rows_of(out):
    unescape = {"\\n": "\n", "\\t": "\t", "\\\\": "\\"}
    head, *rows = [line.split("\t") for line in out.splitlines()]
    for row in rows:
        text, k = "", 0
        while k < len(row[-1]):
            step = 2 if row[-1][k] == "\\" else 1
            text += unescape.get(row[-1][k : k + step], row[-1][k])
            k += step
        row[-1] = text
    return head, rows


def test_eval_starts_each_file_from_a_zero_state(charlm, trained, words):
    """A text in ten files has nine scored characters fewer, and each file has its own metrics."""
    Path("parts").mkdir()
    for k in range(10):
        Path(f"parts/{k}.txt").write_text(words[k * 200 : (k + 1) * 200])
    found = json.loads(charlm("eval", "parts", "--json").out)
    alone = [json.loads(charlm("eval", f"parts/{k}.txt", "--json").out)["total"] for k in range(10)]
    whole = json.loads(charlm("eval", "corpus.txt", "--json").out)["total"]
    assert found["total"]["characters"] == whole["characters"] - 9 == sum(row["characters"] for row in alone)
    for row, one in zip(found["files"], alone, strict=True):
        assert row["nats"] == pytest.approx(one["nats"], rel=1e-6)
    assert found["total"]["nats"] == pytest.approx(sum(row["nats"] for row in alone), rel=1e-6)


def test_eval_counts_unknown_characters(charlm, trained):
    Path("b.txt").write_text("abcΩdef\nabΩΩ")
    for how, characters in (("skip", 8), ("replace", 11)):
        total = json.loads(charlm("eval", "b.txt", "--json", "--unknown", how).out)["total"]
        assert (total["unknown"], total["characters"]) == (3, characters)
    assert "unknown" in charlm("eval", "b.txt", "--unknown", "skip").out
    assert "unknown" not in charlm("eval", "corpus.txt").out


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_eval_in_blocks_equals_eval_at_once(charlm, words, monkeypatch, direction):
    """A forward model scores the file while it is read, a backward model afterwards."""
    options = settings("corpus.source=corpus.txt", "train.max_steps=1", f"model.direction={direction}")
    assert charlm("train", *options).code == 0
    Path("long.txt").write_text(words.replace("b", "Ω"), encoding="utf-8")
    whole = json.loads(charlm("eval", "long.txt", "--json", "--unknown", "skip").out)["files"][0]
    reader = "read_clean" if direction == "forward" else "clean_pieces"
    turns, from_file, scored = [], getattr(read, reader), scoring.read_long

    def read_file(*args):
        for piece in itertools.chain.from_iterable(from_file(*args)):
            turns.append("read")
            yield piece

    monkeypatch.setattr(read, reader, read_file)
    monkeypatch.setattr(score_command, "_HELD", 500)
    monkeypatch.setattr(scoring, "read_long", lambda *args: turns.append("scored") or scored(*args))
    monkeypatch.setattr(scoring, "BLOCK", 300)
    cut = json.loads(charlm("eval", "long.txt", "--json", "--unknown", "skip").out)["files"][0]
    assert cut.pop("path") == whole.pop("path") and cut == pytest.approx(whole, rel=1e-6)
    ahead = "".join("." if turn == "read" else " " for turn in turns).split()
    assert max(map(len, ahead)) < 1000 if direction == "forward" else len(ahead) == 1


def test_eval_reports_unknown_characters_before_it_scores(charlm, trained, words, monkeypatch):
    Path("last.txt").write_text(words + "Ω", encoding="utf-8")
    monkeypatch.setattr(score_command, "_HELD", 500)
    monkeypatch.setattr(scoring, "BLOCK", 300)
    monkeypatch.setattr(scoring, "read_long", lambda *args: pytest.fail("scored"))
    done = charlm("eval", "corpus.txt", "last.txt")
    assert done.code == 1 and f"U+03A9) at position {len(words)}" in done.err and done.out == ""


@pytest.mark.parametrize("unit", ["char", "word", "line"])
def test_scores_sum_to_the_nats_of_eval(charlm, trained, words, unit, monkeypatch):
    total = json.loads(charlm("eval", "corpus.txt", "--json").out)["total"]
    head, rows = rows_of(charlm("score", "corpus.txt", "--unit", unit).out)
    assert head == ["path", "start", "characters", "bits", "text"]
    assert "".join(row[4] for row in rows) == words and {row[0] for row in rows} == {"corpus.txt"}
    bits = sum(float(row[3] or 0) for row in rows)
    assert bits * math.log(2) == pytest.approx(total["nats"], rel=1e-6)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(words.encode())))
    lines = [json.loads(line) for line in charlm("score", "-", "--unit", unit, "--json").out.splitlines()]
    assert [line["text"] for line in lines] == [row[4] for row in rows] and lines[0]["path"] == "-"
    assert sum(line["bits"] or 0 for line in lines) == pytest.approx(bits, rel=1e-6)


def test_top_sorts_by_surprisal(charlm, trained):
    Path("b.txt").write_text("ab\n\\ab\tcñññññññ\nfed\n", encoding="utf-8")
    every = rows_of(charlm("score", "b.txt", "--unit", "line", "--unknown", "skip").out)[1]
    done = charlm("score", "b.txt", "--top", "2", "--unknown", "skip")
    found = rows_of(done.out)[1]
    assert found == sorted(every, key=lambda row: -float(row[3]) / int(row[2]))[:2]
    assert "2 characters that the model does not know were skipped" in done.err
    done = charlm("score", "b.txt", "--unknown", "replace")
    assert "2 characters that the model does not know were read as ' '" in done.err


def test_top_ranks_words_if_the_vocabulary_has_no_line_ends(charlm):
    """corpus.keep replaces line ends by spaces: the whole text would be one line."""
    options = settings("corpus.source=corpus.txt", "corpus.keep=a-zñé", "train.max_steps=1")
    assert charlm("train", *options).code == 0
    Path("b.txt").write_text("ab ca\nfed\n")
    _, rows = rows_of(charlm("score", "b.txt", "--top", "9").out)
    assert sorted(row[4] for row in rows) == ["ab ", "ca ", "fed "]
    done = charlm("score", "b.txt", "--unit", "line")
    assert done.code == 2 and "knows no line ends" in done.err and done.out == ""


def test_score_prints_rows_while_it_reads(folder, trained):
    running = process("score", "-", "--unit", "line", cwd=folder, stdin=subprocess.PIPE)
    running.stdin.write("abc\n")
    running.stdin.flush()
    assert [running.stdout.readline() for _ in range(2)][1].startswith("-\t0\t3\t")
    running.stdin.close()
    assert running.wait() == 0
    running.stdout.close()
    running.stderr.close()


def test_info_of_two_models_shows_the_differences(charlm, trained):
    options = settings("corpus.source=corpus.txt", "train.max_steps=2", "model.cell=gru")
    assert charlm("train", "--name", "other", *options).code == 0
    shown = charlm("info", "tiny", "other").out
    assert "model.cell" in shown and "gru" in shown and "model.dropout" not in shown
    found = json.loads(charlm("info", "tiny", "other", "--json").out)
    assert found["differences"]["model.cell"] == ["lstm", "gru"] and len(found["models"]) == 2
    assert found["differences"]["step"] == [3, 2] and "vocabulary" not in found["differences"]


def strict(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_nan_and_infinity_are_null_in_json(charlm, trained):
    loaded = load_model(trained / "model.safetensors")
    with torch.no_grad():
        loaded.model.head.bias.fill_(math.nan)
    figures = {**loaded.figures, "val_perplexity": math.inf}
    save_model(Path("nan.safetensors"), loaded.model, loaded.vocab, loaded.config, figures)
    found = strict(charlm("eval", "corpus.txt", "-m", "nan.safetensors", "--json").out)["total"]
    assert found["nats"] is found["loss"] is found["perplexity"] is found["bits_per_byte"] is None
    rows = charlm("score", "corpus.txt", "-m", "nan.safetensors", "--json", "--unit", "line").out
    assert {strict(row)["bits"] for row in rows.splitlines()} == {None}
    assert strict(charlm("info", "nan.safetensors", "--json").out)["figures"]["val_perplexity"] is None


def test_info_prints_no_control_characters_of_a_file(charlm, trained):
    loaded = load_model(trained / "model.safetensors")
    for name in ("a", "b"):
        figures = {"\x1b[31mstep": f"\x1b[2J{name}", "\x1b]0;note": name}
        save_model(Path(f"{name}.safetensors"), loaded.model, loaded.vocab, loaded.config, figures)
    for names in (["a.safetensors"], ["a.safetensors", "b.safetensors"]):
        shown = charlm("info", *names).out
        assert "\x1b" not in shown and "[31mstep" in shown and "[2Ja" in shown


def test_info_does_not_import_torch(trained):
    code = "import sys, charlm.cli as c; c.main(['info', 'tiny']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "head.weight" in done.stdout, done.stderr


def test_novelty_reports_copied_text(charlm):
    """A model of a text with a single character writes nothing that is not in the text."""
    Path("one.txt").write_text("a" * 1500)
    assert charlm("train", *settings("corpus.source=one.txt", "train.max_steps=1")).code == 0
    done = charlm("generate", "--prefix", "a", "-n", "70", "--novelty")
    _, written, stretch, held_out = done.err.splitlines()
    assert written.split()[2:] == ["70", "100.0%", "100.0%", "100.0%"] and repr("a" * 70) in stretch
    assert held_out.split()[2] == "70"
