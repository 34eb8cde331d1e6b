"""The command `train`."""

import contextlib
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from charlm.cli.display import TrainingDisplay
from charlm.cli.options import complete_runs, config_option, set_option, threads_option
from charlm.errors import CharlmError, ConfigError

if TYPE_CHECKING:
    from charlm.config import Config
    from charlm.storage.run import Run
    from charlm.training.distributed import Group
    from charlm.training.trainer import Trainer

# The learning rate with --from: half the default. From a model of Don Quijote, the val loss of the bundled
# corpus is 1.481, 1.464, 1.456 and 1.455 with 1e-3, 2e-3, 4e-3 and 5e-3.
_LR_FROM = 4e-3
_MINUTES = 5.0  # of a training of TEXT alone


@click.command()
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
@config_option("recipe")
@set_option()
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True, max=10**5),
    metavar="M",
    help="Choose the model and its training for this text, this machine and M minutes.  [default: 5]",
)
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
    minutes: float | None,
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

    --minutes chooses the hidden size, the batches, dropout, learning rate and number of steps from the length
    of the text, its alphabet and the speed of this machine; --set overrides any of it. With --config it
    chooses the number of steps only. A TEXT alone is trained on for 5 minutes, unless --set gives epochs,
    max_steps or time_limit.
    --from continues from another model: its sizes and characters are kept, and new characters are added.

    torchrun --nproc-per-node 2 -m charlm train ... trains with two processes, each on its slice of the data.
    """
    _check_resume(resume, at is not None or allow_changes, texts or recipe or minutes or initial or name)
    from charlm.nn.kernels.native import keep_memory
    from charlm.training.distributed import joined

    keep_memory()
    with joined() as group, contextlib.ExitStack() as held:
        state: dict[str, Any] | None = None
        budget: list[str] = []  # lines of the header
        if group.first and resume:
            config, run, state = _load_run(resume, overrides, at, allow_changes, group.size, dry_run, held)
        elif group.first:
            chosen = _new_config(texts, recipe, initial, overrides)
            config, run = _new_run(chosen, texts, recipe, name, dry_run, held)
            config, budget = _for_minutes(
                config, texts, minutes, recipe, initial, overrides, threads, group.size
            )
        config, run = _shared(group, lambda: (config, run))
        display = TrainingDisplay(silent=not group.first)
        trainer, lines = _make_trainer(config, run, group, threads, display)
        if dry_run:
            _print_plan(config, run, lines + budget, group)
            return
        display.say("\n".join(lines + budget))
        if resume:
            _restore(trainer, run, config, at, state, display)
            del state  # the training does not need the memory twice
        else:
            run = _created(run, config, texts, name, group, held)
        result = trainer.train(run, display)
        if group.first:
            display.finished(result, run.folder, trainer.suggested_prefix)


def _shared(group: "Group", chosen: Callable[[], tuple["Config", "Run"]]) -> tuple["Config", "Run"]:
    """Return in all processes the configuration and the run that `chosen` returns in the first."""
    from charlm import config as configuration
    from charlm.storage.run import Run

    def as_data() -> tuple[Any, str]:
        config, run = chosen()
        return config.model_dump(mode="json"), str(run.folder)

    data, folder = group.from_first(as_data)
    return configuration.from_data(data, ""), Run(Path(folder))


def _check_resume(resume: str | None, only_resuming: bool, only_new: object) -> None:
    """Raise `ConfigError` for options that are for resumed runs only, or for new ones only."""
    if not resume and only_resuming:
        raise ConfigError("--at and --allow-changes need --resume RUN")
    if resume and only_new:
        raise ConfigError(
            "--resume uses the run's text, configuration and name: "
            "leave out TEXT, --config, --minutes, --from, --name"
        )


def _created(
    run: "Run",
    config: "Config",
    texts: tuple[str, ...],
    name: str | None,
    group: "Group",
    held: contextlib.ExitStack,
) -> "Run":
    """Make the folder of a new run in the first process and lock it; return the run in all of them."""
    from charlm.storage import run as runs

    def create() -> str:
        if any(map(_once, texts)):  # the folder exists already
            runs.save_config(run, config)
            return str(run.folder)
        return str(runs.create(run, config, name is None).folder)

    created = runs.Run(Path(group.from_first(create)))
    if group.first:
        held.enter_context(runs.lock(created))
    return created


def _make_trainer(
    config: "Config", run: "Run", group: "Group", threads: int | None, display: "TrainingDisplay"
) -> tuple["Trainer", list[str]]:
    """Read the text, set the number of threads, and return the trainer and the lines of the header."""
    import torch

    from charlm.nn.device import choose_threads
    from charlm.storage.vocabulary import read_initial
    from charlm.text.corpus import Corpus
    from charlm.training.trainer import Trainer

    initial, known = read_initial(config, run)
    corpus = group.in_turn(lambda: Corpus.load(config.corpus, display.reading, known, config.train.seed))
    group.check_same("text", corpus.fingerprint)
    count, reason = choose_threads(threads, config.model, config.batches.batch_size)
    torch.set_num_threads(count)
    trainer = Trainer(config, corpus, group, initial)
    display.guessing = trainer.guessing
    return trainer, [*trainer.describe(), f"threads  {count} ({reason})"]


def _print_plan(config: "Config", run: "Run", lines: list[str], group: "Group") -> None:
    """Print what --dry-run shows, in the first process: the configuration, the header, the run's files."""
    from charlm import config as configuration

    if not group.first:
        return
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
    """Return the configuration of a new run, before `_for_minutes`."""
    from charlm import config as configuration
    from charlm.storage.header import read_header
    from charlm.storage.run import find_model

    values: dict[str, dict[str, Any]] = {"corpus": {}, "model": {}, "train": {}}
    if initial is not None:
        path = find_model(initial)
        before = read_header(path).config
        read = {"encoding": "bytes"} if before.corpus.encoding == "bytes" else before.corpus.cleaning
        values["corpus"] = {**read, "records": before.corpus.records}
        values["model"] = {**before.model.model_dump(mode="json"), "implementation": "auto"}
        values["train"] = {"init_from": str(path), **({} if recipe else {"lr": _LR_FROM})}
    if texts:
        if any(text.partition("=")[0].strip() in ("source", "corpus.source") for text in overrides):
            raise ConfigError("the text is given twice, as TEXT and with --set corpus.source")
        values["corpus"]["source"] = texts[0] if len(texts) == 1 else [*texts]
    return configuration.load(recipe, overrides, values)


def _for_minutes(
    config: "Config",
    texts: tuple[str, ...],
    minutes: float | None,
    recipe: str | None,
    initial: str | None,
    overrides: tuple[str, ...],
    threads: int | None,
    processes: int,
) -> tuple["Config", list[str]]:
    """Return `config` with what a training of this many minutes needs, and two lines about the choice.

    Without `minutes`, a text alone is trained on for `_MINUTES` by one process, and otherwise nothing is
    chosen. The values of a recipe, of a model to start from, and of --set are kept.

    Raises `ConfigError` for several processes, whose speed is not measured.
    """
    import torch

    from charlm.config import find_key
    from charlm.study.budget import plan

    if minutes != minutes:  # NaN
        raise ConfigError("--minutes is nan; allowed: a number above 0, for example 10")
    given = {find_key(text.partition("=")[0].strip()) for text in overrides}
    ends = {"train.epochs", "train.max_steps", "train.time_limit"}
    if not minutes and (recipe or not texts or ends & given or processes > 1):
        return config, []
    if processes > 1:
        raise ConfigError("--minutes measures one process; with torchrun, use --set time_limit or max_steps")
    if recipe:
        chosen = ends if config.train.eval_every else {*ends, "train.eval_every"}
        given |= {
            f"{section}.{key}" for section, values in config for key in type(values).model_fields
        } - chosen
    elif initial:
        given |= {f"model.{key}" for key in type(config.model).model_fields} | {"train.lr"}
        given -= {"model.dropout", "model.weight_dropout"}
    if "train.epochs" in given:
        given.add("train.max_steps")
    if threads:
        torch.set_num_threads(threads)
    seconds = 60 * (minutes or _MINUTES)
    return plan(config, given, seconds, threads, lambda line: click.echo(line, err=True))


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
    if any(map(_once, texts)):
        return _with_copies(config, run, texts, name is None, dry_run, held)
    return config, run


def _once(text: str) -> bool:
    """Return whether a text can be read once: stdin, or a pipe such as <(zcat book.gz)."""
    path = Path(text)
    return text == "-" or (path.exists() and not path.is_file() and not path.is_dir())


def _with_copies(
    config: "Config",
    run: "Run",
    texts: tuple[str, ...],
    rename: bool,
    dry_run: bool,
    held: contextlib.ExitStack,
) -> tuple["Config", "Run"]:
    """Copy the texts that can be read once into the folder of `run`, from which it can be resumed.

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
    names = []
    for k, text in enumerate(texts):
        names.append(str(folder / f"text{k or ''}.txt") if _once(text) else text)
        if _once(text):

            def write(path: Path, text: str = text) -> None:
                with click.open_file(text, "rb") as source, path.open("wb") as file:
                    shutil.copyfileobj(source, file)

            write_atomically(Path(names[-1]), write)
    corpus = config.corpus.model_copy(update={"source": names if len(names) > 1 else names[0]})
    config = config.model_copy(update={"corpus": corpus})
    if not dry_run:
        runs.save_config(run, config)
    return config, run


def _load_run(
    name: str,
    overrides: tuple[str, ...],
    at: int | None,
    allow_changes: bool,
    processes: int,
    dry_run: bool,
    held: contextlib.ExitStack,
) -> tuple["Config", "Run", dict[str, Any] | None]:
    """Lock a run; return the configuration to resume it with, the run, and its last state or that at `at`."""
    from charlm import config as configuration
    from charlm.storage.run import find_run, lock
    from charlm.training.learner import refuse_changes

    run = find_run(name)
    if not dry_run:  # before anything in it is read: another process may be writing
        held.enter_context(lock(run))
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
    return config, run, state
