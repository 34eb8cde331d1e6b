"""What the shell offers when Tab is pressed: recipes, runs, settings. Imports no torch."""

import json
from collections.abc import Iterable
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from charlm.resources import shipped


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
