# mypy: allow-untyped-defs
"""Forward pass: output and log-sum-exp.

One program computes one block of queries of one head: it walks the keys that the head's bands reach
from there.

    B batch   H query heads   Q queries   K keys   D head_dim
    M = BLOCK_M queries of a block   N = BLOCK_N keys of a block
    inside the kernel D is BLOCK_D, zero-filled
    p_ pointer   b_ block   o_ offset   m_ mask
"""

import triton
import triton.language as tl

from .. import memory, softmax, tiles
from ..config import COUNTS


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    p_query,
    p_key,
    p_value,
    p_out,
    p_lse,
    p_bands,
    p_sinks,
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
    HAS_SINKS: tl.constexpr,
    START_ON_DEVICE: tl.constexpr,
    HAS_KEY_START: tl.constexpr,
    FALLING: tl.constexpr,
    PRECISE: tl.constexpr,
):
    # The heads with most work come first, and of each the late blocks, which reach most keys: short
    # programs end the run.
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
    p_lse += (batch_64 * n_heads + head_64) * n_queries + row_q_64

    # A block that sees nothing reads nothing.
    end_query = tl.where(n_steps > 0, queries, 0)
    b_query = memory.load_rows(p_query, o_query, query_stride_t, 0, end_query, HEAD_DIM, BLOCK_D)
    highest, total = softmax.begin(p_sinks, head, BLOCK_M, HAS_SINKS, PRECISE)  # [M], [M]
    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    for step in range(n_steps):
        first_key, low, near, far = tiles.step_at(step, walk, bands, BLOCK_N, INTERVALS)
        o_key = first_key + tl.arange(0, BLOCK_N)  # [N]
        b_key = memory.load_rows(p_key, o_key, key_stride_t, low, keys, HEAD_DIM, BLOCK_D)
        b_value = memory.load_rows(p_value, o_key, value_stride_t, low, keys, HEAD_DIM, BLOCK_D)

        # [M, N] = [M, D] @ [D, N]
        scores = tl.dot(b_query, tl.trans(b_key), input_precision="ieee")
        last_key = first_key + BLOCK_N - 1
        if not tiles.is_inside(first, last, first_key, last_key, near, far, high_start):
            o_reach = tiles.reach(o_position, near, far, o_start)  # [M]
            m_seen = tiles.visible(o_position[:, None], o_key[None, :], near, o_reach[:, None])
            scores = tl.where(m_seen, scores, float("inf") if FALLING else float("-inf"))

        weights, highest, total, factor = softmax.extend(
            scores, highest, total, scale, FALLING, PRECISE
        )
        # [M, D] += [M, N] @ [N, D]
        b_out = tl.dot(
            weights.to(b_value.dtype), b_value, b_out * factor[:, None], input_precision="ieee"
        )

    lse, total = softmax.finish(highest, total, PRECISE)
    if PRECISE:
        b_out = tl.div_rn(b_out, total[:, None])
    else:
        b_out *= (1.0 / total)[:, None]
    memory.store_rows(p_out, b_out, o_query, out_stride_t, queries, HEAD_DIM, BLOCK_D)
    tl.store(p_lse + o_query, lse, mask=o_query < queries)
