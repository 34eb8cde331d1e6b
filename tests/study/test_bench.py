import time

import pytest
import torch

from charlm.config import BatchesConfig, Config, ModelConfig, TrainConfig
from charlm.errors import ConfigError
from charlm.nn.kernels.native import kernels
from charlm.study import bench

SMALL = ModelConfig(hidden_size=6, embedding_size=4, num_layers=2)
BATCHES = BatchesConfig(batch_size=3, seq_len=5, stride=5)


def test_measures_all_implementations_except_auto():
    report = bench.bench(["gru"], SMALL, BATCHES, "cpu", seconds=0.01)
    names = [row.implementation for row in report.rows]
    assert {"scratch", "builtin", *(["fused"] if kernels(torch.float32) else [])} == set(names)
    assert [row.ratio for row in report.rows if row.implementation == "builtin"] == [1]
    for row in report.rows:
        assert row.cell == "gru" and min(row.trained, row.written, row.share) > 0


def test_rate_is_work_divided_by_time(monkeypatch):
    clock = iter([10.0, 11.0, 12.0, 14.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert bench.rate(lambda: 6, 3.0) == 18 / 4


def test_operations_are_six_per_weight_of_the_products():
    learner = bench.make_learner(Config(model=SMALL, batches=BATCHES, train=TrainConfig(device="cpu")))
    H, V = 6, 65
    assert len(learner.corpus.vocab) == V
    assert bench.operations(learner.model) == 6 * (4 * H * H + 2 * 4 * H * H + H * V)


@pytest.mark.parametrize("sampling", ["sliding", "contiguous"])
def test_text_is_long_enough_for_a_batch(sampling):
    batches = BatchesConfig(sampling=sampling, batch_size=7, seq_len=9, stride=20)
    learner = bench.make_learner(Config(model=SMALL, batches=batches, train=TrainConfig(device="cpu")))
    x, _ = next(iter(learner.batches.loader(seed=1, epoch=0)))
    assert x.shape == (7, 9)


@pytest.mark.parametrize(("precision", "size"), [(torch.bfloat16, 512), (torch.float32, 128)])
def test_matrix_product_is_two_operations_per_multiplication(monkeypatch, precision, size):
    """A type without instructions is measured on smaller matrices."""
    monkeypatch.setattr(bench, "choose_precision", lambda *args: (precision, ""))
    monkeypatch.setattr(bench, "rate", lambda work, seconds: work())
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *args: None)
    shapes = []
    monkeypatch.setattr(torch, "mm", lambda a, b, out: shapes.append((a.shape, b.shape, a.dtype)))
    assert bench.matrix_rate(torch.device("cpu"), torch.bfloat16, 0.0) == 2 * size**3
    assert shapes == [((size, size), (size, size), torch.bfloat16)]


def test_profile_divides_a_step_into_its_parts():
    batches = BatchesConfig(batch_size=8, seq_len=20, stride=20)
    config = Config(model=ModelConfig(hidden_size=48), batches=batches, train=TrainConfig(device="cpu"))
    parts, share = bench.profile(config, 0.1)
    assert min(parts.values()) >= 0 and share > 0
    fused = ["sequence forward", "sequence backward"] if kernels(torch.float32) else []
    assert all(parts[name] > 0 for name in ("head", "optimiser", "batches", *fused))


def test_unknown_device_is_refused():
    with pytest.raises(ConfigError, match="tpu"):
        bench.bench(["rnn"], SMALL, BATCHES, "tpu")
