"""A stack of recurrent layers over a sequence, behind one interface, in each implementation.

Every stack maps ``(x, state) -> (y, state)``: x (B, T, E), y (B, T, H) the top layer's hidden states, and a
state the tuple (h,) for RNN and GRU or (h, c) for LSTM, each (L, B, H). All have torch's parameters:
``weight_ih_l{k}``, ``weight_hh_l{k}``, ``bias_ih_l{k}``, ``bias_hh_l{k}`` for layer k.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from charlm.config import ModelConfig
from charlm.errors import ConfigError
from charlm.nn.cells import State, cell_of, input_product
from charlm.nn.kernels.native import kernels, why_no_kernels

Weights = tuple[Tensor, Tensor, Tensor, Tensor]


def choose_implementation(config: ModelConfig, device: torch.device) -> tuple[str, str]:
    """The implementation in which `config` runs on `device`, and why.

    ``auto`` is the fastest that is right there: measured by ``charlm bench``.
    """
    cell = cell_of(config)
    if config.implementation not in ("auto", *cell.implementations):
        raise ConfigError(
            f"model.implementation is {config.implementation!r}, which does not compute {cell.setting}; "
            f"allowed: auto, {', '.join(cell.implementations)}"
        )
    if config.implementation != "auto":
        return config.implementation, "as configured"
    if not cell.builtin:
        return "scratch", f"the only one that computes {cell.setting}"
    if device.type != "cpu":
        return "builtin", f"torch's own is the fastest on {device.type}"
    if kernels(torch.float32):
        return "fused", "with compiled kernels the fastest on the CPU"
    return "builtin", f"no kernels: {why_no_kernels()}"


def make_recurrent(input_size: int, config: ModelConfig) -> nn.Module:
    """The stack that `config` asks for, over inputs of `input_size`; its weights are not initialised here.

    config: its implementation is chosen already, no longer ``auto``.
    """
    if config.implementation == "scratch":
        return Scratch(input_size, config)
    if config.implementation == "fused":
        return Fused(input_size, config)
    # torch warns of dropout in a single layer: it drops between layers only.
    dropout = config.dropout if config.num_layers > 1 else 0.0
    if config.weight_dropout or (config.locked_dropout and dropout):
        return BuiltinLayers(input_size, config)
    builtin = cell_of(config).builtin
    assert builtin  # `choose_implementation` has checked it
    sizes = (input_size, config.hidden_size, config.num_layers)
    return builtin.module(*sizes, batch_first=True, dropout=dropout, **builtin.options)


class Characters(NamedTuple):
    """Characters as a stack's input, in place of their vectors, for a stack that looks up products instead.

    ids: (B, T), or with time first (T, B).
    table: what each character is read as, (V, E); None where that is one-hot.
    """

    ids: Tensor
    table: Tensor | None

    def flip(self, axis: int) -> "Characters":
        """The characters in the opposite order along `axis`."""
        return Characters(self.ids.flip(axis), self.table)

    def transpose(self, first: int, second: int) -> "Characters":
        """The characters with two axes exchanged."""
        return Characters(self.ids.transpose(first, second), self.table)


class Stack(nn.Module):
    """The parameters of a stack, its dropout, and its course: step by step or not is for `layer` to say."""

    def __init__(self, input_size: int, config: ModelConfig):
        super().__init__()
        self.num_layers, self.dropout = config.num_layers, config.dropout
        self.locked_dropout, self.weight_dropout = config.locked_dropout, config.weight_dropout
        self.cell = cell_of(config)
        H, rows = config.hidden_size, self.cell.gates * config.hidden_size
        for k in range(config.num_layers):
            self.register_parameter(
                f"weight_ih_l{k}", nn.Parameter(torch.empty(rows, H if k else input_size))
            )
            self.register_parameter(f"weight_hh_l{k}", nn.Parameter(torch.empty(rows, H)))
            self.register_parameter(f"bias_ih_l{k}", nn.Parameter(torch.empty(rows)))
            self.register_parameter(f"bias_hh_l{k}", nn.Parameter(torch.empty(rows)))

    def weights(self, k: int) -> Weights:
        """W_ih, W_hh, b_ih and b_hh of layer k for a forward pass: to be asked for once in each.

        In training each number of W_hh is dropped with probability ``weight_dropout``, for all steps and
        streams alike (DropConnect: Wan et al. 2013; on W_hh: Merity, Keskar & Socher 2018).
        """
        W_ih, W, b_ih, b_hh = (
            getattr(self, f"{name}_l{k}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        if not (self.training and self.weight_dropout):
            return W_ih, W, b_ih, b_hh
        W_hh = once((self, "W_hh", k), lambda: dropped(W, self.weight_dropout))
        return W_ih, W_hh, b_ih, b_hh

    def drop(self, y: Tensor, k: int) -> Tensor:
        """Dropout on y (T, B, H) on its way into layer k."""
        if self.training and self.locked_dropout:
            return locked(y, self.dropout, 0, (self, "y", k))
        return dropped(y, self.dropout) if self.training else y

    def forward(self, x: "Tensor | Characters", state: State) -> tuple[Tensor, State]:
        """x (B, T, E) and a state of (L, B, H) tensors; y (B, T, H) and the state after the last step.

        Raises `ValueError` for a state of other sizes, which could be broadcast in silence.
        """
        y: Any = x.transpose(0, 1)
        expected = self.num_layers, (y.ids if isinstance(y, Characters) else y).shape[1]
        for tensor in state:
            if tensor.shape[:2] != expected:
                raise ValueError(f"a state is of tensors {(*expected, 'H')}, not {tuple(tensor.shape)}")
        last = []
        for k in range(self.num_layers):
            if k:
                y = self.drop(y, k)
            y, layer_state = self.layer(y, tuple(tensor[k] for tensor in state), self.weights(k))
            last.append(layer_state)
        return y.transpose(0, 1), tuple(torch.stack(tensors) for tensors in zip(*last, strict=True))

    def layer(self, x: Tensor, state: State, weights: Weights) -> tuple[Tensor, State]:
        """One layer: x (T, B, E or H) and a state of (B, H) tensors; y (T, B, H) and the state after."""
        raise NotImplementedError


class Scratch(Stack):
    """The equations of `cells`, step after step, layer after layer; autograd does the rest."""

    def layer(self, x: Tensor, state: State, weights: Weights) -> tuple[Tensor, State]:
        """x (T, B, E or H) and a state of (B, H) tensors; y (T, B, H) and the state after the last step."""
        W_ih, W_hh, b_ih, b_hh = weights
        outputs = []
        for a in input_product(x, W_ih, b_ih).unbind(0):
            state = self.cell.step(a, state, W_hh, b_hh)
            outputs.append(state[0])
        return torch.stack(outputs), state


class Fused(Stack):
    """The sequences of `fused`, a layer at a time; layer 0 reads `Characters` too."""

    def layer(self, x: Tensor | Characters, state: State, weights: Weights) -> tuple[Tensor, State]:
        """x (T, B, E or H) or characters (T, B), a state of (B, H); y (T, B, H) and the state after."""
        W_ih, W_hh, b_ih, b_hh = weights
        # All biases are added to the input's part, except one that a gate multiplies: the GRU's b_hn.
        inner: tuple[Tensor, ...] = ()
        if self.cell.inner_bias:
            H = W_hh.shape[1]
            inner = (b_hh[-H:],)
            b_hh = F.pad(b_hh[:-H], (0, H))
        bias = b_ih + b_hh
        ids = None
        if isinstance(x, Tensor):
            share = F.linear(x, W_ih, bias)
        elif x.table is None:
            share, ids = W_ih.t() + bias, x.ids
        elif x.ids.numel() < len(x.table):  # fewer products than the table of all
            share = F.linear(F.embedding(x.ids, x.table), W_ih, bias)
        else:
            share, ids = F.linear(x.table, W_ih, bias), x.ids
        if torch.is_autocast_enabled(share.device.type):
            share = share.to(torch.get_autocast_dtype(share.device.type))
        W_hh = W_hh.to(share.dtype)
        assert self.cell.fused  # `choose_implementation` has checked it
        y, *last = self.cell.fused.sequence(share, ids, W_hh, *inner, *state)
        return y, tuple(last)


class BuiltinLayers(Stack):
    """What `torch.nn`'s modules call, a layer at a time: they take neither other weights nor locked masks."""

    def layer(self, x: Tensor, state: State, weights: Weights) -> tuple[Tensor, State]:
        """x (T, B, E or H) and a state of (B, H) tensors; y (T, B, H) and the state after the last step."""
        before = tuple(tensor[None] for tensor in state)  # a state of one layer, (1, B, H)
        hx = before if len(before) == 2 else before[0]
        # with biases, 1 layer, without dropout, in training or not, in one direction, time first
        assert self.cell.builtin  # `choose_implementation` has checked it
        y, *last = self.cell.builtin.layer(x, hx, weights, True, 1, 0.0, self.training, False, False)
        return y, tuple(tensor[0] for tensor in last)


_drawn: ContextVar[dict[object, Tensor] | None] = ContextVar("_drawn", default=None)


def dropped(y: Tensor, p: float) -> Tensor:
    """y, each number dropped with probability p or else scaled by 1 / (1 - p) (Srivastava et al. 2014).

    On the CPU four numbers share one draw of torch's generator, 16 bits each, for it draws one at a time and
    would take a tenth of a training step; p is rounded to 1/65536 there.
    """
    if not p:
        return y
    if y.device.type != "cpu":
        return F.dropout(y, p)
    bits = torch.empty(-(-y.numel() // 4), dtype=torch.int64, device=y.device).random_(-(2**63), None)
    kept = bits.view(torch.int16)[: y.numel()].view(y.shape) >= min(round(p * 2**16), 2**16 - 1) - 2**15
    return y * kept.to(y.dtype).mul_(1 / (1 - p))


@contextmanager
def one_sequence() -> Iterator[None]:
    """All forward passes within are of one sequence and share what lasts as long."""
    token = _drawn.set({})
    try:
        yield
    finally:
        _drawn.reset(token)


def once(key: object, draw: Callable[[], Tensor]) -> Tensor:
    """What `draw` gives, within `one_sequence` the same for the same `key`."""
    drawn = _drawn.get()
    if drawn is None:
        return draw()
    if key not in drawn:
        drawn[key] = draw()
    return drawn[key]


def locked(y: Tensor, p: float, time: int, key: object) -> Tensor:
    """Variational dropout (Gal & Ghahramani 2016): one mask a stream and unit for all steps.

    y (T, B, H) or (B, T, H), `time` naming the axis; what is kept is scaled by 1 / (1 - p).
    """
    shape = [1 if axis == time else size for axis, size in enumerate(y.shape)]
    return y * once(key, lambda: dropped(y.new_ones(shape), p))
