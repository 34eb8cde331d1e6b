"""Measure the val loss of recipes on a given text, and the seconds they take, with the command.

    python benchmarks/quality.py --text tinyshakespeare.txt --recipes shakespeare.yaml lstm.yaml

Val is the split of the recipe; nats are per character. "seconds" is the whole command with evaluations and
saves, "trained" its steps only. Figures of long trainings are stored:

    BENCH_RECORD=benchmarks/results/quality.json python benchmarks/quality.py --text ... --recipes ...
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import heading, record, text_or_none

from charlm import config as configuration
from charlm.errors import ConfigError
from charlm.study.compare import markdown

RECIPES = ["shakespeare.yaml"]


def train(recipe, text, overrides, folder):
    """Return the log's rows of the best and the last evaluation, and the seconds of the command."""
    command = [sys.executable, "-m", "charlm", "train", "--config", str(recipe), "--name", "run"]
    for override in (f"corpus.source={text}", *overrides):
        command += ["--set", override]
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True)
    seconds = time.perf_counter() - start
    log = (Path(folder) / "runs/run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, log) if "val_loss" in row]
    return min(rows, key=lambda row: row["val_loss"]), rows[-1], seconds


def main():
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--text", help="default: $BENCH_TEXT")
    arguments.add_argument("--recipes", nargs="+", metavar="FILE", default=RECIPES)
    arguments.add_argument("--set", "-s", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    options = arguments.parse_args()
    text = text_or_none(options.text, "quality.py")
    if text is None:
        return
    rows, figures = [], {}
    for recipe in options.recipes:
        try:
            path = configuration.find_recipe(recipe).absolute()
        except ConfigError as error:
            print(f"skipped: {error}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            best, last, seconds = train(path, text, options.overrides, folder)
        figures |= {f"nats {path.stem}": best["val_loss"], f"seconds {path.stem}": seconds}
        times = [f"{last['seconds']:,.0f}", f"{seconds:,.0f}"]
        rows.append([recipe, f"{best['val_loss']:.4f}", f"{best['step']:,}", *times])
    if rows:
        heading(f"Val loss on {text.name}")
        print(markdown(["recipe", "nats/char", "at step", "trained, s", "seconds"], rows))
        record(**figures)


if __name__ == "__main__":
    main()
