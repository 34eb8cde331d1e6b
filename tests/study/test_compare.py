import csv
import json
import math
from dataclasses import asdict, replace

import pytest

from charlm.config import from_data
from charlm.errors import CharlmError, ConfigError
from charlm.nn.model import num_parameters
from charlm.storage import run as run_folders
from charlm.storage.model_file import load_model
from charlm.storage.run import Run
from charlm.study.compare import Comparison, at_epochs, compare, table
from charlm.text.corpus import Corpus
from charlm.training.trainer import Trainer
from conftest import TINY


class Silent:
    """A reporter that keeps what is said."""

    def __init__(self):
        self.said = []

    def say(self, line):
        self.said.append(line)

    def begin(self, step, total_steps, steps_per_epoch):
        pass

    def step(self, loss, characters, seconds):
        pass

    def evaluated(self, row, best):
        pass

    def end(self):
        pass


def configure(*overrides):
    return from_data({}, "", [*TINY, "corpus.source=corpus.txt", "train.epochs=3", *overrides])


def log(run):
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


@pytest.fixture
def compared(folder):
    """An RNN that overshoots beside a GRU: (rows, configs, runs, reporter)."""
    configs = {
        "rnn": configure("model.cell=rnn", "train.lr=0.2", "train.schedule=constant"),
        "gru": configure("model.cell=gru", "batches.batch_size=9"),
    }
    runs = {name: Run(folder / "runs" / name) for name in configs}
    reporter = Silent()
    return compare(configs, runs, reporter), configs, runs, reporter


def test_each_run_is_as_if_it_were_alone(compared, folder):
    _, configs, runs, reporter = compared
    alone = Run(folder / "alone")
    run_folders.create(alone, configs["gru"])
    Trainer(configs["gru"], Corpus.load(configs["gru"].corpus)).train(alone, Silent())
    assert runs["gru"].best.read_bytes() == alone.best.read_bytes()
    assert runs["gru"].load_config() == configs["gru"]
    assert [line for line in reporter.said if " of 2: " in line] == [
        f"rnn, 1 of 2: {runs['rnn'].folder}",
        f"gru, 2 of 2: {runs['gru'].folder}",
    ]


def test_the_figures_are_the_runs_own(compared):
    rows, configs, runs, _ = compared
    assert [row.name for row in rows] == ["rnn", "gru"]
    for row in rows:
        evaluations = log(runs[row.name])[:-1]  # the last row has the test split's score
        best = min(evaluations, key=lambda evaluation: evaluation["val_loss"])
        assert row.train_perplexity == best["train_perplexity"]
        assert row.val_perplexity == best["val_perplexity"]
        assert row.bits_per_character == best["val_bits_per_character"]
        assert row.best_epoch == best["epoch"]
        assert row.parameters == num_parameters(load_model(runs[row.name].best).model)
        assert row.seconds == evaluations[-1]["seconds"]
        corpus = Corpus.load(configs[row.name].corpus)
        windows = (len(corpus.train) - 9) // 8 + 1
        assert row.chars_per_second == pytest.approx(3 * 8 * windows / row.seconds)
    assert rows[0].best_epoch < 3, "the best evaluation of one of them is not the last"


@pytest.mark.parametrize(
    "override",
    ["corpus.lowercase=true", "corpus.max_chars=900", "train.seed=2", "train.epochs=4", "train.max_steps=9"],
)
def test_what_must_be_the_same(folder, override):
    key = override.partition("=")[0]
    configs = {"a": configure(), "b": configure(override, "train.lr=0.5")}
    runs = {name: Run(folder / name) for name in configs}
    with pytest.raises(ConfigError, match=rf"differ in {key} \(a: .*, b: ") as caught:
        compare(configs, runs, Silent())
    assert "train.lr" not in str(caught.value)
    assert not runs["a"].folder.exists()


def test_all_differences_are_named_at_once(folder):
    configs = {"a": configure(), "b": configure("corpus.keep=a-z", "train.seed=2")}
    with pytest.raises(ConfigError, match=r"corpus.keep \(a: None, b: 'a-z'\) and train.seed \(a: 1, b: 2\)"):
        compare(configs, {name: Run(folder / name) for name in configs}, Silent())


def test_a_pseudo_perplexity_is_not_compared_with_a_perplexity(folder):
    configs = {"a": configure(), "b": configure("model.direction=both")}
    with pytest.raises(ConfigError, match="b fills in characters"):
        compare(configs, {name: Run(folder / name) for name in configs}, Silent())


def test_nothing_to_compare():
    with pytest.raises(ConfigError, match="nothing to compare"):
        compare({}, {}, Silent())


def test_nothing_is_trained_where_a_later_one_cannot_be(folder):
    configs = {"a": configure(), "b": configure("batches.seq_len=5000")}
    runs = {name: Run(folder / name) for name in configs}
    with pytest.raises(CharlmError, match="too few for one window"):
        compare(configs, runs, Silent())
    assert not runs["a"].folder.exists()


ROWS = [
    Comparison("rnn", 5.7749, 6.126, 2.61493, 4321, 61.26, 41234.5, 3.0),
    Comparison("lstm, 2 layers", 12.5, 13.25, 3.72792, 1234567, 1061.0, 9876.0, 2.5),
]


def test_markdown():
    assert table(ROWS) == (
        "|                | train ppl | val ppl | bits/char | parameters | seconds | chars/s | best epoch |\n"
        "| -------------- | --------: | ------: | --------: | ---------: | ------: | ------: | ---------: |\n"
        "| rnn            |      5.77 |    6.13 |     2.615 |      4,321 |    61.3 |  41,234 |          3 |\n"
        "| lstm, 2 layers |     12.50 |   13.25 |     3.728 |  1,234,567 | 1,061.0 |   9,876 |        2.5 |"
    )


def test_what_is_infinite_is_null_in_json():
    (row,) = json.loads(table([replace(ROWS[0], val_perplexity=math.inf)], "json"))
    assert row == {**asdict(ROWS[0]), "val_perplexity": None}


def test_csv_and_json_have_every_digit():
    as_csv = list(csv.DictReader(table(ROWS, "csv").split("\n")))
    as_json = json.loads(table(ROWS, "json"))
    assert [Comparison(**row) for row in as_json] == ROWS
    assert [{key: str(value) for key, value in row.items()} for row in as_json] == as_csv


def test_another_format():
    with pytest.raises(ConfigError, match="'html'.*markdown, csv or json"):
        table(ROWS, "html")


def test_epochs(compared):
    _, _, runs, _ = compared
    evaluations = log(runs["gru"])[:-1]
    assert at_epochs(runs["gru"], [1, 3, 11]) == {1: evaluations[0], 3: evaluations[2]}
