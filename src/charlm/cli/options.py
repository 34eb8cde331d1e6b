"""Options that several commands share, and what they lead to."""

import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import torch

    from charlm.storage.model_file import Loaded
import json
from collections.abc import Iterable
from pathlib import Path

from click.shell_completion import CompletionItem

from charlm.config import shipped


def complete_recipes(context: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """The recipes in ./configs and those that ship, else files."""
    folders = (Path("configs"), shipped("configs"))
    names = {path.relative_to(folder).as_posix() for folder in folders for path in folder.rglob("*.yaml")}
    return _offer(sorted(names), begun)


def complete_runs(context: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """The names of the runs in ./runs, the newest first, else files."""
    folders = [path.parent for path in Path("runs").glob("[!.]*/config.yaml")]
    folders.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
    return _offer((folder.name for folder in folders), begun)


def complete_settings(context: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """The keys that --set takes, each also with its default: bash puts a space behind what stands alone."""
    from charlm.config import KEYS, from_data

    defaults = from_data({}, "").model_dump(mode="json")
    offered = []
    for section, name in (key.split(".") for key in KEYS):
        value = defaults[section][name]
        shown = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        offered += [f"{section}.{name}=", f"{section}.{name}={shown}"]
    return [CompletionItem(each) for each in offered if each.startswith(begun)]


def _offer(names: Iterable[str], begun: str) -> list[CompletionItem]:
    """Those of `names` that go on from what is `begun`; bash takes up files only from the first item."""
    files = CompletionItem(begun, type="file")
    return [files, *(CompletionItem(name) for name in names if name.startswith(begun))]


model_option = click.option(
    "--model",
    "-m",
    metavar="PATH",
    shell_complete=complete_runs,
    help="A model file, a run's folder or name.  [default: the newest run]",
)
device_option = click.option(
    "--device", default="auto", metavar="NAME", show_default=True, help="auto, cpu, cuda, cuda:N or mps."
)
implementation_option = click.option(
    "--implementation",
    type=click.Choice(["auto", "scratch", "builtin", "fused"]),
    help="Load the model in this implementation.  [default: the run's setting]",
)
unknown_option = click.option(
    "--unknown",
    type=click.Choice(["error", "skip", "replace"]),
    default="error",
    show_default=True,
    help="Characters that the model does not know: refuse, leave out, or put a space for each (the most "
    "frequent character, if it knows no space).",
)


def stdin_for_dash(argument: str) -> str:
    """`argument`, or where it is - what stdin holds, without the line end that echo adds."""
    from charlm.text import read

    return read.decode(sys.stdin.buffer.read(), "stdin").removesuffix("\n") if argument == "-" else argument


def load(model: str | None, implementation: str | None, device: str) -> "Loaded":
    """The model that the options name, on the device that they name."""
    from charlm.nn.device import choose_device
    from charlm.storage import run as runs
    from charlm.storage.model_file import load_model

    place: torch.device = choose_device(device)
    return load_model(runs.find_model(model), implementation, place)
