"""A run's log, read back: as rows, as CSV, as JSON lines."""

import csv
import json
from collections.abc import Iterator
from typing import Any, Literal, TextIO

from charlm.errors import CharlmError
from charlm.files import json_text
from charlm.storage.run import Run

Row = dict[str, Any]


def read(run: Run) -> list[Row]:
    """The rows of the run's log, oldest first.

    A last line without its line end, as a killed run or one that is writing just now leaves, is no row yet.
    Raises `CharlmError` for a log that is missing or damaged.
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
    """The rows of all `runs`, each beginning with its run's name; raises as `read` does."""
    return ({"run": name, **row} for name, run in runs.items() for row in read(run))


def write(rows: list[Row], form: Literal["csv", "jsonl"], file: TextIO) -> None:
    """Write `rows` to `file`.

    CSV has a column for each key, in the order in which they first come, empty where a row lacks it.
    """
    if form == "jsonl":
        file.writelines(json_text(row, ensure_ascii=False) + "\n" for row in rows)
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
