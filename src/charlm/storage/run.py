"""A run is a folder: its configuration, its models, the state to resume from, its log and its checkpoints."""

import contextlib
import errno
import os
import re
import shutil
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from charlm import config as configuration
from charlm.config import Config
from charlm.errors import CharlmError, ConfigError, one_line
from charlm.files import write_atomically

RUNS = Path("runs")


class Run:
    """The files of a run in its folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = folder / "config.yaml"  # the resolved configuration
        self.best = folder / "model.safetensors"  # the model that was best on val
        self.last = folder / "last.safetensors"  # the model at the last save
        self.state = folder / "state.safetensors"  # the state to resume from
        self.metrics = folder / "metrics.jsonl"  # the log, a JSON object a line

    def load_config(self) -> Config:
        """Read the configuration of the run."""
        return configuration.from_data(configuration.read_yaml(self.config), str(self.config))

    def save_state(self, state: dict[str, Any]) -> None:
        """Write `state` to ``state.safetensors``, atomically."""
        from charlm.storage.state_file import save_state  # imported here, because it imports torch

        save_state(self.state, state)

    def load_state(self) -> dict[str, Any]:
        """Read ``state.safetensors``; raises `CharlmError` for a file that is missing or damaged."""
        from charlm.storage.state_file import load_state

        if not self.state.exists():
            raise CharlmError(
                f"the run {self.folder} has no {self.state.name} to resume from; "
                "restore it, or start a new run"
            )
        return load_state(self.state)

    @property
    def was_saved(self) -> bool:
        """True if the run was ever saved; before its first save it has a configuration only."""
        return any(path.exists() for path in (self.state, self.last, self.best, self.metrics))

    def remove_temporaries(self) -> None:
        """Remove the files that `write_atomically` was writing when the process was killed."""
        with contextlib.suppress(OSError):
            for folder in (self.folder, *(path for _, path in self._checkpoint_folders())):
                for path in (self.config, self.best, self.last, self.state):
                    for temporary in folder.glob(f".{path.name}.*"):
                        temporary.unlink()

    def checkpoint(self, step: int) -> "Run":
        """Return the place of an earlier save: its own ``last.safetensors`` and ``state.safetensors``."""
        return Run(self.folder / "checkpoints" / f"step-{step:08d}")

    def saved_checkpoint(self, step: int) -> "Run":
        """Return the checkpoint of `step`; raises `CharlmError` if there is none."""
        if step not in self.checkpoints():
            steps = ", ".join(map(str, self.checkpoints())) or "none; train.keep_last says how many to keep"
            raise CharlmError(f"the run {self.folder} has no save of step {step}; its saves: {steps}")
        return self.checkpoint(step)

    def checkpoints(self) -> list[int]:
        """Return the steps of the checkpoints, in order."""
        return sorted(step for step, path in self._checkpoint_folders() if Run(path).state.exists())

    def _checkpoint_folders(self) -> Iterator[tuple[int, Path]]:
        """Return the steps and folders of the checkpoints; other files beside them are ignored."""
        for path in (self.folder / "checkpoints").glob("step-*"):
            if re.fullmatch(r"step-\d{8,18}", path.name, re.ASCII):
                yield int(path.name.removeprefix("step-")), path

    def keep(self, step: int) -> None:
        """Keep the last save, which is of `step`, as a checkpoint: as links, which take no space yet."""
        checkpoint = self.checkpoint(step)
        try:
            checkpoint.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CharlmError(f"cannot make {checkpoint.folder}: {error.strerror}") from None
        for source, target in ((self.last, checkpoint.last), (self.state, checkpoint.state)):
            if source.exists():  # a user may have deleted it
                link(source, target)

    def prune(self, steps: Collection[int]) -> None:
        """Remove all checkpoints except those of `steps`."""
        for step, path in list(self._checkpoint_folders()):
            if step not in steps:
                shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):  # it does not exist, or is not empty
            (self.folder / "checkpoints").rmdir()


@contextlib.contextmanager
def lock(run: Run) -> Iterator[None]:
    """Lock `run` for this process; the system releases the lock when the process ends, even by a kill.

    Raises `CharlmError` if another process holds the lock. On file systems without locks, and on Windows,
    nothing is locked.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    try:
        folder = os.open(run.folder, os.O_RDONLY)
    except OSError as error:
        raise CharlmError(f"cannot open the run {run.folder}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CharlmError(
                f"the run {run.folder} is being trained by another process; wait until it ends, or stop it"
            ) from None
        except OSError:
            pass
        yield
    finally:
        os.close(folder)


def new_run(name: str | None, recipe: str) -> Run:
    """Return a run whose folder does not exist yet: ``runs/NAME``, by default ``runs/RECIPE-DATE-TIME``.

    Raises `ConfigError` for a name that exists or is invalid.
    """
    if name is None:
        return Run(RUNS / f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}")
    if not re.fullmatch(r"\w[\w.+=-]*", name):
        raise ConfigError(
            f"invalid name for a run: --name {name!r}; allowed: letters, digits and . _ + = -, the first a "
            "letter, digit or _"
        )
    if (RUNS / name).exists():
        raise ConfigError(
            f"the run {RUNS / name} exists; choose another --name, or resume it with --resume {name}"
        )
    return Run(RUNS / name)


def create(run: Run, config: Config, rename: bool = False) -> Run:
    """Make the run's folder with ``config.yaml`` in it: both exist afterwards, or neither.

    rename: add a number to the name if the folder exists, as for a run started in the same second.
    Raises `CharlmError` if that fails.
    """
    wanted, number = run.folder, 1
    temporary = wanted.with_name(f".run.{os.urandom(4).hex()}")
    try:
        temporary.mkdir(parents=True)
        save_config(Run(temporary), config)
        while not _moved(temporary, run.folder):
            if not rename:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            number += 1
            run = Run(wanted.with_name(f"{wanted.name}-{number}"))
    except OSError as error:
        raise CharlmError(
            f"cannot make the run's folder {run.folder}: {error.strerror}; choose another --name or folder"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return run


def discard(run: Run) -> None:
    """Remove the folder of a run that was never saved."""
    if not run.was_saved:
        shutil.rmtree(run.folder, ignore_errors=True)


def _moved(source: Path, target: Path) -> bool:
    """Rename the folder `source` to `target`; return whether that name was free."""
    if target.exists():
        return False
    try:
        source.rename(target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):  # another process was faster
            return False
        raise
    return True


def save_config(run: Run, config: Config) -> None:
    """Write the run's ``config.yaml``, atomically."""
    text = configuration.to_yaml(config)
    write_atomically(run.config, lambda path: path.write_text(text, encoding="utf-8"))


def find_run(name: str) -> Run:
    """Return the run called `name`, a folder or a name under ``runs/``; raises `ConfigError` if not found."""
    for folder in (Path(name), RUNS / name):
        if (folder / "config.yaml").is_file():
            return Run(folder)
    names = sorted(path.parent.name for path in RUNS.glob("[!.]*/config.yaml"))
    raise ConfigError(f"no run named {name!r}; existing runs in {RUNS}/: {', '.join(names) or 'none'}")


def find_model(name: str | None) -> Path:
    """Return the model file that `name` gives: a file, a run's folder or name, by default the newest run's.

    Of a run, this is the model that was best on val, or the last one before the first evaluation. Raises
    `ConfigError` if there is none.
    """
    if name is not None:
        with contextlib.suppress(OSError):  # a name that is too long for the file system
            for path in (Path(name), RUNS / name):
                if path.is_file():
                    return path
                if found := _model_of(Run(path)):
                    return found
        raise ConfigError(
            f"no model {one_line(repr(name))}: it is neither a model file nor a run that has one"
        )
    models = [model for path in RUNS.glob("*/config.yaml") if (model := _model_of(Run(path.parent)))]
    if not models:
        raise ConfigError(
            f"no model in {RUNS}/ yet; train one with charlm train, or give a file with --model PATH"
        )
    return max(
        models, key=lambda path: max(each.stat().st_mtime for each in path.parent.glob("*.safetensors"))
    )


def _model_of(run: Run) -> Path | None:
    return next((path for path in (run.best, run.last) if path.is_file()), None)


def link(source: Path, target: Path) -> None:
    """Make `target` a link to the file `source` or, on a file system without links, a copy; atomically."""

    def write(temporary: Path) -> None:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)

    write_atomically(target, write)
