# mypy: allow-untyped-defs
"""Backward pass in two kernels, each of which owns what it writes: no atomics, the same bits on every run.

`query_gradient_kernel` walks the keys of a block of queries, as the forward pass does, and writes dQ and `delta`, the row
sum of dO * O less the gradient of the log-sum-exp. `key_gradient_kernel` walks the queries of a block of keys, for every
query head that reads them, and writes dK and dV. Scores are computed anew in both: seven products instead of five.

    B batch   H query heads   Q queries   K keys   D head_dim
    M = BLOCK_M queries of a block   N = BLOCK_N keys of a block   inside the kernels D is BLOCK_D, zero-filled
    p_ pointer   t_ tensor descriptor   b_ block   o_ offset   m_ mask; `_d_` inside a name: gradient of
"""

import triton
import triton.language as tl

from . import memory, softmax, tiles
from .config import COUNTS


@triton.jit(do_not_specialize=COUNTS)
def query_gradient_kernel(
    p_query,
    p_key,
    p_value,
    t_key,
    t_value,
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
    pitch,
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
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    slot = n_slots - 1 - program % n_slots
    batch = (program // n_slots) % n_batch
    head, near_0, far_0, near_1, far_1 = tiles.bands_of(p_bands, program // n_slots // n_batch)
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

    begin_0, low_0, begin_1, low_1, steps_0, steps_1 = tiles.key_walk(
        near_0, far_0, near_1, far_1, first, last, low_start, keys, BLOCK_N, INTERVALS
    )

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
    o_pitched = (batch_64 * n_heads + head_64) * pitch + row_q_64 + o_query  # [M]

    # A block that sees nothing reads nothing.
    m_query = o_query < queries
    end_query = tl.where(steps_0 + steps_1 > 0, queries, 0)
    b_query = memory.loat_rows(p_query, o_query, query_stride_t, 0, end_query, HEAD_DIM, BLOCK_D)
    b_d_out = memory.loat_rows(p_d_out, o_query, d_out_stride_t, 0, end_query, HEAD_DIM, BLOCK_D)
    b_out = memory.loat_rows(p_out, o_query, out_stride_t, 0, end_query, HEAD_DIM, BLOCK_D)
    delta = tl.sum(b_d_out.to(tl.float32) * b_out.to(tl.float32), 1)  # [M]
    if HAS_D_LSE:
        delta -= tl.load(p_d_lse + o_row, mask=m_query, other=0.0)
    # The rows up to the pitch are read by descriptor, with those of the last block.
    m_pitched = m_query if PACKED else o_query < pitch
    tl.store(p_delta + o_pitched, delta, mask=m_pitched)
    base = softmax.base_of(tl.load(p_lse + o_row, mask=m_query, other=0.0))  # [M]
    tl.store(p_base + o_pitched, base, mask=m_pitched)
    b_d_query = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    for step in range(steps_0 + steps_1):
        near, far, first_key, low = tiles.step_at(
            step,
            steps_0,
            near_0,
            far_0,
            begin_0,
            low_0,
            near_1,
            far_1,
            begin_1,
            low_1,
            BLOCK_N,
            INTERVALS,
        )
        o_key = first_key + tl.arange(0, BLOCK_N)  # [N]
        if DESCRIPTORS:
            b_key = memory.copy_rows(t_key, batch, head // group, first_key, BLOCK_N, BLOCK_D)
            b_value = memory.copy_rows(t_value, batch, head // group, first_key, BLOCK_N, BLOCK_D)
        else:
            b_key = memory.loat_rows(p_key, o_key, key_stride_t, low, keys, HEAD_DIM, BLOCK_D)
            b_value = memory.loat_rows(p_value, o_key, value_stride_t, low, keys, HEAD_DIM, BLOCK_D)

        # [M, N] = [M, D] @ [D, N], both
        scores = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION)
        d_weights = tl.dot(b_d_out, tl.trans(b_value), input_precision=PRECISION)
        weights = softmax.weights_of(scores, base[:, None], scale)
        last_key = first_key + BLOCK_N - 1
        if not tiles.is_inside(first, last, first_key, last_key, near, far, high_start):
            o_reach = tiles.reach(o_position, near, far, o_start)  # [M]
            m_seen = tiles.visible(o_position[:, None], o_key[None, :], near, o_reach[:, None])
            weights = tl.where(m_seen, weights, 0.0)
        d_scores = weights * (d_weights - delta[:, None])
        # [M, D] += [M, N] @ [N, D]
        b_d_query = tl.dot(d_scores.to(b_key.dtype), b_key, b_d_query, input_precision=PRECISION)

    memory.store_rows(
        p_d_query,
        b_d_query * (scale * softmax.LN_2),
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
    t_query,
    t_d_out,
    t_base,
    t_delta,
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
    pitch,
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
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Early blocks of keys are reached by most queries: they come first.
    program = tl.program_id(0)
    slot = program % n_slots
    batch = (program // n_slots) % n_batch
    # One row per key head and query head that reads it; the key heads by falling work.
    row_bands = program // n_slots // n_batch * group
    head, near_0, far_0, near_1, far_1 = tiles.bands_of(p_bands, row_bands)
    key_head = head // group
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
        end_query = tiles.first_after(p_key_start, key_start_stride_t, 0, queries, last_key)

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

    b_key = memory.loat_rows(p_key, o_key, key_stride_t, 0, keys, HEAD_DIM, BLOCK_D)
    b_value = memory.loat_rows(p_value, o_key, value_stride_t, 0, keys, HEAD_DIM, BLOCK_D)
    b_d_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_d_value = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    for member in range(group if GROUPED else 1):
        if GROUPED:
            head, near_0, far_0, near_1, far_1 = tiles.bands_of(p_bands, row_bands + member)
        head_64 = head.to(tl.int64)
        p_query_h = p_query + head_64 * query_stride_h
        p_d_out_h = p_d_out + head_64 * d_out_stride_h
        row = (batch_64 * n_heads + head_64) * pitch + row_q_64
        begin_0, high_0, begin_1, high_1, steps_0, steps_1 = tiles.query_walk(
            near_0,
            far_0,
            near_1,
            far_1,
            first_key,
            last_key,
            start,
            end_query,
            BLOCK_M,
            INTERVALS,
        )

        for step in range(steps_0 + steps_1):
            near, far, first_query, high = tiles.step_at(
                step,
                steps_0,
                near_0,
                far_0,
                begin_0,
                high_0,
                near_1,
                far_1,
                begin_1,
                high_1,
                BLOCK_M,
                INTERVALS,
            )
            o_query = first_query + tl.arange(0, BLOCK_M)  # [M]
            m_query = o_query < high
            if DESCRIPTORS:
                b_query = memory.copy_rows(t_query, batch, head, first_query, BLOCK_M, BLOCK_D)
                b_d_out = memory.copy_rows(t_d_out, batch, head, first_query, BLOCK_M, BLOCK_D)
                row_32 = (batch * n_heads + head) * pitch + first_query
                base = t_base.load([row_32])  # [M]
                delta = t_delta.load([row_32])  # [M]
            else:
                b_query = memory.loat_rows(
                    p_query_h, o_query, query_stride_t, 0, high, HEAD_DIM, BLOCK_D
                )
                b_d_out = memory.loat_rows(
                    p_d_out_h, o_query, d_out_stride_t, 0, high, HEAD_DIM, BLOCK_D
                )
                base = tl.load(p_base + row + o_query, mask=m_query, other=0.0)  # [M]
                delta = tl.load(p_delta + row + o_query, mask=m_query, other=0.0)  # [M]

            # [N, M] = [N, D] @ [D, M], both
            scores = tl.dot(b_key, tl.trans(b_query), input_precision=PRECISION)
            d_weights = tl.dot(b_value, tl.trans(b_d_out), input_precision=PRECISION)
            weights = softmax.weights_of(scores, base[None, :], scale)
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
            # What lies behind the last query is another row's, or nothing.
            if (not inside) | (first_query + BLOCK_M > high):
                o_position = start + o_query  # [M]
                o_start = 0
                if HAS_KEY_START:
                    o_start = tiles.first_key_of(
                        p_key_start, o_query, queries, key_start_stride_t, keys
                    )  # [M]
                o_reach = tiles.reach(o_position, near, far, o_start)  # [M]
                m_seen = tiles.visible(o_position[None, :], o_key[:, None], near, o_reach[None, :])
                weights = tl.where(m_seen & m_query[None, :], weights, 0.0)
            # [N, D] += [N, M] @ [M, D], both
            b_d_value = tl.dot(
                weights.to(b_d_out.dtype), b_d_out, b_d_value, input_precision=PRECISION
            )
            d_scores = weights * (d_weights - delta[None, :])
            b_d_key = tl.dot(
                d_scores.to(b_query.dtype), b_query, b_d_key, input_precision=PRECISION
            )

    memory.store_rows(
        p_d_key,
        b_d_key * (scale * softmax.LN_2),
        o_key,
        d_key_stride_t,
        keys,
        HEAD_DIM,
        BLOCK_D,
    )
    memory.store_rows(p_d_value, b_d_value, o_key, d_value_stride_t, keys, HEAD_DIM, BLOCK_D)
