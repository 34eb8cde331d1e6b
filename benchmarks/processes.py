"""Compare the characters per second of one process with those of two with half the batch, on one machine.

Both take the same steps with as many threads in total; the rounds alternate, and medians are shown.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import heading, text_or_none

from charlm.study.compare import markdown

MODELS = {"LSTM 1 × 128": (128, 1, 60), "LSTM 2 × 512": (512, 2, 8)}  # hidden size, layers, steps


def rate(text, processes, threads, hidden, layers, steps):
    """Return the characters per second of all processes in the second half of a training."""
    settings = {
        "corpus.source": text, "batches.batch_size": 64 // processes, "batches.seq_len": 128,
        "batches.stride": 128, "batches.max_val_windows": 1, "model.hidden_size": hidden,
        "model.num_layers": layers, "train.max_steps": steps, "train.eval_every": steps // 2,
        "train.device": "cpu",
    }  # fmt: skip
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, *launch * (processes > 1), "-m", "charlm", "train", "--name", "run", *overrides],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": str(threads // processes)},
            check=True,
            capture_output=True,
        )
        lines = (Path(folder) / "runs/run/metrics.jsonl").read_text().splitlines()
    evaluations = [row for row in map(json.loads, lines) if "val_loss" in row]
    return evaluations[1]["chars_per_second"]


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--text", help="default: $BENCH_TEXT")
    arguments.add_argument("--threads", type=int, default=2, help="in total")
    arguments.add_argument("--rounds", type=int, default=3)
    options = arguments.parse_args()
    heading("Characters per second, one process and two")
    text = text_or_none(options.text, "processes.py")
    if text is None:
        return
    rows = []
    for name, (hidden, layers, steps) in MODELS.items():
        rounds = [
            [rate(text, processes, options.threads, hidden, layers, steps) for processes in (1, 2)]
            for _ in range(options.rounds)
        ]
        one, two = (statistics.median(rates) for rates in zip(*rounds, strict=True))
        rows.append([name, f"{one:,.0f}", f"{two:,.0f}", f"{two / one:.2f}×"])
    print(markdown(["", f"1 process, {options.threads} threads", "2 processes", ""], rows))


if __name__ == "__main__":
    main()
