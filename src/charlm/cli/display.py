"""`TrainingDisplay`: the progress bar, the evaluations and the result of a training, on the terminal."""

import contextlib
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charlm.metrics import perplexity, shown

if TYPE_CHECKING:
    from tqdm import tqdm

    from charlm.training.trainer import Result


def bar(total: int, **options: Any) -> "tqdm[Any] | None":
    """Return a progress bar on stderr that removes itself at its end, or None if stderr is not a terminal."""
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm  # not at the top: it takes 30 ms of `charlm --help`

    shape = "{desc} |{bar}| {remaining} left"  # fits 60 columns
    return tqdm(total=total, bar_format=shape, dynamic_ncols=True, leave=False, file=sys.stderr, **options)


class TrainingDisplay:
    """A `Reporter` that prints on stderr, with a bar if stderr is a terminal.

    silent: print nothing, as the processes after the first do.
    guessing: the loss of a model that takes all characters for equally probable; a larger one is called so.
    """

    def __init__(self, silent: bool = False) -> None:
        self.silent, self.guessing = silent, math.inf
        self.bar: tqdm[Any] | None = None
        self.steps_per_epoch = self.epochs = 1
        self.chars_per_second = 0.0

    def say(self, line: str = "") -> None:
        """Print a line, above the bar if there is one; the training continues if stderr is closed."""
        if self.silent:
            return
        from tqdm import tqdm

        with contextlib.suppress(BrokenPipeError):
            tqdm.write(line, file=sys.stderr)

    def reading(self, count: int, total: int) -> None:
        """Show that `count` more bytes of the corpus, of `total`, were read; a short corpus has no bar."""
        if self.bar is None and total > 2**26 and not self.silent:
            self.bar = bar(total, desc="reading")
        if self.bar is not None:
            self.bar.update(count)
            if self.bar.n >= total:  # the end, or a file is read a second time
                self.end()

    def begin(self, step: int, total_steps: int, steps_per_epoch: int) -> None:
        """Show the bar at `step`."""
        self.steps_per_epoch = steps_per_epoch
        self.epochs = -(-total_steps // steps_per_epoch)
        self.bar = None if self.silent else bar(total_steps, initial=step)

    def step(self, loss: float, characters: int, seconds: float) -> None:
        """Advance the bar by a step and show its figures."""
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

    def logged(self, row: dict[str, Any]) -> None:
        """Print nothing: the bar shows the loss."""

    def evaluated(self, row: dict[str, Any], best: bool) -> None:
        """Print the metrics of the row; a star marks the best val loss so far."""
        val = row.get("val_loss")  # absent without a val split
        useless = val is not None and val > self.guessing
        # Absent if all steps since the last evaluation were skipped.
        train = f"{row['train_loss']:.3f}" if "train_loss" in row else "-"
        grad = f"{row['grad_norm']:.2f}" if "grad_norm" in row else "-"
        scores = ""
        if val is not None:
            kind, bits = _kind(row), val / math.log(2)
            scores = f"val {val:.3f}  {kind}ppl {shown(perplexity(val))}  {kind}bpc {bits:.3f}  "
        star = " *" if best and scores and not useless else ""
        self.say(
            f"epoch {row['epoch']:<4g} train {train}  {scores}lr {row['lr']:.1e}  grad {grad}  "
            f"{row['seconds']:.0f} s{star}"
        )
        if useless:
            self.say(f"worse than guessing, {self.guessing:.3f}; if this continues, use a smaller train.lr")

    def sample(self, text: str) -> None:
        """Print a text of the model, indented."""
        self.say("\n".join(f"    | {line}" for line in text.strip("\n").split("\n")))

    def finished(self, result: "Result", folder: Path, prefix: str) -> None:
        """Print the metrics of the best model, its file, and a command that generates with it."""
        best, kind = result.best, _kind(result.best)
        val = best.get("val_loss")
        useless = val is not None and val > self.guessing
        self.say()
        if val is None:
            self.say(f"result   the last model, at epoch {best['epoch']:g} (no val split)")
        else:
            title = "result" if useless else "best"
            self.say(f"{title:<9}val {_metrics(val, kind)}, at epoch {best['epoch']:g}")
        if result.test:
            self.say(f"test     {_metrics(result.test.loss, kind)}")
        if useless:
            self.say(f"         worse than guessing, {self.guessing:.3f}: train longer, or with a smaller lr")
        self.say(f"model    {folder / 'model.safetensors'}")
        model = shlex.quote(str(folder))
        if kind:
            self.say(f"fill in  charlm fill --model {model} {shlex.quote(prefix.strip() + '_')}")
        else:
            self.say(f"write    charlm generate --model {model} --prefix {shlex.quote(prefix)}")

    def end(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _kind(row: dict[str, Any]) -> str:
    """The prefix of a metric's name: a model that fills in characters has a pseudo-perplexity."""
    return "pseudo-" if "val_pseudo_perplexity" in row else ""


def _metrics(loss: float, kind: str) -> str:
    return (
        f"{kind}perplexity {shown(perplexity(loss))}, {loss / math.log(2):.3f} {kind}bits per character, "
        f"{loss:.4f} nats"
    )
