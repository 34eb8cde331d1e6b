"""The commands that show how trainings went: log, plot."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from charlm.completion import complete_runs
from charlm.errors import ConfigError

if TYPE_CHECKING:
    from charlm.plot import Along
    from charlm.runs import Run

_runs_argument = click.argument(
    "names", nargs=-1, required=True, metavar="RUN...", shell_complete=complete_runs
)


@click.command()
@_runs_argument
@click.option(
    "--format",
    "form",
    type=click.Choice(["csv", "jsonl"]),
    default="csv",
    show_default=True,
    help="Of stdout.",
)
def log(names: tuple[str, ...], form: str) -> None:
    """Print the figures of runs as CSV or JSON lines.

    There is a row for each evaluation, one for the test split, and one with an event for each step that was
    not taken and each time the run went back. RUN is a run's folder or name, and the column `run` says whose
    row it is; what was not measured is empty in CSV and absent in JSON. A run that is still training can be
    shown.
    """
    from charlm import logs

    logs.write(list(logs.named_rows(_find(names))), form, sys.stdout)  # type: ignore[arg-type]


@click.command()
@_runs_argument
@click.option(
    "--output",
    "-o",
    default="curves.png",
    show_default=True,
    metavar="FILE",
    help="Where to draw: a .png, .svg or .pdf.",
)
@click.option(
    "--along",
    type=click.Choice(["step", "epoch", "seconds"]),
    default="step",
    show_default=True,
    help="What the horizontal axis counts; seconds are of training.",
)
def plot(names: tuple[str, ...], output: str, along: "Along") -> None:
    """Draw the loss and perplexity of runs, train and val, in one picture.

    RUN is a run's folder or name. It needs matplotlib: the extra `plot`.
    """
    from charlm import plot as plotting

    plotting.check_plot(Path(output))
    plotting.plot(plotting.curves(_find(names)), Path(output), along)
    click.echo(f"drawn in {output}", err=True)


def _find(names: tuple[str, ...]) -> "dict[str, Run]":
    """The runs that `names` give, by the names of their folders, or as given where two have the same."""
    from charlm import runs

    found = [runs.find_run(name) for name in names]
    folders = [run.folder.resolve() for run in found]
    if len(set(folders)) < len(folders):
        raise ConfigError(f"a run stands twice in {' '.join(names)}")
    short = [folder.name for folder in folders]
    return dict(zip(short if len(set(short)) == len(short) else names, found, strict=True))
