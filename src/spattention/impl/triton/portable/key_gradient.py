# mypy: allow-untyped-defs
"""dK and dV, with the legend of `query_gradient.py`: the second kernel of the backward pass.

It loops over the queries of a block of keys, for every query head that reads them.
"""

import triton
import triton.language as tl

from .. import arguments, memory, softmax, tiles, varlen
from ..arguments import Counts, Heads, KeyPart, QuerySource


@triton.jit
def sum_key_gradients(
    b_key,
    b_value,
    o_key,
    part,
    queries,
    scale,
    FORM: tl.constexpr,
    WITH_BANDS: tl.constexpr = True,
    STAGES: tl.constexpr = None,
):
    """dK, before its factor, and dV `[N, D]` of a `KeyPart` of a block of keys."""
    BLOCK_M: tl.constexpr = FORM.BLOCK_M
    BLOCK_N: tl.constexpr = FORM.BLOCK_N
    BLOCK_D: tl.constexpr = FORM.BLOCK_D
    start, n_queries = queries.start, queries.n_queries
    first_key, last_key = part.first, part.last
    low_query, end_query = 0, n_queries
    if FORM.HAS_KEY_START:
        # Queries whose first key is after these see nothing of them, nor do queries before them.
        p_start, stride_start = queries.p_start, queries.stride_start
        low_query = first_key - start
        end_query = varlen.first_query_after(p_start, stride_start, n_queries, last_key)
    b_d_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_d_value = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in range(queries.group if FORM.GROUPED else 1):
        bands = tiles.load_bands(queries.p_bands, member)
        head = bands.head.to(tl.int64)
        p_query = queries.query.pointer + head * queries.query.stride_h
        p_d_out = queries.d_out.pointer + head * queries.d_out.stride_h
        stride_query, stride_d_out = queries.query.stride_t, queries.d_out.stride_t
        row = queries.first_row + head * queries.rows_of_head
        blocks = tiles.query_blocks(
            bands, first_key, last_key, start, end_query, BLOCK_M, FORM.INTERVALS
        )
        if FORM.PREFIX > 0:
            blocks = tiles.with_prefix_queries(
                blocks, bands, part.low_query, part.high_query, BLOCK_M, WITH_BANDS
            )

        for step in tl.range(tiles.total_blocks(blocks), num_stages=STAGES):
            first_query, high, near, far = tiles.block_at(
                step, blocks, bands, BLOCK_M, FORM.INTERVALS, FORM.PREFIX
            )
            o_query = first_query + tl.arange(0, BLOCK_M)  # [M]
            m_query = o_query < high
            if FORM.HAS_KEY_START:
                m_query = m_query & (o_query >= low_query)
            b_query = memory.load_tokens(p_query, o_query, stride_query, low_query, high, FORM)
            b_d_out = memory.load_tokens(p_d_out, o_query, stride_d_out, low_query, high, FORM)
            lse_log2 = tl.load(queries.lse_log2 + row + o_query, mask=m_query, other=0.0)
            delta = tl.load(queries.delta + row + o_query, mask=m_query, other=0.0)  # [M]

            # [N, M] = [N, D] @ [D, M], both
            scores = tl.dot(b_key, tl.trans(b_query), input_precision="ieee")
            d_p = tl.dot(b_value, tl.trans(b_d_out), input_precision="ieee")
            p = softmax.recompute(scores, lse_log2[None, :], scale, FORM.PRECISE)
            first = start + first_query
            highest_start = 0
            if FORM.HAS_KEY_START:
                last_query = min(first_query + BLOCK_M, n_queries) - 1
                highest_start = varlen.first_keys(
                    p_start, last_query, n_queries, stride_start, queries.n_keys
                )
            last = first + BLOCK_M - 1
            inside = tiles.is_inside(
                first, last, first_key, last_key, near, far, highest_start + FORM.PREFIX
            )
            # Zeros after the end of the range would get the probability 1.
            if (not inside) | (first_query + BLOCK_M > high):
                o_position = start + o_query  # [M]
                o_start = 0
                if FORM.HAS_KEY_START:
                    o_start = varlen.first_keys(
                        p_start, o_query, n_queries, stride_start, queries.n_keys
                    )  # [M]
                o_last, o_count = tiles.visible_keys(
                    o_position, near, far, o_start, FORM.PREFIX
                )  # [M], [M]
                m_seen = tiles.visible(o_last[None, :], o_key[:, None], 0, o_count[None, :])
                m_seen = m_seen & m_query[None, :]
                p = tl.where(m_seen, p, 0.0)
                # A key that no query sees may hold anything; its gradient is zero.
                d_p = tl.where(m_seen, d_p, 0.0)
            # [N, D] += [N, M] @ [M, D], both
            b_d_value = tl.dot(p.to(b_d_out.dtype), b_d_out, b_d_value, input_precision="ieee")
            d_scores = p * (d_p - delta[None, :])
            b_d_key = tl.dot(d_scores.to(b_query.dtype), b_query, b_d_key, input_precision="ieee")
    return b_d_key, b_d_value


@triton.jit
def key_part(first, last, low_query, high_query, queries, FORM: tl.constexpr):
    """The `KeyPart` of the keys `first .. last`, whose prefix part is of the queries from
    `low_query` to `high_query - 1` at most.
    """
    if FORM.PREFIX > 0:
        low, high = prefix_queries(first, last, queries, FORM)
        low_query, high_query = tl.maximum(low, low_query), tl.minimum(high, high_query)
    return KeyPart(first, last, low_query, high_query)


@triton.jit
def prefix_queries(first_key, last_key, queries, FORM: tl.constexpr):
    """Queries that see some key in `first_key .. last_key` as part of their prefix, `[low, high)`;
    some between them may not.
    """
    n_queries = queries.n_queries
    low = tl.maximum(first_key - queries.start, 0)
    high = n_queries
    if FORM.HAS_KEY_START:
        high = varlen.first_query_after(queries.p_start, queries.stride_start, n_queries, last_key)
        after = varlen.first_query_after(
            queries.p_start, queries.stride_start, n_queries, first_key - FORM.PREFIX
        )
        # First keys below 0 count as 0.
        low = tl.maximum(low, tl.where(first_key < FORM.PREFIX, 0, after))
    else:
        high = tl.where(first_key < FORM.PREFIX, n_queries, 0)
    return low, high


@triton.jit
def store_documents(
    b_key,
    b_value,
    o_key,
    part,
    queries,
    results,
    b_d_key,
    b_d_value,
    scale,
    FORM: tl.constexpr,
    WITH_BANDS: tl.constexpr = True,
):
    """Compute and store dK and dV of each document of a block separately, as in
    `arguments.document_at`, if those of the block are not finite. A document's keys are those from
    one query's first key to another's.
    """
    first_key, last_key = part.first, part.last
    following = document_end(first_key, last_key, queries)
    if following <= last_key:
        finite = arguments.is_finite(b_d_key) & arguments.is_finite(b_d_value)
        first_key = tl.where(finite, last_key + 1, first_key)
        while first_key <= last_key:
            following = document_end(first_key, last_key, queries)
            document = key_part(
                first_key, following - 1, part.low_query, part.high_query, queries, FORM
            )
            b_d_key_alone, b_d_value_alone = sum_key_gradients(
                b_key, b_value, o_key, document, queries, scale, FORM, WITH_BANDS, 1
            )
            b_d_key_alone = b_d_key_alone * softmax.natural(scale, FORM.PRECISE)
            m_key = (o_key >= first_key) & (o_key < following)
            store_gradients(results, b_d_key_alone, b_d_value_alone, o_key, m_key, FORM)
            first_key = following


@triton.jit
def document_end(key, last_key, queries):
    """The key after the document of `key`, at most `last_key + 1`."""
    return varlen.first_key_after(
        queries.p_start, queries.stride_start, queries.n_queries, key, last_key + 1
    )


@triton.jit
def store_gradients(results, b_d_key, b_d_value, o_key, m_key, FORM: tl.constexpr):
    """Store dK and dV of the keys of `m_key` `[N]`."""
    d_key, d_value = results
    memory.scatter_tokens(d_key.pointer, b_d_key, o_key, m_key, d_key.stride_t, FORM)
    memory.scatter_tokens(d_value.pointer, b_d_value, o_key, m_key, d_value.stride_t, FORM)


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

    batch_64, key_head_64 = batch.to(tl.int64), key_head.to(tl.int64)
    offset_q = tl.zeros([], tl.int64) + sequence.offset_q
    offset_k = tl.zeros([], tl.int64) + sequence.offset_k
    p_start = 0
    if FORM.HAS_KEY_START:
        p_start = positions.key_start + batch_64 * counts.key_start_stride_b
    queries = QuerySource(
        arguments.entry_of(query, batch_64, offset_q),
        arguments.entry_of(d_out, batch_64, offset_q),
        stats.lse_log2,
        stats.delta,
        batch_64 * counts.n_heads * counts.n_queries + offset_q,
        counts.n_queries,
        p_bands + 8 * entry,
        counts.group,
        start,
        n_queries,
        n_keys,
        p_start,
        counts.key_start_stride_t,
    )
    p_key = arguments.head_pointer(key, batch_64, key_head_64, offset_k)
    p_value = arguments.head_pointer(value, batch_64, key_head_64, offset_k)
    p_d_key = arguments.head_pointer(d_key, batch_64, key_head_64, offset_k)
    p_d_value = arguments.head_pointer(d_value, batch_64, key_head_64, offset_k)

    b_key = memory.load_tokens(p_key, o_key, key.stride_t, 0, n_keys, FORM)
    b_value = memory.load_tokens(p_value, o_key, value.stride_t, 0, n_keys, FORM)
    # Prefixes that more queries see are split over programs (`prefix_gradient.py`).
    low_query, high_query = 0, 0
    if FORM.PREFIX > 0 and FORM.DOCUMENTS:
        low_query, high_query = prefix_queries(first_key, last_key, queries, FORM)
        high_query = tl.where(high_query - low_query > FORM.CHUNK, 0, high_query)
    part = KeyPart(first_key, last_key, low_query, high_query)
    b_d_key, b_d_value = sum_key_gradients(b_key, b_value, o_key, part, queries, scale, FORM)
    b_d_key = b_d_key * softmax.natural(scale, FORM.PRECISE)
    results = Heads(p_d_key, 0, 0, d_key.stride_t), Heads(p_d_value, 0, 0, d_value.stride_t)
    store_gradients(results, b_d_key, b_d_value, o_key, o_key < n_keys, FORM)
    if FORM.HAS_KEY_START:
        store_documents(
            b_key, b_value, o_key, part, queries, results, b_d_key, b_d_value, scale, FORM
        )
