# mypy: allow-untyped-defs
"""dK and dV of the keys of a prefix, with the legend of `query_gradient.py`.

Every query sees the prefix of its document, so that one program for these keys would run alone long
after all others. Here the queries are split into chunks of CHUNK. `prefix_gradient_kernel` computes
the part of one chunk for one block of keys, and `reduce_kernel` adds the parts to dK and dV, in the
order of the chunks: the same bits on every run.

The keys of a prefix that no more than CHUNK queries see are left to `key_gradient.py` where rows
hold several documents. All others are seen by the first query of a chunk or by its last. So a chunk
has at most 2 * n_blocks blocks of keys, `n_blocks` for each of these two queries.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .. import arguments, memory, softmax, varlen
from ..arguments import Counts, Heads, KeyPart, QuerySource
from .key_gradient import prefix_queries, store_documents, store_gradients, sum_key_gradients

ROWS = tl.constexpr(4)  # keys of a program of `reduce_kernel`
PARTS = tl.constexpr(16)  # parts that it adds at a time


class PrefixCounts(NamedTuple):
    """Sizes of these kernels: rows of the statistics of a head, blocks of keys of a query's prefix,
    and those of a chunk.
    """

    n_rows: Any
    n_blocks: Any
    n_members: Any


class PrefixPart(NamedTuple):
    """A block of keys and a chunk of the queries `[low, high)` that see it as part of their prefix;
    `exists` unless there are none, or they are left to `key_gradient.py`.
    """

    exists: Any
    block: Any
    chunk: Any
    low: Any
    high: Any


@triton.jit
def block_of_member(member, first, last, n_blocks, BLOCK: tl.constexpr):
    """Block of keys of a member of a chunk whose first and last query may see the keys from `first`
    and from `last` on; -1 for a member that is another's block.
    """
    of_first = first // BLOCK + member
    of_last = last // BLOCK + member - n_blocks
    known = of_last < first // BLOCK + n_blocks
    return tl.where(member < n_blocks, of_first, tl.where(known, -1, of_last))


@triton.jit
def member_of_block(block, first, last, n_blocks, BLOCK: tl.constexpr):
    """The inverse of `block_of_member`."""
    of_first = block - first // BLOCK
    return tl.where(of_first < n_blocks, of_first, n_blocks + block - last // BLOCK)


@triton.jit
def ends_of_chunk(chunk, queries, FORM: tl.constexpr):
    """First keys of the first and of the last query of chunks, like `chunk`."""
    first, last = 0 * chunk, 0 * chunk
    if FORM.HAS_KEY_START:
        p_start, stride, n_queries = queries.p_start, queries.stride_start, queries.n_queries
        first_query = chunk * FORM.CHUNK
        last_query = tl.minimum(first_query + FORM.CHUNK, n_queries) - 1
        first = varlen.first_keys(p_start, first_query, n_queries, stride, queries.n_keys)
        last = varlen.first_keys(p_start, last_query, n_queries, stride, queries.n_keys)
    return first, last


@triton.jit
def prefix_part(member, chunk, queries, sizes, FORM: tl.constexpr):
    """The `PrefixPart` of a member of a chunk."""
    BLOCK_N: tl.constexpr = FORM.BLOCK_N
    first, last = ends_of_chunk(chunk, queries, FORM)
    block = block_of_member(member, first, last, sizes.n_blocks, BLOCK_N)
    first_key = tl.maximum(block, 0) * BLOCK_N
    last_key = tl.minimum(first_key + BLOCK_N, queries.n_keys) - 1
    low, high = prefix_queries(first_key, last_key, queries, FORM)
    exists = (block >= 0) & (first_key <= last_key)
    if FORM.DOCUMENTS:
        exists = exists & (high - low > FORM.CHUNK)
    exists = exists & (chunk * FORM.CHUNK < high) & ((chunk + 1) * FORM.CHUNK > low) & (low < high)
    return PrefixPart(exists, block, chunk, low, high)


@triton.jit
def source_of(
    query,
    d_out,
    lse_log2,
    delta,
    p_bands,
    entry,
    batch,
    sequence,
    positions,
    counts,
    n_rows,
    FORM: tl.constexpr,
):
    """The `QuerySource` of a sequence."""
    batch_64 = batch.to(tl.int64)
    offset_q = tl.zeros([], tl.int64) + sequence.offset_q
    p_start = 0
    if FORM.HAS_KEY_START:
        p_start = positions.key_start + batch_64 * counts.key_start_stride_b
    return QuerySource(
        arguments.entry_of(query, batch_64, offset_q),
        arguments.entry_of(d_out, batch_64, offset_q),
        lse_log2,
        delta,
        batch_64 * counts.n_heads * n_rows + offset_q,
        n_rows,
        p_bands + 8 * entry,
        counts.group,
        sequence.start,
        sequence.n_queries,
        sequence.n_keys,
        p_start,
        counts.key_start_stride_t,
    )


@triton.jit(do_not_specialize=[*Counts._fields, *PrefixCounts._fields])
def prefix_gradient_kernel(
    query,
    key,
    value,
    d_out,
    p_part,
    stats,
    p_bands,
    positions,
    query_start_stride,
    key_start_stride_b,
    key_start_stride_t,
    n_heads,
    group,
    n_batch,
    n_documents,
    n_slots,
    n_queries,
    n_keys,
    query_start,
    n_rows,
    n_blocks,
    n_members,
    scale,
    FORM: tl.constexpr,
):
    BLOCK_N: tl.constexpr = FORM.BLOCK_N
    HEAD_DIM: tl.constexpr = FORM.HEAD_DIM
    counts = Counts(
        query_start_stride,
        key_start_stride_b,
        key_start_stride_t,
        n_heads,
        group,
        n_batch,
        n_documents,
        n_slots,
        n_queries,
        n_keys,
        query_start,
    )
    sizes = PrefixCounts(n_rows, n_blocks, n_members)
    program = tl.program_id(0)
    slot = program % n_slots
    member = program // n_slots % n_members
    batch = program // n_slots // n_members % n_batch
    entry = program // n_slots // n_members // n_batch * group
    sequence = varlen.sequence_at(positions, counts, slot, batch, FORM.CHUNK, False, FORM)
    if sequence.block * FORM.CHUNK >= sequence.n_queries:
        return
    queries = source_of(
        query,
        d_out,
        stats.lse_log2,
        stats.delta,
        p_bands,
        entry,
        batch,
        sequence,
        positions,
        counts,
        n_rows,
        FORM,
    )
    found = prefix_part(member, sequence.block, queries, sizes, FORM)
    if not found.exists:
        return
    first_key = found.block * BLOCK_N
    last_key = min(first_key + BLOCK_N, sequence.n_keys) - 1
    o_key = first_key + tl.arange(0, BLOCK_N)  # [N]
    low_query = tl.maximum(found.low, sequence.block * FORM.CHUNK)
    high_query = tl.minimum(found.high, (sequence.block + 1) * FORM.CHUNK)
    part = KeyPart(first_key, last_key, low_query, high_query)

    key_head = (tl.load(p_bands + 8 * entry) // group).to(tl.int64)
    offset_k = tl.zeros([], tl.int64) + sequence.offset_k
    p_key = arguments.head_pointer(key, batch.to(tl.int64), key_head, offset_k)
    p_value = arguments.head_pointer(value, batch.to(tl.int64), key_head, offset_k)
    b_key = memory.load_tokens(p_key, o_key, key.stride_t, 0, sequence.n_keys, FORM)
    b_value = memory.load_tokens(p_value, o_key, value.stride_t, 0, sequence.n_keys, FORM)
    b_d_key, b_d_value = sum_key_gradients(b_key, b_value, o_key, part, queries, scale, FORM, False)
    b_d_key = b_d_key * softmax.natural(scale, FORM.PRECISE)
    p_d_key = p_part + (2 * program.to(tl.int64) * BLOCK_N - first_key) * HEAD_DIM
    p_d_value = p_d_key + BLOCK_N * HEAD_DIM
    results = Heads(p_d_key, 0, 0, HEAD_DIM), Heads(p_d_value, 0, 0, HEAD_DIM)
    store_gradients(results, b_d_key, b_d_value, o_key, o_key <= last_key, FORM)
    if FORM.HAS_KEY_START:
        store_documents(
            b_key, b_value, o_key, part, queries, results, b_d_key, b_d_value, scale, FORM, False
        )


@triton.jit(do_not_specialize=[*Counts._fields, *PrefixCounts._fields])
def reduce_kernel(
    d_key,
    d_value,
    p_part,
    p_bands,
    positions,
    query_start_stride,
    key_start_stride_b,
    key_start_stride_t,
    n_heads,
    group,
    n_batch,
    n_documents,
    n_slots,
    n_queries,
    n_keys,
    query_start,
    n_rows,
    n_blocks,
    n_members,
    FORM: tl.constexpr,
):
    """Add all parts of a block of keys to ROWS of its keys. The program of the first chunk of these
    queries does it.
    """
    BLOCK_N: tl.constexpr = FORM.BLOCK_N
    BLOCK_D: tl.constexpr = FORM.BLOCK_D
    HEAD_DIM: tl.constexpr = FORM.HEAD_DIM
    counts = Counts(
        query_start_stride,
        key_start_stride_b,
        key_start_stride_t,
        n_heads,
        group,
        n_batch,
        n_documents,
        n_slots,
        n_queries,
        n_keys,
        query_start,
    )
    sizes = PrefixCounts(n_rows, n_blocks, n_members)
    row = tl.program_id(0) % (BLOCK_N // ROWS) * ROWS
    program = tl.program_id(0) // (BLOCK_N // ROWS)
    slot = program % n_slots
    member = program // n_slots % n_members
    batch = program // n_slots // n_members % n_batch
    entry = program // n_slots // n_members // n_batch * group
    sequence = varlen.sequence_at(positions, counts, slot, batch, FORM.CHUNK, False, FORM)
    chunk = sequence.block
    if chunk * FORM.CHUNK >= sequence.n_queries:
        return
    queries = source_of(
        d_key,
        d_key,
        p_part,
        p_part,
        p_bands,
        entry,
        batch,
        sequence,
        positions,
        counts,
        n_rows,
        FORM,
    )
    found = prefix_part(member, chunk, queries, sizes, FORM)
    if (not found.exists) | (chunk != found.low // FORM.CHUNK):
        return
    o_key = found.block * BLOCK_N + row + tl.arange(0, ROWS)  # [ROWS]
    o_dim = tl.arange(0, BLOCK_D)  # [D]
    m_key = (o_key < sequence.n_keys)[:, None] & (o_dim < HEAD_DIM)[None, :]
    o_tile = (row + tl.arange(0, ROWS))[:, None] * HEAD_DIM + o_dim[None, :]  # [ROWS, D]
    b_d_key = tl.zeros([ROWS, BLOCK_D], tl.float32)
    b_d_value = tl.zeros([ROWS, BLOCK_D], tl.float32)
    end = (found.high - 1) // FORM.CHUNK + 1
    for first in range(chunk, end, PARTS):
        o_chunk = first + tl.arange(0, PARTS)  # [PARTS]
        starts, lasts = ends_of_chunk(o_chunk, queries, FORM)
        o_member = member_of_block(found.block, starts, lasts, n_blocks, BLOCK_N)
        o_part = (program // n_slots // n_members * n_members + o_member) * n_slots
        o_part = (o_part + slot + o_chunk - chunk).to(tl.int64)
        p_tile = p_part + 2 * BLOCK_N * HEAD_DIM * o_part[:, None, None] + o_tile[None, :, :]
        m_tile = (o_chunk < end)[:, None, None] & m_key[None, :, :]
        b_d_key += tl.sum(tl.load(p_tile, mask=m_tile, other=0.0), 0)
        b_d_value += tl.sum(tl.load(p_tile + BLOCK_N * HEAD_DIM, mask=m_tile, other=0.0), 0)

    key_head = (tl.load(p_bands + 8 * entry) // group).to(tl.int64)
    offset_k = tl.zeros([], tl.int64) + sequence.offset_k
    p_d_key = arguments.head_pointer(d_key, batch.to(tl.int64), key_head, offset_k)
    p_d_value = arguments.head_pointer(d_value, batch.to(tl.int64), key_head, offset_k)
    add_tokens(p_d_key, b_d_key, o_key, m_key, d_key.stride_t, BLOCK_D)
    add_tokens(p_d_value, b_d_value, o_key, m_key, d_value.stride_t, BLOCK_D)


@triton.jit
def add_tokens(p_head, b_tokens, o_token, m_token, stride, BLOCK_D: tl.constexpr):
    """Add `b_tokens` `[T, D]` to tokens `o_token` of a head where `m_token` `[T, D]` is true."""
    p_tokens = p_head + o_token.to(tl.int64)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]
    b_tokens += tl.load(p_tokens, mask=m_token, other=0.0).to(tl.float32)
    tl.store(p_tokens, b_tokens.to(p_head.dtype.element_ty), mask=m_token)
