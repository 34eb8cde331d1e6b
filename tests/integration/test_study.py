"""The commands of study, and the models that read backward or in both directions."""

import csv
import io
import json
import sys
from pathlib import Path

import pytest

from conftest import settings, vocabulary

CORPUS = "corpus.source=corpus.txt"


def train(charlm, name, *overrides):
    done = charlm("train", "--name", name, *settings(CORPUS, *overrides))
    assert done.code == 0, done.err
    return done


@pytest.fixture
def filling(charlm):
    return train(charlm, "both", "model.direction=both", "train.max_steps=9")


def test_fill_sorts_by_probability(charlm, filling):
    done = charlm("fill", "ab_ cd", "--best", "3")
    rows = [line.split("  ", 1) for line in done.out.splitlines()]
    assert done.code == 0 and len(rows) == 3
    probabilities = [float(probability) for probability, _ in rows]
    assert probabilities == sorted(probabilities, reverse=True) and probabilities[0] <= 1
    assert all(text.startswith("ab") and text.endswith(" cd") and len(text) == 6 for _, text in rows)
    found = json.loads(charlm("fill", "a? ?d", "--blank", "?", "--json", "--best", "2").out)
    assert [len(row["characters"]) for row in found] == [2, 2]
    assert found[0]["text"] == f"a{found[0]['characters'][0]} {found[0]['characters'][1]}d"


def test_fill_in_model_reports_a_pseudo_perplexity(charlm, filling):
    assert "pseudo-perplexity" in filling.err and " perplexity" not in filling.err
    found = json.loads(charlm("eval", "corpus.txt", "--json").out)["total"]
    assert "pseudo_perplexity" in found and "perplexity" not in found
    assert "pseudo_perplexity" in charlm("eval", "corpus.txt").out


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["generate"], 1, "charlm fill"),
        (["fill", "abc"], 1, "no blank"),
        (["fill", "aΩ_"], 1, "U+03A9"),
        (["fill", "a_", "--blank", "ab"], 2, "one character"),
    ],
)
def test_fill_refuses_invalid_arguments(charlm, filling, arguments, code, part):
    done = charlm(*arguments)
    assert (done.code, done.out, done.err.count("\n")) == (code, "", 1) and part in done.err


def test_fill_refuses_a_forward_model(charlm, trained):
    done = charlm("fill", "a_c")
    assert done.code == 1 and "model.direction: both" in done.err


def test_backward_model_generates_what_precedes_the_prefix(charlm, words):
    train(charlm, "back", "model.direction=backward", "train.max_steps=3")
    done = charlm("generate", "--prefix", "abc", "-n", "10", "--seed", "1")
    assert done.out.endswith("abc\n") and len(done.out) == 14
    one_more = charlm("generate", "--prefix", "abc", "-n", "11", "--seed", "1")
    assert one_more.out[1:] == done.out, "generated from right to left"
    stopped = charlm("generate", "--prefix", "abc", "-n", "500", "--seed", "1", "--stop", done.out[3:5]).out
    assert stopped.startswith(done.out[3:5])
    found = json.loads(charlm("eval", "corpus.txt", "--json").out)["total"]
    assert found["characters"] == len(words) - 1
    assert found["bits_per_byte"] < found["bits_per_character"]


def test_gradcheck_exit_code_depends_on_the_tolerance(charlm, monkeypatch):
    arguments = ["gradcheck", *settings("model.num_layers=2", "model.cell=gru")]
    done = charlm(*arguments)
    names = [line.split()[0] for line in done.out.splitlines()[1:]]
    assert done.code == 0 and names == [
        "embedding.weight",
        *(
            f"recurrent.{kind}_l{k}"
            for k in (0, 1)
            for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        ),
        "head.weight",
        "head.bias",
    ]
    assert all(float(line.split()[3]) < 1e-6 for line in done.out.splitlines()[1:])
    failed = charlm(*arguments, "--tolerance", "0")
    assert failed.code == 1 and "recurrent.weight_hh_l0" in failed.err and failed.err.count("\n") == 1
    assert failed.out == done.out


def test_gradflow_prints_a_row_for_each_state(charlm):
    done = charlm("gradflow", *settings(CORPUS), "--steps", "20", "--train-steps", "3")
    head, *rows = done.out.splitlines()
    assert done.code == 0 and head.split()[2:] == ["0", "1", "2", "5", "10", "20"]
    assert [row[:20].strip() for row in rows] == [
        "rnn, h", "rnn, W_hh × 4, h", "rnn, trained, h", "lstm, h", "lstm, c", "lstm, trained, h",
        "lstm, trained, c", "gru, h", "gru, trained, h",
    ]  # fmt: skip
    assert all(len(row[20:].split()) == 6 for row in rows)
    assert charlm("gradflow", *settings(CORPUS), "--steps", "98", "--train-steps", "0").code == 0
    too_long = charlm("gradflow", *settings(CORPUS), "--steps", "99")
    assert too_long.code == 2 and "--steps 99 needs 101 characters, and the val split has 100" in too_long.err


def test_gradflow_checks_the_picture_before_training(charlm, monkeypatch):
    command = ["gradflow", *settings("corpus.source=nowhere.txt"), "--plot"]
    for name in ("a.docx", "noending"):
        refused = charlm(*command, name)
        assert refused.code == 2 and name in refused.err and ".png" in refused.err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install 'charlm-torch[plot]'" in charlm(*command, "a.png").err


def test_compare_trains_each_recipe_and_prints_a_table(charlm):
    for cell in ("rnn", "gru"):
        Path(f"{cell}.yaml").write_text(f"model: {{cell: {cell}}}")
    arguments = ["compare", "-c", "rnn.yaml", "-c", "gru.yaml", *settings(CORPUS, "train.max_steps=3")]
    done = charlm(*arguments, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(done.out)))
    assert done.code == 0 and [row["name"] for row in rows] == ["rnn", "gru"]
    assert int(rows[1]["parameters"]) > int(rows[0]["parameters"])
    assert len(list(Path("runs").glob("*/model.safetensors"))) == 2
    for arguments in (["compare"], ["compare", "-c", "rnn.yaml"], ["compare", "-c", "rnn", "-c", "rnn"]):
        refused = charlm(*arguments)
        assert refused.code == 2 and refused.err.count("\n") == 1


def test_vocabulary_does_not_depend_on_the_direction(charlm, trained, words):
    train(charlm, "back", "model.direction=backward", "train.max_steps=1")
    found = [json.loads(charlm("info", name, "--json").out)["vocab"] for name in ("tiny", "back")]
    assert found[0] == found[1] == vocabulary(words[:1800]).characters


def test_bench_prints_a_table_or_json(charlm):
    tiny = ["--cell", "rnn", "--hidden-size", "4", "--batch-size", "2", "--seq-len", "3", "--seconds", "0.01"]
    both = [charlm("bench", *tiny, "--device", "cpu", *more) for more in ([], ["--json"])]
    assert [done.code for done in both] == [0, 0]
    table, found = (done.out for done in both)
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| rnn")]
    assert [row[1].strip() for row in rows] == [row["implementation"] for row in json.loads(found)["rows"]]
    assert "torch" in table and json.loads(found)["products"].keys() == {"float32", "bfloat16"}
    for more in ([], ["--profile"]):
        endless = charlm("bench", *tiny[:-2], "--seconds", "nan", *more)
        assert "nan" in endless.err and endless.code == 2
    refused = charlm("bench", *tiny, "--device", "tpu")
    assert "tpu" in refused.err and refused.code == 2
