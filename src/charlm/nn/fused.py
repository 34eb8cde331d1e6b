"""RNN, LSTM and GRU over a whole sequence in one call, with the backward pass derived by hand.

The equations and letters are those of `cells`. The input's part of all steps, x_t = W_ih input_t + b, is
computed before; for characters it is a table of V rows, and `ids` holds the rows of each step. A step forward
has one product, h_{t-1} W_hhᵀ. A step backward computes da_t, the gradient of the gates' sums, and has one
product, da_t W_hh, the gradient of h_{t-1}; after all steps, dW_hh = Σ_t da_tᵀ h_{t-1}.

`kernels.c` computes a layer over all steps in one call. In bfloat16 the products' operands and the gates are
bfloat16; sums, arithmetic and the state c (of the GRU: h) are float32. T time, B batch, G gates.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from charlm.nn.functional import check_ids, product
from charlm.nn.kernels.native import Kernels, kernels

Ids = Tensor | None
_RNN, _RELU, _LSTM, _GRU = range(4)  # the cells' numbers in kernels_sequences.c


def rnn(x: Tensor, ids: Ids, W_hh: Tensor, h: Tensor, relu: bool = False) -> tuple[Tensor, Tensor]:
    """The simple recurrent network, h_t = tanh(x_t + W_hh h_{t-1}) or max(0, ·), over all steps.

    x: the input's part of each step with both biases, (T, B, H); or, with ids (T, B), a table (V, H) of it.
    W_hh: (H, H); it is rounded to x's type, its gradient is not. h: the state before, (B, H).

    Returns y (T, B, H), all h_t, and the last h_t.
    """
    y, _ = _sequence(_RELU if relu else _RNN, x, ids, W_hh, None, h, None)
    return y, y[-1]


def lstm(x: Tensor, ids: Ids, W_hh: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The long short-term memory over all steps; x, ids and W_hh as in `rnn`, with G = 4: i, f, g, o.

    Returns y (T, B, H), all h_t, and the state (h, c) after the last step, c in float32 or float64.
    """
    y, last = _sequence(_LSTM, x, ids, W_hh, None, h, c)
    return y, y[-1], last


def gru(x: Tensor, ids: Ids, W_hh: Tensor, b_hn: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The gated recurrent unit, reset after the product, over all steps; G = 3: r, z, n.

    b_hn: the bias of W_hn h_{t-1}, (H,), which r_t multiplies; all other biases are in x.

    Returns y (T, B, H), all h_t, and the last h_t, in float32 or float64.
    """
    return _sequence(_GRU, x, ids, W_hh, b_hn, h, h)


def _sequence(
    cell: int, x: Tensor, ids: Ids, W_hh: Tensor, b_hn: Tensor | None, h: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return y and the last state, c or h in the type of arithmetic; for RNNs y again."""
    wide = _kernels(x).wide
    state, b_hn = (None if each is None else each.to(wide).contiguous() for each in (state, b_hn))
    if ids is not None:
        check_ids(ids, len(x))
        ids = ids.long().contiguous()
    inputs = (cell, x.contiguous(), ids, W_hh, b_hn, h, state)
    if torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in inputs):
        return _Sequence.apply(*inputs)  # type: ignore[no-any-return, no-untyped-call]
    y, states, _ = _forward(*inputs, keep=False)
    return y[1:], y if states is None else states[-1]


def _forward(
    cell: int, x: Tensor, ids: Ids, W_hh: Tensor, b_hn: Ids, h: Tensor, state: Ids, keep: bool
) -> tuple[Tensor, Ids, Ids]:
    """Return y (T + 1, B, H) with the h before; and with `keep` all states and gates, else the last state."""
    (T, B), H = (x if ids is None else ids).shape[:2], W_hh.shape[1]
    y = x.new_empty(T + 1, B, H)
    y[0] = h
    states = gates = None
    if state is not None:
        if cell == _GRU and x.dtype == state.dtype:
            states = y
        else:
            states = state.new_empty(T + 1 if keep else 1, B, H)
            states[0] = state
        gates = x.new_empty(T, B, 4 * H) if keep else None
    step = B * H if states is not None and len(states) > 1 else 0
    tensors = {"x": x, "ids": ids, "b_hn": b_hn, "y": y, "state": states, "gates": gates}
    _kernels(x).sequence(False, cell, W_hh, T=T, B=B, state_step=step, **tensors)
    return y, states, gates


class _Sequence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, cell: int, x: Tensor, ids: Ids, W_hh: Tensor, b_hn: Ids, h: Tensor, state: Ids
    ) -> tuple[Tensor, Tensor]:
        y, states, gates = _forward(cell, x, ids, W_hh, b_hn, h, state, keep=True)
        ctx.save_for_backward(ids, W_hh, y, states, gates)
        ctx.cell, ctx.rows = cell, len(x)
        # Copied: a caller may change it, and the backward pass reads this memory.
        return y[1:], y.new_empty(0) if states is None else states[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        ids, W_hh, y, states, gates = ctx.saved_tensors
        cell, (T, B, H) = ctx.cell, dy.shape
        dy, found = dy.contiguous(), _kernels(y)
        dx = y.new_empty(T, B, len(W_hh))
        du = torch.empty_like(dx) if cell == _GRU else dx
        dh = dy.new_zeros(B, H, dtype=found.wide)
        dstate = None if states is None else dlast.clone(memory_format=torch.contiguous_format)
        results = {"dx": dx, "du": du, "dh": dh, "dstate": dstate}
        found.sequence(True, cell, W_hh, T=T, B=B, y=y, state=states, gates=gates, dy=dy, **results)
        db_hn = du[..., 2 * H :].sum((0, 1), dtype=found.wide) if cell == _GRU else None
        dW_hh = product(du.flatten(0, 1).t(), y[:-1].flatten(0, 1), W_hh.dtype)  # Σ_t du_tᵀ h_{t-1}
        if ids is not None:  # the gradient of the table: the sum over the steps that used a row
            dx = found.gather(dx.flatten(0, 1), ids, ctx.rows).to(dx.dtype)
        return None, dx, None, dW_hh, db_hn, dh, dstate


def _kernels(tensor: Tensor) -> Kernels:
    found = kernels(tensor.dtype) if tensor.device.type == "cpu" else None
    if found is None:
        raise RuntimeError(f"there are no kernels for {tensor.dtype} on {tensor.device.type}")
    return found
