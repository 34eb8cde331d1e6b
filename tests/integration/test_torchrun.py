"""Training with several processes, as a user starts it."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from charlm.cli_train import _prepare
from charlm.errors import ConfigError
from charlm.runs import Run
from conftest import settings


@contextmanager
def torchrun(folder, *args):
    """Two processes that train under torchrun, once they have saved anew."""
    state = folder / "runs/two/state.pt"
    before = state.stat().st_mtime if state.exists() else 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    with subprocess.Popen(
        [*launch, "-m", "charlm", "train", *args],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as running:
        while running.poll() is None and not (state.exists() and state.stat().st_mtime > before):
            time.sleep(0.1)
        yield running
        assert running.wait(timeout=60) != 0 and running.stdout.read() == ""


def said(running):
    """The lines that charlm wrote, without torchrun's report below them."""
    lines = running.stderr.read().splitlines()
    ends = [line for line in lines if line.startswith("charlm: ")]
    return lines, ends


def test_two_processes_stop_and_go_on_as_one(folder, charlm):
    begin = settings("corpus.source=corpus.txt", "train.max_steps=1000000", "train.checkpoint_every=5")
    with torchrun(folder, "--name", "two", *begin) as running:
        running.send_signal(signal.SIGTERM)
        lines, ends = said(running)
    assert len(ends) == 1 and "--resume runs/two" in ends[0]
    assert sum("2 processes × batch 4 × 8" in line for line in lines) == 1
    step = Run(folder / "runs/two").load_state()["progress"]["step"]
    assert f"stopped at step {step} of 1000000" in ends[0]

    with torchrun(folder, "--resume", "two") as running:
        workers = subprocess.run(["ps", "--ppid", str(running.pid), "-o", "pid="], capture_output=True)
        os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
        lines, ends = said(running)
    assert [line for line in lines if line.startswith("resumed")] == [
        f"resumed  runs/two at step {step} of 1000000"
    ]
    assert len(ends) == 1 and "lost the others" in ends[0]

    step = Run(folder / "runs/two").load_state()["progress"]["step"]
    done = charlm("train", "--resume", "two", "--set", f"train.max_steps={step + 3}")
    assert done.code == 0 and "sliding, 8 × 8" in done.err and f"at step {step} of {step + 3}" in done.err
    rows = [json.loads(line) for line in (folder / "runs/two/metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == sorted(steps) and steps[-1] == step + 3


def test_a_resumed_run_keeps_the_sequences_of_its_steps(trained):
    data, _ = _prepare(None, (), None, "tiny", 2)
    assert data["batches"]["batch_size"] == 2
    with pytest.raises(ConfigError, match="reads 4 sequences a step, which 3 processes cannot share"):
        _prepare(None, (), None, "tiny", 3)
