"""The log of a run, ``metrics.jsonl``: a JSON object a line, written by the training and read by the rest."""

import csv
import errno
import json
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from io import FileIO
from typing import Any, Literal, TextIO

from charlm.errors import CharlmError
from charlm.files import json_text
from charlm.storage.run import Run

Row = dict[str, Any]


def append(run: Run, row: Row, sync: bool = True) -> int:
    """Append `row` to the log of `run`, without floats that are not finite; return the log's size.

    With `sync`, the row is on the disk when this returns. A row that cannot be written whole is removed.
    Raises `CharlmError` for a log that cannot be written.
    """
    finite = {
        key: value for key, value in row.items() if not isinstance(value, float) or math.isfinite(value)
    }
    line = (json.dumps(finite, allow_nan=False) + "\n").encode()
    try:
        with _open(run, os.O_CREAT) as file:
            begin = file.tell()
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if sync:
                    os.fsync(file.fileno())  # the next saved state depends on it
            except OSError:
                file.truncate(begin)
                raise
            return file.tell()
    except OSError as error:
        raise CharlmError(f"cannot write {run.metrics}: {error.strerror}") from None


def sync(run: Run) -> None:
    """Wait until the rows of the log are on the disk."""
    with suppress(FileNotFoundError), _open(run) as file:
        os.fsync(file.fileno())


def cut(run: Run, size: int) -> None:
    """Truncate the log of `run` to `size` bytes, if it is longer: the steps since are repeated."""
    with suppress(FileNotFoundError), _open(run) as file:
        if file.seek(0, os.SEEK_END) > size:
            file.truncate(size)


def _open(run: Run, flags: int = 0) -> FileIO:
    """Open the log for appending; refuse a link, which may lead out of the run's folder."""
    # O_NONBLOCK: opening a pipe must not wait. Outside POSIX these flags do not exist.
    safe = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(run.metrics, os.O_WRONLY | os.O_APPEND | safe | flags, 0o666)
        return os.fdopen(descriptor, "ab", buffering=0)
    except OSError:
        if run.metrics.is_symlink():
            raise CharlmError(
                f"{run.metrics} is a link to {run.metrics.readlink()}, and charlm writes only inside the "
                "run's folder; replace the link by a file"
            ) from None
        raise


def read(run: Run) -> list[Row]:
    """Return the rows of the run's log, oldest first.

    A last line without a line end, which a killed or a running training leaves, is ignored. Raises
    `CharlmError` for a log that is missing or damaged.
    """
    try:
        text = run.metrics.read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        if not all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in rows):
            raise ValueError("a line is not a JSON object with a step")
    except OSError as error:
        raise CharlmError(f"cannot read {run.metrics}: {error.strerror}") from None
    except ValueError as error:
        raise CharlmError(f"{run.metrics} is damaged: {error}") from None
    return rows


def curve(run: Run) -> list[Row]:
    """Return the rows of the log with a `train_loss` or `val_loss`, in strictly increasing steps.

    Rows after the step to which a rollback returned are dropped. Raises as `read` does.
    """
    rows: list[Row] = []
    for row in read(run):
        if row.get("event") == "rollback":
            rows = [earlier for earlier in rows if earlier["step"] <= row["step"]]
        elif "train_loss" in row or "val_loss" in row:
            rows.append(row)
    return rows


def evaluations(run: Run) -> list[Row]:
    """Return the rows of `curve` that an evaluation wrote; raises as `read` does."""
    return [row for row in curve(run) if "val_loss" in row]


def named_rows(runs: dict[str, Run]) -> Iterator[Row]:
    """Return the rows of all `runs`, each beginning with its run's name; raises as `read` does."""
    return ({"run": name, **row} for name, run in runs.items() for row in read(run))


def write(rows: list[Row], form: Literal["csv", "jsonl"], file: TextIO) -> None:
    """Write `rows` to `file`.

    CSV has a column for each key, in the order in which they first occur, empty where a row lacks the key.
    """
    if form == "jsonl":
        file.writelines(json_text(row, ensure_ascii=False) + "\n" for row in rows)
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
