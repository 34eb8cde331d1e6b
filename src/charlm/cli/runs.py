"""The commands that show what is in a model file or a run: info, report."""

import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from charlm.cli.options import complete_runs
from charlm.errors import one_line
from charlm.storage.log import json_text

if TYPE_CHECKING:
    from charlm.storage.header import Header
import sys
from typing import TYPE_CHECKING

from charlm.errors import ConfigError

if TYPE_CHECKING:
    from charlm.storage.run import Run
    from charlm.study.plot import Along


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...", shell_complete=complete_runs)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(models: tuple[str, ...], as_json: bool) -> None:
    """Show what is in a model file: configuration, parameters, vocabulary, figures.

    MODEL is a model file, a run's folder or name; the newest run by default. Of two or more, what differs is
    shown side by side. Only the files' headers are read.
    """
    from charlm.config import to_yaml
    from charlm.storage import run as runs
    from charlm.storage.header import read_header

    paths = [runs.find_model(model) for model in models or [None]]
    headers = [read_header(path) for path in paths]
    if as_json:
        shown = [_described(path, header) for path, header in zip(paths, headers, strict=True)]
        found: Any = shown[0]
        if len(paths) > 1:
            different = {key: list(values) for key, values in _differences(headers).items()}
            found = {"models": shown, "differences": different}
        click.echo(json_text(found, indent=2, ensure_ascii=False))
        return
    if len(paths) > 1:
        _side_by_side(paths, headers)
        return
    path, header = paths[0], headers[0]
    click.echo(f"{path}: {_parameters(header):,} parameters")
    for name, shape in header.tensors.items():
        click.echo(f"  {one_line(name):<28} {' × '.join(map(str, shape))}")
    click.echo(f"\nvocabulary: {len(header.vocab)} characters, the most frequent first\n  {header.vocab!r}")
    click.echo("\nfigures")
    for key, value in header.figures.items():
        click.echo(f"  {one_line(key):<28} {one_line(str(value))}")
    click.echo(f"\nconfiguration\n{to_yaml(header.config)}", nl=False)


def _parameters(header: "Header") -> int:
    return sum(math.prod(shape) for shape in header.tensors.values())


def _described(path: Path, header: "Header") -> dict[str, Any]:
    """What `info --json` shows of a model."""
    return {
        "path": str(path),
        "parameters": _parameters(header),
        "tensors": {name: list(shape) for name, shape in header.tensors.items()},
        "vocab": header.vocab,
        "config": header.config.model_dump(mode="json"),
        "figures": header.figures,
    }


def _facts(header: "Header") -> dict[str, Any]:
    """All that can be compared, by name."""
    facts: dict[str, Any] = {"parameters": _parameters(header), "vocabulary": len(header.vocab)}
    for section, values in header.config.model_dump(mode="json").items():
        facts |= {f"{section}.{key}": value for key, value in values.items()}
    facts |= header.figures
    return facts | {name: " × ".join(map(str, shape)) for name, shape in header.tensors.items()}


def _differences(headers: list["Header"]) -> dict[str, tuple[Any, ...]]:
    """What is not the same in all of `headers`, by name, with each one's value; None where one has none."""
    facts = [_facts(header) for header in headers]
    names = dict.fromkeys(itertools.chain(*facts))
    rows = {name: tuple(each.get(name) for each in facts) for name in names}
    common = set.intersection(*(set(header.vocab) for header in headers))
    own = tuple("".join(char for char in header.vocab if char not in common) for header in headers)
    different = {name: row for name, row in rows.items() if any(value != row[0] for value in row)}
    return different | ({"characters of its own": own} if any(own) else {})


def _side_by_side(paths: list[Path], headers: list["Header"]) -> None:
    """A table of what differs, a column for each model."""

    def cell(value: Any) -> str:
        if value is None or value == "":
            return "–"
        if isinstance(value, int) and not isinstance(value, bool):
            return f"{value:,}"
        return (
            f"{value:.6g}"
            if isinstance(value, float)
            else (value if isinstance(value, str) and value.isprintable() else repr(value))
        )

    rows = [("", *(str(path) for path in paths))]
    rows += [(one_line(name), *map(cell, values)) for name, values in _differences(headers).items()]
    widths = [max(len(row[k]) for row in rows) for k in range(len(paths) + 1)]
    for row in rows:
        click.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    same = sum(1 for name in _facts(headers[0])) - len(
        [n for n in _differences(headers) if n in _facts(headers[0])]
    )
    click.echo(f"the same: {same} of {len(_facts(headers[0]))} settings, figures and shapes")


@click.command()
@click.argument("run", metavar="RUN", shell_complete=complete_runs)
@click.option("--output", "-o", metavar="FILE", help="The page.  [default: report.html in the run's folder]")
@click.option("--corpus", metavar="PATH", help="Where the training text is, if it has been moved.")
def report(run: str, output: str | None, corpus: str | None) -> None:
    """Show a run on one HTML page: curves, samples, what surprises the model, what its units follow.

    RUN is a run's folder or name. The page needs no network and no other file. It has the training's curves,
    the configuration, texts at three temperatures, what of them is copied from the training text, a held-out
    passage coloured by surprisal with what the model expected at each character, and the same coloured
    by hidden units: any, or those that follow quotes, line ends, word ends and more best.
    """
    from charlm.storage import run as runs
    from charlm.study.report.page import write_report

    found = runs.find_run(run)
    page = Path(output) if output else found.folder / "report.html"
    write_report(found, page, corpus)
    click.echo(f"wrote {page}", err=True)


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
    from charlm.storage import log as logs

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
    from charlm.study import plot as plotting

    plotting.check_plot(Path(output))
    plotting.plot(plotting.curves(_find(names)), Path(output), along)
    click.echo(f"wrote {output}", err=True)


def _find(names: tuple[str, ...]) -> "dict[str, Run]":
    """The runs that `names` give, by the names of their folders, or as given where two have the same."""
    from charlm.storage import run as runs

    found = [runs.find_run(name) for name in names]
    folders = [run.folder.resolve() for run in found]
    if len(set(folders)) < len(folders):
        raise ConfigError(f"a run stands twice in {' '.join(names)}")
    short = [folder.name for folder in folders]
    return dict(zip(short if len(set(short)) == len(short) else names, found, strict=True))
