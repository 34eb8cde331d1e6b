"""Training with several processes, started by torchrun."""

import itertools
import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack

import pytest

from charlm.cli.train import _load_run
from charlm.errors import ConfigError
from charlm.storage.run import Run
from conftest import settings


def test_run_of_two_processes_continues_with_one(folder, charlm):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    overrides = settings("corpus.source=corpus.txt", "train.max_steps=1000000", "train.checkpoint_every=5")
    run = Run(folder / "runs/two")
    with subprocess.Popen(
        [*launch, "-m", "charlm", "train", "--name", "two", *overrides],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as running:
        header = list(itertools.takewhile(lambda line: not line.startswith("epoch 2 "), running.stderr))
        workers = subprocess.run(["pgrep", "-P", str(running.pid)], capture_output=True).stdout.split()
        os.kill(int(workers[1]), signal.SIGKILL)
        out, err = running.communicate(timeout=60)
    assert running.returncode != 0 and out == ""
    assert sum("2 processes × batch 4 × 8" in line for line in header) == 1
    assert sum(line.startswith("epoch 1 ") for line in header) == 1
    (end,) = [line for line in err.splitlines() if line.startswith("charlm: ")]
    assert "lost the others" in end and "--resume" in end

    step = run.load_state()["progress"]["step"]
    done = charlm("train", "--resume", "two", "--set", f"train.max_steps={step + 3}")
    assert done.code == 0 and "sliding, 8 × 8" in done.err and f"at step {step} of {step + 3}" in done.err
    steps = [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == step + 3


def test_resumed_run_keeps_the_sequences_of_its_steps(trained):
    config, _, state = _load_run("tiny", (), None, False, 2, True, ExitStack())
    assert config.batches.batch_size == 2 and state["sequences"] == 4
    with pytest.raises(ConfigError, match="4 sequences a step.*3 processes"):
        _load_run("tiny", (), None, False, 3, True, ExitStack())
