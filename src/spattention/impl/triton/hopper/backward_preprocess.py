# mypy: allow-untyped-defs
"""Backward preprocess on Hopper, with the legend of `pipeline.py`.

For every query row, compute `lse_log2 = lse * log2(e)` and `delta = rowsum(dO * O) - d_lse`, which
the dQ and dK/dV passes read. For the fused pass, prepare the sums of dQ too.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .. import scheduler, softmax, tiles
from . import arguments, memory, pipeline


class KeyRing(NamedTuple):
    """Two buffers of keys and of values, and the barriers of their copies."""

    keys: Any
    value_pair: Any
    full: Any


@gluon.jit
def init_stats(
    stats, o_row, m_query, BLOCK_M: gl.constexpr, ROW: gl.constexpr, HAS_D_LSE: gl.constexpr
):
    """`lse_log2`, and the part of delta that is the gradient of the log-sum-exp, both `[M]`."""
    lse_log2 = softmax.to_lse_log2(gl.load(stats.lse + o_row, mask=m_query, other=0.0))
    delta = gl.full([BLOCK_M], 0.0, gl.float32, ROW)
    if HAS_D_LSE:
        delta -= gl.load(stats.d_lse + o_row, mask=m_query, other=0.0)
    return lse_log2, delta


@gluon.jit
def delta_of_keys(
    scores,
    d_p,
    o_position,
    key_block,
    lse_log2,
    scale,
    LAYOUT: gl.constexpr,
    PREFIX: gl.constexpr,
):
    """Contribution of a block of keys to delta, `[M]`: the products of their probabilities and the
    gradients of these. In a row with few keys, delta from the output would show its rounding.
    """
    o_key = key_block.start + gl.arange(0, scores.shape[1], gl.SliceLayout(0, LAYOUT))
    near, far = key_block.near, key_block.far
    m_seen = arguments.visible(o_position[:, None], o_key[None, :], near, far, PREFIX)
    p = gl.where(m_seen, softmax.recompute(scores, lse_log2[:, None], scale), 0.0)
    return gl.sum(p * d_p, 1)


@gluon.jit
def delta_of_step(step, s_query, s_d_out, ring, tile, lse_log2, scale, FORM: gl.constexpr):
    """Contribution to delta, `[M]`, of block `step` of a `KeyRing`, which is on its way."""
    ROW: gl.constexpr = lse_log2.type.layout
    SCORES: gl.constexpr = ROW.parent
    BLOCK_M: gl.constexpr = FORM.BLOCK_M
    BLOCK_N: gl.constexpr = FORM.BLOCK_N
    zeros = gl.full([BLOCK_M, BLOCK_N], 0.0, gl.float32, SCORES)
    key_block = tiles.block_at(step, tile.keys, tile.bands, BLOCK_N, FORM.INTERVALS, FORM.PREFIX)
    pipeline.consumer_wait(ring.full, step)
    s_key, s_value = ring.keys.index(step), ring.value_pair.index(step)
    if arguments.is_bounded(FORM):
        arguments.zero_unseen(tile, key_block, s_key, FORM)
        arguments.zero_unseen(tile, key_block, s_value, FORM)
    # [M, N] = [M, D] @ [D, N], both
    s_key, s_value = s_key.permute((1, 0)), s_value.permute((1, 0))
    scores = warpgroup_mma(s_query, s_key, zeros, use_acc=False, is_async=True)
    d_p = warpgroup_mma(s_d_out, s_value, zeros, use_acc=False, is_async=True)
    scores, d_p = warpgroup_mma_wait(0, [scores, d_p])
    o_position = tile.first + gl.arange(0, BLOCK_M, ROW)  # [M]
    return delta_of_keys(scores, d_p, o_position, key_block, lse_log2, scale, SCORES, FORM.PREFIX)


@gluon.jit(do_not_specialize=arguments.BackwardCounts._fields)
def preprocess_kernel(
    t_query,
    t_key,
    t_value,
    t_d_out,
    out,
    d_out,
    stats,
    d_query,
    p_sums,
    p_turns,
    p_bands,
    positions,
    n_heads,
    group,
    n_batch,
    n_query_blocks,
    n_queries,
    n_keys,
    order,
    pitch,
    n_key_blocks,
    key_programs,
    scale,
    FORM: gl.constexpr,
):
    counts = arguments.BackwardCounts(
        n_heads,
        group,
        n_batch,
        n_query_blocks,
        n_queries,
        n_keys,
        order,
        pitch,
        n_key_blocks,
        key_programs,
    )
    BLOCK_M: gl.constexpr = FORM.BLOCK_M
    BLOCK_N: gl.constexpr = FORM.BLOCK_N
    HEAD_DIM: gl.constexpr = FORM.HEAD_DIM
    WARPS: gl.constexpr = gl.num_warps()
    DTYPE: gl.constexpr = t_key.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    SHARED_Q: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, HEAD_DIM], DTYPE)
    SHARED_K: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, HEAD_DIM], DTYPE)

    n_batch, n_heads, n_blocks = counts.n_batch, counts.n_heads, counts.n_query_blocks
    n_queries, pitch = counts.n_queries, counts.pitch
    head_batch, rank = scheduler.work_tile(
        gl.program_id(0), n_blocks, n_batch * n_heads, counts.order
    )
    batch = head_batch % n_batch
    bands = tiles.load_bands(p_bands, head_batch // n_batch)
    # In reverse: here blocks of few keys take longest, and those without keys come last.
    slot = arguments.query_block(n_blocks - 1 - rank, bands, n_blocks, BLOCK_M, FORM)
    tile = arguments.query_tile(batch, bands, slot, positions, counts, BLOCK_M, FORM)
    first, keys, offset_k = tile.first_query, tile.keys, tile.offset_k
    head = bands.head
    key_head = head // counts.group
    n_steps = tiles.total_blocks(keys)
    batch_64 = batch.to(gl.int64)
    head_64 = head.to(gl.int64)
    p_out = out.pointer + batch_64 * out.stride_b + head_64 * out.stride_h
    p_d_out = d_out.pointer + batch_64 * d_out.stride_b + head_64 * d_out.stride_h
    row = (batch_64 * n_heads + head_64) * n_queries + tile.offset_q
    row_pitched = (batch_64 * n_heads + head_64) * pitch + tile.offset_q
    if FORM.PACKED:
        offset_64 = tile.offset_q.to(gl.int64)
        p_out += offset_64 * out.stride_t
        p_d_out += offset_64 * d_out.stride_t
        n_queries, pitch = tile.n_queries, tile.n_queries

    o_query = first + gl.arange(0, BLOCK_M, ROW)  # [M]
    o_position = tile.first + gl.arange(0, BLOCK_M, ROW)  # [M]
    m_query = o_query < n_queries
    # The kernel of the gradients may start as soon as all blocks have started here. It copies its
    # first keys and values before it waits for this kernel.
    gdc_wait()
    gdc_launch_dependents()
    if FORM.PACKED:
        if first >= n_queries:
            return
    lse_log2, delta = init_stats(stats, row + o_query, m_query, BLOCK_M, ROW, FORM.HAS_D_LSE)  # [M]
    # Rows up to the pitch are read with the last block of queries: they must hold numbers.
    gl.store(stats.lse_log2 + row_pitched + o_query, lse_log2, mask=o_query < pitch)
    if FORM.FUSED:
        place = (batch * n_heads + head) * n_blocks + slot
        if FORM.ORDERED:
            gl.store(p_turns + place, 0)
        else:
            p_block_sums = p_sums + place.to(gl.int64) * (BLOCK_M * HEAD_DIM)
            memory.store_zeros(p_block_sums, 0, HEAD_DIM, BLOCK_M, BLOCK_M, HEAD_DIM)
    if n_steps == 0:
        gl.store(stats.delta + row_pitched + o_query, delta, mask=o_query < pitch)
        if FORM.ORDERED:
            p_d_query = d_query.pointer + batch_64 * d_query.stride_b + head_64 * d_query.stride_h
            memory.store_zeros(p_d_query, first, d_query.stride_t, n_queries, BLOCK_M, HEAD_DIM)
        return
    if n_steps > FORM.EXACT_STEPS:
        b_out = memory.load_tokens(p_out, first, out.stride_t, n_queries, BLOCK_M, HEAD_DIM)
        b_d_out = memory.load_tokens(p_d_out, first, d_out.stride_t, n_queries, BLOCK_M, HEAD_DIM)
        summed = gl.sum(b_out.to(gl.float32) * b_d_out.to(gl.float32), 1)
        delta += gl.convert_layout(summed, ROW)
        gl.store(stats.delta + row_pitched + o_query, delta, mask=o_query < pitch)
        return

    s_query = gl.allocate_shared_memory(DTYPE, [BLOCK_M, HEAD_DIM], SHARED_Q)
    s_d_out = gl.allocate_shared_memory(DTYPE, [BLOCK_M, HEAD_DIM], SHARED_Q)
    # One buffer for keys and values: with 48 KiB, four programs share a multiprocessor.
    s_tokens = gl.allocate_shared_memory(DTYPE, [BLOCK_N, HEAD_DIM], SHARED_K)
    query_full = pipeline.allocate_barriers(1)
    full = pipeline.allocate_barriers(1)
    barrier = pipeline.expect_tx(query_full, 0, 2 * BLOCK_M * HEAD_DIM * 2, True)
    first_row = tile.offset_q + first
    pipeline.copy_tokens(t_query, batch, head, first_row, barrier, s_query, True)
    pipeline.copy_tokens(t_d_out, batch, head, first_row, barrier, s_d_out, True)
    zeros = gl.full([BLOCK_M, BLOCK_N], 0.0, gl.float32, SCORES)
    for step in range(n_steps):
        key_block = tiles.block_at(step, keys, bands, BLOCK_N, FORM.INTERVALS, FORM.PREFIX)
        barrier = pipeline.expect_tx(full, 2 * step, BLOCK_N * HEAD_DIM * 2, True)
        first_key = offset_k + key_block.start
        pipeline.copy_tokens(t_key, batch, key_head, first_key, barrier, s_tokens, True)
        if step == 0:
            pipeline.consumer_wait(query_full, 0)
        pipeline.consumer_wait(full, 2 * step)
        s_operand = s_tokens.permute((1, 0))
        scores = warpgroup_mma(s_query, s_operand, zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, [scores])
        barrier = pipeline.expect_tx(full, 2 * step + 1, BLOCK_N * HEAD_DIM * 2, True)
        pipeline.copy_tokens(t_value, batch, key_head, first_key, barrier, s_tokens, True)
        pipeline.consumer_wait(full, 2 * step + 1)
        if arguments.is_bounded(FORM):
            arguments.zero_unseen(tile, key_block, s_tokens, FORM)
        d_p = warpgroup_mma(s_d_out, s_operand, zeros, use_acc=False, is_async=True)
        d_p = warpgroup_mma_wait(0, [d_p])
        delta += delta_of_keys(
            scores, d_p, o_position, key_block, lse_log2, scale, SCORES, FORM.PREFIX
        )
    gl.store(stats.delta + row_pitched + o_query, delta, mask=o_query < pitch)
    pipeline.invalidate(query_full)
    pipeline.invalidate(full)
