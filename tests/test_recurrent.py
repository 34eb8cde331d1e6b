import pytest
import torch
from torch import nn

from charlm.cells import STATES
from charlm.config import ModelConfig
from charlm.recurrent import make_recurrent

B, E, H = 3, 5, 4
KINDS = [("rnn", {"nonlinearity": "tanh"}), ("rnn", {"nonlinearity": "relu"}), ("lstm", {}), ("gru", {})]


def stacks(cell, num_layers, **options):
    """The same weights in both implementations, in float64."""
    torch.manual_seed(1)
    builtin, scratch = (
        make_recurrent(
            E, ModelConfig(cell=cell, implementation=i, hidden_size=H, num_layers=num_layers, **options)
        ).double()
        for i in ("builtin", "scratch")
    )
    scratch.load_state_dict(builtin.state_dict())
    return builtin, scratch


@pytest.mark.parametrize(("cell", "options"), KINDS)
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("T", [1, 7])
def test_scratch_equals_torch_forward_and_backward(cell, options, num_layers, T):
    builtin, scratch = stacks(cell, num_layers, dropout=0.0, **options)
    results = []
    for stack in (builtin, scratch):
        torch.manual_seed(2)
        x = torch.randn(B, T, E, dtype=torch.double, requires_grad=True)
        state = tuple(
            torch.randn(num_layers, B, H, dtype=torch.double, requires_grad=True) for _ in range(STATES[cell])
        )
        y, last = stack(x, state)
        weights = torch.randn_like(y)
        (y * weights).sum().add(sum(s.square().sum() for s in last)).backward()
        gradients = [p.grad for _, p in sorted(stack.named_parameters())]
        results.append([y, *last, x.grad, *(s.grad for s in state), *gradients])
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, atol=1e-10, rtol=0)


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_names_and_shapes_are_torch_s(cell):
    reference = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}[cell](E, H, 2)
    for stack in stacks(cell, 2):
        named = [(name, parameter.shape) for name, parameter in stack.named_parameters()]
        assert named == [(name, parameter.shape) for name, parameter in reference.named_parameters()]


def test_gradients_of_the_gru_that_torch_lacks():
    config = ModelConfig(
        cell="gru", implementation="scratch", gru_reset="before", hidden_size=3, num_layers=2
    )
    stack = make_recurrent(2, config).double().eval()
    parameters = [nn.init.normal_(p).detach().clone().requires_grad_() for p in stack.parameters()]
    names = [name for name, _ in stack.named_parameters()]
    x, h = torch.randn(2, 4, 2, dtype=torch.double), torch.randn(2, 2, 3, dtype=torch.double)

    def run(x, h, *parameters):
        y, (last,) = torch.func.functional_call(stack, dict(zip(names, parameters, strict=True)), (x, (h,)))
        return y, last

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), h.requires_grad_(), *parameters))


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_dropout_falls_between_layers_and_only_in_training(cell):
    for stack in stacks(cell, 2, dropout=0.5):
        x = torch.randn(B, 6, E, dtype=torch.double)
        state = tuple(torch.zeros(2, B, H, dtype=torch.double) for _ in range(STATES[cell]))
        (y1, last1), (y2, last2) = stack(x, state), stack(x, state)
        assert torch.equal(last1[0][0], last2[0][0]), "the first layer sees the whole input"
        assert not torch.equal(y1, y2), "the second does not"
        stack.eval()
        assert torch.equal(stack(x, state)[0], stack(x, state)[0])
