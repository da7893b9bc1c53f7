"""Tile arithmetic against the dense mask: every block of queries and of keys, for thousands of
shapes.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from spattention import BandPattern
from spattention.bands import in_bands
from spattention.impl.triton import call, scheduler, tiles, varlen
from spattention.impl.triton.hopper import TileOrder, planning

SHAPES = 2000


def _pattern(rng: random.Random, heads: int, span: int) -> BandPattern:
    return rng.choice(
        (
            lambda: BandPattern.exclusive(heads, span),
            lambda: BandPattern.shared_local(heads, span),
            lambda: BandPattern.shared_local(heads, span, widths="geometric", local=3),
            lambda: BandPattern.sliding_window(heads, span, rng.randint(1, span)),
            lambda: BandPattern.gapped(heads, span),
            lambda: BandPattern.dense(heads, span),
            lambda: BandPattern((((0, span),), *((),) * (heads - 1)), span),
        )
    )()


def geometric(heads: int, span: int) -> BandPattern:
    return BandPattern.shared_local(heads, span, widths="geometric")


def _blocks(low: int, high: int, block: int) -> list[tuple[int, int]]:
    return [(start, min(start + block, high)) for start in range(low, high, block)]


def test_ranges_are_what_the_mask_says() -> None:
    """The range of a block is the hull of what it sees through one interval, and a tile is inside
    exactly if it is full.
    """
    rng = random.Random(0)
    tiles_seen = 0
    for _ in range(SHAPES):
        heads, keys = rng.randint(1, 5), rng.randint(1, 70)
        block = rng.choice((4, 8, 16))
        start = rng.choice((0, 0, rng.randint(0, 20)))
        queries = rng.randint(1, keys)
        pattern = _pattern(rng, heads, rng.choice((keys, keys + 5, max(1, keys - 7))))
        head = rng.randrange(heads)
        positions = torch.arange(queries) + start
        distance = positions[:, None] - torch.arange(keys)
        for near, far in pattern.intervals[head]:
            mask = in_bands(distance, (((near, far),),))[0]
            for first, end in _blocks(0, queries, block):
                low, high = tiles.key_range.fn(start + first, start + end - 1, near, far, 0, keys)
                needed = mask[first:end].any(dim=0).nonzero().flatten().tolist()
                assert list(range(low, high)) == needed
                assert tiles.num_blocks.fn(low, high, block) == -(-len(needed) // block)
                for begin, stop in _blocks(low, high, block):
                    full = bool(mask[first:end, begin:stop].all())
                    inside = tiles.is_inside.fn(
                        start + first, start + end - 1, begin, stop - 1, near, far, 0
                    )
                    assert inside == full
                    tiles_seen += 1
            for first, end in _blocks(0, keys, block):
                low, high = tiles.query_range.fn(first, end - 1, near, far, start, queries)
                needed = mask[:, first:end].any(dim=1).nonzero().flatten().tolist()
                assert list(range(low, high)) == needed
    assert tiles_seen > 10_000


def test_whole_blocks_of_queries_that_see_keys() -> None:
    """Blocks of keys visit all blocks of queries that see one of their keys, and at most those that
    would see one if every block of keys were whole.
    """
    rng = random.Random(6)
    seen = 0
    for _ in range(SHAPES):
        rows, block = rng.choice((4, 8)), rng.choice((8, 16))
        tokens = rng.randint(1, 120)
        near = rng.choice((0, rng.randint(0, 130)))
        far = near + rng.choice((1, rng.randint(1, 140)))
        if rng.random() < 0.1:
            near = far = tiles.MISSING.value
        for first in range(0, tokens, block):
            last, count = tiles.whole_query_blocks.fn(first, near, far, tokens, rows, block)
            found = set(range(last - count + 1, last + 1))
            keys = range(first, first + block)
            queries = {key + distance for key in keys for distance in range(near, far)}
            assert found == {query // rows for query in queries if query < tokens}
            seen += len(found)
    assert seen > 10_000


def test_blocks_of_a_document_start_in_it() -> None:
    """Covered from key 0 on, a range is covered whole, and nothing before its document is read."""
    rng = random.Random(5)
    moved = 0
    for _ in range(SHAPES):
        block, keys = rng.choice((4, 8, 16)), rng.randint(1, 70)
        near = rng.choice((0, rng.randint(0, 30)))
        bands = tiles.HeadBands(0, near, near + rng.randint(1, 40), tiles.MISSING, tiles.MISSING)
        first = rng.randrange(0, 80, block)
        last = first + rng.randint(0, block - 1)
        low, high = tiles.key_range.fn(first, last, bands.near_0, bands.far_0, 0, keys)
        count = tiles.num_blocks.fn(low, high, block)
        start = high - count * block
        prefix = tiles.PrefixRange(start, low, 0, start, low, 0)
        found = tiles.BlockRange(start, low, count, start, low, 0, prefix)
        found = tiles.from_zero.fn(found)
        if count:
            assert 0 <= found.start_0 <= low
            assert found.start_0 + count * block >= high
            moved += found.start_0 != start
    assert moved > 100


def test_blocks_of_pages_start_with_a_box(monkeypatch: pytest.MonkeyPatch) -> None:
    """Aligned, blocks still cover their range, with at most one more than before, and the queries
    of each half of a program find theirs among them.
    """
    monkeypatch.setattr(tiles, "num_blocks", tiles.num_blocks.fn)
    monkeypatch.setattr(tiles.tl, "where", lambda condition, yes, no: yes if condition else no)
    rng = random.Random(7)
    moved = 0
    for _ in range(SHAPES):
        block = rng.choice((8, 16))
        box, rows, keys = rng.choice((2, 4, 8)), 8, rng.randint(1, 90)
        near = rng.choice((0, rng.randint(0, 60)))
        far = near + rng.randint(1, 40)
        first = rng.randint(0, 90)
        low, high = tiles.key_range.fn(first, first + 2 * rows - 1, near, far, 0, keys)
        before = tiles.num_blocks(low, high, block)
        start = high - before * block
        aligned, count = tiles.aligned_range.fn(start, low, before, block, box)
        assert count <= before + 1
        assert count == 0 or (aligned % box == 0 and aligned <= low)
        assert count == 0 or high <= aligned + count * block < high + box
        assert (count == 0) == (before == 0)
        moved += aligned != start
        begin = max(aligned, 0)
        for half in (first, first + rows):
            own_low, own_high = tiles.key_range.fn(half, half + rows - 1, near, far, 0, keys)
            front, own = tiles.blocks_within.fn(begin, own_low, own_high, block)
            if own_low < own_high:
                assert begin + front * block <= own_low
                assert own_high <= begin + (front + own) * block
                assert front + own <= count
    assert moved > 1_000


def test_the_steps_of_a_part_of_a_block() -> None:
    """Half of a block's queries see a run of its blocks of keys, all but at most one at the end."""
    rng = random.Random(3)
    passed_over = 0
    for _ in range(SHAPES):
        block, rows = rng.choice(((8, 8), (16, 8))), 8
        size, keys = block[0], rng.randint(1, 90)
        near = rng.choice((0, rng.randint(0, 60)))
        far = near + rng.randint(1, 40)
        first = rng.randrange(0, 90, 2 * rows)
        low, high = tiles.key_range.fn(first, first + 2 * rows - 1, near, far, 0, keys)
        steps = tiles.num_blocks.fn(low, high, size)
        begin = high - steps * size
        for half in (first, first + rows):
            own_low, own_high = tiles.key_range.fn(half, half + rows - 1, near, far, 0, keys)
            front, count = tiles.blocks_within.fn(begin, own_low, own_high, size)
            seen = range(max(own_low, 0), own_high)
            needed = [
                step
                for step in range(steps)
                if any(begin + step * size <= key < begin + (step + 1) * size for key in seen)
            ]
            assert needed == list(range(front, front + count))
            if count:
                assert front + steps - front - count <= 1
            passed_over += steps - count
    assert passed_over > 1_000


def test_a_missing_interval_reaches_nothing() -> None:
    bands = call.sorted_bands(BandPattern(((), ((0, 4),)), 8).flat, 2)[0]
    empty = next(row for row in bands if row[0] == 0)
    for near, far in (empty[1:3], empty[3:5]):
        low, high = tiles.key_range.fn(0, 1_000_000, near, far, 0, 1_000_000)
        assert tiles.num_blocks.fn(low, high, 64) == 0
        low, high = tiles.query_range.fn(0, 1_000_000, near, far, 0, 1_000_000)
        assert tiles.num_blocks.fn(low, high, 64) == 0


def test_heads_are_sorted_by_work_within_groups() -> None:
    pattern = BandPattern((((0, 1),), ((0, 8),), ((2, 3),), ((0, 4),)), 8)
    by_head, by_key_head = call.sorted_bands(pattern.flat, 2)
    assert [row[0] for row in by_head] == [1, 3, 0, 2]
    assert [row[0] for row in by_key_head] == [0, 1, 2, 3]
    assert [row[0] for row in call.sorted_bands(pattern.flat, 4)[1]] == [1, 3, 0, 2]


@pytest.mark.parametrize("round_robin", [0, 1])
def test_every_block_of_every_head_has_its_turn(round_robin: int) -> None:
    blocks, head_batches = 7, 5
    turns = [
        scheduler.work_tile.fn(program, blocks, head_batches, round_robin)
        for program in range(blocks * head_batches)
    ]
    assert sorted(turns) == [
        (head_batch, rank) for head_batch in range(head_batches) for rank in range(blocks)
    ]
    assert turns == sorted(turns, key=lambda turn: turn[round_robin])


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The bands that `num_long_blocks` reads, at address 0."""
    rows: list[list[int]] = []
    monkeypatch.setattr(scheduler.tl, "load", lambda at: rows[at // 8][at % 8])
    monkeypatch.setattr(scheduler, "num_long_blocks", scheduler.num_long_blocks.fn)
    monkeypatch.setattr(scheduler, "block_of_pair", scheduler.block_of_pair.fn)
    monkeypatch.setattr(tiles, "MISSING", tiles.MISSING.value)
    return rows


def test_pairs_share_turns_long_blocks_first(table: list[list[int]]) -> None:
    rng = random.Random(3)
    for _ in range(100):
        blocks, batch, heads, block = rng.randint(1, 9), rng.randint(1, 3), rng.randint(1, 5), 4
        near = [rng.randint(0, 45) for _ in range(heads)]
        table[:] = [[head, 0, 1, n, n + 1, 0, 0, 0] for head, n in enumerate(near)]
        head_batches = batch * heads
        turns = [
            scheduler.paired_work_tile.fn(program, 0, blocks, batch, heads, block)
            for program in range(blocks * head_batches)
        ]
        assert sorted(turns) == [
            (head_batch, rank) for head_batch in range(head_batches) for rank in range(blocks)
        ]
        long = [
            blocks - min(near[head_batch // batch] // block, blocks)
            for head_batch in range(head_batches)
        ]
        for first in range((head_batches + 1) // 2):
            pair = {first, head_batches - 1 - first}
            come = [rank < long[head_batch] for head_batch, rank in turns if head_batch in pair]
            assert come == sorted(come, reverse=True)


@pytest.mark.parametrize(
    ("near", "count"),
    [((5, 12), 5), ((5, None), 7), ((None, None), 0), ((0, 100), 0), ((0, 31), 1)],
)
def test_long_blocks_reach_the_last_interval(
    near: tuple[int | None, int | None], count: int, table: list[list[int]]
) -> None:
    first, second = (tiles.MISSING if n is None else n for n in near)
    table[:] = [[0] * 8, [0, first, first, second, second, 0, 0, 0]]
    assert scheduler.num_long_blocks(0, 1, 8, 4) == count


def test_blocks_are_sorted_by_work_after_empty_ones() -> None:
    rng = random.Random(2)
    for _ in range(SHAPES):
        keys, block = rng.randint(1, 200), rng.choice((4, 8, 16))
        queries = rng.randint(1, keys)
        near = rng.choice((0, rng.randint(0, 250), tiles.MISSING.value))
        far = near + rng.randint(1, 100)
        blocks = -(-queries // block)
        order = [scheduler.query_block.fn(rank, near, blocks, block) for rank in range(blocks)]
        assert sorted(order) == list(range(blocks))
        work = []
        for index in order:
            last = min((index + 1) * block, queries) - 1
            low, high = tiles.key_range.fn(index * block, last, near, far, 0, keys)
            work.append(max(high - low, 0))
        _assert_falling(order, work)

        blocks = -(-keys // block)
        order = [
            scheduler.key_block.fn(rank, near, blocks, queries, block) for rank in range(blocks)
        ]
        assert sorted(order) == list(range(blocks))
        work = []
        for index in order:
            last = min((index + 1) * block, keys) - 1
            low, high = tiles.query_range.fn(index * block, last, near, far, 0, queries)
            work.append(max(high - low, 0))
        _assert_falling(order, work)


def _assert_falling(order: list[int], work: list[int]) -> None:
    """But for the last block, which may be a part of one."""
    work = [amount for index, amount in zip(order, work) if index != len(order) - 1]
    first = next((rank for rank, amount in enumerate(work) if amount), len(work))
    assert all(work[first:])
    assert work[first:] == sorted(work[first:], reverse=True)


@pytest.mark.parametrize(("near", "far"), [(0, 9), (-12, 3), (-30, -4), (2, 40), (-40, 40)])
@pytest.mark.parametrize(("queries", "keys"), [(7, 20), (20, 7), (1, 1)])
def test_mean_keys_of_a_part(queries: int, keys: int, near: int, far: int) -> None:
    """Keys that start before the queries have negative distances."""
    seen = sum(near <= i - j < far for i in range(queries) for j in range(keys))
    assert planning.mean_keys((near, far, 0, 0), keys, queries) == seen / queries


@pytest.mark.parametrize(
    ("batch", "heads", "length", "make", "expected"),
    [
        (1, 8, 4096, BandPattern.shared_local, TileOrder.PAIRED),
        (1, 8, 4096, geometric, TileOrder.ROUND_ROBIN),
        (4, 16, 4096, BandPattern.exclusive, TileOrder.ROUND_ROBIN),
        (4, 16, 4096, BandPattern.shared_local, TileOrder.HEAD_MAJOR),
        (16, 8, 1024, BandPattern.exclusive, TileOrder.ROUND_ROBIN),
        (16, 8, 1024, BandPattern.shared_local, TileOrder.HEAD_MAJOR),
        (1, 16, 16384, BandPattern.exclusive, TileOrder.ROUND_ROBIN),
        (1, 16, 16384, BandPattern.shared_local, TileOrder.HEAD_MAJOR),
        (1, 16, 65536, BandPattern.exclusive, TileOrder.HEAD_MAJOR),
    ],
)
def test_tile_order_where_it_was_faster(
    batch: int,
    heads: int,
    length: int,
    make: Callable[[int, int], BandPattern],
    expected: TileOrder,
) -> None:
    """What was measured on the reference GPU with head_dim 128 (benchmarks/LOG.md)."""
    assert planning.tile_order(make(heads, length).flat, batch, length, 128) == expected


@pytest.mark.parametrize(
    ("length", "make", "expected"),
    [
        (16384, BandPattern.shared_local, True),
        (16384, BandPattern.exclusive, False),
        (16384, geometric, False),
        (32768, geometric, True),
        (65536, BandPattern.exclusive, True),
        (65536, BandPattern.shared_local, True),
        (65536, geometric, True),
    ],
)
def test_persistent_pass_where_it_was_faster(
    length: int, make: Callable[[int, int], BandPattern], expected: bool
) -> None:
    """What was measured on the reference GPU with 16 heads, head_dim 128 (benchmarks/LOG.md)."""
    pattern = make(16, length)
    assert planning.use_persistent(pattern.flat, length, 128) is expected
    assert not planning.use_persistent(pattern.flat, length, 64)  # was not measured


@pytest.mark.parametrize("block", [16, 64])
def test_slots_are_enough_for_any_documents(block: int) -> None:
    """Document d owns the slots from `offset_d // block + d` on: as many as it has blocks, whatever
    the lengths.
    """
    rng = random.Random(1)
    for _ in range(500):
        lengths = [rng.choice((0, 1, rng.randint(0, 200))) for _ in range(rng.randint(1, 6))]
        offsets = [sum(lengths[:d]) for d in range(len(lengths) + 1)]
        behind = rng.randint(0, 40)
        starts = [offset // block + d for d, offset in enumerate(offsets)]
        ends = [*starts[1:], varlen.num_slots(offsets[-1] + behind, len(lengths), block)]
        for length, start, end in zip([*lengths, behind], starts, ends):
            assert end - start >= -(-length // block)


@pytest.mark.parametrize(
    ("batch", "heads", "length", "make", "expected"),
    [
        (1, 8, 4096, BandPattern.shared_local, False),
        (1, 8, 4096, geometric, False),
        (1, 16, 1024, BandPattern.exclusive, False),
        (1, 16, 1024, geometric, False),
        (2, 8, 2048, BandPattern.shared_local, False),
        (2, 8, 2048, geometric, False),
        (4, 16, 4096, BandPattern.exclusive, True),
        (4, 16, 4096, geometric, True),
        (16, 8, 1024, BandPattern.exclusive, True),
        (16, 8, 1024, BandPattern.shared_local, True),
        (1, 16, 16384, BandPattern.shared_local, True),
        (1, 64, 65536, BandPattern.exclusive, True),
    ],
)
def test_backward_is_split_where_it_was_faster(
    batch: int,
    heads: int,
    length: int,
    make: Callable[[int, int], BandPattern],
    expected: bool,
) -> None:
    """As was the faster by at least 1 % with head_dim 128 or 64 on the reference GPU
    (benchmarks/results/hopper_apart_*).
    """
    pattern = make(heads, length)
    assert planning.split_backward(pattern.flat, batch, length) is expected
    assert planning.mean_keys(pattern.flat, length) == sum(pattern.pairs(length)) / heads / length
