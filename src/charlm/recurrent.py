"""A stack of recurrent layers over a sequence, behind one interface, in each implementation.

Every stack maps ``(x, state) -> (y, state)``: x (B, T, E), y (B, T, H) the top layer's hidden states, and a
state the tuple (h,) for RNN and GRU or (h, c) for LSTM, each (L, B, H). All have torch's parameters:
``weight_ih_l{k}``, ``weight_hh_l{k}``, ``bias_ih_l{k}``, ``bias_hh_l{k}`` for layer k.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from charlm.cells import GATES, State, input_product, step_of
from charlm.config import ModelConfig


def make_recurrent(input_size: int, config: ModelConfig) -> nn.Module:
    """The stack that `config` asks for, over inputs of `input_size`; its weights are not initialised here."""
    if config.implementation == "scratch":
        return Scratch(input_size, config)
    # torch warns of dropout in a single layer: it drops between layers only.
    dropout = config.dropout if config.num_layers > 1 else 0.0
    sizes = (input_size, config.hidden_size, config.num_layers)
    if config.cell == "lstm":
        return nn.LSTM(*sizes, batch_first=True, dropout=dropout)
    if config.cell == "gru":
        return BuiltinGRU(*sizes, batch_first=True, dropout=dropout)
    return BuiltinRNN(*sizes, batch_first=True, dropout=dropout, nonlinearity=config.nonlinearity)


class Scratch(nn.Module):
    """The equations of `cells`, step after step, layer after layer; autograd does the rest."""

    def __init__(self, input_size: int, config: ModelConfig):
        super().__init__()
        self.num_layers, self.dropout = config.num_layers, config.dropout
        self.step = step_of(config.cell, config.nonlinearity, config.gru_reset)
        H, rows = config.hidden_size, GATES[config.cell] * config.hidden_size
        for k in range(config.num_layers):
            self.register_parameter(
                f"weight_ih_l{k}", nn.Parameter(torch.empty(rows, H if k else input_size))
            )
            self.register_parameter(f"weight_hh_l{k}", nn.Parameter(torch.empty(rows, H)))
            self.register_parameter(f"bias_ih_l{k}", nn.Parameter(torch.empty(rows)))
            self.register_parameter(f"bias_hh_l{k}", nn.Parameter(torch.empty(rows)))

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """x (B, T, E) and a state of (L, B, H) tensors; y (B, T, H) and the state after the last step."""
        y = x.transpose(0, 1)
        last = []
        for k in range(self.num_layers):
            W_ih, W_hh, b_ih, b_hh = (
                getattr(self, f"{name}_l{k}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            if k:
                y = F.dropout(y, self.dropout, self.training)
            layer_state, outputs = tuple(tensor[k] for tensor in state), []
            for a in input_product(y, W_ih, b_ih).unbind(0):
                layer_state = self.step(a, layer_state, W_hh, b_hh)
                outputs.append(layer_state[0])
            y = torch.stack(outputs)
            last.append(layer_state)
        return y.transpose(0, 1), tuple(torch.stack(tensors) for tensors in zip(*last, strict=True))


class BuiltinGRU(nn.GRU):
    """`torch.nn.GRU` with the state as a tuple."""

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:  # type: ignore[override]
        """x (B, T, E) and (h,); y (B, T, H) and (h,)."""
        y, h = super().forward(x, *state)
        return y, (h,)


class BuiltinRNN(nn.RNN):
    """`torch.nn.RNN` with the state as a tuple."""

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:  # type: ignore[override]
        """x (B, T, E) and (h,); y (B, T, H) and (h,)."""
        y, h = super().forward(x, *state)
        return y, (h,)
