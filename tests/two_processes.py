"""The trainings of test_distributed.py: two processes run python two_processes.py FOLDER."""

import contextlib
import os
import signal
import sys
from pathlib import Path

import torch

from charlm.config import from_data
from charlm.errors import CharlmError, Interrupted
from charlm.storage import run as runs
from charlm.storage.run import Run
from charlm.text.corpus import Corpus
from charlm.training.distributed import ALONE, end_process, joined
from charlm.training.trainer import Trainer
from conftest import TINY

# Of 67 windows the last batch has 1 for one process and 2 for the other; of 65 or 137 records, none and 1.
CASES = {
    "windows": ["corpus.max_chars=597"],
    "a last batch of one window": ["corpus.max_chars=579"],
    "streams": ["batches.sampling=contiguous", "batches.truncation=random"],
    "builtin": ["model.implementation=builtin", "model.num_layers=2", "model.cell=gru"],
    "filling": ["model.direction=both", "train.clip_value=0.01"],
    "backward": ["model.direction=backward", "model.input=one_hot", "train.loss_on=last"],
    "records": ["corpus.records=' '", "corpus.max_chars=725"],
    "averaged": [
        "train.ema=0.9", "train.schedule=plateau", "model.tie_weights=true", "model.embedding_size=12",
    ],
}  # fmt: skip
ALWAYS = ["train.epochs=2", "train.optimizer=sgd", "train.lr=0.3", "train.eval_every=7", "model.dropout=0.0"]
ALWAYS += ["train.precision=float32"]  # in bfloat16, one batch and its two halves round differently


def configure(overrides, processes=1):
    """Return the configuration of a case; a step reads the same sequences with any number of processes."""
    config = from_data({}, "", [*TINY, "batches.batch_size=8", *ALWAYS, *overrides])
    batches = config.batches.model_copy(update={"batch_size": config.batches.batch_size // processes})
    return config.model_copy(update={"batches": batches})


class Recorder:
    """A reporter that records each step's loss, characters and gradients.

    stop_after: the number of steps after which it ends the training.
    signal_at: the step at which the last process sends itself SIGTERM.
    """

    def __init__(self, trainer, stop_after=None, signal_at=None):
        self.trainer, self.stop_after, self.signal_at, self.steps = trainer, stop_after, signal_at, []

    def step(self, loss, characters, seconds):
        gradients = [parameter.grad.clone() for parameter in self.trainer.learner.model.parameters()]
        self.steps.append((loss, characters, gradients))
        if len(self.steps) == self.stop_after:
            raise InterruptedError
        if len(self.steps) == self.signal_at and self.trainer.group.rank == self.trainer.group.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def begin(self, *_):
        pass

    def logged(self, *_):
        pass

    def evaluated(self, *_):
        pass

    def end(self):
        pass


def train(text, overrides, folder, group=ALONE, stop_after=None, resume=False, signal_at=None):
    """Train on `text` to the end, or for `stop_after` steps; return the trainer and the recorded steps."""
    config = configure(overrides, group.size)
    text, records = text[: config.corpus.max_chars or 900], config.corpus.records
    corpus = Corpus.from_text(text, records=records, seed=config.train.seed)
    trainer, run = Trainer(config, corpus, group), Run(folder)
    if resume:
        trainer.restore(run)
    elif group.first:
        runs.create(run, config)
    recorder = Recorder(trainer, stop_after, signal_at)
    with contextlib.suppress(InterruptedError):
        trainer.train(run, recorder)
    return trainer, recorder.steps


def main(folder):
    """Write everything that the tests examine into `folder`."""
    text = (folder / "text").read_text(encoding="utf-8")
    with joined() as group:
        torch.set_num_threads(1)
        for name, overrides in CASES.items():
            trainer, steps = train(text, overrides, folder / name, group)
            models = trainer.learner.model, trainer.learner.scored
            weights = [[p.detach() for p in model.parameters()] for model in models]
            torch.save((steps, weights), folder / f"{name}.{group.rank}")
        for name in ("windows", "streams"):
            train(text, [*CASES[name], "train.checkpoint_every=5"], folder / f"{name}, stopped", group, 8)
            noisy = [*CASES[name], "train.checkpoint_every=5", "model.dropout=0.4"]
            train(text, noisy, folder / f"{name}, noisy", group)
            train(text, noisy, folder / f"{name}, noisy, stopped", group, 8)
            train(text, noisy, folder / f"{name}, noisy, stopped", group, resume=True)
            torch.save(torch.get_rng_state(), folder / f"{name}.rng.{group.rank}")
        try:
            train(text, [], folder / "signalled", group, signal_at=6)
        except Interrupted as error:
            (folder / f"signalled.{group.rank}").write_text(f"{error.exit_code} {error}")
        (folder / f"agreed.{group.rank}").write_text(
            f"{group.largest(3 + group.rank)} {group.sum(0.25)} {group.from_first(lambda: ['é', 0.1, None])}"
        )
        try:
            group.check_same("text", str(group.rank))
        except CharlmError as error:
            (folder / f"different.{group.rank}").write_text(str(error))
        if group.rank == 1:
            raise CharlmError("the disk is full")
        group.largest(0)


if __name__ == "__main__":
    code = 0
    try:
        main(Path(sys.argv[1]))
    except CharlmError as error:
        code = 1
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    end_process(code)
