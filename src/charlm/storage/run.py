"""A run is a folder: its configuration, its models, the state to resume from, and its log.

``config.yaml`` (resolved), ``model.safetensors`` (best on val), ``last.safetensors`` and
``state.safetensors`` (to resume from), ``metrics.jsonl``, ``checkpoints/step-N/`` (earlier saves).

``state.safetensors`` decides: after a kill between two writes, the other files are restored from it.
"""

import contextlib
import errno
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charlm import config as configuration
from charlm.config import Config
from charlm.errors import CharlmError, ConfigError, one_line
from charlm.files import write_atomically

RUNS = Path("runs")


@dataclass(frozen=True)
class Run:
    """The paths of a run and what is done with them."""

    folder: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.folder / "config.yaml"

    @property
    def best(self) -> Path:
        """The model that was best on val."""
        return self.folder / "model.safetensors"

    @property
    def last(self) -> Path:
        """The model at the last save."""
        return self.folder / "last.safetensors"

    @property
    def state(self) -> Path:
        """All that is needed to go on."""
        return self.folder / "state.safetensors"

    @property
    def metrics(self) -> Path:
        """The log, a JSON object a line."""
        return self.folder / "metrics.jsonl"

    def load_config(self) -> Config:
        """The configuration the run was made from."""
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
        """Whether the run was ever saved: before that there is the configuration alone."""
        return any(path.exists() for path in (self.state, self.last, self.best, self.metrics))

    def remove_temporaries(self) -> None:
        """Remove what `write_atomically` was writing when the process was killed."""
        with contextlib.suppress(OSError):
            for path in (self.config, self.best, self.last, self.state):
                for left in self.folder.glob(f".{path.name}.*"):
                    left.unlink()

    def checkpoint(self, step: int) -> "Run":
        """An earlier save: a folder with a ``last.safetensors`` and a ``state.safetensors`` of its own."""
        return Run(self.folder / "checkpoints" / f"step-{step:08d}")

    def saved_checkpoint(self, step: int) -> "Run":
        """The save of `step` that was kept; raises `CharlmError` where it was not."""
        if step not in self.checkpoints():
            has = ", ".join(map(str, self.checkpoints())) or "none; train.keep_last says how many to keep"
            raise CharlmError(f"the run {self.folder} kept no save of step {step}; it has {has}")
        return self.checkpoint(step)

    def checkpoints(self) -> list[int]:
        """The steps of the saves that are kept, in order."""
        return sorted(step for step, path in self._checkpoint_folders() if Run(path).state.exists())

    def _checkpoint_folders(self) -> Iterator[tuple[int, Path]]:
        """The checkpoints' steps and folders; what a user put beside them is none."""
        for path in (self.folder / "checkpoints").glob("step-*"):
            if re.fullmatch(r"step-\d{8,18}", path.name, re.ASCII):
                yield int(path.name.removeprefix("step-")), path

    def keep(self, step: int) -> None:
        """Keep the last save, which is of `step`, as a checkpoint: as links, so that it takes no room yet."""
        kept = self.checkpoint(step)
        try:
            kept.folder.mkdir(parents=True, exist_ok=True)
            for source, target in ((self.last, kept.last), (self.state, kept.state)):
                if source.exists():  # it may have been deleted
                    _link(source, target)
        except OSError as error:
            raise CharlmError(f"cannot write {kept.folder}: {error.strerror}") from None

    def replace_best(self, model: Path) -> None:
        """Make the model file `model` the best."""
        try:
            _link(model, self.best)
        except OSError as error:
            raise CharlmError(f"cannot write {self.best}: {error.strerror}") from None

    def prune(self, kept: Collection[int]) -> None:
        """Remove all checkpoints but those of the steps `kept`."""
        for step, path in list(self._checkpoint_folders()):
            if step not in kept:
                shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):  # there is none, or something is in it
            (self.folder / "checkpoints").rmdir()


@contextlib.contextmanager
def lock(run: Run) -> Iterator[None]:
    """Hold `run` for this process alone; the system lets go of it when the process ends, however that is.

    Raises `CharlmError` where another process holds it. Where files cannot be locked, nobody is kept out.
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
                f"the run {run.folder} is being trained by another process; wait for its end, or stop it"
            ) from None
        except OSError:
            pass
        yield
    finally:
        os.close(folder)


def new_run(name: str | None, recipe: str) -> Run:
    """A run whose folder does not exist yet: ``runs/NAME``, by default ``runs/RECIPE-DATE-TIME``.

    Raises `ConfigError` for a name that is taken or is no name for a folder.
    """
    if name is None:
        return Run(RUNS / f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}")
    if not re.fullmatch(r"\w[\w.+=-]*", name):
        raise ConfigError(f"--name {name!r} is no name for a run: use letters, digits and . _ + = - only")
    if (RUNS / name).exists():
        raise ConfigError(
            f"the run {RUNS / name} exists; choose another --name, or go on with it: --resume {name}"
        )
    return Run(RUNS / name)


def create(run: Run, config: Config, rename: bool = False) -> Run:
    """Make the run's folder with ``config.yaml`` in it: both are there, or neither.

    rename: where the folder is taken, as by a run begun in the same second, number another.
    Raises `CharlmError` where that cannot be done.
    """
    wanted, number, made = run.folder, 1, None
    try:
        wanted.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=wanted.parent, prefix=".run."))
        umask = os.umask(0)
        os.umask(umask)
        made.chmod(0o777 & ~umask)  # mkdtemp makes folders that only their owner reads
        save_config(Run(made), config)
        while not _moved(made, run.folder):
            if not rename:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            number += 1
            run = Run(wanted.with_name(f"{wanted.name}-{number}"))
    except OSError as error:
        raise CharlmError(
            f"cannot make the run's folder {run.folder}: {error.strerror}; take another --name or folder"
        ) from None
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
    return run


def _moved(source: Path, target: Path) -> bool:
    """Whether the folder `source` could be given the name `target`, which nothing had."""
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
    """The run that `name` gives, a folder or a name under ``runs/``; raises `ConfigError` for none."""
    for folder in (Path(name), RUNS / name):
        if (folder / "config.yaml").is_file():
            return Run(folder)
    known = sorted(path.parent.name for path in RUNS.glob("[!.]*/config.yaml"))
    raise ConfigError(
        f"{name!r} is no run: " + (f"runs/ has {', '.join(known)}" if known else "there are none in runs/")
    )


def find_model(name: str | None) -> Path:
    """The model file that `name` gives: a file, a run's folder or name, by default the newest run's.

    Of a run, the model that was best on val, or the last before there is a best. Raises `ConfigError` where
    there is none.
    """
    if name is not None:
        with contextlib.suppress(OSError):  # a name that is too long for the file system
            for path in (Path(name), RUNS / name):
                if path.is_file():
                    return path
                if found := _model_of(Run(path)):
                    return found
        named = one_line(repr(name))
        raise ConfigError(f"no model {named}: it is neither a model file nor a run with one in it")
    models = [model for path in RUNS.glob("*/config.yaml") if (model := _model_of(Run(path.parent)))]
    if not models:
        raise ConfigError("there is no model in runs/ yet: train one with charlm train, or give --model PATH")
    return max(
        models, key=lambda path: max(each.stat().st_mtime for each in path.parent.glob("*.safetensors"))
    )


def _model_of(run: Run) -> Path | None:
    return next((path for path in (run.best, run.last) if path.is_file()), None)


def _link(source: Path, target: Path) -> None:
    """Have `target` be the file `source`, atomically."""
    temporary = target.with_name(f".{target.name}.link")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without links
        shutil.copyfile(source, temporary)
    temporary.replace(target)
