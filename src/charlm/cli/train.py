"""The command that trains."""

import contextlib
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from charlm.cli.options import complete_runs, config_option, set_option
from charlm.errors import CharlmError, ConfigError
from charlm.metrics import Score, perplexity

if TYPE_CHECKING:
    from charlm.config import Config
    from charlm.storage.run import Run


@click.command()
@config_option()
@set_option()
@click.option("--name", metavar="RUN", help="The run's name under runs/.  [default: RECIPE-DATE-TIME]")
@click.option("--resume", metavar="RUN", shell_complete=complete_runs, help="Go on with a run that stopped.")
@click.option("--at", type=click.IntRange(min=0), metavar="STEP", help="Resume at an earlier, kept save.")
@click.option("--allow-changes", is_flag=True, help="Resume with other settings, as far as they fit.")
@click.option("--dry-run", is_flag=True, help="Show what would be trained and written; do nothing.")
def train(
    recipe: str | None,
    overrides: tuple[str, ...],
    name: str | None,
    resume: str | None,
    at: int | None,
    allow_changes: bool,
    dry_run: bool,
) -> None:
    """Train a model on a text.

    With no --config, an LSTM on the bundled Spanish corpus. The models, the log and the state to resume from
    are in runs/RUN. Ctrl-C finishes the step, saves and says how to go on; a second one stops at once.

    torchrun --nproc-per-node 2 -m charlm train ... trains with two processes, each on its share of the data.
    """
    if not resume and (at is not None or allow_changes):
        raise ConfigError("--at and --allow-changes go with --resume RUN")
    if resume and (recipe or name):
        raise ConfigError(
            "--resume takes the run's own configuration and name; leave out --config and --name"
        )

    from charlm import config as configuration
    from charlm.storage import run as runs
    from charlm.text.corpus import Corpus
    from charlm.training.distributed import joined
    from charlm.training.trainer import Trainer

    with joined() as group, contextlib.ExitStack() as held:
        state: dict[str, Any] | None = None
        if group.first and resume:
            run = runs.find_run(resume)
            if not dry_run:  # before anything in it is read: another process may be writing
                held.enter_context(runs.lock(run))
            config, state = _load_run(run, overrides, at, allow_changes, group.size)
        elif group.first:
            config = configuration.load(recipe, overrides)
            run = runs.new_run(name, Path(recipe).stem if recipe else config.model.cell)
        data, folder = group.told(lambda: (config.model_dump(mode="json"), str(run.folder)))
        config, run = configuration.from_data(data, ""), runs.Run(Path(folder))
        display = TrainingDisplay(silent=not group.first)
        corpus = group.in_turn(lambda: Corpus.load(config.corpus, display.reading))
        group.check_same("text", corpus.fingerprint)
        trainer = Trainer(config, corpus, group)
        learner = trainer.learner
        if dry_run:
            if group.first:
                click.echo(configuration.to_yaml(config))
                click.echo("\n".join(trainer.describe()))
                click.echo(
                    f"would write {run.folder}/ with config.yaml, model.safetensors, last.safetensors, "
                    "state.safetensors, metrics.jsonl"
                )
            return
        for line in trainer.describe():
            display.say(line)
        if not resume:
            folder = group.told(lambda: str(runs.create(run, config, rename=name is None).folder))
            run = runs.Run(Path(folder))
            if group.first:
                held.enter_context(runs.lock(run))
        else:
            trainer.restore(run, at, state)
            del state  # the training does not need the memory twice
            if learner.progress.concluded and learner.finished:
                raise ConfigError(
                    f"the run {run.folder} is finished, at step {learner.progress.step}, "
                    f"by {learner.finished}; to train on, raise that with --set"
                )
            group.told(lambda: runs.save_config(run, config))
            display.say(f"resumed  {run.folder} at step {learner.progress.step} of {learner.total_steps}")
        result = trainer.train(run, display)
        if group.first:
            display.finished(result.best, result.test, run.folder, trainer.suggested_prefix)


def _load_run(
    run: "Run", overrides: tuple[str, ...], at: int | None, allow_changes: bool, processes: int
) -> tuple["Config", dict[str, Any] | None]:
    """Return the configuration to resume `run` with, and the state that it saved last or at the step `at`.

    The state is None for a run that was never saved.
    """
    from charlm import config as configuration
    from charlm.training.learner import refuse_changes

    before, state = run.load_config(), None
    if run.was_saved:
        source = run if at is None else run.saved_checkpoint(at)
        state = source.load_state()
        sequences = state.get("sequences")
        if not isinstance(sequences, int) or sequences < 1:
            raise CharlmError(f"{source.state} is not the state of a training")
        if sequences % processes:
            raise ConfigError(
                f"the run {run.folder} reads {sequences} sequences a step, which {processes} processes "
                "cannot share evenly; start a number of processes that divides it"
            )
        before = configuration.override(before, [f"batches.batch_size={sequences // processes}"])
    config = configuration.override(before, overrides)
    refuse_changes(before, config, allow_changes)
    return config, state


_BAR = "{desc} |{bar}| {remaining} left"  # fits 60 columns
_LONG = 2**26  # bytes; what is shorter is read in a moment


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
