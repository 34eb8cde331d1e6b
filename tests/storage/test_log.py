import csv
import io
import json

import pytest

from charlm.errors import CharlmError
from charlm.storage.log import append, evaluations, read, write
from charlm.storage.run import Run


def test_a_row_that_is_being_written_is_none_yet(tmp_path):
    run = Run(tmp_path)
    append(run, {"step": 1, "val_loss": 2.5})
    append(run, {"step": 2, "test_loss": 2.0})
    with run.metrics.open("a") as file:
        file.write('{"step": 3, "val_l')
    assert read(run) == [{"step": 1, "val_loss": 2.5}, {"step": 2, "test_loss": 2.0}]
    assert evaluations(run) == [{"step": 1, "val_loss": 2.5}]


@pytest.mark.parametrize("content", [b'{"step": 1, "val_l\n', b"[1]\n", b"\xff\n"])
def test_a_damaged_log(tmp_path, content):
    Run(tmp_path).metrics.write_bytes(content)
    with pytest.raises(CharlmError, match=r"metrics.jsonl is damaged"):
        read(Run(tmp_path))


def test_no_log(tmp_path):
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
def test_formats(form, expected):
    file = io.StringIO()
    write(ROWS, form, file)
    assert file.getvalue() == expected


def test_the_command(charlm, trained):
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
