"""Several configurations side by side: the same data, seed and budget, then one table and the curves.

What is compared is read back from the runs' own files; nothing is measured that a single run does not.
"""

import csv
import io
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass, fields
from math import prod
from typing import Literal

from charlm.config import Config, CorpusConfig
from charlm.errors import ConfigError
from charlm.files import json_text
from charlm.storage import run as run_folders
from charlm.storage.header import read_header
from charlm.storage.log import Row, evaluations
from charlm.storage.run import Run
from charlm.text.corpus import Corpus
from charlm.training.reporting import Reporter
from charlm.training.trainer import Trainer

Format = Literal["markdown", "csv", "json"]

# What must be the same for the figures to be comparable.
_COMMON = [
    *(("corpus", key) for key in CorpusConfig.model_fields),
    *(("train", key) for key in ("seed", "epochs", "max_steps")),
]


@dataclass(frozen=True)
class Comparison:
    """The figures of one run.

    train_perplexity, val_perplexity, bits_per_character: at the evaluation that was best on val; the first is
    over the characters trained on since the evaluation before it, the others are val's.
    best_epoch: when that was; a fraction where evaluations fall within an epoch.
    seconds, chars_per_second: of the whole training, without evaluations and saves.
    """

    name: str
    train_perplexity: float
    val_perplexity: float
    bits_per_character: float
    parameters: int
    seconds: float
    chars_per_second: float
    best_epoch: float


def compare(configs: dict[str, Config], runs: dict[str, Run], reporter: Reporter) -> list[Comparison]:
    """Train each of `configs` in turn, on one corpus, in the folder that `runs` has under its name.

    Raises `ConfigError` for configurations that differ in corpus, seed or budget, and `CharlmError` as
    `Trainer` does; the runs finished by then stay.
    """
    assert configs.keys() == runs.keys(), "each configuration has a run"
    _refuse_differences(configs)
    corpus = Corpus.load(next(iter(configs.values())).corpus)
    for config in configs.values():
        Trainer(config, corpus)  # what cannot be trained is found now, not when its turn comes
    rows: list[Comparison] = []
    for name, config in configs.items():
        # Made when its turn comes: a trainer seeds torch's global generator, from which dropout draws.
        trainer = Trainer(config, corpus)
        reporter.say(f"{name}, {len(rows) + 1} of {len(configs)}: {runs[name].folder}")
        for line in trainer.describe():
            reporter.say(line)
        run_folders.create(runs[name], config)
        with run_folders.lock(runs[name]):
            trainer.train(runs[name], reporter)
        rows.append(_comparison(name, runs[name]))
    return rows


def table(rows: list[Comparison], format: Format = "markdown") -> str:  # noqa: A002 - as the option is called
    """`rows` as a text: markdown rounds for the eye, CSV and JSON have every digit."""
    if format == "json":
        return json_text([asdict(row) for row in rows], indent=2, ensure_ascii=False)
    if format == "csv":
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Comparison))
        writer.writerows(astuple(row) for row in rows)
        return file.getvalue().rstrip("\n")
    if format != "markdown":
        raise ConfigError(f"{format!r} is no format for a table; choose markdown, csv or json")
    return markdown(
        ["", "train ppl", "val ppl", "bits/char", "parameters", "seconds", "chars/s", "best epoch"],
        [
            [
                row.name,
                f"{row.train_perplexity:.2f}",
                f"{row.val_perplexity:.2f}",
                f"{row.bits_per_character:.3f}",
                f"{row.parameters:,}",
                f"{row.seconds:,.1f}",
                f"{row.chars_per_second:,.0f}",
                f"{row.best_epoch:g}",
            ]
            for row in rows
        ],
    )


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A markdown table that reads well as it is: the first column to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        [row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True))]
        for row in (header, *rows)
    ]
    lines.insert(1, rule)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def at_epochs(run: Run, epochs: Iterable[int]) -> dict[int, Row]:
    """The evaluations at the ends of `epochs`, by epoch; an epoch without one is absent."""
    rows = {row["epoch"]: row for row in evaluations(run)}
    return {epoch: rows[epoch] for epoch in epochs if epoch in rows}


def _refuse_differences(configs: dict[str, Config]) -> None:
    """Raise `ConfigError` that names all keys which must be the same and are not, with their values."""
    if not configs:
        raise ConfigError("there is nothing to compare: give a configuration or more")
    filling = [name for name, config in configs.items() if config.model.direction == "both"]
    if filling:
        raise ConfigError(
            f"{', '.join(filling)} fills in characters: its pseudo-perplexity does not compare with a "
            "perplexity; leave it out"
        )
    problems = []
    for section, key in _COMMON:
        values = {name: getattr(getattr(config, section), key) for name, config in configs.items()}
        if any(value != next(iter(values.values())) for value in values.values()):
            each = ", ".join(f"{name}: {value!r}" for name, value in values.items())
            problems.append(f"{section}.{key} ({each})")
    if problems:
        raise ConfigError(
            f"the configurations differ in {' and '.join(problems)}; what is compared must have the same "
            "corpus, train.seed, train.epochs and train.max_steps: set them for all with --set"
        )


def _comparison(name: str, run: Run) -> Comparison:
    """The figures of a finished run, from its log and its best model's header."""
    best = read_header(run.best)
    seconds, characters = 0.0, 0.0
    for row in evaluations(run):  # a row's rate is over the time since the row before it
        # Absent where no step since was fit to be taken.
        characters += row.get("chars_per_second", 0.0) * (row["seconds"] - seconds)
        seconds = row["seconds"]
    return Comparison(
        name=name,
        train_perplexity=best.figures["train_perplexity"],
        val_perplexity=best.figures["val_perplexity"],
        bits_per_character=best.figures["val_bits_per_character"],
        parameters=sum(prod(shape) for shape in best.tensors.values()),
        seconds=seconds,
        chars_per_second=characters / seconds,
        best_epoch=best.figures["epoch"],
    )
