"""RNN, LSTM and GRU over a whole sequence, with the backward pass derived by hand.

The equations and letters are those of `cells`. The input's part of all steps, x_t = W_ih input_t + b, is
computed before; for characters it is a table of V rows, and `ids` holds the rows of each step. A step has one
product, h_{t-1} W_hhᵀ, whose memory then receives the gates. The backward loop computes da_t, the gradient of
the gates' sums, and one product, da_t W_hh, the gradient of h_{t-1}; after it, dW_hh = Σ_t da_tᵀ h_{t-1}.

On the CPU `kernels.c` does the arithmetic of a step where it can be compiled, else torch does. In bfloat16
products and gates are bfloat16; arithmetic and the state c (of the GRU: h) are float32. T time, B batch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from charlm.nn.kernels.native import Kernels, kernels

Ids = Tensor | None
_HALF = (torch.bfloat16, torch.float16)


def rnn(x: Tensor, ids: Ids, W_hh: Tensor, h: Tensor, relu: bool = False) -> tuple[Tensor, Tensor]:
    """The simple recurrent network, h_t = tanh(x_t + W_hh h_{t-1}) or max(0, ·), over all steps.

    x: the input's part of each step with both biases, (T, B, H); or, with ids (T, B), a table (V, H) of it.
    W_hh: (H, H), in x's type. h: the state before, (B, H).

    Returns y (T, B, H), all h_t, and the last h_t.
    """
    y: Tensor = _RNN.apply(x.contiguous(), _checked(ids, len(x)), W_hh, h, relu)  # type: ignore[no-untyped-call]
    return y, y[-1]


def lstm(x: Tensor, ids: Ids, W_hh: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The long short-term memory over all steps; x, ids and W_hh as in `rnn`, with G = 4: i, f, g, o.

    Returns y (T, B, H), all h_t, and the state (h, c) after the last step, c in float32 or float64.
    """
    c = c.to(_wide_type(x.dtype))
    y, c = _LSTM.apply(x.contiguous(), _checked(ids, len(x)), W_hh, h, c)  # type: ignore[no-untyped-call]
    return y, y[-1], c


def gru(x: Tensor, ids: Ids, W_hh: Tensor, b_hn: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The gated recurrent unit, reset after the product, over all steps; G = 3: r, z, n.

    b_hn: the bias of W_hn h_{t-1}, (H,), which r_t multiplies; all other biases are in x.

    Returns y (T, B, H), all h_t, and the last h_t, in float32 or float64.
    """
    h, b_hn = (tensor.to(_wide_type(x.dtype)).contiguous() for tensor in (h, b_hn))
    y, last = _GRU.apply(x.contiguous(), _checked(ids, len(x)), W_hh, b_hn, h)  # type: ignore[no-untyped-call]
    return y, last


class _RNN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ids: Ids, W_hh: Tensor, h_0: Tensor, relu: bool) -> Tensor:
        (T, B), H = (x if ids is None else ids).shape[:2], W_hh.shape[1]
        steps = steps_for(x)
        h = x.new_empty(T + 1, B, H)
        h[0] = h_0
        multiply, step = steps.product(W_hh.t(), B), steps.bind("rnn_forward", B, H)
        for x_t, ids_t, h_before, h_t in _forwards(steps, x, ids, h[:-1], h[1:]):
            multiply(h_before, h_t)
            step(relu, x_t, ids_t, h_t, h_t)
        ctx.save_for_backward(ids, W_hh, h)
        ctx.relu, ctx.rows = relu, len(x)
        return h[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        ids, W_hh, h = ctx.saved_tensors
        steps, dy, da = steps_for(h), dy.contiguous(), h.new_empty(dy.shape)
        dh = torch.zeros_like(h[0])
        multiply, step = steps.product(W_hh, len(dh)), steps.bind("rnn_backward", *dh.shape)
        at_dh = steps.at(dh)
        for h_t, dy_t, da_t in _backwards(steps, h[1:], dy, da):
            step(ctx.relu, h_t, dy_t, at_dh, da_t)
            multiply(da_t, at_dh)
        return _gathered(da, ids, ctx.rows), None, _over_steps(da, h[:-1]), dh, None


class _LSTM(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, ids: Ids, W_hh: Tensor, h_0: Tensor, c_0: Tensor
    ) -> tuple[Tensor, Tensor]:
        (T, B), H = (x if ids is None else ids).shape[:2], W_hh.shape[1]
        steps = steps_for(x)
        gates = x.new_empty(T, B, 4 * H)
        h, c = x.new_empty(T + 1, B, H), c_0.new_empty(T + 1, B, H)
        h[0], c[0] = h_0, c_0
        multiply, step = steps.product(W_hh.t(), B), steps.bind("lstm_forward", B, H)
        tensors = gates, h[:-1], h[1:], c[:-1], c[1:]
        for x_t, ids_t, gates_t, h_before, h_t, c_before, c_t in _forwards(steps, x, ids, *tensors):
            multiply(h_before, gates_t)
            step(x_t, ids_t, gates_t, c_before, c_t, h_t)
        ctx.save_for_backward(ids, W_hh, gates, h, c)
        ctx.rows = len(x)
        return h[1:], c[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dc: Tensor) -> tuple[Tensor | None, ...]:
        ids, W_hh, gates, h, c = ctx.saved_tensors
        steps, dy, da = steps_for(h), dy.contiguous(), torch.empty_like(gates)
        dh, dc = torch.zeros_like(h[0]), dc.clone(memory_format=torch.contiguous_format)
        multiply, step = steps.product(W_hh, len(dh)), steps.bind("lstm_backward", *dh.shape)
        at_dh, at_dc = steps.at(dh), steps.at(dc)
        for gates_t, c_before, c_t, dy_t, da_t in _backwards(steps, gates, c[:-1], c[1:], dy, da):
            step(gates_t, c_before, c_t, dy_t, at_dh, da_t, at_dc)
            multiply(da_t, at_dh)
        return _gathered(da, ids, ctx.rows), None, _over_steps(da, h[:-1]), dh, dc


class _GRU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, ids: Ids, W_hh: Tensor, b_hn: Tensor, h_0: Tensor
    ) -> tuple[Tensor, Tensor]:
        (T, B), H = (x if ids is None else ids).shape[:2], W_hh.shape[1]
        steps = steps_for(x)
        gates, n = x.new_empty(T, B, 3 * H), x.new_empty(T, B, H)
        h = h_0.new_empty(T + 1, B, H)
        h[0] = h_0
        y = h if h.dtype == x.dtype else h.to(x.dtype)  # the products' operands
        multiply, step = steps.product(W_hh.t(), B), steps.bind("gru_forward", B, H)
        tensors = gates, n, h[:-1], h[1:], y[:-1], y[1:]
        for x_t, ids_t, gates_t, n_t, h_before, h_t, y_before, y_t in _forwards(steps, x, ids, *tensors):
            multiply(y_before, gates_t)
            step(x_t, ids_t, steps.at(b_hn), gates_t, h_before, n_t, h_t, y_t)
        ctx.save_for_backward(ids, W_hh, gates, n, h, y)
        ctx.rows = len(x)
        return y[1:], h[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dh_T: Tensor) -> tuple[Tensor | None, ...]:
        ids, W_hh, gates, n, h, y = ctx.saved_tensors
        H = h.shape[-1]
        steps, dy, dx, du_n = steps_for(y), dy.contiguous(), torch.empty_like(gates), torch.empty_like(n)
        dh, du = torch.zeros_like(y[0]), torch.empty_like(gates[0])
        direct = dh_T.clone(memory_format=torch.contiguous_format)
        multiply, step = steps.product(W_hh, len(dh)), steps.bind("gru_backward", *dh.shape)
        at_dh, at_direct, at_du = steps.at(dh), steps.at(direct), steps.at(du)
        for gates_t, n_t, h_before, dy_t, dx_t, du_n_t in _backwards(steps, gates, n, h[:-1], dy, dx, du_n):
            step(gates_t, n_t, h_before, dy_t, at_dh, at_direct, dx_t, at_du, du_n_t)
            multiply(at_du, at_dh)
        dW_hh = torch.cat([_over_steps(dx[..., : 2 * H], y[:-1]), _over_steps(du_n, y[:-1])])
        return _gathered(dx, ids, ctx.rows), None, dW_hh, du_n.sum((0, 1)), direct + dh


class Steps:
    """The arithmetic of one step on tensors of any type and device; `native.Kernels` has the same, compiled.

    ``x`` and ``ids`` hold the input's part of the step; results are written to the arguments on the left of
    an equation. dy is the gradient of h_t from the layer above, dh that from the next step's product.

    compiled: the kernels that compute the steps between torch's products, or None.
    """

    def __init__(self, compiled: Kernels | None = None):
        self.compiled = compiled

    def at(self, tensor: Tensor) -> Any:
        """Return `tensor` as a step takes it."""
        return tensor

    def each(self, tensor: Tensor) -> Sequence[Any]:
        """Return tensor[t] as a step takes it, for all t."""
        return tensor.unbind(0)

    def bind(self, name: str, B: int, H: int) -> Callable[..., None]:
        """Return the step `name` for a batch of B and H units."""
        if self.compiled is None:
            return getattr(self, name)  # type: ignore[no-any-return]
        step = self.compiled.bind(name, B, H)
        return lambda *arguments: step(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))

    def product(self, W: Tensor, M: int) -> Callable[[Any, Any], object]:
        """Return a function of a (M, K) and out (M, N) that writes a W into out; W (K, N) must not change."""
        return lambda a, out: torch.mm(a, W, out=out)

    def rnn_forward(self, relu: bool, x: Tensor, ids: Ids, u: Tensor, h: Tensor) -> None:
        """h = tanh(x + u) or max(0, x + u), for the recurrent product u."""
        a = _wide(_input_part(x, ids)) + _wide(u)
        h.copy_(a.relu() if relu else a.tanh())

    def rnn_backward(self, relu: bool, h: Tensor, dy: Tensor, dh: Tensor, da: Tensor) -> None:
        """da = (dy + dh) ⊙ (1 - h²), or ⊙ [h > 0]."""
        h, d = _wide(h), _wide(dy) + _wide(dh)
        da.copy_(d * (h > 0) if relu else d * (1 - h * h))

    def lstm_forward(
        self, x: Tensor, ids: Ids, gates: Tensor, c_before: Tensor, c: Tensor, h: Tensor
    ) -> None:
        """gates (B, 4H), in: the recurrent product, out: i, f, g, o.

        c = f ⊙ c_before + i ⊙ g; h = o ⊙ tanh(c).
        """
        i, f, g, o = (_wide(_input_part(x, ids)) + _wide(gates)).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        torch.addcmul(f * c_before, i, g, out=c)
        h.copy_(o * c.tanh())
        gates.copy_(torch.cat([i, f, g, o], -1))

    def lstm_backward(
        self, gates: Tensor, c_before: Tensor, c: Tensor, dy: Tensor, dh: Tensor, da: Tensor, dc: Tensor
    ) -> None:
        """da (B, 4H); dc, in: the gradient of c_t from the step after, out: that of c_before."""
        i, f, g, o = _wide(gates).chunk(4, -1)
        d, tanh_c = _wide(dy) + _wide(dh), c.tanh()
        d_c = dc + d * o * (1 - tanh_c * tanh_c)
        parts = (d_c * g * i * (1 - i), d_c * c_before * f * (1 - f), d_c * i * (1 - g * g))
        da.copy_(torch.cat([*parts, d * tanh_c * o * (1 - o)], -1))
        torch.mul(d_c, f, out=dc)

    def gru_forward(self, x: Tensor, ids: Ids, b_hn: Tensor, *tensors: Tensor) -> None:
        """gates (B, 3H), in: the recurrent product, out: r, z, u = W_hn h_before + b_hn.

        n = tanh(x_n + r ⊙ u); h = n + z ⊙ (h_before - n). y is h, or its copy in the products' type.
        """
        gates, h_before, n, h, y = tensors
        H = h.shape[-1]
        x_t, products = _wide(_input_part(x, ids)), _wide(gates)
        r, z = (x_t[:, : 2 * H] + products[:, : 2 * H]).sigmoid().chunk(2, -1)
        u = products[:, 2 * H :] + b_hn
        candidate = (x_t[:, 2 * H :] + r * u).tanh()
        torch.addcmul(candidate, z, h_before - candidate, out=h)
        n.copy_(candidate)
        gates.copy_(torch.cat([r, z, u], -1))
        if y is not h:
            y.copy_(h)

    def gru_backward(self, *tensors: Tensor) -> None:
        """dx (B, 3H) of the input's part, du (B, 3H) of the recurrent product, du_n its last third again.

        direct: the part of the gradient of h that comes through no product, in: of h_t, out: of h_before.
        """
        gates, n, h_before, dy, dh, direct, dx, du, du_n = tensors
        (r, z, u), n = _wide(gates).chunk(3, -1), _wide(n)
        d = _wide(dy) + _wide(dh) + direct
        dn = d * (1 - z) * (1 - n * n)
        dr, dz = dn * u * r * (1 - r), d * (h_before - n) * z * (1 - z)
        dx.copy_(torch.cat([dr, dz, dn], -1))
        du.copy_(torch.cat([dr, dz, dn * r], -1))
        du_n.copy_(dn * r)
        torch.mul(d, z, out=direct)


def steps_for(tensor: Tensor) -> "Steps | Kernels":
    """Return the compiled steps for `tensor`'s type and device if there are any, else torch's."""
    found = kernels(tensor.dtype) if tensor.device.type == "cpu" else None
    return found if found and found.multiplies else Steps(found)


def _wide_type(dtype: torch.dtype) -> torch.dtype:
    """Return the type of arithmetic and states: float32 for the half types."""
    return torch.float32 if dtype in _HALF else dtype


def _wide(tensor: Tensor) -> Tensor:
    """Return `tensor` in the type of arithmetic."""
    return tensor.to(_wide_type(tensor.dtype))


def _input_part(x: Tensor, ids: Ids) -> Tensor:
    """Return the input's part of a step: x (B, N), or the rows ids (B,) of the table x (V, N)."""
    return x if ids is None else x[ids]


def _checked(ids: Ids, rows: int) -> Ids:
    """Return ids as int64 in contiguous memory; the kernels do not check that they are rows of the table."""
    if ids is None:
        return None
    if ids.device.type == "cpu" and ids.numel() and not 0 <= ids.min() <= ids.max() < rows:
        raise IndexError(f"ids must be from 0 to {rows - 1}")
    return ids.long().contiguous()


def _forwards(steps: "Steps | Kernels", x: Tensor, ids: Ids, *tensors: Tensor) -> Any:
    """Return the input's part, the ids of its rows or None, and the tensors at each step."""
    T = len(tensors[0])
    inputs = (steps.each(x), [None] * T) if ids is None else ([steps.at(x)] * T, steps.each(ids))
    return zip(*inputs, *map(steps.each, tensors), strict=True)


def _backwards(steps: "Steps | Kernels", *tensors: Tensor) -> Any:
    """Return the tensors at each step, from the last to the first."""
    return zip(*(reversed(steps.each(tensor)) for tensor in tensors), strict=True)


def _over_steps(da: Tensor, h: Tensor) -> Tensor:
    """Return Σ_t da_tᵀ h_t, (N, H), for da (T, B, N) and h (T, B, H)."""
    return da.flatten(0, 1).t() @ h.flatten(0, 1)


def _gathered(da: Tensor, ids: Ids, rows: int) -> Tensor:
    """Return the gradient of x: da, or for a table (V, N) the sum over the steps that used a row."""
    if ids is None:
        return da
    if da.dtype in _HALF:  # sums in a half type would lose small parts; products sum in float32
        if rows <= 256:
            return F.one_hot(ids.flatten(), rows).to(da.dtype).t() @ da.flatten(0, 1)
        da = da.float()
    gathered: Tensor = torch.ops.aten.embedding_dense_backward(da, ids, rows, -1, False)
    return gathered
