"""RNN, LSTM and GRU: the equations of one time step, and one `Cell` record for each.

x_t is the input at step t, of shape (B, E), and h_{t-1} the state before it, (B, H). The input's part of a
step, a_t = W_ih x_t + b_ih of shape (B, G·H) for G gates, does not depend on the state: it is computed for
all steps in one product, and a step function receives it. Weights have torch's names, shapes and gate order:
W_ih (G·H, E), W_hh (G·H, H), biases (G·H,).

A `Cell` holds everything that differs between cells; all other code asks `cell_of` for the record.
`register` adds a cell: with a name, a number of gates and a step it runs in the implementation ``scratch``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from charlm import config as configuration
from charlm.config import ModelConfig
from charlm.nn import fused

State = tuple[Tensor, ...]
Step = Callable[[Tensor, State, Tensor, Tensor], State]


def rnn_tanh(a: Tensor, state: State, W_hh: Tensor, b_hh: Tensor) -> State:
    """Compute one step of the simple recurrent network (Elman 1990).

    h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)
    """
    (h,) = state
    return (torch.tanh(a + linear(h, W_hh, b_hh)),)


def rnn_relu(a: Tensor, state: State, W_hh: Tensor, b_hh: Tensor) -> State:
    """Compute one step of the simple recurrent network of rectified linear units (Le, Jaitly & Hinton 2015).

    h_t = max(0, W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)
    """
    (h,) = state
    return (torch.relu(a + linear(h, W_hh, b_hh)),)


def lstm(a: Tensor, state: State, W_hh: Tensor, b_hh: Tensor) -> State:
    """Compute one step of the long short-term memory (Hochreiter & Schmidhuber 1997; Gers et al. 2000).

    i_t = σ(W_ii x_t + b_ii + W_hi h_{t-1} + b_hi)      input gate
    f_t = σ(W_if x_t + b_if + W_hf h_{t-1} + b_hf)      forget gate
    g_t = tanh(W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)   candidate
    o_t = σ(W_io x_t + b_io + W_ho h_{t-1} + b_ho)      output gate
    c_t = f_t ⊙ c_{t-1} + i_t ⊙ g_t
    h_t = o_t ⊙ tanh(c_t)

    The rows of the weights hold the gates in the order i, f, g, o.
    """
    h, c = state
    i, f, g, o = (a + linear(h, W_hh, b_hh)).chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return h, c


def gru(a: Tensor, state: State, W_hh: Tensor, b_hh: Tensor) -> State:
    """Compute one step of the gated recurrent unit, reset after the recurrent product, as in torch and cuDNN.

    r_t = σ(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)             reset gate
    z_t = σ(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)             update gate
    n_t = tanh(W_in x_t + b_in + r_t ⊙ (W_hn h_{t-1} + b_hn))  candidate
    h_t = (1 - z_t) ⊙ n_t + z_t ⊙ h_{t-1}

    The rows of the weights hold the gates in the order r, z, n.
    """
    (h,) = state
    a_r, a_z, a_n = a.chunk(3, dim=-1)
    u_r, u_z, u_n = linear(h, W_hh, b_hh).chunk(3, dim=-1)
    r = torch.sigmoid(a_r + u_r)
    z = torch.sigmoid(a_z + u_z)
    n = torch.tanh(a_n + r * u_n)
    return ((1 - z) * n + z * h,)


def gru_reset_before(a: Tensor, state: State, W_hh: Tensor, b_hh: Tensor) -> State:
    """Compute one step of the gated recurrent unit, reset before the recurrent product (Cho et al. 2014).

    r_t, z_t and h_t as in `gru`;
    n_t = tanh(W_in x_t + b_in + W_hn (r_t ⊙ h_{t-1}) + b_hn)
    """
    (h,) = state
    H = h.shape[-1]
    r, z = torch.sigmoid(a[..., : 2 * H] + linear(h, W_hh[: 2 * H], b_hh[: 2 * H])).chunk(2, dim=-1)
    n = torch.tanh(a[..., 2 * H :] + linear(r * h, W_hh[2 * H :], b_hh[2 * H :]))
    return ((1 - z) * n + z * h,)


class Builtin(NamedTuple):
    """How torch computes a cell."""

    name: str  # of the class in torch.nn
    module: Callable[..., nn.Module]  # a stack of layers; its state is a tuple of tensors
    layer: Callable[..., State]  # the function that computes one layer
    options: Mapping[str, Any] = {}  # for the class


class Fused(NamedTuple):
    """How `fused` computes a cell."""

    sequence: Callable[..., State]  # (x, ids, W_hh, b_hn if inner_bias, *state) -> (y, *state)
    kernel: int  # the cell's number in kernels_writing.c


class Onnx(NamedTuple):
    """How ONNX computes a cell."""

    op: str
    order: tuple[int, ...]  # ONNX's gates as indices into torch's
    attributes: Mapping[str, Any] = {}  # those whose default is not charlm's


@dataclass(frozen=True)
class Cell:
    """Everything that differs between cells.

    name: the value of ``model.cell``.
    gates: the number G of blocks of H rows in the weights.
    step: one time step, (a_t, state, W_hh, b_hh) -> state; the first tensor of a state is the output.
    state: the names of a state's tensors.
    forget_gate: the gate whose bias ``model.forget_bias`` sets, counted from 0.
    inner_bias: whether another gate multiplies the last gate's b_hh, which then cannot be added to b_ih.
    smooth: whether the step has a derivative everywhere.
    builtin, fused, onnx: None where torch, `fused` or ONNX does not compute the cell.
    variant: the setting in addition to ``model.cell`` that selects this record.
    """

    name: str
    gates: int
    step: Step
    state: tuple[str, ...] = ("h",)
    forget_gate: int | None = None
    inner_bias: bool = False
    smooth: bool = True
    builtin: Builtin | None = None
    fused: Fused | None = None
    onnx: Onnx | None = None
    variant: str = ""

    @property
    def setting(self) -> str:
        """The line of a configuration that selects this record."""
        return f"model.{self.variant or f'cell: {self.name}'}"

    @property
    def implementations(self) -> tuple[str, ...]:
        """The values of ``model.implementation`` that compute this cell."""
        others = {"builtin": self.builtin, "fused": self.fused}
        return "scratch", *(name for name, how in others.items() if how)


class _TupleState(nn.Module):
    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        y, h = super().forward(x, *state)
        return y, (h,)


class _BuiltinRNN(_TupleState, nn.RNN):  # type: ignore[misc]
    """`torch.nn.RNN` with the state as a tuple."""


class _BuiltinGRU(_TupleState, nn.GRU):  # type: ignore[misc]
    """`torch.nn.GRU` with the state as a tuple."""


_RNN = Cell(
    name="rnn",
    gates=1,
    step=rnn_tanh,
    builtin=Builtin("RNN", _BuiltinRNN, torch.rnn_tanh, {"nonlinearity": "tanh"}),
    fused=Fused(fused.rnn, 0),
    onnx=Onnx("RNN", (0,), {"activations": ["Tanh"]}),
)
_RNN_RELU = replace(
    _RNN,
    variant="nonlinearity: relu",
    step=rnn_relu,
    smooth=False,
    builtin=Builtin("RNN", _BuiltinRNN, torch.rnn_relu, {"nonlinearity": "relu"}),
    fused=Fused(partial(fused.rnn, relu=True), 1),
    onnx=Onnx("RNN", (0,), {"activations": ["Relu"]}),
)
_LSTM = Cell(
    name="lstm",
    gates=4,
    step=lstm,
    state=("h", "c"),
    forget_gate=1,
    builtin=Builtin("LSTM", nn.LSTM, torch.lstm),
    fused=Fused(fused.lstm, 2),
    onnx=Onnx("LSTM", (0, 3, 1, 2)),  # i, o, f, c of i, f, g, o
)
_GRU = Cell(
    name="gru",
    gates=3,
    step=gru,
    inner_bias=True,
    builtin=Builtin("GRU", _BuiltinGRU, torch.gru),
    fused=Fused(fused.gru, 3),
    onnx=Onnx("GRU", (1, 0, 2), {"linear_before_reset": 1}),  # z, r, h of r, z, n
)
_GRU_RESET_BEFORE = replace(
    _GRU,
    variant="gru_reset: before",
    step=gru_reset_before,
    inner_bias=False,
    builtin=None,
    fused=None,
    onnx=Onnx("GRU", (1, 0, 2), {"linear_before_reset": 0}),
)

CELLS = {cell.name: cell for cell in (_RNN, _LSTM, _GRU)}


def cell_of(config: ModelConfig) -> Cell:
    """Return the record of the cell that `config` names."""
    if config.cell == "rnn" and config.nonlinearity == "relu":
        return _RNN_RELU
    if config.cell == "gru" and config.gru_reset == "before":
        return _GRU_RESET_BEFORE
    return CELLS[config.cell]


def register(cell: Cell) -> None:
    """Add `cell`, so that ``model.cell`` may name it; raises `ValueError` if the name is taken."""
    if cell.name in CELLS:
        raise ValueError(f"a cell named {cell.name!r} is registered already")
    CELLS[cell.name] = cell
    configuration.CELL_NAMES.append(cell.name)
