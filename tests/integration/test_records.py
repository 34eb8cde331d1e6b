"""A text of records from the training to the written records."""

import json
import math
from pathlib import Path

import pytest
import torch

from charlm import load
from charlm.errors import CharlmError
from charlm.inference.evaluate import evaluate, record_surprisals
from charlm.metrics import Score
from charlm.storage.model_file import load_model
from charlm.study.report.page import study
from charlm.text.corpus import Corpus
from conftest import settings

NAMES = [f"{first}{second}{third}" for first in "abcde" for second in "aeiou" for third in ("", "n", "la")]
RECORDS = ["corpus.records=line", "batches.batch_size=8", "train.sample_chars=20", "train.schedule=constant"]


@pytest.fixture
def names(charlm):
    """Train a run named `names` on lines, for some steps."""
    Path("names.txt").write_text("\n".join(NAMES))
    done = charlm("train", "names.txt", "--name", "names", *settings(*RECORDS, "train.max_steps=12"))
    assert done.code == 0, done.err
    return done


def test_a_resumed_training_on_records_ends_as_an_undisturbed_one(charlm, names):
    stopped = settings(*RECORDS, "train.max_steps=5")
    assert charlm("train", "names.txt", "--name", "stopped", *stopped).code == 0
    assert charlm("train", "--resume", "stopped", "--set", "max_steps=12").code == 0
    for file in ("last.safetensors", "model.safetensors"):
        assert Path("runs/names", file).read_bytes() == Path("runs/stopped", file).read_bytes()


def test_records_are_scored_with_their_boundaries(charlm, names):
    assert "records, 8 ×" in names.err and "reset for each record" in names.err
    row = json.loads(Path("runs/names/metrics.jsonl").read_text().splitlines()[-1])
    loaded = load_model(Path("runs/names/model.safetensors"))
    corpus = Corpus.load(loaded.config.corpus, seed=loaded.config.train.seed)
    for split, loss in ((corpus.val, loaded.figures["val_loss"]), (corpus.test, row["test_loss"])):
        naive = [evaluate(loaded.model, corpus.vocab.encode(f"\n{name}\n")) for name in corpus.texts(split)]
        assert loss == pytest.approx(sum(naive, Score()).loss, rel=1e-5)
    Path("some.txt").write_text("ban\n\nala\nban\n")
    scored = charlm("score", "some.txt", "--unit", "line", "--json")
    lines = [json.loads(line) for line in scored.out.splitlines()]
    assert [(line["start"], line["text"], line["characters"]) for line in lines] == [
        (0, "ban\n", 4), (5, "ala\n", 4), (9, "ban\n", 4)
    ]  # fmt: skip
    assert lines[0]["bits"] == lines[2]["bits"]
    total = json.loads(charlm("eval", "some.txt", "--json").out)["total"]
    assert total["characters"] == 12
    assert total["bits_per_character"] == pytest.approx(sum(line["bits"] for line in lines) / 12, rel=1e-5)


def test_the_report_reads_each_record_alone(charlm, names):
    assert charlm("report", "names").code == 0
    loaded = load_model(Path("runs/names/model.safetensors"))
    ids = loaded.vocab.encode("ban\nala\nban\n")
    boundary = int(ids[-1])
    data = study(loaded, ids, boundary)
    expected = torch.cat(record_surprisals(loaded.model, [ids[:3], ids[4:7], ids[8:11]], boundary))
    assert data["bits"] == pytest.approx((expected / math.log(2)).tolist(), abs=1e-3)
    assert data["guesses"][:4] == data["guesses"][8:] and all(data["guesses"])
    for k, guesses in enumerate(data["guesses"]):  # the probabilities are those of the surprisals
        for char, p in guesses:
            if char == "ban\nala\nban\n"[k]:
                assert p == pytest.approx(2 ** -data["bits"][k], abs=1e-3)


def test_records_of_val_that_are_in_train_are_noted(charlm, names):
    assert "in train too" not in names.err
    Path("twice.txt").write_text(4 * "".join(f"{name}\n" for name in NAMES))
    done = charlm("train", "twice.txt", *settings(*RECORDS, "train.max_steps=1"))
    assert "most of val is in train too" in done.err


def test_training_goes_on_from_a_model_of_records(charlm, names):
    Path("more.txt").write_text("\n".join(name[::-1] for name in NAMES))
    done = charlm("train", "more.txt", "--from", "names", "--name", "more", "--set", "max_steps=2")
    assert done.code == 0 and "reset for each record" in done.err
    of_bytes = ("--name", "bytes", *settings(*RECORDS, "encoding=bytes", "train.max_steps=1"))
    assert charlm("train", "names.txt", *of_bytes).code == 0
    dry = charlm("train", "more.txt", "--from", "bytes", "--dry-run", "--set", "max_steps=2")
    assert "encoding: bytes" in dry.out and "records: line" in dry.out


def test_delimiters_are_found_in_cleaned_text_and_added_to_a_fixed_vocabulary(charlm):
    Path("t.txt").write_text("Ab<END>ba<END>bb<END>aab<END>" * 9)
    Path("v.txt").write_text("abn<>ed")
    fixed = ("lowercase=true", "records=<END>", "vocabulary=v.txt", "max_steps=1", "batch_size=4")
    done = charlm("train", "t.txt", "--name", "n", *(f"--set={each}" for each in fixed))
    assert done.code == 0, done.err
    assert load_model(Path("runs/n/last.safetensors")).vocab.characters == "abn<>ed\x1e"


def test_whole_records_are_written(charlm, names):
    common = ("generate", "--num-samples", "9", "--seed", "3", "-t", "1")
    done = charlm(*common, "--prefix", "b", "--novelty")
    lines = done.out.splitlines()
    assert len(lines) == 9 and all(line.startswith("b") for line in lines) and "of 9" in done.err
    assert charlm("generate", "--prefix", "b", "--seed", "4", "-t", "1").out == f"{lines[1]}\n"
    assert all(len(line) <= 4 for line in charlm(*common, "--length", "4").out.splitlines())
    once = charlm(*common, "--unique", "--new").out.splitlines()
    assert len(once) == len(set(once)) == 9 and not {*NAMES, ""} & set(once)


def test_records_in_python(charlm, names):
    model = load("runs/names")
    text = model.generate("b", seed=3, temperature=1)
    assert text == charlm("generate", "--prefix", "b", "--seed", "3", "-t", "1").out.removesuffix("\n")
    assert model.generate_batch(2, "b", seed=2, temperature=1)[1] == text
    scored = model.score("ban\nala\nban")
    assert "".join(character for character, _ in scored) == "ban\nala\nban\n"
    assert scored[:4] == scored[8:]
    loss = sum(bits for _, bits in scored) / 12
    assert model.perplexity("ban\nala\nban") == pytest.approx(2**loss)
    with pytest.raises(CharlmError, match="no record"):
        model.perplexity("\n")


def test_too_few_records_end_with_one_line(charlm, names):
    done = charlm("generate", "-t", "0", "--num-samples", "2", "--unique", "--prefix", "b")
    assert done.code == 1 and done.err.count("\n") == 1 and "1 of 2" in done.err
    assert len(done.out.splitlines()) == 1
    Path("names.txt").unlink()
    moved = charlm("generate", "--new")
    assert moved.code == 1 and "--corpus" in moved.err and not moved.out


@pytest.mark.parametrize("more", [["--prefix", "a\nb"], ["--stop", "a"], ["--interactive", "--new"]])
def test_what_has_no_meaning_with_records_is_refused(charlm, names, more):
    done = charlm("generate", *more)
    assert done.code == 2 and done.err.count("\n") == 1


def test_records_options_need_a_model_of_records(charlm, trained):
    done = charlm("generate", "--unique")
    assert done.code == 2 and "corpus.records" in done.err


def test_records_between_delimiters(charlm):
    Path("poems.txt").write_text("<|end|>".join(f"{name}\n{name[::-1]}\n" for name in NAMES))
    some = settings("corpus.records=<|end|>", "train.max_steps=12", "corpus.split=[1, 0, 0]")
    done = charlm("train", "poems.txt", "--name", "poems", *some)
    assert done.code == 0, done.err
    written = charlm("generate", "--num-samples", "3", "-t", "1", "--seed", "1")
    assert written.code == 0 and written.out.count("<|end|>") == 2 and "\x1e" not in written.out
    rows = charlm("score", "poems.txt", "--unit", "line").out.splitlines()
    assert charlm("report", "poems").code == 0
    assert len(rows) == 1 + len(NAMES) and rows[1].endswith("\taa\\naa\\x1e")
