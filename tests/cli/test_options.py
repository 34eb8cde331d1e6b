"""Completion in the shell, through the protocol of the shells."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from charlm.cli import cli
from charlm.config import KEYS, from_data, reference
from conftest import ROOT


def offered(*words):
    """The values offered for the last of `words`, without the item for files."""
    completion = ShellComplete(cli, {}, "charlm", "_CHARLM_COMPLETE")
    items = completion.get_completions(list(words[:-1]), words[-1])
    return [item.value for item in items if item.type == "plain"]


@pytest.fixture
def runs(folder):
    for age, name in enumerate(["new", "old", "other"]):
        Path("runs", name).mkdir(parents=True)
        Path("runs", name, "config.yaml").touch()
        os.utime(Path("runs", name), (1000 - age, 1000 - age))
    Path("runs/nothing").mkdir()
    Path("runs/.hidden").mkdir()
    Path("runs/.hidden/config.yaml").touch()


def test_recipes_in_the_package_and_in_configs_are_completed(folder):
    assert offered("train", "--config", "gru") == ["gru-scratch.yaml", "gru.yaml"]
    assert "seeds/rnn.yaml" in offered("compare", "-c", "seeds/")
    Path("configs").mkdir()
    Path("configs/mine.yaml").touch()
    assert offered("gradcheck", "--config", "mi") == ["mine.yaml"]


COMMANDS = ["train --resume", "generate -m", "eval --model", "fill -m", "info", "log x", "plot"]


@pytest.mark.parametrize("command", COMMANDS)
def test_runs_are_completed_newest_first(runs, command):
    assert offered(*command.split(), "") == ["new", "old", "other"]
    assert offered(*command.split(), "o") == ["old", "other"]


def test_keys_are_completed_with_and_without_their_section():
    assert offered("train", "--set", "train.lr") == ["train.lr=", "train.lr=0.008"]
    assert offered("compare", "--set", "lr") == ["lr=", "lr=0.008"]


def test_completion_shows_the_meaning_of_a_key():
    items = ShellComplete(cli, {}, "charlm", "_CHARLM_COMPLETE").get_completions(
        ["train", "--set"], "train.lr"
    )
    assert [item.help for item in items] == [reference(["train.lr"])[0].description] * 2


def test_completed_settings_are_the_defaults():
    every = [each for each in offered("train", "--set", "") if not each.endswith("=")]
    assert len(every) == len(KEYS) and from_data({}, "", every) == from_data({}, "")
    assert not any(" " in each for each in every)


def test_the_command_answers_bash_without_torch(folder):
    code = "import sys; from charlm.cli import main; sys.argv[0] = 'charlm'; main(); sys.stdout.flush(); "
    code += "sys.exit('torch' in sys.modules)"
    words = {"COMP_WORDS": "charlm train --config ls", "COMP_CWORD": "3", "_CHARLM_COMPLETE": "bash_complete"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **words}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["file,ls", "plain,lstm-scratch.yaml", "plain,lstm.yaml"]


def test_the_command_line_is_imported_without_torch_and_pydantic():
    code = "import sys, charlm.cli; sys.exit(bool({'torch', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_readme_names_every_shell():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for shell in ("bash", "zsh", "fish"):
        assert f"_CHARLM_COMPLETE={shell}_source charlm" in text
