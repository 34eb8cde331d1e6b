"""Compare Stanza's trainer of character models with charlm, with the same cell, sizes and text.

Stanza needs its own virtual environment:

    python3 -m venv stanza-venv
    stanza-venv/bin/pip install -c constraints.txt torch stanza
    python benchmarks/stanza_charlm.py --python stanza-venv/bin/python --text tinyshakespeare.txt

Stanza trains with its defaults except for the sizes (SGD from 5, annealed; clip 0.25; steps of about 250
characters; dropout 0.05) and with all characters in its vocabulary; charlm trains with AdamW and one_cycle.
Both take the same number of epochs of the first 90% of the text, one layer, with the state carried, and are
scored on the last 10% by their own evaluation: Stanza in parallel streams from a zero state, to two decimals
of perplexity. Seconds are of the whole command.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import heading, record, text_or_none

from charlm.study.compare import markdown

EMBEDDING = 100


def stanza(python, text, folder, options):
    """Return the lowest val loss of the evaluations, and the seconds."""
    content = text.read_text(encoding="utf-8")
    cut = round(0.9 * len(content))
    for name, part in (("train.txt", content[:cut]), ("dev.txt", content[cut:])):
        (folder / name).write_text(part, encoding="utf-8")
    command = [python, "-m", "stanza.models.charlm", "--cpu", "--no_checkpoint"]
    settings = {
        "train_file": folder / "train.txt",
        "eval_file": folder / "dev.txt",
        "save_dir": folder / "saved",
        "shorthand": "en_bench",
        "char_emb_dim": EMBEDDING,
        "char_hidden_dim": options.hidden_size,
        "batch_size": options.batch_size,
        "bptt_size": options.seq_len,
        "epochs": options.epochs,
        "cutoff": 0,
        "eval_steps": -1,
    }
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    # PYTHONPATH can contain the packages of this environment.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    found = re.findall(r"eval checkpoint.*ppl +([\d.]+)", done.stderr + done.stdout)
    if done.returncode or not found:
        sys.exit(f"stanza failed:\n{done.stderr[-2000:]}")
    return math.log(min(map(float, found))), seconds


def charlm(text, folder, options):
    """Return the lowest val loss of the evaluations, and the seconds."""
    settings = {
        "corpus.source": text,
        "corpus.split": "[0.9, 0.1, 0.0]",
        "batches.sampling": "contiguous",
        "batches.batch_size": options.charlm_batch_size,
        "batches.seq_len": options.charlm_seq_len,
        "model.embedding_size": EMBEDDING,
        "model.hidden_size": options.hidden_size,
        "train.epochs": options.epochs,
        "train.lr": options.lr,
        "train.device": "cpu",
    }
    command = [sys.executable, "-m", "charlm", "train", "--name", "run"]
    for name, value in settings.items():
        command += ["--set", f"{name}={value}"]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"charlm failed:\n{done.stderr[-2000:]}")
    log = (folder / "runs/run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return min(row["val_loss"] for row in map(json.loads, log) if "val_loss" in row), seconds


def main():
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument(
        "--python",
        default=os.environ.get("BENCH_STANZA"),
        help="the Python of Stanza's environment; default: $BENCH_STANZA",
    )
    arguments.add_argument("--text", help="default: $BENCH_TEXT")
    arguments.add_argument("--hidden-size", type=int, default=256, help="Stanza's default: 1024")
    arguments.add_argument("--epochs", type=int, default=4, help="Stanza's default: 50")
    arguments.add_argument("--batch-size", type=int, default=100, help="Stanza's")
    arguments.add_argument("--seq-len", type=int, default=250, help="Stanza's")
    arguments.add_argument("--charlm-batch-size", type=int, default=24)
    arguments.add_argument("--charlm-seq-len", type=int, default=64)
    arguments.add_argument("--lr", default="7e-3", help="charlm's")
    options = arguments.parse_args()
    if not options.python:
        print("needs Stanza in its own environment: see benchmarks/stanza_charlm.py --help; not measured")
        return
    text = text_or_none(options.text, "stanza_charlm.py")
    if text is None:
        return
    python = str(Path(options.python).absolute())  # not resolved: the link selects the environment
    heading(
        f"Stanza's trainer and charlm, LSTM 1 × {options.hidden_size}, {options.epochs} epochs, {text.name}"
    )
    rows, found = [], {}
    for name, run in {
        "stanza": lambda folder: stanza(python, text, folder, options),
        "charlm": lambda folder: charlm(text, folder, options),
    }.items():
        with tempfile.TemporaryDirectory() as folder:
            nats, seconds = found[name] = run(Path(folder))
        rows.append([name, f"{nats:.3f}", f"{seconds:,.0f}"])
    print(markdown(["", "val nats/char", "seconds"], rows))
    record(
        stanza_nats=found["charlm"][0] - found["stanza"][0],
        stanza_time=found["stanza"][1] / found["charlm"][1],
    )


if __name__ == "__main__":
    main()
