import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from charlm.config import Config, CorpusConfig, from_data, override
from charlm.errors import ConfigError
from charlm.study import budget
from charlm.study.budget import Size, choose, machine_speeds, text_size
from charlm.text.corpus import Corpus
from charlm.training.learner import Learner

SPEEDS = {64: 5e9, 128: 2e10, 256: 6e10, 512: 1e11, 1024: 1.2e11}


@given(
    characters=st.integers(40, 10**10),
    classes=st.integers(1, 10**4),
    seconds=st.floats(10, 10**6),
    speed=st.floats(1e8, 1e13),
)
def test_choice_is_a_configuration_whose_steps_fit_the_time(characters, classes, seconds, speed):
    speeds = dict.fromkeys(SPEEDS, speed)
    try:
        values = choose(Size(characters, classes), seconds, speeds).values
    except ConfigError:
        assert 0.1 * seconds + 6 > seconds
        return
    config = from_data(values, "")
    H, batches, split = config.model.hidden_size, config.batches, config.corpus.split
    read = config.train.max_steps * batches.batch_size * batches.seq_len
    rate = speed / (6 * (4 * H * H + classes * H))  # characters per second, or less for small models
    assert read <= max(rate * seconds, batches.batch_size * batches.seq_len)
    assert read <= 41 * characters
    characters = config.corpus.max_chars or characters
    assert batches.batch_size * batches.seq_len < split[0] * characters
    assert config.train.time_limit_seconds <= seconds


def test_more_time_gives_larger_models_and_more_dropout():
    chosen = [choose(Size(10**6, 65), 60 * minutes, SPEEDS).values for minutes in (1, 3, 10, 30)]
    for key in ("hidden_size", "dropout"):
        values = [each["model"][key] for each in chosen]
        assert values == sorted(values) and len(set(values)) > 1
    rates = [each["train"]["lr"] for each in chosen]
    assert rates == sorted(rates, reverse=True)


def test_tiny_text_gets_a_small_model_that_stops_early_and_an_enormous_one_less_than_an_epoch():
    tiny, large = (choose(Size(size, 65), 600, SPEEDS).values for size in (30_000, 4 * 10**9))
    assert tiny["model"]["hidden_size"] < 256 < large["model"]["hidden_size"]
    assert tiny["model"]["dropout"] > 0.4 and large["model"]["dropout"] == 0
    assert tiny["train"]["early_stopping"] and not large["train"]["early_stopping"]
    assert large["train"]["max_steps"] * 24 * 64 < 4 * 10**9
    assert large["corpus"]["split"][1] < 0.01
    assert large["corpus"]["max_chars"] == 3 * 10**9, "what can be read in a tenth of the time"


def test_too_short_a_time_is_refused_with_one_that_is_not():
    with pytest.raises(ConfigError, match="allowed here: 0.2 or more"):
        choose(Size(1000, 65), 2, SPEEDS)
    choose(Size(1000, 65), 12, SPEEDS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.direction", "both"),
        ("batches.stride", 8),
        ("batches.max_train_windows", 100),
        ("batches.sampling", "sliding"),
    ],
)
def test_what_needs_windows_gets_windows(key, value):
    config = override(Config(), [f"{key}={value}"])
    values = choose(Size(10**6, 65), 60, SPEEDS, config, {key}).values
    assert (config if "sampling" in key else from_data(values, "")).batches.sampling == "sliding"
    stride = values["batches"].get("stride", config.batches.stride)
    read = values["train"]["max_steps"] * values["batches"]["batch_size"] * stride
    streams = choose(Size(10**6, 65), 60, SPEEDS).values
    batches, steps = streams["batches"], streams["train"]["max_steps"]
    assert read == pytest.approx(steps * batches["batch_size"] * batches["seq_len"], rel=0.01)


def test_texts_of_val_and_test_are_not_trained_on(folder, words):
    Path("val.txt").write_text(9 * words)
    config = CorpusConfig(source="corpus.txt", val="val.txt", test="val.txt")
    size = text_size(config)
    assert size.characters == pytest.approx(len(words), abs=2)
    choice = choose(size, 60, SPEEDS, Config(corpus=config))
    assert f"epochs of {size.characters:,} characters" in choice.lines[0]


def test_long_records_are_read_few_at_a_time():
    chosen = [choose(Size(10**6, 65, length), 60, SPEEDS).values for length in (7.0, 500.0, 8000.0)]
    assert [values["batches"]["batch_size"] for values in chosen] == [64, 8, 1]


def test_other_optimizers_keep_their_learning_rate():
    config = override(Config(), ["optimizer=sgd"])
    assert "lr" not in choose(Size(10**6, 65), 60, SPEEDS, config, {"train.optimizer"}).values["train"]


@pytest.mark.parametrize("end", ["max_steps=50", "epochs=2"])
def test_given_end_is_that_of_the_header_and_of_the_other_choices(end):
    config = override(Config(), [end])
    choice = choose(Size(10**6, 65), 600, SPEEDS, config, {"train.max_steps", "train.epochs"})
    steps = int(re.search(r"([\d,]+) steps", choice.lines[0])[1].replace(",", ""))
    batches = choice.values["batches"]
    assert steps == (50 if "50" in end else round(2 * 900_000 / (batches["batch_size"] * batches["seq_len"])))
    assert choice.values["train"]["eval_every"] == max(steps // 20, 1)


def test_chosen_settings_train(folder, words):
    corpus = Corpus.from_text(words)
    values = choose(Size(len(words), len(corpus.vocab)), 20, SPEEDS).values
    learner = Learner(from_data({**values, "train": {**values["train"], "device": "cpu"}}, ""), corpus)
    x, y = next(learner.remaining_batches())
    assert math.isfinite(learner.step(x, y)[0])


@pytest.mark.parametrize("more", [[], ["records=line"], ["cell=gru", "num_layers=2"], ["hidden_size=8"]])
def test_steps_follow_from_the_measured_speed_of_the_chosen_model(folder, words, monkeypatch, more):
    monkeypatch.setattr(budget, "_MEASURED", 0.0)
    monkeypatch.setattr(budget, "machine_speeds", lambda *args: SPEEDS)
    Path("corpus.txt").write_text("\n".join(words.split()))
    config = override(Config(), ["source=corpus.txt", "device=cpu", *more])
    planned, lines = budget.plan(config, {"model.hidden_size"}, 600, threads=1)
    measured = float(re.search("at ([0-9,]+) characters", lines[0])[1].replace(",", ""))
    assert planned.train.max_steps and measured > 0
    assert planned.model.hidden_size == config.model.hidden_size
    monkeypatch.setattr(budget, "training_rate", lambda learner, seconds: 2.0)
    slow, _ = budget.plan(config, {"model.hidden_size"}, 600, threads=1)
    assert slow.train.max_steps < planned.train.max_steps


def test_speeds_are_measured_once_for_each_kind_of_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(budget, "cache_folder", lambda: tmp_path)
    measured = []
    monkeypatch.setattr(budget, "training_rate", lambda learner, seconds: measured.append(seconds) or 7.0)
    lines = []
    first = machine_speeds("cpu", lines.append)
    assert len(measured) == 2 * len(first) and len(lines) == 1 and all(first.values())
    measured.clear()
    assert machine_speeds("cpu") == first and not measured
    (file,) = tmp_path.iterdir()
    for damaged in ("", "[]", json.dumps(dict.fromkeys(first, -1))):
        file.write_text(damaged)
        assert machine_speeds("cpu") == first and measured
        measured.clear()
    monkeypatch.setattr(budget, "machine", lambda: "another processor, 2026-01-01")
    assert machine_speeds("cpu") == first and measured


@pytest.mark.parametrize("limit", [2**26, 0])
def test_size_of_a_text_is_counted_or_estimated(folder, words, monkeypatch, limit):
    monkeypatch.setattr(budget, "IN_MEMORY", limit)
    characters, classes, _ = text_size(CorpusConfig(source="corpus.txt"))
    assert characters == pytest.approx(len(words), abs=2) and classes == pytest.approx(len(set(words)), abs=2)
    Path("folder").mkdir()
    Path("folder/a.txt").touch()
    Path("folder/b.txt").write_text("ana\nbo\n" * 50)
    size = text_size(CorpusConfig(source="folder", records="line"))
    assert size == pytest.approx((350, 4, 3.5), abs=2), "an empty file comes first"


def test_records_are_read_whole(folder, words):
    Path("names.txt").write_text("ana\nbo\n" * 50)
    size = text_size(CorpusConfig(source="names.txt", records="line"))
    assert size.characters == 350 and size.record == pytest.approx(3.5, abs=0.2)
    values = choose(size, 20, SPEEDS).values
    config = from_data({**values, "corpus": {"records": "line"}}, "")
    assert config.train.max_steps * config.batches.batch_size * size.record == pytest.approx(
        40 * 315, rel=0.1
    )
