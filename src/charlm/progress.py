"""How far a training is, and what a person sees of it: a bar on a terminal, a line after each evaluation."""

import contextlib
import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from charlm.metrics import Score, perplexity

Row = dict[str, Any]

_BAR = "{desc} |{bar}| {remaining} left"  # fits 60 columns
_LONG = 2**26  # bytes; what is shorter is read in a moment


@dataclass
class Progress:
    """What the loop remembers between steps, apart from tensors.

    train_nats, train_characters, train_seconds: sums since the last evaluation.
    seconds: time spent in steps, in all.
    lr, grad_norm: of the last step, and of the last that was taken.
    bad_steps: steps that were passed over, in all and in a row up to now.
    rollbacks: how often the run went back to `good_step`, the last save known to be good; each halves the
        learning rate.
    concluded: the end was reached and logged.
    """

    step: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    evaluations_since_best: int = 0
    train_nats: float = 0.0
    train_characters: int = 0
    train_seconds: float = 0.0
    seconds: float = 0.0
    log_size: int = 0
    lr: float = 0.0
    grad_norm: float = 0.0
    bad_steps: int = 0
    bad_steps_in_a_row: int = 0
    rollbacks: int = 0
    good_step: int = 0
    concluded: bool = False


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


class TrainingDisplay:
    """Shows the loop on stderr; there is a bar only where stderr is a terminal.

    silent: show nothing, as the second and later of several processes do.
    """

    def __init__(self, silent: bool = False) -> None:
        self.silent = silent
        self.bar: tqdm[Any] | None = None
        self.steps_per_epoch = 1
        self.chars_per_second = 0.0

    def say(self, line: str = "") -> None:
        """Print a line, above the bar if there is one. Training goes on when nobody is left to read it."""
        if self.silent:
            return
        with contextlib.suppress(BrokenPipeError):
            tqdm.write(line, file=sys.stderr)

    def reading(self, count: int, total: int) -> None:
        """So many bytes more of the corpus were read, of `total`; a long one has a bar."""
        if self.bar is None and total > _LONG and sys.stderr.isatty() and not self.silent:
            self.bar = tqdm(
                total=total, desc="reading", bar_format=_BAR, dynamic_ncols=True, leave=False, file=sys.stderr
            )
        if self.bar is not None:
            self.bar.update(count)
            if self.bar.n >= total:  # the last of it, or a file must be read again
                self.end()

    def begin(self, step: int, total_steps: int, steps_per_epoch: int) -> None:
        """Show the bar at `step`."""
        self.steps_per_epoch = steps_per_epoch
        self.epochs = -(-total_steps // steps_per_epoch)
        if sys.stderr.isatty() and not self.silent:
            self.bar = tqdm(
                total=total_steps,
                initial=step,
                bar_format=_BAR,
                dynamic_ncols=True,
                leave=False,
                file=sys.stderr,
            )

    def step(self, loss: float, characters: int, seconds: float) -> None:
        """Move the bar one step on."""
        if self.bar is None:
            return
        rate = characters / seconds
        self.chars_per_second = 0.9 * self.chars_per_second + 0.1 * rate if self.chars_per_second else rate
        self.bar.set_description_str(
            f"epoch {self.bar.n // self.steps_per_epoch + 1}/{self.epochs} loss {loss:.3f} "
            f"ppl {perplexity(loss):.3g} {self.chars_per_second / 1000:.1f}k ch/s",
            refresh=False,
        )
        self.bar.update()

    def evaluated(self, row: dict[str, Any], best: bool) -> None:
        """Print the row's figures; a star marks the best val loss so far."""
        val = row["val_loss"]
        # Absent where no step since the last evaluation was fit to be taken.
        train = f"{row['train_loss']:.3f}" if "train_loss" in row else "-"
        grad = f"{row['grad_norm']:.2f}" if "grad_norm" in row else "-"
        self.say(
            f"epoch {row['epoch']:<4g} train {train}  val {val:.3f}  "
            f"{_kind(row)}ppl {perplexity(val):.2f}  {_kind(row)}bpc {val / math.log(2):.3f}  "
            f"lr {row['lr']:.1e}  grad {grad}  {row['seconds']:.0f} s{' *' if best else ''}"
        )

    def sample(self, text: str) -> None:
        """Print a text by the model, indented."""
        self.say("".join(f"    | {line}\n" for line in text.strip("\n").split("\n")).rstrip("\n"))

    def finished(self, best: dict[str, Any], test: Score | None, folder: Path, prefix: str) -> None:
        """Print the figures of the best model, where it is, and how to write with it."""
        self.say()
        self.say(f"best     val {_figures(best['val_loss'], _kind(best))}, at epoch {best['epoch']:g}")
        if test:
            self.say(f"test     {_figures(test.loss, _kind(best))}")
        self.say(f"model    {folder / 'model.safetensors'}")
        where, start = shlex.quote(str(folder)), shlex.quote(prefix)
        if _kind(best):
            self.say(f"fill in  charlm fill --model {where} {shlex.quote(prefix.strip() + '_')}")
        else:
            self.say(f"write    charlm generate --model {where} --prefix {start}")

    def end(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _kind(row: dict[str, Any]) -> str:
    """What the figures of a model that fills in characters are called, lest they be taken for the others'."""
    return "pseudo-" if "val_pseudo_perplexity" in row else ""


def _figures(loss: float, kind: str) -> str:
    return (
        f"{kind}perplexity {perplexity(loss):.2f}, {loss / math.log(2):.3f} {kind}bits per character, "
        f"{loss:.4f} nats"
    )
