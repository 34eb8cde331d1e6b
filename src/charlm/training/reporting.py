"""A training's figures for TensorBoard, as they come (needs the extra `tensorboard`)."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from charlm.errors import CharlmError
from charlm.storage.log import Row


class Reporter(Protocol):
    """What shows the training to a person."""

    def begin(self, step: int, total_steps: int, steps_per_epoch: int) -> None:
        """The loop begins at `step`."""

    def step(self, loss: float, characters: int, seconds: float) -> None:
        """A step was taken, over so many characters, in so many seconds."""

    def evaluated(self, row: Row, best: bool) -> None:
        """The log has a new row; `best` if its val loss is the lowest so far."""

    def sample(self, text: str) -> None:
        """The model wrote a text."""

    def say(self, line: str) -> None:
        """Something happened that a person should know of."""

    def end(self) -> None:
        """The loop is over, whatever ended it."""


def check_tensorboard() -> None:
    """Raise `CharlmError` where the package is missing: to be called before hours of training."""
    if find_spec("tensorboard") is None:
        raise CharlmError(
            "train.tensorboard needs the package tensorboard: pip install 'charlm-torch[tensorboard]', "
            "or go without: --set train.tensorboard=false"
        )


class TensorBoard:
    """Writes each row of the log, and the samples, into `folder`, and passes all on to `shown`.

    Where a run is resumed, what was written of the steps that are now done again is struck out.
    """

    def __init__(self, folder: Path, shown: Reporter):
        check_tensorboard()
        self.folder, self.shown, self.at = folder, shown, 0

    def begin(self, step: int, total_steps: int, steps_per_epoch: int) -> None:
        """Open a file of events; those after `step` in older ones count no more."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(self.folder, purge_step=step + 1)
        self.shown.begin(step, total_steps, steps_per_epoch)

    def step(self, loss: float, characters: int, seconds: float) -> None:
        """Pass it on: a point for every step would cost small models their speed."""
        self.shown.step(loss, characters, seconds)

    def evaluated(self, row: dict[str, Any], best: bool) -> None:
        """Write the row: train and val of a figure in one group, what is of the training alone in another."""
        self.at = row["step"]
        for key, value in row.items():
            split, _, figure = key.partition("_")
            if split in ("train", "val"):
                self.writer.add_scalar(f"{figure}/{split}", value, self.at)
            elif key not in ("step", "sample"):
                self.writer.add_scalar(f"training/{key}", value, self.at)
        self.writer.flush()
        self.shown.evaluated(row, best)

    def sample(self, text: str) -> None:
        """Write the text, its lines kept."""
        self.writer.add_text("sample", "".join(f"    {line}\n" for line in text.split("\n")), self.at)
        self.shown.sample(text)

    def say(self, line: str) -> None:
        """Pass it on."""
        self.shown.say(line)

    def end(self) -> None:
        """Close the file."""
        self.writer.close()
        self.shown.end()


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM in a list for the loop to look at; a second one acts at once."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # Python hands signals to the main thread only
        return

    def catch(number: int, frame: object) -> None:
        caught.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    before = {each: signal.signal(each, catch) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
