"""Measure the speed of encoding a long text, and the memory of encoding and of training on it.

A text of --megabytes is made from the paragraphs of the bundled text in random order, encoded, loaded from
the cache, and used for a few training steps, in a separate process. Memory is relative to the process before;
"anonymous" excludes pages of files, which the kernel can reclaim. Linux only: reads /proc.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from common import heading

from charlm.study.compare import markdown
from charlm.text.read import find_files


def make(path, megabytes):
    """Write a text of `megabytes`."""
    paragraphs = find_files("sancho").files[0].read_text(encoding="utf-8").split("\n\n")
    draw, written = random.Random(0), 0
    with path.open("w", encoding="utf-8") as file:
        while written < megabytes * 10**6:
            chosen = draw.choices(paragraphs, k=1000)
            written += len("".join(f"{text}\n\n" for text in chosen).encode())
            file.write("".join(f"{text}\n\n" for text in chosen))


def memory():
    """Return the MB of this process: resident, peak since the last reset, and anonymous."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) / 1000 for name in ("VmRSS", "VmHWM", "RssAnon")}


class Watch:
    """Measures the time and the peak memory of its block, relative to `base`."""

    def __init__(self, base):
        self.base, self.anonymous, self.over = base, 0.0, threading.Event()

    def __enter__(self):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        self.thread = threading.Thread(target=self.sample)
        self.thread.start()
        self.start, self.cpu = time.perf_counter(), time.process_time()
        return self

    def sample(self):
        while True:
            self.anonymous = max(self.anonymous, memory()["RssAnon"])
            if self.over.wait(0.02):
                return

    def __exit__(self, *error):
        self.seconds, self.cpu = time.perf_counter() - self.start, time.process_time() - self.cpu
        self.over.set()
        self.thread.join()
        self.peak = memory()["VmHWM"] - self.base["VmRSS"]
        self.anonymous -= self.base["RssAnon"]

    def row(self, name, note):
        return [name, f"{self.seconds:,.1f}", f"{self.peak:,.0f}", f"{self.anonymous:,.0f}", note]


def measure(path, steps):
    import torch

    from charlm.config import Config, CorpusConfig, TrainConfig
    from charlm.nn.kernels.native import keep_memory
    from charlm.text.corpus import Corpus
    from charlm.training.learner import Learner

    torch.set_num_threads(1)
    keep_memory()
    config = Config(
        corpus=CorpusConfig(source=str(path)), train=TrainConfig(device="cpu", precision="float32")
    )
    Learner(config, Corpus.from_text("a text that " * 999)).batches  # noqa: B018 - all modules are imported by then
    base, megabytes, rows = memory(), path.stat().st_size / 1e6, []
    with Watch(base) as watch:
        corpus = Corpus.load(config.corpus)
    rate = f"{megabytes / watch.seconds:,.0f} MB/s, {megabytes / watch.cpu:,.0f} per second of processor time"
    rows.append(watch.row("encoded", rate))
    count = len(corpus.train) + len(corpus.val) + len(corpus.test)
    print(f"{megabytes:,.0f} MB, {count:,} characters, {len(corpus.vocab)} different, {corpus.train.dtype}\n")
    del corpus
    with Watch(base) as watch:
        corpus = Corpus.load(config.corpus)
    rows.append(watch.row("loaded from the cache", ""))
    with Watch(base) as watch:
        learner = Learner(config, corpus)
        batches = iter(learner.batches.loader(config.train.seed, 0, 0))
        learner.step(*next(batches))
    rows.append(watch.row("first step", f"{learner.steps_per_epoch:,} steps an epoch"))
    with Watch(base) as watch:
        for _ in range(steps):
            x, _ = next(batches)
    rows.append(
        watch.row(f"{steps:,} batches more", f"{steps * x.numel() / watch.seconds / 1e6:,.1f} M chars/s")
    )
    print(markdown(["", "seconds", "peak, MB", "anonymous, MB", ""], rows))


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--megabytes", type=int, default=200)
    arguments.add_argument("--batches", type=int, default=5000)
    arguments.add_argument("--folder", type=Path, help="for temporary files")
    arguments.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.measure:
        measure(options.measure, options.batches)
        return
    heading("A long text")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "text.txt"
        make(path, options.megabytes)
        command = [sys.executable, __file__, "--measure", str(path), "--batches", str(options.batches)]
        subprocess.run(command, check=True, env={**os.environ, "XDG_CACHE_HOME": folder})


if __name__ == "__main__":
    main()
