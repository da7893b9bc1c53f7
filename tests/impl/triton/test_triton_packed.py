"""Blocks of keys of packed documents in the Hopper kernels, as plain arithmetic."""

from __future__ import annotations

import random

import pytest

from spattention.impl.triton import tiles, varlen

arguments = pytest.importorskip("spattention.impl.triton.hopper.arguments")
BLOCK = 64


def num_query_blocks(
    sequence: varlen.Sequence, first_key: int, near: int, far: int, offset: int
) -> int:
    last_key = min(first_key + BLOCK, sequence.n_keys) - 1
    low, high = tiles.query_range.fn(
        first_key, last_key, near, far, sequence.start, sequence.n_queries
    )
    start = (offset + low) // 4 * 4 - offset
    return -(-(high - start) // BLOCK) if low < high else 0


def test_no_offset_costs_blocks_of_queries() -> None:
    """A block of keys needs as many blocks of queries wherever its document starts in memory."""
    for offset in range(8):
        sequence = varlen.Sequence(0, offset, 1000, offset, 1000, 0)
        shift = arguments.shift_of_keys.fn(sequence, BLOCK)
        assert shift == offset % 4
        for near, far in ((0, 256), (0, 257), (256, 512), (64, 1000)):
            for first_key in range(-shift, 1000 - BLOCK, BLOCK):
                needed = -(-(min(first_key + BLOCK - 1 + far, 1000) - first_key - near) // BLOCK)
                found = num_query_blocks(sequence, first_key, near, far, offset)
                assert found <= max(needed, 0)


def test_shifted_blocks_have_enough_slots() -> None:
    """Document d owns the slots from `offset_d // 64 + d` on."""
    rng = random.Random(1)
    for _ in range(2000):
        queries = rng.randint(0, 200)
        sequence = varlen.Sequence(
            0, rng.randint(0, 300), queries, rng.randint(0, 300), rng.randint(0, 200), 0
        )
        sequence = sequence._replace(start=sequence.n_keys - queries)
        shift = arguments.shift_of_keys.fn(sequence, BLOCK)
        slots = (sequence.offset_k + sequence.n_keys) // BLOCK + 1 - sequence.offset_k // BLOCK
        assert 0 <= shift <= min(3, sequence.offset_k)
        assert slots * BLOCK >= sequence.n_keys + shift
