import csv
import io
import json
import os

import pytest

from charlm.errors import CharlmError
from charlm.storage import log
from charlm.storage.log import curve, evaluations, read, write
from charlm.storage.run import Run


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def test_row_that_is_being_written_is_ignored(run):
    log.append(run, {"step": 1, "val_loss": 2.5})
    log.append(run, {"step": 2, "test_loss": 2.0})
    with run.metrics.open("a") as file:
        file.write('{"step": 3, "val_l')
    assert read(run) == [{"step": 1, "val_loss": 2.5}, {"step": 2, "test_loss": 2.0}]
    assert evaluations(run) == [{"step": 1, "val_loss": 2.5}]


def test_curve_drops_the_rows_that_a_rollback_took_back(tmp_path):
    def row(step, train, **more):
        return {"step": step, "train_loss": train, **more}

    rows = [
        row(5, 3.0),
        row(10, 2.9, val_loss=2.9),
        row(15, 2.8),
        row(20, 2.7, val_loss=2.7),
        row(25, 9.0),
        {"step": 26, "event": "bad_step"},
        {"step": 10, "event": "rollback", "from_step": 26},
        row(15, 2.6),
        {"step": 20, "val_loss": 2.5},
        {"step": 20, "test_loss": 2.4},
    ]
    for each in rows:
        log.append(Run(tmp_path), each)
    assert curve(Run(tmp_path)) == [rows[0], rows[1], rows[7], rows[8]]
    assert evaluations(Run(tmp_path)) == [rows[1], rows[8]]


def test_log_is_truncated(run):
    size = log.append(run, {"step": 1})
    log.append(run, {"step": 2})
    log.cut(run, size)
    assert run.metrics.read_text() == '{"step": 1}\n'


def test_log_omits_what_json_lacks(run):
    log.append(run, {"val_loss": 800.0, "val_perplexity": float("inf")})
    assert run.metrics.read_text() == '{"val_loss": 800.0}\n'


def test_row_that_cannot_be_written_whole_is_removed(run, monkeypatch):
    size, real = log.append(run, {"step": 1}), os.fsync

    def full(descriptor):
        real(descriptor)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CharlmError, match="metrics.jsonl: No space left"):
        log.append(run, {"step": 2})
    assert run.metrics.stat().st_size == size


def test_log_is_not_written_through_a_link(run, tmp_path):
    """A run's folder may come from others and have a link to a file of the user in it."""
    mine = tmp_path / "mine"
    mine.write_text("mine")
    run.metrics.symlink_to(mine)
    for change in (lambda: log.append(run, {"step": 1}), lambda: log.cut(run, 0)):
        with pytest.raises(CharlmError, match="link to .*mine"):
            change()
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("content", [b'{"step": 1, "val_l\n', b"[1]\n", b'{"val_loss": 1}\n', b"\xff\n"])
def test_damaged_log_is_refused(tmp_path, content):
    Run(tmp_path).metrics.write_bytes(content)
    with pytest.raises(CharlmError, match=r"metrics.jsonl is damaged"):
        read(Run(tmp_path))


def test_missing_log_is_refused(tmp_path):
    with pytest.raises(CharlmError, match=r"cannot read .*metrics.jsonl: No such file"):
        read(Run(tmp_path))


ROWS = [{"run": "año", "step": 1, "lr": 0.1}, {"run": "b", "test_loss": 2.0, "step": 3}]


@pytest.mark.parametrize(
    "form, expected",
    [
        ("csv", "run,step,lr,test_loss\naño,1,0.1,\nb,3,,2.0\n"),
        ("jsonl", '{"run": "año", "step": 1, "lr": 0.1}\n{"run": "b", "test_loss": 2.0, "step": 3}\n'),
    ],
)
def test_rows_are_written_as_csv_and_json_lines(form, expected):
    file = io.StringIO()
    write(ROWS, form, file)
    assert file.getvalue() == expected


def test_log_command_prints_all_rows(charlm, trained):
    assert charlm("train", "--resume", "tiny", "--set", "train.max_steps=5").code == 0
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    done = charlm("log", "runs/tiny", "--format", "jsonl")
    assert done.code == 0 and done.err == ""
    assert [json.loads(line) for line in done.out.splitlines()] == [{"run": "tiny", **row} for row in rows]
    table = list(csv.DictReader(charlm("log", "tiny").out.splitlines()))
    assert [row["step"] for row in table] == [str(row["step"]) for row in rows]
    assert [row["val_loss"] for row in table] == [str(row.get("val_loss", "")) for row in rows]
    twice = charlm("log", "tiny", "runs/tiny")
    assert twice.code == 2 and "twice" in twice.err
