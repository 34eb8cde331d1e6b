"""A run is a folder: its configuration, its models, the state to resume from, and its log.

``config.yaml`` (resolved), ``model.safetensors`` (best on val), ``last.safetensors`` and ``state.pt`` (to go
on from), ``metrics.jsonl``.
"""

import json
import math
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charlm import config as configuration
from charlm.config import Config
from charlm.errors import CharlmError, ConfigError
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
        return self.folder / "state.pt"

    @property
    def metrics(self) -> Path:
        """The log, a JSON object a line."""
        return self.folder / "metrics.jsonl"

    def load_config(self) -> Config:
        """The configuration the run was made from."""
        try:
            text = self.config.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CharlmError(f"cannot read {self.config}: {error}") from None
        return configuration.from_data(configuration.parse_yaml(text, str(self.config)), str(self.config))

    def save_state(self, state: dict[str, Any]) -> None:
        """Write `state` to ``state.pt``, atomically."""
        import torch  # here: who only looks for a model does not wait for it

        write_atomically(self.state, lambda path: torch.save(state, path))

    def load_state(self) -> dict[str, Any]:
        """Read ``state.pt``; only tensors and plain values are, never code."""
        import torch

        try:
            state = torch.load(self.state, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise CharlmError(
                f"the run {self.folder} has no state.pt: it stopped before its first save"
            ) from None
        except Exception as error:  # a damaged file makes torch and zipfile raise many kinds
            raise CharlmError(
                f"{self.state} is damaged and cannot be resumed from: {str(error).splitlines()[0]}"
            ) from None
        if not isinstance(state, dict):
            raise CharlmError(f"{self.state} is not a state that charlm wrote")
        return state

    def log(self, row: dict[str, Any]) -> int:
        """Append a row to the log, without what is infinite, as JSON lacks it; returns the size after it."""
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                finite = {key: value for key, value in row.items() if abs(value) != math.inf}
                file.write(json.dumps(finite, allow_nan=False) + "\n")
                return file.tell()
        except OSError as error:
            raise CharlmError(f"cannot write {self.metrics}: {error.strerror}") from None

    def cut_log(self, size: int) -> None:
        """Take what was logged behind byte `size` back: the steps since will be done again."""
        if self.metrics.exists() and self.metrics.stat().st_size > size:
            os.truncate(self.metrics, size)


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
    """Make the run's folder with ``config.yaml`` in it.

    rename: where the folder is taken, as by a run begun in the same second, number another.
    Raises `CharlmError` where that cannot be done.
    """
    wanted, number = run.folder, 1
    try:
        wanted.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                run.folder.mkdir()
                break
            except FileExistsError:
                if not rename:
                    raise
                number += 1
                run = Run(wanted.with_name(f"{wanted.name}-{number}"))
    except OSError as error:
        raise CharlmError(
            f"cannot make the run's folder {run.folder}: {error.strerror}; take another --name or folder"
        ) from None
    save_config(run, config)
    return run


def save_config(run: Run, config: Config) -> None:
    """Write the run's ``config.yaml``, atomically."""
    text = configuration.to_yaml(config)
    write_atomically(run.config, lambda path: path.write_text(text, encoding="utf-8"))


def find_run(name: str) -> Run:
    """The run that `name` gives, a folder or a name under ``runs/``; raises `ConfigError` for none."""
    for folder in (Path(name), RUNS / name):
        if (folder / "config.yaml").is_file():
            return Run(folder)
    known = sorted(path.parent.name for path in RUNS.glob("*/config.yaml"))
    raise ConfigError(
        f"{name!r} is no run: " + (f"runs/ has {', '.join(known)}" if known else "there are none in runs/")
    )


def find_model(name: str | None) -> Path:
    """The model file that `name` gives: a file, a run's folder or name, by default the newest run's.

    Of a run, the model that was best on val, or the last before there is a best. Raises `ConfigError` where
    there is none.
    """
    if name is not None:
        for path in (Path(name), RUNS / name):
            if path.is_file():
                return path
            if found := _model_of(Run(path)):
                return found
        raise ConfigError(f"no model {name!r}: it is neither a model file nor a run with one in it")
    models = [model for path in RUNS.glob("*/config.yaml") if (model := _model_of(Run(path.parent)))]
    if not models:
        raise ConfigError("there is no model in runs/ yet: train one with charlm train, or give --model PATH")
    return max(
        models, key=lambda path: max(each.stat().st_mtime for each in path.parent.glob("*.safetensors"))
    )


def _last_saved(model: Path) -> float:
    return max(path.stat().st_mtime for path in model.parent.glob("*.safetensors"))


def _model_of(run: Run) -> Path | None:
    return next((path for path in (run.best, run.last) if path.is_file()), None)
