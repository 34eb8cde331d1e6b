import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from charlm.config import KEYS, Config, ModelConfig, from_data, load, override, parse_yaml, reference, to_yaml
from charlm.errors import ConfigError
from conftest import ROOT


def error(*overrides, data=None):
    with pytest.raises(ConfigError) as caught:
        from_data(data or {}, "x.yaml", overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_without_a_recipe_the_defaults_are_loaded():
    assert load(None) == Config()


@pytest.mark.parametrize("text", ["2e-3", "2E-3", ".002", "0.002", "+2.e-3"])
def test_numbers_with_an_exponent_are_numbers(text):
    assert load(None, [f"train.lr={text}"]).train.lr == 0.002


@given(st.floats(min_value=1e-300, max_value=1e300))
def test_every_float_that_python_prints_is_read(number):
    assert parse_yaml(repr(number), "x") == number


def test_overrides_replace_values_of_the_recipe(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: {cell: gru, hidden_size: 7}\ntrain:\n")
    config = load(str(recipe), ["model.hidden_size=9", "corpus.source=[a.txt, b.txt]"])
    assert (config.model.cell, config.model.hidden_size) == ("gru", 9)
    assert config.corpus.source == ["a.txt", "b.txt"]


def test_a_configuration_survives_yaml():
    config = override(Config(), ["corpus.keep='A-Zñ'", "train.lr=3e-5", "corpus.split=[0.8, 0.2, 0]"])
    assert from_data(parse_yaml(to_yaml(config), "x"), "x") == config


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model.hiden_size=3", ["model.hiden_size", "hidden_size"]),
        ("hiden_size=3", ["hiden_size", "hidden_size"]),
        ("model.lr=3", ["model.lr", "train.lr"]),
        ("modle.cell=rnn", ["modle", "model"]),
        ("train=3", ["train", "train"]),
        ("model.hidden_size=0", ["model.hidden_size is 0", ">= 1"]),
        ("model.hidden_size=big", ["model.hidden_size is 'big'", "integer"]),
        ("model.hidden_size=2.0", ["model.hidden_size is 2.0", "integer"]),
        ("model.cell=transformer", ["'transformer'", "rnn, lstm, gru"]),
        ("model.cell=lstmm", ["'lstmm'", "lstm?"]),
        ("corpus.lowercase=1", ["corpus.lowercase is 1", "true"]),
        ("corpus.source=5", ["corpus.source is 5"]),
        ("corpus.split=[0.9, 0.1]", ["[0.9, 0.1]", "three numbers"]),
        ("corpus.split=0.9", ["corpus.split is 0.9", "three numbers"]),
        ("train.betas=[0.9]", ["[0.9]", "two numbers"]),
        ("corpus.source=['']", ["corpus.source"]),
        ("corpus.split=[0.5, 0.2, 0.2]", ["[0.5, 0.2, 0.2]"]),
        ("corpus.keep='z-a'", ["corpus.keep", "'z-a'"]),
        ("corpus.keep='a]b'", ["corpus.keep", "'a]b'", "\\]"]),
        ("model.weight_dropout=1.0", ["model.weight_dropout is 1.0", "< 1"]),
        ("train.ema=1.0", ["train.ema is 1.0", "< 1"]),
        ("train.ema=0", ["train.ema is 0", "> 0"]),
        ("train.lr=.nan", ["train.lr is nan"]),
        ("train.lr", ["'train.lr'", "KEY=VALUE"]),
        ("train.lr={", ["train.lr={", "YAML"]),
        ("train.checkpoint_every=10 days", ["'10 days'", "10min"]),
        ("corpus.records=''", ["corpus.records is ''", "line"]),
    ],
)
def test_an_error_names_key_value_and_what_is_allowed(text, parts):
    message = error(text)
    assert "\n" not in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("model.direction=backward", "model.direction: forward"),
        ("model.direction=both", "model.direction: forward"),
        ("batches.sampling=contiguous", "batches.sampling: sliding"),
        ("batches.shuffle=false", "batches.shuffle: true"),
        ("batches.max_train_windows=5", "batches.max_train_windows: null"),
        ("batches.max_val_windows=5", "batches.max_val_windows: null"),
        ("train.loss_on=last", "train.loss_on: all"),
        ("train.teacher_forcing=0.5", "train.teacher_forcing: 1.0"),
    ],
)
def test_records_refuse_settings_of_a_continuous_text(text, needed):
    message = error("corpus.records=line", text)
    assert "\n" not in message and f"corpus.records needs {needed}" in message
    load(None, ["corpus.records=line"])


def test_a_bare_key_stands_for_the_section_that_has_it(monkeypatch):
    config = load(None, ["epochs=2", "hidden_size=64", "cell=gru", "train.lr=1.0"])
    assert (config.train.epochs, config.model.hidden_size, config.model.cell) == (2, 64, "gru")
    monkeypatch.setattr("charlm.config.KEYS", [*KEYS, "corpus.stride"])
    with pytest.raises(ConfigError, match=r"'stride'.*corpus\.stride|batches\.stride") as caught:
        load(None, ["stride=2"])
    assert "corpus.stride" in str(caught.value) and "batches.stride" in str(caught.value)


def test_every_key_has_a_meaning_in_one_line_and_its_allowed_values():
    for row in reference():
        assert "\n" not in row.description, row.key
        assert row.description and row.allowed, row.key
    rows = {row.key: row for row in reference()}
    assert rows["corpus.source"].allowed == "text or list of text"
    assert rows["train.ema"].allowed == "number > 0 and < 1 or null"
    assert rows["train.optimizer"].allowed == "sgd, adam, adamw, rmsprop, adadelta"


def test_the_table_is_selected_by_sections_and_keys():
    assert [row.key for row in reference(["train"])] == [key for key in KEYS if key.startswith("train.")]
    assert [row.key for row in reference(["lr", "model.cell", "lr"])] == ["train.lr", "model.cell"]
    with pytest.raises(ConfigError, match="hidden_size"):
        reference(["hidden_sise"])


def test_all_errors_are_reported_at_once():
    message = error(data={"model": {"hidden_size": -1, "cell": 3}, "train": {"lr": "fast"}})
    assert "3 errors" in message
    assert all(key in message for key in ("model.hidden_size", "model.cell", "train.lr"))
    message = error("train.foo=1", "model.hidden_size=x")
    assert "2 errors" in message and "train.foo" in message and "model.hidden_size" in message


def test_yaml_merge_keys():
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}", "x")["b"] == {"x": 1, "y": 3}


LAUGHS = "a: &a {x: ha}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join(['*' + before] * 9)}]}}\n"
    for before, name in itertools.pairwise("abcdefghijkl")
)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (LAUGHS, "1,048,576"),
        (LAUGHS.replace("{<<: ", "").replace("]}", "]"), "1,048,576"),
        ("a: &a [*a]", "1,048,576"),
        ("#" * 2**20 + "\n", "1,048,577"),
        ("[" * 10**5, "YAML"),
        ("a: " + "9" * 10**5, "YAML"),
        ("? [a]\n: 1", r"\['a'\]"),
        ("".join(f"k{i}: 1\n" for i in range(4000)), "20 errors"),
        (f"model: {'x' * 10**5}", "model is 'x{199}…;"),
        ("corpus: {keep: 'a]|(x+x+)+y['}", "keep"),
    ],
    ids=["laughs", "laughs in lists", "endless", "long", "deep", "number", "key", "keys", "value", "keep"],
)
def test_hostile_recipes_are_refused_at_once(tmp_path, text, part):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=part) as caught:
        load(str(tmp_path / "a.yaml"))
    assert len(str(caught.value)) < 4000


def test_sizes_beyond_64_bits_are_refused():
    message = error("model.hidden_size=10000000000", "model.num_layers=1001", "batches.stride=1e13")
    assert "10000000000;" in message and "1001;" in message and "3 errors" in message


def test_a_key_twice_is_refused(tmp_path):
    recipe = tmp_path / "twice.yaml"
    recipe.write_text("model:\n  cell: rnn\n  cell: gru\n")
    with pytest.raises(ConfigError, match="line 2.*'cell'"):
        load(str(recipe))


@pytest.mark.parametrize(
    ("model", "part"),
    [
        ({"cell": "gru", "gru_reset": "before", "implementation": "fused"}, "implementation: scratch"),
        ({"tie_weights": True, "embedding_size": 3}, "embedding_size equal to hidden_size"),
        ({"direction": "both", "tie_weights": True, "embedding_size": 256}, "tie_weights"),
    ],
)
def test_impossible_combinations_are_refused(model, part):
    assert part in error(data={"model": model})


def test_alphabets_do_not_go_with_bytes_nor_with_the_characters_of_another_model():
    for text in ("corpus.min_count=2", "corpus.vocabulary=a.txt"):
        assert "encoding: bytes needs" in error("corpus.encoding=bytes", text)
    assert "corpus.vocabulary" in error("train.init_from=a", "corpus.vocabulary=a.txt")
    assert "corpus.min_count is 0" in error("corpus.min_count=0")


def test_direction_both_needs_windows_and_every_loss():
    message = error("model.direction=both", "batches.sampling=contiguous", "train.loss_on=last")
    assert "batches.sampling: sliding" in message and "train.loss_on: all" in message
    assert message.startswith("x.yaml: model.direction")


def test_recipes_are_found_as_path_then_in_configs_then_shipped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load("lstm").model.cell == "lstm"  # shipped, the ending left out
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/lstm.yaml").write_text("model: {hidden_size: 11}")
    assert load("lstm.yaml").model.hidden_size == 11
    (tmp_path / "lstm.yaml").write_text("model: {hidden_size: 12}")
    assert load("lstm.yaml").model.hidden_size == 12
    with pytest.raises(ConfigError, match=r"'lstn.yaml'.*lstm.yaml"):
        load("lstn.yaml")


RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(path):
    assert isinstance(load(str(path)), Config)


def test_the_lstm_recipe_is_the_defaults_with_other_initial_weights():
    assert load("lstm.yaml") == Config(model=ModelConfig(init="orthogonal"))


def test_the_six_recipes_differ_in_cell_and_implementation():
    for cell in ("rnn", "lstm", "gru"):
        fastest, scratch = load(f"{cell}.yaml"), load(f"{cell}-scratch.yaml")
        assert (fastest.model.cell, fastest.model.implementation) == (cell, "auto")
        assert override(fastest, ["model.implementation=scratch"]) == scratch
    assert len({load(f"{cell}.yaml").train.epochs for cell in ("rnn", "lstm", "gru")}) == 1, "they compare"


@pytest.mark.parametrize(
    ("text", "steps", "seconds"),
    [("500", 500, None), ("30s", None, 30), ("1.5min", None, 90), ("2h", None, 7200)],
)
def test_saves_come_after_steps_or_after_a_time(text, steps, seconds):
    train = from_data({}, "", [f"train.checkpoint_every={text}"]).train
    assert (train.checkpoint_steps, train.checkpoint_seconds) == (steps, seconds)
