"""Measure the speed of generation on this machine: charlm against a plain loop over `torch.nn`.

The plain loop calls `nn.LSTM` for each character, then `softmax` and `multinomial`. The contestants alternate
in rounds, so that a drift of the machine's speed affects all of them; the tables have the medians. With
--text, prints the perplexity of a model on a text, in full precision and quantised.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import heading, record
from torch import nn

from charlm.config import Config, from_data
from charlm.inference.sample import Sampling, generate, generate_batch
from charlm.nn.model import CharLM
from charlm.nn.stepper import Stepper
from charlm.storage.model_file import load_model, save_model
from charlm.text.vocab import Vocab

SIZES = [(2, 512), (1, 256)]
VOCAB = Vocab("".join(map(chr, range(33, 123))))
BATCH = 16


class Plain(nn.Module):
    """An LSTM language model made of `torch.nn` modules."""

    def __init__(self, layers, hidden):
        super().__init__()
        self.embedding = nn.Embedding(len(VOCAB), 64)
        self.lstm = nn.LSTM(64, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, len(VOCAB))


@torch.inference_mode()
def generate_plainly(model, length):
    x, state, text = torch.zeros(1, 1, dtype=torch.long), None, []
    for _ in range(length):
        y, state = model.lstm(model.embedding(x), state)
        probabilities = (model.head(y[0, -1]) / 0.7).softmax(0)
        x = torch.multinomial(probabilities, 1)[None]
        text.append(VOCAB.characters[int(x)])
    return "".join(text)


def contestants(layers, hidden, length):
    """Yield each contestant's name, function, and number of characters."""
    plain = Plain(layers, hidden).eval()
    data = {"cell": "lstm", "num_layers": layers, "hidden_size": hidden}
    model = CharLM(len(VOCAB), from_data({"model": data}, "the benchmark").model).initialise(0)
    prefix = VOCAB.encode("a")

    def single(quantize=None):
        return "".join(generate(model, VOCAB, prefix, length, Sampling(), quantize=quantize))

    def batch(quantize=None):
        generators = [torch.Generator().manual_seed(k) for k in range(BATCH)]
        return generate_batch(model, VOCAB, prefix, length, Sampling(), generators, quantize)

    yield "torch.nn, a call a character", lambda: generate_plainly(plain, length), length
    for how in (None, "bf16", "int8"):
        yield f"charlm{f', {how}' if how else ''}", lambda how=how: single(how), length
    for how in (None, "int8"):
        name = f"charlm, {BATCH} texts in parallel{f', {how}' if how else ''}"
        yield name, lambda how=how: batch(how), length * BATCH


def table(layers, hidden, length, rounds):
    found = {}
    for turn in range(rounds + 1):  # the first one warms up
        for name, write, characters in contestants(layers, hidden, length):
            start = time.perf_counter()
            write()
            if turn:
                found.setdefault(name, []).append((time.perf_counter() - start) / characters)
    print(f"\n{layers} × {hidden} LSTM, {torch.get_num_threads()} threads, medians of {rounds} × {length}\n")
    print("| | µs/character | characters/s | vs. torch.nn |\n|---|---|---|---|")
    medians = {name: statistics.median(times) for name, times in found.items()}
    base = next(iter(medians.values()))
    if (layers, hidden) == (2, 512):
        record(generation=base / medians["charlm"])
    for name, seconds in medians.items():
        print(f"| {name} | {seconds * 1e6:.0f} | {1 / seconds:,.0f} | {base / seconds:.1f} |")


def first_character(rounds):
    """Print the time from the command to its first character, and that of importing torch."""
    times = {"import torch": [], "charlm generate": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_model(path, CharLM(len(VOCAB), Config().model).initialise(0), VOCAB, Config(), {})
        command = [sys.executable, "-m", "charlm", "generate", "--model", str(path), "--prefix", "a"]
        for _ in range(rounds):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", "import torch"], check=True)
            times["import torch"].append(time.perf_counter() - start)
            start = time.perf_counter()
            with subprocess.Popen([*command, "--length", "9"], stdout=subprocess.PIPE) as running:
                written = b""
                while len(written) < 2:  # the first is the prefix
                    written += os.read(running.stdout.fileno(), 1)
                times["charlm generate"].append(time.perf_counter() - start)
    print("\n| from the command to | seconds |\n|---|---|")
    print(f"| `import torch` done | {statistics.median(times['import torch']):.2f} |")
    print(f"| the first character | {statistics.median(times['charlm generate']):.2f} |")


def loss_of_bits(path, text, characters):
    """Print the perplexity of `text`, computed by the steps that generate."""
    loaded = load_model(path)
    ids = loaded.vocab.encode(text.read_text(encoding="utf-8-sig")[-characters - 1 :], "skip").long()
    print(f"\n{path}, the last {len(ids) - 1:,} characters of {text.name}\n")
    print("| weights | perplexity | more |\n|---|---|---|")
    base = None
    for how in (None, "bf16", "int8"):
        stepper, state, nats = Stepper(loaded.model, how), loaded.model.initial_state(1), 0.0
        for x, y in itertools.pairwise(ids):
            logits, state = stepper.step(x[None], state)
            nats += float(-logits[0].double().log_softmax(0)[y])
        perplexity = torch.tensor(nats / (len(ids) - 1), dtype=torch.float64).exp().item()
        base = base or perplexity
        print(f"| {how or 'float32'} | {perplexity:.4f} | {100 * (perplexity / base - 1):+.3f}% |")


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--length", type=int, default=500)
    arguments.add_argument("--model", type=Path, help="a model file to score on --text")
    arguments.add_argument("--text", type=Path)
    arguments.add_argument("--characters", type=int, default=20_000, help="characters at the end of --text")
    options = arguments.parse_args()
    if options.text:
        loss_of_bits(options.model, options.text, options.characters)
        return
    heading("Generation")
    for layers, hidden in SIZES:
        table(layers, hidden, options.length, options.rounds)
    first_character(options.rounds)


if __name__ == "__main__":
    main()
