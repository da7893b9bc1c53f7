# mypy: allow-untyped-defs
"""Sums of a block of rows over keys, with the legend of `kernels.py`: over a chunk of distances or
a part of the prefix, and of each document separately.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .. import memory, softmax, tiles

MAX_INT32 = tl.constexpr((1 << 31) - 1)


class KeyHead(NamedTuple):
    """The keys and values of one head: pointers, strides, the token of the newest query, and the
    length of a ring.
    """

    p_key: Any
    key_stride: Any
    p_value: Any
    value_stride: Any
    newest: Any
    length: Any


class Rows(NamedTuple):
    """The rows of a block, each `[M]`: query head, tokens behind the newest query, and distance
    from the newest query to the first key.
    """

    head: Any
    behind: Any
    farthest: Any


@triton.jit
def visible(p_bands, o_head, o_distance, o_behind, o_farthest, INTERVALS: tl.constexpr):
    """Mask of distances from the newest query, for queries that are `o_behind` it; arguments
    broadcast.
    """
    p_head = p_bands + 4 * o_head
    o_own = o_farthest - o_behind  # the farthest key, from the query itself
    near, far = tl.load(p_head), tl.load(p_head + 1)
    m_seen = tiles.visible(o_distance, o_behind, near, tiles.visible_count(o_own, near, far, 0))
    if INTERVALS == 2:
        near, far = tl.load(p_head + 2), tl.load(p_head + 3)
        m_seen |= tiles.visible(
            o_distance, o_behind, near, tiles.visible_count(o_own, near, far, 0)
        )
    return m_seen


@triton.jit
def load_keys(keys, o_distance, end, FORM: tl.constexpr):
    """Keys and values `[N, D]` at these distances; zeros from distance `end` on."""
    o_token = keys.newest - o_distance
    if FORM.RINGS:
        o_token = tl.where(o_token < 0, o_token + keys.length, o_token)
    m_key = o_distance < end
    b_key = memory.gather_tokens(keys.p_key, o_token, m_key, keys.key_stride, FORM)
    b_value = memory.gather_tokens(keys.p_value, o_token, m_key, keys.value_stride, FORM)
    return b_key, b_value


@triton.jit
def product(b_query, b_key, PRECISE: tl.constexpr):
    """Scores `[M, N]` of `[M, D]` and `[N, D]`. If `PRECISE`, even and odd dimensions are summed
    separately: with one chain of sums the last bits of a score would be worse than a library's.
    """
    if PRECISE and b_query.shape[1] >= 32:
        b_even, b_odd = tl.split(b_query.reshape(b_query.shape[0], b_query.shape[1] // 2, 2))
        k_even, k_odd = tl.split(b_key.reshape(b_key.shape[0], b_key.shape[1] // 2, 2))
        # [M, N] = [M, D / 2] @ [D / 2, N]
        scores = tl.dot(b_even, tl.trans(k_even), input_precision="ieee")
        return scores + tl.dot(b_odd, tl.trans(k_odd), input_precision="ieee")
    else:
        # [M, N] = [M, D] @ [D, N]
        return tl.dot(b_query, tl.trans(b_key), input_precision="ieee")


@triton.jit
def attend_rows(
    b_query,
    keys,
    p_bands,
    rows,
    begin,
    end,
    scale,
    FORM: tl.constexpr,
):
    """Attend distances `[begin, end)` with matrix products: sums `[M, D]`, `row_max` and `row_sum`
    `[M]`.
    """
    BLOCK_N: tl.constexpr = FORM.BLOCK_N
    BLOCK_M: tl.constexpr = b_query.shape[0]
    BLOCK_D: tl.constexpr = b_query.shape[1]
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in tl.range(begin, end, BLOCK_N, num_stages=FORM.STAGES):
        o_distance = first + tl.arange(0, BLOCK_N)  # [N]
        b_key, b_value = load_keys(keys, o_distance, end, FORM)
        scores = product(b_query, b_key, FORM.PRECISE)
        scores = softmax.scaled(scores, scale, FORM.PRECISE)
        m_seen = visible(
            p_bands,
            rows.head[:, None],
            o_distance[None, :],
            rows.behind[:, None],
            rows.farthest[:, None],
            FORM.INTERVALS,
        )
        scores = tl.where(m_seen, scores, float("-inf"))
        p, row_max, row_sum, factor = softmax.update(
            scores, row_max, row_sum, 1.0, False, FORM.PRECISE
        )
        # [M, D] += [M, N] @ [N, D]
        b_out = tl.dot(
            p.to(b_value.dtype), b_value, b_out * factor[:, None], input_precision="ieee"
        )
    return b_out, row_max, row_sum


@triton.jit
def attend_row(
    b_query,
    keys,
    p_bands,
    rows,
    begin,
    end,
    scale,
    FORM: tl.constexpr,
):
    """Attend distances `[begin, end)` for one row (M = 1) with sums in registers. All other rows of
    a matrix product would be empty.

    Every key of a block has a separate softmax until the end, so that only the scores' sum over D
    passes between threads.
    """
    BLOCK_N: tl.constexpr = FORM.BLOCK_N
    BLOCK_D: tl.constexpr = b_query.shape[1]
    b_query = b_query.to(tl.float32) * scale  # [1, D]
    row_max = tl.full([BLOCK_N], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_N], tl.float32)
    b_out = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in tl.range(begin, end, BLOCK_N, num_stages=FORM.STAGES):
        o_distance = first + tl.arange(0, BLOCK_N)  # [N]
        b_key, b_value = load_keys(keys, o_distance, end, FORM)
        scores = tl.sum(b_key.to(tl.float32) * b_query, 1)  # [N]
        m_seen = visible(p_bands, rows.head, o_distance, rows.behind, rows.farthest, FORM.INTERVALS)
        scores = tl.where(m_seen, scores, float("-inf"))
        p, row_max, row_sum, factor = softmax.update(
            scores[:, None], row_max, row_sum, 1.0, False, FORM.PRECISE
        )
        b_out = b_out * factor[:, None] + p * b_value.to(tl.float32)
    top = tl.max(row_max, 0, keep_dims=True)  # [1]
    share = softmax.exponential(row_max - tl.where(top == float("-inf"), 0.0, top), FORM.PRECISE)
    row_sum = tl.sum(row_sum * share, 0, keep_dims=True)
    return tl.sum(b_out * share[:, None], 0, keep_dims=True), top, row_sum


@triton.jit
def load_rows(query, batch, o_head, o_query, m_row, FORM: tl.constexpr):
    """Queries `[M, D]` of rows; zeros where `m_row` `[M]` is false."""
    o_dim = tl.arange(0, FORM.BLOCK_D)
    p_rows = (
        query.pointer
        + batch * query.stride_b
        + o_head.to(tl.int64)[:, None] * query.stride_h
        + o_query.to(tl.int64)[:, None] * query.stride_t
    )
    return tl.load(
        p_rows + o_dim[None, :], mask=m_row[:, None] & (o_dim < FORM.HEAD_DIM)[None, :], other=0.0
    )


@triton.jit
def attend_prefix(
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
    FORM: tl.constexpr,
):
    """Compute and store the sums of the places `[begin, end)` of each document's prefix; `n_keys`
    is the length of `KeyHead`. Rows of different documents have nothing in common, so each
    document is computed separately.

    Here the farthest key of a row is not cut; -1 for no row.
    """
    BLOCK_N: tl.constexpr = FORM.BLOCK_N
    BLOCK_M: tl.constexpr = b_query.shape[0]
    BLOCK_D: tl.constexpr = b_query.shape[1]
    p_head = p_bands + 4 * rows.head
    m_attends = tl.load(p_head) < tl.load(p_head + 1)  # a head without keys has no prefix either
    farthest = tl.max(rows.farthest, 0)
    # Rows that may see no key: `combine_kernel` reads no sums where lse is -inf.
    tl.store(p_part_lse + o_row, o_row * 0.0 + float("-inf"), mask=m_row)
    while farthest >= 0:
        m_document = m_row & (rows.farthest == farthest) & (rows.farthest >= rows.behind)
        nearest = tl.min(tl.where(m_document, rows.behind, MAX_INT32), 0)
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for first in range(begin, end, BLOCK_N):
            o_place = first + tl.arange(0, BLOCK_N)  # [N]
            o_distance = farthest - o_place
            # No token after the last query of the document, nor after the last that is stored.
            m_key = (o_place < end) & (o_distance >= nearest)
            o_token = keys.newest - o_distance
            m_key = m_key & (o_token < keys.length)
            b_key = memory.gather_tokens(keys.p_key, o_token, m_key, keys.key_stride, FORM)
            b_value = memory.gather_tokens(keys.p_value, o_token, m_key, keys.value_stride, FORM)
            if BLOCK_M == 1:
                scores = tl.sum(b_key.to(tl.float32) * b_query.to(tl.float32), 1)[None, :]
            else:
                scores = product(b_query, b_key, FORM.PRECISE)
            scores = softmax.scaled(scores, scale, FORM.PRECISE)
            m_seen = m_key[None, :] & m_attends[:, None]
            m_seen = m_seen & (o_distance[None, :] >= rows.behind[:, None])
            scores = tl.where(m_seen, scores, float("-inf"))
            p, row_max, row_sum, factor = softmax.update(
                scores, row_max, row_sum, 1.0, False, FORM.PRECISE
            )
            b_out = b_out * factor[:, None]
            if BLOCK_M == 1:
                b_out += tl.sum(tl.trans(p) * b_value.to(tl.float32), 0, keep_dims=True)
            else:
                b_out = tl.dot(p.to(b_value.dtype), b_value, b_out, input_precision="ieee")
        lse, row_sum = softmax.finalize(row_max, row_sum, FORM.PRECISE)
        b_out = normalised(b_out, row_sum, FORM.PRECISE)
        memory.scatter_tokens(p_part, b_out, o_row, m_document, FORM.HEAD_DIM, FORM)
        tl.store(p_part_lse + o_row, lse, mask=m_document)
        farthest = tl.max(tl.where(rows.farthest < farthest, rows.farthest, -1), 0)


@triton.jit
def attend_documents(
    b_query, keys, p_bands, rows, begin, farthest, p_part, o_row, scale, FORM: tl.constexpr
):
    """Compute and store the sums of each document of a block of rows separately, as in
    `arguments.document_at`, from the document on whose first key is at distance `farthest`.
    """
    while farthest >= begin:
        m_row = rows.farthest == farthest
        nearest = tl.maximum(tl.min(tl.where(m_row, rows.behind, MAX_INT32), 0), begin)
        b_out, row_max, row_sum = attend_rows(
            b_query, keys, p_bands, rows, nearest, farthest + 1, scale, FORM
        )
        row_sum = softmax.finalize(row_max, row_sum, FORM.PRECISE)[1]
        b_out = normalised(b_out, row_sum, FORM.PRECISE)
        memory.scatter_tokens(p_part, b_out, o_row, m_row, FORM.HEAD_DIM, FORM)
        farthest = tl.max(tl.where(rows.farthest < farthest, rows.farthest, -1), 0)


@triton.jit
def normalised(b_out, row_sum, PRECISE: tl.constexpr):
    """`b_out` `[M, D]` over `row_sum` `[M]`."""
    if PRECISE:
        b_out = tl.div_rn(b_out, row_sum[:, None] + tl.zeros_like(b_out))
    else:
        b_out *= (1.0 / row_sum)[:, None]
    return b_out
