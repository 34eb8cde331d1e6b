import math

import pytest
import torch
from torch.nn import functional as F

from charlm.nn import functional
from charlm.nn.functional import cross_entropy, dropped, linear, locked, once, one_sequence
from charlm.nn.kernels.native import kernels

both = pytest.mark.parametrize("compiled", [True, False], indirect=True)
needs_kernels = pytest.mark.skipif(kernels(torch.float32) is None, reason="no C compiler here")


@pytest.fixture
def compiled(request, monkeypatch):
    """Use the kernels, or torch's functions."""
    if not request.param:
        monkeypatch.setattr(functional, "kernels", lambda dtype: None)
        monkeypatch.setattr(functional, "_multiplies", lambda dtype: None)
    elif kernels(torch.float32) is None:
        pytest.skip("no C compiler here")


@both
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 0.004)]
)
@pytest.mark.parametrize("V", [1, 7, 300])
def test_cross_entropy_and_its_gradient(compiled, dtype, tolerance, V):
    generator = torch.Generator().manual_seed(0)
    logits = 30 * torch.rand(5, 3, V, generator=generator) - 15
    logits = logits.to(dtype).transpose(0, 1).requires_grad_()
    targets = torch.randint(V, (3, 5), generator=generator)
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact.flatten(0, 1), targets.flatten())
    loss = cross_entropy(logits, targets)
    assert loss.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
    (found,), (wanted,) = torch.autograd.grad(3 * loss, logits), torch.autograd.grad(3 * expected, exact)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


@both
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_cross_entropy_of_logits_that_are_not_finite_is_not_finite(compiled, wrong):
    for place in range(3):
        logits = torch.zeros(2, 3)
        logits[1, place] = wrong
        assert not cross_entropy(logits, torch.tensor([0, 1])).isfinite()


@both
@pytest.mark.parametrize("wrong", [-1, 3])
def test_targets_out_of_range_raise_an_error(compiled, wrong):
    with pytest.raises(IndexError):
        cross_entropy(torch.zeros(2, 3), torch.tensor([0, wrong]))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_the_number_of_threads(threads, dtype):
    torch.manual_seed(0)
    y, ids = torch.randn(300, 257).to(dtype), torch.randint(50, (300,))
    found, results = kernels(dtype), []
    for count in (1, 2, 3, 8):
        threads(count)
        d = torch.empty_like(y)
        results.append((found.gather(y, ids, 50), found.drop(y, 0.3, 5), found.cross_entropy(y, ids, d), d))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_with_the_same_id_are_summed_in_float32(dtype):
    a = torch.full((4096, 3), 0.01, dtype=dtype)
    ids = torch.tensor([0, 2]).repeat(2048)
    found = kernels(dtype).gather(a, ids, 5)
    assert found.shape == (5, 3) and found.dtype == torch.float32 and not found[[1, 3, 4]].any()
    torch.testing.assert_close(found[[0, 2]].double(), 2048 * a[:2].double(), rtol=1e-4, atol=0)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 5, 7), (13, 512, 32), (50, 1037, 33), (7, 1, 100)])
def test_products_of_matrices_in_any_order_of_memory(threads, dtype, wide, size):
    M, K, N = size
    generator = torch.Generator().manual_seed(0)
    a, b, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((M, K), (K, N), (N,)))
    found, bias = kernels(dtype), bias if N < 100 else None
    rounded = dtype == torch.bfloat16 and not wide
    tolerance = {"rtol": 0.005 if rounded else 1e-5, "atol": 0.005 if rounded else 1e-4}
    results = []
    for count in (1, 2, 3):
        threads(count)
        for x in (a, a.t().contiguous().t(), torch.cat([a, a], 1)[:, :K]):
            for y in (b, b.t().contiguous().t(), torch.cat([b, b], 1)[:, ::2]):
                product = found.multiply(x, y, bias, wide)
                assert product.dtype == (found.wide if wide else dtype)
                expected = x.double() @ y.double() + (0 if bias is None else bias.double())
                torch.testing.assert_close(product.double(), expected, **tolerance)
                results.append(product)
    assert all(torch.equal(results[i], results[i % 9]) for i in range(27)), "with any number of threads"


@both
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("time_first", [False, True])
def test_linear_layer_and_its_gradients(compiled, autocast, time_first):
    generator = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(*shape, generator=generator) for shape in ((5, 4, 7), (3, 7), (3,)))
    x = (x.transpose(0, 1) if time_first else x).requires_grad_()
    W.requires_grad_(), b.requires_grad_()
    weight = torch.randn(*x.shape[:2], 3, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = linear(x, W, b)
    assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
    expected = F.linear(x, W, b)
    found = torch.autograd.grad((y * weight).sum(), (x, W, b))
    wanted = torch.autograd.grad((expected * weight).sum(), (x, W, b))
    tolerance = {"rtol": 0.02, "atol": 0.1} if autocast else {}
    torch.testing.assert_close((y.float(), *found), (expected, *wanted), **tolerance)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.75])
@both
def test_dropout_has_the_probability_p_and_keeps_the_mean(compiled, p):
    torch.manual_seed(0)
    y = torch.ones(301, 333).requires_grad_()
    found = dropped(y, p)
    assert found.unique().tolist() == pytest.approx([1] if p == 0 else [0, 1 / (1 - p)])
    assert (found == 0).float().mean().item() == pytest.approx(p, abs=0.01)
    assert found.mean().item() == pytest.approx(1, abs=0.03)
    again = dropped(y, p)
    for a, b in ((found[:, 1:], found[:, :-1]), (found[1:], found[:-1]), (found, again)):
        together = ((a == 0) & (b == 0)).float().mean().item()
        assert together == pytest.approx(p * p, abs=0.01), "neighbours and masks are independent"
    found.sum().backward()
    assert torch.equal(y.grad, found), "the gradient passes through the same mask"


@pytest.mark.parametrize("time", [0, 1])
def test_locked_mask_is_the_same_at_all_steps_and_differs_between_streams_and_units(time):
    torch.manual_seed(0)
    y = torch.ones(9, 8, 7).movedim(0, time).requires_grad_()
    dropped = locked(y, 0.25, time, "key")
    steps = dropped.movedim(time, 0)
    assert torch.equal(steps, steps[:1].expand_as(steps))
    assert dropped.unique().tolist() == [0, pytest.approx(1 / 0.75)]
    assert len(steps[0].unique(dim=0)) > 1 < len(steps[0].unique(dim=1)[0])
    dropped.sum().backward()
    assert torch.equal(y.grad, dropped), "the gradient passes through the same mask"


def test_mask_is_drawn_once_for_each_sequence():
    draw = lambda: torch.rand(3)
    assert not torch.equal(once("a", draw), once("a", draw))
    with one_sequence():
        first = once("a", draw)
        assert torch.equal(once("a", draw), first) and not torch.equal(once("b", draw), first)
    with one_sequence():
        assert not torch.equal(once("a", draw), first)


@pytest.mark.parametrize("drop", [dropped, lambda y, p: locked(y, p, 0, "key")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@both
def test_scale_of_dropout_is_exact_in_every_type(compiled, drop, dtype):
    y = torch.rand(400, 400, generator=torch.Generator().manual_seed(0)).to(dtype)[:, None]
    found = drop(y, 0.1)
    kept = y.double()[found != 0].sum()
    assert (found.double().sum() / kept).item() == pytest.approx(
        1 / 0.9, rel=3e-4
    )  # 1/0.9 in bfloat16: 1.6e-3
