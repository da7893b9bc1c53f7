"""Accounting of the replay of serving: what vLLM's manager holds, and who is admitted."""

from __future__ import annotations

import pytest

import spattention as spa
from benchmarks.serving_memory import (
    LONGEST,
    SHORTEST,
    admitted,
    class_blocks,
    draw_lengths,
    request_bytes,
)

P = spa.BandPattern
DENSE = P.dense(32, LONGEST)
GEOMETRIC = P.shared_local(32, LONGEST, widths="geometric", kv_heads=8, local=2048)


def test_dense_requests_hold_every_token() -> None:
    """Rounded up to whole blocks of 16."""
    classes = class_blocks(DENSE, 8)
    assert request_bytes(classes, 65_536, 128, 2) == 65_536 * 8 * 512
    assert request_bytes(classes, 2_049, 128, 2) == 2_064 * 8 * 512


def test_blocks_behind_every_window_are_freed() -> None:
    """A class holds its window, and at most a block more at either end."""
    for one in class_blocks(GEOMETRIC, 8):
        for length in (2_048, 40_000, 65_536):
            tokens = one.held(length) * one.tokens
            least = min(length, one.part.window)
            assert least <= tokens < least + 2 * one.tokens
            assert one.freed(length) * one.tokens <= max(0, length - one.part.window)


def test_bands_admit_more_requests() -> None:
    """Of the same queue, into the same memory; the first that does not fit ends it."""
    lengths, memory = draw_lengths(500, 0), 1 << 31
    counts = [
        admitted(lengths, class_blocks(pattern, 8), memory, 128, 2)
        for pattern in (DENSE, GEOMETRIC)
    ]
    assert 0 < counts[0] < counts[1]
    used = [request_bytes(class_blocks(DENSE, 8), length, 128, 2) for length in lengths]
    assert sum(used[: counts[0]]) <= memory < sum(used[: counts[0] + 1])
    with pytest.raises(ValueError, match="must fill the memory"):
        admitted(lengths[:2], class_blocks(DENSE, 8), memory, 128, 2)


def test_lengths_are_drawn_within_their_bounds() -> None:
    """The same every time, and around the middle of the bounds' logarithms."""
    lengths = draw_lengths(2_001, 3)
    assert lengths == draw_lengths(2_001, 3)
    assert min(lengths) >= SHORTEST
    assert max(lengths) <= LONGEST
    assert 10_500 < sorted(lengths)[1_000] < 12_800
