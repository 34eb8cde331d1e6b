import pytest
import torch
from torch import nn
from torch.nn import functional as F

from charlm.config import ModelConfig
from charlm.errors import CharlmError
from charlm.nn.model import CharLM
from charlm.study.gradflow import gradflow, plot

V, E, H, B, T = 9, 4, 6, 3, 8
CELLS = [
    {"cell": "rnn"},
    {"cell": "rnn", "nonlinearity": "relu"},
    {"cell": "lstm"},
    {"cell": "gru"},
    {"cell": "gru", "gru_reset": "before", "implementation": "scratch"},
]


def make(num_layers=1, **options):
    sizes = {"hidden_size": H, "embedding_size": E, "dropout": 0.5, "num_layers": num_layers}
    return CharLM(V, ModelConfig(**{**sizes, **options})).initialise(3)


def random_ids(batch=B, length=T + 1):
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(4))


def root_mean_square(norms):
    return torch.stack(norms).square().mean().sqrt().item()


def naive(model, ids, back):
    """Return the norms of the model unrolled with torch's cells, sequence by sequence."""
    config = model.config
    kind = {"rnn": nn.RNNCell, "lstm": nn.LSTMCell, "gru": nn.GRUCell}[config.cell]
    extra = {"nonlinearity": config.nonlinearity} if config.cell == "rnn" else {}
    cells = []
    for k in range(config.num_layers):
        names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
        parts = {name: getattr(model.recurrent, f"{name}_l{k}") for name in names}
        cell = kind(parts["weight_ih"].shape[1], H, **extra).double()
        cell.load_state_dict(parts)
        cells.append(cell)
    norms = {name: [[] for _ in range(back + 1)] for name in ("hc" if config.cell == "lstm" else "h")}
    for sequence in ids:
        states, tops = [None] * len(cells), []
        for char in sequence[:-1]:
            if config.input == "embedding":
                y = model.embedding.weight[char]
            else:
                y = torch.eye(V, dtype=torch.double)[char]
            for k, cell in enumerate(cells):
                states[k] = cell(y, states[k])
                y = states[k][0] if config.cell == "lstm" else states[k]
            tops.append(states[-1] if config.cell == "lstm" else (y,))
        loss = -(model.head.weight @ y + model.head.bias).log_softmax(0)[sequence[-1]]
        for k in range(back + 1):
            gradients = torch.autograd.grad(loss, tops[-1 - k], retain_graph=True, materialize_grads=True)
            if config.cell == "lstm":
                # torch's cell returns h_t and c_t at once; the chain rule adds the path from c_t through h_t.
                (h, c), (dh, dc) = tops[-1 - k], gradients
                o = h / c.tanh()
                gradients = dh, dc + dh * o * (1 - c.tanh() ** 2)
            for name, gradient in zip(norms, gradients, strict=True):
                norms[name][k].append(gradient.norm())
    return {name: [root_mean_square(batch) for batch in lists] for name, lists in norms.items()}


@pytest.mark.parametrize("options", CELLS[:4])
@pytest.mark.parametrize("implementation", ["scratch", "builtin", "fused"])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("input", ["embedding", "one_hot"])
def test_norms_equal_those_of_a_naive_model(options, implementation, num_layers, input):  # noqa: A002
    model = make(num_layers, implementation=implementation, input=input, **options).double()
    flow, expected = gradflow(model, random_ids(), T - 1), naive(model, random_ids(), T - 1)
    assert flow.keys() == expected.keys()
    for name, norms in flow.items():
        assert norms == pytest.approx(expected[name], rel=1e-10)


@pytest.mark.parametrize("options", CELLS)
def test_norms_equal_those_of_the_loss_as_a_function_of_the_state(options):
    model, ids, back = make(2, **options).double().eval(), random_ids(), 3
    norms = []
    for sequence in ids[:, None]:
        _, state = model(sequence[:, : T - back], model.initial_state(1))
        h = state[0].detach().requires_grad_()
        logits, _ = model(sequence[:, T - back : T], (h, *state[1:]))
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits[:, -1], sequence[:, -1]), h)
        norms.append(gradient[-1].norm())  # of the top layer
    assert gradflow(model, ids, back)["h"][back] == pytest.approx(root_mean_square(norms), rel=1e-10)


@torch.no_grad()
def linear_rnn(w):
    """Return a model with h_t = w h_{t-1} + 0.1: rectified units that are always positive."""
    model = make(cell="rnn", nonlinearity="relu").double()
    for name, parameter in model.recurrent.named_parameters():
        parameter.zero_()
        if name == "weight_hh_l0":
            parameter.copy_(w * torch.eye(H))
        elif name == "bias_ih_l0":
            parameter.fill_(0.1)
    return model


@pytest.mark.parametrize("w", [0.5, 1.0, 1.5])
def test_linear_recurrence_is_geometric(w):
    model, ids = linear_rnn(w), random_ids()
    h = torch.full((H,), 0.1 * sum(w**t for t in range(T)), dtype=torch.double)
    wrong = (model.head(h).softmax(0) - F.one_hot(ids[:, -1], V)).double()  # of the logits' gradient, (B, V)
    at_the_end = (wrong @ model.head.weight).norm(dim=1).square().mean().sqrt().item()
    assert gradflow(model, ids, T - 1)["h"] == pytest.approx([w**k * at_the_end for k in range(T)], rel=1e-12)


def test_cell_state_gradient_is_a_product_of_forget_gates():
    model, bias = make(cell="lstm", forget_bias=1.5).double(), 1.5
    with torch.no_grad():
        model.recurrent.weight_hh_l0.zero_()  # the gates see no h ...
        model.recurrent.weight_ih_l0.zero_()  # ... and no character: f_t is σ(bias)
    flow = gradflow(model, random_ids(), T - 1)
    f = torch.tensor(bias, dtype=torch.double).sigmoid().item()
    assert flow["c"] == pytest.approx([f**k * flow["c"][0] for k in range(T)], rel=1e-12)
    assert flow["h"][0] > 0 and flow["h"][1:] == [0.0] * (T - 1)


def test_norm_is_a_mean_over_the_batch():
    model, ids = make().double(), random_ids()
    one, three = gradflow(model, ids[:1], 5), gradflow(model, ids[:1].repeat(3, 1), 5)
    assert one["h"] == pytest.approx(three["h"], rel=1e-12)
    assert one["c"] == pytest.approx(three["c"], rel=1e-12)


def test_tanh_rnn_vanishes_faster_than_an_lstm():
    ids, flow = random_ids(8, 64), {}
    for cell in ("rnn", "lstm"):
        flow[cell] = gradflow(make(cell=cell, hidden_size=64, forget_bias=1.0), ids, 50)
    rnn, lstm = flow["rnn"]["h"], flow["lstm"]["h"]
    assert len(rnn) == len(lstm) == 51
    assert 0 < rnn[50] / rnn[0] < 0.1 * lstm[50] / lstm[0] and rnn[50] < 0.1 * lstm[50]


def test_model_is_unchanged():
    model = make(2).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        assert gradflow(model, random_ids(), 4) == gradflow(model.eval(), random_ids(), 4), "no dropout"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.head.weight.dtype == torch.float32
    assert all(parameter.grad is None for parameter in model.parameters())


def test_norms_below_the_range_of_float32_are_not_zero():
    model, ids = make(cell="rnn", init="normal"), random_ids(length=40)
    norms = gradflow(model, ids, 38)["h"]
    assert 0 < norms[38] < torch.finfo(torch.float32).tiny
    assert norms == gradflow(model.double(), ids, 38)["h"]


def test_short_text_is_refused():
    assert len(gradflow(make(), random_ids(), T - 1)["h"]) == T
    with pytest.raises(CharlmError, match=f"8 steps .* 10 characters.* {T + 1}"):
        gradflow(make(), random_ids(), T)


CURVES = {"rnn": [1.0, 1e-3, 1e-7, 0.0], "lstm": [1.0, 0.5, 0.2, 0.1]}


@pytest.mark.parametrize(("name", "begins"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")])
def test_plot_writes_an_image(tmp_path, name, begins):
    plot(CURVES, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(begins)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_plot_shows_each_curve_on_a_logarithmic_scale(tmp_path):
    plot(CURVES, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    for shown in ("rnn", "lstm", "steps back", "norm of the loss gradient", "{10^{"):
        assert shown in text, shown


def test_plot_refuses_a_missing_folder(tmp_path):
    with pytest.raises(CharlmError, match="missing"):
        plot(CURVES, tmp_path / "missing" / "a.png")
    assert not list(tmp_path.iterdir())
