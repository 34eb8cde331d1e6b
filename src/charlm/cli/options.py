"""Options that several commands share, with their completion in the shell.

`config_option`, `set_option`, `output_option`, `corpus_option` and `json_option` are called with what differs
in one command, such as another help text; `config_option` also with the parameter's name.
"""

import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from charlm.storage.model_file import Loaded


def complete_recipes(context: click.Context, parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """Return the recipes in ./configs and those that ship with charlm, and the item for files."""
    from charlm.config import recipes

    return _with_files(recipes(), typed)


def complete_runs(context: click.Context, parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """Return the names of the runs in ./runs, the newest first, and the item for files."""
    folders = [path.parent for path in Path("runs").glob("[!.]*/config.yaml")]
    folders.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
    return _with_files((folder.name for folder in folders), typed)


def complete_settings(context: click.Context, parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """Return the keys that --set takes, each with its meaning, once alone and once with its default.

    Two items for a key, because bash appends a space where there is only one.
    """
    from charlm.config import reference

    offered = []
    for row in reference():
        value = row.default_text.replace(" ", "")  # an argument of the shell
        # Bare keys only after a first letter, so that the list of all has each key once.
        for key in (row.key, row.key.partition(".")[2])[: 2 if typed else 1]:
            offered += [CompletionItem(f"{key}={text}", help=row.description) for text in ("", value)]
    return [item for item in offered if item.value.startswith(typed)]


def _with_files(names: Iterable[str], typed: str) -> list[CompletionItem]:
    """The item for files, which bash reads only if it is the first, and those of `names` that match."""
    files = CompletionItem(typed, type="file")
    return [files, *(CompletionItem(name) for name in names if name.startswith(typed))]


class CellChoice(click.Choice):  # type: ignore[type-arg,unused-ignore]
    """The cells of the configuration, read when needed: their import would slow down `charlm --help`."""

    case_sensitive = True

    def __init__(self) -> None:
        pass

    @property
    def choices(self) -> tuple[str, ...]:  # type: ignore[override]
        """The names of the cells."""
        from charlm.config import CELL_NAMES

        return tuple(CELL_NAMES)


config_option = partial(
    click.option,
    "--config",
    "-c",
    metavar="FILE",
    shell_complete=complete_recipes,
    help="A recipe: a path, or a name in ./configs or among those that ship.  [default: the defaults]",
)
set_option = partial(
    click.option,
    "--set",
    "-s",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    shell_complete=complete_settings,
    help="Override a setting, as lr=2e-3 or train.lr=2e-3; `charlm config` lists them.",
)
output_option = partial(click.option, "--output", "-o", metavar="FILE")
corpus_option = partial(
    click.option,
    "--corpus",
    metavar="PATH",
    help="The path of the training text, if the text has been moved.",
)
json_option = partial(click.option, "--json", "as_json", is_flag=True, help="Print JSON.")
model_option = click.option(
    "--model",
    "-m",
    metavar="PATH",
    shell_complete=complete_runs,
    help="A model file, a run's folder or name.  [default: the newest run]",
)
device_option = click.option(
    "--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps."
)
implementation_option = click.option(
    "--implementation",
    type=click.Choice(["auto", "scratch", "builtin", "fused"]),
    help="Load the model in this implementation.  [default: the run's setting]",
)
threads_option = click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    metavar="N",
    help="CPU threads.  [default: by the model's size and the processors]",
)
unknown_option = click.option(
    "--unknown",
    type=click.Choice(["error", "skip", "replace"]),
    default="error",
    help="Characters that the model does not know: refuse them (a model trained with corpus.min_count reads "
    "them as its unknown), skip them, or replace each by a space (the most frequent character, if the space "
    "is unknown).",
)


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that are the arguments of `load`."""
    return model_option(implementation_option(device_option(threads_option(command))))


def stdin_for_dash(argument: str) -> str:
    """Return `argument`, or for ``-`` the text on stdin, without the line end that echo adds."""
    from charlm.text.decode import decode

    return decode(sys.stdin.buffer.read(), "stdin").removesuffix("\n") if argument == "-" else argument


def load(
    model: str | None, implementation: str | None, device: str, threads: int | None, rows: int
) -> "Loaded":
    """Return the model that the options name, on the device that they name, and set the number of threads.

    rows: sequences that are read or written side by side.
    """
    import torch

    from charlm.nn.device import choose_device, choose_threads
    from charlm.storage import run as runs
    from charlm.storage.model_file import load_model

    loaded = load_model(runs.find_model(model), implementation, choose_device(device))
    torch.set_num_threads(choose_threads(threads, loaded.config.model, rows)[0])
    return loaded
