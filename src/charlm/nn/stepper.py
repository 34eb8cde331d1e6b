"""`Stepper` prepares a model to write text, one character at a time.

The speed of writing is that of reading the weights. All that does not change between steps is computed once:
the input's part of layer 0 becomes a table with a row for each character, biases are added to it, and
matrices are packed for `kernels.c`, which computes a whole step in one call; without a compiler, torch does.
V vocabulary, B batch, H hidden, G gates, L layers.
"""

import ctypes
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from charlm.errors import ConfigError
from charlm.nn.cells import State, cell_of
from charlm.nn.kernels import native
from charlm.nn.layers import WEIGHTS
from charlm.nn.model import CharLM, evaluating

Quantize = Literal["bf16", "int8"]
_Layer = tuple["Quantised", "Quantised", Tensor, Tensor]  # W_ih, W_hh, b_ih, b_hh


class Quantised(NamedTuple):
    """A matrix (N, K) in memory: row n of the matrix is `values`[n] times `scale`[n]."""

    values: Tensor
    scale: Tensor | None = None

    def wide(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix (N, K) in `dtype`."""
        values = self.values.to(dtype)
        return values if self.scale is None else values * self.scale[:, None]


def quantised(W: Tensor, how: Quantize | None) -> Quantised:
    """Return W (N, K) unchanged, in bfloat16, or in int8: multiples, up to ±127, of a scale for each row.

    The matrix then takes a half or a quarter of the memory, at a small loss in quality.
    """
    if how == "bf16":
        return Quantised(W.to(torch.bfloat16))
    if how == "int8":
        lowest, highest = W.aminmax(dim=1)
        largest = torch.maximum(-lowest, highest)
        scale = torch.where(largest == 0, 1, largest / 127)  # NaN stays NaN
        return Quantised((W / scale[:, None]).round_().to(torch.int8), scale)
    return Quantised(W)


class Stepper:
    """A model prepared to read one character of each stream of a batch; it has copies of the weights.

    quantize: the type of the matrices, by default the model's.

    A model whose cell has no kernel, or that is not on the CPU, steps by its own `forward`, with the weights
    that it has at each step.
    """

    def __init__(self, model: CharLM, quantize: Quantize | None = None):
        if model.config.direction == "both":
            raise ConfigError(
                "model.direction is 'both': such a model fills in characters and cannot write; "
                "allowed: forward, backward"
            )
        self.config, self.model, self.cell = model.config, model, cell_of(model.config)
        self.dtype, place = model.head.weight.dtype, model.head.weight.device.type
        self.own = not self.cell.fused or place != "cpu" or self.dtype not in (torch.float32, torch.float64)
        if self.own and quantize:
            this = f"of {self.dtype} on {place}" if self.cell.fused else f"with {self.cell.setting}"
            raise ConfigError(
                f"quantize {quantize!r} needs a model of float32 on the CPU (--device cpu) whose cell has a "
                f"kernel; this model is one {this}: leave --quantize out"
            )
        if not self.own:
            with torch.no_grad():
                self._prepare(quantize)

    def _prepare(self, quantize: Quantize | None) -> None:
        """Quantise the matrices; then pack them for the kernels, or copy them for torch."""
        model, layers = self.model, []
        for k in range(self.config.num_layers):
            W_ih, W_hh, b_ih, b_hh = (getattr(model.recurrent, f"{name}_l{k}").detach() for name in WEIGHTS)
            if k == 0:
                rows = W_ih.t() if self.config.input == "one_hot" else F.linear(model.embedding.weight, W_ih)
            # A table replaces the input matrix of layer 0.
            layers.append((quantised(W_ih, quantize if k else None), quantised(W_hh, quantize), b_ih, b_hh))
        head = quantised(model.head.weight.detach(), quantize)
        self.kernels = native.kernels(self.dtype)
        if self.kernels:
            self._pack(self.kernels, rows, layers, head)
            return

        def matrix(W: Quantised) -> Tensor:
            return W.wide(self.dtype).clone()

        self.table, self.head = rows + layers[0][2], matrix(head)
        self.head_bias = model.head.bias.detach().clone()
        self.layers = [(matrix(W_ih), matrix(W_hh), *map(torch.clone, b)) for W_ih, W_hh, *b in layers]

    def _pack(self, kernels: native.Kernels, rows: Tensor, layers: list[_Layer], head: Quantised) -> None:
        """Make a `native.Model`; self.buffers keeps the memory that its pointers refer to."""
        packed = (native.Layer * len(layers))()
        self.buffers: list[Tensor | None] = []

        def matrix(W: Quantised, bias: Tensor | None = None) -> native.Matrix:
            made, buffers = kernels.matrix(*W, bias)
            self.buffers += buffers
            return made

        for k, (W_ih, W_hh, b_ih, b_hh) in enumerate(layers):
            bias = b_ih + b_hh
            if self.cell.inner_bias:  # the last gate's b_hh stays in the recurrent part
                H = self.config.hidden_size
                bias[-H:], b_hn = b_ih[-H:], b_hh[-H:].clone()
                self.buffers.append(b_hn)
                packed[k].b_hn = b_hn.data_ptr()
            if k:
                packed[k].input = matrix(W_ih, bias)
            else:
                self.table = (rows + bias).contiguous()
            packed[k].recurrent = matrix(W_hh)
        assert self.cell.fused
        self.packed = native.Model(
            self.cell.fused.kernel,
            len(layers),
            self.config.hidden_size,
            len(self.table),
            self.table.data_ptr(),
            packed,
            matrix(head, self.model.head.bias.detach().clone()),
        )
        self.address = ctypes.addressof(self.packed)

    def step(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        """Map ids (B,) and the state before them to logits (B, V) for the next characters and the state."""
        if self.own:
            with evaluating(self.model):
                logits, state = self.model(ids[:, None], state)
            return logits[:, -1], state
        B, L, H, G = len(ids), self.config.num_layers, self.config.hidden_size, self.cell.gates
        h, c = state[0].to(self.dtype).contiguous(), state[-1].to(self.dtype).contiguous()
        if not h.shape == c.shape == (L, B, H):
            raise ValueError(f"a state's tensor has the shape {tuple(h.shape)}; expected: {(L, B, H)}")
        if self.kernels is None:
            if not 0 <= ids.min() <= ids.max() < len(self.table):
                raise IndexError(f"ids must be from 0 to {len(self.table) - 1}")
            with torch.no_grad():
                return self._step(ids, (h, c)[: len(state)])
        after = tuple(torch.empty_like(h) for _ in state)
        work = self.table.new_empty(2 * B * G * H)  # one for each call: threads may share a stepper
        logits, ids = self.table.new_empty(B, len(self.table)), ids.long().contiguous()
        arguments = (ids, h, c, work, after[0], after[-1], logits)
        if self.kernels.library.step(self.address, B, *(tensor.data_ptr() for tensor in arguments)):
            raise IndexError(f"ids must be from 0 to {len(self.table) - 1}")
        return logits, after

    def _step(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        """Do the same by the equations of the cell: logits (B, V), and the state after."""
        a, after = self.table[ids], list[State]()
        for k, (W_ih, W_hh, b_ih, b_hh) in enumerate(self.layers):
            if k:
                a = F.linear(after[-1][0], W_ih, b_ih)
            after.append(self.cell.step(a, tuple(tensor[k] for tensor in state), W_hh, b_hh))
        logits = F.linear(after[-1][0], self.head, self.head_bias)
        return logits, tuple(torch.stack(tensors) for tensors in zip(*after, strict=True))
