"""The counters of the training loop: everything it remembers between steps, apart from tensors."""

import math
from dataclasses import dataclass, field


@dataclass
class Sums:
    """Sums over steps: the nats and the characters of the steps that were taken, the seconds of all."""

    nats: float = 0.0
    characters: int = 0
    seconds: float = 0.0

    def add(self, loss: float, characters: int, seconds: float) -> None:
        """Add a step with the mean `loss`, in nats per character, over `characters`."""
        self.nats += loss * characters
        self.characters += characters
        self.seconds += seconds


@dataclass
class Progress:
    """The counters of a training.

    since_evaluation, since_row: sums since the last evaluation, and since the last row with a train loss.
    seconds: the seconds of all steps, without evaluations and saves.
    elapsed: the seconds since the start, with them; counted for ``train.time_limit`` only.
    lr: the learning rate of the last step.
    grad_norm: the gradient norm of the last step that was taken.
    bad_steps, bad_steps_in_a_row: the number of skipped steps, in all and up to now without a break.
    rollbacks: how often the run rolled back to `rollback_step`, its last sound save; each rollback halves the
        learning rate.
    concluded: whether the training has reached its end and logged it.
    """

    step: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    evaluations_since_best: int = 0
    since_evaluation: Sums = field(default_factory=Sums)
    since_row: Sums = field(default_factory=Sums)
    seconds: float = 0.0
    elapsed: float = 0.0
    log_size: int = 0
    lr: float = 0.0
    grad_norm: float = 0.0
    bad_steps: int = 0
    bad_steps_in_a_row: int = 0
    rollbacks: int = 0
    rollback_step: int = 0
    concluded: bool = False

    def __post_init__(self) -> None:
        """Convert the sums of a state, which are dictionaries."""
        for name in ("since_evaluation", "since_row"):
            if isinstance(sums := getattr(self, name), dict):
                setattr(self, name, Sums(**sums))
