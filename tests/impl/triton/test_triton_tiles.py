"""Tile arithmetic against the dense mask: every block of queries and of keys, for thousands of
shapes.
"""

from __future__ import annotations

import random

import pytest
import torch

from spattention import BandPattern
from spattention.bands import in_bands
from spattention.impl.triton import launch, tiles

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
                assert tiles.steps.fn(low, high, block) == -(-len(needed) // block)
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


def test_a_missing_interval_reaches_nothing() -> None:
    bands = launch._table(BandPattern(((), ((0, 4),)), 8).flat, 2)[0]
    empty = next(row for row in bands if row[0] == 0)
    for near, far in (empty[1:3], empty[3:5]):
        low, high = tiles.key_range.fn(0, 1_000_000, near, far, 0, 1_000_000)
        assert tiles.steps.fn(low, high, 64) == 0
        low, high = tiles.query_range.fn(0, 1_000_000, near, far, 0, 1_000_000)
        assert tiles.steps.fn(low, high, 64) == 0


def test_heads_come_by_falling_work_and_members_stay_together() -> None:
    pattern = BandPattern((((0, 1),), ((0, 8),), ((2, 3),), ((0, 4),)), 8)
    by_head, by_key_head = launch._table(pattern.flat, 2)
    assert [row[0] for row in by_head] == [1, 3, 0, 2]
    assert [row[0] for row in by_key_head] == [0, 1, 2, 3]
    assert [row[0] for row in launch._table(pattern.flat, 4)[1]] == [1, 3, 0, 2]


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
        ends = [*starts[1:], tiles.slots(offsets[-1] + behind, len(lengths), block)]
        for length, start, end in zip([*lengths, behind], starts, ends):
            assert end - start >= -(-length // block)
