"""A stack of recurrent layers, in each implementation.

Every stack maps ``(x, state) -> (y, state)``: x (B, T, E), y (B, T, H) the hidden states of the top layer,
and a state the tuple (h,) for RNN and GRU or (h, c) for LSTM, each (L, B, H). All have torch's parameters:
``weight_ih_l{k}``, ``weight_hh_l{k}``, ``bias_ih_l{k}``, ``bias_hh_l{k}`` for layer k.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from charlm.config import ModelConfig
from charlm.errors import ConfigError
from charlm.nn.cells import State, cell_of
from charlm.nn.functional import dropped, linear, locked, once
from charlm.nn.kernels.native import kernels, load

WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")  # torch's names, without the layer
Weights = tuple[Tensor, Tensor, Tensor, Tensor]


def choose_implementation(config: ModelConfig, device: torch.device) -> tuple[str, str]:
    """Return the implementation in which `config` runs on `device`, and the reason.

    ``auto`` is the fastest one that computes the cell there, as measured by ``charlm bench``. Where there are
    no compiled kernels, ``fused`` is replaced by ``builtin``, with the same results to rounding.

    Raises `ConfigError` for an implementation that does not compute the cell.
    """
    cell = cell_of(config)
    if config.implementation not in ("auto", *cell.implementations):
        raise ConfigError(
            f"model.implementation is {config.implementation!r}, which does not compute {cell.setting}; "
            f"allowed: auto, {', '.join(cell.implementations)}"
        )
    if config.implementation in ("scratch", "builtin"):
        return config.implementation, "as configured"
    if cell.fused and device.type == "cpu" and kernels(torch.float32):
        fastest = "the fastest on the CPU with compiled kernels"
        return "fused", fastest if config.implementation == "auto" else "as configured"
    if not cell.builtin:
        return "scratch", f"the only one that computes {cell.setting}"
    if device.type != "cpu":
        return "builtin", f"the fastest on {device.type}"
    return "builtin", f"no kernels: {load('f32')[1]}"


def make_recurrent(input_size: int, config: ModelConfig) -> nn.Module:
    """Make the stack of `config` for inputs of `input_size`, with weights that are not initialised.

    config: its implementation is not ``auto``.
    """
    if config.implementation == "scratch":
        return Scratch(input_size, config)
    if config.implementation == "fused":
        return Fused(input_size, config)
    # torch drops between layers only, and warns about dropout in a single layer.
    dropout = config.dropout if config.num_layers > 1 else 0.0
    if config.weight_dropout or (config.locked_dropout and dropout):
        return BuiltinLayers(input_size, config)
    builtin = cell_of(config).builtin
    assert builtin  # `choose_implementation` has checked it
    sizes = (input_size, config.hidden_size, config.num_layers)
    return builtin.module(*sizes, batch_first=True, dropout=dropout, **builtin.options)


class Characters(NamedTuple):
    """Characters as the input of a stack that looks up products of their vectors.

    ids: (B, T), or with time first (T, B).
    table: the vector of each character, (V, E); None for one-hot vectors.
    """

    ids: Tensor
    table: Tensor | None

    def flip(self, axis: int) -> "Characters":
        """Return the characters in reverse order along `axis`."""
        return Characters(self.ids.flip(axis), self.table)


class Stack(nn.Module):
    """The parameters of a stack and its dropout; a subclass computes one layer in `_layer`."""

    def __init__(self, input_size: int, config: ModelConfig):
        super().__init__()
        self.num_layers, self.dropout = config.num_layers, config.dropout
        self.locked_dropout, self.weight_dropout = config.locked_dropout, config.weight_dropout
        self.cell = cell_of(config)
        H, rows = config.hidden_size, self.cell.gates * config.hidden_size
        for k in range(config.num_layers):
            shapes = ((rows, H if k else input_size), (rows, H), (rows,), (rows,))
            for name, shape in zip(WEIGHTS, shapes, strict=True):
                self.register_parameter(f"{name}_l{k}", nn.Parameter(torch.empty(shape)))

    def weights(self, k: int) -> Weights:
        """Return W_ih, W_hh, b_ih and b_hh of layer k for one forward pass.

        In training each number of W_hh is dropped with probability ``weight_dropout``, the same ones for all
        steps and streams (DropConnect: Wan et al. 2013; on W_hh: Merity, Keskar & Socher 2018).
        """
        W_ih, W, b_ih, b_hh = (getattr(self, f"{name}_l{k}") for name in WEIGHTS)
        dropping = self.training and self.weight_dropout
        W_hh = once((self, "W_hh", k), lambda: dropped(W, self.weight_dropout)) if dropping else W
        return W_ih, W_hh, b_ih, b_hh

    def forward(self, x: "Tensor | Characters", state: State) -> tuple[Tensor, State]:
        """Map x (B, T, E) and a state of (L, B, H) tensors to y (B, T, H) and the state after the last step.

        Raises `ValueError` for a state of other sizes, which torch might broadcast.
        """
        y: Any = x._replace(ids=x.ids.t()) if isinstance(x, Characters) else x.transpose(0, 1)
        expected = self.num_layers, len(x.ids if isinstance(x, Characters) else x)
        for tensor in state:
            if tensor.shape[:2] != expected:
                raise ValueError(
                    f"a state's tensor has the shape {tuple(tensor.shape)}; expected: {(*expected, 'H')}"
                )
        last = []
        for k in range(self.num_layers):
            if k and self.training:
                p = self.dropout
                y = locked(y, p, 0, (self, "y", k)) if self.locked_dropout else dropped(y, p)
            y, layer_state = self._layer(y, tuple(tensor[k] for tensor in state), self.weights(k))
            last.append(layer_state)
        return y.transpose(0, 1), tuple(torch.stack(tensors) for tensors in zip(*last, strict=True))

    def _layer(self, x: Tensor, state: State, weights: Weights) -> tuple[Tensor, State]:
        """Map x (T, B, E or H) and a layer's state, (B, H) each, to y (T, B, H) and the state after."""
        raise NotImplementedError


class Scratch(Stack):
    """The equations of `cells`, step by step and layer by layer, differentiated by autograd."""

    def _layer(self, x: Tensor, state: State, weights: Weights) -> tuple[Tensor, State]:
        W_ih, W_hh, b_ih, b_hh = weights
        outputs = []
        for a in F.linear(x, W_ih, b_ih).unbind(0):
            state = self.cell.step(a, state, W_hh, b_hh)
            outputs.append(state[0])
        return torch.stack(outputs), state


class Fused(Stack):
    """The sequences of `fused`, layer by layer; layer 0 reads `Characters` too."""

    def _layer(self, x: Tensor | Characters, state: State, weights: Weights) -> tuple[Tensor, State]:
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
            part = linear(x, W_ih, bias)
        elif x.table is None:
            part, ids = W_ih.t() + bias, x.ids
        elif x.ids.numel() < len(x.table):  # fewer products than for all characters
            part = linear(F.embedding(x.ids, x.table), W_ih, bias)
        else:
            part, ids = linear(x.table, W_ih, bias), x.ids
        if torch.is_autocast_enabled(part.device.type):
            part = part.to(torch.get_autocast_dtype(part.device.type))
        assert self.cell.fused  # `choose_implementation` has checked it
        y, *last = self.cell.fused.sequence(part, ids, W_hh, *inner, *state)
        return y, tuple(last)


class Linear(nn.Linear):
    """torch's module with the product of `functional.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x (…, K) to (…, N)."""
        return linear(x, self.weight, self.bias)


class BuiltinLayers(Stack):
    """torch's functions, layer by layer; its modules accept neither dropped weights nor locked masks."""

    def _layer(self, x: Tensor, state: State, weights: Weights) -> tuple[Tensor, State]:
        assert self.cell.builtin  # `choose_implementation` has checked it
        h, *c = (tensor[None] for tensor in state)  # a state of one layer, (1, B, H)
        # biases, number of layers, dropout, training, bidirectional, batch first
        options = (True, 1, 0.0, self.training, False, False)
        y, *last = self.cell.builtin.layer(x, (h, *c) if c else h, weights, *options)
        return y, tuple(tensor[0] for tensor in last)
