"""Scoring text: every character's surprisal, the state carried from the first to the last.

N characters, B texts side by side, V vocabulary, L layers, H hidden.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from charlm.metrics import Score
from charlm.nn.cells import State
from charlm.nn.model import CharLM, FillLM

SHORTEST = 2**14  # characters of a segment: many times what it takes to forget
MOST = {"cpu": 16, "cuda": 128}  # segments: with these a machine is busy
_MARK = 512  # characters after which states are compared
_SAME = 1e-5  # the difference between two states, beside 1 or their size, that is rounding
_ROUNDS = 2  # in which segments are read again, before the rest is read straight through

# Characters a forward pass: bounds the memory; the result does not depend on it but for rounding.
CHUNK = 4096
BLOCK = 2**20  # characters of a long text that are scored at once
_SIDE_BY_SIDE = 64  # texts that are scored in one batch
_LONG = 4 * SHORTEST  # characters from which on a text is scored by itself

OnScored = Callable[[int], object]


def _nobody(count: int) -> None:
    """Whom nothing is told."""


@torch.inference_mode()
def evaluate(model: CharLM, ids: Tensor, on_scored: OnScored = _nobody) -> Score:
    """Score every character of `ids` (N,) after the first exactly once, in float32.

    A model of ``direction: backward`` reads the text from its end: it scores all but the last character. One
    of ``direction: both`` scores every character given all the others: a pseudo-likelihood (Besag 1975),
    which is no likelihood of the text and must not be compared with one.

    on_scored: told of so many more characters, on the way.
    Returns a `Score` over N - 1 characters, or N for ``direction: both``; over none where N < 2.
    """
    if len(ids) < 2:
        return Score()
    if isinstance(model, FillLM):
        return Score(sum(float(part.sum()) for part in _filling(model, ids)), len(ids))
    return _over_blocks(model, _as_read(model, ids), on_scored)


def _over_blocks(model: CharLM, blocks: Iterable[Tensor], on_scored: OnScored) -> Score:
    nats, read = 0.0, 0
    for part in surprisals(model, blocks, on_scored):
        nats += float(part[1:].sum() if read == 0 else part.sum())
        read += len(part)
    return Score(nats, max(read - 1, 0))


@torch.inference_mode()
def evaluate_each(
    model: CharLM, texts: Sequence[Tensor | Iterable[Tensor]], on_scored: OnScored = _nobody
) -> list[Score]:
    """What `evaluate` gives for each of `texts` by itself, short ones side by side.

    texts: ids (N,) of each; for a model of ``direction: forward`` also blocks (n,) of them, as `in_blocks`
    cuts them, which are read when their turn has come, no more than one in memory.
    """
    scores = [Score()] * len(texts)
    short: dict[int, Tensor] = {}
    for k, text in enumerate(texts):
        if not isinstance(text, Tensor):
            scores[k] = _over_blocks(model, text, on_scored)
        elif isinstance(model, FillLM) or not 1 < len(text) < _LONG:
            scores[k] = evaluate(model, text, on_scored)
        else:
            short[k] = text
    order = sorted(short, key=lambda k: -len(short[k]))  # of like lengths in one batch
    with _evaluating(model):
        for first in range(0, len(order), _SIDE_BY_SIDE):
            batch = order[first : first + _SIDE_BY_SIDE]
            nats = _side_by_side(model, [short[k] for k in batch], on_scored)
            for k, sum_of_nats in zip(batch, nats.tolist(), strict=True):
                scores[k] = Score(sum_of_nats, len(short[k]) - 1)
    return scores


def in_blocks(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """The ids in `pieces` (n,) in blocks of `BLOCK`, of which the last may be shorter."""
    held, count = list[Tensor](), 0
    for piece in pieces:
        held.append(piece)
        count += len(piece)
        if count >= BLOCK:
            *whole, rest = torch.split(torch.cat(held), BLOCK)
            yield from whole
            held, count = [rest], len(rest)
    if count:
        yield torch.cat(held)


def _side_by_side(model: CharLM, texts: list[Tensor], on_scored: OnScored) -> Tensor:
    """The nats (B,) of `texts`, the longest first, each from a state of its own; one that ends drops out."""
    if model.config.direction == "backward":
        texts = [ids.flip(0) for ids in texts]
    device, lengths = model.head.weight.device, [len(ids) - 1 for ids in texts]
    state, nats = model.initial_state(len(texts)), torch.zeros(len(texts), dtype=torch.float64, device="cpu")
    steps = max(CHUNK // len(texts), 1)
    for start in range(0, lengths[0], steps):
        rows = sum(length > start for length in lengths)
        windows = torch.full((rows, min(steps, lengths[0] - start) + 1), -1, device="cpu")
        for window, ids in zip(windows, texts, strict=False):
            part = ids[start : start + len(window)]
            window[: len(part)] = part
        windows = windows.to(device)
        logits, state = model(windows[:, :-1].clamp(min=0), tuple(part[:, :rows] for part in state))
        targets = windows[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-1)
        nats[:rows] += losses.view(targets.shape).cpu().double().sum(1)
        on_scored(int((targets >= 0).sum()))
    return nats


@torch.inference_mode()
def surprisals(model: CharLM, blocks: Iterable[Tensor], on_scored: OnScored = _nobody) -> Iterator[Tensor]:
    """Yield -ln p of each character, in nats, float64 (n,), for blocks (n,) of ids of one text, in order.

    The text's first character has no prediction: NaN. No more than a block is in memory.
    model: of one direction; for ``backward`` the blocks come from the text's end, each last to first.
    """
    state, last, fast = model.initial_state(1), None, True
    with _evaluating(model):
        for block in blocks:
            if not len(block):
                yield torch.empty(0, dtype=torch.float64, device="cpu")
                continue
            ids = block.long() if last is None else torch.cat([last, block.long()])
            nats, state, fast = read_long(model, ids, state, CHUNK, fast, on_scored)
            yield torch.cat([nats.new_full((1,), torch.nan), nats]) if last is None else nats
            last = ids[-1:]


@torch.inference_mode()
def text_surprisals(model: CharLM, ids: Tensor, on_scored: OnScored = _nobody) -> Tensor:
    """-ln p of each character of a whole text `ids` (N,), in nats, float64 (N,), whatever the direction.

    NaN for the one that has no prediction: the first, or for ``direction: backward`` the last.
    """
    if not len(ids):
        return torch.empty(0, dtype=torch.float64, device="cpu")
    if isinstance(model, FillLM):
        return torch.cat(list(_filling(model, ids)))
    nats = torch.cat(list(surprisals(model, _as_read(model, ids), on_scored)))
    return nats.flip(0) if model.config.direction == "backward" else nats


def _as_read(model: CharLM, ids: Tensor) -> Iterator[Tensor]:
    """`ids` (N,) in blocks, in the order in which `model`, of one direction, reads them.

    `ids` may be mapped from the disk: a block of it is copied at a time.
    """
    if model.config.direction == "backward":
        for end in range(len(ids), 0, -BLOCK):
            yield ids[max(end - BLOCK, 0) : end].flip(0)
    else:
        yield from torch.split(ids, BLOCK)


def _filling(model: FillLM, ids: Tensor) -> Iterator[Tensor]:
    """The nats of each character given the text left and right of it, both states carried, chunk by chunk."""
    device = model.head.weight.device
    chunks = torch.split(ids, CHUNK)  # views: the text may be larger than the memory

    def load(chunk: Tensor) -> Tensor:
        return chunk.long().to(device)[None]

    with _evaluating(model):
        zeros = model.initial_state(1)
        half = len(zeros) // 2
        rights = [zeros[half:]]  # the state right of each chunk, from the last chunk to the first
        for chunk in reversed(chunks[1:]):
            rights.append(model.reverse(model.embed(load(chunk).flip(1)), rights[-1])[1])
        left: State = zeros[:half]
        for chunk, right in zip(chunks, reversed(rights), strict=True):
            chunk = load(chunk)
            logits, state = model(chunk, left + right)
            left = state[:half]
            yield F.cross_entropy(logits[0], chunk[0], reduction="none").cpu().double()


@contextmanager
def _evaluating(model: CharLM) -> Iterator[None]:
    """`model` without dropout, and then as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def read_long(
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
    Returns the state after the last of which the next is predicted, and whether to read on in
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
