"""`Progress`: what the training loop counts and remembers between steps."""

import math
from dataclasses import dataclass


@dataclass
class Progress:
    """What the loop remembers between steps, apart from tensors.

    train_nats, train_characters, train_seconds: sums since the last evaluation.
    seconds: time spent in steps, in all.
    lr, grad_norm: of the last step, and of the last that was taken.
    bad_steps: steps that were passed over, in all and in a row up to now.
    rollbacks: how often the run went back to `rollback_step`, the last save known to be good; each halves the
        learning rate.
    concluded: the end was reached and logged.
    """

    step: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    evaluations_since_best: int = 0
    train_nats: float = 0.0
    train_characters: int = 0
    train_seconds: float = 0.0
    seconds: float = 0.0
    log_size: int = 0
    lr: float = 0.0
    grad_norm: float = 0.0
    bad_steps: int = 0
    bad_steps_in_a_row: int = 0
    rollbacks: int = 0
    rollback_step: int = 0
    concluded: bool = False
