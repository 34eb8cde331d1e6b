"""The command `train`, and the display of a training on the terminal, which `compare` uses too."""

import contextlib
import math
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from charlm.cli.options import complete_runs, config_option, set_option, threads_option
from charlm.errors import CharlmError, ConfigError
from charlm.metrics import perplexity, shown

if TYPE_CHECKING:
    from tqdm import tqdm

    from charlm.config import Config
    from charlm.storage.run import Run
    from charlm.training.distributed import Group
    from charlm.training.trainer import Result, Trainer

# The learning rate with --from: half the default. From a model of Don Quijote, the val loss of the bundled
# corpus is 1.481, 1.464, 1.456 and 1.455 with 1e-3, 2e-3, 4e-3 and 5e-3.
_LR_FROM = 4e-3


@click.command()
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
@config_option("recipe")
@set_option()
@click.option("--from", "initial", metavar="MODEL", help="Start from the weights of a run or a model file.")
@click.option("--name", metavar="RUN", help="The run's name under runs/.  [default: TEXT-DATE-TIME]")
@click.option("--resume", metavar="RUN", shell_complete=complete_runs, help="Continue a run that stopped.")
@click.option("--at", type=click.IntRange(min=0), metavar="STEP", help="Resume from an earlier save.")
@click.option("--allow-changes", is_flag=True, help="Resume with changed settings, as far as possible.")
@threads_option
@click.option("--dry-run", is_flag=True, help="Show what would be trained and written, and exit.")
def train(
    texts: tuple[str, ...],
    recipe: str | None,
    overrides: tuple[str, ...],
    initial: str | None,
    name: str | None,
    resume: str | None,
    at: int | None,
    allow_changes: bool,
    threads: int | None,
    dry_run: bool,
) -> None:
    """Train a model on a text.

    TEXT is a file, a folder, a glob, or - for stdin; several are read one after the other. Without TEXT, the
    recipe's text is used, by default the bundled Spanish corpus. The models, the log and the state to resume
    from are written to runs/RUN. Ctrl-C finishes the step, saves and shows how to resume; a second Ctrl-C
    stops at once.

    --from continues from another model: its sizes and characters are kept, and new characters are added.

    torchrun --nproc-per-node 2 -m charlm train ... trains with two processes, each on its slice of the data.
    """
    _check_resume(resume, at is not None or allow_changes, bool(texts or recipe or initial or name))
    from charlm import config as configuration
    from charlm.nn.kernels.native import keep_memory
    from charlm.storage import run as runs
    from charlm.training.distributed import joined

    keep_memory()
    with joined() as group, contextlib.ExitStack() as held:
        state: dict[str, Any] | None = None
        if group.first and resume:
            run = runs.find_run(resume)
            if not dry_run:  # before anything in it is read: another process may be writing
                held.enter_context(runs.lock(run))
            config, state = _load_run(run, overrides, at, allow_changes, group.size)
        elif group.first:
            config = _new_config(texts, recipe, initial, overrides)
            config, run = _new_run(config, texts, recipe, name, dry_run, held)
        data, folder = group.from_first(lambda: (config.model_dump(mode="json"), str(run.folder)))
        config, run = configuration.from_data(data, ""), runs.Run(Path(folder))
        display = TrainingDisplay(silent=not group.first)
        trainer, lines = _make_trainer(config, run, group, threads, display)
        if dry_run:
            if group.first:
                _print_plan(config, run, lines)
            return
        display.say("\n".join(lines))
        if resume:
            _restore(trainer, run, config, at, state, display)
            del state  # the training does not need the memory twice
        else:
            if "-" not in texts:  # for a text on stdin, the folder exists already
                run = _created(run, config, name is None, group)
            if group.first:
                held.enter_context(runs.lock(run))
        result = trainer.train(run, display)
        if group.first:
            display.finished(result, run.folder, trainer.suggested_prefix)


def _check_resume(resume: str | None, only_resuming: bool, only_new: bool) -> None:
    """Raise `ConfigError` for options that are for resumed runs only, or for new ones only."""
    if not resume and only_resuming:
        raise ConfigError("--at and --allow-changes need --resume RUN")
    if resume and only_new:
        raise ConfigError(
            "--resume uses the run's text, configuration and name: leave out TEXT, --config, --from, --name"
        )


def _created(run: "Run", config: "Config", rename: bool, group: "Group") -> "Run":
    """Make the folder of a new run in the first process, and return the run in all of them."""
    from charlm.storage import run as runs

    return runs.Run(Path(group.from_first(lambda: str(runs.create(run, config, rename).folder))))


def _make_trainer(
    config: "Config", run: "Run", group: "Group", threads: int | None, display: "TrainingDisplay"
) -> tuple["Trainer", list[str]]:
    """Read the text, set the number of threads, and return the trainer and the lines of the header."""
    import torch

    from charlm.nn.device import choose_threads
    from charlm.storage.model_file import load_model
    from charlm.storage.run import find_model
    from charlm.text.corpus import Corpus
    from charlm.training.trainer import Trainer

    initial, known = None, ""
    if config.train.init_from:
        saved = run.last.is_file()  # it has the characters that were added, and its weights are restored
        loaded = load_model(run.last if saved else find_model(config.train.init_from))
        initial, known = None if saved else loaded.model, loaded.vocab.characters
    corpus = group.in_turn(lambda: Corpus.load(config.corpus, display.reading, known, config.train.seed))
    group.check_same("text", corpus.fingerprint)
    count, reason = choose_threads(threads, config.model, config.batches.batch_size)
    torch.set_num_threads(count)
    trainer = Trainer(config, corpus, group, initial)
    display.guessing = trainer.guessing
    return trainer, [*trainer.describe(), f"threads  {count} ({reason})"]


def _print_plan(config: "Config", run: "Run", lines: list[str]) -> None:
    """Print what --dry-run shows: the configuration, the header, and the files of the run."""
    from charlm import config as configuration

    click.echo(configuration.to_yaml(config))
    click.echo("\n".join(lines))
    click.echo(
        f"would write {run.folder}/ with config.yaml, model.safetensors, last.safetensors, "
        "state.safetensors, metrics.jsonl"
    )


def _restore(
    trainer: "Trainer",
    run: "Run",
    config: "Config",
    at: int | None,
    state: dict[str, Any] | None,
    display: "TrainingDisplay",
) -> None:
    """Restore the state of `run`; raises `ConfigError` for a run that is finished."""
    from charlm.storage import run as runs

    trainer.restore(run, at, state)
    learner = trainer.learner
    if learner.progress.concluded and learner.finished:
        raise ConfigError(
            f"the run {run.folder} is finished, at step {learner.progress.step}, "
            f"by {learner.finished}; to train longer, raise it with --set"
        )
    trainer.group.from_first(lambda: runs.save_config(run, config))
    display.say(f"resumed  {run.folder} at step {learner.progress.step} of {learner.total_steps}")


def _new_config(
    texts: tuple[str, ...], recipe: str | None, initial: str | None, overrides: tuple[str, ...]
) -> "Config":
    """Return the configuration of a new run."""
    from charlm import config as configuration
    from charlm.storage.header import read_header
    from charlm.storage.run import find_model

    values: dict[str, dict[str, Any]] = {"corpus": {}, "model": {}, "train": {}}
    if initial is not None:
        path = find_model(initial)
        before = read_header(path).config
        values["corpus"] = before.corpus.cleaning
        if before.corpus.encoding == "bytes":
            values["corpus"] = {"encoding": "bytes"}
        values["model"] = {**before.model.model_dump(mode="json"), "implementation": "auto"}
        values["train"] = {"init_from": str(path), **({} if recipe else {"lr": _LR_FROM})}
    if texts:
        if any(text.partition("=")[0].strip() in ("source", "corpus.source") for text in overrides):
            raise ConfigError("the text is given twice, as TEXT and with --set corpus.source")
        values["corpus"]["source"] = texts[0] if len(texts) == 1 else [*texts]
    return configuration.load(recipe, overrides, values)


def _new_run(
    config: "Config",
    texts: tuple[str, ...],
    recipe: str | None,
    name: str | None,
    dry_run: bool,
    held: contextlib.ExitStack,
) -> tuple["Config", "Run"]:
    """Return a new run, named after the text, the recipe or the cell, and its configuration."""
    from charlm.storage import run as runs

    stem = re.sub(r"[^\w.+=-]+|^[^\w]+", "-", Path(texts[0]).stem).strip("-")[:60] if texts else ""
    run = runs.new_run(name, stem or (Path(recipe).stem if recipe else config.model.cell))
    return _with_stdin(config, run, name is None, dry_run, held) if "-" in texts else (config, run)


def _with_stdin(
    config: "Config", run: "Run", rename: bool, dry_run: bool, held: contextlib.ExitStack
) -> tuple["Config", "Run"]:
    """Write the text on stdin into the folder of `run`, from which the run can be resumed.

    The folder is removed at the end if the training has not begun.
    """
    from charlm.files import write_atomically
    from charlm.storage import run as runs

    if dry_run:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
    else:
        run = runs.create(run, config, rename)
        held.callback(runs.discard, run)
        folder = run.folder

    def write(path: Path) -> None:
        with path.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)

    write_atomically(folder / "text.txt", write)
    source = config.corpus.source
    names = [source] if isinstance(source, str) else source
    names = [str(folder / "text.txt") if name == "-" else name for name in names]
    corpus = config.corpus.model_copy(update={"source": names if len(names) > 1 else names[0]})
    config = config.model_copy(update={"corpus": corpus})
    if not dry_run:
        runs.save_config(run, config)
    return config, run


def _load_run(
    run: "Run", overrides: tuple[str, ...], at: int | None, allow_changes: bool, processes: int
) -> tuple["Config", dict[str, Any] | None]:
    """Return the configuration to resume `run` with, and the state saved last or at step `at`, if any."""
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
            self.say(f"result   the last model, at epoch {best['epoch']:g}; there is no val split")
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
