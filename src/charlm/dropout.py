"""Dropout, fast on the CPU, and dropout whose masks last a whole sequence.

A sequence is one forward pass, or all those within `one_sequence`, where it is read piece by piece.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn import functional as F

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
