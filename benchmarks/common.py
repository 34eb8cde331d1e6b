"""Shared by the benchmarks: the heading, the text, and the record of figures for `targets.py`."""

import json
import os
from pathlib import Path

from charlm.study.bench import machine

RECORD = "BENCH_RECORD"  # environment variable: the JSON file in which `make bench` collects the figures


def heading(title):
    print(f"{title}\n\n{machine()}\n")


def text_or_none(path, script):
    """Return the path of the text at `path` or $BENCH_TEXT; print a message and return None without one.

    This is not an error: `make bench` runs every script, and the books are not part of the repository.
    """
    path = path or os.environ.get("BENCH_TEXT")
    if path and Path(path).is_file():
        return Path(path).absolute()
    print(f"needs a text, such as tiny Shakespeare: python benchmarks/{script} --text PATH; nothing measured")
    return None


def record(**figures):
    if name := os.environ.get(RECORD):
        file = Path(name)
        known = json.loads(file.read_text()) if file.is_file() else {}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**known, **figures}, indent=2) + "\n")
