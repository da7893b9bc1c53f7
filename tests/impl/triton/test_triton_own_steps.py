"""Steps of the consumers of the persistent forward pass, computed by Python."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

import spattention as spa
from spattention.impl.triton import tiles
from spattention.impl.triton.call import sorted_bands

module = pytest.importorskip("spattention.impl.triton.hopper.own_steps")
ROWS, BLOCK_N = 64, 128


@pytest.fixture
def own_steps(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`module.own_steps`, callable on numbers."""
    names = {name: getattr(tiles, name).fn for name in ("key_range", "blocks_within")}
    plain = {
        "tiles": SimpleNamespace(**names),
        "gl": SimpleNamespace(where=lambda chosen, one, other: one if chosen else other),
    }
    for name, value in plain.items():
        monkeypatch.setattr(module, name, value)
    found: Callable[..., Any] = module.own_steps.fn
    return found


def patterns(rng: random.Random) -> spa.BandPattern:
    """Bands of any width and distance, or a library's own."""
    length = rng.choice((512, 1000, 2048))
    if rng.random() < 0.5:
        widths = rng.choice(("uniform", "geometric"))
        return spa.BandPattern.shared_local(4, length, widths=widths)
    edges = sorted(rng.sample(range(length), 4))
    return spa.BandPattern((((edges[0], edges[1]), (edges[2], edges[3])),), length)


def test_no_consumer_waits_for_itself(own_steps: Callable[..., Any]) -> None:
    """A consumer passes over at most one block of keys between two of its steps, because the next
    one's buffer is free only after its step; and it leaves out no block that it sees.
    """
    rng = random.Random(0)
    form = SimpleNamespace(BLOCK_N=BLOCK_N, INTERVALS=2, PREFIX=0)
    seen = 0
    for _ in range(300):
        pattern = patterns(rng)
        tokens = rng.choice((100, 600, 1024, 1900))
        for entry in sorted_bands(pattern.flat, pattern.num_heads)[0]:
            bands = tiles.HeadBands(*entry[:5])
            for start in rng.sample(range(0, tokens, 2 * ROWS), -(-tokens // (2 * ROWS))):
                end = min(start + 2 * ROWS, tokens) - 1
                ranges = []
                for near, far in ((bands.near_0, bands.far_0), (bands.near_1, bands.far_1)):
                    low, high = tiles.key_range.fn(start, end, near, far, 0, tokens)
                    count = tiles.num_blocks.fn(low, high, BLOCK_N)
                    ranges += [high - count * BLOCK_N, low, count]
                keys = tiles.BlockRange(*ranges, None)
                starts = [keys.start_0 + n * BLOCK_N for n in range(keys.count_0)]
                starts += [keys.start_1 + n * BLOCK_N for n in range(keys.count_1)]
                for consumer in range(2):
                    first, last = start + consumer * ROWS, min(start + consumer * ROWS + 63, end)
                    own = own_steps(keys, bands, first, last, tokens, form)
                    steps = [
                        s + (own.before if s < own.count_0 else own.gap)
                        for s in range(own.count_0 + own.count_1)
                    ]
                    seen += len(steps)
                    assert all(after - step <= 2 for step, after in itertools.pairwise(steps))
                    for n, key in enumerate(starts):
                        near, far = (
                            (bands.near_0, bands.far_0)
                            if n < keys.count_0
                            else (bands.near_1, bands.far_1)
                        )
                        low, high = tiles.key_range.fn(first, last, near, far, 0, tokens)
                        if first <= last and low < min(high, key + BLOCK_N) and key < high:
                            assert n in steps
    assert seen > 10_000
