# mypy: allow-untyped-defs
"""Forward pass on Hopper, with the legend of `pipeline.py`.

While the tensor cores multiply one block of values, the softmax of the next block's scores is
computed.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .. import arguments as portable_arguments
from .. import scheduler, softmax, tiles
from . import arguments, memory, pages, pipeline, prefix


class KeySource(NamedTuple):
    """Descriptors of keys and values, and where those of a program are: batch entry, head, and
    first token of the sequence, or its `Pages`.
    """

    key: Any
    value: Any
    batch: Any
    head: Any
    offset: Any
    pages: Any


class Buffers(NamedTuple):
    """Queries, a buffer of keys and two of values in shared memory, and the barriers of the last
    two's copies.
    """

    query: Any
    key: Any
    value_pair: Any
    key_full: Any
    value_full: Any


@gluon.jit
def mask_scores(
    scores,
    tile,
    o_position,
    key_block,
    LAYOUT: gl.constexpr,
    FORM: gl.constexpr,
):
    """Scores `[M, N]`, with -inf (+inf if `scale < 0`) for the keys that a query does not see."""
    BLOCK_N: gl.constexpr = FORM.BLOCK_N
    first_key, near, far = key_block.start, key_block.near, key_block.far
    last_key = first_key + BLOCK_N - 1
    if not tiles.is_inside(tile.first, tile.last, first_key, last_key, near, far, FORM.PREFIX):
        o_key = first_key + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
        m_seen = arguments.visible(o_position[:, None], o_key[None, :], near, far, FORM.PREFIX)
        scores = gl.where(m_seen, scores, float("inf") if FORM.FALLING else float("-inf"))
    return scores


@gluon.jit
def zero_unseen_values(tile, key_block, n, s_values, value_full, FORM: gl.constexpr):
    """Zero the values in block `n` of the ring that no query of the sequence sees."""
    low, high = arguments.seen_keys(tile, key_block, FORM)
    if (key_block.start < low) | (key_block.start + s_values.shape[1] > high):
        pipeline.consumer_wait(value_full, n)
        memory.zero_outside(s_values.index(n % 2), key_block.start, low, high)


@gluon.jit
def init_softmax(p_sinks, head, ROWS: gl.constexpr, LAYOUT: gl.constexpr, HAS_SINKS: gl.constexpr):
    """`softmax.init` with a layout."""
    row_max = gl.full([ROWS], float("-inf"), gl.float32, LAYOUT)
    row_sum = gl.full([ROWS], 0.0, gl.float32, LAYOUT)
    if HAS_SINKS:
        sink = gl.load(p_sinks + head).to(gl.float32) * softmax.LOG2_E
        row_max = gl.full([ROWS], 0.0, gl.float32, LAYOUT) + sink
        row_sum += gl.where(sink == float("-inf"), 0.0, 1.0)
    return row_max, row_sum


@gluon.jit
def pages_of(source, start, FORM: gl.constexpr):
    """The pages of a block of keys from key `start` of the sequence on, which `copy_key` and
    `copy_value` take; none unless the keys are in a paged cache.
    """
    if FORM.PAGE > 0:
        BOX: gl.constexpr = arguments.box_tokens(FORM)
        found = pages.numbers(source.pages, start, BOX, FORM.BLOCK_N, FORM.PAGE)
    else:
        found = ()
    return found


@gluon.jit
def copy_block(t_tensor, source, found, start, barrier, s_tokens, pred, FORM: gl.constexpr):
    """Start to copy a block of keys or values, from key `start` of the sequence on."""
    if FORM.PAGE > 0:
        BOX: gl.constexpr = arguments.box_tokens(FORM)
        pages.copy(t_tensor, found, source.head, start, barrier, s_tokens, pred, BOX, FORM.PAGE)
    else:
        start += source.offset
        pipeline.copy_tokens(t_tensor, source.batch, source.head, start, barrier, s_tokens, pred)


@gluon.jit
def copy_key(source, buffers, n, found, start, pred, FORM: gl.constexpr):
    """Start to copy block `n` of keys, from key `start` of the sequence on; `found` are its
    `pages_of`.
    """
    s_key = buffers.key
    barrier = pipeline.expect_tx(buffers.key_full, n, s_key.shape[0] * s_key.shape[1] * 2, pred)
    copy_block(source.key, source, found, start, barrier, s_key, pred, FORM)


@gluon.jit
def copy_value(source, buffers, n, found, start, FORM: gl.constexpr):
    """Start to copy block `n` of values, like `copy_key`."""
    s_value = buffers.value_pair.index(n % 2)
    BYTES: gl.constexpr = s_value.shape[0] * s_value.shape[1] * 2
    barrier = pipeline.expect_tx(buffers.value_full, n, BYTES, True)
    copy_block(source.value, source, found, start, barrier, s_value, True, FORM)


@gluon.jit
def block_of_step(step, tile, n_steps, FORM: gl.constexpr):
    """The `Block` of keys of a step. A narrow prefix comes last: its keys and values arrive while
    others are multiplied.
    """
    if prefix.is_narrow(FORM):
        step = gl.where(step + 1 < n_steps, step + 1, 0)
    return tiles.block_at(step, tile.keys, tile.bands, FORM.BLOCK_N, FORM.INTERVALS, FORM.PREFIX)


@gluon.jit
def attend_blocks(
    source, buffers, tile, o_position, b_out, row_max, row_sum, scale, FORM: gl.constexpr
):
    """`b_out`, `row_max` and `row_sum` after all keys; not for a narrow prefix alone. The first
    blocks of keys and values are on their way.
    """
    BLOCK_N: gl.constexpr = FORM.BLOCK_N
    BOUNDED: gl.constexpr = arguments.is_bounded(FORM)
    NARROW: gl.constexpr = prefix.is_narrow(FORM)
    DTYPE: gl.constexpr = source.key.dtype
    # [M, N] scores, [M, D] output, and the former as the left operand of a product
    SCORES: gl.constexpr = o_position.type.layout.parent
    OUT: gl.constexpr = b_out.type.layout
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    s_query, s_key, s_values = buffers.query, buffers.key, buffers.value_pair
    key_full, value_full = buffers.key_full, buffers.value_full
    n_steps = tiles.total_blocks(tile.keys)
    key_block = block_of_step(0, tile, n_steps, FORM)
    next_key = block_of_step(1, tile, n_steps, FORM).start
    found = pages_of(source, next_key, FORM)
    zeros = gl.full([s_query.shape[0], BLOCK_N], 0.0, gl.float32, SCORES)
    pipeline.consumer_wait(key_full, 0)
    # [M, N] = [M, D] @ [D, N]
    scores = warpgroup_mma(s_query, s_key.permute((1, 0)), zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, [scores])
    copy_key(source, buffers, 1, found, next_key, n_steps > 1, FORM)
    scores = mask_scores(scores, tile, o_position, key_block, SCORES, FORM)
    p, row_max, row_sum, factor = softmax.update(scores, row_max, row_sum, scale, FORM.FALLING)
    b_p = gl.convert_layout(p.to(DTYPE), OPERAND)

    for step in range(1, n_steps - 1 if NARROW else n_steps):
        # All products of the step before are done.
        if BOUNDED:
            zero_unseen_values(tile, key_block, step - 1, s_values, value_full, FORM)
        key_block = block_of_step(step, tile, n_steps, FORM)
        next_key = block_of_step(step + 1, tile, n_steps, FORM).start
        copy_value(source, buffers, step, found, key_block.start, FORM)
        found = pages_of(source, next_key, FORM)
        pipeline.consumer_wait(key_full, step)
        # [M, N] = [M, D] @ [D, N]
        scores = warpgroup_mma(s_query, s_key.permute((1, 0)), zeros, use_acc=False, is_async=True)
        pipeline.consumer_wait(value_full, step - 1)
        # [M, D] += [M, N] @ [N, D]
        b_out = warpgroup_mma(b_p, s_values.index((step - 1) % 2), b_out, is_async=True)
        scores = warpgroup_mma_wait(1, [scores])
        copy_key(source, buffers, step + 1, found, next_key, step + 1 < n_steps, FORM)
        scores = mask_scores(scores, tile, o_position, key_block, SCORES, FORM)
        p, row_max, row_sum, factor = softmax.update(scores, row_max, row_sum, scale, FORM.FALLING)
        b_out = warpgroup_mma_wait(0, [b_out])
        b_out = b_out * gl.convert_layout(factor, gl.SliceLayout(1, OUT))[:, None]
        b_p = gl.convert_layout(p.to(DTYPE), OPERAND)

    step = n_steps - 1
    if NARROW:
        if BOUNDED:
            zero_unseen_values(tile, key_block, step - 1, s_values, value_full, FORM)
        key_block = block_of_step(step, tile, n_steps, FORM)
        copy_value(source, buffers, step, found, key_block.start, FORM)
        pipeline.consumer_wait(key_full, step)
        scores = prefix.product(s_query, s_key, FORM)
        pipeline.consumer_wait(value_full, step - 1)
        # [M, D] += [M, N] @ [N, D]
        b_out = warpgroup_mma(b_p, s_values.index((step - 1) % 2), b_out, is_async=True)
        scores = warpgroup_mma_wait(1, [scores])
        p, row_max, row_sum, factor = prefix.probabilities(
            scores, o_position, key_block, row_max, row_sum, scale, FORM
        )
        b_out = warpgroup_mma_wait(0, [b_out])
        b_out = b_out * gl.convert_layout(factor, gl.SliceLayout(1, OUT))[:, None]
        b_out = add_values_of_prefix(buffers, tile, key_block, step, p, b_out, FORM)
    else:
        if BOUNDED:
            zero_unseen_values(tile, key_block, step, s_values, value_full, FORM)
        pipeline.consumer_wait(value_full, step)
        b_out = warpgroup_mma(b_p, s_values.index(step % 2), b_out, is_async=True)
        b_out = warpgroup_mma_wait(0, [b_out])
    return b_out, row_max, row_sum


@gluon.jit
def attend_prefix(buffers, tile, o_position, b_out, row_max, row_sum, scale, FORM: gl.constexpr):
    """`b_out`, `row_max` and `row_sum` after a narrow prefix alone."""
    key_block = block_of_step(0, tile, 1, FORM)
    pipeline.consumer_wait(buffers.key_full, 0)
    scores = prefix.product(buffers.query, buffers.key, FORM)
    scores = warpgroup_mma_wait(0, [scores])
    p, row_max, row_sum, _ = prefix.probabilities(
        scores, o_position, key_block, row_max, row_sum, scale, FORM
    )
    b_out = add_values_of_prefix(buffers, tile, key_block, 0, p, b_out, FORM)
    return b_out, row_max, row_sum


@gluon.jit
def add_values_of_prefix(buffers, tile, key_block, n, p, b_out, FORM: gl.constexpr):
    """`b_out` with the values of a narrow prefix, block `n` of the ring."""
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, b_out.type.layout, 2)
    s_value = prefix.tokens(buffers.value_pair.index(n % 2), FORM)
    pipeline.consumer_wait(buffers.value_full, n)
    if arguments.is_bounded(FORM):
        arguments.zero_unseen(tile, key_block, s_value, FORM)
    # [M, D] += [M, WIDTH] @ [WIDTH, D]
    b_p = gl.convert_layout(p.to(s_value.dtype), OPERAND)
    b_out = warpgroup_mma(b_p, s_value, b_out, is_async=True)
    return warpgroup_mma_wait(0, [b_out])


@gluon.jit(do_not_specialize=arguments.ForwardCounts._fields)
def forward_kernel(
    t_query,
    t_key,
    t_value,
    out,
    p_remainder,
    p_lse,
    p_bands,
    p_sinks,
    positions,
    n_heads,
    group,
    n_batch,
    n_query_blocks,
    n_queries,
    n_keys,
    order,
    scale,
    FORM: gl.constexpr,
):
    counts = arguments.ForwardCounts(
        n_heads,
        group,
        n_batch,
        n_query_blocks,
        n_queries,
        n_keys,
        order,
    )
    BLOCK_M: gl.constexpr = FORM.BLOCK_M
    BLOCK_N: gl.constexpr = FORM.BLOCK_N
    HEAD_DIM: gl.constexpr = FORM.HEAD_DIM
    WARPS: gl.constexpr = gl.num_warps()
    DTYPE: gl.constexpr = t_key.dtype
    # [M, N] scores, [M, D] output
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HEAD_DIM, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    SHARED_Q: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, HEAD_DIM], DTYPE)
    SHARED_K: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, HEAD_DIM], DTYPE)

    program = gl.program_id(0)
    n_batch, n_heads, n_blocks = counts.n_batch, counts.n_heads, counts.n_query_blocks
    if counts.order == scheduler.PAIRED:
        head_batch, rank = scheduler.paired_work_tile(
            program, p_bands, n_blocks, n_batch, n_heads, BLOCK_M
        )
    else:
        head_batch, rank = scheduler.work_tile(program, n_blocks, n_batch * n_heads, counts.order)
    batch = head_batch % n_batch
    bands = tiles.load_bands(p_bands, head_batch // n_batch)
    # Pairs order their blocks by length, those without keys among them.
    near = bands.near_0
    if arguments.leaves_no_block(FORM):
        near = 0
    slot = scheduler.query_block(rank, near * (counts.order != scheduler.PAIRED), n_blocks, BLOCK_M)
    tile = arguments.query_tile(batch, bands, slot, positions, counts, BLOCK_M, FORM)
    first_query, n_queries, keys = tile.first_query, tile.n_queries, tile.keys
    if FORM.PACKED:
        if first_query >= n_queries:
            return
    head = bands.head
    key_head = head // counts.group
    n_steps = tiles.total_blocks(keys)
    offset = batch.to(gl.int64) * out.stride_b + head.to(gl.int64) * out.stride_h
    p_lse += (batch.to(gl.int64) * n_heads + head) * counts.n_queries + tile.offset_q
    if FORM.PACKED:
        offset += tile.offset_q.to(gl.int64) * out.stride_t
    o_query = first_query + gl.arange(0, BLOCK_M, ROW)  # [M]
    o_position = tile.first + gl.arange(0, BLOCK_M, ROW)  # [M]

    row_max, row_sum = init_softmax(p_sinks, head, BLOCK_M, ROW, FORM.HAS_SINKS)
    b_out = gl.full([BLOCK_M, HEAD_DIM], 0.0, gl.float32, OUT)

    if n_steps == 0:
        lse, _ = softmax.finalize(row_max, row_sum)
        gl.store(p_lse + o_query, lse, mask=o_query < n_queries)
        p_out = out.pointer + offset
        memory.store_zeros(p_out, first_query, out.stride_t, n_queries, BLOCK_M, HEAD_DIM)
        return

    # One buffer of keys is enough, because keys are free once the scores are there. With one, three
    # programs fit on a multiprocessor.
    s_query = gl.allocate_shared_memory(DTYPE, [BLOCK_M, HEAD_DIM], SHARED_Q)
    s_key = gl.allocate_shared_memory(DTYPE, [BLOCK_N, HEAD_DIM], SHARED_K)
    s_values = gl.allocate_shared_memory(DTYPE, [2, BLOCK_N, HEAD_DIM], SHARED_K)
    query_full = pipeline.allocate_barriers(1)
    key_full = pipeline.allocate_barriers(1)
    value_full = pipeline.allocate_barriers(2)

    offset_q, offset_k = tile.offset_q, tile.offset_k
    if FORM.PAGE > 0:
        p_numbers = portable_arguments.page_row(positions, offset_k, counts.n_keys, FORM.PAGE)
        key_pages = pages.Pages(p_numbers, tile.n_keys)
    else:
        key_pages = None
    source = KeySource(t_key, t_value, batch, key_head, offset_k, key_pages)
    buffers = Buffers(s_query, s_key, s_values, key_full, value_full)
    barrier = pipeline.expect_tx(query_full, 0, BLOCK_M * HEAD_DIM * 2, True)
    pipeline.copy_tokens(t_query, batch, head, offset_q + first_query, barrier, s_query, True)
    first_start = block_of_step(0, tile, n_steps, FORM).start
    found = pages_of(source, first_start, FORM)
    copy_key(source, buffers, 0, found, first_start, True, FORM)
    copy_value(source, buffers, 0, found, first_start, FORM)
    pipeline.consumer_wait(query_full, 0)
    if not prefix.is_narrow(FORM) or n_steps > 1:
        b_out, row_max, row_sum = attend_blocks(
            source, buffers, tile, o_position, b_out, row_max, row_sum, scale, FORM
        )
    else:
        b_out, row_max, row_sum = attend_prefix(
            buffers, tile, o_position, b_out, row_max, row_sum, scale, FORM
        )

    lse, row_sum = softmax.finalize(row_max, row_sum)
    gl.store(p_lse + o_query, lse, mask=o_query < n_queries)
    b_out = b_out * gl.convert_layout(1.0 / row_sum, gl.SliceLayout(1, OUT))[:, None]
    memory.store_output(out, p_remainder, offset, b_out, first_query, n_queries, BLOCK_M, HEAD_DIM)
    pipeline.invalidate(query_full)
    pipeline.invalidate(key_full)
    pipeline.invalidate(value_full)
