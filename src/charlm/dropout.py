"""Dropout whose masks last a whole sequence.

A sequence is one forward pass, or all those within `one_sequence`, where it is read piece by piece.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor
from torch.nn import functional as F

_drawn: ContextVar[dict[object, Tensor] | None] = ContextVar("_drawn", default=None)


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
    return y * once(key, lambda: F.dropout(y.new_ones(shape), p))
