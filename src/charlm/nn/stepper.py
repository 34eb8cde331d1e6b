"""`Stepper`: a model made ready to go on by one character at a time, as fast as its weights can be read.

What does not change from step to step is done once: layer 0's input share is a table with a row for each
character, biases are folded in, matrices are packed for `kernels.c`, which then does a whole step in one
call; without a compiler torch does. The matrices may be held in fewer bits, which costs little of the model's
quality: ``bf16`` halves them, ``int8`` makes them a quarter, with one scale for each row of a matrix.

V vocabulary, B batch, H hidden, G gates, L layers.
"""

import ctypes
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from charlm.errors import ConfigError
from charlm.nn import fused
from charlm.nn.cells import GATES, State
from charlm.nn.kernels import native
from charlm.nn.model import CharLM

Quantize = Literal["bf16", "int8"]


class Quantised(NamedTuple):
    """A matrix (N, K) as it is kept: `values`, of which row n counts `scale`[n] times."""

    values: Tensor
    scale: Tensor | None = None

    def wide(self, dtype: torch.dtype) -> Tensor:
        """The matrix (N, K) that is meant."""
        values = self.values.to(dtype)
        return values if self.scale is None else values * self.scale[:, None]


def quantised(W: Tensor, how: Quantize | None) -> Quantised:
    """W (N, K) as it is, in bfloat16, or in int8: whole multiples, up to ±127, of a scale for each row."""
    if how == "bf16":
        return Quantised(W.to(torch.bfloat16))
    if how == "int8":
        lowest, highest = W.aminmax(dim=1)
        largest = torch.maximum(-lowest, highest)
        scale = torch.where(largest == 0, 1, largest / 127)  # what is no number stays none
        return Quantised((W / scale[:, None]).round_().to(torch.int8), scale)
    return Quantised(W)


class _Layer(NamedTuple):
    """A layer's matrices and biases; layer 0 has `Stepper.table` in place of an input matrix."""

    input: Quantised
    recurrent: Quantised
    bias: Tensor
    b_hn: Tensor | None


class Stepper:
    """`model`, ready to go on by one character for each stream of a batch; its weights as they are now.

    quantize: hold the matrices in fewer bits.

    A model that resets the GRU before the product, or that is not on the CPU, steps by its own `forward`: it
    has to be in `eval` mode, and its weights are those that it has at each step.
    """

    def __init__(self, model: CharLM, quantize: Quantize | None = None):
        if model.config.direction == "both":
            raise ConfigError("a model of direction: both fills in characters, it has none to go on by")
        self.config, self.model = model.config, model
        self.dtype, place = model.head.weight.dtype, model.head.weight.device.type
        before = model.config.cell == "gru" and model.config.gru_reset == "before"
        self.own = before or place != "cpu" or self.dtype not in (torch.float32, torch.float64)
        if self.own and quantize:
            what = "with gru_reset: before" if before else f"of {self.dtype} on {place}"
            raise ConfigError(
                f"quantize {quantize!r} is for models of float32 on the CPU (--device cpu); "
                f"one {what} is written with as it is: leave --quantize out"
            )
        if not self.own:
            with torch.no_grad():
                self._prepare(quantize)

    def _prepare(self, quantize: Quantize | None) -> None:
        """Fold the biases in, make layer 0's table, and pack the rest or have it ready for torch."""
        H, model, gru = self.config.hidden_size, self.model, self.config.cell == "gru"
        layers = []
        for k in range(self.config.num_layers):
            W_ih, W_hh, b_ih, b_hh = (
                getattr(model.recurrent, f"{name}_l{k}").detach()
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            # The bias of the GRU's candidate stands inside the reset.
            bias = b_ih + (F.pad(b_hh[: 2 * H], (0, H)) if gru else b_hh)
            if k == 0:
                one_hot = self.config.input == "one_hot"
                rows = W_ih.t() if one_hot else F.linear(model.embedding.weight, W_ih)
                self.table = (rows + bias).contiguous()
            b_hn = b_hh[2 * H :].clone() if gru else None
            layers.append(
                _Layer(quantised(W_ih, quantize if k else None), quantised(W_hh, quantize), bias, b_hn)
            )
        head = quantised(model.head.weight.detach(), quantize)
        steps = fused.steps_for(self.table)
        self.kernels = steps if isinstance(steps, native.Kernels) and steps.multiplies else None
        if self.kernels:
            self._pack(self.kernels, layers, head)
            return

        def matrix(W: Quantised) -> Quantised:
            return Quantised(W.wide(self.dtype).clone())

        self.steps, self.head = fused.Steps(), matrix(head).values
        self.head_bias = model.head.bias.detach().clone()
        self.layers = [_Layer(matrix(W_ih), matrix(W_hh), bias, b_hn) for W_ih, W_hh, bias, b_hn in layers]

    def _pack(self, kernels: native.Kernels, layers: list[_Layer], head: Quantised) -> None:
        """All of it as a `native.Model`; self.kept is what its pointers point to."""
        packed = (native.Layer * len(layers))()
        self.kept: list[Tensor] = [self.table]

        def matrix(W: Quantised, bias: Tensor | None = None) -> native.Matrix:
            made, kept = kernels.matrix(*W, bias)
            self.kept += kept
            return made

        for k, layer in enumerate(layers):
            if k:
                packed[k].input = matrix(layer.input, layer.bias)
            packed[k].recurrent = matrix(layer.recurrent)
            if layer.b_hn is not None:
                packed[k].b_hn = layer.b_hn.data_ptr()
                self.kept.append(layer.b_hn)
        cell = {"rnn": int(self.config.nonlinearity == "relu"), "lstm": 2, "gru": 3}[self.config.cell]
        sizes = (cell, len(layers), self.config.hidden_size, len(self.table))
        self.packed = native.Model(
            *sizes, self.table.data_ptr(), packed, matrix(head, self.model.head.bias.detach().clone())
        )
        self.address = ctypes.addressof(self.packed)

    def step(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        """Ids (B,) and the state before them; logits (B, V) for what follows, and the state after."""
        if self.own:
            with torch.no_grad():
                logits, state = self.model(ids[:, None], state)
            return logits[:, -1], state
        B, L, H, G = len(ids), self.config.num_layers, self.config.hidden_size, GATES[self.config.cell]
        h, c = state[0].to(self.dtype).contiguous(), state[-1].to(self.dtype).contiguous()
        if not h.shape == c.shape == (L, B, H):
            raise ValueError(f"a state is of tensors {(L, B, H)}, not {tuple(h.shape)}")
        after = tuple(torch.empty_like(h) for _ in state)
        if self.kernels is None:
            if not 0 <= ids.min() <= ids.max() < len(self.table):
                raise IndexError(f"an id is from 0 to {len(self.table) - 1}")
            with torch.no_grad():
                return self._step(ids, h, c, after), after
        work = self.table.new_empty(B * (2 * G + 1) * H)  # a call's own: threads may share a stepper
        logits, ids = self.table.new_empty(B, len(self.table)), ids.long().contiguous()
        arguments = (ids, h, c, work, after[0], after[-1], logits)
        if self.kernels.library.step(self.address, B, *(tensor.data_ptr() for tensor in arguments)):
            raise IndexError(f"an id is from 0 to {len(self.table) - 1}")
        return logits, after

    def _step(self, ids: Tensor, h: Tensor, c: Tensor, after: State) -> Tensor:
        """The same with torch's operations: logits (B, V), and the state in `after`."""
        below = h[0]
        for k, layer in enumerate(self.layers):
            share, rows = (F.linear(below, layer.input.values, layer.bias), None) if k else (self.table, ids)
            products = F.linear(h[k], layer.recurrent.values)
            if layer.b_hn is not None:
                n = torch.empty_like(h[k])
                self.steps.gru_forward(share, rows, layer.b_hn, products, h[k], n, after[0][k], after[0][k])
            elif self.config.cell == "lstm":
                self.steps.lstm_forward(share, rows, products, c[k], after[1][k], after[0][k])
            else:
                self.steps.rnn_forward(self.config.nonlinearity == "relu", share, rows, products, after[0][k])
            below = after[0][k]
        return F.linear(below, self.head, self.head_bias)
