"""Compare the val loss after the same steps in bfloat16 and in float32.

On a CPU without bfloat16 instructions charlm trains in float32, and emulated bfloat16 is a hundred times
slower: a small model in the scratch implementation is then measured under autocast.
"""

import argparse
import math

import torch
from common import heading, record

from charlm.config import BatchesConfig, Config, CorpusConfig, ModelConfig, TrainConfig
from charlm.inference.evaluate import evaluate
from charlm.nn.device import choose_precision
from charlm.nn.kernels.native import keep_memory
from charlm.study.compare import markdown
from charlm.text.corpus import Corpus
from charlm.training.learner import Learner


def val_loss(config, corpus, precision):
    """Return the val loss after all steps, in `precision` even if the device emulates it."""
    learner = Learner(config, corpus)
    learner.precision = precision
    for x, y in learner.remaining_batches():
        learner.step(x, y)
    return evaluate(learner.scored, corpus.val).loss


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--text", default="sancho", help="default: the bundled corpus")
    arguments.add_argument("--cell", choices=["lstm", "gru", "rnn"], default="lstm")
    arguments.add_argument("--hidden-size", type=int, help="default: 256; 32 without the instructions")
    arguments.add_argument("--steps", type=int, help="default: 600; 100 without the instructions")
    arguments.add_argument("--seeds", type=int, default=3)
    options = arguments.parse_args()
    native = choose_precision("auto", torch.device("cpu"))[0] == torch.bfloat16
    hidden = options.hidden_size or (256 if native else 32)
    steps = options.steps or (600 if native else 100)
    corpus = Corpus.load(CorpusConfig(source=options.text))
    keep_memory()
    rows, differences = [], []
    for seed in range(1, options.seeds + 1):
        config = Config(
            model=ModelConfig(
                cell=options.cell, hidden_size=hidden, implementation="auto" if native else "scratch"
            ),
            batches=BatchesConfig(sampling="contiguous", batch_size=16),
            train=TrainConfig(device="cpu", precision="float32", max_steps=steps, seed=seed),
        )
        wide, narrow = (val_loss(config, corpus, dtype) for dtype in (torch.float32, torch.bfloat16))
        differences.append(narrow - wide)
        rows.append([str(seed), f"{wide:.4f}", f"{narrow:.4f}", f"{narrow - wide:+.4f}"])
    heading(f"Val loss in bfloat16 and float32, {options.cell} {hidden}, {steps} steps, {options.text}")
    if not native:
        print("This CPU has no bfloat16 instructions: the scratch implementation under autocast.\n")
    print(markdown(["seed", "float32", "bfloat16", "difference"], rows))
    mean = math.fsum(differences) / len(differences)
    print(f"\nmean difference {mean:+.4f} nats per character")
    record(bfloat16_nats=abs(mean))


if __name__ == "__main__":
    main()
