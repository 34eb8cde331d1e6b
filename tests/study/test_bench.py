import time

import pytest
import torch

from charlm.config import BatchesConfig, Config, ModelConfig, TrainConfig
from charlm.errors import ConfigError
from charlm.study import bench

SMALL = ModelConfig(hidden_size=6, embedding_size=4, num_layers=2)
BATCHES = BatchesConfig(batch_size=3, seq_len=5, stride=5)


def test_every_implementation_is_measured_but_auto():
    report = bench.bench(["gru"], SMALL, BATCHES, "cpu", seconds=0.01)
    names = [row.implementation for row in report.rows]
    assert {"scratch", "builtin", "fused"} == set(names)
    assert [row.ratio for row in report.rows if row.implementation == "builtin"] == [1]
    for row in report.rows:
        assert row.cell == "gru" and min(row.trained, row.written, row.share) > 0


def test_a_rate_is_work_by_time(monkeypatch):
    clock = iter([10.0, 11.0, 12.0, 14.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert bench.rate(lambda: 6, 3.0) == 18 / 4


def test_operations_are_those_of_the_products():
    learner = bench.make_learner(Config(model=SMALL, batches=BATCHES, train=TrainConfig(device="cpu")))
    H, V = 6, 65
    assert len(learner.corpus.vocab) == V
    assert bench.operations(learner.model) == 6 * (4 * H * H + 2 * 4 * H * H + H * V)


@pytest.mark.parametrize("sampling", ["sliding", "contiguous"])
def test_the_text_fills_a_batch(sampling):
    batches = BatchesConfig(sampling=sampling, batch_size=7, seq_len=9, stride=20)
    learner = bench.make_learner(Config(model=SMALL, batches=batches, train=TrainConfig(device="cpu")))
    x, _ = next(iter(learner.batches.loader(seed=1, epoch=0)))
    assert x.shape == (7, 9)


def test_products_are_counted():
    assert bench.matrix_rate(torch.device("cpu"), torch.float32, 0.0) > 0


def test_a_device_that_is_not_here():
    with pytest.raises(ConfigError, match="tpu"):
        bench.bench(["rnn"], SMALL, BATCHES, "tpu")
