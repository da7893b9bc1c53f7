# mypy: allow-untyped-defs
"""Backward pass in two kernels, each of which owns what it writes: no atomics, the same bits on
every run.

`query_gradient_kernel` walks the keys of a block of queries, as the forward pass does, and writes
dQ and `delta`, the row sum of dO * O less the gradient of the log-sum-exp. `key_gradient_kernel`
walks the queries of a block of keys, for every query head that reads them, and writes dK and dV.
Scores are computed anew in both: seven products instead of five.

    B batch   H query heads   Q queries   K keys   D head_dim
    M = BLOCK_M queries of a block   N = BLOCK_N keys of a block
    inside the kernels D is BLOCK_D, zero-filled
    p_ pointer   b_ block   o_ offset   m_ mask   `_d_` inside a name: gradient of
"""

import triton
import triton.language as tl

from .. import memory, softmax, tiles
from ..config import COUNTS

# Steps up to which a block of queries has few keys.
EXACT_STEPS = tl.constexpr(2)


@triton.jit(do_not_specialize=COUNTS)
def query_gradient_kernel(
    p_query,
    p_key,
    p_value,
    p_out,
    p_d_out,
    p_d_query,
    p_lse,
    p_d_lse,
    p_base,
    p_delta,
    p_bands,
    p_query_start,
    p_key_start,
    p_offsets_q,
    p_offsets_k,
    query_stride_b,
    query_stride_h,
    query_stride_t,
    key_stride_b,
    key_stride_h,
    key_stride_t,
    value_stride_b,
    value_stride_h,
    value_stride_t,
    out_stride_b,
    out_stride_h,
    out_stride_t,
    d_out_stride_b,
    d_out_stride_h,
    d_out_stride_t,
    d_query_stride_b,
    d_query_stride_h,
    d_query_stride_t,
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
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERVALS: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_D_LSE: tl.constexpr,
    START_ON_DEVICE: tl.constexpr,
    HAS_KEY_START: tl.constexpr,
    PRECISE: tl.constexpr,
):
    program = tl.program_id(0)
    slot = n_slots - 1 - program % n_slots
    batch = (program // n_slots) % n_batch
    bands = tiles.bands_of(p_bands, program // n_slots // n_batch)
    head = bands[0]
    block, row_q, queries, row_k, keys, start = tiles.place(
        p_offsets_q,
        p_offsets_k,
        p_query_start,
        query_start_stride,
        query_start,
        slot,
        batch,
        n_documents,
        n_queries,
        n_keys,
        BLOCK_M,
        False,
        PACKED,
        START_ON_DEVICE,
    )
    first_query = block * BLOCK_M
    if first_query >= queries:
        return
    first = start + first_query
    last = start + min(first_query + BLOCK_M, queries) - 1
    o_query = first_query + tl.arange(0, BLOCK_M)  # [M]
    o_position = start + o_query  # [M]

    if HAS_KEY_START:
        p_key_start += batch.to(tl.int64) * key_start_stride_b
        o_start = tiles.first_key_of(p_key_start, o_query, queries, key_start_stride_t, keys)  # [M]
        low_start = tiles.first_key_of(p_key_start, first_query, queries, key_start_stride_t, keys)
        high_start = tiles.first_key_of(
            p_key_start, last - start, queries, key_start_stride_t, keys
        )
    else:
        o_start = 0
        low_start = 0
        high_start = 0

    walk = tiles.key_walk(bands, first, last, low_start, keys, BLOCK_N, INTERVALS)
    n_steps = tiles.steps_of(walk)

    batch_64 = batch.to(tl.int64)
    head_64 = head.to(tl.int64)
    key_head = (head // group).to(tl.int64)
    row_q_64 = tl.zeros([], tl.int64) + row_q
    row_k_64 = tl.zeros([], tl.int64) + row_k
    p_query += batch_64 * query_stride_b + head_64 * query_stride_h + row_q_64 * query_stride_t
    p_key += batch_64 * key_stride_b + key_head * key_stride_h + row_k_64 * key_stride_t
    p_value += batch_64 * value_stride_b + key_head * value_stride_h + row_k_64 * value_stride_t
    p_out += batch_64 * out_stride_b + head_64 * out_stride_h + row_q_64 * out_stride_t
    p_d_out += batch_64 * d_out_stride_b + head_64 * d_out_stride_h + row_q_64 * d_out_stride_t
    p_d_query += (
        batch_64 * d_query_stride_b + head_64 * d_query_stride_h + row_q_64 * d_query_stride_t
    )
    o_row = (batch_64 * n_heads + head_64) * n_queries + row_q_64 + o_query  # [M]

    # A block that sees nothing reads nothing.
    m_query = o_query < queries
    end_query = tl.where(n_steps > 0, queries, 0)
    b_query = memory.load_rows(p_query, o_query, query_stride_t, 0, end_query, HEAD_DIM, BLOCK_D)
    b_d_out = memory.load_rows(p_d_out, o_query, d_out_stride_t, 0, end_query, HEAD_DIM, BLOCK_D)
    b_out = memory.load_rows(p_out, o_query, out_stride_t, 0, end_query, HEAD_DIM, BLOCK_D)
    delta = tl.sum(b_d_out.to(tl.float32) * b_out.to(tl.float32), 1)  # [M]
    base = softmax.base_of(tl.load(p_lse + o_row, mask=m_query, other=0.0), PRECISE)  # [M]
    if n_steps <= EXACT_STEPS:
        # Few keys: the rounding of the output would show where gradients cancel. Sum anew.
        delta = tl.zeros([BLOCK_M], tl.float32)
        for step in range(n_steps):
            first_key, low, near, far = tiles.step_at(step, walk, bands, BLOCK_N, INTERVALS)
            o_key = first_key + tl.arange(0, BLOCK_N)  # [N]
            b_key = memory.load_rows(p_key, o_key, key_stride_t, low, keys, HEAD_DIM, BLOCK_D)
            b_value = memory.load_rows(p_value, o_key, value_stride_t, low, keys, HEAD_DIM, BLOCK_D)
            scores = tl.dot(b_query, tl.trans(b_key), input_precision="ieee")
            d_weights = tl.dot(b_d_out, tl.trans(b_value), input_precision="ieee")
            o_reach = tiles.reach(o_position, near, far, o_start)  # [M]
            m_seen = tiles.visible(o_position[:, None], o_key[None, :], near, o_reach[:, None])
            weights = tl.where(
                m_seen, softmax.weights_of(scores, base[:, None], scale, PRECISE), 0.0
            )
            delta += tl.sum(weights * d_weights, 1)
    if HAS_D_LSE:
        delta -= tl.load(p_d_lse + o_row, mask=m_query, other=0.0)
    tl.store(p_delta + o_row, delta, mask=m_query)
    tl.store(p_base + o_row, base, mask=m_query)
    b_d_query = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    for step in range(n_steps):
        first_key, low, near, far = tiles.step_at(step, walk, bands, BLOCK_N, INTERVALS)
        o_key = first_key + tl.arange(0, BLOCK_N)  # [N]
        b_key = memory.load_rows(p_key, o_key, key_stride_t, low, keys, HEAD_DIM, BLOCK_D)
        b_value = memory.load_rows(p_value, o_key, value_stride_t, low, keys, HEAD_DIM, BLOCK_D)

        # [M, N] = [M, D] @ [D, N], both
        scores = tl.dot(b_query, tl.trans(b_key), input_precision="ieee")
        d_weights = tl.dot(b_d_out, tl.trans(b_value), input_precision="ieee")
        weights = softmax.weights_of(scores, base[:, None], scale, PRECISE)
        last_key = first_key + BLOCK_N - 1
        if not tiles.is_inside(first, last, first_key, last_key, near, far, high_start):
            o_reach = tiles.reach(o_position, near, far, o_start)  # [M]
            m_seen = tiles.visible(o_position[:, None], o_key[None, :], near, o_reach[:, None])
            weights = tl.where(m_seen, weights, 0.0)
        d_scores = weights * (d_weights - delta[:, None])
        # [M, D] += [M, N] @ [N, D]
        b_d_query = tl.dot(d_scores.to(b_key.dtype), b_key, b_d_query, input_precision="ieee")

    memory.store_rows(
        p_d_query,
        b_d_query * softmax.natural(scale, PRECISE),
        o_query,
        d_query_stride_t,
        queries,
        HEAD_DIM,
        BLOCK_D,
    )


@triton.jit(do_not_specialize=COUNTS)
def key_gradient_kernel(
    p_query,
    p_key,
    p_value,
    p_d_out,
    p_d_key,
    p_d_value,
    p_base,
    p_delta,
    p_bands,
    p_query_start,
    p_key_start,
    p_offsets_q,
    p_offsets_k,
    query_stride_b,
    query_stride_h,
    query_stride_t,
    key_stride_b,
    key_stride_h,
    key_stride_t,
    value_stride_b,
    value_stride_h,
    value_stride_t,
    d_out_stride_b,
    d_out_stride_h,
    d_out_stride_t,
    d_key_stride_b,
    d_key_stride_h,
    d_key_stride_t,
    d_value_stride_b,
    d_value_stride_h,
    d_value_stride_t,
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
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERVALS: tl.constexpr,
    GROUPED: tl.constexpr,
    PACKED: tl.constexpr,
    START_ON_DEVICE: tl.constexpr,
    HAS_KEY_START: tl.constexpr,
    PRECISE: tl.constexpr,
):
    # Early blocks of keys are reached by most queries: they come first.
    program = tl.program_id(0)
    slot = program % n_slots
    batch = (program // n_slots) % n_batch
    # One row per key head and query head that reads it; the key heads by falling work.
    row_bands = program // n_slots // n_batch * group
    key_head = tl.load(p_bands + 8 * row_bands) // group
    block, row_q, queries, row_k, keys, start = tiles.place(
        p_offsets_q,
        p_offsets_k,
        p_query_start,
        query_start_stride,
        query_start,
        slot,
        batch,
        n_documents,
        n_queries,
        n_keys,
        BLOCK_N,
        True,
        PACKED,
        START_ON_DEVICE,
    )
    first_key = block * BLOCK_N
    if first_key >= keys:
        return
    last_key = min(first_key + BLOCK_N, keys) - 1
    o_key = first_key + tl.arange(0, BLOCK_N)  # [N]

    end_query = queries
    if HAS_KEY_START:
        # Queries whose first key lies behind this block see nothing of it.
        p_key_start += batch.to(tl.int64) * key_start_stride_b
        end_query = tiles.first_after(p_key_start, key_start_stride_t, queries, last_key)

    batch_64 = batch.to(tl.int64)
    key_head_64 = key_head.to(tl.int64)
    row_q_64 = tl.zeros([], tl.int64) + row_q
    row_k_64 = tl.zeros([], tl.int64) + row_k
    p_query += batch_64 * query_stride_b + row_q_64 * query_stride_t
    p_key += batch_64 * key_stride_b + key_head_64 * key_stride_h + row_k_64 * key_stride_t
    p_value += batch_64 * value_stride_b + key_head_64 * value_stride_h + row_k_64 * value_stride_t
    p_d_out += batch_64 * d_out_stride_b + row_q_64 * d_out_stride_t
    p_d_key += batch_64 * d_key_stride_b + key_head_64 * d_key_stride_h + row_k_64 * d_key_stride_t
    p_d_value += (
        batch_64 * d_value_stride_b + key_head_64 * d_value_stride_h + row_k_64 * d_value_stride_t
    )

    b_key = memory.load_rows(p_key, o_key, key_stride_t, 0, keys, HEAD_DIM, BLOCK_D)
    b_value = memory.load_rows(p_value, o_key, value_stride_t, 0, keys, HEAD_DIM, BLOCK_D)
    b_d_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_d_value = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    for member in range(group if GROUPED else 1):
        bands = tiles.bands_of(p_bands, row_bands + member)
        head = bands[0]
        head_64 = head.to(tl.int64)
        p_query_h = p_query + head_64 * query_stride_h
        p_d_out_h = p_d_out + head_64 * d_out_stride_h
        row = (batch_64 * n_heads + head_64) * n_queries + row_q_64
        walk = tiles.query_walk(bands, first_key, last_key, start, end_query, BLOCK_M, INTERVALS)

        for step in range(tiles.steps_of(walk)):
            first_query, high, near, far = tiles.step_at(step, walk, bands, BLOCK_M, INTERVALS)
            o_query = first_query + tl.arange(0, BLOCK_M)  # [M]
            m_query = o_query < high
            b_query = memory.load_rows(
                p_query_h, o_query, query_stride_t, 0, high, HEAD_DIM, BLOCK_D
            )
            b_d_out = memory.load_rows(
                p_d_out_h, o_query, d_out_stride_t, 0, high, HEAD_DIM, BLOCK_D
            )
            base = tl.load(p_base + row + o_query, mask=m_query, other=0.0)  # [M]
            delta = tl.load(p_delta + row + o_query, mask=m_query, other=0.0)  # [M]

            # [N, M] = [N, D] @ [D, M], both
            scores = tl.dot(b_key, tl.trans(b_query), input_precision="ieee")
            d_weights = tl.dot(b_value, tl.trans(b_d_out), input_precision="ieee")
            weights = softmax.weights_of(scores, base[None, :], scale, PRECISE)
            first = start + first_query
            high_start = 0
            if HAS_KEY_START:
                high_start = tiles.first_key_of(
                    p_key_start,
                    min(first_query + BLOCK_M, queries) - 1,
                    queries,
                    key_start_stride_t,
                    keys,
                )
            last = first + BLOCK_M - 1
            inside = tiles.is_inside(first, last, first_key, last_key, near, far, high_start)
            # Zeros behind the range would weigh 1.
            if (not inside) | (first_query + BLOCK_M > high):
                o_position = start + o_query  # [M]
                o_start = 0
                if HAS_KEY_START:
                    o_start = tiles.first_key_of(
                        p_key_start, o_query, queries, key_start_stride_t, keys
                    )  # [M]
                o_reach = tiles.reach(o_position, near, far, o_start)  # [M]
                m_seen = tiles.visible(o_position[None, :], o_key[:, None], near, o_reach[None, :])
                m_seen = m_seen & m_query[None, :]
                weights = tl.where(m_seen, weights, 0.0)
                # A key that nobody sees may hold anything; its gradient is zero.
                d_weights = tl.where(m_seen, d_weights, 0.0)
            # [N, D] += [N, M] @ [M, D], both
            b_d_value = tl.dot(
                weights.to(b_d_out.dtype), b_d_out, b_d_value, input_precision="ieee"
            )
            d_scores = weights * (d_weights - delta[None, :])
            b_d_key = tl.dot(d_scores.to(b_query.dtype), b_query, b_d_key, input_precision="ieee")

    memory.store_rows(
        p_d_key,
        b_d_key * softmax.natural(scale, PRECISE),
        o_key,
        d_key_stride_t,
        keys,
        HEAD_DIM,
        BLOCK_D,
    )
    memory.store_rows(p_d_value, b_d_value, o_key, d_value_stride_t, keys, HEAD_DIM, BLOCK_D)
