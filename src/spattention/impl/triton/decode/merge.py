# mypy: allow-untyped-defs
"""Merge the chunks of a head by their log-sum-exps, always in the order of the chunks.

For few rows the last program of a head merges its chunks (`merge_last`), which saves a launch. For
more rows a second launch merges them (`combine_kernel`), with a program for each row. Legend of
`kernels.py`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .. import memory, softmax


class Result(NamedTuple):
    """Results of a call: `out` and its strides, `lse` `[B, H, Q]`, the heads' sinks, the sums
    `[B, chunks, R, D]` of the chunks and their log-sum-exps `[B, chunks, R]`, and counters of the
    chunks that have arrived, one for each block of rows; 0 between calls.
    """

    pointer: Any
    stride_b: Any
    stride_h: Any
    stride_t: Any
    p_lse: Any
    p_sinks: Any
    p_part: Any
    p_part_lse: Any
    p_arrived: Any


@triton.jit
def needed_chunks(p_chunks, first_chunk, n_parts, farthest):
    """Number of a head's chunks that are within the text: those of the prefix, and those that start
    at distance `farthest` or nearer; at least 1. They are its first.
    """
    needed = 0
    for first in range(0, n_parts, 64):
        o_part = first + tl.arange(0, 64)
        p_part = p_chunks + 8 * (first_chunk + o_part)
        m_part = o_part < n_parts
        near = tl.load(p_part + 1, mask=m_part, other=0)
        in_prefix = tl.load(p_part + 3, mask=m_part, other=0)
        needed += tl.sum((m_part & ((near <= farthest) | (in_prefix != 0))).to(tl.int32), 0)
    return tl.maximum(needed, 1)


@triton.jit
def merge_last(
    result, counts, batch, block, p_chunks, p_chunk, key_head, farthest, FORM: tl.constexpr
):
    """Count the chunk of this program as stored. The last program of a block of rows merges the
    block's chunks that are within the text, and sets the counter back to 0. The other programs of
    the block have done nothing.
    """
    first_chunk, n_parts, last = tl.load(p_chunk + 4), tl.load(p_chunk + 5), tl.load(p_chunk + 6)
    if last > farthest:
        n_parts = needed_chunks(p_chunks, first_chunk, n_parts, farthest)
    n_key_heads = counts.n_heads // counts.group
    p_arrived = result.p_arrived + (batch * counts.n_blocks + block) * n_key_heads + key_head
    tl.debug_barrier()  # all threads have stored their part
    arrived = tl.atomic_add(p_arrived, 1, sem="acq_rel", scope="gpu")
    if arrived == n_parts - 1:
        merge_block(result, counts, batch, block, key_head, first_chunk, n_parts, FORM)
        tl.store(p_arrived, 0)


@triton.jit
def merge_block(result, counts, batch, block, key_head, first_chunk, n_parts, FORM: tl.constexpr):
    """Merge the chunks of one block of rows, and add the heads' sinks once."""
    ROWS: tl.constexpr = FORM.MERGED_ROWS
    BLOCK_D: tl.constexpr = FORM.BLOCK_D
    HEAD_DIM: tl.constexpr = FORM.HEAD_DIM
    # 32 KiB of sums at a time
    PARTS: tl.constexpr = min(max(8192 // (ROWS * BLOCK_D), 1), 64)
    unit = 1.0 if FORM.PRECISE else softmax.LOG2_E
    n_rows = counts.group * counts.n_queries
    o_row = block * FORM.BLOCK_M + tl.arange(0, ROWS)  # [ROWS]
    m_row = o_row < n_rows
    o_query = o_row % counts.n_queries
    o_head = key_head * counts.group + tl.where(m_row, o_row // counts.n_queries, 0)
    first_row = (batch * counts.n_chunks + first_chunk) * n_rows
    p_part = result.p_part + first_row * HEAD_DIM
    p_part_lse = result.p_part_lse + first_row
    o_dim = tl.arange(0, BLOCK_D)[None, None, :]

    row_max, row_sum = softmax.init(result.p_sinks, o_head, ROWS, FORM.HAS_SINKS, FORM.PRECISE)
    b_sum = tl.zeros([ROWS, PARTS, BLOCK_D], tl.float32)
    for first in tl.range(0, n_parts, PARTS, num_stages=FORM.STAGES):
        o_part = first + tl.arange(0, PARTS)
        m_part = m_row[:, None] & (o_part < n_parts)[None, :]
        o_stored = o_part[None, :] * n_rows + o_row[:, None]  # [ROWS, PARTS]
        p_sums = p_part + o_stored[:, :, None] * HEAD_DIM + o_dim
        m_sums = m_part[:, :, None] & (o_dim < HEAD_DIM)
        # Other programs wrote these: past the multiprocessor's own cache. The sums do not wait for
        # their log-sum-exps, so a chunk without keys gives what it never stored, to be dropped.
        lses = tl.load(
            p_part_lse + o_stored, mask=m_part, other=float("-inf"), cache_modifier=".cg"
        )
        b_part = tl.load(p_sums, mask=m_sums, other=0.0, cache_modifier=".cg")
        b_part = tl.where((lses > float("-inf"))[:, :, None], b_part, 0.0)
        p, row_max, row_sum, factor = softmax.update(
            lses, row_max, row_sum, unit, False, FORM.PRECISE
        )
        b_sum = b_sum * factor[:, None, None] + p[:, :, None] * b_part
    lse, row_sum = softmax.finalize(row_max, row_sum, FORM.PRECISE)
    b_out = normalised(tl.sum(b_sum, 1), row_sum, FORM.PRECISE)  # [ROWS, D]

    o_head = o_head.to(tl.int64)
    o_stored = o_head * result.stride_h + o_query.to(tl.int64) * result.stride_t
    p_out = result.pointer + batch * result.stride_b + o_stored[:, None] + tl.arange(0, BLOCK_D)
    m_out = m_row[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    tl.store(p_out, b_out.to(result.pointer.dtype.element_ty), mask=m_out)
    p_lse = result.p_lse + (batch * counts.n_heads + o_head) * counts.n_queries + o_query
    tl.store(p_lse, lse, mask=m_row)


@triton.jit(do_not_specialize=("n_chunks", "n_heads", "group", "n_queries"))
def combine_kernel(
    result,
    p_ranges,
    n_chunks,
    n_heads,
    group,
    n_queries,
    FORM: tl.constexpr,
):
    """One query of one head: merge its chunks, and add the head's sink once.

    `ranges` `[Hkv + 1]` are the first chunks of each key/value head.
    """
    BLOCK_D: tl.constexpr = FORM.BLOCK_D
    BLOCK_P: tl.constexpr = FORM.BLOCK_N
    HEAD_DIM: tl.constexpr = FORM.HEAD_DIM
    program = tl.program_id(0)
    query = program % n_queries
    head = (program // n_queries) % n_heads
    batch = (program // n_queries // n_heads).to(tl.int64)
    key_head = head // group
    first, last = tl.load(p_ranges + key_head), tl.load(p_ranges + key_head + 1)
    n_rows = group * n_queries
    row = (head % group) * n_queries + query
    first_row = batch * n_chunks * n_rows + row
    unit = 1.0 if FORM.PRECISE else softmax.LOG2_E

    row_max, row_sum = softmax.init(result.p_sinks, head, 1, FORM.HAS_SINKS, FORM.PRECISE)  # [1]
    b_out = tl.zeros([1, BLOCK_D], tl.float32)
    for chunk in range(first, last, BLOCK_P):
        o_chunk = chunk + tl.arange(0, BLOCK_P)  # [P]
        p_lses = result.p_part_lse + first_row + o_chunk.to(tl.int64) * n_rows
        lses = tl.load(p_lses, mask=o_chunk < last, other=float("-inf"))
        b_part = memory.gather_tokens(
            result.p_part + first_row * HEAD_DIM,
            o_chunk,
            lses > float("-inf"),
            n_rows * HEAD_DIM,
            FORM,
        )  # [P, D]
        p, row_max, row_sum, factor = softmax.update(
            lses[None, :], row_max, row_sum, unit, False, FORM.PRECISE
        )
        p = tl.sum(p, 0)  # [1, P] to [P]
        b_out = b_out * factor[:, None] + tl.sum(p[:, None] * b_part, 0, keep_dims=True)

    lse, row_sum = softmax.finalize(row_max, row_sum, FORM.PRECISE)
    b_out = normalised(b_out, row_sum, FORM.PRECISE)
    o_query = query + tl.arange(0, 1)
    head_64 = head.to(tl.int64)
    p_out = result.pointer + batch * result.stride_b + head_64 * result.stride_h
    memory.store_tokens(p_out, b_out, o_query, result.stride_t, n_queries, FORM)
    tl.store(result.p_lse + (batch * n_heads + head_64) * n_queries + o_query, lse)


@triton.jit
def normalised(b_out, row_sum, PRECISE: tl.constexpr):
    """`b_out` `[M, D]` over `row_sum` `[M]`."""
    if PRECISE:
        b_out = tl.div_rn(b_out, row_sum[:, None] + tl.zeros_like(b_out))
    else:
        b_out *= (1.0 / row_sum)[:, None]
    return b_out
