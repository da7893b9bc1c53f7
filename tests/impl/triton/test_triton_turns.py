"""Turns of blocks of keys against the visits of all, for random shapes."""

from __future__ import annotations

import random
from types import SimpleNamespace
from unittest import mock

from spattention.impl.triton import tiles, turns

SHAPES = 1500
Interval = tuple[int, int]
NONE = (tiles.MISSING.value, tiles.MISSING.value)


def walk(
    block: int, intervals: list[Interval], tokens: int, rows: int, keys: int
) -> list[tuple[int, int, int]]:
    """Block of queries, turn and number of turns of each visit, in order."""
    (near_0, far_0), (near_1, far_1) = intervals
    bands = SimpleNamespace(near_0=near_0, far_0=far_0, near_1=near_1, far_1=far_1)
    found = []
    before = mock.patch.object(turns, "turns_before", turns.turns_before.fn)
    for place, (near, far) in enumerate(intervals):
        last, count = tiles.whole_query_blocks.fn(block * keys, near, far, tokens, rows, keys)
        for query in range(last - count + 1, last + 1):
            given = (block, query, place == 0, bands, tokens, rows, keys, 2)
            with before:
                turn, total = turns.turn_of.fn(*given)
            found.append((query, int(turn), total))
    return found


def shape(rng: random.Random) -> tuple[list[Interval], int, int, int]:
    """Two intervals, the farther one perhaps missing, and the sizes of a case."""
    rows, keys = 4, rng.choice((4, 8, 12))
    tokens = rng.randint(1, 160)
    edges = sorted(rng.sample(range(tokens + 40), 4))
    nearer, farther = (edges[0], edges[1]), (edges[2], edges[3])
    return [nearer, rng.choice((farther, NONE))], tokens, rows, keys


def test_turns_of_a_block_of_queries_are_all_numbers() -> None:
    """Visits to a block of queries have the turns 0, 1, 2 and so on, from the last block of keys to
    the first, and each knows how many there are.
    """
    rng = random.Random(0)
    seen = 0
    for _ in range(SHAPES):
        intervals, tokens, rows, keys = shape(rng)
        found: dict[int, list[tuple[int, int]]] = {}
        for block in reversed(range(-(-tokens // keys))):
            for query, turn, total in walk(block, intervals, tokens, rows, keys):
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
        intervals, tokens, rows, keys = shape(rng)
        waiting = list(reversed(range(-(-tokens // keys))))
        walks = {block: walk(block, intervals, tokens, rows, keys) for block in waiting}
        over = dict.fromkeys(range(-(-tokens // rows)), 0)
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
