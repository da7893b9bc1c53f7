# mypy: allow-untyped-defs
"""Few queries against many keys: decoding.

One program computes all queries that share a key/value head (a group of query heads, times up to 16
tokens) over one chunk of that head's keys. Every key is therefore read once, and one long band
keeps the whole GPU busy. The chunks of each head are then merged (`merge.py`).

Everything is counted in distances from the newest query: the key at position j is at distance
`newest - j`. A query that is `behind` the newest by some tokens sees `behind + near <= distance <
behind + far`. Chunks of distances stay the same while the text grows: they are a table
(`plan.DecodePlan`), and what depends on positions is computed on the device. A prefix is one more
chunk, of places in the prefix instead of distances; the bands then see the keys after
it.

Keys are stored in one of three ways (`storage.py`):

    dense     the key at position p is token p of its head
    rings     a `BandStore`: it is token `offset + p % length`, or one of the prefix
    paged     it is token `p % block_size` of the block that the entry's block table names

    B batch   H query heads   Q queries   D head_dim (inside a kernel BLOCK_D, zero-filled)
    R rows: the queries of a group, `group * Q`, head by head
    M = BLOCK_M rows of a block   N = BLOCK_N keys of a block
    P = BLOCK_P chunks that are merged at a time
    p_ pointer   b_ block   o_ offset   m_ mask
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .. import arguments, memory, softmax, tiles, varlen
from .merge import merge_last, normalised
from .rows import (
    MAX_INT32,
    Rows,
    attend_documents,
    attend_prefix,
    attend_row,
    attend_rows,
    load_rows,
)
from .storage import load_key_head, load_pages


class DecodePositions(NamedTuple):
    """The tensors that positions are read from on the device, each or None.

    Position of the first query (of a store or a paged cache its number of tokens); first keys;
    first slots and lengths of rings, first slots of their prefixes, and where the document of these
    starts; the block table.
    """

    query_start: Any = None
    key_start: Any = None
    ring_offsets: Any = None
    ring_lengths: Any = None
    ring_prefixes: Any = None
    held: Any = None
    pages: Any = None


class DecodeCounts(NamedTuple):
    """Sizes of a call, as `arguments.Counts`. `n_keys` is the number of tokens of a dense cache or
    of a row of the block table, `n_pages` the number of blocks of a paged cache.
    """

    query_start_stride: Any
    key_start_stride_b: Any
    key_start_stride_t: Any
    held_stride: Any
    pages_stride: Any
    n_chunks: Any
    n_blocks: Any
    n_heads: Any
    group: Any
    n_queries: Any
    n_keys: Any
    n_pages: Any
    query_start: Any


@triton.jit
def newest_query(positions, counts, batch, FORM: tl.constexpr):
    """Position of the last query of a batch entry. In a store or a paged cache it is the last
    token, -1 before the first; in a store int64.
    """
    p_start = positions.query_start
    if FORM.RINGS:
        newest = tl.load(p_start + batch * counts.query_start_stride) - 1
    elif FORM.PAGE > 0:
        length = tl.load(p_start + batch * counts.query_start_stride)
        newest = tl.minimum(tl.maximum(length, 0), counts.n_keys) - 1
    else:
        start = counts.query_start
        if FORM.START_ON_DEVICE:
            start = tl.load(p_start + batch * counts.query_start_stride)
        start = tl.minimum(tl.maximum(start, 0), tiles.MAX_POSITION)
        newest = start + counts.n_queries - 1
    return newest


@triton.jit
def first_keys(positions, counts, batch, o_query, FORM: tl.constexpr):
    """Positions of the first keys that queries may see, int32 like `o_query`."""
    o_first = o_query * 0
    if FORM.HAS_KEY_START:
        p_start = positions.key_start + batch * counts.key_start_stride_b
        last = MAX_INT32 if FORM.RINGS else counts.n_keys
        stride = counts.key_start_stride_t
        o_first = varlen.first_keys(p_start, o_query, counts.n_queries, stride, last)
    return o_first


@triton.jit
def attend_chunk(
    query,
    keys,
    counts,
    batch,
    rows,
    o_row,
    m_row,
    begin,
    end,
    p_bands,
    p_part,
    p_part_lse,
    scale,
    FORM: tl.constexpr,
):
    """Compute and store the sums of the distances `[begin, end)`, as far as the text goes."""
    BLOCK_M: tl.constexpr = FORM.BLOCK_M
    o_farthest = tl.minimum(rows.farthest, end - 1)
    rows = Rows(rows.head, rows.behind, rows.first, o_farthest)
    end = tl.max(o_farthest, 0) + 1
    if not FORM.RINGS:
        begin = tl.maximum(begin, keys.newest - keys.length + 1)
    if begin >= end:  # all before the text: no sums are read where lse is -inf
        tl.store(p_part_lse + o_row, o_row * 0.0 + float("-inf"), mask=m_row)
    else:
        chunk_keys = keys
        if FORM.PAGES > 0:
            chunk_keys = load_pages(keys, begin, end, FORM)
        o_query = counts.n_queries - 1 - rows.behind
        b_query = load_rows(query, batch, rows.head, o_query, m_row, FORM)
        if BLOCK_M == 1:
            b_out, row_max, row_sum = attend_row(
                b_query, chunk_keys, p_bands, rows, begin, end, scale, FORM
            )
        else:
            b_out, row_max, row_sum = attend_rows(
                b_query, chunk_keys, p_bands, rows, begin, end, scale, FORM
            )
        lse, row_sum = softmax.finalize(row_max, row_sum, FORM.PRECISE)
        b_out = normalised(b_out, row_sum, FORM.PRECISE)
        memory.scatter_tokens(p_part, b_out, o_row, m_row, FORM.HEAD_DIM, FORM)
        tl.store(p_part_lse + o_row, lse, mask=m_row)
        if FORM.HAS_KEY_START and BLOCK_M > 1:
            nearest = tl.min(tl.where(m_row, o_farthest, MAX_INT32), 0)
            if nearest < end - 1:
                farthest = tl.where(arguments.is_finite(b_out), begin - 1, end - 1)
                attend_documents(
                    b_query, chunk_keys, p_bands, rows, begin, farthest, p_part, o_row, scale, FORM
                )


@triton.jit(do_not_specialize=DecodeCounts._fields)
def chunk_kernel(
    query,
    key,
    value,
    result,
    p_chunks,
    p_bands,
    positions,
    query_start_stride,
    key_start_stride_b,
    key_start_stride_t,
    held_stride,
    pages_stride,
    n_chunks,
    n_blocks,
    n_heads,
    group,
    n_queries,
    n_keys,
    n_pages,
    query_start,
    scale,
    FORM: tl.constexpr,
):
    """One chunk of one key/value head for one block of rows; `chunks` as in `plan.DecodePlan`."""
    HEAD_DIM: tl.constexpr = FORM.HEAD_DIM
    counts = DecodeCounts(
        query_start_stride,
        key_start_stride_b,
        key_start_stride_t,
        held_stride,
        pages_stride,
        n_chunks,
        n_blocks,
        n_heads,
        group,
        n_queries,
        n_keys,
        n_pages,
        query_start,
    )
    program = tl.program_id(0)
    chunk = program % n_chunks
    block = (program // n_chunks) % n_blocks
    batch = (program // n_chunks // n_blocks).to(tl.int64)
    p_chunk = p_chunks + 8 * chunk
    key_head, begin, end = tl.load(p_chunk), tl.load(p_chunk + 1), tl.load(p_chunk + 2)
    newest = newest_query(positions, counts, batch, FORM)

    n_rows = counts.group * n_queries
    o_row = block * FORM.BLOCK_M + tl.arange(0, FORM.BLOCK_M)  # [M]
    m_row = o_row < n_rows
    o_query = o_row % n_queries
    o_head = key_head * counts.group + tl.where(m_row, o_row // n_queries, 0)
    o_behind = n_queries - 1 - o_query
    o_first = first_keys(positions, counts, batch, o_query, FORM)
    o_farthest = tl.minimum(newest - o_first, n_queries + tiles.MAX_POSITION).to(tl.int32)
    keys = load_key_head(key, value, positions, counts, batch, key_head, newest, FORM)
    first_row = (batch * n_chunks + chunk) * n_rows
    p_part = result.p_part + first_row * HEAD_DIM
    p_part_lse = result.p_part_lse + first_row
    o_farthest = tl.where(m_row, o_farthest - FORM.PREFIX, -1)
    rows = Rows(o_head, o_behind, o_first, o_farthest)
    farthest = tl.max(o_farthest, 0)
    in_prefix = tl.load(p_chunk + 3) != 0
    is_needed = True
    if FORM.MERGED_ROWS > 0:  # beyond the text, nobody waits for the chunk
        is_needed = (begin <= farthest) | in_prefix | (chunk == tl.load(p_chunk + 4))
    if is_needed:
        if FORM.PREFIX > 0:
            if in_prefix:
                whole = tl.where(m_row, o_farthest + FORM.PREFIX, -1)
                rows = Rows(o_head, o_behind, o_first, whole)
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
            else:
                attend_chunk(
                    query,
                    keys,
                    counts,
                    batch,
                    rows,
                    o_row,
                    m_row,
                    begin,
                    end,
                    p_bands,
                    p_part,
                    p_part_lse,
                    scale,
                    FORM,
                )
        else:
            attend_chunk(
                query,
                keys,
                counts,
                batch,
                rows,
                o_row,
                m_row,
                begin,
                end,
                p_bands,
                p_part,
                p_part_lse,
                scale,
                FORM,
            )
        if FORM.MERGED_ROWS > 0:
            merge_last(result, counts, batch, block, p_chunks, p_chunk, key_head, farthest, FORM)
