"""Rare characters as one class (`corpus.min_count`) and fixed vocabularies (`corpus.vocabulary`)."""

import json
import math
from pathlib import Path

import pytest
import torch

import charlm as library
from charlm.inference.evaluate import evaluate
from charlm.storage.header import read_header
from charlm.storage.model_file import load_model
from conftest import settings

RARE = "ΩΨΞ"  # each occurs twice in train


@pytest.fixture
def rare(charlm, words):
    """Train a run named `rare` with three rare characters; two of them, and another, are in val too."""
    lines = words.replace("h ", "h\n")
    Path("rare.txt").write_text(f"{RARE}{RARE}{lines[:1850]}ΩΨΔ{lines[1850:]}", encoding="utf-8")
    options = settings("corpus.min_count=3", "train.max_steps=3", "train.sample_chars=300")
    done = charlm("train", "rare.txt", "--name", "rare", *options)
    assert done.code == 0, done.err
    assert "one of them for 3 rare characters" in done.err and "removed from val" not in done.err
    return Path("runs/rare")


def test_figures_of_val_and_of_eval_count_the_class_and_a_uniform_choice(charlm, rare, words):
    loaded = load_model(rare / "last.safetensors")
    assert loaded.vocab.unknown == (len(loaded.vocab) - 1, 3)
    text = Path("rare.txt").read_text(encoding="utf-8")
    ids = loaded.vocab.encode(text).long()
    unknown = (ids[1:] == loaded.vocab.unknown.id).sum().item()
    assert unknown == 8  # of a character that is not in train, too
    classes = load_model(rare / "last.safetensors").model
    classes.unknown = None
    nats = evaluate(classes, ids).nats + unknown * math.log(3)
    done = charlm("eval", "--model", rare / "last.safetensors", "--json", "rare.txt")
    total = json.loads(done.out)["total"]
    assert total["nats"] == pytest.approx(nats, rel=1e-6)
    assert (total["characters"], total["unknown"]) == (len(text) - 1, 9)
    assert total["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text[1:].encode()))
    rows = [json.loads(line) for line in (rare / "metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if "val_loss" in row]
    val = ids[round(len(ids) * 0.9) : round(len(ids) * 0.95)]
    assert row["val_loss"] == pytest.approx(evaluate(loaded.model, val).loss, rel=1e-6)
    assert "\ufffd" not in row["sample"]


def test_texts_with_rare_characters_are_shown_as_they_are(charlm, rare):
    done = charlm("generate", "--prefix", "abΩΔ", "--length", "200", "-t", "50")
    assert done.code == 0 and done.out.startswith("abΩΔ") and "\ufffd" not in done.out
    skipped = charlm("generate", "--prefix", "abΩΔ", "--length", "5", "--unknown", "skip")
    assert skipped.code == 0 and skipped.out.startswith("ab") and "Ω" not in skipped.out
    Path("text.txt").write_text("abΩ\ufffdc\n")
    done = charlm("score", "text.txt", "--unit", "line", "--json")
    assert json.loads(done.out)["text"] == "abΩ\ufffdc\n" and "2 characters" in done.err
    model = library.load(rare)
    assert [char for char, _ in model.score("abΩ")] == ["b", "Ω"]
    refused = charlm("generate", "--stop", "\ufffd")
    assert refused.code == 2 and "never be written" in refused.err
    for command in (["report", "rare"], ["info", "rare"], ["generate", "--novelty", "--prefix", "Ω"]):
        assert charlm(*command).code == 0


def test_a_resumed_training_with_an_unknown_ends_as_an_undisturbed_one(charlm, rare):
    more = settings("corpus.min_count=3", "train.sample_chars=300", "train.schedule=constant")
    for name, steps in (("whole", 4), ("stopped", 2)):
        start = ("train", "rare.txt", "--name", name, *more, "--set", f"max_steps={steps}")
        assert charlm(*start).code == 0
    assert charlm("train", "--resume", "stopped", "--set", "max_steps=4").code == 0
    whole, stopped = (load_model(Path(f"runs/{name}/last.safetensors")) for name in ("whole", "stopped"))
    pairs = zip(whole.model.parameters(), stopped.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert whole.vocab.unknown == stopped.vocab.unknown


def test_training_goes_on_from_a_model_with_an_unknown(charlm, rare, words):
    Path("new.txt").write_text(words.replace("a", "ß") + "Ψ")
    done = charlm("train", "new.txt", "--from", "rare", "--name", "n", "--set", "max_steps=1")
    assert done.code == 0, done.err
    before, after = (read_header(Path("runs") / name / "last.safetensors") for name in ("rare", "n"))
    assert after.vocab == before.vocab + "ß" and after.unknown_kinds == before.unknown_kinds
    assert charlm("train", "--resume", "n", "--set", "max_steps=2").code == 0
    assert charlm("generate", "--model", "n", "--length", "9", "--novelty").code == 0


@pytest.mark.parametrize("vocabulary", ["letters.txt", "rare"])
def test_a_fixed_vocabulary_is_kept_whatever_becomes_of_its_file(charlm, rare, words, vocabulary):
    Path("letters.txt").write_text("zyx" + "".join(sorted(set(words))), encoding="utf-8")
    expected = "zyx" + "".join(sorted(set(words))) + "\ufffd"
    if vocabulary == "rare":
        expected = read_header(rare / "last.safetensors").vocab
    Path("new.txt").write_text(f"ß{words}")
    fixed = settings(f"corpus.vocabulary={vocabulary}", "corpus.min_count=2", "train.max_steps=2")
    done = charlm("train", "new.txt", "--name", "n", *fixed)
    assert done.code == 0, done.err
    header = read_header(Path("runs/n/last.safetensors"))
    assert header.vocab == expected
    assert header.unknown_kinds == (3 if vocabulary == "rare" else 1)
    Path("letters.txt").unlink()
    rare.rename("elsewhere")
    resumed = charlm("train", "--resume", "n", "--set", "train.max_steps=3")
    assert resumed.code == 0, resumed.err
    assert read_header(Path("runs/n/last.safetensors")).vocab == expected
    for command in (["report", "n"], ["generate", "--model", "n", "--length", "9", "--novelty"]):
        assert charlm(*command).code == 0
    gone = charlm("train", "new.txt", *fixed)
    assert gone.code == 2 and vocabulary in gone.err and gone.err.count("\n") == 1


def test_characters_that_a_fixed_vocabulary_lacks_are_named(charlm, words):
    Path("letters.txt").write_text("".join(sorted(set(words) - set("ab"))), encoding="utf-8")
    for command in ("train", "gradflow"):
        fixed = settings("corpus.source=corpus.txt", "corpus.vocabulary=letters.txt")
        done = charlm(command, *fixed)
        assert done.code == 1 and done.err.count("\n") == 1
        assert all(part in done.err for part in ("2 characters", "U+0061", "U+0062", "min_count"))
    assert not Path("runs").exists()
