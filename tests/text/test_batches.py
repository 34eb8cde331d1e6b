from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from charlm.config import BatchesConfig
from charlm.errors import CharlmError
from charlm.text.batches import (
    ContiguousStreams,
    Records,
    SlidingWindows,
    _Reader,
    make_batches,
    rank_slice,
    shuffled,
    val_characters,
)


def walk(batches, epoch=0, start=0, seed=7):
    return list(batches.loader(seed, epoch, start))


@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 99))
def test_shuffled_is_a_permutation(count, seed, epoch):
    assert sorted(shuffled(torch.arange(count), count, seed, epoch).tolist()) == list(range(count))


def test_shuffled_mixes_well():
    order = shuffled(torch.arange(10_000), 10_000, 1, 0).double()
    # Of a random permutation: no correlation of neighbours or with the place, one fixed point on average.
    for pair in (order[:-1], order[1:]), (order, torch.arange(10_000.0, dtype=torch.double)):
        assert abs(torch.corrcoef(torch.stack(pair))[0, 1]) < 0.04
    assert (order == torch.arange(10_000)).sum() < 8
    assert (shuffled(torch.arange(10_000), 10_000, 1, 1) != order).sum() > 9_900


@pytest.mark.parametrize(("length", "T", "stride"), [(40, 7, 3), (8, 7, 1), (100, 5, 11)])
def test_windows_are_those_of_a_naive_loop(length, T, stride):
    ids = torch.randint(0, 50, (length,), dtype=torch.uint8)
    naive = [ids[i : i + T + 1].tolist() for i in range(0, length - T, stride)]
    batches = walk(SlidingWindows(ids, 3, T, stride, shuffle=False))
    assert [x.tolist() + [y.tolist()[-1]] for X, Y in batches for x, y in zip(X, Y, strict=True)] == naive
    for x, y in batches:
        assert x.dtype == y.dtype == torch.int64
        assert x.shape == y.shape and x.shape[1] == T
        assert torch.equal(x[:, 1:], y[:, :-1])
    shuffled_epoch = [
        x.tolist() + [y.tolist()[-1]]
        for X, Y in walk(SlidingWindows(ids, 3, T, stride))
        for x, y in zip(X, Y, strict=True)
    ]
    assert sorted(shuffled_epoch) == sorted(naive)


def test_windows_are_views_of_the_text():
    ids = torch.zeros(1000, dtype=torch.uint8)
    windows = SlidingWindows(ids, 4, 99, 1)
    assert windows.count == 901
    assert windows.ids.untyped_storage().data_ptr() == ids.untyped_storage().data_ptr()


def test_a_batch_is_gathered_in_one_operation(monkeypatch):
    windows = SlidingWindows(torch.arange(100), 10, 9, 1)
    gathered, unfold = [], torch.Tensor.unfold
    monkeypatch.setattr(torch.Tensor, "unfold", lambda *args: gathered.append(args) or unfold(*args))
    assert len(walk(windows)) == windows.steps_per_epoch == len(gathered) == 10


def test_the_order_of_many_batches_is_computed_together(monkeypatch):
    sizes, orders = [], []

    def count(indices, *rest):
        sizes.append(len(indices))
        return shuffled(indices, *rest)

    monkeypatch.setattr("charlm.text.batches.shuffled", count)
    windows = SlidingWindows(torch.arange(1001), batch_size=3, seq_len=1)
    for at_once in (1, 7, 2**14):
        monkeypatch.setattr("charlm.text.batches._SHUFFLED_AT_ONCE", at_once)
        orders.append([x.tolist() for x, _ in windows.loader(seed=1, epoch=2, start=5)])
    assert orders[0] == orders[1] == orders[2] and len(orders[0]) == 329
    assert max(sizes[:329]) == 3 and sizes[-1] == 985, "one by one, and all of the epoch that is left"


def test_max_windows_uses_the_first():
    ids = torch.arange(100)
    firsts = [x[0].item() for X, _ in walk(SlidingWindows(ids, 4, 10, 5, False, max_windows=6)) for x in X]
    assert firsts == [0, 5, 10, 15, 20, 25]


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 60), st.integers(0, 5))
def test_streams_continue_where_the_step_before_ended(B, T, extra, epoch):
    ids = torch.arange(B * T + 1 + extra)
    streams = ContiguousStreams(ids, B, T)
    steps = walk(streams, epoch)
    assert len(steps) == streams.steps_per_epoch >= 1
    x = torch.cat([x for x, _ in steps], dim=1)
    y = torch.cat([y for _, y in steps], dim=1)
    assert torch.equal(y, x + 1)
    assert torch.equal(
        x, torch.arange(x.numel()).view(B, -1) + x[0, 0]
    )  # in order, none twice, none left out
    assert len(ids) - x.numel() <= B * T + T + 1


@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 60), st.integers(0, 5))
def test_streams_of_random_lengths_continue_too(B, T, extra, epoch):
    ids = torch.arange(B * T * 5 + 1 + extra)
    fixed, streams = ContiguousStreams(ids, B, T), ContiguousStreams(ids, B, T, random_length=True)
    steps = walk(streams, epoch)
    assert len(steps) == streams.steps_per_epoch == fixed.steps_per_epoch
    x, y = (torch.cat([step[k] for step in steps], dim=1) for k in (0, 1))
    assert torch.equal(y, x + 1)
    assert torch.equal(x, torch.arange(x.numel()).view(B, -1) + x[0, 0])
    assert all(1 <= step[0].shape[1] < 2 * T + (T == 1) for step in steps)


def test_random_lengths_differ_and_average_t():
    streams = ContiguousStreams(torch.arange(40_000), 2, 40, random_length=True)
    lengths = [x.shape[1] for x, _ in walk(streams)]
    assert len(set(lengths)) > 30 and sum(lengths) / len(lengths) == 40
    assert lengths != [x.shape[1] for x, _ in walk(streams, 1)]
    assert lengths[7:] == [x.shape[1] for x, _ in walk(streams, 0, start=7)]


def test_streams_begin_at_another_offset_each_epoch():
    streams = ContiguousStreams(torch.arange(1000), 4, 20)
    offsets = {walk(streams, epoch)[0][0][0, 0].item() for epoch in range(12)}
    assert len(offsets) > 4


@pytest.mark.parametrize("kind", [SlidingWindows, ContiguousStreams])
def test_an_epoch_started_in_the_middle_has_the_same_batches(kind):
    batches = kind(torch.arange(500), 4, 10)
    whole, rest = walk(batches, 3), walk(batches, 3, start=5)
    assert len(rest) == len(whole) - 5
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[5:], rest, strict=True))
    assert not torch.equal(whole[0][0], walk(batches, 4)[0][0])
    assert not torch.equal(whole[0][0], walk(batches, 3, seed=8)[0][0])


@pytest.mark.parametrize("kind", [SlidingWindows, ContiguousStreams])
def test_loaders_do_not_draw_from_torch_s_generator(kind):
    before = torch.get_rng_state()
    walk(kind(torch.arange(500), 4, 10))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("sampling", ["sliding", "contiguous"])
def test_backward_batches_are_those_of_the_reversed_text(sampling):
    ids, config = torch.arange(500), BatchesConfig(batch_size=3, seq_len=7, stride=4, sampling=sampling)
    backward, turned = make_batches(ids, config, backward=True), make_batches(ids.flip(0), config)
    assert backward.ids.data_ptr() == ids.data_ptr(), "without a copy"
    for (x, y), (turned_x, turned_y) in zip(walk(backward), walk(turned), strict=True):
        assert torch.equal(x, turned_x) and torch.equal(y, turned_y)


@pytest.mark.parametrize("sampling", ["sliding", "contiguous"])
def test_memory_is_released_during_an_epoch(monkeypatch, sampling):
    monkeypatch.setattr("charlm.text.batches._READ_AT_ONCE", 10)
    monkeypatch.setattr("charlm.text.batches._SHUFFLED_AT_ONCE", 40)
    released = []
    config = BatchesConfig(batch_size=4, seq_len=5, stride=5, sampling=sampling)
    steps = len(walk(make_batches(torch.arange(999), config, release=lambda: released.append(1))))
    assert steps / 10 <= len(released) <= steps


@pytest.mark.parametrize("sampling", ["sliding", "contiguous"])
def test_a_batch_that_carries_the_state_continues_the_one_before(sampling):
    config = BatchesConfig(batch_size=2, seq_len=9, sampling=sampling)
    batches = make_batches(torch.arange(200), config)
    steps = walk(batches)
    continues = all(torch.equal(x[:, 0], y[:, -1]) for (_, y), (x, _) in pairwise(steps))
    assert len(steps) > 1 and batches.carries_state == continues


BOUNDARY = 9


def encoded(records):
    """Return the ids of `records`, lists of ids, each followed by the boundary."""
    return torch.tensor([id_ for record in records for id_ in (*record, BOUNDARY)])


def read(x, y):
    """Return the records in a batch, from x and from y, which must agree; padding must be at the ends."""
    found = []
    for inputs, targets in zip(x.tolist(), y.tolist(), strict=True):
        length = targets.index(BOUNDARY) + 1
        assert targets[length:] == [-1] * (len(targets) - length)
        assert inputs == [BOUNDARY, *targets[: length - 1]] + [BOUNDARY] * (len(targets) - length)
        found.append(targets[: length - 1])
    return found


RECORDS = st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=9), min_size=1, max_size=60)


@given(RECORDS, st.integers(1, 7), st.integers(0, 5), st.integers(1, 3))
def test_each_record_is_read_once_in_an_epoch_whole_and_padded(records, batch_size, epoch, together):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("charlm.text.batches._SORTED_TOGETHER", together)
        batches = Records(encoded(records), BOUNDARY, batch_size)
        steps = walk(batches, epoch)
        found = [record for x, y in steps for record in read(x, y)]
        assert sorted(found) == sorted(records)
        assert len(steps) == batches.steps_per_epoch
        assert [len(x) for x, _ in steps] == [batches.sequences(step) for step in range(len(steps))]
        start = len(steps) // 2
        rest = walk(batches, epoch, start)
        assert all(torch.equal(a[1], b[1]) for a, b in zip(steps[start:], rest, strict=True))
        parts = [
            Records(encoded(records), BOUNDARY, batch_size, reader=_Reader(rank=k, size=2)) for k in (0, 1)
        ]
        for step, *own in zip(steps, *(walk(part, epoch) for part in parts), strict=True):
            assert read(*step) == [record for batch in own for record in read(*batch)]


def test_records_in_a_batch_have_similar_lengths_and_their_order_is_random():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (400,), generator=generator).tolist()
    batches = Records(encoded([[k % 9] * length for k, length in enumerate(lengths)]), BOUNDARY, 8)
    steps = walk(batches)
    assert sum(int((y < 0).sum()) for _, y in steps) < 0.1 * sum(lengths)
    widths = [y.shape[1] for _, y in steps]
    assert widths != sorted(widths) and batches.seq_len == max(widths)
    assert widths != [y.shape[1] for _, y in walk(batches, 1)]


@given(st.integers(0, 40), st.integers(1, 9))
def test_the_slices_of_all_ranks_are_the_sequences(count, size):
    parts = [list(range(count))[rank_slice(count, rank, size)] for rank in range(size)]
    assert list(chain(*parts)) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_max_val_windows_counts_windows():
    assert val_characters(BatchesConfig(seq_len=32, stride=1, max_val_windows=5120)) == 5120 + 32
    assert val_characters(BatchesConfig()) is None


@pytest.mark.parametrize(("kind", "needed"), [(SlidingWindows, 11), (ContiguousStreams, 41)])
def test_a_text_too_short_is_refused(kind, needed):
    kind(torch.arange(needed), 4, 10)
    with pytest.raises(CharlmError, match=f"{needed - 1} characters.*= {needed}"):
        kind(torch.arange(needed - 1), 4, 10)
