# mypy: allow-untyped-defs
"""Forward pass: output and log-sum-exp.

One program computes one block of queries of one head. It loops over the blocks of keys that the
head's bands reach from there.

Where queries of a block are of different documents (`key_start`), a value that is not finite would
reach the others through the product of the block. Then the block is computed again, each
document separately.

    B batch   H query heads   Q queries   K keys   D head_dim
    M = BLOCK_M queries of a block   N = BLOCK_N keys of a block
    inside the kernel D is BLOCK_D, zero-filled
    p_ pointer   b_ block   o_ offset   m_ mask
"""

import triton
import triton.language as tl

from .. import arguments, memory, softmax, tiles
from ..arguments import Counts, Keys, PageRow, Rows


@triton.jit
def attend(
    b_query,
    keys,
    blocks,
    bands,
    rows,
    row_max,
    row_sum,
    scale,
    FORM: tl.constexpr,
    STAGES: tl.constexpr = None,
):
    """Sums `[M, D]`, `row_max` and `row_sum` `[M]` of queries over the blocks of a `BlockRange`;
    the last two are given as they are before the first key. `STAGES` blocks are in flight, by
    default as many as the launch says.
    """
    BLOCK_M: tl.constexpr = FORM.BLOCK_M
    BLOCK_N: tl.constexpr = FORM.BLOCK_N
    BLOCK_D: tl.constexpr = FORM.BLOCK_D
    starts = rows.starts
    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for step in tl.range(tiles.total_blocks(blocks), num_stages=STAGES):
        first_key, low, near, far = tiles.block_at(
            step, blocks, bands, BLOCK_N, FORM.INTERVALS, FORM.PREFIX
        )
        o_key = first_key + tl.arange(0, BLOCK_N)  # [N]
        b_key, b_value = load_keys(keys, o_key, low, FORM)

        # [M, N] = [M, D] @ [D, N]
        scores = tl.dot(b_query, tl.trans(b_key), input_precision="ieee")
        last_key = first_key + BLOCK_N - 1
        if not tiles.is_inside(
            rows.first, rows.last, first_key, last_key, near, far, starts.highest + FORM.PREFIX
        ):
            m_seen = arguments.visible(rows, o_key, low, near, far, FORM)
            scores = tl.where(m_seen, scores, float("inf") if FORM.FALLING else float("-inf"))

        p, row_max, row_sum, factor = softmax.update(
            scores, row_max, row_sum, scale, FORM.FALLING, FORM.PRECISE
        )
        # [M, D] += [M, N] @ [N, D]
        b_out = tl.dot(
            p.to(b_value.dtype), b_value, b_out * factor[:, None], input_precision="ieee"
        )
    return b_out, row_max, row_sum


@triton.jit
def load_keys(keys, o_key, low, FORM: tl.constexpr):
    """Keys and values `[N, D]` at `o_key`; zeros before key `low` and after the last one."""
    if FORM.PAGE > 0:
        pages = keys.pages
        m_key = (o_key >= low) & (o_key < keys.n_keys)
        o_page = tl.load(pages.p_numbers + o_key // FORM.PAGE, mask=m_key, other=0).to(tl.int64)
        o_place = o_key % FORM.PAGE
        p_key = keys.p_key + (o_page * pages.stride_key)[:, None]
        p_value = keys.p_value + (o_page * pages.stride_value)[:, None]
        b_key = memory.gather_tokens(p_key, o_place, m_key, keys.stride_key, FORM)
        b_value = memory.gather_tokens(p_value, o_place, m_key, keys.stride_value, FORM)
    else:
        b_key = memory.load_tokens(keys.p_key, o_key, keys.stride_key, low, keys.n_keys, FORM)
        b_value = memory.load_tokens(keys.p_value, o_key, keys.stride_value, low, keys.n_keys, FORM)
    return b_key, b_value


@triton.jit
def normalised(b_out, row_sum, PRECISE: tl.constexpr):
    """`b_out` `[M, D]` over `row_sum` `[M]`."""
    if PRECISE:
        b_out = tl.div_rn(b_out, row_sum[:, None])
    else:
        b_out *= (1.0 / row_sum)[:, None]
    return b_out


@triton.jit
def attend_documents(
    start,
    b_query,
    keys,
    bands,
    rows,
    m_query,
    p_sinks,
    p_out,
    o_query,
    stride,
    scale,
    FORM: tl.constexpr,
):
    """Compute and store the output of each document of a block separately, from the document whose
    first key is `start` on. One block of keys is in flight: this is rare, and needs the registers.
    """
    while start < tiles.MISSING:
        document = arguments.document_at(start, rows, m_query)
        blocks = arguments.key_blocks(document.rows, bands, keys.n_keys, FORM)
        row_max, row_sum = softmax.init(
            p_sinks, bands.head, FORM.BLOCK_M, FORM.HAS_SINKS, FORM.PRECISE
        )
        b_out, row_max, row_sum = attend(
            b_query, keys, blocks, bands, document.rows, row_max, row_sum, scale, FORM, 1
        )
        b_out = normalised(b_out, softmax.finalize(row_max, row_sum, FORM.PRECISE)[1], FORM.PRECISE)
        memory.scatter_tokens(p_out, b_out, o_query, document.m_query, stride, FORM)
        start = document.next


@triton.jit(do_not_specialize=Counts._fields)
def forward_kernel(
    query,
    key,
    value,
    out,
    p_remainder,
    p_lse,
    p_bands,
    p_sinks,
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
    starts = arguments.key_starts(block, o_query, positions, counts, FORM)
    rows = Rows(block.start + o_query, block.first, block.last, starts)
    blocks = arguments.key_blocks(rows, bands, block.n_keys, FORM)
    n_steps = tiles.total_blocks(blocks)

    batch, head = block.batch.to(tl.int64), bands.head.to(tl.int64)
    key_head = (bands.head // counts.group).to(tl.int64)
    offset_q = tl.zeros([], tl.int64) + block.offset_q
    offset_k = tl.zeros([], tl.int64) + block.offset_k
    pages = None
    if FORM.PAGE > 0:
        p_numbers = arguments.page_row(positions, offset_k, counts.n_keys, FORM.PAGE)
        pages = PageRow(p_numbers, key.stride_b, value.stride_b)
        offset_k = offset_k * 0
    p_query = arguments.head_pointer(query, batch, head, offset_q)
    p_key = arguments.head_pointer(key, batch, key_head, offset_k)
    p_value = arguments.head_pointer(value, batch, key_head, offset_k)
    p_out = arguments.head_pointer(out, batch, head, offset_q)
    p_lse += (batch * counts.n_heads + head) * counts.n_queries + offset_q

    # A block that sees no key reads nothing.
    end_query = tl.where(n_steps > 0, block.n_queries, 0)
    b_query = memory.load_tokens(p_query, o_query, query.stride_t, 0, end_query, FORM)
    row_max, row_sum = softmax.init(
        p_sinks, bands.head, BLOCK_M, FORM.HAS_SINKS, FORM.PRECISE
    )  # [M], [M]
    keys = Keys(p_key, key.stride_t, p_value, value.stride_t, block.n_keys, pages)
    b_out, row_max, row_sum = attend(
        b_query, keys, blocks, bands, rows, row_max, row_sum, scale, FORM
    )

    lse, row_sum = softmax.finalize(row_max, row_sum, FORM.PRECISE)
    b_out = normalised(b_out, row_sum, FORM.PRECISE)
    memory.store_tokens(p_out, b_out, o_query, out.stride_t, block.n_queries, FORM)
    if p_remainder is not None:
        # No call whose output is joined has documents in its rows (`attend_documents`).
        tl.static_assert(not FORM.HAS_KEY_START)
        lost = arguments.Heads(p_remainder, out.stride_b, out.stride_h, out.stride_t)
        p_lost = arguments.head_pointer(lost, batch, head, offset_q)
        b_lost = b_out - b_out.to(p_out.dtype.element_ty).to(tl.float32)
        memory.store_tokens(p_lost, b_lost, o_query, lost.stride_t, block.n_queries, FORM)
    tl.store(p_lse + o_query, lse, mask=o_query < block.n_queries)
    if FORM.HAS_KEY_START:
        attend_documents(
            arguments.first_document(starts, b_out),
            b_query,
            keys,
            bands,
            rows,
            o_query < block.n_queries,
            p_sinks,
            p_out,
            o_query,
            out.stride_t,
            scale,
            FORM,
        )
