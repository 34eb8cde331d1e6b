"""How many characters a second each cell trains on, in each implementation, on this machine.

Each round takes every combination in turn, so that a machine whose speed drifts is fair to all; the table
has the medians.
"""

import argparse
import statistics
import time

import torch

from charlm.config import from_data
from charlm.corpus import Corpus
from charlm.train import Trainer


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--hidden-size", type=int, default=256)
    arguments.add_argument("--num-layers", type=int, default=1)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--steps", type=int, default=5, help="steps of 32 × 64 characters in a round")
    options = arguments.parse_args()
    trainers = {}
    for cell in ("rnn", "lstm", "gru"):
        for implementation in ("builtin", "scratch"):
            config = from_data(
                {
                    "model": {
                        "cell": cell,
                        "implementation": implementation,
                        "hidden_size": options.hidden_size,
                        "num_layers": options.num_layers,
                    },
                    "batches": {"batch_size": 32, "seq_len": 64},
                },
                "the benchmark",
            )
            trainers[cell, implementation] = Trainer(config, Corpus.load(config.corpus))
    rates = {key: [] for key in trainers}
    for turn in range(options.rounds + 1):  # the first warms up
        for key, trainer in trainers.items():
            batches = [
                batch for batch, _ in zip(trainer.batches.loader(1, 0), range(options.steps), strict=False)
            ]
            began = time.perf_counter()
            for x, y in batches:
                trainer.step(x, y)
            if turn:
                rates[key].append(sum(x.numel() for x, _ in batches) / (time.perf_counter() - began))
    any_trainer = next(iter(trainers.values()))
    print(
        f"{options.num_layers} × {options.hidden_size}, {any_trainer.device}, {any_trainer.precision}, ",
        end="",
    )
    print(f"{torch.get_num_threads()} threads: characters a second, medians of {options.rounds}\n")
    print("| cell | builtin | scratch | scratch / builtin |\n|---|---|---|---|")
    for cell in ("rnn", "lstm", "gru"):
        builtin, scratch = (statistics.median(rates[cell, i]) for i in ("builtin", "scratch"))
        print(f"| {cell} | {builtin:,.0f} | {scratch:,.0f} | {scratch / builtin:.2f} |")


if __name__ == "__main__":
    main()
