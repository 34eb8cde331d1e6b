"""What a training reports while it runs, and the signals that stop it.

A `Reporter` receives the steps, the rows of the log and the messages of a training; the command line has one
that prints. `TensorBoard` is a reporter that writes event files and calls another one. `caught_signals` turns
Ctrl-C and SIGTERM into a request that the loop reads between two steps.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from charlm.errors import CharlmError
from charlm.storage.log import Row


class Reporter(Protocol):
    """The receiver of a training's progress."""

    def begin(self, step: int, total_steps: int, steps_per_epoch: int) -> None:
        """Receive the start of the loop at `step`; after a rollback, it starts again."""

    def step(self, loss: float, characters: int, seconds: float) -> None:
        """Receive a step: its loss (nats per character), over `characters`, and its seconds."""

    def logged(self, row: Row) -> None:
        """Receive a row that was logged between evaluations."""

    def evaluated(self, row: Row, best: bool) -> None:
        """Receive the row of an evaluation; `best` if its val loss is the lowest so far."""

    def sample(self, text: str) -> None:
        """Receive a text that the model generated."""

    def say(self, line: str) -> None:
        """Receive a message to the user."""

    def end(self) -> None:
        """Receive the end of the loop, which an error may have caused."""


def check_tensorboard() -> None:
    """Raise `CharlmError` if the package tensorboard is missing."""
    if find_spec("tensorboard") is None:
        raise CharlmError(
            "train.tensorboard needs the package tensorboard: pip install 'charlm-torch[tensorboard]', "
            "or turn it off: --set train.tensorboard=false"
        )


class TensorBoard:
    """A reporter that writes the rows of the log and the samples into `folder` and calls `reporter`.

    When a run is resumed, TensorBoard ignores the events of the steps that are repeated.
    """

    def __init__(self, folder: Path, reporter: Reporter):
        self.folder, self.reporter, self.last_step = folder, reporter, 0
        self.step, self.say = reporter.step, reporter.say  # a point per step would slow small models down

    def begin(self, step: int, total_steps: int, steps_per_epoch: int) -> None:
        """Open an event file that makes the events after `step` in older files invalid."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(self.folder, purge_step=step + 1)
        self.reporter.begin(step, total_steps, steps_per_epoch)

    def logged(self, row: Row) -> None:
        """Write the row."""
        self._write(row)
        self.reporter.logged(row)

    def evaluated(self, row: Row, best: bool) -> None:
        """Write the row."""
        self._write(row)
        self.writer.flush()
        self.reporter.evaluated(row, best)

    def _write(self, row: Row) -> None:
        """Write each number of `row`; train and val of one metric share a group."""
        self.last_step = row["step"]
        for key, value in row.items():
            split, _, metric = key.partition("_")
            if split in ("train", "val"):
                self.writer.add_scalar(f"{metric}/{split}", value, self.last_step)
            elif key not in ("step", "sample"):
                self.writer.add_scalar(f"training/{key}", value, self.last_step)

    def sample(self, text: str) -> None:
        """Write the text as a code block, which keeps its lines."""
        block = "".join(f"    {line}\n" for line in text.split("\n"))
        self.writer.add_text("sample", block, self.last_step)
        self.reporter.sample(text)

    def end(self) -> None:
        """Close the event file."""
        self.writer.close()
        self.reporter.end()


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Yield a list that receives the first SIGINT or SIGTERM; a second signal has its usual effect."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # Python delivers signals to the main thread only
        return

    def catch(number: int, frame: object) -> None:
        caught.append(number)
        restore()

    def restore() -> None:
        for each, handler in before.items():
            signal.signal(each, handler)

    before = {each: signal.signal(each, catch) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        restore()
