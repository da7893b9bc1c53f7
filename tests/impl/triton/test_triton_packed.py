"""Packed documents of the Hopper kernels: their blocks as plain arithmetic, and how those of rows
are found, in Triton's interpreter.
"""

from __future__ import annotations

import random

import pytest
import torch
from small_cases import int32

from spattention.impl.triton import op, tiles, varlen
from spattention.impl.triton.hopper import planning

arguments = pytest.importorskip("spattention.impl.triton.hopper.arguments")
documents = pytest.importorskip("spattention.impl.triton.hopper.documents")
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


def found_documents(
    starts: torch.Tensor, n_documents: int
) -> tuple[list[int], list[list[int]], list[list[int]]]:
    """What the kernel writes: whether each row has documents, offsets of queries and of keys."""
    rows, queries = starts.shape
    offsets_q, offsets_k = torch.full((2, rows, n_documents + 1), -1, dtype=torch.int32)
    described = torch.full((rows,), -1, dtype=torch.int32)
    documents.documents_kernel[(rows,)](
        starts, *starts.stride(), offsets_q, offsets_k, described, queries, n_documents
    )
    return described.tolist(), offsets_q.tolist(), offsets_k.tolist()


@pytest.mark.skipif(not op.INTERPRETED, reason="the kernels run on the GPU here")
def test_rows_of_documents_are_found() -> None:
    """Document 0 holds the keys before the first one that is seen; what is behind is empty."""
    rows = int32(
        [[0, 0, 0, 3, 3, 5, 5, 5], [2, 2, 2, 2, 2, 5, 5, 5], [9] * 8, [0, 0, 1, 3, 3, 3, 3, 3]]
    )
    described, offsets_q, offsets_k = found_documents(rows, 6)
    assert described == [1, 1, 1, 0]
    assert offsets_q == [
        [0, 0, 3, 5, 8, 8, 8],
        [0, 0, 5, 8, 8, 8, 8],
        [0, 0, 8, 8, 8, 8, 8],
        [0] * 7,
    ]
    assert offsets_k == [
        [0, 0, 3, 5, 8, 8, 8],
        [0, 2, 5, 8, 8, 8, 8],
        [0, 8, 8, 8, 8, 8, 8],
        [0] * 7,
    ]


@pytest.mark.skipif(not op.INTERPRETED, reason="the kernels run on the GPU here")
def test_rows_of_more_tokens_than_one_load() -> None:
    cuts = [0, 4000, 4096, 5000, 8192]
    starts = int32([[max(cut for cut in cuts if cut <= i) for i in range(9000)]])
    n_documents = planning.max_documents(9000)
    assert (n_documents + 1) % 4 == 0
    described, offsets_q, _ = found_documents(starts, n_documents)
    assert described == [1]
    assert offsets_q[0][:7] == [0, *cuts, 9000]
    assert set(offsets_q[0][6:]) == {9000}
    assert found_documents(starts, 5)[0] == [0]  # they are 6, with the empty one
