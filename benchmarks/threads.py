"""Measure what more threads bring to training and writing, for the rule of `choose_threads`.

The numbers of threads alternate; figures are medians, of characters per second.
"""

import argparse
import statistics

import torch
from common import heading

from charlm.config import BatchesConfig, Config, ModelConfig, TrainConfig
from charlm.nn.kernels.native import keep_memory
from charlm.study.bench import make_learner, training_rate, writing_rate
from charlm.study.compare import markdown

# Batch and hidden sizes.
SIZES = [(1, 64), (1, 512), (4, 128), (8, 128), (16, 64), (32, 64), (32, 192), (24, 384), (64, 512)]


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--seconds", type=float, default=0.5)
    options = arguments.parse_args()
    keep_memory()
    processors = torch.get_num_threads()
    heading(f"One thread and {processors}, medians of {options.rounds} rounds")
    rows = []
    for batch_size, hidden_size in SIZES:
        batches = BatchesConfig(batch_size=batch_size, seq_len=64, stride=64)
        train = TrainConfig(lr=1e-4, schedule="constant", device="cpu")
        learner = make_learner(
            Config(model=ModelConfig(hidden_size=hidden_size), batches=batches, train=train)
        )
        shown = [f"{batch_size} × {hidden_size}"]
        for measure in (training_rate, writing_rate):
            found = {1: [], processors: []}
            for turn in range(options.rounds + 1):  # the first one warms up
                for threads, rates in found.items():
                    torch.set_num_threads(threads)
                    rates.append(measure(learner, options.seconds if turn else 0.0))
            one, all_ = (statistics.median(rates[1:]) for rates in found.values())
            shown += [f"{one:,.0f}", f"{all_:,.0f}", f"{all_ / one:.2f}×"]
        rows.append(shown)
    header = ["batch × hidden", "training, 1", f"{processors}", "", "writing, 1", f"{processors}", ""]
    print(markdown(header, rows))


if __name__ == "__main__":
    main()
