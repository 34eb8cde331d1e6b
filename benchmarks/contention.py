"""Measure charlm beside other processes: two trainings at once, training and scoring beside a busy process.

With a fair share of the processors, two trainings at once take twice as long as one alone. Training times
are those of the log, without the start of the process; scoring is timed as a whole command. The columns
alternate; figures are medians.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import heading

from charlm.study.compare import markdown

BUSY = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): pass"  # it ends with this process
CHARACTERS = 2_000_000  # scored
MODELS = {  # settings, and steps that take some ten seconds alone
    "1 × 192, 32 × 64 (the default)": ([], 200),
    "1 × 512, 32 × 64": (["hidden_size=512"], 40),
    "2 × 512, 64 × 128": (["hidden_size=512", "num_layers=2", "batch_size=64", "seq_len=128"], 8),
}


def start(folder, name, settings, steps):
    """Start a training, whose log goes to runs/NAME in `folder`."""
    settings = [*settings, f"max_steps={steps}", "eval_every=1000000", "schedule=constant", "stride=64"]
    arguments = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "charlm", "train", "--name", name, *arguments]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL)


def train(folder, settings, steps, at_once=1):
    """Return the seconds of a training, the mean of `at_once` of them."""
    names = [f"{time.time_ns()}-{k}" for k in range(at_once)]
    processes = [start(folder, name, settings, steps) for name in names]
    if any(process.wait() for process in processes):
        sys.exit("a training failed")
    logs = [(folder / "runs" / name / "metrics.jsonl").read_text() for name in names]
    return statistics.mean(max(json.loads(row).get("seconds", 0) for row in log.splitlines()) for log in logs)


def score(folder):
    """Return the seconds of `charlm eval` of `CHARACTERS` characters."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "charlm", "eval", "--model", "runs/model", "text.txt"]
    subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


@contextlib.contextmanager
def busy():
    """Run a process that uses a whole processor."""
    process = subprocess.Popen([sys.executable, "-c", BUSY, str(os.getpid())])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure(work, rounds):
    """Return the medians of work(1) alone, of work(2), and of work(1) beside a busy process."""
    times = {"alone": [], "two at once": [], "beside one": []}
    for _ in range(rounds):
        times["alone"].append(work(1))
        times["two at once"].append(work(2))
        with busy():
            times["beside one"].append(work(1))
    return {name: statistics.median(found) for name, found in times.items()}


def score_at_once(folder, count):
    with ThreadPoolExecutor(count) as pool:
        return statistics.mean(pool.map(score, [folder] * count))


def main():
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--quick", action="store_true", help="one round")
    options = arguments.parse_args()
    rounds = 1 if options.quick else options.rounds
    heading(f"Beside other processes, {os.cpu_count()} processors, seconds, medians of {rounds} rounds")
    with tempfile.TemporaryDirectory() as name:
        folder, rows = Path(name), []
        if start(folder, "model", [], 20).wait():
            sys.exit("a training failed")
        corpus = (Path(__file__).parents[1] / "data" / "sancho.txt").read_text(encoding="utf-8")
        text = (corpus * (CHARACTERS // len(corpus) + 1))[:CHARACTERS]
        (folder / "text.txt").write_text(text, encoding="utf-8")
        works = {f"train {title}": lambda n, m=m: train(folder, *m, at_once=n) for title, m in MODELS.items()}
        works["eval, 2,000,000 characters"] = lambda n: score_at_once(folder, n)
        for title, work in works.items():
            found = measure(work, rounds)
            ratios = {key: found[key] / found["alone"] for key in ("two at once", "beside one")}
            rows.append(
                [title, *(f"{found[key]:.1f}" for key in found), *(f"{r:.2f}×" for r in ratios.values())]
            )
    header = ["", "alone", "two at once", "beside a busy process", "two to alone", "beside to alone"]
    print(markdown(header, rows), flush=True)


if __name__ == "__main__":
    main()
