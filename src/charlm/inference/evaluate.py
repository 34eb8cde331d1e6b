"""Scoring text: the surprisal of every character, with the state carried from the first to the last.

A long text is read in segments side by side: each but the first starts from a zero state and is read again,
from the state in which the one before it ended, until the states agree: after some hundred characters, as a
trained model forgets its initial state. A model that does not is read straight through.
N characters, B texts side by side, P segments of S characters, V vocabulary, L layers, H hidden.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from charlm.metrics import Score
from charlm.nn.cells import State
from charlm.nn.model import CharLM, FillLM, evaluating

# Characters in one forward pass: bounds the memory; the result depends on it only by rounding.
CHUNK = 4096
BLOCK = 2**20  # characters of a long text scored at once
SEGMENT_MIN = 2**14  # characters of a segment, at least: many times what a model takes to forget
SEGMENTS_MAX = {"cpu": 16, "cuda": 128}  # with this many segments the machine is busy
_MARK = 512  # characters after which two readings of a segment are compared
_TOLERANCE = 1e-5  # a smaller difference of two states, relative to 1 + their size, is rounding
_ROUNDS = 2  # second readings of the segments, before the rest is read straight through
_BATCH = 64  # short texts scored in one batch
_LONG = 4 * SEGMENT_MIN  # characters from which a text is scored alone
_RECORDS = 2**12  # records that are sorted by length together

OnScored = Callable[[int], object]
_ignore: OnScored = lambda count: None


def evaluate(model: CharLM, text: Tensor | Iterable[Tensor], on_scored: OnScored = _ignore) -> Score:
    """Score every character of `text` after the first exactly once, in float32.

    A model of ``direction: backward`` reads the text from its end and scores all characters but the last. A
    model of ``direction: both`` scores every character given all the others: a pseudo-likelihood (Besag
    1975), which is not a likelihood of the text and must not be compared with one.

    text: ids (N,); for a model of ``direction: forward`` also blocks (n,) of ids, as `in_blocks` yields them,
        which are read one at a time.
    on_scored: called with the number of characters scored since the last call.
    Returns a `Score` of N - 1 characters, or N for ``direction: both``; of 0 characters where N < 2.
    """
    if isinstance(text, Tensor):
        if len(text) < 2:
            return Score()
        if isinstance(model, FillLM):
            return Score(sum(float(part.sum()) for part in _filling(model, text)), len(text))
        text = _blocks_in_order(model, text)
    nats, count = 0.0, 0
    for part in surprisals(model, text, on_scored):
        nats += float(part[1:].sum() if count == 0 else part.sum())
        count += len(part)
    return Score(nats, max(count - 1, 0))


def evaluate_each(
    model: CharLM, texts: Sequence[Tensor | Iterable[Tensor]], on_scored: OnScored = _ignore
) -> list[Score]:
    """Return the result of `evaluate` for each of `texts`; short texts are scored side by side."""
    scores = [Score()] * len(texts)
    short: dict[int, Tensor] = {}
    for k, text in enumerate(texts):
        if isinstance(text, Tensor) and 1 < len(text) < _LONG and not isinstance(model, FillLM):
            short[k] = text
        else:
            scores[k] = evaluate(model, text, on_scored)
    order = sorted(short, key=lambda k: -len(short[k]))  # a batch has texts of similar lengths
    with evaluating(model):
        for first in range(0, len(order), _BATCH):
            batch = order[first : first + _BATCH]
            nats = _side_by_side(model, [short[k] for k in batch], on_scored)
            for k, sum_of_nats in zip(batch, nats.sum(1).tolist(), strict=True):
                scores[k] = Score(sum_of_nats, len(short[k]) - 1)
    return scores


def evaluate_split(model: CharLM, ids: Tensor, boundary: int | None) -> Score:
    """Return the score of `ids`, a split of a corpus with this `boundary`, or of a part of it."""
    return evaluate(model, ids) if boundary is None else evaluate_records(model, ids, boundary)


def evaluate_records(model: CharLM, ids: Tensor, boundary: int, on_scored: OnScored = _ignore) -> Score:
    """Score records, each alone, as the text between the `boundary` before it and its own.

    All characters and the boundary after each record are scored, so that the probabilities of all records
    add up to 1.

    ids: the records, each followed by `boundary`, (N,); without the last one, the last record is scored as
        the beginning of a record.
    Returns a `Score` of N characters.
    """
    ends = ((ids == boundary).nonzero()[:, 0] + 1).tolist()
    if not ends or ends[-1] < len(ids):
        ends.append(len(ids))
    score = Score()
    for first in range(0, len(ends), _RECORDS):
        begin = ends[first - 1] if first else 0
        bounds = [begin, *ends[first : first + _RECORDS]]
        texts: list[Tensor] = [ids[max(start - 1, 0) : end] for start, end in pairwise(bounds)]
        if not first:  # the others begin with the boundary of the record before
            texts[0] = torch.cat([texts[0].new_full((1,), boundary), texts[0]])
        score = sum(evaluate_each(model, texts, on_scored), score)
    return score


def record_surprisals(model: CharLM, records: Sequence[Tensor], boundary: int) -> list[Tensor]:
    """Return -ln p of each character of each of `records` (n,) and of the `boundary` after it.

    Each record is read alone, after a boundary. The results are in nats, float64 (n + 1,).
    """
    texts = [F.pad(ids.long(), (1, 1), value=boundary) for ids in records]
    found = [torch.empty(0)] * len(texts)
    order = sorted(range(len(texts)), key=lambda k: -len(texts[k]))
    while order:
        count = 1 if len(texts[order[0]]) > _LONG else _BATCH
        batch, order = order[:count], order[count:]
        with evaluating(model):
            nats = _side_by_side(model, [texts[k] for k in batch], _ignore)
        for k, row in zip(batch, nats, strict=True):
            found[k] = row[: len(texts[k]) - 1].clone()
    return found


def in_blocks(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the ids in `pieces` (n,) in blocks of `BLOCK`; the last block can be shorter."""
    held = torch.empty(0, dtype=torch.int32, device="cpu")
    for piece in pieces:  # each of about the size of a block
        *whole, held = torch.split(torch.cat([held, piece]), BLOCK)
        yield from whole
    if len(held):
        yield held


def _side_by_side(model: CharLM, texts: list[Tensor], on_scored: OnScored) -> Tensor:
    """Return the nats (B, N - 1) of `texts`, sorted by falling length from N on, with 0 after their ends.

    A text that ends leaves the batch.
    """
    if model.config.direction == "backward":
        texts = [ids.flip(0) for ids in texts]
    device = model.head.weight.device
    state, longest = model.initial_state(len(texts)), len(texts[0]) - 1
    nats = torch.zeros(len(texts), longest, dtype=torch.float64, device="cpu")
    steps = max(CHUNK // len(texts), 1)
    for start in range(0, longest, steps):
        parts = [ids[start : start + steps + 1].long() for ids in texts if len(ids) > start + 1]
        windows = pad_sequence(parts, batch_first=True, padding_value=-1).to(device)
        rows, targets = len(parts), windows[:, 1:]
        logits, state = model(windows[:, :-1].clamp(min=0), tuple(part[:, :rows] for part in state))
        nats[:rows, start : start + steps] = _nats(model, logits, targets)
        on_scored(int((targets >= 0).sum()))
    return nats


def _nats(model: CharLM, logits: Tensor, targets: Tensor) -> Tensor:
    """Return -ln p of the ids `targets` (B, T) under logits (B, T, V), float64 on the CPU; 0 for id -1.

    A character of the model's unknown class has the class's probability divided by its number of kinds.
    """
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-1)
    nats = losses.view(targets.shape).cpu().double()  # converted on the CPU: MPS has no float64
    return nats + model.unknown.nats(targets) if model.unknown else nats


def surprisals(model: CharLM, blocks: Iterable[Tensor], on_scored: OnScored = _ignore) -> Iterator[Tensor]:
    """Yield -ln p of each character in nats, float64 (n,), for each block (n > 0,) of the ids of one text.

    The first character of the text has no prediction: NaN. One block is in memory at a time.
    model: of one direction; for ``backward`` the blocks come from the text's end, each reversed.
    """
    state, last, segmented = model.initial_state(1), None, True
    for block in blocks:
        ids = block.long() if last is None else torch.cat([last, block.long()])
        with evaluating(model):
            nats, state, segmented = read_long(model, ids, state, segmented, on_scored)
        yield torch.cat([nats.new_full((1,), torch.nan), nats]) if last is None else nats
        last = ids[-1:]


def text_surprisals(model: CharLM, ids: Tensor) -> Tensor:
    """Return -ln p of each character of a whole text `ids` (N,), in nats, float64 (N,), for any direction.

    NaN for the character without a prediction: the first, or the last for ``direction: backward``.
    """
    if not len(ids):
        return torch.empty(0, dtype=torch.float64, device="cpu")
    if isinstance(model, FillLM):
        return torch.cat(list(_filling(model, ids)))
    nats = torch.cat(list(surprisals(model, _blocks_in_order(model, ids))))
    return nats.flip(0) if model.config.direction == "backward" else nats


def _blocks_in_order(model: CharLM, ids: Tensor) -> Iterator[Tensor]:
    """Yield `ids` (N,) in blocks, in the order in which `model` reads them.

    `ids` can be mapped from the disk: one block at a time is copied.
    """
    if model.config.direction == "backward":
        for end in range(len(ids), 0, -BLOCK):
            yield ids[max(end - BLOCK, 0) : end].flip(0)
    else:
        yield from torch.split(ids, BLOCK)


def _filling(model: FillLM, ids: Tensor) -> Iterator[Tensor]:
    """Yield the nats of each character given the text on both sides, chunk by chunk, both states carried."""
    chunks = torch.split(ids, CHUNK)  # views: the text can be larger than the memory

    def load(chunk: Tensor) -> Tensor:
        return chunk.long().to(model.head.weight.device)[None]

    zeros = model.initial_state(1)
    half = len(zeros) // 2
    rights = [zeros[half:]]  # the state on the right of each chunk, from the last chunk to the first
    with evaluating(model):
        for chunk in reversed(chunks[1:]):
            rights.append(model.reverse(model.embed(load(chunk).flip(1)), rights[-1])[1])
    left: State = zeros[:half]
    for chunk, right in zip(chunks, reversed(rights), strict=True):
        with evaluating(model):
            loaded = load(chunk)
            logits, state = model(loaded, left + right)
            left, nats = state[:half], _nats(model, logits, loaded)[0]
        yield nats


def read_long(
    model: CharLM, ids: Tensor, state: State, segmented: bool = True, on_read: OnScored = _ignore
) -> tuple[Tensor, State, bool]:
    """Return -ln p of each of ids[1:] in nats, float64 (N,), for ids (N + 1,).

    state: the state before the first id. segmented: read in segments if the text is long enough.
    Returns also the state after ids[N - 1], and whether the next part of the text should be read in segments.
    """
    N = len(ids) - 1
    P = min(SEGMENTS_MAX.get(model.head.weight.device.type, 16), N // SEGMENT_MIN)
    if not segmented or P < 4:
        nats, state = _read_straight(model, ids, state, on_read)
        return nats, state, segmented
    S = N // P
    segments = _Segments(model, ids[: P * S + 1], S, state, on_read)
    settled = segments.settle()
    nats = segments.nats[:settled].flatten()
    state = tuple(part[:, settled - 1 : settled] for part in segments.after)
    rest, state = _read_straight(model, ids[settled * S :], state)
    return torch.cat([nats, rest]), state, settled == P


def _read_straight(
    model: CharLM, ids: Tensor, state: State, on_read: OnScored = _ignore
) -> tuple[Tensor, State]:
    nats = torch.empty(len(ids) - 1, dtype=torch.float64, device="cpu")
    for start in range(0, len(ids) - 1, CHUNK):
        window = ids[start : start + CHUNK + 1].long().to(model.head.weight.device)[None]
        logits, state = model(window[:, :-1], state)
        nats[start : start + CHUNK] = _nats(model, logits, window[:, 1:])[0]
        on_read(window.shape[1] - 1)
    return nats, state


class _Segments:
    """The P segments of a text, S characters each, and the results of their last readings.

    nats: (P, S). before, after: the states from which and to which each was read, (L, P, H).
    marks: the states after each `_MARK` characters.
    """

    def __init__(self, model: CharLM, ids: Tensor, S: int, state: State, on_read: OnScored):
        self.model, self.first = model, state
        self.windows = ids.long().unfold(0, S + 1, S).to(model.head.weight.device)  # (P, S + 1)
        P = len(self.windows)
        self.nats = torch.empty(P, S, dtype=torch.float64, device="cpu")
        self.before = tuple(part.clone() for part in model.initial_state(P))
        for before, first in zip(self.before, state, strict=True):
            before[:, 0] = first[:, 0]
        self.after = tuple(part.clone() for part in self.before)
        self.marks: list[State] = []
        self._read(torch.arange(P, device="cpu"), on_read)

    def settle(self) -> int:
        """Read the segments with a wrong start again; return how many, from the first on, are right."""
        for _ in range(_ROUNDS):
            right = self._right()
            if right.all():
                break
            wrong = (~right).nonzero()[:, 0]
            for before, after in zip(self.before, self.after, strict=True):
                before[:, wrong] = after[:, wrong - 1]
            self._read(wrong)
        return int(self._right().long().cumprod(0).sum())

    def _right(self) -> Tensor:
        """Return for each segment whether it started from the state in which the one before ended: (P,)."""
        shifted = tuple(
            torch.cat([first, after[:, :-1]], 1) for first, after in zip(self.first, self.after, strict=True)
        )
        return _same(self.before, shifted)

    def _read(self, rows: Tensor, on_read: OnScored = _ignore) -> None:
        """Read the segments `rows`, each to its end or to a mark with the same state as the last time."""
        again = bool(self.marks)
        state = tuple(part[:, rows] for part in self.before)
        for mark, begin in enumerate(range(0, self.nats.shape[1], _MARK)):
            end = min(begin + _MARK, self.nats.shape[1])
            steps = max(CHUNK // len(rows), 1)
            for start in range(begin, end, steps):
                window = self.windows[rows, start : min(start + steps, end) + 1]
                logits, state = self.model(window[:, :-1], state)
                self.nats[rows, start : min(start + steps, end)] = _nats(self.model, logits, window[:, 1:])
                on_read(window[:, 1:].numel())
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
    """Return which rows of two states are equal but for rounding: (B,); NaN equals nothing."""
    each = [((x - y).abs() <= _TOLERANCE * (1 + y.abs())).all(2).all(0) for x, y in zip(a, b, strict=True)]
    return torch.stack(each).all(0).cpu()
