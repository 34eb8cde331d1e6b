"""Measure the speed of reading and encoding a text, and the share of the loader in a training step.

MB are of UTF-8, on one core. The share is measured on a model so small that the loader is visible: 32 hidden
units, 1,024 × 32 characters per step.
"""

import argparse
import hashlib
import os
import statistics
import tempfile
import time
import unicodedata
from pathlib import Path

import torch
from common import heading, record

from charlm.config import BatchesConfig, Config, CorpusConfig, ModelConfig, TrainConfig
from charlm.nn.kernels.native import keep_memory
from charlm.study.bench import rate
from charlm.study.compare import markdown
from charlm.text import read
from charlm.text.corpus import Corpus
from charlm.text.decode import decode
from charlm.text.encode import Encoder, smallest_dtype
from charlm.training.learner import Learner


def stages(path, rounds):
    """Return the MB/s of each stage by name, medians of `rounds`."""
    megabytes = path.stat().st_size / 1e6
    data = path.read_bytes()
    content = decode(data, "")
    vocab = Corpus.from_text(content, (1.0, 0.0, 0.0)).vocab
    dtype = smallest_dtype(len(vocab))

    def encode():
        encoder = Encoder()
        encoder.add(content)
        encoder.finish((0.9, 0.05, 0.05)).in_memory()

    def load():
        with tempfile.TemporaryDirectory() as folder:  # an empty cache
            os.environ["XDG_CACHE_HOME"] = folder
            Corpus.load(CorpusConfig(source=str(path)))

    work = {
        "read": path.read_bytes,
        "decode, line ends": lambda: decode(data, ""),
        "look for Gutenberg's licence": lambda: list(read.strip_pieces(lambda: iter([content]))),
        "check for NFC": lambda: unicodedata.is_normalized("NFC", content),
        "look up ids": lambda: vocab.encode(content, dtype=dtype),
        "fingerprint": lambda: hashlib.sha256(content.encode()).hexdigest(),
        "encoding: count, look up, fingerprint": encode,
        "all: Corpus.load": load,
    }
    rates = {name: [] for name in work}
    for _ in range(rounds):
        for name, function in work.items():
            start = time.perf_counter()
            function()
            rates[name].append(megabytes / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def loader_share(sampling, seconds):
    """Return the milliseconds of a step without the loader, and of the loader."""
    batches = BatchesConfig(sampling=sampling, batch_size=1024, seq_len=32, stride=32)
    train = TrainConfig(device="cpu", schedule="constant", lr=1e-3)
    config = Config(model=ModelConfig(hidden_size=32), batches=batches, train=train)
    letters = torch.randint(97, 123, (1_200_000,), dtype=torch.uint8).numpy().tobytes().decode()
    learner = Learner(config, Corpus.from_text(letters))
    loading, stepping = [], []
    remaining = learner.remaining_batches()

    def one_step():
        start = time.perf_counter()
        x, y = next(remaining)
        loaded = time.perf_counter()
        learner.step(x, y)
        loading.append(loaded - start)
        stepping.append(time.perf_counter() - loaded)
        return 1

    rate(one_step, seconds)
    return 1000 * statistics.mean(stepping[1:]), 1000 * statistics.mean(loading[1:])


def main():
    keep_memory()
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument(
        "--text", type=Path, help="repeated up to --megabytes; default: the bundled corpus"
    )
    arguments.add_argument("--megabytes", type=int, default=100)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--seconds", type=float, default=5.0, help="of training, for each sampling")
    options = arguments.parse_args()
    heading("Reading, encoding, loading")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    content = (options.text or read.find_files("sancho").files[0]).read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        path.write_bytes(content * -(-options.megabytes * 10**6 // len(content)))
        found = stages(path, options.rounds)
        megabytes = path.stat().st_size / 1e6
    torch.set_num_threads(threads)
    rows = [[name, f"{value:,.0f}"] for name, value in found.items()]
    print(f"{megabytes:,.0f} MB, one core\n\n{markdown(['stage', 'MB/s'], rows)}\n")
    rows, shares = [], []
    for sampling in ("sliding", "contiguous"):
        step, load = loader_share(sampling, options.seconds)
        shares.append(load / (load + step))
        rows.append([sampling, f"{step:.2f}", f"{load:.2f}", f"{shares[-1]:.1%}"])
    print(markdown(["sampling", "step, ms", "loader, ms", "loader's share"], rows))
    record(encoding=found["encoding: count, look up, fingerprint"], loader=max(shares))


if __name__ == "__main__":
    main()
