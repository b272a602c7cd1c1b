import pickle
from collections import Counter
from itertools import islice

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from bt_adapter_hf.data.order import EpochOrder, OrderSampler


TABLES = [[7], [3, 0, 5, 1, 7], [1] * 13, [0, 2, 40, 2], [10, 10, 10]]


@pytest.mark.parametrize("shard_rows", TABLES)
@pytest.mark.parametrize("chunk_rows", [1, 6, 1000])
def test_every_row_once_per_epoch(shard_rows, chunk_rows):
    order = EpochOrder(shard_rows, seed=3, chunk_rows=chunk_rows)
    rows = sum(shard_rows)
    assert len(order) == rows
    pairs = list(islice(order.iterate(), 3 * rows))
    assert [epoch for epoch, _ in pairs] == [epoch for epoch in range(3) for _ in range(rows)]
    for epoch in range(3):
        assert sorted(row for e, row in pairs if e == epoch) == list(range(rows))


@pytest.mark.parametrize("shard_rows", TABLES)
def test_any_start_gives_the_rest(shard_rows):
    """Position by position, in any order of asking, and by an object that never saw what came before."""
    order = EpochOrder(shard_rows, seed=1, chunk_rows=6)
    pairs = list(islice(order.iterate(), 2 * len(order) + 3))
    for start in reversed(range(len(pairs))):
        fresh = EpochOrder(shard_rows, seed=1, chunk_rows=6)
        assert order.row(start) == fresh.row(start) == pairs[start]
        assert list(islice(fresh.iterate(start), len(pairs) - start)) == pairs[start:]
        sampler = OrderSampler(order, start, len(pairs) - start)
        assert len(sampler) == len(pairs) - start and list(sampler) == pairs[start:] == list(sampler)


@pytest.mark.parametrize("shard_rows", TABLES)
@pytest.mark.parametrize("chunk_rows", [1, 6, 1000])
def test_chunks_hold_the_rows_of_their_shards(shard_rows, chunk_rows):
    order = EpochOrder(shard_rows, seed=2, chunk_rows=chunk_rows)
    shard_of = [shard for shard, count in enumerate(shard_rows) for _ in range(count)]
    position, rows, met = 0, len(order), Counter()
    for epoch, start, stop, shards in order.chunks():
        if start == 3 * rows:
            break
        assert start == position and epoch == start // rows == (stop - 1) // rows  # never across epochs
        assert stop - start >= chunk_rows or stop % rows == 0
        assert stop - start - shard_rows[shards[-1]] < chunk_rows  # no shard more than needed
        assert Counter(shard_of[order.row(p)[1]] for p in range(start, stop)) == {s: shard_rows[s] for s in shards}
        assert next(order.chunks(stop - 1)) == (epoch, start, stop, shards)
        position = stop
        met.update(shards)
    assert met == {shard: 3 for shard, count in enumerate(shard_rows) if count}


def test_rows_and_shards_are_shuffled_anew_in_each_epoch_and_by_each_seed():
    def rows(seed, epoch, shard_rows=(50,) * 6, chunk_rows=100):
        order = EpochOrder(list(shard_rows), seed, chunk_rows)
        return [row for _, row in islice(order.iterate(epoch * 300), 300)]

    first = rows(0, 0)
    assert first == rows(0, 0) != sorted(first)
    others = [rows(0, 1), rows(1, 0), rows(0, 0, chunk_rows=300), rows(0, 0, shard_rows=(300,))]
    assert len({tuple(order) for order in [first, *others]}) == 5
    assert {row // 50 for row in first[:100]} != {row // 50 for row in rows(0, 1)[:100]}
    # rows of the two shards of a chunk alternate: as many changes of shard as chance gives, about half
    assert 30 < sum(a // 50 != b // 50 for a, b in zip(first[:100], first[1:100], strict=False)) < 70
    # no chunk is shuffled like another, or like itself in another epoch
    whole = EpochOrder([100] * 3, 0, 100)
    patterns = {tuple(whole.row(p)[1] % 100 for p in range(start, start + 100)) for start in range(0, 900, 100)}
    assert len(patterns) == 9


def test_the_order_is_the_same_on_every_machine():
    """Frozen: a checkpoint of today must go on with the right row tomorrow."""
    order = EpochOrder([3, 0, 5, 1, 7], seed=3, chunk_rows=4)
    assert [order.row(p)[1] for p in range(16)] == [14, 13, 9, 11, 1, 2, 10, 12, 15, 0, 7, 8, 5, 4, 3, 6]
    assert [order.row(p)[1] for p in range(160, 176)] == [12, 15, 9, 14, 8, 11, 13, 10, 4, 5, 7, 3, 6, 2, 0, 1]


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 3, 5])
def test_processes_share_the_positions_of_a_step(processes, batch):
    """Rank r has batches r, r + W, ...: together the steps take the positions one after the other."""
    order = EpochOrder([4, 11, 2], seed=0, chunk_rows=5)
    start, steps = 6, 7
    sampler = OrderSampler(order, start, steps * batch * processes)
    ranks = [
        list(BatchSamplerShard(BatchSampler(sampler, batch, drop_last=False), processes, rank))
        for rank in range(processes)
    ]
    assert {len(batches) for batches in ranks} == {steps}
    taken = [pair for step in zip(*ranks, strict=True) for one in step for pair in one]
    assert taken == [order.row(start + i) for i in range(steps * batch * processes)]


def test_a_large_table_costs_memory_for_one_chunk_only():
    """10 million rows: the state is a number, and a row in the middle is found without going through the others."""
    order = EpochOrder([1000] * 10_000, seed=0, chunk_rows=10_000)
    assert order.row(123_456_789)[0] == 12
    assert next(order.chunks(123_456_789)).stop - next(order.chunks(123_456_789)).start == 10_000
    assert len(pickle.dumps(order)) < 2_000_000


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([], 0), "no rows in its 0 shards"),
        (([0, 0], 0), "no rows in its 2 shards"),
        (([3], 0, 0), "chunk_rows=0 must be at least 1"),
        (([3], -1), "seed=-1 at least 0"),
    ],
)
def test_bad_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        EpochOrder(*arguments)
    with pytest.raises(ValueError, match="position=-1"):
        EpochOrder([3], 0).row(-1)
