"""`fused` against the equations of `cells`, forward and backward."""

import itertools
import math

import pytest
import torch

from charlm.config import ModelConfig
from charlm.nn import cells, fused
from charlm.nn.kernels.native import kernels

if kernels(torch.float64) is None:
    pytest.skip("there is no C compiler here", allow_module_level=True)

T, B, H, V = 5, 3, 19, 7  # all different, and no multiple of a vector's length
CASES = [("rnn", "tanh"), ("rnn", "relu"), ("lstm", "tanh"), ("gru", "tanh")]


def example(cell, table, dtype=torch.float64, steps=T, batch=B, hidden=H):
    generator = torch.Generator().manual_seed(7)
    rows = cells.CELLS[cell].gates * hidden

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    ids = torch.randint(V, (steps, batch), generator=generator) if table else None
    x = draw(V, rows) if table else draw(steps, batch, rows)
    tensors = {"x": x, "W_hh": draw(rows, hidden), "h": draw(batch, hidden)}
    with torch.no_grad():
        tensors["W_hh"] *= hidden**-0.5
    if cell == "lstm":
        tensors["c"] = draw(batch, hidden)
    if cell == "gru":
        tensors["b_hn"] = draw(hidden)
    return ids, tensors


def run_fused(cell, nonlinearity, ids, x, W_hh, h, c=None, b_hn=None):
    if cell == "rnn":
        return fused.rnn(x, ids, W_hh, h, nonlinearity == "relu")
    if cell == "lstm":
        return fused.lstm(x, ids, W_hh, h, c)
    return fused.gru(x, ids, W_hh, b_hn, h)


def run_cells(cell, nonlinearity, ids, x, W_hh, h, c=None, b_hn=None):
    step = cells.cell_of(ModelConfig(cell=cell, nonlinearity=nonlinearity)).step
    b_hh = x.new_zeros(len(W_hh))
    if cell == "gru":
        b_hh = torch.cat([b_hh[: 2 * len(b_hn)], b_hn])
    state, outputs = ((h,) if c is None else (h, c)), []
    for a in x if ids is None else x[ids]:
        state = step(a, state, W_hh, b_hh)
        outputs.append(state[0])
    return torch.stack(outputs), *state


def loss(results):
    """Return a sum in which every number of the results has its own weight."""
    generator = torch.Generator().manual_seed(3)
    return sum(
        (result.double() * torch.randn(result.shape, generator=generator, dtype=torch.float64)).sum()
        for result in results
    )


@pytest.mark.parametrize(("cell", "nonlinearity"), CASES)
@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("hidden", [1, H, 64])
def test_results_and_gradients_equal_those_of_the_equations(cell, nonlinearity, table, hidden):
    ids, tensors = example(cell, table, hidden=hidden)
    ours = run_fused(cell, nonlinearity, ids, **tensors)
    theirs = run_cells(cell, nonlinearity, ids, **tensors)
    for mine, yours in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, yours, rtol=0, atol=1e-12)
    gradients = (torch.autograd.grad(loss(result), list(tensors.values())) for result in (ours, theirs))
    for name, mine, yours in zip(tensors, *gradients, strict=True):
        torch.testing.assert_close(mine, yours, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("cell", "nonlinearity"), CASES)
def test_gradients_equal_numeric_ones(cell, nonlinearity):
    ids, tensors = example(cell, True, steps=3, batch=2, hidden=3)
    names, values = tensors.keys(), tuple(tensors.values())
    assert torch.autograd.gradcheck(
        lambda *inputs: run_fused(cell, nonlinearity, ids, **dict(zip(names, inputs, strict=True))), values
    )


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])  # relu's gradient jumps at 0
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_lower_precision_is_near_float64(cell, dtype, tolerance):
    ids, exact = example(cell, True, hidden=40, batch=9)
    lower = {
        name: tensor.detach().to(torch.float32 if name in ("h", "c", "b_hn") else dtype).requires_grad_()
        for name, tensor in exact.items()
    }
    ours, theirs = (run_fused(cell, "tanh", ids, **tensors) for tensors in (lower, exact))
    assert ours[0].dtype == dtype
    assert all(state.dtype == torch.float32 for state in ours[2:]), "the LSTM's c stays in float32"
    gradients = [
        torch.autograd.grad(loss(result), list(tensors.values()))
        for result, tensors in ((ours, lower), (theirs, exact))
    ]
    for mine, yours in itertools.chain(zip(ours, theirs, strict=True), zip(*gradients, strict=True)):
        assert (mine - yours).norm() <= tolerance * yours.norm()


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_states_and_ids_of_other_types_are_converted(cell):
    ids, tensors = example(cell, True, dtype=torch.float32)
    expected = run_fused(cell, "tanh", ids, **tensors)
    for dtype in (torch.float64, torch.bfloat16):
        states = {name: tensors[name].to(dtype) for name in ("h", "c", "b_hn") if name in tensors}
        found = run_fused(cell, "tanh", ids.int(), **{**tensors, **states})
        for mine, yours in zip(found, expected, strict=True):
            assert mine.dtype == torch.float32
            torch.testing.assert_close(mine, yours, rtol=0, atol=0.05 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("wrong", [-1, V])
def test_ids_out_of_range_raise_an_error(wrong):
    ids, tensors = example("rnn", True)
    ids[1, 1] = wrong
    with pytest.raises(IndexError, match=f"0 to {V - 1}"):
        run_fused("rnn", "tanh", ids, **tensors)


@pytest.mark.parametrize(("cell", "nonlinearity"), CASES)
def test_transposed_tensors_give_the_same_results(cell, nonlinearity):
    """Transposed inputs, and transposed gradients as a batch-first reader of y gives them."""
    ids, tensors = example(cell, True)
    weight = torch.randn(B, T, H, dtype=torch.float64)
    plain = run_fused(cell, nonlinearity, ids, **tensors)
    expected = torch.autograd.grad(
        (plain[0] * weight.transpose(0, 1).contiguous()).sum(), [*tensors.values()]
    )
    strided = {
        name: tensor.detach().t().contiguous().t().requires_grad_() if tensor.dim() == 2 else tensor
        for name, tensor in tensors.items()
    }
    results = run_fused(cell, nonlinearity, ids.t().contiguous().t(), **strided)
    found = torch.autograd.grad((results[0].transpose(0, 1) * weight).sum(), [*strided.values()])
    torch.testing.assert_close((results, found), (plain, expected), rtol=0, atol=1e-12)


def test_gradients_flow_from_the_last_state_alone():
    ids, tensors = example("lstm", False)
    for which in (1, 2):
        ours, theirs = (
            torch.autograd.grad(run("lstm", "tanh", ids, **tensors)[which].sum(), tensors["W_hh"])[0]
            for run in (run_fused, run_cells)
        )
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("cell", "nonlinearity"), CASES)
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 7, 50, 101])
@pytest.mark.parametrize("steps", [1, 4])
def test_batches_of_any_size_equal_the_equations_with_any_number_of_threads(
    threads, cell, nonlinearity, batch, steps
):
    """With fewer rows than threads the threads share the units."""
    ids, tensors = example(cell, False, steps=steps, batch=batch, hidden=37)
    theirs = run_cells(cell, nonlinearity, ids, **tensors)
    expected = [*theirs, *torch.autograd.grad(loss(theirs), list(tensors.values()))]
    found = []
    for count in (1, 2, 3, 8):
        threads(count)
        ours = run_fused(cell, nonlinearity, ids, **tensors)
        found.append([*ours, *torch.autograd.grad(loss(ours), list(tensors.values()))])
    for each in found:
        torch.testing.assert_close(each, expected, rtol=0, atol=1e-10)
        del each[len(theirs) + list(tensors).index("W_hh")]  # torch's product may depend on the threads
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_results_without_gradients_are_the_same(cell, dtype):
    """Scoring keeps the last state only."""
    ids, tensors = example(cell, True)
    with torch.no_grad():
        tensors = {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}
    expected = run_fused(cell, "tanh", ids, **tensors)
    with torch.no_grad():
        found = run_fused(cell, "tanh", ids, **tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_large_numbers_saturate_and_nan_stays_nan(cell):
    """Saturated gates are 0 and 1; NaN stays NaN, so that a divergence is seen."""
    ids, tensors = example(cell, False, dtype=torch.float32)
    with torch.no_grad():
        tensors["x"][:, 0] = 1e30
        tensors["x"][:, 1] = -1e30
        tensors["x"][:, 2] = torch.nan
        y = run_fused(cell, "tanh", ids, **tensors)[0]
        expected = run_cells(cell, "tanh", ids, **tensors)[0]
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5, equal_nan=True)
    assert y[:, 2].isnan().all()


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_second_derivative_raises_an_error(cell):
    """The backward pass is written by hand and has no derivative."""
    ids, tensors = example(cell, True)
    results = run_fused(cell, "tanh", ids, **tensors)
    (gradient,) = torch.autograd.grad(loss(results) ** 2, tensors["W_hh"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_expanded_gradient_is_read_with_its_strides():
    one = torch.ones(1, 1, dtype=torch.float64)
    W_hh = one.clone().requires_grad_()
    fused.rnn(one[None], None, W_hh, one)[0].sum().backward()
    assert W_hh.grad.item() == pytest.approx(1 - math.tanh(2) ** 2)
