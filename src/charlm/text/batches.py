"""`SlidingWindows`, `ContiguousStreams`, `Records`: batches `(x, y)` (B, T), y one character ahead of x.

x and y are int64; B is the number of this process's sequences, 0 if there are fewer sequences than processes.
All are deterministic in (seed, epoch) and can start at any step of an epoch, so that a run can be resumed.
None copies the encoded text: windows are a view of it, and the shuffled order is computed, not stored.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from charlm.config import BatchesConfig
from charlm.errors import CharlmError

Batch = tuple[Tensor, Tensor]

# Windows whose order is computed together: done per batch, it takes longer than a small model's step.
_SHUFFLED_AT_ONCE = 2**14
_SORTED_TOGETHER = 64  # batches of records that are sorted by length together
_READ_AT_ONCE = 2**12  # windows between two releases of memory: the kernel maps 64 KiB for each


def val_characters(config: BatchesConfig) -> int | None:
    """Return the number of val characters that `config.max_val_windows` selects, or None for all."""
    if config.max_val_windows is None:
        return None
    stride = config.stride if config.sampling == "sliding" else config.seq_len
    return (config.max_val_windows - 1) * stride + config.seq_len + 1


def make_batches(
    ids: Tensor,
    config: BatchesConfig,
    backward: bool = False,
    release: Callable[[], None] = lambda: None,
    rank: int = 0,
    size: int = 1,
    boundary: int | None = None,
) -> "SlidingWindows | ContiguousStreams | Records":
    """Return the batches of `ids` (N,) that `config` describes, for process `rank` of `size`.

    Side by side, the processes' batches of a step are the batch of one process with `size` times the size.

    backward: read the text from its end.
    release: called every few thousand sequences to free the memory of a mapped text.
    boundary: for a text that is a list of records, the id that follows each of them.
    """
    batch_size, seq_len = config.batch_size * size, config.seq_len
    reader = _Reader(backward, release, rank, size)
    if boundary is not None:
        return Records(ids, boundary, batch_size, reader=reader)
    if config.sampling == "contiguous":
        return ContiguousStreams(ids, batch_size, seq_len, config.truncation == "random", reader=reader)
    return SlidingWindows(
        ids, batch_size, seq_len, config.stride, config.shuffle, config.max_train_windows, reader=reader
    )


def rank_slice(count: int, rank: int, size: int) -> slice:
    """Return the slice of `count` sequences that process `rank` reads; lengths differ by at most 1."""
    return slice(rank * count // size, (rank + 1) * count // size)


class _Reader(NamedTuple):
    """How one process reads sequences from a text; see `make_batches`."""

    backward: bool = False
    release: Callable[[], None] = lambda: None
    rank: int = 0
    size: int = 1

    def own(self, sequences: Tensor) -> Tensor:
        """Return this process's part of a step's sequences (B,)."""
        return sequences[rank_slice(len(sequences), self.rank, self.size)]

    def read(self, ids: Tensor, starts: Tensor, length: int) -> Batch:
        """Return the batch of `length` steps whose sequences begin at `starts` (B,) of the text (N,).

        It is gathered in one operation from a view of all sequences; the text itself is not reversed.
        """
        if self.backward:
            starts = len(ids) - length - 1 - starts
        sequences = ids.unfold(0, length + 1, 1)[starts].long()
        if self.backward:
            sequences = sequences.flip(1)
        return sequences[:, :-1], sequences[:, 1:]


class _Batches(Dataset[Batch]):
    def loader(self, seed: int, epoch: int, start: int = 0) -> "DataLoader[Batch]":
        """Return the batches of an epoch from step `start`."""
        order = self._order(seed, epoch, start)
        # With its own generator: a DataLoader draws from the global one otherwise, each time it begins.
        return DataLoader(self, batch_size=None, sampler=order, generator=torch.Generator())

    def _order(self, seed: int, epoch: int, start: int) -> Iterator[Any]:
        """Yield what `__getitem__` takes for each batch from step `start`."""
        raise NotImplementedError


class SlidingWindows(_Batches):
    """Windows of T + 1 characters, `stride` apart, in random order; the state is reset for each.

    ids: the encoded text, (N,).
    batch_size: windows per step, of all processes together.
    max_windows: use only this many, from the beginning.
    Raises `CharlmError` for a text shorter than one window.
    """

    kind, state = "sliding", "reset for each window"
    carries_state = False  # whether a batch continues where the previous one ended
    pads = False  # whether y has a -1 after the end of a sequence

    def __init__(
        self,
        ids: Tensor,
        batch_size: int,
        seq_len: int,
        stride: int = 1,
        shuffle: bool = True,
        max_windows: int | None = None,
        *,
        reader: _Reader = _Reader(),  # noqa: B008 - immutable
    ):
        _check_length(ids, seq_len + 1, f"one window of batches.seq_len + 1 = {seq_len + 1}")
        self.ids, self.batch_size, self.seq_len, self.stride = ids, batch_size, seq_len, stride
        self.reader, self.shuffle = reader, shuffle
        count = (len(ids) - seq_len - 1) // stride + 1
        self.count = count if max_windows is None else min(count, max_windows)
        self.steps_per_epoch = -(-self.count // batch_size)

    def sequences(self, step: int) -> int:
        """Return the number of windows that all processes together read: fewer in an epoch's last step."""
        return min(self.batch_size, self.count - step * self.batch_size)

    def __getitem__(self, windows: Tensor) -> Batch:
        """Return the batch of the windows numbered `windows` (B,)."""
        return self.reader.read(self.ids, windows * self.stride, self.seq_len)

    def _order(self, seed: int, epoch: int, start: int) -> Iterator[Tensor]:
        size = self.batch_size
        together = max(_SHUFFLED_AT_ONCE // size, 1) * size
        for first in range(start * size, self.count, together):
            batches = torch.split(torch.arange(first, min(first + together, self.count)), size)
            own = [self.reader.own(batch) for batch in batches]
            indices = torch.cat(own)
            if self.shuffle:
                indices = shuffled(indices, self.count, seed, epoch)
            for number, batch in enumerate(torch.split(indices, [len(batch) for batch in own])):
                if number * size % _READ_AT_ONCE < size:
                    self.reader.release()
                yield batch


class ContiguousStreams(_Batches):
    """The text cut into B parallel streams, read in order, T characters per step; the state is carried.

    Up to B·T + T - 1 characters do not fill a step. Each epoch skips a random number of them at its start,
    so that the steps do not always cut the text at the same places.

    ids: the encoded text, (N,).
    batch_size: streams, of all processes together.
    random_length: move the end of each step by up to T/2 at random: the gradient is cut after T characters on
        average and 2 T - 1 at most, at another distance each time.
    Raises `CharlmError` for a text too short for one step of every stream.
    """

    kind, state = "contiguous", "carried over"
    carries_state, pads = True, False

    def __init__(
        self,
        ids: Tensor,
        batch_size: int,
        seq_len: int,
        random_length: bool = False,
        *,
        reader: _Reader = _Reader(),  # noqa: B008 - immutable
    ):
        needed = batch_size * seq_len + 1
        processes = f"{reader.size} processes × " if reader.size > 1 else ""
        _check_length(
            ids, needed, f"one step: {processes}batches.batch_size × batches.seq_len + 1 = {needed}"
        )
        self.ids, self.batch_size, self.seq_len, self.random_length = ids, batch_size, seq_len, random_length
        self.reader, self.streams = reader, reader.own(torch.arange(batch_size))
        # Leaves room for an offset of up to T if the text is long enough.
        self.steps_per_epoch = max((len(ids) - seq_len) // (batch_size * seq_len), 1)

    def sequences(self, step: int) -> int:
        """Return the number of streams that all processes together read, the same in every step."""
        return self.batch_size

    def __getitem__(self, part: tuple[int, int]) -> Batch:
        """Return the batch of which the first stream has the characters from `part[0]` to `part[1]`."""
        begin, end = part
        starts = begin + self.steps_per_epoch * self.seq_len * self.streams
        return self.reader.read(self.ids, starts, end - begin)

    def _order(self, seed: int, epoch: int, start: int) -> Iterator[tuple[int, int]]:
        T, steps = self.seq_len, self.steps_per_epoch
        slack = len(self.ids) - 1 - steps * self.batch_size * T
        generator = torch.Generator().manual_seed(mix(seed, epoch))
        begin = offset = int(torch.randint(slack + 1, (1,), generator=generator))
        reach = (T - 1) // 2 if self.random_length else 0
        together = max(_SHUFFLED_AT_ONCE // self.batch_size, 1)
        for first in range(0, steps, together):
            ends = offset + T * torch.arange(first + 1, min(first + together, steps) + 1)
            if reach:
                inner = min(len(ends), steps - 1 - first)  # the end of the last step does not move
                ends[:inner] += torch.randint(-reach, reach + 1, (inner,), generator=generator)
            self.reader.release()
            for step, end in enumerate(ends.tolist(), first):
                if step >= start:
                    yield begin, end
                begin = end


class Records(_Batches):
    """Whole records, each read from the boundary before it to its own, in random order.

    x is the boundary and the record, y the record and the boundary; the state is reset for each. Records of
    similar length are in one batch; y is -1, and x the boundary, after the end of the shorter ones.

    ids: the encoded records, each followed by `boundary`, (N,).
    batch_size: records per step, of all processes together.
    seq_len: the length of the longest record, with its boundary.
    """

    kind, state = "records", "reset for each record"
    carries_state, pads = False, True

    def __init__(
        self,
        ids: Tensor,
        boundary: int,
        batch_size: int,
        *,
        reader: _Reader = _Reader(),  # noqa: B008 - immutable
    ):
        self.ids, self.boundary, self.batch_size, self.reader = ids, boundary, batch_size, reader
        ends = (ids == boundary).nonzero()[:, 0] + 1
        self.starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        self.lengths = ends - self.starts
        self.count, self.seq_len = len(ends), int(self.lengths.max())
        self.steps_per_epoch = -(-self.count // batch_size)

    def sequences(self, step: int) -> int:
        """Return the number of records that all processes together read: fewer in an epoch's last step."""
        return min(self.batch_size, self.count - step * self.batch_size)

    def __getitem__(self, records: Tensor) -> Batch:
        """Return the batch of the records numbered `records` (B,); T is the length of the longest."""
        starts, lengths = self.starts[records, None], self.lengths[records, None]
        steps = torch.arange(max(lengths.flatten().tolist(), default=1))
        y = self.ids[(starts + steps).clamp(max=len(self.ids) - 1)].long()
        y[steps >= lengths] = -1
        x = torch.cat([y.new_full((len(y), 1), self.boundary), y[:, :-1]], 1)
        return x.masked_fill(x < 0, self.boundary), y

    def _order(self, seed: int, epoch: int, start: int) -> Iterator[Tensor]:
        size, together = self.batch_size, self.batch_size * _SORTED_TOGETHER
        for first in range(start // _SORTED_TOGETHER * together, self.count, together):
            numbers = torch.arange(first, min(first + together, self.count))
            records = shuffled(numbers, self.count, seed, epoch)
            batches = list(torch.split(records[self.lengths[records].argsort(stable=True)], size))
            full = len(records) // size  # an epoch's last batch may have fewer records, and stays the last
            order = shuffled(torch.arange(full), full, seed, mix(epoch, first))
            batches[:full] = [batches[k] for k in order.tolist()]
            self.reader.release()
            for step, batch in enumerate(batches, first // size):
                if step >= start:
                    yield self.reader.own(batch)


def shuffled(indices: Tensor, count: int, seed: int, epoch: int) -> Tensor:
    """Return the images of `indices` (B,) in a random permutation of 0…count-1, which is not stored.

    A Feistel network permutes the numbers of an even number of bits that hold `count`; a result that is not
    below `count` is permuted again (Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
    """
    half_bits = max((count - 1).bit_length() + 1, 2) // 2
    mask = (1 << half_bits) - 1
    keys = [mix(seed, epoch, which) for which in range(4)]
    result = indices.clone()
    outside = torch.ones_like(indices, dtype=torch.bool)
    while outside.any():
        left, right = result[outside] >> half_bits, result[outside] & mask
        for key in keys:
            left, right = right, left ^ (_hash(right, key) & mask)
        result[outside] = (left << half_bits) | right
        outside = result >= count
    return result


def _hash(values: Tensor, key: int) -> Tensor:
    """Return 31-bit hashes of int64 values, by two rounds of multiply and xor-shift."""
    values = (values ^ key) & 0x7FFFFFFF
    for _ in range(2):
        values = (values * 0x45D9F3B) & 0x7FFFFFFF
        values = values ^ (values >> 15)
    return values


def mix(*numbers: int) -> int:
    """Return one 31-bit number made from several, such as a seed and an epoch."""
    result = 0x2545F491
    for number in numbers:
        for part in (number & 0xFFFFFFFF, number >> 32):
            result = ((result ^ part) * 0x5851F42D4C957F2D + 0x14057B7EF767814F) & (2**64 - 1)
            result ^= result >> 29
    return result & 0x7FFFFFFF


def _check_length(ids: Tensor, needed: int, what: str) -> None:
    if len(ids) < needed:
        raise CharlmError(
            f"the training split has {len(ids):,} characters, too few for {what}; "
            "use a longer text, or smaller batches"
        )
