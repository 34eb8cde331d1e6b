"""A training's figures for TensorBoard, as they come (needs the extra `tensorboard`)."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from charlm.errors import CharlmError
from charlm.progress import Reporter


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
