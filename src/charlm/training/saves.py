"""The saves of a training: when there are some, what is written in which order, and which are kept.

``state.pt`` is written first and decides: after a kill between two writes the rest is made from it.
"""

import math
import time
from pathlib import Path
from typing import Any

from charlm.config import Config
from charlm.errors import CharlmError
from charlm.nn.model import CharLM
from charlm.storage.header import read_header
from charlm.storage.model_file import save_model
from charlm.storage.run import Run
from charlm.text.vocab import Vocab
from charlm.training.progress import Progress


class Saves:
    """What a training writes into `run`'s folder, but for the log's lines.

    scored: the model that is saved for use.
    """

    def __init__(self, run: Run, scored: CharLM, vocab: Vocab, config: Config):
        self.run, self.scored, self.vocab, self.config = run, scored, vocab, config
        self.step, self.at = -1, time.monotonic()  # of the last save

    def due(self) -> bool:
        """Whether ``train.checkpoint_every`` is a time and has passed since the last save."""
        seconds = self.config.train.checkpoint_seconds
        return seconds is not None and time.monotonic() - self.at >= seconds

    def write(self, progress: Progress, state: dict[str, Any], good: bool, keep: bool) -> None:
        """Write ``state.pt`` and the models of `progress.step`.

        good: the run may go back to this save. What depends on the clock or on a signal is never good: the
            save to go back to, which it takes the place of, is put aside.
        keep: it is one of the ``train.keep_last``.
        """
        run, keep_last = self.run, self.config.train.keep_last
        if not good and self.step == progress.good_step:
            run.keep(progress.good_step)
        run.save_state(state)
        self.step, self.at = progress.step, time.monotonic()
        self._write_models(progress, state["figures"])
        if keep and keep_last > 1:
            run.keep(progress.step)
        self._prune(progress)

    def resume(self, progress: Progress, state: dict[str, Any], branched: bool) -> None:
        """Make the folder what it was when `state` was saved, and take what was logged since back.

        branched: `state` is not what ``state.pt`` says, and is saved now.
        """
        run, train = self.run, self.config.train
        if progress.best_step not in (0, progress.step) and not _is_best(run.best, progress):
            # The best model is gone, or from a time that the run was taken back from: it is found anew.
            kept = run.checkpoint(progress.best_step).last
            if _is_best(kept, progress):
                run.replace_best(kept)
            else:
                progress.best_loss = math.inf
        if branched:
            self.write(progress, state, good=True, keep=True)
        else:
            self.step = progress.step
            self._write_models(progress, state["figures"])
            if train.keep_last > 1 and progress.good_step == progress.step:
                run.keep(progress.step)
        run.cut_log(progress.log_size)
        self._prune(progress)

    def good(self, progress: Progress) -> Run:
        """Where the state of `progress.good_step` is."""
        return self.run if self.step == progress.good_step else self.run.checkpoint(progress.good_step)

    def _write_models(self, progress: Progress, figures: dict[str, Any]) -> None:
        """The last model, and the best if that is the one and is not there yet."""
        best = figures.get("val_loss") == progress.best_loss and not _is_best(self.run.best, progress)
        for path in [self.run.best, self.run.last] if best else [self.run.last]:
            save_model(path, self.scored, self.vocab, self.config, figures)

    def _prune(self, progress: Progress) -> None:
        """Remove the checkpoints that are too many, and those of a time that the run was taken back from."""
        keep_last = self.config.train.keep_last
        kept = [step for step in self.run.checkpoints() if step <= progress.step]
        kept = kept[-keep_last:] if keep_last > 1 else []
        if self.step != progress.good_step:
            kept.append(progress.good_step)
        self.run.prune(kept)


def _is_best(model: Path, progress: Progress) -> bool:
    """Whether `model` is the file of the model that `progress` knows as the best."""
    try:
        figures = read_header(model).figures
    except CharlmError:  # there is none, or it is damaged
        return False
    return (figures.get("step"), figures.get("val_loss")) == (progress.best_step, progress.best_loss)
