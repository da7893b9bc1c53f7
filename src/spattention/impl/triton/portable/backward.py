# mypy: allow-untyped-defs
"""Backward pass in two kernels. Each owns what it writes: no atomics, the same bits on every run.

`query_gradient_kernel` loops over the keys of a block of queries, as the forward pass does. It
writes dQ and `delta = rowsum(dO * O) - d_lse`. `key_gradient_kernel` loops over the queries of a
block of keys, for every query head that reads them, and writes dK and dV. Both recompute the
scores: seven products instead of five.

    B batch   H query heads   Q queries   K keys   D head_dim
    M = BLOCK_M queries of a block   N = BLOCK_N keys of a block
    inside the kernels D is BLOCK_D, zero-filled
    p_ pointer   b_ block   o_ offset   m_ mask   `d_` gradient of
"""

import triton
import triton.language as tl

from .. import arguments, memory, softmax, tiles, varlen
from ..arguments import Counts


@triton.jit(do_not_specialize=Counts._fields)
def query_gradient_kernel(
    query,
    key,
    value,
    out,
    d_out,
    d_query,
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
    scale,
    FORM: tl.constexpr,
):
    BLOCK_M: tl.constexpr = FORM.BLOCK_M
    BLOCK_N: tl.constexpr = FORM.BLOCK_N
    BLOCK_D: tl.constexpr = FORM.BLOCK_D
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
    block = arguments.query_block(p_bands, positions, counts, FORM)
    if block.first_query >= block.n_queries:
        return
    bands, first, last = block.bands, block.first, block.last
    o_query = block.first_query + tl.arange(0, BLOCK_M)  # [M]
    o_position = block.start + o_query  # [M]
    starts = arguments.key_starts(block, o_query, positions, counts, FORM)
    keys = tiles.key_blocks(
        bands, first, last, starts.lowest, block.n_keys, BLOCK_N, FORM.INTERVALS
    )
    n_steps = tiles.total_blocks(keys)

    batch, head = block.batch.to(tl.int64), bands.head.to(tl.int64)
    key_head = (bands.head // counts.group).to(tl.int64)
    offset_q = tl.zeros([], tl.int64) + block.offset_q
    offset_k = tl.zeros([], tl.int64) + block.offset_k
    p_query = arguments.head_pointer(query, batch, head, offset_q)
    p_key = arguments.head_pointer(key, batch, key_head, offset_k)
    p_value = arguments.head_pointer(value, batch, key_head, offset_k)
    p_out = arguments.head_pointer(out, batch, head, offset_q)
    p_d_out = arguments.head_pointer(d_out, batch, head, offset_q)
    p_d_query = arguments.head_pointer(d_query, batch, head, offset_q)
    o_row = (batch * counts.n_heads + head) * counts.n_queries + offset_q + o_query  # [M]

    # A block that sees no key reads nothing.
    m_query = o_query < block.n_queries
    end_query = tl.where(n_steps > 0, block.n_queries, 0)
    b_query = memory.load_tokens(p_query, o_query, query.stride_t, 0, end_query, FORM)
    b_d_out = memory.load_tokens(p_d_out, o_query, d_out.stride_t, 0, end_query, FORM)
    b_out = memory.load_tokens(p_out, o_query, out.stride_t, 0, end_query, FORM)
    delta = tl.sum(b_d_out.to(tl.float32) * b_out.to(tl.float32), 1)  # [M]
    lse = tl.load(stats.lse + o_row, mask=m_query, other=0.0)
    lse_log2 = softmax.to_lse_log2(lse, FORM.PRECISE)  # [M]
    if n_steps <= FORM.EXACT_STEPS:
        # With few keys gradients cancel, and the rounding of the output would show in delta.
        delta = tl.zeros([BLOCK_M], tl.float32)
        for step in range(n_steps):
            first_key, low, near, far = tiles.block_at(step, keys, bands, BLOCK_N, FORM.INTERVALS)
            o_key = first_key + tl.arange(0, BLOCK_N)  # [N]
            b_key = memory.load_tokens(p_key, o_key, key.stride_t, low, block.n_keys, FORM)
            b_value = memory.load_tokens(p_value, o_key, value.stride_t, low, block.n_keys, FORM)
            scores = tl.dot(b_query, tl.trans(b_key), input_precision="ieee")
            d_p = tl.dot(b_d_out, tl.trans(b_value), input_precision="ieee")
            o_count = tiles.visible_count(o_position, near, far, starts.each)  # [M]
            m_seen = tiles.visible(o_position[:, None], o_key[None, :], near, o_count[:, None])
            p = softmax.recompute(scores, lse_log2[:, None], scale, FORM.PRECISE)
            delta += tl.sum(tl.where(m_seen, p, 0.0) * d_p, 1)
    if FORM.HAS_D_LSE:
        delta -= tl.load(stats.d_lse + o_row, mask=m_query, other=0.0)
    tl.store(stats.delta + o_row, delta, mask=m_query)
    tl.store(stats.lse_log2 + o_row, lse_log2, mask=m_query)
    b_d_query = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    for step in range(n_steps):
        first_key, low, near, far = tiles.block_at(step, keys, bands, BLOCK_N, FORM.INTERVALS)
        o_key = first_key + tl.arange(0, BLOCK_N)  # [N]
        b_key = memory.load_tokens(p_key, o_key, key.stride_t, low, block.n_keys, FORM)
        b_value = memory.load_tokens(p_value, o_key, value.stride_t, low, block.n_keys, FORM)

        # [M, N] = [M, D] @ [D, N], both
        scores = tl.dot(b_query, tl.trans(b_key), input_precision="ieee")
        d_p = tl.dot(b_d_out, tl.trans(b_value), input_precision="ieee")
        p = softmax.recompute(scores, lse_log2[:, None], scale, FORM.PRECISE)
        last_key = first_key + BLOCK_N - 1
        if not tiles.is_inside(first, last, first_key, last_key, near, far, starts.highest):
            o_count = tiles.visible_count(o_position, near, far, starts.each)  # [M]
            m_seen = tiles.visible(o_position[:, None], o_key[None, :], near, o_count[:, None])
            p = tl.where(m_seen, p, 0.0)
        d_scores = p * (d_p - delta[:, None])
        # [M, D] += [M, N] @ [N, D]
        b_d_query = tl.dot(d_scores.to(b_key.dtype), b_key, b_d_query, input_precision="ieee")

    b_d_query = b_d_query * softmax.natural(scale, FORM.PRECISE)
    memory.store_tokens(p_d_query, b_d_query, o_query, d_query.stride_t, block.n_queries, FORM)


@triton.jit(do_not_specialize=Counts._fields)
def key_gradient_kernel(
    query,
    key,
    value,
    d_out,
    d_key,
    d_value,
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
    scale,
    FORM: tl.constexpr,
):
    BLOCK_M: tl.constexpr = FORM.BLOCK_M
    BLOCK_N: tl.constexpr = FORM.BLOCK_N
    BLOCK_D: tl.constexpr = FORM.BLOCK_D
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
    # Early blocks of keys are seen by the most queries: they come first.
    program = tl.program_id(0)
    slot = program % counts.n_slots
    batch = (program // counts.n_slots) % counts.n_batch
    # One entry of the table per query head; the key heads by descending work.
    entry = program // counts.n_slots // counts.n_batch * counts.group
    key_head = tl.load(p_bands + 8 * entry) // counts.group
    sequence = varlen.sequence_at(positions, counts, slot, batch, BLOCK_N, True, FORM)
    n_queries, n_keys, start = sequence.n_queries, sequence.n_keys, sequence.start
    first_key = sequence.block * BLOCK_N
    if first_key >= n_keys:
        return
    last_key = min(first_key + BLOCK_N, n_keys) - 1
    o_key = first_key + tl.arange(0, BLOCK_N)  # [N]

    end_query = n_queries
    if FORM.HAS_KEY_START:
        # Queries whose first key is after this block see nothing of it.
        p_start = positions.key_start + batch.to(tl.int64) * counts.key_start_stride_b
        stride_start = counts.key_start_stride_t
        end_query = varlen.first_query_after(p_start, stride_start, n_queries, last_key)

    batch_64, key_head_64 = batch.to(tl.int64), key_head.to(tl.int64)
    offset_q = tl.zeros([], tl.int64) + sequence.offset_q
    offset_k = tl.zeros([], tl.int64) + sequence.offset_k
    p_query = query.pointer + batch_64 * query.stride_b + offset_q * query.stride_t
    p_d_out = d_out.pointer + batch_64 * d_out.stride_b + offset_q * d_out.stride_t
    p_key = arguments.head_pointer(key, batch_64, key_head_64, offset_k)
    p_value = arguments.head_pointer(value, batch_64, key_head_64, offset_k)
    p_d_key = arguments.head_pointer(d_key, batch_64, key_head_64, offset_k)
    p_d_value = arguments.head_pointer(d_value, batch_64, key_head_64, offset_k)

    b_key = memory.load_tokens(p_key, o_key, key.stride_t, 0, n_keys, FORM)
    b_value = memory.load_tokens(p_value, o_key, value.stride_t, 0, n_keys, FORM)
    b_d_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_d_value = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    for member in range(counts.group if FORM.GROUPED else 1):
        bands = tiles.load_bands(p_bands, entry + member)
        head = bands.head.to(tl.int64)
        p_query_head = p_query + head * query.stride_h
        p_d_out_head = p_d_out + head * d_out.stride_h
        row = (batch_64 * counts.n_heads + head) * counts.n_queries + offset_q
        queries = tiles.query_blocks(
            bands, first_key, last_key, start, end_query, BLOCK_M, FORM.INTERVALS
        )

        for step in range(tiles.total_blocks(queries)):
            first_query, high, near, far = tiles.block_at(
                step, queries, bands, BLOCK_M, FORM.INTERVALS
            )
            o_query = first_query + tl.arange(0, BLOCK_M)  # [M]
            m_query = o_query < high
            b_query = memory.load_tokens(p_query_head, o_query, query.stride_t, 0, high, FORM)
            b_d_out = memory.load_tokens(p_d_out_head, o_query, d_out.stride_t, 0, high, FORM)
            lse_log2 = tl.load(stats.lse_log2 + row + o_query, mask=m_query, other=0.0)  # [M]
            delta = tl.load(stats.delta + row + o_query, mask=m_query, other=0.0)  # [M]

            # [N, M] = [N, D] @ [D, M], both
            scores = tl.dot(b_key, tl.trans(b_query), input_precision="ieee")
            d_p = tl.dot(b_value, tl.trans(b_d_out), input_precision="ieee")
            p = softmax.recompute(scores, lse_log2[None, :], scale, FORM.PRECISE)
            first = start + first_query
            highest_start = 0
            if FORM.HAS_KEY_START:
                last_query = min(first_query + BLOCK_M, n_queries) - 1
                highest_start = varlen.first_keys(
                    p_start, last_query, n_queries, stride_start, n_keys
                )
            last = first + BLOCK_M - 1
            inside = tiles.is_inside(first, last, first_key, last_key, near, far, highest_start)
            # Zeros after the end of the range would get the probability 1.
            if (not inside) | (first_query + BLOCK_M > high):
                o_position = start + o_query  # [M]
                o_start = 0
                if FORM.HAS_KEY_START:
                    o_start = varlen.first_keys(
                        p_start, o_query, n_queries, stride_start, n_keys
                    )  # [M]
                o_count = tiles.visible_count(o_position, near, far, o_start)  # [M]
                m_seen = tiles.visible(o_position[None, :], o_key[:, None], near, o_count[None, :])
                m_seen = m_seen & m_query[None, :]
                p = tl.where(m_seen, p, 0.0)
                # A key that no query sees may hold anything; its gradient is zero.
                d_p = tl.where(m_seen, d_p, 0.0)
            # [N, D] += [N, M] @ [M, D], both
            b_d_value = tl.dot(p.to(b_d_out.dtype), b_d_out, b_d_value, input_precision="ieee")
            d_scores = p * (d_p - delta[None, :])
            b_d_key = tl.dot(d_scores.to(b_query.dtype), b_query, b_d_key, input_precision="ieee")

    b_d_key = b_d_key * softmax.natural(scale, FORM.PRECISE)
    memory.store_tokens(p_d_key, b_d_key, o_key, d_key.stride_t, n_keys, FORM)
    memory.store_tokens(p_d_value, b_d_value, o_key, d_value.stride_t, n_keys, FORM)
