import re
import subprocess
import sys

import pytest
import torch

from charlm.config import Config, override
from charlm.errors import ConfigError
from charlm.nn.kernels.native import kernels
from charlm.text.corpus import Corpus
from charlm.training import memory
from charlm.training.learner import Learner
from charlm.training.memory import check_memory, free_memory, step_memory
from conftest import configure

MEASURE = """
import re, sys
from pathlib import Path
from charlm.config import from_data
from charlm.study.bench import make_learner
train = {"device": "cpu", "precision": "float32"}
config = {"model": {"hidden_size": 256}, "batches": {"batch_size": 128}, "train": train}
learner = make_learner(from_data(config, ""))
x, y = next(learner.remaining_batches())
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
learner.step(x[:1], y[:1])
before = peak()
learner.step(x, y)
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.skipif(kernels(torch.float32) is None, reason="no C compiler here")
def test_estimate_is_near_the_memory_of_a_step(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    config = override(Config(), ["hidden_size=256", "batch_size=128"])
    _, each = step_memory(config, 65, 64, "fused", torch.float32)
    assert 0.5 < int(done.stdout) / (128 * each) < 1.5


@pytest.mark.parametrize("implementation", ["fused", "builtin", "scratch"])
def test_batch_that_is_too_large_is_refused_with_one_that_fits(monkeypatch, implementation):
    config = override(Config(), ["hidden_size=1024", "batch_size=4000", "seq_len=400"])
    monkeypatch.setattr(memory, "free_memory", lambda: 24 * 10**9)
    with pytest.raises(ConfigError, match=r"4,000 × 400 .*1,024 .* 24\.0 GB are free") as error:
        check_memory(config, 65, config.batches.batch_size, 400, implementation, torch.bfloat16)
    (fits,) = re.findall(r"batch_size up to ([\d,]+)", str(error.value))
    fits = int(fits.replace(",", ""))
    assert 0 < fits < 4000
    line = check_memory(config, 65, fits, 400, implementation, torch.bfloat16)
    assert line.endswith("24.0 GB free")
    with pytest.raises(ConfigError):
        check_memory(config, 65, fits + 1, 400, implementation, torch.bfloat16)


def test_model_that_is_too_large_is_refused_before_it_is_made(monkeypatch, words):
    monkeypatch.setattr(memory, "free_memory", lambda: 10**6)
    with pytest.raises(ConfigError, match="smaller model"):
        Learner(configure("model.hidden_size=1048576"), Corpus.from_text(words))


def test_a_step_has_no_more_sequences_than_the_text(words):
    config = configure("batches.batch_size=1000000000", "train.device=cpu")
    assert " MB for a step" in Learner(config, Corpus.from_text(words)).memory


def test_processes_of_torchrun_share_the_free_memory(monkeypatch):
    """Of 8 GB that are free, a container may use 6, and 3 of these are in use, 1 of them for cached files."""
    files = {
        "/proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable: 8000000 kB\n",
        "/sys/fs/cgroup/memory.max": "6000000000\n",
        "/sys/fs/cgroup/memory.current": "3000000000\n",
        "/sys/fs/cgroup/memory.stat": "anon 2000000000\ninactive_file 1000000000\n",
    }

    def read_text(path):
        if str(path) in files:
            return files[str(path)]
        raise FileNotFoundError

    monkeypatch.setattr(memory.Path, "read_text", read_text)
    assert free_memory() == 4 * 10**9
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory() == 10**9
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "many")
    assert free_memory() is None
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    del files["/sys/fs/cgroup/memory.max"]
    assert free_memory() == 8_192_000_000


def test_unknown_free_memory_refuses_nothing(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: None)
    config = override(Config(), ["batch_size=1000000"])
    assert check_memory(config, 65, 32, 64, "fused", torch.float32).endswith("for a step")
