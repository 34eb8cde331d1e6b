import json
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from charlm.errors import ConfigError
from charlm.storage.run import Run
from charlm.training.distributed import ALONE, Group, joined
from conftest import ROOT
from two_processes import CASES, train


def environment(rank, port):
    """Return the environment variables that torchrun sets."""
    return {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def two(tmp_path_factory, words):
    """Run two_processes.py twice: `folder` has its files, `codes` and `errors` the ends of both."""
    folder, port = tmp_path_factory.mktemp("two"), free_port()
    (folder / "text").write_text(words, encoding="utf-8")
    script = ROOT / "tests/two_processes.py"
    running = [
        subprocess.Popen(
            [sys.executable, script, folder],
            env=environment(rank, port),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        errors = [each.communicate(timeout=120)[1] for each in running]
    finally:
        for each in running:
            each.kill()
    return SimpleNamespace(folder=folder, codes=[each.returncode for each in running], errors=errors)


def rows(folder):
    """Return the rows of the log without times."""
    lines = [json.loads(line) for line in Run(folder).metrics.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "chars_per_second")} for row in lines]


def load(two, name):
    return torch.load(two.folder / name, weights_only=True)


def close(first, second, tolerance=1e-6):
    return all(torch.allclose(a, b, rtol=0, atol=tolerance) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_take_the_steps_of_one_with_twice_the_batch(two, words, tmp_path, name):
    trainer, expected = train(words, CASES[name], tmp_path / "one")
    models = trainer.learner.model, trainer.learner.scored
    weights = [[p.detach() for p in model.parameters()] for model in models]
    for rank in (0, 1):
        steps, their_weights = load(two, f"{name}.{rank}")
        assert len(steps) == len(expected) > 7
        for (loss, characters, gradients), (our_loss, our_characters, ours) in zip(
            steps, expected, strict=True
        ):
            assert characters == our_characters and loss == pytest.approx(our_loss, abs=1e-6)
            assert close(gradients, ours)
        assert all(close(*pair) for pair in zip(their_weights, weights, strict=True))
    ours, theirs = rows(tmp_path / "one"), rows(two.folder / name)
    assert [row.keys() for row in theirs] == [row.keys() for row in ours]
    for row, expected_row in zip(theirs, ours, strict=True):
        assert row == pytest.approx(expected_row, abs=1e-5)


@pytest.mark.parametrize("name", ["windows", "streams"])
def test_resumed_run_of_two_processes_ends_with_the_same_weights(two, name):
    whole, resumed = two.folder / f"{name}, noisy", two.folder / f"{name}, noisy, stopped"
    assert rows(resumed) == rows(whole)
    assert Run(resumed).best.read_bytes() == Run(whole).best.read_bytes()
    states = [Run(folder).load_state() for folder in (whole, resumed)]
    assert all(torch.equal(a, b) for a, b in zip(*(s["weights"].values() for s in states), strict=True))
    assert torch.equal(states[0]["rng"], states[1]["rng"])
    assert not torch.equal(*states[0]["rng"]), "each process drops other units"


@pytest.mark.parametrize("name", ["windows", "streams"])
def test_one_process_resumes_a_run_of_two(two, words, name):
    resumed, steps = train(words, CASES[name], two.folder / f"{name}, stopped", resume=True)
    expected, (weights, _) = load(two, f"{name}.0")
    assert len(steps) == len(expected) - 7, "from the save at step 7"
    assert close([p.detach() for p in resumed.learner.model.parameters()], weights)
    assert [characters for _, characters, _ in steps] == [characters for _, characters, _ in expected[7:]]


def test_signal_to_one_process_stops_both(two):
    for rank in (0, 1):
        message = (two.folder / f"signalled.{rank}").read_text()
        assert message.startswith("143 stopped at step 6 of ") and "--resume" in message
    assert Run(two.folder / "signalled").load_state()["progress"]["step"] == 6


def test_processes_exchange_values(two):
    for rank in (0, 1):
        assert (two.folder / f"agreed.{rank}").read_text() == "4 0.5 ['é', 0.1, None]"
        assert "different text" in (two.folder / f"different.{rank}").read_text()


def test_error_of_one_process_ends_both_and_is_reported_once(two):
    assert two.codes == [1, 1]
    assert two.errors == ["EndedElsewhere: \n", "CharlmError: the disk is full\n"]


@pytest.mark.parametrize("world_size", ["1", "2"])
def test_process_ends_with_its_code_and_its_output(world_size):
    script = (
        "import atexit, sys, charlm.__main__ as entry; atexit.register(print, 'bye'); "
        "entry.main = lambda: print('out', end=' ') or 3; entry.run()"
    )
    environment = {**os.environ, "WORLD_SIZE": world_size}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (3, "out bye\n", "")


ENVIRONMENTS = {
    "WORLD_SIZE alone": {"WORLD_SIZE": "2"},
    "RANK too high": {"RANK": "2", "WORLD_SIZE": "2"},
    "not a number": {"RANK": "one", "WORLD_SIZE": "2"},
    "LOCAL_RANK too high": {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"},
}


@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_invalid_environment_variables_are_refused(monkeypatch, charlm, case):
    for name, value in ENVIRONMENTS[case].items():
        monkeypatch.setenv(name, value)
    done = charlm("train")
    assert done.code == 2 and "torchrun" in done.err and done.err.count("\n") == 1


def test_unreachable_processes_end_the_command_with_a_message(monkeypatch, charlm):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = charlm("train")
    assert done.code == 1 and "MASTER_ADDR" in done.err and done.err.count("\n") == 1


def test_world_size_of_1_needs_no_group(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined() as group:
        assert group is ALONE


def test_each_process_uses_another_gpu(monkeypatch):
    group = Group(rank=5, size=8, local_rank=1, local_size=4)
    assert group.device("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert [str(group.device(name)) for name in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    with pytest.raises(ConfigError, match="'cuda:0'"):
        group.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="4 processes .* this machine has 2"):
        group.device("auto")
