import os
from pathlib import Path

import pytest
import torch

from charlm.config import Config
from charlm.errors import CharlmError, ConfigError
from charlm.storage import log
from charlm.storage import run as runs
from charlm.storage.run import Run


@pytest.fixture
def run(folder):
    run = runs.new_run("a", "lstm")
    runs.create(run, Config())
    return run


def test_a_new_run_takes_no_name_that_is_taken(run, monkeypatch):
    assert run.load_config() == Config()
    with pytest.raises(ConfigError, match="runs/a exists.*--resume a"):
        runs.new_run("a", "lstm")
    monkeypatch.setattr(runs.time, "strftime", lambda pattern: "20260101-000000")
    first, second = runs.new_run(None, "gru"), runs.new_run(None, "gru")
    assert first.folder == Path("runs/gru-20260101-000000")
    assert runs.create(first, Config(), rename=True) == first
    assert runs.create(second, Config(), rename=True).folder == Path("runs/gru-20260101-000000-2")
    with pytest.raises(CharlmError, match="File exists"):
        runs.create(first, Config())


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "/tmp/x"])
def test_names_that_would_lead_out_of_runs(folder, name):
    with pytest.raises(ConfigError, match="no name for a run"):
        runs.new_run(name, "lstm")


def test_runs_are_found_by_name_and_by_folder(run, folder):
    assert runs.find_run("a") == runs.find_run("runs/a") == run
    assert runs.find_run(str(folder / "runs/a")).folder == folder / "runs/a"
    with pytest.raises(ConfigError, match="'b' is no run: runs/ has a"):
        runs.find_run("b")


def test_models_are_found_newest_first(run, folder):
    with pytest.raises(ConfigError, match="no model in runs/ yet"):
        runs.find_model(None)
    runs.create(Run(Path("runs/b")), Config())
    for name, time in (("a", 2000), ("b", 1000)):
        Run(Path("runs", name)).best.write_bytes(b"")
        os.utime(Run(Path("runs", name)).best, (time, time))
    begun = runs.create(Run(Path("runs/begun")), Config())
    assert runs.find_model(None) == Path("runs/a/model.safetensors")
    assert runs.find_model("b") == runs.find_model("runs/b") == Path("runs/b/model.safetensors")
    assert runs.find_model("runs/b/model.safetensors") == Path("runs/b/model.safetensors")
    begun.last.write_bytes(b"")
    assert runs.find_model(None) == runs.find_model("begun") == begun.last, "a run that has no best yet"
    with pytest.raises(ConfigError, match="no model 'c'"):
        runs.find_model("c")


def test_the_log_can_be_cut_back(run):
    size = log.append(run, {"step": 1})
    log.append(run, {"step": 2})
    log.cut(run, size)
    assert run.metrics.read_text() == '{"step": 1}\n'


def test_the_log_is_json_whatever_happens(run):
    log.append(run, {"val_loss": 800.0, "val_perplexity": float("inf")})
    assert run.metrics.read_text() == '{"val_loss": 800.0}\n'


def test_a_row_that_does_not_fit_is_not_left_in_part(run, monkeypatch):
    size, real = log.append(run, {"step": 1}), os.fsync

    def full(descriptor):
        real(descriptor)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CharlmError, match="metrics.jsonl: No space left"):
        log.append(run, {"step": 2})
    assert run.metrics.stat().st_size == size


def test_a_run_is_trained_by_one_process_at_a_time(run):
    with runs.lock(run), pytest.raises(CharlmError, match="being trained by another"), runs.lock(run):
        pass
    with runs.lock(run):
        pass
    assert [path.name for path in run.folder.iterdir()] == ["config.yaml"]


def test_a_run_that_cannot_be_made_leaves_nothing(folder, monkeypatch):
    def fail(run, config):
        raise CharlmError("full")

    monkeypatch.setattr(runs, "save_config", fail)
    with pytest.raises(CharlmError, match="full"):
        runs.create(Run(Path("runs/b")), Config())
    assert list(Path("runs").iterdir()) == []


def test_checkpoints_are_kept_and_pruned(run):
    for step in (5, 10, 15):
        run.state.unlink(missing_ok=True)
        run.state.write_text(str(step))
        run.keep(step)
    assert run.checkpoints() == [5, 10, 15]
    run.prune([10])
    assert run.checkpoints() == [10] and run.checkpoint(10).state.read_text() == "10"
    run.prune([])
    assert not (run.folder / "checkpoints").exists()


def test_state_round_trip_and_damage(run):
    with pytest.raises(CharlmError, match="no state.safetensors"):
        run.load_state()
    run.save_state({"a": torch.ones(3), "b": [1, "two", None]})
    assert run.load_state()["b"] == [1, "two", None]
    run.state.write_bytes(run.state.read_bytes()[:-200])
    with pytest.raises(CharlmError, match="damaged"):
        run.load_state()


def test_the_log_is_written_nowhere_else(run):
    """A run's folder may come from others, with a link in it that leads to a file of the user's."""
    Path("mine").write_text("mine")
    run.metrics.symlink_to(Path("mine").absolute())
    for write in (lambda: log.append(run, {"step": 1}), lambda: log.cut(run, 0)):
        with pytest.raises(CharlmError, match="is a link to .*mine, and charlm writes only inside"):
            write()
    assert Path("mine").read_text() == "mine"
    run.state.symlink_to(Path("mine").absolute())
    run.save_state({})
    assert Path("mine").read_text() == "mine" and not run.state.is_symlink()


def test_a_configuration_cannot_run_code(run):
    run.config.write_text("model: !!python/object/apply:os.mkdir [harmed]\n")
    with pytest.raises(CharlmError, match="not valid YAML at line 1.*python/object"):
        run.load_config()
    assert not Path("harmed").exists()
