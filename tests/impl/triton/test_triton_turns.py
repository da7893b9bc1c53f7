"""Visits and turns against the dense mask, for random shapes."""

from __future__ import annotations

import random

from spattention.impl.triton import tiles, turns

SHAPES = 1500


def test_visits_and_turns_are_what_the_mask_says() -> None:
    """Blocks of keys visit all blocks of queries that see one of their keys, and every visit knows
    how many came before it.
    """
    rng = random.Random(0)
    visits_seen = 0
    for _ in range(SHAPES):
        rows, keys = rng.choice((4, 8)), rng.choice((8, 16))
        tokens = rng.randint(1, 120)
        near = rng.choice((0, rng.randint(0, 130)))
        far = near + rng.choice((1, rng.randint(1, 140)))
        if rng.random() < 0.1:
            near = far = tiles.MISSING.value
        visited = set()
        for block in range(-(-tokens // keys)):
            last, count = turns.visits.fn(block * keys, near, far, tokens, rows, keys)
            visited |= {(query, block) for query in range(last - count + 1, last + 1)}
        for query in range(-(-tokens // rows)):
            before = 0
            for block in range(-(-tokens // keys) + 1):
                found, visits = turns.turns_before.fn(block, query, near, far, tokens, rows, keys)
                assert found == before
                assert bool(visits) == ((query, block) in visited)
                before += bool(visits)
                visits_seen += bool(visits)
        needed = {
            (query // rows, key // keys)
            for query in range(tokens)
            for key in range(max(0, query - far + 1), query - near + 1)
        }
        assert needed <= visited
    assert visits_seen > 10_000


def test_a_visit_waits_for_earlier_programs_alone() -> None:
    """With as many programs at work as fit, in the order in which they start, all come to their
    end: each waits for its turns.
    """
    rng = random.Random(1)
    for _ in range(200):
        rows, keys, tokens = 4, 8, rng.randint(1, 160)
        edges = sorted(rng.sample(range(tokens + 40), 4))
        intervals = (edges[:2], edges[2:])[: rng.choice((1, 2))]
        n_blocks = -(-tokens // keys)
        walks = [walk(block, intervals, tokens, rows, keys) for block in range(n_blocks)]
        over = dict.fromkeys(range(-(-tokens // rows)), 0)
        waiting, running = list(range(n_blocks)), list[int]()
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


def walk(
    block: int, intervals: tuple[list[int], ...], tokens: int, rows: int, keys: int
) -> list[tuple[int, int]]:
    """Block of queries and turn of each visit, in order, as `hopper/query_sums.py` makes them."""
    found = []
    for place in reversed(range(len(intervals))):
        last, count = turns.visits.fn(block * keys, *intervals[place], tokens, rows, keys)
        for query in range(last, last - count, -1):
            turn = 0
            for other, interval in enumerate(intervals):
                before, also = turns.turns_before.fn(block, query, *interval, tokens, rows, keys)
                turn += before + bool(other > place and also)
            found.append((query, turn))
    return found
