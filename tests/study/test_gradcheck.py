import math

import pytest
import torch

from charlm.config import from_data
from charlm.nn.model import CharLM
from charlm.study.gradcheck import gradcheck

CELLS = [
    {"cell": "rnn"},
    {"cell": "rnn", "nonlinearity": "relu"},
    {"cell": "lstm"},
    {"cell": "gru"},
    {"cell": "gru", "gru_reset": "before"},
]
IMPLEMENTED = [
    {**cell, "implementation": implementation}
    for cell in CELLS
    for implementation in ("scratch", "builtin", "fused")
    if implementation == "scratch" or cell.get("gru_reset") != "before"
]


def configured(seq_len=5, **model):
    """Return the configuration of a small model with distinct sizes."""
    sizes = {"hidden_size": 7, "embedding_size": 4}
    return from_data({"model": {**sizes, **model}, "batches": {"seq_len": seq_len}}, "")


def worst(checks):
    return max(check.relative_error for check in checks)


@pytest.mark.parametrize("options", IMPLEMENTED)
@pytest.mark.parametrize("num_layers", [1, 2])
def test_every_parameter_of_every_cell_passes(options, num_layers):
    config = configured(num_layers=num_layers, **options)
    checks = gradcheck(config)
    names = [name for name, _ in CharLM(11, config.model).named_parameters()]
    assert [check.parameter for check in checks] == names
    assert worst(checks) < 1e-7
    assert all(check.analytic > 1e-6 for check in checks), "no gradient is zero"


@pytest.mark.parametrize(
    "options",
    [
        {"input": "one_hot"},
        {"embedding_size": 7, "tie_weights": True},
        {"seq_len": 1},
        {"dropout": 0.9, "num_layers": 2},
        {"init": "normal", "num_layers": 4},
        {
            "init": "normal",
            "cell": "rnn",
            "nonlinearity": "relu",
            "num_layers": 2,
            "implementation": "scratch",
        },
    ],
)
def test_other_configurations_pass(options):
    checks = gradcheck(configured(**options))
    assert worst(checks) < 1e-6
    assert all(check.analytic > 0 for check in checks), "no gradient is zero"


class WrongTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return -grad * (1 - y * y)


class WrongRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return -grad * (x > 0)


@pytest.mark.parametrize("options", CELLS)
@pytest.mark.parametrize("num_layers", [1, 2])
def test_wrong_sign_in_a_cell_is_detected(monkeypatch, options, num_layers):
    monkeypatch.setattr("charlm.nn.cells.torch.tanh", WrongTanh.apply)
    monkeypatch.setattr("charlm.nn.cells.torch.relu", WrongRelu.apply)
    checks = gradcheck(configured(implementation="scratch", num_layers=num_layers, **options))
    for check in checks:
        if check.parameter.startswith("head."):
            assert check.relative_error < 1e-7, "not affected by the wrong cell"
        elif check.parameter.startswith("recurrent.bias"):
            assert check.relative_error > 1e-2


def planted(monkeypatch, backward):
    """Return the checks with the gradient of tanh in the cells multiplied by the result of `backward`."""

    class Planted(WrongTanh):
        @staticmethod
        def backward(ctx, grad):
            return -WrongTanh.backward(ctx, grad) * backward(grad)

    monkeypatch.setattr("charlm.nn.cells.torch.tanh", Planted.apply)
    return gradcheck(configured(cell="rnn", implementation="scratch"))


def test_gradient_off_by_a_thousandth_is_detected(monkeypatch):
    assert worst(planted(monkeypatch, torch.ones_like)) < 1e-7
    assert worst(planted(monkeypatch, lambda grad: 1.001)) > 1e-4


def test_nan_gradient_is_detected(monkeypatch):
    assert worst(planted(monkeypatch, lambda grad: torch.nan)) == math.inf


def test_detached_parameter_is_detected(monkeypatch):
    class Detached(CharLM):
        def forward(self, x, state):
            logits, state = super().forward(x, state)
            return logits + self.head.bias.detach() - self.head.bias, state

    monkeypatch.setattr("charlm.study.gradcheck.make_model", Detached)
    (bias,) = (check for check in gradcheck(configured()) if check.parameter == "head.bias")
    assert bias.relative_error > 0.99


def test_entries_include_the_largest_gradients(monkeypatch):
    config = configured(cell="gru")
    everything, few = gradcheck(config, entries=10**6), gradcheck(config, entries=4)
    for whole, part in zip(everything, few, strict=True):
        assert part.analytic < whole.analytic
        if whole.parameter == "head.bias":
            # The 2 largest of 11 squares are at least 2/11 of their sum.
            assert part.analytic**2 >= 2 / 11 * whole.analytic**2
    assert gradcheck(config, entries=4) == few, "the same seed gives the same entries"


def test_step_across_a_kink_is_not_an_error():
    # With steps of 1e-3 alone the error is above 1e-3 for each of these seeds.
    config = configured(cell="rnn", nonlinearity="relu", num_layers=2, hidden_size=64)
    assert max(worst(gradcheck(config, delta=1e-3, seed=seed)) for seed in range(3)) < 1e-6
