# mypy: allow-untyped-defs
"""Forward pass on Hopper, with the legend of `pipeline.py`.

While the tensor cores multiply one block of values, the softmax of the next block's scores is
computed.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .. import scheduler, softmax, tiles
from . import arguments, memory, pipeline


@gluon.jit
def mask_scores(
    scores,
    tile,
    o_query,
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
        m_seen = arguments.visible(o_query[:, None], o_key[None, :], near, far, FORM.PREFIX)
        scores = gl.where(m_seen, scores, float("inf") if FORM.FALLING else float("-inf"))
    return scores


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


@gluon.jit(do_not_specialize=arguments.ForwardCounts._fields)
def forward_kernel(
    t_query,
    t_key,
    t_value,
    out,
    p_lse,
    p_bands,
    p_sinks,
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
    KEY_BYTES: gl.constexpr = BLOCK_N * HEAD_DIM * 2
    # [M, N] scores, [M, D] output, and the former as the left operand of a product
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HEAD_DIM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
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
    if FORM.PREFIX > 0:  # no block is without keys, and those that see nothing else come last
        near = 0
    block = scheduler.query_block(
        rank, near * (counts.order != scheduler.PAIRED), n_blocks, BLOCK_M
    )
    tile = arguments.query_tile(batch, bands, block, counts, BLOCK_M, FORM)
    first, keys = tile.first, tile.keys
    head = bands.head
    key_head = head // counts.group
    n_steps = tiles.total_blocks(keys)
    p_out = out.pointer + batch.to(gl.int64) * out.stride_b + head.to(gl.int64) * out.stride_h
    p_lse += (batch.to(gl.int64) * n_heads + head) * counts.n_queries
    o_query = first + gl.arange(0, BLOCK_M, ROW)  # [M]

    row_max, row_sum = init_softmax(p_sinks, head, BLOCK_M, ROW, FORM.HAS_SINKS)
    b_out = gl.full([BLOCK_M, HEAD_DIM], 0.0, gl.float32, OUT)
    zeros = gl.full([BLOCK_M, BLOCK_N], 0.0, gl.float32, SCORES)

    if n_steps == 0:
        lse, _ = softmax.finalize(row_max, row_sum)
        gl.store(p_lse + o_query, lse, mask=o_query < counts.n_queries)
        memory.store_zeros(p_out, first, out.stride_t, counts.n_queries, BLOCK_M, HEAD_DIM)
        return

    # One buffer of keys is enough, because keys are free once the scores are there. With one, three
    # programs fit on a multiprocessor.
    s_query = gl.allocate_shared_memory(DTYPE, [BLOCK_M, HEAD_DIM], SHARED_Q)
    s_key = gl.allocate_shared_memory(DTYPE, [BLOCK_N, HEAD_DIM], SHARED_K)
    s_values = gl.allocate_shared_memory(DTYPE, [2, BLOCK_N, HEAD_DIM], SHARED_K)
    query_full = pipeline.allocate_barriers(1)
    key_full = pipeline.allocate_barriers(1)
    value_full = pipeline.allocate_barriers(2)

    key_block = tiles.block_at(0, keys, bands, BLOCK_N, FORM.INTERVALS, FORM.PREFIX)
    next_key = tiles.block_at(1, keys, bands, BLOCK_N, FORM.INTERVALS, FORM.PREFIX).start
    barrier = pipeline.expect_tx(query_full, 0, BLOCK_M * HEAD_DIM * 2, True)
    pipeline.copy_tokens(t_query, batch, head, first, barrier, s_query, True)
    barrier = pipeline.expect_tx(key_full, 0, KEY_BYTES, True)
    pipeline.copy_tokens(t_key, batch, key_head, key_block.start, barrier, s_key, True)
    barrier = pipeline.expect_tx(value_full, 0, KEY_BYTES, True)
    pipeline.copy_tokens(
        t_value, batch, key_head, key_block.start, barrier, s_values.index(0), True
    )

    pipeline.consumer_wait(query_full, 0)
    pipeline.consumer_wait(key_full, 0)
    # [M, N] = [M, D] @ [D, N]
    scores = warpgroup_mma(s_query, s_key.permute((1, 0)), zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, [scores])
    barrier = pipeline.expect_tx(key_full, 1, KEY_BYTES, n_steps > 1)
    pipeline.copy_tokens(t_key, batch, key_head, next_key, barrier, s_key, n_steps > 1)
    scores = mask_scores(scores, tile, o_query, key_block, SCORES, FORM)
    p, row_max, row_sum, factor = softmax.update(scores, row_max, row_sum, scale, FORM.FALLING)
    b_p = gl.convert_layout(p.to(DTYPE), OPERAND)

    for step in range(1, n_steps):
        # All products of the step before are done.
        key_block = tiles.block_at(step, keys, bands, BLOCK_N, FORM.INTERVALS, FORM.PREFIX)
        next_key = tiles.block_at(step + 1, keys, bands, BLOCK_N, FORM.INTERVALS, FORM.PREFIX).start
        barrier = pipeline.expect_tx(value_full, step, KEY_BYTES, True)
        s_value = s_values.index(step % 2)
        pipeline.copy_tokens(t_value, batch, key_head, key_block.start, barrier, s_value, True)
        pipeline.consumer_wait(key_full, step)
        # [M, N] = [M, D] @ [D, N]
        scores = warpgroup_mma(s_query, s_key.permute((1, 0)), zeros, use_acc=False, is_async=True)
        pipeline.consumer_wait(value_full, step - 1)
        # [M, D] += [M, N] @ [N, D]
        b_out = warpgroup_mma(b_p, s_values.index((step - 1) % 2), b_out, is_async=True)
        scores = warpgroup_mma_wait(1, [scores])
        more = step + 1 < n_steps
        barrier = pipeline.expect_tx(key_full, step + 1, KEY_BYTES, more)
        pipeline.copy_tokens(t_key, batch, key_head, next_key, barrier, s_key, more)
        scores = mask_scores(scores, tile, o_query, key_block, SCORES, FORM)
        p, row_max, row_sum, factor = softmax.update(scores, row_max, row_sum, scale, FORM.FALLING)
        b_out = warpgroup_mma_wait(0, [b_out])
        b_out = b_out * gl.convert_layout(factor, gl.SliceLayout(1, OUT))[:, None]
        b_p = gl.convert_layout(p.to(DTYPE), OPERAND)

    pipeline.consumer_wait(value_full, n_steps - 1)
    b_out = warpgroup_mma(b_p, s_values.index((n_steps - 1) % 2), b_out, is_async=True)
    b_out = warpgroup_mma_wait(0, [b_out])

    lse, row_sum = softmax.finalize(row_max, row_sum)
    gl.store(p_lse + o_query, lse, mask=o_query < counts.n_queries)
    b_out = b_out * gl.convert_layout(1.0 / row_sum, gl.SliceLayout(1, OUT))[:, None]
    memory.store_tokens(p_out, b_out, first, out.stride_t, counts.n_queries, BLOCK_M, HEAD_DIM)
    pipeline.invalidate(query_full)
    pipeline.invalidate(key_full)
    pipeline.invalidate(value_full)
