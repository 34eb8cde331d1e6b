import pytest
import torch
from torch import nn

from charlm.config import ModelConfig
from charlm.nn.cells import CELLS
from charlm.nn.kernels.native import kernels
from charlm.nn.layers import BuiltinLayers, choose_implementation, make_recurrent

B, E, H = 3, 5, 4
KINDS = [("rnn", {"nonlinearity": "tanh"}), ("rnn", {"nonlinearity": "relu"}), ("lstm", {}), ("gru", {})]


def stacks(cell, num_layers, **options):
    """The same weights in each implementation, in float64: builtin, scratch and, with a compiler, fused."""
    torch.manual_seed(1)
    builtin, *others = (
        make_recurrent(
            E, ModelConfig(cell=cell, implementation=i, hidden_size=H, num_layers=num_layers, **options)
        ).double()
        for i in ("builtin", "scratch", *(["fused"] if kernels(torch.float64) else []))
    )
    for parameter in builtin.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    for stack in others:
        stack.load_state_dict(builtin.state_dict())
    return builtin, *others


@pytest.mark.parametrize(("cell", "options"), KINDS)
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("T", [1, 7])
def test_implementations_equal_torch_forward_and_backward(cell, options, num_layers, T):
    results = []
    for stack in stacks(cell, num_layers, dropout=0.0, **options):
        torch.manual_seed(2)
        x = torch.randn(B, T, E, dtype=torch.double, requires_grad=True)
        state = tuple(
            torch.randn(num_layers, B, H, dtype=torch.double, requires_grad=True) for _ in CELLS[cell].state
        )
        y, last = stack(x, state)
        weights = torch.randn_like(y)
        (y * weights).sum().add(sum(s.square().sum() for s in last)).backward()
        gradients = [p.grad for _, p in sorted(stack.named_parameters())]
        results.append([y, *last, x.grad, *(s.grad for s in state), *gradients])
    for theirs, *ours in zip(*results, strict=True):
        for tensor in ours:
            torch.testing.assert_close(tensor, theirs, atol=1e-10, rtol=0)


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_parameters_have_the_names_and_shapes_of_torch(cell):
    reference = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}[cell](E, H, 2)
    for stack in stacks(cell, 2):
        named = [(name, parameter.shape) for name, parameter in stack.named_parameters()]
        assert named == [(name, parameter.shape) for name, parameter in reference.named_parameters()]


def test_gradients_of_gru_reset_before_equal_numeric_ones():
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
def test_dropout_applies_between_layers_and_only_in_training(cell):
    for stack in stacks(cell, 2, dropout=0.5):
        x = torch.randn(B, 6, E, dtype=torch.double)
        state = tuple(torch.zeros(2, B, H, dtype=torch.double) for _ in CELLS[cell].state)
        (y1, last1), (y2, last2) = stack(x, state), stack(x, state)
        assert torch.equal(last1[0][0], last2[0][0]), "the first layer reads the whole input"
        assert not torch.equal(y1, y2), "the second reads a dropped input"
        stack.eval()
        assert torch.equal(stack(x, state)[0], stack(x, state)[0])


REGULARISERS = [
    {"weight_dropout": 0.5},
    {"locked_dropout": True, "dropout": 0.5},
    {"weight_dropout": 0.5, "dropout": 0.5},
    {"weight_dropout": 0.3, "locked_dropout": True, "dropout": 0.3},
]


def run(stack, cell, seed=3):
    """y, the last state and the gradients of a forward pass whose masks `seed` gives."""
    torch.manual_seed(2)
    x = torch.randn(B, 7, E, dtype=torch.double)
    state = tuple(torch.randn(stack.num_layers, B, H, dtype=torch.double) for _ in CELLS[cell].state)
    torch.manual_seed(seed)
    stack.zero_grad()
    y, last = stack(x, state)
    (y.square().sum() + sum(s.sum() for s in last)).backward()
    return [y, *last, *(parameter.grad for _, parameter in sorted(stack.named_parameters()))]


@pytest.mark.parametrize("regulariser", REGULARISERS)
@pytest.mark.parametrize(("cell", "options"), KINDS)
def test_regularisers_give_the_same_results_in_all_implementations(cell, options, regulariser):
    implemented = stacks(cell, 3, **options, **regulariser)
    assert isinstance(implemented[0], BuiltinLayers)
    for theirs, *ours in zip(*(run(stack, cell) for stack in implemented), strict=True):
        for tensor in ours:
            torch.testing.assert_close(tensor, theirs, atol=1e-10, rtol=0)
    for stack in implemented:
        assert not torch.allclose(run(stack, cell)[0], run(stack, cell, seed=4)[0])
        plain = stacks(cell, 3, dropout=0.0, **options)[0]
        plain.load_state_dict(stack.state_dict())
        stack.eval()
        assert torch.allclose(run(stack, cell)[0], run(plain, cell)[0], atol=1e-10), "off in eval"


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_weight_dropout_draws_one_mask_of_the_recurrent_matrix_for_each_pass(cell):
    for stack in stacks(cell, 2, weight_dropout=0.4):
        before = {name: parameter.clone() for name, parameter in stack.named_parameters()}
        (W_ih, W_hh, *biases), (_, other, *_) = stack.weights(1), stack.weights(1)
        kept = W_hh != 0
        assert 0 < kept.sum() < kept.numel() and not torch.equal(W_hh, other)
        assert torch.allclose(W_hh[kept], stack.weight_hh_l1[kept] / 0.6)
        assert W_ih is stack.weight_ih_l1
        assert biases[0] is stack.bias_ih_l1 and biases[1] is stack.bias_hh_l1
        run(stack, cell)
        assert 0 < (stack.weight_hh_l1.grad == 0).sum() < kept.numel(), "dropped weights have no gradient"
        assert all(torch.equal(parameter, before[name]) for name, parameter in stack.named_parameters())
        assert stack.eval().weights(1)[1] is stack.weight_hh_l1


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_locked_dropout_uses_one_mask_between_layers_for_all_steps(cell):
    for stack in stacks(cell, 3, locked_dropout=True, dropout=0.5):
        entered, layer = [], stack._layer
        stack._layer = lambda x, state, weights, e=entered, f=layer: (e.append(x), f(x, state, weights))[1]
        run(stack, cell)
        first, *later = [(x == 0) for x in entered]
        assert not first.any(), "the input is not dropped"
        for zeros in later:
            assert zeros.any() and torch.equal(zeros, zeros[:1].expand_as(zeros))
        assert not torch.equal(*later), "each layer has its own mask"


def test_builtin_without_regularisers_is_the_module_of_torch():
    for options in ({}, {"locked_dropout": True}, {"num_layers": 2, "locked_dropout": True, "dropout": 0.0}):
        assert isinstance(make_recurrent(E, ModelConfig(implementation="builtin", **options)), nn.LSTM)


@pytest.mark.parametrize(
    ("options", "device", "compiled", "chosen"),
    [
        ({}, "cpu", True, "fused"),
        ({}, "cpu", None, "builtin"),
        ({}, "cuda", True, "builtin"),
        ({"cell": "gru", "gru_reset": "before"}, "cpu", True, "scratch"),
        ({"implementation": "scratch"}, "cpu", True, "scratch"),
        ({"implementation": "fused"}, "cpu", True, "fused"),
        ({"implementation": "fused"}, "cpu", None, "builtin"),
        ({"implementation": "fused"}, "cuda", True, "builtin"),
    ],
)
def test_the_fastest_implementation_that_can_run_is_chosen(monkeypatch, options, device, compiled, chosen):
    monkeypatch.setattr("charlm.nn.layers.kernels", lambda dtype: compiled)
    assert choose_implementation(ModelConfig(**options), torch.device(device))[0] == chosen


@pytest.mark.parametrize("shape", [(2, 1, H), (3, B, H)])
def test_state_of_other_sizes_raises_an_error(shape):
    for stack in stacks("lstm", 2)[1:]:
        with pytest.raises(ValueError, match=r"\(2, 3, 'H'\)"):
            stack(torch.zeros(B, 2, E, dtype=torch.double), (torch.zeros(shape, dtype=torch.double),) * 2)
