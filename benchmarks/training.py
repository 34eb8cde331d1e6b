"""Compare the characters per second of training with charlm and with a plain loop over `torch.nn`.

Every contestant is a separate process, so that its settings of the memory allocator do not affect the others.
They alternate in rounds; an idle process waits for its next line. The plain loops have an embedding,
`nn.LSTM` (or GRU, RNN), a linear head, cross entropy, `clip_grad_norm_` and AdamW, in float32, or with
bfloat16 autocast if the CPU has the instructions. "charlm" has model.implementation and train.precision auto.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
from contextlib import ExitStack

import torch
from common import heading, record
from torch import nn
from torch.nn import functional as F

from charlm.config import BatchesConfig, Config, ModelConfig, TrainConfig
from charlm.nn.cells import CELLS
from charlm.nn.device import choose_precision
from charlm.nn.kernels.native import keep_memory
from charlm.study.bench import CHARACTERS, make_learner, matrix_rate, operations, rate, training_rate
from charlm.study.compare import markdown

SIZES = {
    "2 × 512, batch 64 × 128": {"hidden_size": 512, "num_layers": 2, "batch_size": 64, "seq_len": 128},
    "1 × 32, batch 1024 × 32": {"hidden_size": 32, "num_layers": 1, "batch_size": 1024, "seq_len": 32},
}
EMBEDDING = 64
CPU = torch.device("cpu")
BFLOAT16 = choose_precision("auto", CPU)[0] == torch.bfloat16


class Plain(nn.Module):
    """The character model of common tutorials."""

    def __init__(self, cell, hidden_size, num_layers):
        super().__init__()
        self.embedding = nn.Embedding(len(CHARACTERS), EMBEDDING)
        kind = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[cell]
        self.rnn = kind(EMBEDDING, hidden_size, num_layers, batch_first=True)
        self.head = nn.Linear(hidden_size, len(CHARACTERS))

    def forward(self, x):
        y, _ = self.rnn(self.embedding(x))
        return self.head(y)


def plain_step(cell, size, bfloat16):
    """Return a function that takes one step of the plain loop and returns its number of characters."""
    torch.manual_seed(1)
    model = Plain(cell, size["hidden_size"], size["num_layers"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    x, y = torch.randint(len(CHARACTERS), (2, size["batch_size"], size["seq_len"]))

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            logits = model(x)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()
        return y.numel()

    return step


def charlm_learner(cell, size, implementation, precision):
    model = ModelConfig(
        cell=cell,
        implementation=implementation,
        hidden_size=size["hidden_size"],
        num_layers=size["num_layers"],
        embedding_size=EMBEDDING,
        dropout=0.0,
    )
    batches = BatchesConfig(
        batch_size=size["batch_size"], seq_len=size["seq_len"], stride=size["seq_len"], shuffle=False
    )
    train = TrainConfig(lr=1e-4, schedule="constant", device="cpu", precision=precision)
    return make_learner(Config(model=model, batches=batches, train=train))


def work(contestant, cell, size):
    """Return a function of seconds that measures the characters per second of a contestant."""
    kind, _, precision = contestant.partition(", ")
    if kind == "plain nn":
        step = plain_step(cell, size, precision == "bfloat16")
        return lambda seconds: rate(step, seconds)
    keep_memory()  # as `charlm train` does
    implementation = kind.removeprefix("charlm ") if kind != "charlm" else "auto"
    learner = charlm_learner(cell, size, implementation, precision or "auto")
    return lambda seconds: training_rate(learner, seconds)


def worker():
    """Run a contestant: read its description as a line of JSON, then a line with the seconds of each turn."""
    contestant, cell, size = json.loads(input())
    measure = work(contestant, cell, size)
    while True:
        print(measure(float(input())), flush=True)


class Contestant:
    """The process of a worker, driven over pipes."""

    def __init__(self, *what):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._say(json.dumps(what))

    def _say(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def run(self, seconds):
        self._say(str(seconds))
        return float(self.process.stdout.readline())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()


def contestants(cell):
    names = ["plain nn, float32", *(["plain nn, bfloat16"] if BFLOAT16 else []), "charlm"]
    return names + [f"charlm {name}, float32" for name in CELLS[cell].implementations]


def measure(cell, size, rounds, seconds):
    """Return the rates of each contestant and of the machine's matrix products in each round."""
    rates = {name: [] for name in contestants(cell)}
    products = {name: [] for name in ("float32", *(["bfloat16"] if BFLOAT16 else []))}
    with ExitStack() as stack:
        processes = {name: stack.enter_context(Contestant(name, cell, size)) for name in rates}
        for turn in range(rounds + 1):  # the first one warms up
            for name, process in processes.items():
                rates[name].append(process.run(seconds if turn else 0.0))
            for name, found in products.items():
                found.append(matrix_rate(CPU, getattr(torch, name), min(seconds, 1.0)))
    return [{name: found[1:] for name, found in each.items()} for each in (rates, products)]


def ratio(rates, name, other):
    """Return the median over the rounds of the ratio of two contestants' rates."""
    return statistics.median(a / b for a, b in zip(rates[name], rates[other], strict=True))


def report(cell, title, rates, products):
    size = SIZES[title]
    flops = operations(charlm_learner(cell, size, "builtin", "float32").model)
    limits = {name: statistics.median(found) for name, found in products.items()}
    rows = []
    for name in rates:
        kind, _, precision = name.partition(", ")
        precision = precision or ("bfloat16" if BFLOAT16 else "float32")
        found = statistics.median(rates[name])
        rows.append(
            [
                f"{kind}, {precision}" if kind != "charlm" else f"charlm auto, {precision}",
                f"{found:,.0f}",
                f"{ratio(rates, name, 'plain nn, float32'):.2f}",
                f"{ratio(rates, name, 'plain nn, bfloat16'):.2f}" if BFLOAT16 else "-",
                f"{found * flops / limits[precision]:.1%}",
            ]
        )
    shown = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in limits.items())
    missing = "" if BFLOAT16 else "; no plain bfloat16 loop: this CPU has no bfloat16 instructions"
    print(f"\n{cell.upper()} {title}; products, GFLOP/s: {shown}{missing}\n")
    header = ["", "characters/s", "to plain float32", "to plain bfloat16", "of the products"]
    print(markdown(header, rows), flush=True)
    share = statistics.median(rates["charlm"]) * flops / limits["bfloat16" if BFLOAT16 else "float32"]
    return figures(cell, "large" if title == next(iter(SIZES)) else "small", rates, share)


def figures(cell, size, rates, share):
    """Return the figures that `targets.py` reads."""
    found = {f"{cell}_{size}_vs_plain": ratio(rates, "charlm", "plain nn, float32")}
    if cell == "lstm" and size == "large":
        found["share"], found["share_of"] = share, "bfloat16" if BFLOAT16 else "float32"
        if BFLOAT16:
            found["lstm_large_vs_bfloat16"] = ratio(rates, "charlm", "plain nn, bfloat16")
    if size == "large":
        scratch, builtin = "charlm scratch, float32", "charlm builtin, float32"
        found[f"{cell}_scratch_vs_builtin"] = ratio(rates, scratch, builtin)
    return found


def main():
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--cell", action="append", choices=list(CELLS), help="default: all")
    arguments.add_argument("--size", choices=["large", "small"], help="default: both")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--seconds", type=float, default=2.0, help="of a turn, at least one step")
    arguments.add_argument("--quick", action="store_true", help="three rounds of half a second")
    arguments.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.worker:
        with contextlib.suppress(EOFError):
            worker()
        return
    rounds, seconds = (3, 0.5) if options.quick else (options.rounds, options.seconds)
    heading(f"Training, characters per second, medians of {rounds} rounds")
    for title in SIZES:
        if options.size in (None, "large" if title == next(iter(SIZES)) else "small"):
            for cell in options.cell or list(CELLS):
                record(**report(cell, title, *measure(cell, SIZES[title], rounds, seconds)))


if __name__ == "__main__":
    main()
