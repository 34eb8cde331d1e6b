"""Train several configurations on the same data, seed and budget, and tabulate their metrics.

All metrics are read from the files of the runs.
"""

import io
from dataclasses import asdict, dataclass
from typing import Literal

from charlm.config import Config, CorpusConfig
from charlm.errors import ConfigError
from charlm.files import json_text
from charlm.metrics import Score, perplexity, shown
from charlm.storage import run as run_folders
from charlm.storage.header import read_header
from charlm.storage.log import read, write
from charlm.storage.run import Run
from charlm.storage.vocabulary import read_vocabulary
from charlm.text.corpus import Corpus
from charlm.training.reporting import Reporter
from charlm.training.trainer import Trainer

Format = Literal["markdown", "csv", "json"]

# The keys whose values must be equal for the metrics to be comparable.
_COMMON = [
    *(("corpus", key) for key in CorpusConfig.model_fields),
    *(("train", key) for key in ("seed", "epochs", "max_steps")),
]


@dataclass(frozen=True)
class Comparison:
    """The metrics of one run.

    train_perplexity, val_perplexity, bits_per_character: at the evaluation with the lowest val loss; the
        first is over the steps since the previous evaluation, None if all of them were skipped.
    best_epoch: the epoch of that evaluation, a fraction within an epoch.
    seconds, chars_per_second: of the whole training, without evaluations and saves.
    """

    name: str
    train_perplexity: float | None
    val_perplexity: float
    bits_per_character: float
    parameters: int
    seconds: float
    chars_per_second: float
    best_epoch: float


def compare(configs: dict[str, Config], runs: dict[str, Run], reporter: Reporter) -> list[Comparison]:
    """Train each of `configs` on one corpus, in the folder of the run with the same name in `runs`.

    Raises `ConfigError` for configurations that differ in corpus, seed or budget, and `CharlmError` as
    `Trainer` does; the runs finished before the error are kept.
    """
    assert configs.keys() == runs.keys(), "each configuration has a run"
    _refuse_differences(configs)
    common = next(iter(configs.values()))
    known = read_vocabulary(common.corpus)
    corpus = Corpus.load(common.corpus, known=known, seed=common.train.seed)
    for config in configs.values():
        Trainer(config, corpus)  # raises before the first training begins
    rows: list[Comparison] = []
    for name, config in configs.items():
        # Created here: a trainer seeds torch's global generator, from which dropout draws.
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
    """Return `rows` as text: rounded in markdown, with all digits in CSV and JSON.

    Raises `ConfigError` for an unknown format.
    """
    if format == "json":
        return json_text([asdict(row) for row in rows], indent=2, ensure_ascii=False)
    if format == "csv":
        file = io.StringIO()
        write([asdict(row) for row in rows], "csv", file)
        return file.getvalue().rstrip("\n")
    if format != "markdown":
        raise ConfigError(f"table format {format!r} is invalid; allowed: markdown, csv, json")
    return markdown(
        ["", "train ppl", "val ppl", "bits/char", "parameters", "seconds", "chars/s", "best epoch"],
        [
            [
                row.name,
                "-" if row.train_perplexity is None else shown(row.train_perplexity),
                shown(row.val_perplexity),
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
    """Return a markdown table with padded columns, the first aligned left and the others right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        [row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True))]
        for row in (header, *rows)
    ]
    lines.insert(1, rule)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _refuse_differences(configs: dict[str, Config]) -> None:
    """Raise `ConfigError` with all keys that must be equal and are not, and their values."""
    if not configs:
        raise ConfigError("there is nothing to compare; give at least one configuration")
    filling = [name for name, config in configs.items() if config.model.direction == "both"]
    if filling:
        raise ConfigError(
            f"{', '.join(filling)} has model.direction: both; a pseudo-perplexity is not comparable with a "
            "perplexity; leave it out"
        )
    if without := [name for name, config in configs.items() if not config.corpus.has_val]:
        raise ConfigError(f"{', '.join(without)} has no val split to compare; set corpus.split or corpus.val")
    differences = []
    for section, key in _COMMON:
        values = {name: getattr(getattr(config, section), key) for name, config in configs.items()}
        if any(value != next(iter(values.values())) for value in values.values()):
            shown = ", ".join(f"{name}: {value!r}" for name, value in values.items())
            differences.append(f"{section}.{key} ({shown})")
    if differences:
        raise ConfigError(
            f"the configurations differ in {' and '.join(differences)}; set the same values with --set"
        )


def _comparison(name: str, run: Run) -> Comparison:
    """Return the metrics of a finished run, from its log and the header of its best model."""
    best = read_header(run.best)
    # The perplexities are computed from the losses, because an infinite one is not stored.
    loss = Score(best.figures["val_loss"], 1)
    train_loss = best.figures.get("train_loss")
    seconds, characters = 0.0, 0.0
    for row in read(run):
        if "val_loss" in row:  # the rate is over the time since the previous evaluation, absent without steps
            characters += row.get("chars_per_second", 0.0) * (row["seconds"] - seconds)
            seconds = row["seconds"]
    return Comparison(
        name=name,
        train_perplexity=None if train_loss is None else perplexity(train_loss),
        val_perplexity=loss.perplexity,
        bits_per_character=loss.bits_per_character,
        parameters=best.parameters,
        seconds=seconds,
        chars_per_second=characters / seconds,
        best_epoch=best.figures["epoch"],
    )
