"""Products, dropout and the loss of a training step: by the kernels where they exist, else by torch."""

import functools
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from charlm.nn.device import multiplies_tiles
from charlm.nn.kernels.native import Kernels, kernels

_LONG = 1024


def linear(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """Return x Wᵀ + b, (…, N), for x (…, K), W (N, K) and b (N,), by the processor's fastest product.

    Under autocast the operands and the result are in its type; the gradients are not rounded to it.
    """
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    if x.device.type == "cpu" and _multiplies(dtype):
        return _in_memory_order(lambda y: _Linear.apply(y, W, b, dtype), x)  # type: ignore[no-untyped-call]
    return _in_memory_order(lambda y: F.linear(y, W, b), x)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a b, (M, N), in `dtype` for a (M, K) and b (K, N), by the processor's fastest product."""
    found = _multiplies(a.dtype) if a.device.type == "cpu" else None
    # The kernels do not divide the sums of a rounded result into pieces that fit the cache; torch does.
    if found and (dtype == found.wide or a.shape[1] <= _LONG):
        return found.multiply(a, b, wide=dtype == found.wide).to(dtype)
    return (a @ b).to(dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        found = _multiplies(dtype)
        assert found
        ctx.types = x.dtype, W.dtype, b.dtype
        x, W = x.to(dtype), W.to(dtype)
        ctx.save_for_backward(x, W)
        return found.multiply(x.flatten(0, -2), W.t(), b).view(*x.shape[:-1], len(W))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, W), wanted, rows = ctx.saved_tensors, ctx.needs_input_grad, dy.flatten(0, -2)
        x_type, W_type, b_type = ctx.types
        return (
            product(rows, W, x_type).view(x.shape) if wanted[0] else None,
            product(rows.t(), x.flatten(0, -2), W_type) if wanted[1] else None,
            product(rows.new_ones(1, len(rows)), rows, b_type)[0] if wanted[2] else None,  # `sum` is slow
            None,
        )


@functools.cache
def _multiplies(dtype: torch.dtype) -> Kernels | None:
    """Return the kernels if their product of matrices is at least as fast as torch's, else None.

    `torch.mm` calls MKL in float32, which uses AVX-512 on Intel's processors only, and oneDNN in bfloat16,
    whose small products take up to five times as long. The choice depends on the processor and not on a
    measurement, so that a run gives the same numbers each time.
    """
    if dtype not in (torch.float32, torch.bfloat16) or platform.machine().lower() not in ("x86_64", "amd64"):
        return None  # NEON is one unit among others for products
    if dtype == torch.bfloat16 and multiplies_tiles():
        return None
    return kernels(dtype)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of -log p of the targets (…), ids as int64, for logits (…, V); a tensor of shape ().

    It is computed in float32, for float64 logits in float64. Raises `IndexError` for ids that are not below
    V.
    """
    if logits.dim() == 3 and logits.transpose(0, 1).is_contiguous():  # as `_in_memory_order`
        logits, targets = logits.transpose(0, 1), targets.transpose(0, 1)
    logits, targets = logits.flatten(0, -2), targets.flatten()
    if _kernels(logits):
        check_ids(targets, logits.shape[1])
        return _CrossEntropy.apply(logits.contiguous(), targets.contiguous())  # type: ignore[no-any-return, no-untyped-call]
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)


def check_ids(ids: Tensor, rows: int) -> None:
    """Raise `IndexError` unless all ids are from 0 to rows - 1, which the kernels do not check."""
    if ids.numel() and not 0 <= (found := torch.aminmax(ids)).min <= found.max < rows:
        raise IndexError(f"ids must be from 0 to {rows - 1}")


class _CrossEntropy(torch.autograd.Function):
    """The gradient, (softmax - one-hot) / M, is computed with the loss."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        found = _kernels(logits)
        assert found
        d = torch.empty_like(logits)
        ctx.save_for_backward(d)
        return found.cross_entropy(logits, targets, d).mean()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None]:
        (d,) = ctx.saved_tensors
        return d * dloss.to(d.dtype), None


def dropped(y: Tensor, p: float) -> Tensor:
    """Return y with dropout: each number is 0 with probability p, else y / (1 - p) (Srivastava et al. 2014).

    On the CPU the kernels draw one number from torch's generator, from which the whole mask follows: one draw
    for each number takes a tenth of a training step.
    """
    if not p:
        return y
    if _kernels(y):
        seed = int(torch.empty((), dtype=torch.int64).random_(-(2**63), None))
        return _in_memory_order(lambda x: _Dropped.apply(x, p, seed), y)  # type: ignore[no-untyped-call]
    return F.dropout(y, p) if y.device.type != "cpu" else _scaled(y, _kept(y, p), p)


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, p: float, seed: int) -> Tensor:
        found = _kernels(y)
        assert found
        ctx.options = p, seed
        return found.drop(y, p, seed)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _Dropped.apply(dy.contiguous(), *ctx.options), None, None  # type: ignore[no-untyped-call]


def _kernels(tensor: Tensor) -> Kernels | None:
    return kernels(tensor.dtype) if tensor.device.type == "cpu" else None


def _in_memory_order(function: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    """Return function(y), computed on contiguous memory.

    A stack's output (B, T, H) has the time first in memory; the axes are then swapped instead of copied.
    """
    if y.dim() == 3 and not y.is_contiguous() and y.transpose(0, 1).is_contiguous():
        return function(y.transpose(0, 1)).transpose(0, 1)
    return function(y.contiguous())


def _kept(y: Tensor, p: float) -> Tensor:
    """Draw a mask of y's shape and type: 0 with probability p, else 1."""
    return torch.empty_like(y).bernoulli_(1 - p)


def _scaled(y: Tensor, kept: Tensor, p: float) -> Tensor:
    """Return y ⊙ kept / (1 - p); the scale is not rounded to y's type, which would shrink it by 0.2%."""
    return torch.addcmul(y.new_zeros(()), y, kept, value=1 / (1 - p))


_drawn: ContextVar[dict[object, Tensor] | None] = ContextVar("_drawn", default=None)


@contextmanager
def one_sequence() -> Iterator[None]:
    """All forward passes inside are of one sequence and share the masks that `once` draws."""
    token = _drawn.set({})
    try:
        yield
    finally:
        _drawn.reset(token)


def once(key: object, draw: Callable[[], Tensor]) -> Tensor:
    """Return draw(); inside `one_sequence`, draw once for each `key`."""
    drawn = _drawn.get()
    if drawn is None:
        return draw()
    if key not in drawn:
        drawn[key] = draw()
    return drawn[key]


def locked(y: Tensor, p: float, time: int, key: object) -> Tensor:
    """Return y with variational dropout (Gal & Ghahramani 2016): one mask for all steps of a stream and unit.

    y: (T, B, H) or (B, T, H); `time` is the axis T. Numbers that are not dropped are scaled by 1 / (1 - p).
    """
    if not p:
        return y
    shape = [1 if axis == time else size for axis, size in enumerate(y.shape)]
    return _scaled(y, once(key, lambda: _kept(y.new_empty(shape), p)), p)
