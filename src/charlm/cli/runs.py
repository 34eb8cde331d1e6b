"""The commands that show models and runs: info, report, log, plot."""

import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from charlm.cli.options import complete_runs, corpus_option, json_option, output_option
from charlm.errors import ConfigError, one_line
from charlm.files import json_text

if TYPE_CHECKING:
    from charlm.storage.header import Header
    from charlm.storage.run import Run
    from charlm.study.plot import Along


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...", shell_complete=complete_runs)
@json_option()
def info(models: tuple[str, ...], as_json: bool) -> None:
    """Show the contents of a model file: configuration, parameters, vocabulary, metrics.

    MODEL is a model file, a run's folder or name; the newest run by default. For two or more models, the
    differences are shown side by side. Only the headers of the files are read.
    """
    from charlm.config import to_yaml
    from charlm.storage import run as runs
    from charlm.storage.header import read_header

    paths = [runs.find_model(model) for model in models or [None]]
    headers = [read_header(path) for path in paths]
    described = [
        {
            "path": str(path),
            "parameters": header.parameters,
            **vars(header),
            "config": header.config.model_dump(mode="json"),
        }
        for path, header in zip(paths, headers, strict=True)
    ]
    facts = [_facts(header) for header in headers]
    different = _differences(facts, [header.vocab for header in headers])
    if as_json:
        data = {"models": described, "differences": different} if len(paths) > 1 else described[0]
        click.echo(json_text(data, indent=2, ensure_ascii=False))
    elif len(paths) > 1:
        rows = [["", *map(str, paths)]]
        rows += [[one_line(name), *map(_cell, values)] for name, values in different.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            line = "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True))
            click.echo(line.rstrip())
        same = sum(name not in different for name in facts[0])
        click.echo(f"equal: {same} of {len(facts[0])} settings, metrics and shapes")
    else:
        (header,) = headers
        click.echo(f"{paths[0]}: {header.parameters:,} parameters")
        for name, shape in header.tensors.items():
            click.echo(f"  {one_line(name):<28} {' × '.join(map(str, shape))}")
        rare = f"; U+FFFD stands for {header.unknown_kinds:,} rare ones" if header.unknown_kinds else ""
        click.echo(f"\nvocabulary: {len(header.vocab)} characters, the most frequent first{rare}")
        click.echo(f"  {header.vocab!r}\n\nmetrics")
        for key, value in header.figures.items():
            click.echo(f"  {one_line(key):<28} {one_line(str(value))}")
        click.echo(f"\nconfiguration\n{to_yaml(header.config)}", nl=False)


def _facts(header: "Header") -> dict[str, Any]:
    """Return all that is compared, by name."""
    return {
        "parameters": header.parameters,
        "vocabulary": len(header.vocab),
        **{
            f"{section}.{key}": value
            for section, values in header.config.model_dump(mode="json").items()
            for key, value in values.items()
        },
        **header.figures,
        **{name: " × ".join(map(str, shape)) for name, shape in header.tensors.items()},
    }


def _differences(facts: list[dict[str, Any]], vocabs: list[str]) -> dict[str, list[Any]]:
    """Return the values of each model by name where they differ, None for a missing one.

    The row of own characters has each model's characters that another model lacks.
    """
    rows = {name: [each.get(name) for each in facts] for name in dict.fromkeys(itertools.chain(*facts))}
    common = set(vocabs[0]).intersection(*vocabs)
    rows["own characters"] = ["".join(char for char in vocab if char not in common) for vocab in vocabs]
    return {name: row for name, row in rows.items() if any(value != row[0] for value in row)}


def _cell(value: Any) -> str:
    if value in (None, ""):
        return "–"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) and value.isprintable() else repr(value)


@click.command()
@click.argument("run", metavar="RUN", shell_complete=complete_runs)
@output_option(help="Page to write.  [default: report.html in the run's folder]")
@corpus_option()
def report(run: str, output: str | None, corpus: str | None) -> None:
    """Write a run to one HTML page: curves, samples, surprisals, hidden units.

    RUN is a run's folder or name. The page needs no network and no other file. It shows the curves of the
    training, the configuration, texts at three temperatures and the parts of them copied from the training
    text, a held-out passage coloured by surprisal with the model's guesses at each character, and the same
    passage coloured by the activation of any hidden unit, with those that correlate best with quotes, ends
    of lines, ends of words and other features.
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
    "--format", "form", type=click.Choice(["csv", "jsonl"]), default="csv", help="Format of the output."
)
def log(names: tuple[str, ...], form: str) -> None:
    """Print the metrics of runs as CSV or JSON lines.

    There is a row for each evaluation, one every train.log_every steps between them, one for the test split,
    and one with an event for each skipped step and each rollback. RUN is a run's folder or name, and the
    column `run` has its name; values that were not measured are empty in CSV and absent in JSON. The run can
    still be training.
    """
    from charlm.storage import log as logs

    logs.write(list(logs.named_rows(_find(names))), form, sys.stdout)  # type: ignore[arg-type]


@click.command()
@_runs_argument
@output_option(default="curves.png", help="Image to write: .png, .svg or .pdf.")
@click.option(
    "--along",
    type=click.Choice(["step", "epoch", "seconds"]),
    default="step",
    help="Quantity on the horizontal axis; seconds are of training.",
)
def plot(names: tuple[str, ...], output: str, along: "Along") -> None:
    """Draw the loss and perplexity of runs, train and val, in one picture.

    RUN is a run's folder or name. Needs matplotlib: the extra `plot`.
    """
    from charlm.study import plot as plotting

    plotting.plot(plotting.curves(_find(names)), Path(output), along)
    click.echo(f"wrote {output}", err=True)


def _find(names: tuple[str, ...]) -> "dict[str, Run]":
    """Return the runs by the names of their folders, or by `names` if two folders have the same name."""
    from charlm.storage import run as runs

    found = [runs.find_run(name) for name in names]
    folders = [run.folder.resolve() for run in found]
    if len(set(folders)) < len(folders):
        raise ConfigError(f"a run is given twice in {' '.join(names)}; give each once")
    short = [folder.name for folder in folders]
    return dict(zip(short if len(set(short)) == len(short) else names, found, strict=True))
