"""The commands as a user types them."""

import fcntl
import io
import json
import math
import os
import pty
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch

from charlm.inference import evaluate as scoring
from charlm.storage import run as runs
from charlm.storage import state_file
from charlm.storage.run import Run
from charlm.storage.state_file import load_state
from conftest import PRECISION, process, settings


def test_train_reports_its_settings_its_metrics_and_the_next_command(charlm):
    done = charlm("train", "--name", "n", *settings("corpus.source=corpus.txt", "train.epochs=2"))
    assert done.code == 0 and done.out == ""
    for part in ("corpus.txt", "parameters", PRECISION, "epoch 1", "epoch 2", "train ", "val ", "ppl "):
        assert part in done.err
    for part in ("best     val perplexity", "test     perplexity", "runs/n/model.safetensors"):
        assert part in done.err
    _, *command = shlex.split(done.err.splitlines()[-1].removeprefix("write"))
    assert charlm(*command).code == 0
    assert {path.name for path in Path("runs/n").iterdir()} == {
        "config.yaml", "model.safetensors", "last.safetensors", "state.safetensors", "metrics.jsonl",
    }  # fmt: skip


def test_without_a_terminal_there_is_no_bar(charlm):
    done = charlm("train", *settings("corpus.source=corpus.txt", "train.max_steps=3"))
    assert "\r" not in done.err and "| " not in done.err


def test_on_a_terminal_there_is_a_bar(folder):
    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("4H", 24, 60, 0, 0))
    running = subprocess.Popen(
        [sys.executable, "-m", "charlm", "train", *settings("corpus.source=corpus.txt", "train.epochs=8")],
        cwd=folder,
        stderr=inner,
    )
    os.close(inner)
    shown = b""
    try:
        while part := os.read(outer, 4096):
            shown += part
    except OSError:  # the other end is closed
        pass
    assert running.wait() == 0
    bars = [line for line in shown.decode().split("\r") if " left" in line and "\n" not in line]
    assert any(all(part in bar for part in ("epoch ", "loss", "ppl", "ch/s |")) for bar in bars)
    assert all(len(bar) <= 60 for bar in bars)
    os.close(outer)


def test_dry_run_writes_nothing(charlm, folder):
    done = charlm(
        "train", "--dry-run", "--name", "n", "--threads", "1", *settings("corpus.source=corpus.txt")
    )
    assert done.code == 0
    for part in (
        "threads  1 (--threads)",
        "hidden_size: 12",
        "corpus.txt",
        "parameters",
        "would write runs/n/",
    ):
        assert part in done.out
    assert [path.name for path in folder.iterdir()] == ["corpus.txt"]


def test_resume_continues_and_refuses_what_cannot_change(charlm, trained):
    assert charlm("train", "--resume", "tiny").code == 2  # finished
    done = charlm("train", "--resume", "tiny", "--set", "train.max_steps=5")
    assert done.code == 0 and "at step 3 of 5" in done.err
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val_loss" in row] == [3, 5]
    before = (trained / "state.safetensors").read_bytes()
    for arguments, part in [
        (["--set", "model.hidden_size=5"], "model.hidden_size"),
        (["--config", "lstm"], "--config"),
        (["--name", "x"], "--name"),
        ([], "by train.max_steps=5"),
    ]:
        refused = charlm("train", "--resume", "tiny", *arguments)
        assert refused.code == 2 and part in refused.err
    assert (trained / "state.safetensors").read_bytes() == before


def test_run_is_locked_before_anything_in_it_is_read(charlm, trained):
    content = {path: path.read_bytes() for path in trained.iterdir()}
    arguments = ["train", "--resume", "tiny", "--set", "train.max_steps=5"]
    with runs.lock(Run(trained)):
        done = charlm(*arguments, "--dry-run")
        assert done.code == 0 and {path: path.read_bytes() for path in trained.iterdir()} == content
        (trained / "config.yaml").write_text("half: written: by the other process")
        done = charlm(*arguments)
    assert done.code == 1 and "another process" in done.err


def test_state_is_read_once_on_resume(charlm, trained, monkeypatch):
    read = []

    def read_once(path):
        read.append(path)
        return load_state(path)

    monkeypatch.setattr(state_file, "load_state", read_once)
    assert charlm("train", "--resume", "tiny", "--set", "train.max_steps=5").code == 0
    assert read == [trained / "state.safetensors"]


def test_generate(charlm, trained):
    done = charlm("generate", "--prefix", "abc", "--length", "20", "--seed", "3")
    assert done.code == 0 and done.err == ""
    assert done.out.startswith("abc") and len(done.out.removesuffix("\n").removeprefix("abc")) in (19, 20)
    assert charlm("generate", "-p", "abc", "-n", "20", "--seed", "3", "-m", "tiny").out == done.out
    assert (
        charlm("generate", "-p", "abc", "-n", "20", "--seed", "3", "-m", trained / "last.safetensors").code
        == 0
    )
    several = charlm("generate", "-p", "abc", "-n", "20", "--seed", "3", "--num-samples", "2").out
    first, second = several.split("-" * 20 + "\n")
    assert first == done.out and second == charlm("generate", "-p", "abc", "-n", "20", "--seed", "4").out
    assert charlm("generate", "-p", "abc", "-n", "0").out == "abc\n"
    for form in ("bf16", "int8"):
        done = charlm("generate", "-n", "20", "--quantize", form)
        assert done.code == 0 and len(done.out) > 19, done.err


def test_generate_reads_its_prefix_from_stdin(charlm, trained, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("añe\r\n".encode())))
    assert charlm("generate", "--prefix", "-", "-n", "3", "--unknown", "skip").out.startswith("a")
    assert charlm("generate", "--prefix", "añΩ", "-n", "3", "--unknown", "replace").out.startswith("añ ")


def test_eval_and_json(charlm, trained, words, monkeypatch):
    Path("b.txt").write_text("abc\ndef")
    done = charlm("eval", "corpus.txt", "b.txt", "--json")
    found = json.loads(done.out)
    first, second = found["files"]
    assert (first["path"], first["characters"]) == ("corpus.txt", len(words) - 1)
    assert (second["path"], second["characters"]) == ("b.txt", 6)
    assert found["total"]["nats"] == pytest.approx(first["nats"] + second["nats"])
    for row in (first, second, found["total"]):
        assert row["loss"] == pytest.approx(row["nats"] / row["characters"])
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert row["bits_per_character"] == pytest.approx(row["loss"] / math.log(2))
    scored_bytes = len(words[1:].encode())
    assert first["bits_per_byte"] == pytest.approx(first["nats"] / math.log(2) / scored_bytes)
    table = charlm("eval", "corpus.txt", "b.txt").out
    assert len(table.splitlines()) == 4 and "total" in table
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(Path("b.txt").read_bytes())))
    alone = json.loads(charlm("eval", "-", "--json").out)["total"]
    assert alone["nats"] == pytest.approx(second["nats"], rel=1e-6)
    other = json.loads(charlm("eval", "corpus.txt", "--json", "--implementation", "scratch").out)
    assert other["total"]["loss"] == pytest.approx(first["loss"], abs=1e-4)


def test_info_reads_the_header_alone(charlm, trained, monkeypatch):
    monkeypatch.setattr(torch, "empty", None)  # no weights
    done = charlm("info", "tiny", "--json")
    found = json.loads(done.out)
    assert found["tensors"]["head.weight"] == [len(found["vocab"]), 12]
    assert found["parameters"] == sum(math.prod(shape) for shape in found["tensors"].values())
    assert found["config"]["model"]["hidden_size"] == 12 and found["figures"]["step"] == 3
    text = charlm("info").out
    assert all(part in text for part in ("head.weight", "hidden_size: 12", "val_loss", "vocabulary"))


BAD = {
    "no such file": (["train", "--set", "corpus.source=nowhere.txt"], 1, "no such file or folder"),
    "empty file": (["train", "--set", "corpus.source=empty.txt"], 1, "the corpus is empty"),
    "short file": (["train", "--set", "corpus.source=short.txt"], 1, "too few for one window"),
    "binary file": (["train", "--set", "corpus.source=binary.txt"], 1, "NUL byte at offset 4"),
    "latin-1 file": (["train", "--set", "corpus.source=latin.txt"], 1, "byte 0xf1 at offset 2"),
    "unknown key": (["train", "--set", "train.learning_rat=1"], 2, "train.learning_rat"),
    "wrong type": (["train", "--set", "model.hidden_size=many"], 2, "'many'"),
    "out of range": (["train", "--set", "model.dropout=1.5"], 2, "model.dropout is 1.5"),
    "no recipe": (["train", "--config", "lstn.yaml"], 2, "did you mean lstm.yaml"),
    "no device": (["train", "--set", "train.device=cuda:77"], 2, "'cuda:77' is not available"),
    "unknown characters": (["generate", "--prefix", "aΩ"], 1, "U+03A9"),
    "truncated model": (["generate", "--model", "cut.safetensors"], 1, "damaged: it is cut short"),
    "pickled model": (["generate", "--model", "pickle.pt"], 1, "pickle"),
    "no model": (["generate", "--model", "nothing"], 2, "no model 'nothing'"),
    "no run": (["train", "--resume", "nothing"], 2, "'nothing'"),
    "a run that exists": (["train", "--name", "tiny"], 2, "exists"),
    "bad temperature": (["generate", "--temperature", "-1"], 2, "temperature"),
    "nan temperature": (["generate", "--temperature", "nan"], 2, "finite"),
    "unknown bits": (["generate", "--quantize", "int4"], 2, "'int4' is not one of 'bf16', 'int8'"),
    "a stop text that cannot come": (["generate", "--stop", "Ω"], 2, "can never be written"),
    "too large a model": (["train", "--set", "model.hidden_size=1000000"], 2, "smaller model"),
    "a name too long": (["train", "--name", "n" * 300], 1, "too long"),
    "unknown option": (["train", "--confg", "x"], 2, "--confg"),
    "unknown command": (["trian"], 2, "trian"),
    "eval of nothing": (["eval"], 2, "FILE"),
    "eval of one character": (["eval", "one.txt"], 1, "two or more"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_changes_no_file(charlm, trained, folder, case):
    arguments, code, part = BAD[case]
    (folder / "empty.txt").write_bytes(b"")
    (folder / "short.txt").write_text("short text " * 4)
    (folder / "one.txt").write_text("a")
    (folder / "binary.txt").write_bytes(b"\x7fELF\0\1\2")
    (folder / "latin.txt").write_bytes("señor\n".encode("latin-1") * 99)
    (folder / "cut.safetensors").write_bytes((trained / "model.safetensors").read_bytes()[:-99])
    torch.save({"a": 1}, folder / "pickle.pt")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = charlm(*arguments)
    assert done.code == code and part in done.err and done.out == ""
    assert done.err.count("\n") == 1 and done.err.startswith("charlm: "), done.err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("error", "reported"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("a shared memory segment is gone"), False),
    ],
)
def test_only_a_failed_allocation_is_reported_as_out_of_memory(charlm, trained, monkeypatch, error, reported):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(Run, "load_config", fail)
    arguments = ["train", "--resume", "tiny"]
    if reported:
        done = charlm(*arguments)
        assert done.code == 1 and "model.hidden_size" in done.err and done.err.count("\n") == 1
    else:
        with pytest.raises(RuntimeError, match=str(error)):
            charlm(*arguments)


def test_runs_is_a_file(charlm, folder):
    (folder / "runs").write_text("in the way")
    done = charlm("train", *settings("corpus.source=corpus.txt"))
    assert done.code == 1 and "cannot make the run's folder" in done.err and done.err.count("charlm: ") == 1


def test_full_disk_leaves_the_last_models(charlm, trained, monkeypatch):
    before = {path.name: path.read_bytes() for path in trained.iterdir() if path.suffix != ".jsonl"}

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        done = charlm("train", "--resume", "tiny", "--set", "train.max_steps=5")
    assert done.code == 1 and "No space left on device" in done.err.splitlines()[-1]
    after = {path.name: path.read_bytes() for path in trained.iterdir() if path.suffix != ".jsonl"}
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in before if name != "config.yaml")


def test_training_continues_when_stderr_is_closed(folder):
    training = process(
        "train", "--name", "n", *settings("corpus.source=corpus.txt", "train.epochs=3"), cwd=folder
    )
    training.stderr.readline()
    training.stderr.close()
    training.stdout.close()
    assert training.wait(timeout=60) == 0
    rows = [json.loads(line) for line in (folder / "runs/n/metrics.jsonl").read_text().splitlines()]
    assert rows[-1].keys() >= {"test_loss"}


@pytest.mark.parametrize("redirection", ["> /dev/full", ">&-"])
def test_output_that_cannot_be_written_gets_at_most_one_line(folder, charlm, trained, redirection):
    command = f"{sys.executable} -m charlm generate -n 5 {redirection}"
    done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and done.stderr.count("\n") <= 1
    assert done.returncode == (1 if "full" in redirection else 0)


@pytest.mark.parametrize(
    ("closed", "command", "message"),
    [
        ("stderr", ["train", "--name", "n", *settings("corpus.source=corpus.txt", "train.max_steps=2")], ""),
        ("stderr", ["eval", "corpus.txt", "--json"], ""),
        ("stdout", ["log", "tiny"], ""),
        ("stdin", ["eval", "-"], "charlm: - has 0 characters to score"),
        ("stdin", ["score", "-"], ""),
        ("stdin", ["generate", "-i"], ""),
    ],
)
def test_closed_stream_is_an_empty_one(charlm, trained, monkeypatch, closed, command, message):
    monkeypatch.setattr(sys, closed, None)
    done = charlm(*command)
    getattr(sys, closed).close()
    assert done.code == (1 if message else 0) and done.err.startswith(message)
    assert command[0] != "train" or (done.out == "" and Path("runs/n/model.safetensors").exists())


def test_eval_skips_files_of_a_folder_that_are_too_short(charlm, trained):
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("abcd")
    Path("texts/b.txt").write_text("")
    done = charlm("eval", "texts", "--json")
    assert [row["path"] for row in json.loads(done.out)["files"]] == ["texts/a.txt"]
    assert "texts/b.txt has 0" in done.err
    Path("texts/a.txt").write_text("a")
    for options in ((), ("--json",)):
        done = charlm("eval", "corpus.txt", "texts", *options)
        assert done.code == 1 and done.out == ""
        assert done.err.splitlines()[-1] == "charlm: no file of texts has two or more characters to score"


def test_no_command_shows_the_help(charlm):
    done = charlm()
    assert done.code == 0 and done.out.startswith("Usage: charlm")
    assert "\n    charlm train --config lstm.yaml\n" in done.out


def test_ctrl_c_saves_and_shows_how_to_resume(folder, charlm):
    running = process(
        "train", "--name", "c", *settings("corpus.source=corpus.txt", "train.epochs=9999"), cwd=folder
    )
    deadline = time.monotonic() + 60
    while not (folder / "runs/c/state.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130 and out == ""
    assert "charlm train --resume runs/c" in err.splitlines()[-1] and "Traceback" not in err
    written = charlm("generate", "-m", "c", "-n", "5")
    assert written.code == 0 and len(written.out) >= 5, written.err


def test_reader_that_closes_the_pipe_is_not_an_error(folder, charlm, trained):
    with process("generate", "-n", "100000", cwd=folder) as writing:
        assert writing.stdout.read(10)
        writing.stdout.close()
        err = writing.stderr.read()
    assert writing.returncode == 0 and err == ""


def test_text_is_written_while_it_is_generated(folder, charlm, trained):
    with process("generate", "-p", "abc", "-n", "1000000000", cwd=folder) as writing:
        assert writing.stdout.read(50).startswith("abc")
        writing.send_signal(signal.SIGINT)
        writing.stdout.close()
        writing.wait(timeout=30)
    assert writing.returncode in (0, 130)


def test_val_loss_of_training_equals_that_of_eval(charlm, trained, words):
    assert scoring.CHUNK > 100
    Path("val.txt").write_text(words[1800:1900])
    figures = json.loads(charlm("info", "--json").out)["figures"]
    total = json.loads(charlm("eval", "val.txt", "--json").out)["total"]
    assert total["loss"] == pytest.approx(figures["val_loss"], rel=1e-6)


def test_checkpoint_can_be_resumed_without_the_last_state(charlm, folder):
    changes = settings(
        "corpus.source=corpus.txt", "train.max_steps=6", "train.eval_every=3", "train.keep_last=2"
    )
    assert charlm("train", "--name", "kept", *changes).code == 0
    run = Run(folder / "runs/kept")
    end = run.last.read_bytes()
    run.state.unlink()
    assert charlm("train", "--resume", "kept").code == 1
    assert charlm("train", "--resume", "kept", "--at", "3").code == 0 and run.last.read_bytes() == end
    done = charlm("train", "--resume", "kept", "--at", "4")
    assert done.code == 1 and "step 4; its saves: 3, 6" in done.err


@pytest.mark.parametrize(("given", "spins"), [({}, "200"), ({"OMP_WAIT_POLICY": "active"}, None)])
def test_threads_of_a_command_wait_without_spinning_for_long(given, spins):
    code = "import os, charlm.__main__ as m; m.main(); print(os.environ.get('GOMP_SPINCOUNT'))"
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-c", code, "--version"]
    done = subprocess.run(command, env={**environment, **given}, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(spins)
