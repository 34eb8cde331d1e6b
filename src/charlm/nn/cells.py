"""RNN, LSTM and GRU: one time step each, written as the equations.

In every cell x_t is the input at step t, of shape (B, E), and h_{t-1} the state before it, (B, H). The
input's share of a step, a_t = W_ih x_t + b_ih of shape (B, G·H) for G gates, does not depend on the state:
`input_product` computes it for all steps in one product, and a step function takes it ready. Weights are
named, shaped and ordered as torch's: W_ih (G·H, E), W_hh (G·H, H), biases (G·H,).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

State = tuple[Tensor, ...]
Step = Callable[[Tensor, State, Tensor, Tensor], State]


def input_product(x: Tensor, W_ih: Tensor, b_ih: Tensor) -> Tensor:
    """a_t = W_ih x_t + b_ih for all steps: x (T, B, E) gives (T, B, G·H)."""
    return linear(x, W_ih, b_ih)


def rnn_tanh(a: Tensor, state: State, W_hh: Tensor, b_hh: Tensor) -> State:
    """One step of the simple recurrent network (Elman 1990).

    h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)
    """
    (h,) = state
    return (torch.tanh(a + linear(h, W_hh, b_hh)),)


def rnn_relu(a: Tensor, state: State, W_hh: Tensor, b_hh: Tensor) -> State:
    """One step of the simple recurrent network with rectified linear units (Le, Jaitly & Hinton 2015).

    h_t = max(0, W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)
    """
    (h,) = state
    return (torch.relu(a + linear(h, W_hh, b_hh)),)


def lstm(a: Tensor, state: State, W_hh: Tensor, b_hh: Tensor) -> State:
    """One step of the long short-term memory (Hochreiter & Schmidhuber 1997; Gers et al. 2000).

    i_t = σ(W_ii x_t + b_ii + W_hi h_{t-1} + b_hi)      input gate
    f_t = σ(W_if x_t + b_if + W_hf h_{t-1} + b_hf)      forget gate
    g_t = tanh(W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)   candidate
    o_t = σ(W_io x_t + b_io + W_ho h_{t-1} + b_ho)      output gate
    c_t = f_t ⊙ c_{t-1} + i_t ⊙ g_t
    h_t = o_t ⊙ tanh(c_t)

    The four gates stand in the rows of the weights in the order i, f, g, o.
    """
    h, c = state
    i, f, g, o = (a + linear(h, W_hh, b_hh)).chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return h, c


def gru(a: Tensor, state: State, W_hh: Tensor, b_hh: Tensor) -> State:
    """One step of the gated recurrent unit, reset after the recurrent product, as torch and cuDNN have it.

    r_t = σ(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)             reset gate
    z_t = σ(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)             update gate
    n_t = tanh(W_in x_t + b_in + r_t ⊙ (W_hn h_{t-1} + b_hn))  candidate
    h_t = (1 - z_t) ⊙ n_t + z_t ⊙ h_{t-1}

    The three gates stand in the rows of the weights in the order r, z, n.
    """
    (h,) = state
    a_r, a_z, a_n = a.chunk(3, dim=-1)
    u_r, u_z, u_n = linear(h, W_hh, b_hh).chunk(3, dim=-1)
    r = torch.sigmoid(a_r + u_r)
    z = torch.sigmoid(a_z + u_z)
    n = torch.tanh(a_n + r * u_n)
    return ((1 - z) * n + z * h,)


def gru_reset_before(a: Tensor, state: State, W_hh: Tensor, b_hh: Tensor) -> State:
    """One step of the gated recurrent unit, reset before the recurrent product (Cho et al. 2014).

    r_t, z_t and h_t as in `gru`;
    n_t = tanh(W_in x_t + b_in + W_hn (r_t ⊙ h_{t-1}) + b_hn)
    """
    (h,) = state
    H = h.shape[-1]
    r, z = torch.sigmoid(a[..., : 2 * H] + linear(h, W_hh[: 2 * H], b_hh[: 2 * H])).chunk(2, dim=-1)
    n = torch.tanh(a[..., 2 * H :] + linear(r * h, W_hh[2 * H :], b_hh[2 * H :]))
    return ((1 - z) * n + z * h,)


GATES = {"rnn": 1, "lstm": 4, "gru": 3}
STATES = {"rnn": 1, "lstm": 2, "gru": 1}  # tensors in a state: (h,) or (h, c)


def step_of(cell: str, nonlinearity: str = "tanh", gru_reset: str = "after") -> Step:
    """The step function that a configuration names."""
    return {
        "rnn": rnn_relu if nonlinearity == "relu" else rnn_tanh,
        "lstm": lstm,
        "gru": gru_reset_before if gru_reset == "before" else gru,
    }[cell]
