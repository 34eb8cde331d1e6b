"""The saves of a training: when they are due, in which order files are written, and which saves are kept.

``state.safetensors`` is written first and decides: after a kill between two writes, the other files are
restored from it.
"""

import math
import time
from pathlib import Path
from typing import Any

from charlm.config import Config
from charlm.errors import CharlmError
from charlm.nn.model import CharLM
from charlm.storage import log
from charlm.storage.header import read_header
from charlm.storage.model_file import save_model
from charlm.storage.run import Run, link
from charlm.text.corpus import Corpus
from charlm.training.progress import Progress


class Saves:
    """The files that a training writes into the folder of `run`, except for the rows of the log.

    scored: the model that is saved for use.
    step: the step of the last save.
    """

    def __init__(self, run: Run, scored: CharLM, corpus: Corpus, config: Config):
        self.run, self.scored, self.corpus, self.config = run, scored, corpus, config
        self.step, self.saved_at = -1, time.monotonic()

    def due(self) -> bool:
        """Return whether ``train.checkpoint_every`` is a time that has passed since the last save."""
        seconds = self.config.train.checkpoint_seconds
        return seconds is not None and time.monotonic() - self.saved_at >= seconds

    def write(self, progress: Progress, state: dict[str, Any], sound: bool, keep: bool) -> None:
        """Write ``state.safetensors`` and the models of `progress.step`.

        sound: the run can roll back to this save. A save that depends on the clock or on a signal is never
            sound; the sound save that it replaces is kept as a checkpoint.
        keep: this is one of the saves that ``train.keep_last`` counts.
        """
        run, keep_last = self.run, self.config.train.keep_last
        if not sound and self.step == progress.rollback_step:
            run.keep(progress.rollback_step)
        run.save_state(state)
        self.step, self.saved_at = progress.step, time.monotonic()
        self._write_models(progress, state["figures"])
        if keep and keep_last > 1:
            run.keep(progress.step)
        self._prune(progress)

    def resume(self, progress: Progress, state: dict[str, Any], diverged_from_save: bool) -> None:
        """Restore the folder to what it was when `state` was saved, and remove later rows from the log.

        diverged_from_save: `state` differs from ``state.safetensors``, and is saved now.
        """
        run, train = self.run, self.config.train
        if progress.best_step not in (0, progress.step) and not _is_best(run.best, progress):
            # The best model is missing, or is of a step after the one that is resumed from.
            checkpoint = run.checkpoint(progress.best_step).last
            if _is_best(checkpoint, progress):
                link(checkpoint, run.best)
            else:
                progress.best_loss = math.inf
        if diverged_from_save:
            self.write(progress, state, sound=True, keep=True)
        else:
            self.step = progress.step
            self._write_models(progress, state["figures"])
            if train.keep_last > 1 and progress.rollback_step == progress.step:
                run.keep(progress.step)
        log.cut(run, progress.log_size)
        self._prune(progress)

    def _write_models(self, progress: Progress, figures: dict[str, Any]) -> None:
        """Write the last model, and the best if this is the best and is not there yet."""
        best = _of_best(figures, progress) and progress.best_step and not _is_best(self.run.best, progress)
        for path in [self.run.best, self.run.last] if best else [self.run.last]:
            save_model(path, self.scored, self.corpus.vocab, self.config, figures, self.corpus.fingerprint)

    def _prune(self, progress: Progress) -> None:
        """Remove the checkpoints beyond ``train.keep_last``, and those of later steps."""
        keep_last = self.config.train.keep_last
        steps = [step for step in self.run.checkpoints() if step <= progress.step]
        steps = steps[-keep_last:] if keep_last > 1 else []
        if self.step != progress.rollback_step:
            steps.append(progress.rollback_step)
        self.run.prune(steps)


def _is_best(model: Path, progress: Progress) -> bool:
    """Return whether `model` is the file of the best model according to `progress`."""
    try:
        figures = read_header(model).figures
    except CharlmError:  # missing or damaged
        return False
    return _of_best(figures, progress)


def _of_best(figures: dict[str, Any], progress: Progress) -> bool:
    """Return whether `figures` belong to the best step; without a val split they have no `val_loss`."""
    loss = figures.get("val_loss", math.inf)
    return bool((figures.get("step"), loss) == (progress.best_step, progress.best_loss))
