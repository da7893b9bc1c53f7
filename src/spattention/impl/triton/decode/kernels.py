# mypy: allow-untyped-defs
"""Few queries against many keys: decoding.

One program computes all queries that share a key/value head (a group of query heads, times up to 16
tokens) over one chunk of that head's keys, so that every key is read once, and one long band keeps
the whole GPU busy. `join_kernel` then puts the chunks of each head together.

Everything is counted in distances from the newest query: the key at position j is at distance
`newest - j`, and a query that is `behind` the newest by some tokens sees `behind + near <= distance
< behind + far`. Chunks of distances stay the same, however long the text becomes: they are a table
(`decode_launch.Plan`), and what depends on positions is found on the device.

Keys lie in one of two ways:

    dense     the key at position p is row p of its head
    rings     a `BandStore`: it is row `offset + p % length`

    B batch   H query heads   Q queries   D head_dim (inside a kernel BLOCK_D, zero-filled)
    R rows: the queries of a group, `group * Q`, head by head
    M = BLOCK_M rows of a block   N = BLOCK_N keys of a block   P = BLOCK_P chunks of a block
    p_ pointer   b_ block   o_ offset   m_ mask
"""

import triton
import triton.language as tl

from .. import memory, softmax, tiles
from ..config import DECODE_COUNTS

LARGEST = tl.constexpr((1 << 31) - 1)


@triton.jit
def newest_query(
    p_start,
    start_stride,
    query_start,
    batch,
    n_queries,
    RINGS: tl.constexpr,
    START_ON_DEVICE: tl.constexpr,
):
    """Position of a row's last query. In a store that is its last token: int64, -1 before the
    first.
    """
    if RINGS:
        newest = tl.load(p_start + batch * start_stride) - 1
    else:
        start = query_start
        if START_ON_DEVICE:
            start = tl.load(p_start + batch * start_stride)
        newest = tl.minimum(tl.maximum(start, 0), tiles.MAX_POSITION) + n_queries - 1
    return newest


@triton.jit
def farthest_keys(
    p_key_start,
    key_start_stride,
    o_query,
    newest,
    n_queries,
    n_keys,
    RINGS: tl.constexpr,
    HAS_KEY_START: tl.constexpr,
):
    """Distance from the newest query to the first key that queries may see, int32 like
    `o_query`.
    """
    o_first = o_query * 0
    if HAS_KEY_START:
        last = LARGEST if RINGS else n_keys
        o_first = tiles.first_key_of(p_key_start, o_query, n_queries, key_start_stride, last)
    return tl.minimum(newest - o_first, n_queries + tiles.MAX_POSITION).to(tl.int32)


@triton.jit
def visible(p_bands, o_head, o_distance, o_behind, o_farthest, INTERVALS: tl.constexpr):
    """Mask of distances from the newest query for queries that are `o_behind` it; arguments
    broadcast.
    """
    p_head = p_bands + 4 * o_head
    o_own = o_farthest - o_behind  # the farthest key, from the query itself
    near, far = tl.load(p_head), tl.load(p_head + 1)
    m_seen = tiles.visible(o_distance, o_behind, near, tiles.reach(o_own, near, far, 0))
    if INTERVALS == 2:
        near, far = tl.load(p_head + 2), tl.load(p_head + 3)
        m_seen |= tiles.visible(o_distance, o_behind, near, tiles.reach(o_own, near, far, 0))
    return m_seen


@triton.jit
def load_keys(
    keys, o_distance, end, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, RINGS: tl.constexpr
):
    """Keys and values `[N, D]` at these distances; zeros from distance `end` on."""
    p_key, key_stride, p_value, value_stride, newest, length = keys
    o_row = newest - o_distance
    if RINGS:
        o_row = tl.where(o_row < 0, o_row + length, o_row)
    m_key = o_distance < end
    b_key = memory.gather_rows(p_key, o_row, m_key, key_stride, HEAD_DIM, BLOCK_D)
    b_value = memory.gather_rows(p_value, o_row, m_key, value_stride, HEAD_DIM, BLOCK_D)
    return b_key, b_value


@triton.jit
def product(b_query, b_key, PRECISE: tl.constexpr):
    """Scores `[M, N]` of `[M, D]` and `[N, D]`. If `PRECISE`, even and odd dimensions are summed
    apart: with one chain of sums the last bits of a score would be worse than a library's.
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
    o_head,
    o_behind,
    o_farthest,
    begin,
    end,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    INTERVALS: tl.constexpr,
    RINGS: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """Rows `[M]` over distances `[begin, end)` with matrix products: sums `[M, D]`, and running
    maximum and sum `[M]`.
    """
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        o_distance = first + tl.arange(0, BLOCK_N)  # [N]
        b_key, b_value = load_keys(keys, o_distance, end, HEAD_DIM, BLOCK_D, RINGS)
        scores = product(b_query, b_key, PRECISE)
        scores = softmax.scaled(scores, scale, PRECISE)
        m_seen = visible(
            p_bands,
            o_head[:, None],
            o_distance[None, :],
            o_behind[:, None],
            o_farthest[:, None],
            INTERVALS,
        )
        scores = tl.where(m_seen, scores, float("-inf"))
        weights, highest, total, factor = softmax.extend(
            scores, highest, total, 1.0, False, PRECISE
        )
        # [M, D] += [M, N] @ [N, D]
        b_out = tl.dot(
            weights.to(b_value.dtype), b_value, b_out * factor[:, None], input_precision="ieee"
        )
    return b_out, highest, total


@triton.jit
def attend_row(
    b_query,
    keys,
    p_bands,
    o_head,
    o_behind,
    o_farthest,
    begin,
    end,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    INTERVALS: tl.constexpr,
    RINGS: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """The same for one row (M = 1) with sums in registers, where a matrix product would be empty
    but for one row.

    Every place in a block of keys has a softmax of its own until the end, so that nothing but the
    scores' sum over D is passed between threads.
    """
    b_query = b_query.to(tl.float32) * scale  # [1, D]
    highest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    b_out = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        o_distance = first + tl.arange(0, BLOCK_N)  # [N]
        b_key, b_value = load_keys(keys, o_distance, end, HEAD_DIM, BLOCK_D, RINGS)
        scores = tl.sum(b_key.to(tl.float32) * b_query, 1)  # [N]
        m_seen = visible(p_bands, o_head, o_distance, o_behind, o_farthest, INTERVALS)
        scores = tl.where(m_seen, scores, float("-inf"))
        weights, highest, total, factor = softmax.extend(
            scores[:, None], highest, total, 1.0, False, PRECISE
        )
        b_out = b_out * factor[:, None] + weights * b_value.to(tl.float32)
    top = tl.max(highest, 0, keep_dims=True)  # [1]
    share = softmax.power(highest - tl.where(top == float("-inf"), 0.0, top), PRECISE)
    total = tl.sum(total * share, 0, keep_dims=True)
    return tl.sum(b_out * share[:, None], 0, keep_dims=True), top, total


@triton.jit(do_not_specialize=DECODE_COUNTS)
def chunk_kernel(
    p_query,
    p_key,
    p_value,
    p_part,
    p_part_lse,
    p_chunks,
    p_bands,
    p_start,
    p_key_start,
    p_offsets,
    p_lengths,
    query_stride_b,
    query_stride_h,
    query_stride_t,
    key_stride_b,
    key_stride_h,
    key_stride_t,
    value_stride_b,
    value_stride_h,
    value_stride_t,
    query_start_stride,
    key_start_stride_b,
    key_start_stride_t,
    n_chunks,
    n_blocks,
    group,
    n_queries,
    n_keys,
    query_start,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    INTERVALS: tl.constexpr,
    RINGS: tl.constexpr,
    START_ON_DEVICE: tl.constexpr,
    HAS_KEY_START: tl.constexpr,
    PRECISE: tl.constexpr,
):
    program = tl.program_id(0)
    chunk = program % n_chunks
    block = (program // n_chunks) % n_blocks
    batch = (program // n_chunks // n_blocks).to(tl.int64)
    p_chunk = p_chunks + 4 * chunk
    key_head, begin, end = tl.load(p_chunk), tl.load(p_chunk + 1), tl.load(p_chunk + 2)
    key_head_64 = key_head.to(tl.int64)
    newest = newest_query(
        p_start, query_start_stride, query_start, batch, n_queries, RINGS, START_ON_DEVICE
    )

    n_rows = group * n_queries
    o_row = block * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    m_row = o_row < n_rows
    o_query = o_row % n_queries
    o_head = key_head * group + tl.where(m_row, o_row // n_queries, 0)
    o_behind = n_queries - 1 - o_query
    p_key_start = p_key_start + batch * key_start_stride_b if HAS_KEY_START else p_key_start
    o_farthest = farthest_keys(
        p_key_start, key_start_stride_t, o_query, newest, n_queries, n_keys, RINGS, HAS_KEY_START
    )
    o_farthest = tl.minimum(tl.where(m_row, o_farthest, -1), end - 1)

    end = tl.max(o_farthest, 0) + 1
    length = 0
    if RINGS:
        length = tl.load(p_lengths + key_head)
        newest = (tl.maximum(newest, 0) % length).to(tl.int32)
        length = length.to(tl.int32)
        row = tl.load(p_offsets + key_head)
        p_key += batch * key_stride_b + row * key_stride_t
        p_value += batch * value_stride_b + row * value_stride_t
    else:
        begin = tl.maximum(begin, newest - n_keys + 1)
        p_key += batch * key_stride_b + key_head_64 * key_stride_h
        p_value += batch * value_stride_b + key_head_64 * value_stride_h
    keys = (p_key, key_stride_t, p_value, value_stride_t, newest, length)

    place = (batch * n_chunks + chunk) * n_rows
    p_part += place * HEAD_DIM
    p_part_lse += place
    if begin >= end:  # all before the text: `join_kernel` reads no sums where lse is -inf
        tl.store(p_part_lse + o_row, o_row * 0.0 + float("-inf"), mask=m_row)
        return

    o_dim = tl.arange(0, BLOCK_D)
    p_rows = (
        p_query
        + batch * query_stride_b
        + o_head.to(tl.int64)[:, None] * query_stride_h
        + o_query.to(tl.int64)[:, None] * query_stride_t
    )
    b_query = tl.load(
        p_rows + o_dim[None, :], mask=m_row[:, None] & (o_dim < HEAD_DIM)[None, :], other=0.0
    )
    if BLOCK_M == 1:
        b_out, highest, total = attend_row(
            b_query,
            keys,
            p_bands,
            o_head,
            o_behind,
            o_farthest,
            begin,
            end,
            scale,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_N,
            STAGES,
            INTERVALS,
            RINGS,
            PRECISE,
        )
    else:
        b_out, highest, total = attend_rows(
            b_query,
            keys,
            p_bands,
            o_head,
            o_behind,
            o_farthest,
            begin,
            end,
            scale,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_M,
            BLOCK_N,
            STAGES,
            INTERVALS,
            RINGS,
            PRECISE,
        )
    lse, total = softmax.finish(highest, total, PRECISE)
    b_out = normalised(b_out, total, PRECISE)
    memory.store_rows(p_part, b_out, o_row, HEAD_DIM, n_rows, HEAD_DIM, BLOCK_D)
    tl.store(p_part_lse + o_row, lse, mask=m_row)


@triton.jit
def normalised(b_out, total, PRECISE: tl.constexpr):
    """`b_out` `[M, D]` over `total` `[M]`."""
    if PRECISE:
        b_out = tl.div_rn(b_out, total[:, None] + tl.zeros_like(b_out))
    else:
        b_out *= (1.0 / total)[:, None]
    return b_out


@triton.jit(do_not_specialize=DECODE_COUNTS)
def join_kernel(
    p_part,
    p_part_lse,
    p_out,
    p_lse,
    p_sinks,
    p_ranges,
    out_stride_b,
    out_stride_h,
    out_stride_t,
    n_chunks,
    n_heads,
    group,
    n_queries,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """One query of one head: its chunks by their log-sum-exps, and the head's sink, once.

    `ranges [Hkv + 1]` says where the chunks of each key/value head begin.
    """
    program = tl.program_id(0)
    query = program % n_queries
    head = (program // n_queries) % n_heads
    batch = (program // n_queries // n_heads).to(tl.int64)
    key_head = head // group
    first, last = tl.load(p_ranges + key_head), tl.load(p_ranges + key_head + 1)
    n_rows = group * n_queries
    row = (head % group) * n_queries + query
    place = batch * n_chunks * n_rows + row
    unit = 1.0 if PRECISE else softmax.LOG2_E

    highest, total = softmax.begin(p_sinks, head, 1, HAS_SINKS, PRECISE)  # [1], [1]
    b_out = tl.zeros([1, BLOCK_D], tl.float32)
    for chunk in range(first, last, BLOCK_P):
        o_chunk = chunk + tl.arange(0, BLOCK_P)  # [P]
        p_lses = p_part_lse + place + o_chunk.to(tl.int64) * n_rows
        lses = tl.load(p_lses, mask=o_chunk < last, other=float("-inf"))
        b_part = memory.gather_rows(
            p_part + place * HEAD_DIM,
            o_chunk,
            lses > float("-inf"),
            n_rows * HEAD_DIM,
            HEAD_DIM,
            BLOCK_D,
        )  # [P, D]
        weights, highest, total, factor = softmax.extend(
            lses[None, :], highest, total, unit, False, PRECISE
        )
        weights = tl.sum(weights, 0)  # [1, P] to [P]
        b_out = b_out * factor[:, None] + tl.sum(weights[:, None] * b_part, 0, keep_dims=True)

    lse, total = softmax.finish(highest, total, PRECISE)
    o_query = query + tl.arange(0, 1)
    head_64 = head.to(tl.int64)
    p_out += batch * out_stride_b + head_64 * out_stride_h
    memory.store_rows(
        p_out,
        normalised(b_out, total, PRECISE),
        o_query,
        out_stride_t,
        n_queries,
        HEAD_DIM,
        BLOCK_D,
    )
    tl.store(p_lse + (batch * n_heads + head_64) * n_queries + o_query, lse)
