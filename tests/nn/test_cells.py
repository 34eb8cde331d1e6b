"""Each cell against its equations written out unit by unit in Python floats; every size is different."""

import math

import pytest
import torch

from charlm.config import ModelConfig
from charlm.nn.cells import cell_of

B, E, H = 2, 3, 4


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def affine(W, b, x):
    """W x + b over lists."""
    return [sum(w * v for w, v in zip(row, x, strict=True)) + bias for row, bias in zip(W, b, strict=True)]


def naive_rnn(activation):
    def step(x, h, Wi, Wh, bi, bh):
        return [activation(a + u) for a, u in zip(affine(Wi, bi, x), affine(Wh, bh, h), strict=True)]

    return step


def naive_lstm(x, h, c, Wi, Wh, bi, bh):
    a = [p + q for p, q in zip(affine(Wi, bi, x), affine(Wh, bh, h), strict=True)]
    i, f, g, o = (a[k * H : (k + 1) * H] for k in range(4))
    c = [sigmoid(f[j]) * c[j] + sigmoid(i[j]) * math.tanh(g[j]) for j in range(H)]
    return [sigmoid(o[j]) * math.tanh(c[j]) for j in range(H)], c


def naive_gru(x, h, Wi, Wh, bi, bh, before):
    a, u = affine(Wi, bi, x), affine(Wh, bh, h)
    r = [sigmoid(a[j] + u[j]) for j in range(H)]
    z = [sigmoid(a[H + j] + u[H + j]) for j in range(H)]
    if before:
        n_h = affine(Wh[2 * H :], bh[2 * H :], [r[j] * h[j] for j in range(H)])
    else:
        n_h = [r[j] * u[2 * H + j] for j in range(H)]
    n = [math.tanh(a[2 * H + j] + n_h[j]) for j in range(H)]
    return [(1 - z[j]) * n[j] + z[j] * h[j] for j in range(H)]


@pytest.mark.parametrize(
    ("cell", "options", "naive"),
    [
        ("rnn", {"nonlinearity": "tanh"}, naive_rnn(math.tanh)),
        ("rnn", {"nonlinearity": "relu"}, naive_rnn(lambda v: max(0.0, v))),
        ("lstm", {}, naive_lstm),
        ("gru", {"gru_reset": "after"}, lambda *args: naive_gru(*args, before=False)),
        ("gru", {"gru_reset": "before"}, lambda *args: naive_gru(*args, before=True)),
    ],
)
def test_step_equals_the_equations_in_plain_python(cell, options, naive):
    torch.manual_seed(0)
    record = cell_of(ModelConfig(cell=cell, **options))
    rows = record.gates * H
    Wi, Wh, bi, bh, x = (
        torch.randn(shape, dtype=torch.double) for shape in [(rows, E), (rows, H), (rows,), (rows,), (B, E)]
    )
    state = tuple(torch.randn(B, H, dtype=torch.double) for _ in record.state)
    after = record.step(x @ Wi.t() + bi, state, Wh, bh)
    assert len(after) == len(record.state)
    for n in range(B):
        expected = naive(
            x[n].tolist(), *(s[n].tolist() for s in state), *(p.tolist() for p in (Wi, Wh, bi, bh))
        )
        expected = expected if cell == "lstm" else (expected,)
        for tensor, values in zip(after, expected, strict=True):
            assert torch.allclose(tensor[n], torch.tensor(values, dtype=torch.double), atol=1e-14, rtol=0)
