"""Scheduled sampling: feeding a model in training its own characters now and then.

Bengio, Vinyals, Jaitly & Shazeer 2015, "Scheduled Sampling for Sequence Prediction with Recurrent Neural
Networks".
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from charlm.cells import State
from charlm.config import TrainConfig
from charlm.dropout import one_sequence
from charlm.model import CharLM


def true_share(done: float, config: TrainConfig) -> float:
    """The share of true characters to feed once `done` (0 to 1) of the training is over.

    It falls from 1 to ``teacher_forcing`` along a line, an exponential, or an inverse sigmoid: the paper's
    three shapes (section 2.4), scaled to begin and end there.
    """
    shapes: dict[str, Callable[[float], float]] = {
        "linear": lambda d: 1 - d,
        "exponential": lambda d: math.exp(-5 * d),
        "inverse_sigmoid": lambda d: 1 / (1 + math.exp(10 * (d - 0.5))),
    }
    shape = shapes[config.teacher_forcing_schedule]
    left = (shape(done) - shape(1.0)) / (shape(0.0) - shape(1.0))
    return config.teacher_forcing + (1 - config.teacher_forcing) * left


@one_sequence()  # though it is read a character at a time
def forward(model: CharLM, x: Tensor, state: State, share: float) -> tuple[Tensor, State]:
    """As ``model(x, state)``, but for what is fed: each character x_t, t > 0, is the true one with
    probability `share`, else drawn from the model's own prediction of it.

    x (B, T) and a state give logits (B, T, V) and the state after; no gradient flows through the drawing.
    Chance comes from torch's global generator.
    """  # noqa: D205
    fed, outputs = x[:, :1], []
    for t in range(x.shape[1]):
        logits, state = model(fed, state)
        outputs.append(logits)
        if t + 1 < x.shape[1]:
            # What is no number is not drawn from; the loss tells of it.
            p = logits[:, 0].detach().float().softmax(-1).nan_to_num(1.0)
            drawn = torch.multinomial(p, 1)
            truly = torch.rand(len(x), 1, device=x.device) < share
            fed = torch.where(truly, x[:, t + 1 : t + 2], drawn)
    return torch.cat(outputs, 1), state
