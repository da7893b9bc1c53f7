# mypy: allow-untyped-defs
"""Few queries against many keys: decoding.

One program computes all queries that share a key/value head (a group of query heads, times up to 16
tokens) over one chunk of that head's keys. Every key is therefore read once, and one long band
keeps the whole GPU busy. `combine_kernel` then combines the chunks of each head.

Everything is counted in distances from the newest query: the key at position j is at distance
`newest - j`. A query that is `behind` the newest by some tokens sees `behind + near <= distance <
behind + far`. Chunks of distances stay the same while the text grows: they are a table
(`launch.DecodePlan`), and what depends on positions is computed on the device. A prefix is one more
chunk, of places in the prefix instead of distances; the bands then see the keys after
it.

Keys are stored in one of two ways:

    dense     the key at position p is token p of its head
    rings     a `BandStore`: it is token `offset + p % length`

    B batch   H query heads   Q queries   D head_dim (inside a kernel BLOCK_D, zero-filled)
    R rows: the queries of a group, `group * Q`, head by head
    M = BLOCK_M rows of a block   N = BLOCK_N keys of a block
    P = BLOCK_P chunks that are combined at a time
    p_ pointer   b_ block   o_ offset   m_ mask
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .. import arguments, memory, softmax, tiles, varlen
from .rows import (
    MAX_INT32,
    KeyHead,
    Rows,
    attend_documents,
    attend_prefix,
    attend_row,
    attend_rows,
    load_rows,
    normalised,
)


class DecodePositions(NamedTuple):
    """The tensors that positions are read from on the device, each or None: position of the first
    query (of a store its number of tokens), first keys, first slots and lengths of rings.
    """

    query_start: Any
    key_start: Any
    ring_offsets: Any
    ring_lengths: Any


class DecodeCounts(NamedTuple):
    """Sizes of a call, as `arguments.Counts`."""

    query_start_stride: Any
    key_start_stride_b: Any
    key_start_stride_t: Any
    n_chunks: Any
    n_blocks: Any
    n_heads: Any
    group: Any
    n_queries: Any
    n_keys: Any
    query_start: Any


@triton.jit
def newest_query(positions, counts, batch, FORM: tl.constexpr):
    """Position of the last query of a batch entry. In a store it is the last token: int64, -1
    before the first.
    """
    p_start = positions.query_start
    if FORM.RINGS:
        newest = tl.load(p_start + batch * counts.query_start_stride) - 1
    else:
        start = counts.query_start
        if FORM.START_ON_DEVICE:
            start = tl.load(p_start + batch * counts.query_start_stride)
        start = tl.minimum(tl.maximum(start, 0), tiles.MAX_POSITION)
        newest = start + counts.n_queries - 1
    return newest


@triton.jit
def farthest_keys(
    positions,
    counts,
    batch,
    o_query,
    newest,
    FORM: tl.constexpr,
):
    """Distance from the newest query to the first key that queries may see, int32 like
    `o_query`.
    """
    n_queries = counts.n_queries
    o_first = o_query * 0
    if FORM.HAS_KEY_START:
        p_start = positions.key_start + batch * counts.key_start_stride_b
        last = MAX_INT32 if FORM.RINGS else counts.n_keys
        stride = counts.key_start_stride_t
        o_first = varlen.first_keys(p_start, o_query, n_queries, stride, last)
    return tl.minimum(newest - o_first, n_queries + tiles.MAX_POSITION).to(tl.int32)


@triton.jit(do_not_specialize=DecodeCounts._fields)
def chunk_kernel(
    query,
    key,
    value,
    p_part,
    p_part_lse,
    p_chunks,
    p_bands,
    positions,
    query_start_stride,
    key_start_stride_b,
    key_start_stride_t,
    n_chunks,
    n_blocks,
    n_heads,
    group,
    n_queries,
    n_keys,
    query_start,
    scale,
    FORM: tl.constexpr,
):
    BLOCK_M: tl.constexpr = FORM.BLOCK_M
    HEAD_DIM: tl.constexpr = FORM.HEAD_DIM
    program = tl.program_id(0)
    counts = DecodeCounts(
        query_start_stride,
        key_start_stride_b,
        key_start_stride_t,
        n_chunks,
        n_blocks,
        n_heads,
        group,
        n_queries,
        n_keys,
        query_start,
    )
    chunk = program % n_chunks
    block = (program // n_chunks) % n_blocks
    batch = (program // n_chunks // n_blocks).to(tl.int64)
    p_chunk = p_chunks + 4 * chunk
    key_head, begin, end = tl.load(p_chunk), tl.load(p_chunk + 1), tl.load(p_chunk + 2)
    key_head_64 = key_head.to(tl.int64)
    newest = newest_query(positions, counts, batch, FORM)

    n_rows = counts.group * n_queries
    o_row = block * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    m_row = o_row < n_rows
    o_query = o_row % n_queries
    o_head = key_head * counts.group + tl.where(m_row, o_row // n_queries, 0)
    o_behind = n_queries - 1 - o_query
    o_farthest = farthest_keys(positions, counts, batch, o_query, newest, FORM)
    if FORM.PREFIX > 0:
        if tl.load(p_chunk + 3) != 0:
            rows = Rows(o_head, o_behind, tl.where(m_row, o_farthest, -1))
            p_key = key.pointer + batch * key.stride_b + key_head_64 * key.stride_h
            p_value = value.pointer + batch * value.stride_b + key_head_64 * value.stride_h
            keys = KeyHead(p_key, key.stride_t, p_value, value.stride_t, newest, n_keys)
            first_row = (batch * n_chunks + chunk) * n_rows
            p_part += first_row * HEAD_DIM
            p_part_lse += first_row
            b_query = load_rows(query, batch, o_head, o_query, m_row, FORM)
            attend_prefix(
                b_query,
                keys,
                p_bands,
                rows,
                begin,
                end,
                o_row,
                m_row,
                p_part,
                p_part_lse,
                scale,
                FORM,
            )
            return
        o_farthest -= FORM.PREFIX
    o_farthest = tl.minimum(tl.where(m_row, o_farthest, -1), end - 1)
    rows = Rows(o_head, o_behind, o_farthest)

    end = tl.max(o_farthest, 0) + 1
    length = 0
    p_key = key.pointer + batch * key.stride_b
    p_value = value.pointer + batch * value.stride_b
    if FORM.RINGS:
        length = tl.load(positions.ring_lengths + key_head)
        newest = (tl.maximum(newest, 0) % length).to(tl.int32)
        length = length.to(tl.int32)
        token = tl.load(positions.ring_offsets + key_head)
        p_key += token * key.stride_t
        p_value += token * value.stride_t
    else:
        begin = tl.maximum(begin, newest - counts.n_keys + 1)
        p_key += key_head_64 * key.stride_h
        p_value += key_head_64 * value.stride_h
    keys = KeyHead(p_key, key.stride_t, p_value, value.stride_t, newest, length)

    first_row = (batch * n_chunks + chunk) * n_rows
    p_part += first_row * HEAD_DIM
    p_part_lse += first_row
    if begin >= end:  # all before the text: `combine_kernel` reads no sums where lse is -inf
        tl.store(p_part_lse + o_row, o_row * 0.0 + float("-inf"), mask=m_row)
        return

    b_query = load_rows(query, batch, o_head, o_query, m_row, FORM)
    if BLOCK_M == 1:
        b_out, row_max, row_sum = attend_row(
            b_query,
            keys,
            p_bands,
            rows,
            begin,
            end,
            scale,
            FORM,
        )
    else:
        b_out, row_max, row_sum = attend_rows(
            b_query,
            keys,
            p_bands,
            rows,
            begin,
            end,
            scale,
            FORM,
        )
    lse, row_sum = softmax.finalize(row_max, row_sum, FORM.PRECISE)
    b_out = normalised(b_out, row_sum, FORM.PRECISE)
    memory.store_tokens(p_part, b_out, o_row, HEAD_DIM, n_rows, FORM)
    tl.store(p_part_lse + o_row, lse, mask=m_row)
    if FORM.HAS_KEY_START and BLOCK_M > 1:
        nearest = tl.min(tl.where(m_row, o_farthest, MAX_INT32), 0)
        if nearest < end - 1:
            farthest = tl.where(arguments.is_finite(b_out), begin - 1, end - 1)
            attend_documents(
                b_query, keys, p_bands, rows, begin, farthest, p_part, o_row, scale, FORM
            )


@triton.jit(do_not_specialize=DecodeCounts._fields)
def combine_kernel(
    p_part,
    p_part_lse,
    out,
    p_lse,
    p_sinks,
    p_ranges,
    n_chunks,
    n_heads,
    group,
    n_queries,
    FORM: tl.constexpr,
):
    """One query of one head: combine its chunks by their log-sum-exps, and add the head's sink
    once.

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

    row_max, row_sum = softmax.init(p_sinks, head, 1, FORM.HAS_SINKS, FORM.PRECISE)  # [1], [1]
    b_out = tl.zeros([1, BLOCK_D], tl.float32)
    for chunk in range(first, last, BLOCK_P):
        o_chunk = chunk + tl.arange(0, BLOCK_P)  # [P]
        p_lses = p_part_lse + first_row + o_chunk.to(tl.int64) * n_rows
        lses = tl.load(p_lses, mask=o_chunk < last, other=float("-inf"))
        b_part = memory.gather_tokens(
            p_part + first_row * HEAD_DIM,
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
    p_out = out.pointer + batch * out.stride_b + head_64 * out.stride_h
    memory.store_tokens(p_out, b_out, o_query, out.stride_t, n_queries, FORM)
    tl.store(p_lse + (batch * n_heads + head_64) * n_queries + o_query, lse)
