import os
import re
from pathlib import Path

import pytest
import torch

from charlm.config import Config
from charlm.errors import CharlmError, ConfigError
from charlm.storage import run as runs
from charlm.storage.run import Run


@pytest.fixture
def run(folder):
    run = runs.new_run("a", "lstm")
    runs.create(run, Config())
    return run


def test_new_run_needs_a_free_name(run, monkeypatch):
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
def test_invalid_names_are_refused(folder, name):
    with pytest.raises(ConfigError, match=re.escape(repr(name))):
        runs.new_run(name, "lstm")


def test_run_is_found_by_name_and_by_folder(run, folder):
    assert runs.find_run("a").folder == runs.find_run("runs/a").folder == run.folder
    assert runs.find_run(str(folder / "runs/a")).folder == folder / "runs/a"
    with pytest.raises(ConfigError, match="'b'.*: a$"):
        runs.find_run("b")


def test_newest_model_is_found_first(run, folder):
    with pytest.raises(ConfigError, match="--model PATH"):
        runs.find_model(None)
    runs.create(Run(Path("runs/b")), Config())
    for name, time in (("a", 2000), ("b", 1000)):
        Run(Path("runs", name)).best.write_bytes(b"")
        os.utime(Run(Path("runs", name)).best, (time, time))
    unevaluated = runs.create(Run(Path("runs/unevaluated")), Config())
    assert runs.find_model(None) == Path("runs/a/model.safetensors")
    assert runs.find_model("b") == runs.find_model("runs/b") == Path("runs/b/model.safetensors")
    assert runs.find_model("runs/b/model.safetensors") == Path("runs/b/model.safetensors")
    unevaluated.last.write_bytes(b"")
    assert runs.find_model(None) == runs.find_model("unevaluated") == unevaluated.last, (
        "a run without a best model"
    )
    with pytest.raises(ConfigError, match="'c'"):
        runs.find_model("c")


def test_run_is_locked_by_one_process_at_a_time(run):
    with runs.lock(run), pytest.raises(CharlmError, match="runs/a.*another process"), runs.lock(run):
        pass
    with runs.lock(run):
        pass
    assert [path.name for path in run.folder.iterdir()] == ["config.yaml"]


def test_run_that_cannot_be_created_leaves_nothing(folder, monkeypatch):
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


def test_state_is_saved_and_loaded(run):
    with pytest.raises(CharlmError, match="runs/a.*state.safetensors"):
        run.load_state()
    Path("mine").write_text("mine")
    run.state.symlink_to(Path("mine").absolute())
    run.save_state({"a": torch.ones(3), "b": [1, "two", None]})
    assert run.load_state()["b"] == [1, "two", None]
    assert Path("mine").read_text() == "mine" and not run.state.is_symlink()


def test_temporary_files_of_a_killed_process_are_removed(run):
    run.state.write_text("5")
    run.keep(5)
    left = [folder / f".{run.state.name}.0123abcd" for folder in (run.folder, run.checkpoint(5).folder)]
    for path in left:
        path.write_text("half")
    run.remove_temporaries()
    assert not any(path.exists() for path in left) and run.checkpoint(5).state.exists()


def test_checkpoint_is_copied_where_there_are_no_links(run, monkeypatch):
    def fail(source, target):
        raise OSError("no links")

    monkeypatch.setattr(os, "link", fail)
    run.state.write_text("5")
    run.keep(5)
    assert run.checkpoint(5).state.read_text() == "5"


def test_configuration_cannot_run_code(run):
    run.config.write_text("model: !!python/object/apply:os.mkdir [harmed]\n")
    with pytest.raises(CharlmError, match="not valid YAML at line 1.*python/object"):
        run.load_config()
    assert not Path("harmed").exists()
