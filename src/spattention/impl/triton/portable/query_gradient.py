# mypy: allow-untyped-defs
"""dQ: the first of the two kernels of the backward pass. Each owns what it writes: no atomics, the
same bits on every run.

It loops over the keys of a block of queries, as the forward pass does, and also writes
`delta = rowsum(dO * O) - d_lse`. Both kernels recompute the scores: seven products instead of five.

    B batch   H query heads   Q queries   K keys   D head_dim
    M = BLOCK_M queries of a block   N = BLOCK_N keys of a block
    inside the kernels D is BLOCK_D, zero-filled
    p_ pointer   b_ block   o_ offset   m_ mask   `d_` gradient of
"""

import triton
import triton.language as tl

from .. import arguments, memory, softmax, tiles
from ..arguments import Counts, Keys, Rows


@triton.jit
def sum_query_gradient(
    b_query,
    b_d_out,
    keys,
    blocks,
    bands,
    rows,
    lse_log2,
    delta,
    scale,
    FORM: tl.constexpr,
    STAGES: tl.constexpr = None,
):
    """dQ `[M, D]` of queries over the blocks of a `BlockRange`, before its factor."""
    BLOCK_M: tl.constexpr = FORM.BLOCK_M
    BLOCK_N: tl.constexpr = FORM.BLOCK_N
    BLOCK_D: tl.constexpr = FORM.BLOCK_D
    starts = rows.starts
    b_d_query = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for step in tl.range(tiles.total_blocks(blocks), num_stages=STAGES):
        first_key, low, near, far = tiles.block_at(
            step, blocks, bands, BLOCK_N, FORM.INTERVALS, FORM.PREFIX
        )
        o_key = first_key + tl.arange(0, BLOCK_N)  # [N]
        b_key = memory.load_tokens(keys.p_key, o_key, keys.stride_key, low, keys.n_keys, FORM)
        b_value = memory.load_tokens(keys.p_value, o_key, keys.stride_value, low, keys.n_keys, FORM)

        # [M, N] = [M, D] @ [D, N], both
        scores = tl.dot(b_query, tl.trans(b_key), input_precision="ieee")
        d_p = tl.dot(b_d_out, tl.trans(b_value), input_precision="ieee")
        p = softmax.recompute(scores, lse_log2[:, None], scale, FORM.PRECISE)
        last_key = first_key + BLOCK_N - 1
        if not tiles.is_inside(
            rows.first, rows.last, first_key, last_key, near, far, starts.highest + FORM.PREFIX
        ):
            m_seen = arguments.visible(rows, o_key, low, near, far, FORM)
            p = tl.where(m_seen, p, 0.0)
        d_scores = p * (d_p - delta[:, None])
        # [M, D] += [M, N] @ [N, D]
        b_d_query = tl.dot(d_scores.to(b_key.dtype), b_key, b_d_query, input_precision="ieee")
    return b_d_query


@triton.jit
def query_gradient_of_documents(
    start,
    b_query,
    b_d_out,
    keys,
    bands,
    rows,
    m_query,
    lse_log2,
    delta,
    p_d_query,
    o_query,
    stride,
    scale,
    FORM: tl.constexpr,
):
    """Compute and store dQ of each document of a block separately, from the document whose first
    key is `start` on.
    """
    while start < tiles.MISSING:
        document = arguments.document_at(start, rows, m_query)
        blocks = arguments.key_blocks(document.rows, bands, keys.n_keys, FORM)
        b_d_query = sum_query_gradient(
            b_query, b_d_out, keys, blocks, bands, document.rows, lse_log2, delta, scale, FORM, 1
        ) * softmax.natural(scale, FORM.PRECISE)
        memory.scatter_tokens(p_d_query, b_d_query, o_query, document.m_query, stride, FORM)
        start = document.next


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
    bands = block.bands
    o_query = block.first_query + tl.arange(0, BLOCK_M)  # [M]
    o_position = block.start + o_query  # [M]
    starts = arguments.key_starts(block, o_query, positions, counts, FORM)
    rows = Rows(o_position, block.first, block.last, starts)
    blocks = arguments.key_blocks(rows, bands, block.n_keys, FORM)
    n_steps = tiles.total_blocks(blocks)

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
    m_read = (o_query >= 0) & (o_query < end_query)  # [M]
    if FORM.HAS_KEY_START:
        m_read = m_read & (starts.each <= o_position)  # nor does a query before its first key
    b_query = memory.gather_tokens(p_query, o_query, m_read, query.stride_t, FORM)
    b_d_out = memory.gather_tokens(p_d_out, o_query, m_read, d_out.stride_t, FORM)
    b_out = memory.gather_tokens(p_out, o_query, m_read, out.stride_t, FORM)
    keys = Keys(p_key, key.stride_t, p_value, value.stride_t, block.n_keys)
    delta = tl.sum(b_d_out.to(tl.float32) * b_out.to(tl.float32), 1)  # [M]
    lse = tl.load(stats.lse + o_row, mask=m_query, other=0.0)
    lse_log2 = softmax.to_lse_log2(lse, FORM.PRECISE)  # [M]
    if n_steps <= FORM.EXACT_STEPS:
        # With few keys gradients cancel, and the rounding of the output would show in delta.
        delta = tl.zeros([BLOCK_M], tl.float32)
        for step in range(n_steps):
            first_key, low, near, far = tiles.block_at(
                step, blocks, bands, BLOCK_N, FORM.INTERVALS, FORM.PREFIX
            )
            o_key = first_key + tl.arange(0, BLOCK_N)  # [N]
            b_key = memory.load_tokens(p_key, o_key, key.stride_t, low, block.n_keys, FORM)
            b_value = memory.load_tokens(p_value, o_key, value.stride_t, low, block.n_keys, FORM)
            scores = tl.dot(b_query, tl.trans(b_key), input_precision="ieee")
            d_p = tl.dot(b_d_out, tl.trans(b_value), input_precision="ieee")
            m_seen = arguments.visible(rows, o_key, low, near, far, FORM)
            p = softmax.recompute(scores, lse_log2[:, None], scale, FORM.PRECISE)
            if FORM.HAS_KEY_START:  # a value of another document may hold anything
                d_p = tl.where(m_seen, d_p, 0.0)
            delta += tl.sum(tl.where(m_seen, p, 0.0) * d_p, 1)
    if FORM.HAS_D_LSE:
        delta -= tl.load(stats.d_lse + o_row, mask=m_query, other=0.0)
    tl.store(stats.delta + o_row, delta, mask=m_query)
    tl.store(stats.lse_log2 + o_row, lse_log2, mask=m_query)
    b_d_query = sum_query_gradient(
        b_query, b_d_out, keys, blocks, bands, rows, lse_log2, delta, scale, FORM
    ) * softmax.natural(scale, FORM.PRECISE)
    memory.store_tokens(p_d_query, b_d_query, o_query, d_query.stride_t, block.n_queries, FORM)
    if FORM.HAS_KEY_START:
        query_gradient_of_documents(
            arguments.first_document(starts, b_d_query),
            b_query,
            b_d_out,
            keys,
            bands,
            rows,
            m_query,
            lse_log2,
            delta,
            p_d_query,
            o_query,
            d_query.stride_t,
            scale,
            FORM,
        )
