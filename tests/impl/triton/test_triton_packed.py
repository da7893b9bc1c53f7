"""Packed documents of the Hopper kernels: their blocks as plain arithmetic, and how those of rows
are found, in Triton's interpreter.
"""

from __future__ import annotations

import random

import pytest
import torch
from small_cases import case, int32

from spattention import BandPattern
from spattention.impl.triton import op, tiles, varlen
from spattention.impl.triton.arguments import Form, Positions, RowStats
from spattention.impl.triton.arguments import heads as kernel_heads
from spattention.impl.triton.call import (
    LOG2_E,
    BackwardTensors,
    Call,
    ForwardTensors,
    sorted_bands,
)
from spattention.impl.triton.hopper import planning
from spattention.impl.triton.portable import launch as portable
from spattention.testing import run

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


@pytest.mark.skipif(not op.INTERPRETED, reason="the kernels run on the GPU here")
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("padding", [None, 70])
def test_parts_of_a_prefix_are_added(padding: int | None, group: int) -> None:
    """Those of tiles and heads that see the key, and no others: nothing wrote these."""
    prefix_step = pytest.importorskip("spattention.impl.triton.hopper.prefix")
    heads, queries, prefix, head_dim, n_tiles = 4, 300, 3, 64, 5
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(2, heads, n_tiles, 2, prefix, head_dim, generator=generator)
    intervals = (0, 90, 0, 0, 0, 0, 0, 0, 3, 300, 0, 0, 0, 20, 30, 40)  # head 1 sees nothing
    parts[:, 1] = torch.nan
    offset = padding or 0
    for tile in range(n_tiles):
        seen = min(64 * (tile + 1), queries) - offset  # keys before the last query
        parts[:, :, tile, :, max(seen, 0) :] = torch.nan
    shape = (2, heads // group, queries, head_dim)
    d_key, d_value = (torch.randn(shape, generator=generator).half() for _ in range(2))
    expected = [d_key.clone(), d_value.clone()]
    for which, (result, factor) in enumerate(zip(expected, (0.5, 1.0))):
        total = parts[:, :, :, which].nan_to_num().sum(2).unflatten(1, (-1, group)).sum(2)
        result[:, :, offset : offset + prefix] += (factor * total).half()
    starts = None if padding is None else int32([padding, padding])
    form = Form(64, 64, 64, 64, PREFIX=prefix, HAS_KEY_START=starts is not None, GROUPED=group > 1)
    prefix_step.sum_parts_kernel[(2 * 2 * prefix * 2 * heads // group,)](
        kernel_heads(d_key),
        kernel_heads(d_value),
        parts,
        int32(sorted_bands(intervals, heads // group)[1]),
        Positions(None, starts, None, None),
        *(heads, group, 2, n_tiles, queries, queries),
        0.5 * LOG2_E,
        FORM=form,
    )
    for found, wanted in zip((d_key, d_value), expected):
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.skipif(not op.INTERPRETED, reason="the kernels run on the GPU here")
def test_described_rows_are_left_out() -> None:
    """The portable kernels write nothing there."""
    drawn = case(BandPattern.shared_local(2, 37), 37, 37, key_start=int32([[0] * 37, [0] * 37]))
    key_start, described = drawn.options["key_start"], int32([1, 0])
    tensors = [drawn.query, drawn.key, drawn.value]
    expected = run(drawn, (torch.ones_like(drawn.query), torch.zeros(2, 2, 37)), impl="triton")
    positions = Positions(None, key_start, None, None, described)
    call = Call(drawn.query, drawn.key, drawn.pattern.flat, 0.25, 0, positions)
    launches = portable.launches_for(call)
    out, lse = torch.full_like(drawn.query, 7.0), torch.full((2, 2, 37), 7.0)
    portable.forward(call, launches.forward, ForwardTensors(*tensors, out, lse, None))
    gradients = [torch.full_like(each, 7.0) for each in tensors]
    stats = RowStats(expected["lse"], None, torch.empty_like(lse), torch.empty_like(lse))
    d_out = torch.ones_like(out)
    backward = BackwardTensors(*tensors, expected["out"], d_out, *gradients)
    portable.backward(call, launches, backward, stats)
    found = dict(zip(("out", "d_query", "d_key", "d_value"), (out, *gradients)))
    for name, result in found.items():
        assert (result[0] == 7.0).all()
        torch.testing.assert_close(result[1], expected[name][1], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not op.INTERPRETED, reason="the kernels run on the GPU here")
def test_every_token_of_a_row_is_written_once() -> None:
    """Queries and keys by the slots of the documents that are found, padding among them."""
    rng = random.Random(2)
    for _ in range(40):
        padding, queries = rng.choice((0, 0, 5, 64, 130)), 448
        cuts = sorted(rng.sample(range(padding + 1, queries), rng.randint(0, 4)))
        first = [max([cut for cut in cuts if cut <= i], default=padding) for i in range(queries)]
        n_documents = planning.max_documents(queries)
        described, (offsets_q,), (offsets_k,) = found_documents(int32([first]), n_documents)
        assert described == [1]
        for offsets, of_keys in ((offsets_q, False), (offsets_k, True)):
            written = [0] * queries
            for slot in range(varlen.num_slots(queries, n_documents, BLOCK)):
                firsts = [offset // BLOCK + d for d, offset in enumerate(offsets)]
                document = sum(first <= slot for first in firsts[1:])
                block = slot - firsts[document]
                if document == n_documents:
                    continue  # behind the last offset, the end of the row
                start, end = offsets[document], offsets[document + 1]
                shift = 0
                if of_keys:
                    q_start, q_end = offsets_q[document], offsets_q[document + 1]
                    distance = (end - start) - (q_end - q_start)
                    sequence = varlen.Sequence(
                        block, q_start, q_end - q_start, start, end - start, distance
                    )
                    shift = arguments.shift_of_keys.fn(sequence, BLOCK)
                for token in range(
                    start + block * BLOCK - shift, start + (block + 1) * BLOCK - shift
                ):
                    if start <= token < end:
                        written[token] += 1
            assert written == [1] * queries
