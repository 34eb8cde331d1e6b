"""Reading one long text as fast as a batch of short ones, with the same result.

A recurrent network reads a text a character after the other, and a batch of one uses little of the machine.
So the text is cut into segments that are read side by side. Where a segment begins, the state is known only
when the one before it has been read: at first it is taken to be zero, and then, from the state in which the
one before ended, a segment is read once more, until the state is what it was the first time, to rounding.
From there on all is as it was. Networks forget what they began from, within hundreds or thousands of
characters. One that does not is read straight through: what comes out is always what carrying the state over
the whole text gives, to rounding (it is a fixed-point iteration over the segments, checked to have arrived).

N characters, P segments of S characters, V vocabulary, L layers, H hidden.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from charlm.cells import State
from charlm.model import CharLM

SHORTEST = 2**14  # characters of a segment: many times what it takes to forget
MOST = {"cpu": 16, "cuda": 128}  # segments: with these a machine is busy
_MARK = 512  # characters after which states are compared
_SAME = 1e-5  # the difference between two states, beside 1 or their size, that is rounding
_ROUNDS = 2  # in which segments are read again, before the rest is read straight through


def read(
    model: CharLM,
    ids: Tensor,
    state: State,
    chunk: int,
    fast: bool = True,
    on_read: Callable[[int], object] = lambda count: None,
) -> tuple[Tensor, State, bool]:
    """What the prediction of each of ids[1:] costs, -ln p in nats, float64 (N,), for ids (N + 1,).

    state: before the first. chunk: characters a forward pass. fast: in segments where that pays.
    on_read: told of so many more characters, on the way.
    Returns the state after the last of which the next is predicted, and whether to read on in segments.
    """
    N = len(ids) - 1
    P = min(MOST.get(model.head.weight.device.type, 16), N // SHORTEST)
    if not fast or P < 4:
        nats, state = _straight(model, ids, state, chunk, on_read)
        return nats, state, fast
    S = N // P
    text = _Segments(model, ids[: P * S + 1], S, state, chunk, on_read)
    done = text.settle()
    nats = text.nats[:done].flatten()
    rest, state = _straight(
        model, ids[done * S :], tuple(part[:, done - 1 : done] for part in text.after), chunk
    )
    return torch.cat([nats, rest]), state, done == P


def _straight(
    model: CharLM,
    ids: Tensor,
    state: State,
    chunk: int,
    on_read: Callable[[int], object] = lambda count: None,
) -> tuple[Tensor, State]:
    nats, device = torch.empty(len(ids) - 1, dtype=torch.float64, device="cpu"), model.head.weight.device
    for start in range(0, len(ids) - 1, chunk):
        window = ids[start : start + chunk + 1].long().to(device)
        logits, state = model(window[None, :-1], state)
        losses = F.cross_entropy(logits[0], window[1:], reduction="none")
        nats[start : start + chunk] = losses.cpu().double()  # there: MPS has no float64
        on_read(len(window) - 1)
    return nats, state


class _Segments:
    """A text's P segments of S characters, and what is known of each.

    nats: (P, S). before, after: the state each was last read from, and the one after it, (L, P, H).
    marks: the states after every so many characters.
    """

    def __init__(
        self,
        model: CharLM,
        ids: Tensor,
        S: int,
        state: State,
        chunk: int,
        on_read: Callable[[int], object],
    ):
        self.model = model
        self.windows = ids.long().unfold(0, S + 1, S).to(model.head.weight.device)  # (P, S + 1)
        P = len(self.windows)
        self.first, self.chunk = state, chunk
        self.nats = torch.empty(P, S, dtype=torch.float64, device="cpu")
        self.before = tuple(part.clone() for part in model.initial_state(P))
        for mine, given in zip(self.before, state, strict=True):
            mine[:, 0] = given[:, 0]
        self.after = tuple(part.clone() for part in self.before)
        self.marks: list[State] = []
        self._read(torch.arange(P, device="cpu"), on_read)

    def settle(self) -> int:
        """Read again what began from a wrong state; returns how many, from the first on, are right."""
        for _ in range(_ROUNDS):
            right = self._right()
            if right.all():
                break
            wrong = (~right).nonzero()[:, 0]
            for mine, previous in zip(self.before, self.after, strict=True):
                mine[:, wrong] = previous[:, wrong - 1]
            self._read(wrong)
        right = self._right()
        return len(right) if right.all() else int(right.long().argmin())

    def _right(self) -> Tensor:
        """Which segments began from the state in which the one before ended: (P,)."""
        shifted = tuple(
            torch.cat([first, part[:, :-1]], 1) for first, part in zip(self.first, self.after, strict=True)
        )
        return _same(self.before, shifted)

    def _read(self, rows: Tensor, on_read: Callable[[int], object] = lambda count: None) -> None:
        """Read the segments `rows`, each until it is at a mark as it was the last time, or to its end."""
        again = bool(self.marks)
        state = tuple(part[:, rows] for part in self.before)
        for mark, begin in enumerate(range(0, self.nats.shape[1], _MARK)):
            end = min(begin + _MARK, self.nats.shape[1])
            steps = max(self.chunk // len(rows), 1)
            for start in range(begin, end, steps):
                window = self.windows[rows, start : min(start + steps, end) + 1]
                logits, state = self.model(window[:, :-1], state)
                losses = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="none")
                self.nats[rows, start : min(start + steps, end)] = losses.view(len(rows), -1).cpu().double()
                on_read(losses.numel())
            if not again:
                self.marks.append(state)
                continue
            moved = ~_same(state, tuple(part[:, rows] for part in self.marks[mark]))
            rows, state = rows[moved], tuple(part[:, moved] for part in state)
            if not len(rows):
                return
            for known, new in zip(self.marks[mark], state, strict=True):
                known[:, rows] = new
        for known, new in zip(self.after, state, strict=True):
            known[:, rows] = new


def _same(a: State, b: State) -> Tensor:
    """Which rows of two states are the same but for rounding: (B,); what is no number never is."""
    each = [((x - y).abs() <= _SAME * (1 + y.abs())).all(2).all(0) for x, y in zip(a, b, strict=True)]
    return torch.stack(each).all(0).cpu()
