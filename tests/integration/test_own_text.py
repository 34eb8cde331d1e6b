"""A text of one's own: `charlm train TEXT`, stdin, a time limit, and going on from another model."""

import io
import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml

from charlm.cli import main
from charlm.config import from_data, read_yaml
from charlm.nn.model import copy_weights, make_model
from charlm.storage.model_file import load_model
from charlm.study import budget
from charlm.training.trainer import Trainer
from conftest import configure, settings


def config_of(run):
    return from_data(read_yaml(Path("runs") / run / "config.yaml"), "")


@pytest.fixture
def stdin(monkeypatch):
    """Give commands a text on stdin."""
    return lambda text: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


@pytest.mark.parametrize("name", ["2024", "#1.txt", "notes: day 1.txt", "[a].txt", "null"])
def test_names_of_texts_are_taken_as_they_stand(charlm, words, name):
    Path(name).write_text(words)
    done = charlm("train", name, "--name", "n", *settings("train.max_steps=1"))
    assert done.code == 0 and name in done.err
    assert config_of("n").corpus.source == name


def test_several_texts_are_read_one_after_the_other_with_a_recipe(charlm, words):
    Path("more").mkdir()
    Path("more/b.txt").write_text(words[:500])
    Path("r.yaml").write_text("corpus: {source: none.txt, lowercase: true}\n")
    arguments = ("train", "corpus.txt", "more", "--config", "r.yaml", *settings("train.max_steps=1"))
    done = charlm(*arguments)
    assert done.code == 0 and "(2 files)" in done.err
    (run,) = Path("runs").iterdir()
    assert run.name.startswith("corpus-")
    corpus = config_of(run.name).corpus
    assert corpus.source == ["corpus.txt", "more"] and corpus.lowercase


def test_text_of_stdin_is_kept_in_the_run(charlm, stdin, words):
    stdin(words)
    assert charlm("train", "-", "--name", "n", *settings("train.max_steps=2")).code == 0
    assert config_of("n").corpus.source == "runs/n/text.txt"
    assert Path("runs/n/text.txt").read_text() == words
    resumed = charlm("train", "--resume", "n", "--set", "train.max_steps=3")
    assert resumed.code == 0 and "at step 2" in resumed.err


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_empty_stdin_leaves_no_run(charlm, stdin, more):
    stdin("")
    done = charlm("train", "-", "--name", "n", *more)
    assert done.code == 1 and "empty" in done.err
    assert not Path("runs/n").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["corpus.txt", "--set", "source=other.txt"], "given twice"),
        (["corpus.txt", "--resume", "n"], "leave out TEXT"),
        (["--from", "none"], "'none'"),
        (["corpus.txt", "--minutes", "nan"], "--minutes is nan"),
        (["corpus.txt", "--set", "encoding=bytes", "--set", "records=—"], "records is '—'"),
        (["--epochs", "3"], "--set epochs=VALUE"),
        (["--learning-rate", "3"], "No such option"),
        (["--corpus", "x"], "charlm train book.txt"),
    ],
)
def test_wrong_arguments_hint_at_the_right_ones(charlm, arguments, message):
    done = charlm("train", *arguments)
    assert done.code != 0 and done.err.count("\n") == 1 and message in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample"], "Did you mean 'generate'?"),
        (["trian"], "Did you mean 'train'?"),
        (["qqqq"], "The commands are"),
        (["generate", "text"], "--prefix"),
    ],
)
def test_unknown_commands_and_arguments_hint_at_the_right_ones(charlm, arguments, message):
    done = charlm(*arguments)
    assert done.code == 2 and message in done.err


def test_time_limit_ends_a_training_with_an_evaluation(charlm):
    limit = settings("corpus.source=corpus.txt", "train.epochs=100000", "train.time_limit=1s")
    started = time.monotonic()
    done = charlm("train", "--name", "n", *limit)
    assert done.code == 0 and time.monotonic() - started >= 1
    assert "test     perplexity" in done.err
    again = charlm("train", "--resume", "n")
    assert again.code != 0 and "by train.time_limit=1s" in again.err
    step = json.loads(Path("runs/n/metrics.jsonl").read_text().splitlines()[-1])["step"]
    more = ("--set", "train.time_limit=null", "--set", f"train.max_steps={step + 1}")
    assert charlm("train", "--resume", "n", *more).code == 0


def test_without_a_val_split_the_last_model_is_the_best(charlm, words):
    whole = "corpus.split=[1, 0, 0]"
    done = charlm(
        "train", "corpus.txt", "--name", "n", *settings(whole, "train.max_steps=5", "train.eval_every=2")
    )
    assert done.code == 0 and "no val split" in done.err
    best, last = (load_model(Path("runs/n") / f"{name}.safetensors") for name in ("model", "last"))
    assert best.figures["step"] == 5
    for a, b in zip(best.model.parameters(), last.model.parameters(), strict=True):
        assert torch.equal(a, b)
    resumed = charlm("train", "--resume", "n", "--set", "train.max_steps=6")
    assert resumed.code == 0 and load_model(Path("runs/n/model.safetensors")).figures["step"] == 6
    written = charlm("generate", "--model", "runs/n", "--length", "20", "--novelty")
    assert written.code == 0 and "held-out" not in written.err
    assert charlm("report", "n").code == 0
    for arguments in (["plot", "n"], ["compare", "--all", "--set", whole]):
        refused = charlm(*arguments)
        assert refused.code and "val" in refused.err and not refused.out
    for needs in ("early_stopping=2", "schedule=plateau"):
        refused = charlm("train", "corpus.txt", "--set", whole, "--set", needs)
        assert refused.code == 2 and needs.partition("=")[0] in refused.err


def test_training_goes_on_from_a_model_on_another_text(charlm, trained, words):
    Path("new.txt").write_text(words.replace("a", "ß").replace("b", "X"))
    dry = charlm("train", "new.txt", "--from", "tiny", "--dry-run")
    assert "with 2 new characters; val " in dry.out
    few = [part for text in ("max_steps=1", "stride=16") for part in ("--set", text)]
    done = charlm("train", "new.txt", "--from", "tiny", "--name", "n", *few)
    assert done.code == 0, done.err
    before, after = load_model(trained / "model.safetensors"), load_model(Path("runs/n/last.safetensors"))
    assert after.vocab.characters[:-2] == before.vocab.characters
    assert set(after.vocab.characters[-2:]) == {"ß", "X"}
    assert after.config.model.hidden_size == before.config.model.hidden_size
    resumed = charlm("train", "--resume", "n", "--set", "train.max_steps=3")
    assert resumed.code == 0 and "before the first step" not in resumed.err
    assert load_model(Path("runs/n/last.safetensors")).vocab.characters == after.vocab.characters
    refused = charlm("train", "new.txt", "--from", "tiny", "--set", "model.hidden_size=13")
    assert refused.code != 0 and "does not fit" in refused.err and refused.err.count("\n") == 1


def test_interrupted_training_from_a_model_ends_as_an_undisturbed_one(charlm, trained, words):
    Path("new.txt").write_text(words.replace("a", "ß"))
    more = [part for text in ("stride=16", "schedule=constant") for part in ("--set", text)]
    for name, steps in (("whole", 4), ("stopped", 2)):
        start = ("train", "new.txt", "--from", "tiny", "--name", name, *more)
        assert charlm(*start, "--set", f"max_steps={steps}").code == 0
    assert charlm("train", "--resume", "stopped", "--set", "max_steps=4").code == 0
    whole, stopped = (
        load_model(Path(f"runs/{name}/last.safetensors")).model for name in ("whole", "stopped")
    )
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), stopped.parameters(), strict=True))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.input=one_hot"],
        ["model.tie_weights=true", "model.embedding_size=12"],
        ["model.direction=both"],
        ["model.cell=gru", "model.hidden_size=7"],  # as many units as characters
    ],
)
def test_new_characters_leave_the_predictions_of_the_others_in_proportion(overrides):
    config = configure(*overrides).model
    source, target = (make_model(size, config).initialise(seed).eval() for size, seed in ((7, 1), (10, 2)))
    copy_weights(source, target)
    x = torch.randint(7, (2, 5), generator=torch.Generator().manual_seed(0))
    old, new = (model(x, model.initial_state(2))[0] for model in (source, target))
    torch.testing.assert_close(new[..., :7].log_softmax(-1), old.log_softmax(-1))
    rarest = int(source.head.bias.argmin())
    torch.testing.assert_close(new[..., 7:], old[..., rarest, None].expand(-1, -1, 3))


def test_a_loss_above_that_of_guessing_is_called_so(charlm, monkeypatch):
    monkeypatch.setattr(Trainer, "guessing", property(lambda self: 0.5))
    done = charlm("train", "--name", "n", *settings("corpus.source=corpus.txt", "train.max_steps=3"))
    assert done.err.count("worse than guessing, 0.5") == 2
    assert "best" not in done.err and " *" not in done.err


def test_line_ends_and_marks_are_those_of_the_training_text_everywhere(charlm, trained, words, stdin):
    same = ("--seed", "3", "--length", "40", "-t", "1")
    expected = charlm("generate", "--prefix", "a\nb", *same).out
    for prefix in ("a\r\nb", "a\rb", "\ufeffa\nb"):
        assert charlm("generate", "--prefix", prefix, *same).out == expected
    stdin(":seed 3\n:length 40\n:temperature 1\n\ufeffa\n")
    assert charlm("generate", "-i").out == charlm("generate", "--prefix", "a", *same).out


def test_stop_reads_escapes(charlm, trained):
    stopped = charlm(
        "generate", "--prefix", "a", "--stop", r"\n", "--length", "9999", "-t", "1", "--seed", "1"
    )
    assert stopped.code == 0 and stopped.out.count("\n") == 1 and len(stopped.out) < 9999
    both = charlm("generate", "--stop", r"\\n")
    assert both.code != 0 and r"'\\n'" in both.err, "the two characters are not in the vocabulary"


def test_other_encodings_are_read(charlm, words):
    Path("cp.txt").write_bytes(f"“{words}".encode("cp1252"))
    wrong = charlm("train", "cp.txt", *settings())
    assert wrong.code != 0 and "corpus.encoding=windows-1252" in wrong.err
    right = settings("corpus.encoding=windows-1252", "train.max_steps=1")
    assert charlm("train", "cp.txt", "--name", "n", *right).code == 0
    assert "ñ" in load_model(Path("runs/n/last.safetensors")).vocab.characters
    assert charlm("eval", "--model", "n", "cp.txt").code == 0
    refused = charlm("train", "cp.txt", "--set", "encoding=utf-99")
    assert refused.code != 0 and "'utf-99'" in refused.err


def test_a_model_of_bytes_reads_and_writes_any_file(folder, capfdbinary):
    data = bytes(range(256)) * 12 + b"\r\n\xef\xbb\xbf\0" * 40
    Path("a.wav").write_bytes(data)
    bytes_of = settings("corpus.encoding=bytes", "train.max_steps=1")
    assert main(["train", "a.wav", "--name", "n", *bytes_of]) == 0
    loaded = load_model(Path("runs/n/last.safetensors"))
    assert loaded.vocab.characters == "".join(map(chr, range(256)))
    capfdbinary.readouterr()
    assert main(["eval", "--model", "n", "a.wav", "--json"]) == 0
    total = json.loads(capfdbinary.readouterr().out)["total"]
    assert total["characters"] == len(data) - 1
    assert total["bits_per_byte"] == pytest.approx(total["bits_per_character"])
    assert main(["generate", "--model", "n", "--prefix", "é", "--length", "500", "-t", "2"]) == 0
    written = capfdbinary.readouterr().out
    assert len(written) == 502 and written.startswith("é".encode()) and not written.isascii()
    assert main(["generate", "--model", "n", "--num-samples", "2", "--length", "300", "-t", "2"]) == 0
    first, second = capfdbinary.readouterr().out.split(b"-" * 20 + b"\n")
    assert len(first) == len(second) == 300


@pytest.fixture
def speeds(monkeypatch):
    """The speed of the machine, not measured."""
    monkeypatch.setattr(budget, "machine_speeds", lambda *args: {64: 1e10, 1024: 1e11})
    monkeypatch.setattr(budget, "_measured", lambda *args: 2000.0)


@pytest.mark.usefixtures("speeds")
def test_minutes_choose_the_model_before_the_first_step(charlm, stdin, words):
    stdin(words)
    small = [part for key in ("max_steps=2", "hidden_size=8") for part in ("--set", key)]
    done = charlm("train", "-", "--minutes", "1", "--name", "n", *small)
    assert done.code == 0 and "budget" in done.err
    config = config_of("n")
    assert (config.train.max_steps, config.model.hidden_size) == (2, 8), "--set overrides the choice"
    assert config.batches.sampling == "contiguous" and config.train.time_limit
    assert config.corpus.source == "runs/n/text.txt"
    again = charlm("train", "--config", "runs/n/config.yaml", "--name", "again")
    assert again.code == 0
    logs = [Path(f"runs/{name}/model.safetensors").read_bytes()[-1000:] for name in ("n", "again")]
    assert logs[0] == logs[1], "the configuration repeats the run"
    Path("r.yaml").write_text("train: {eval_every: 1}\n")
    assert charlm("train", "--config", "r.yaml", "--minutes", "1", "--name", "e", *small).code == 0
    assert config_of("e").train.eval_every == 1
    refused = charlm("train", "--minutes", "1", "--resume", "n")
    assert refused.code == 2 and "--minutes" in refused.err


@pytest.mark.usefixtures("speeds")
def test_minutes_choose_what_a_recipe_or_a_model_leaves_open(charlm, trained):
    Path("r.yaml").write_text(
        "model: {cell: gru, hidden_size: 10, dropout: 0.3}\ntrain: {lr: 0.5, epochs: 999}\n"
    )

    def planned(*more):
        done = charlm("train", "corpus.txt", "--dry-run", *more)
        assert done.code == 0, done.err
        shown, _, header = done.out.partition("\ncorpus ")
        return from_data(yaml.safe_load(shown), ""), header

    config, header = planned("--config", "r.yaml", "--minutes", "0.2")
    assert (config.model.cell, config.model.hidden_size, config.model.dropout) == ("gru", 10, 0.3)
    assert config.train.lr == 0.5 and config.train.max_steps and "at 2,000 characters a second" in header
    longer = planned("--config", "r.yaml", "--minutes", "0.3")[0]
    assert longer.train.max_steps > config.train.max_steps
    assert planned("--config", "r.yaml")[0].train.epochs == 999
    config, header = planned("--from", "tiny", "--minutes", "0.3")
    assert config.model.hidden_size == load_model(trained / "model.safetensors").config.model.hidden_size
    assert config.train.lr == 4e-3 and config.train.max_steps and "dropout" in header


@pytest.mark.usefixtures("speeds")
def test_text_alone_is_trained_for_five_minutes_unless_its_end_is_given(charlm):
    assert "budget   5 minutes" in charlm("train", "corpus.txt", "--dry-run").out
    for end in ("epochs=1", "train.max_steps=3", "time_limit=9min"):
        assert "budget" not in charlm("train", "corpus.txt", "--dry-run", "--set", end).out


def test_pipes_are_kept_in_the_run(charlm, words):
    os.mkfifo("pipe")
    writer = threading.Thread(target=lambda: Path("pipe").write_text(words), daemon=True)
    writer.start()
    done = charlm("train", "corpus.txt", "pipe", "--name", "n", *settings("train.max_steps=1"))
    assert done.code == 0, done.err
    writer.join()
    assert config_of("n").corpus.source == ["corpus.txt", "runs/n/text1.txt"]
    assert Path("runs/n/text1.txt").read_text() == words
    assert charlm("train", "--resume", "n", "--set", "train.max_steps=2").code == 0


def test_minutes_refuse_a_text_of_the_configuration_that_can_be_read_once(charlm):
    os.mkfifo("pipe")
    writer = threading.Thread(target=lambda: Path("pipe").write_text("text\n" * 50), daemon=True)
    writer.start()
    refused = charlm("train", "--set", "corpus.source=pipe", "--minutes", "1")
    assert refused.code == 2 and "pipe" in refused.err and not Path("runs").exists()
    writer.join()
