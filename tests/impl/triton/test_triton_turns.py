"""Turns of blocks of keys against the visits of all, for random shapes."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

from spattention.impl.triton import tiles, turns

SHAPES = 1500
Interval = tuple[int, int]
NONE = (tiles.MISSING.value, tiles.MISSING.value)


class Shape(NamedTuple):
    """Two intervals, the farther one perhaps missing, and the sizes of a case. On a part of the
    keys the intervals lie elsewhere, even at negative distances.
    """

    intervals: list[Interval]
    queries: int
    keys: int
    rows: int  # queries of a block
    columns: int  # keys of a block

    @property
    def key_blocks(self) -> list[int]:
        """In the order in which programs start."""
        return list(reversed(range(-(-self.keys // self.columns))))


def walk(block: int, shape: Shape) -> list[tuple[int, int, int]]:
    """Block of queries, turn and number of turns of each visit, in order."""
    (near_0, far_0), (near_1, far_1) = shape.intervals
    bands = SimpleNamespace(near_0=near_0, far_0=far_0, near_1=near_1, far_1=far_1)
    found = []
    before = mock.patch.object(turns, "turns_before", turns.turns_before.fn)
    sizes = shape.rows, shape.columns
    for place, (near, far) in enumerate(shape.intervals):
        first = block * shape.columns
        last, count = tiles.whole_query_blocks.fn(first, near, far, shape.queries, *sizes)
        for query in range(last - count + 1, last + 1):
            given = (block, query, place == 0, bands, shape.queries, shape.keys, *sizes, 2)
            with before:
                turn, total = turns.turn_of.fn(*given)
            found.append((query, int(turn), total))
    return found


def shape_of(rng: random.Random) -> Shape:
    """A random shape, half of them parts."""
    queries = keys = rng.randint(1, 160)
    shift = 0
    if rng.random() < 0.5:
        keys, shift = rng.randint(1, 160), rng.randint(0, 80)
    edges = sorted(edge - shift for edge in rng.sample(range(queries + shift + 40), 4))
    nearer, farther = (edges[0], edges[1]), (edges[2], edges[3])
    return Shape([nearer, rng.choice((farther, NONE))], queries, keys, 4, rng.choice((4, 8, 12)))


def test_turns_of_a_block_of_queries_are_all_numbers() -> None:
    """Visits to a block of queries have the turns 0, 1, 2 and so on, from the last block of keys to
    the first, and each knows how many there are.
    """
    rng = random.Random(0)
    seen = 0
    for _ in range(SHAPES):
        shape = shape_of(rng)
        found: dict[int, list[tuple[int, int]]] = {}
        for block in shape.key_blocks:
            for query, turn, total in walk(block, shape):
                found.setdefault(query, []).append((turn, total))
        for visits in found.values():
            assert visits == [(turn, len(visits)) for turn in range(len(visits))]
            seen += len(visits)
    assert seen > 10_000


def test_a_visit_waits_for_earlier_programs_alone() -> None:
    """With as many programs at work as fit, in the order in which they start, all come to their
    end: each waits for its turns.
    """
    rng = random.Random(1)
    for _ in range(300):
        shape = shape_of(rng)
        waiting = shape.key_blocks
        walks = {block: walk(block, shape) for block in waiting}
        over = dict.fromkeys(range(-(-shape.queries // shape.rows)), 0)
        running: list[int] = []
        while waiting or running:
            while waiting and len(running) < 3:
                running.append(waiting.pop(0))
            ready = [b for b in running if not walks[b] or over[walks[b][0][0]] == walks[b][0][1]]
            assert ready, "all programs wait"
            block = rng.choice(ready)
            if walks[block]:
                over[walks[block].pop(0)[0]] += 1
            else:
                running.remove(block)
