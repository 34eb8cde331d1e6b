import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from charlm.config import Config, ModelConfig, from_data, load, override, parse_yaml, to_yaml
from charlm.errors import ConfigError
from conftest import ROOT


def problem(*overrides, data=None):
    with pytest.raises(ConfigError) as caught:
        from_data(data or {}, "x.yaml", overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_no_recipe_is_the_defaults():
    assert load(None) == Config()


@pytest.mark.parametrize("text", ["2e-3", "2E-3", ".002", "0.002", "+2.e-3"])
def test_yaml_numbers_are_numbers(text):
    assert load(None, [f"train.lr={text}"]).train.lr == 0.002


@given(st.floats(min_value=1e-300, max_value=1e300))
def test_every_float_that_python_prints_is_read(number):
    assert parse_yaml(repr(number), "x") == number


def test_overrides_lie_on_the_recipe(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: {cell: gru, hidden_size: 7}\ntrain:\n")
    config = load(str(recipe), ["model.hidden_size=9", "corpus.source=[a.txt, b.txt]"])
    assert (config.model.cell, config.model.hidden_size) == ("gru", 9)
    assert config.corpus.source == ["a.txt", "b.txt"]


def test_yaml_round_trip():
    config = override(Config(), ["corpus.keep='A-Zñ'", "train.lr=3e-5", "corpus.split=[0.8, 0.2, 0]"])
    assert from_data(parse_yaml(to_yaml(config), "x"), "x") == config


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model.hiden_size=3", ["model.hiden_size", "did you mean hidden_size"]),
        ("model.lr=3", ["model.lr", "did you mean train.lr"]),
        ("modle.cell=rnn", ["modle", "did you mean model"]),
        ("model.hidden_size=0", ["model.hidden_size is 0", "greater than 0"]),
        ("model.hidden_size=big", ["model.hidden_size is 'big'", "integer"]),
        ("model.hidden_size=2.0", ["model.hidden_size is 2.0", "integer"]),
        ("model.cell=transformer", ["'transformer'", "'rnn', 'lstm' or 'gru'"]),
        ("model.cell=lstmm", ["'lstmm'", "did you mean lstm"]),
        ("corpus.lowercase=1", ["corpus.lowercase is 1", "boolean"]),
        ("corpus.source=5", ["corpus.source is 5"]),
        ("corpus.split=[0.9, 0.1]", ["[0.9, 0.1]", "three numbers"]),
        ("corpus.split=0.9", ["corpus.split is 0.9", "three numbers"]),
        ("train.betas=[0.9]", ["[0.9]", "two numbers"]),
        ("corpus.source=['']", ["source is empty"]),
        ("corpus.split=[0.5, 0.2, 0.2]", ["[0.5, 0.2, 0.2]", "adding up to 1"]),
        ("corpus.keep='z-a'", ["'z-a'", "character class"]),
        ("corpus.keep='a]b'", ["'a]b'", "character class", "must be written"]),
        ("model.weight_dropout=1.0", ["model.weight_dropout is 1.0", "less than 1"]),
        ("train.ema=1.0", ["train.ema is 1.0", "less than 1"]),
        ("train.ema=0", ["train.ema is 0", "greater than 0"]),
        ("train.lr=.nan", ["train.lr is nan"]),
        ("train.lr", ["section.key=value"]),
        ("train.lr={", ["not valid YAML"]),
        ("model.gru_reset=before", None),
    ],
)
def test_a_problem_names_key_value_and_what_is_allowed(text, parts):
    if parts is None:  # harmless without a GRU
        assert load(None, [text]).model.gru_reset == "before"
        return
    message = problem(text)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_all_problems_at_once():
    message = problem(data={"model": {"hidden_size": -1, "cell": 3}, "train": {"lr": "fast"}})
    assert "3 problems" in message
    assert all(key in message for key in ("model.hidden_size", "model.cell", "train.lr"))
    message = problem("train.foo=1", "model.hidden_size=x")
    assert "2 problems" in message and "train.foo" in message and "model.hidden_size" in message


def test_yaml_merge_keys(tmp_path):
    recipe = tmp_path / "merged.yaml"
    recipe.write_text(
        ["model: &base {cell: rnn, hidden_size: 5}", "model: {<<: *base, hidden_size: 6}", ""][0]
    )
    assert load(str(recipe)).model.hidden_size == 5
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}", "x")["b"] == {"x": 1, "y": 3}


LAUGHS = "a: &a {x: ha}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join(['*' + before] * 9)}]}}\n"
    for before, name in itertools.pairwise("abcdefghijkl")
)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (LAUGHS, "with its aliases written out"),
        (LAUGHS.replace("{<<: ", "").replace("]}", "]"), "with its aliases written out"),
        ("a: &a [*a]", "with its aliases written out"),
        ("#" * 2**20 + "\n", "1,048,577 characters or more"),
        ("[" * 10**5, "not valid YAML"),
        ("a: " + "9" * 10**5, "not valid YAML"),
        ("? [a]\n: 1", "is no key"),
        ("".join(f"k{i}: 1\n" for i in range(4000)), "20 problems"),
        (f"model: {'x' * 10**5}", "model is 'x{199}…; it must"),
        ("corpus: {keep: 'a]|(x+x+)+y['}", "keep"),
    ],
    ids=["laughs", "laughs in lists", "endless", "long", "deep", "number", "key", "keys", "value", "keep"],
)
def test_hostile_recipes_are_refused_at_once(tmp_path, text, part):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=part) as caught:
        load(str(tmp_path / "a.yaml"))
    assert len(str(caught.value)) < 4000


def test_sizes_that_no_arithmetic_holds_are_refused():
    message = problem("model.hidden_size=10000000000", "model.num_layers=1001", "batches.stride=1e13")
    assert message.count("must be less than or equal to") == 2 and "3 problems" in message


def test_a_key_twice_is_refused(tmp_path):
    recipe = tmp_path / "twice.yaml"
    recipe.write_text("model:\n  cell: rnn\n  cell: gru\n")
    with pytest.raises(ConfigError, match="line 2.*'cell' stands twice"):
        load(str(recipe))


@pytest.mark.parametrize(
    ("model", "part"),
    [
        ({"cell": "gru", "gru_reset": "before", "implementation": "fused"}, "needs implementation: scratch"),
        ({"tie_weights": True, "embedding_size": 3}, "embedding_size equal to hidden_size"),
        ({"direction": "both", "tie_weights": True, "embedding_size": 256}, "tie_weights does not go with"),
    ],
)
def test_combinations_that_do_not_exist(model, part):
    assert part in problem(data={"model": model})


def test_a_model_that_fills_in_takes_windows_and_every_loss():
    message = problem("model.direction=both", "batches.sampling=contiguous", "train.loss_on=last")
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
    with pytest.raises(ConfigError, match=r"no recipe 'lstn.yaml'.*did you mean lstm.yaml"):
        load("lstn.yaml")


RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(path):
    assert isinstance(load(str(path)), Config)


def test_the_defaults_are_the_lstm_recipe_but_for_the_first_weights():
    assert load("lstm.yaml") == Config(model=ModelConfig(init="orthogonal"))


def test_the_six_recipes_differ_in_what_they_say_only():
    for cell in ("rnn", "lstm", "gru"):
        fastest, scratch = load(f"{cell}.yaml"), load(f"{cell}-scratch.yaml")
        assert (fastest.model.cell, fastest.model.implementation) == (cell, "auto")
        assert override(fastest, ["model.implementation=scratch"]) == scratch
    assert len({load(f"{cell}.yaml").train.epochs for cell in ("rnn", "lstm", "gru")}) == 1, "they compare"


def test_saves_come_after_steps_or_after_a_time():
    for text, steps, seconds in (
        ("500", 500, None),
        ("30s", None, 30),
        ("1.5min", None, 90),
        ("2h", None, 7200),
    ):
        train = from_data({}, "", [f"train.checkpoint_every={text}"]).train
        assert (train.checkpoint_steps, train.checkpoint_seconds) == (steps, seconds)
    with pytest.raises(
        ConfigError, match="'10 days'; it must be steps, as 500, or a time, as 30s, 10min or 2h"
    ):
        from_data({}, "", ["train.checkpoint_every=10 days"])
