"""TensorBoard's reader finds each row of the log once."""

import json
import sys
import warnings
from pathlib import Path

import pytest

from conftest import settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of TensorBoard itself
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ON = "train.tensorboard=true"


def points(folder, tag):
    found = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in found.Scalars(tag)]


def test_tensorboard_has_the_rows_and_samples(charlm):
    overrides = (
        "corpus.source=corpus.txt",
        "train.epochs=2",
        "train.sample_chars=20",
        "train.log_every=20",
        ON,
    )
    assert charlm("train", "--name", "tiny", *settings(*overrides)).code == 0
    folder = Path("runs/tiny")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][:-1]
    assert [row["step"] for row in rows] == [20, 40, 56, 60, 80, 100, 112]
    found = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert set(found.Tags()["scalars"]) == {
        *(f"{figure}/{split}" for figure in ("loss", "perplexity") for split in ("train", "val")),
        "bits_per_character/val",
        *(f"training/{key}" for key in ("epoch", "lr", "grad_norm", "chars_per_second", "seconds")),
    }
    for tag, key in (
        ("loss/train", "train_loss"),
        ("perplexity/val", "val_perplexity"),
        ("training/lr", "lr"),
    ):
        expected = [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in rows if key in row]
        assert points(folder, tag) == expected
    assert len(found.Tensors("sample/text_summary")) == 2


def test_repeated_steps_are_drawn_once(charlm, trained):
    """A run that is killed after it has logged more than it has saved, and resumed."""
    saved = (trained / "state.safetensors").read_bytes()
    more = ["--resume", "tiny", "--set", ON, "--set", "train.max_steps=9"]
    assert charlm("train", *more).code == 0
    assert points(trained, "loss/val") != []
    (trained / "state.safetensors").write_bytes(saved)
    first = (trained / "model.safetensors").read_bytes()
    assert charlm("train", *more).code == 0
    assert [step for step, _ in points(trained, "loss/val")] == [9]
    assert len(list((trained / "tensorboard").iterdir())) == 2
    assert (trained / "model.safetensors").read_bytes() == first


def test_missing_package_is_reported_before_a_run_is_made(charlm, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    done = charlm("train", *settings("corpus.source=corpus.txt", ON))
    assert (
        done.code == 1 and done.err.count("\n") == 1 and "pip install 'charlm-torch[tensorboard]'" in done.err
    )
    assert not (folder / "runs").exists()
