import csv
import json
import math
from dataclasses import asdict, replace

import pytest

from charlm.config import from_data
from charlm.errors import CharlmError, ConfigError
from charlm.metrics import Score
from charlm.nn.model import CharLM, num_parameters
from charlm.storage import run as run_folders
from charlm.storage.model_file import load_model
from charlm.storage.run import Run
from charlm.study.compare import Comparison, _comparison, compare, table
from charlm.text.corpus import Corpus
from charlm.training.trainer import Trainer
from conftest import TINY


class Silent:
    """A reporter that records the lines."""

    def __init__(self):
        self.said = []

    def say(self, line):
        self.said.append(line)

    def begin(self, step, total_steps, steps_per_epoch):
        pass

    def step(self, loss, characters, seconds):
        pass

    def logged(self, row):
        pass

    def evaluated(self, row, best):
        pass

    def end(self):
        pass


def configure(*overrides):
    return from_data({}, "", [*TINY, "corpus.source=corpus.txt", "train.epochs=3", *overrides])


def evaluations(run):
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [row for row in rows if "val_loss" in row]


@pytest.fixture
def compared(folder):
    """An RNN beside a GRU: (rows, configs, runs, reporter)."""
    configs = {"rnn": configure("model.cell=rnn"), "gru": configure("model.cell=gru", "batches.batch_size=9")}
    runs = {name: Run(folder / "runs" / name) for name in configs}
    reporter = Silent()
    return compare(configs, runs, reporter), configs, runs, reporter


def test_a_compared_run_equals_one_trained_alone(compared, folder):
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


def test_metrics_are_those_of_the_best_evaluation(folder, monkeypatch):
    losses = iter([2.0, 1.5, 1.75, 1.25])  # three evaluations and the test split
    monkeypatch.setattr("charlm.training.trainer.evaluate_split", lambda *_: Score(next(losses), 1))
    run = Run(folder / "run")
    (row,) = compare({"a": configure()}, {"a": run}, Silent())
    best = evaluations(run)[1]
    assert row.best_epoch == best["epoch"] == 2
    assert row.train_perplexity == best["train_perplexity"]
    assert row.val_perplexity == math.exp(1.5)
    assert row.bits_per_character == 1.5 / math.log(2)


def test_parameters_seconds_and_rate_are_those_of_the_run(compared):
    rows, configs, runs, _ = compared
    assert [row.name for row in rows] == ["rnn", "gru"]
    for row in rows:
        assert row.parameters == num_parameters(load_model(runs[row.name].best).model)
        assert row.seconds == evaluations(runs[row.name])[2]["seconds"]
        corpus = Corpus.load(configs[row.name].corpus)
        windows = (len(corpus.train) - 9) // 8 + 1
        assert row.chars_per_second == pytest.approx(3 * 8 * windows / row.seconds)


def test_rate_weights_evaluations_by_their_time(compared):
    """2,000 characters in 20 s, none in 10 s, and 9,000 in 30 s; rows between evaluations do not count."""
    _, _, runs, _ = compared
    runs["gru"].metrics.write_text(
        '{"step": 100, "train_loss": 2.0, "chars_per_second": 999.0, "seconds": 10.0}\n'
        '{"step": 150, "val_loss": 2.0, "chars_per_second": 100.0, "seconds": 20.0}\n'
        '{"step": 160, "val_loss": 2.0, "seconds": 30.0}\n'
        '{"step": 300, "train_loss": 9.0, "chars_per_second": 999.0, "seconds": 40.0}\n'
        '{"step": 160, "event": "rollback", "from_step": 310}\n'
        '{"step": 200, "train_loss": 1.9, "val_loss": 1.9, "chars_per_second": 300.0, "seconds": 60.0}\n'
        '{"step": 200, "test_loss": 2.0}\n'
    )
    row = _comparison("gru", runs["gru"])
    assert (row.seconds, row.chars_per_second) == (60.0, 11_000 / 60)


def test_train_perplexity_is_absent_if_all_steps_were_skipped(folder, monkeypatch):
    predict = CharLM.predict

    def diverge(model, x, y, state):
        logits, y, state = predict(model, x, y, state)
        return logits * math.nan, y, state

    monkeypatch.setattr(CharLM, "predict", diverge)
    rows = compare({"a": configure("train.max_steps=1")}, {"a": Run(folder / "run")}, Silent())
    assert rows[0].train_perplexity is None
    assert json.loads(table(rows, "json"))[0]["train_perplexity"] is None
    assert next(csv.DictReader(table(rows, "csv").split("\n")))["train_perplexity"] == ""
    assert table(rows).splitlines()[2].split("|")[2].strip() == "-"


@pytest.mark.parametrize(
    "override",
    ["corpus.lowercase=true", "corpus.max_chars=900", "train.seed=2", "train.epochs=4", "train.max_steps=9"],
)
def test_configurations_that_differ_in_data_seed_or_budget_are_refused(folder, override):
    key = override.partition("=")[0]
    configs = {"a": configure(), "b": configure(override, "train.lr=0.5")}
    runs = {name: Run(folder / name) for name in configs}
    with pytest.raises(ConfigError, match=rf"{key} \(a: .*, b: ") as caught:
        compare(configs, runs, Silent())
    assert "train.lr" not in str(caught.value)
    assert not runs["a"].folder.exists()


def test_error_names_all_differences(folder):
    configs = {"a": configure(), "b": configure("corpus.keep=a-z", "train.seed=2")}
    with pytest.raises(ConfigError, match=r"corpus.keep \(a: None, b: 'a-z'\) and train.seed \(a: 1, b: 2\)"):
        compare(configs, {name: Run(folder / name) for name in configs}, Silent())


def test_fill_in_models_are_refused(folder):
    configs = {"a": configure(), "b": configure("model.direction=both")}
    with pytest.raises(ConfigError, match="b .*model.direction: both"):
        compare(configs, {name: Run(folder / name) for name in configs}, Silent())


def test_no_configurations_are_refused():
    with pytest.raises(ConfigError, match="at least one"):
        compare({}, {}, Silent())


def test_no_run_starts_if_a_later_one_cannot_be_trained(folder):
    configs = {"a": configure(), "b": configure("batches.seq_len=5000")}
    runs = {name: Run(folder / name) for name in configs}
    with pytest.raises(CharlmError, match="seq_len|window"):
        compare(configs, runs, Silent())
    assert not runs["a"].folder.exists()


ROWS = [
    Comparison("rnn", 5.7749, 6.126, 2.61493, 4321, 61.26, 41234.5, 3.0),
    Comparison("lstm, 2 layers", 12.5, 13.25, 3.72792, 1234567, 1061.0, 9876.0, 2.5),
]


def test_markdown_is_rounded_and_aligned():
    assert table(ROWS) == (
        "|                | train ppl | val ppl | bits/char | parameters | seconds | chars/s | best epoch |\n"
        "| -------------- | --------: | ------: | --------: | ---------: | ------: | ------: | ---------: |\n"
        "| rnn            |      5.77 |    6.13 |     2.615 |      4,321 |    61.3 |  41,234 |          3 |\n"
        "| lstm, 2 layers |     12.50 |   13.25 |     3.728 |  1,234,567 | 1,061.0 |   9,876 |        2.5 |"
    )


def test_infinity_is_null_in_json():
    (row,) = json.loads(table([replace(ROWS[0], val_perplexity=math.inf)], "json"))
    assert row == {**asdict(ROWS[0]), "val_perplexity": None}


def test_csv_and_json_have_all_digits():
    as_csv = list(csv.DictReader(table(ROWS, "csv").split("\n")))
    as_json = json.loads(table(ROWS, "json"))
    assert [Comparison(**row) for row in as_json] == ROWS
    assert [{key: str(value) for key, value in row.items()} for row in as_json] == as_csv


def test_unknown_format_is_refused():
    with pytest.raises(ConfigError, match="'html'.*markdown, csv, json"):
        table(ROWS, "html")
