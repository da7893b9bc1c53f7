# mypy: allow-untyped-defs
"""Sums of a block of rows over keys, with the legend of `kernels.py`: over a chunk of distances or
a part of the prefix, and of each document separately.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .. import memory, softmax, tiles
from .merge import normalised
from .storage import load_at_distances, load_prefix

MAX_INT32 = tl.constexpr((1 << 31) - 1)


class Rows(NamedTuple):
    """The rows of a block, each `[M]`: query head, tokens behind the newest query, position of the
    first key, and distance to it from the newest query.
    """

    head: Any
    behind: Any
    first: Any
    farthest: Any


class Seen(NamedTuple):
    """Distances that the rows of a block see, each `[M]`: tokens behind the newest query, distance
    to the first key from the query itself, and the edges of each interval. The second interval is
    the first for patterns that have one.
    """

    behind: Any
    own: Any
    near: Any
    far: Any
    near_2: Any
    far_2: Any


@triton.jit
def load_seen(p_bands, rows, INTERVALS: tl.constexpr):
    """The `Seen` of rows. It is loaded before the loop over keys, which would wait in each step."""
    p_head = p_bands + 4 * rows.head
    near, far = tl.load(p_head), tl.load(p_head + 1)
    near_2, far_2 = near, far
    if INTERVALS == 2:
        near_2, far_2 = tl.load(p_head + 2), tl.load(p_head + 3)
    return Seen(rows.behind, rows.farthest - rows.behind, near, far, near_2, far_2)


@triton.jit
def visible(seen, o_distance, INTERVALS: tl.constexpr):
    """Mask `[M, N]` of distances `[N]` from the newest query."""
    o_distance, o_behind = o_distance[None, :], seen.behind[:, None]
    count = tiles.visible_count(seen.own, seen.near, seen.far, 0)
    m_seen = tiles.visible(o_distance, o_behind, seen.near[:, None], count[:, None])
    if INTERVALS == 2:
        count = tiles.visible_count(seen.own, seen.near_2, seen.far_2, 0)
        m_seen |= tiles.visible(o_distance, o_behind, seen.near_2[:, None], count[:, None])
    return m_seen


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
    seen = load_seen(p_bands, rows, FORM.INTERVALS)
    for first in tl.range(begin, end, BLOCK_N, num_stages=FORM.STAGES):
        o_distance = first + tl.arange(0, BLOCK_N)  # [N]
        b_key, b_value = load_at_distances(keys, o_distance, end, FORM)
        scores = product(b_query, b_key, FORM.PRECISE)
        scores = softmax.scaled(scores, scale, FORM.PRECISE)
        scores = tl.where(visible(seen, o_distance, FORM.INTERVALS), scores, float("-inf"))
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
    seen = load_seen(p_bands, rows, FORM.INTERVALS)
    for first in tl.range(begin, end, BLOCK_N, num_stages=FORM.STAGES):
        o_distance = first + tl.arange(0, BLOCK_N)  # [N]
        b_key, b_value = load_at_distances(keys, o_distance, end, FORM)
        scores = tl.sum(b_key.to(tl.float32) * b_query, 1)  # [N]
        m_seen = tl.sum(visible(seen, o_distance, FORM.INTERVALS).to(tl.int32), 0) > 0  # [N]
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
    """Compute and store the sums of the places `[begin, end)` of each document's prefix. Rows of
    different documents have nothing in common, so each document is computed separately.

    Here the farthest key of a row is not cut; -1 for no row.
    """
    BLOCK_N: tl.constexpr = FORM.BLOCK_N
    BLOCK_M: tl.constexpr = b_query.shape[0]
    BLOCK_D: tl.constexpr = b_query.shape[1]
    p_head = p_bands + 4 * rows.head
    m_attends = tl.load(p_head) < tl.load(p_head + 1)  # a head without keys has no prefix either
    farthest = tl.max(rows.farthest, 0)
    # Rows that may see no key: no sums are read where lse is -inf.
    tl.store(p_part_lse + o_row, o_row * 0.0 + float("-inf"), mask=m_row)
    while farthest >= 0:
        m_document = m_row & (rows.farthest == farthest) & (rows.farthest >= rows.behind)
        nearest = tl.min(tl.where(m_document, rows.behind, MAX_INT32), 0)
        start = tl.max(tl.where(m_document, rows.first, 0), 0)
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for first in range(begin, end, BLOCK_N):
            o_place = first + tl.arange(0, BLOCK_N)  # [N]
            o_distance = farthest - o_place
            # No token after the last query of the document.
            m_key = (o_place < end) & (o_distance >= nearest)
            b_key, b_value, m_key = load_prefix(keys, o_place, o_distance, start, m_key, FORM)
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
