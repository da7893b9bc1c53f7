# mypy: allow-untyped-defs
"""What the gradients on Hopper need of every row, with the legend of `hopper.py`: the `base` of its
weights and its `delta`, which the gradients of its scores are counted from.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .. import softmax, tiles
from ..config import HOPPER_COUNTS
from . import pipeline as hopper

# Blocks of keys up to which delta is their sum: both buffers of the ring of `query_gradient`.
EXACT_STEPS = gl.constexpr(2)


@gluon.jit
def rows_of(
    p_lse,
    p_d_lse,
    o_row,
    m_query,
    BLOCK_M: gl.constexpr,
    ROW: gl.constexpr,
    HAS_D_LSE: gl.constexpr,
):
    """What the weights are computed with, and the part of delta that the log-sum-exp's gradient
    gives, both `[M]`.
    """
    base = softmax.base_of(gl.load(p_lse + o_row, mask=m_query, other=0.0))
    delta = gl.full([BLOCK_M], 0.0, gl.float32, ROW)
    if HAS_D_LSE:
        delta -= gl.load(p_d_lse + o_row, mask=m_query, other=0.0)
    return base, delta


@gluon.jit
def delta_of_keys(
    scores, d_weights, o_query, first_key, near, far, base, scale, LAYOUT: gl.constexpr
):
    """What a block of keys adds to delta, `[M]`: the products of their weights and the gradients of
    these. Where a row has few keys, delta from the output would show its rounding.
    """
    o_key = first_key + gl.arange(0, scores.shape[1], gl.SliceLayout(0, LAYOUT))
    m_seen = hopper.seen(o_query[:, None], o_key[None, :], near, far)
    weights = gl.where(m_seen, softmax.weights_of(scores, base[:, None], scale), 0.0)
    return gl.sum(weights * d_weights, 1)


@gluon.jit(do_not_specialize=HOPPER_COUNTS)
def rows_kernel(
    t_query,
    t_key,
    t_value,
    t_d_out,
    p_out,
    p_d_out,
    p_lse,
    p_d_lse,
    p_base,
    p_delta,
    p_bands,
    out_stride_b,
    out_stride_h,
    out_stride_t,
    d_out_stride_b,
    d_out_stride_h,
    d_out_stride_t,
    n_heads,
    group,
    n_batch,
    n_slots,
    n_queries,
    n_keys,
    in_turn,
    pitch,
    scale,
    HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    INTERVALS: gl.constexpr,
    HAS_D_LSE: gl.constexpr,
):
    WARPS: gl.constexpr = gl.num_warps()
    DTYPE: gl.constexpr = t_key.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    SHARED_Q: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, HEAD_DIM], DTYPE)
    SHARED_K: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, HEAD_DIM], DTYPE)

    program = gl.program_id(0)
    place, rank = tiles.turn(program, n_slots, n_batch * n_heads, in_turn)
    batch = place % n_batch
    bands = tiles.bands_of(p_bands, place // n_batch)
    # The other way round: blocks of few keys take longest here, those without keys come last.
    slot = tiles.query_slot(n_slots - 1 - rank, bands[1], n_slots, BLOCK_M)
    head = bands[0]
    key_head = head // group
    first = slot * BLOCK_M
    last = min(first + BLOCK_M, n_queries) - 1
    walk = tiles.key_walk(bands, first, last, 0, n_keys, BLOCK_N, INTERVALS)
    n_steps = tiles.steps_of(walk)
    batch_64 = batch.to(gl.int64)
    head_64 = head.to(gl.int64)
    p_out += batch_64 * out_stride_b + head_64 * out_stride_h
    p_d_out += batch_64 * d_out_stride_b + head_64 * d_out_stride_h
    row = (batch_64 * n_heads + head_64) * n_queries
    row_pitched = (batch_64 * n_heads + head_64) * pitch

    o_query = first + gl.arange(0, BLOCK_M, ROW)  # [M]
    m_query = o_query < n_queries
    # The kernel of the gradients may begin, as soon as all blocks are under way here: it comes to
    # its own wait with the first keys and values in hand.
    gdc_wait()
    gdc_launch_dependents()
    base, delta = rows_of(p_lse, p_d_lse, row + o_query, m_query, BLOCK_M, ROW, HAS_D_LSE)  # [M]
    # Rows up to the pitch are read with the last block of queries: they must hold numbers.
    gl.store(p_base + row_pitched + o_query, base, mask=o_query < pitch)
    if n_steps == 0:
        gl.store(p_delta + row_pitched + o_query, delta, mask=o_query < pitch)
        return
    if n_steps > EXACT_STEPS:
        b_out = hopper.load_rows(p_out, first, out_stride_t, n_queries, BLOCK_M, HEAD_DIM)
        b_d_out = hopper.load_rows(p_d_out, first, d_out_stride_t, n_queries, BLOCK_M, HEAD_DIM)
        summed = gl.sum(b_out.to(gl.float32) * b_d_out.to(gl.float32), 1)
        delta += gl.convert_layout(summed, ROW)
        gl.store(p_delta + row_pitched + o_query, delta, mask=o_query < pitch)
        return

    s_query = gl.allocate_shared_memory(DTYPE, [BLOCK_M, HEAD_DIM], SHARED_Q)
    s_d_out = gl.allocate_shared_memory(DTYPE, [BLOCK_M, HEAD_DIM], SHARED_Q)
    # One for keys and values: with 48 KiB, four programs share a multiprocessor.
    s_rows = gl.allocate_shared_memory(DTYPE, [BLOCK_N, HEAD_DIM], SHARED_K)
    query_ready = hopper.barriers(1)
    ready = hopper.barriers(1)
    barrier = hopper.expect(query_ready, 0, 2 * BLOCK_M * HEAD_DIM * 2, True)
    hopper.copy(t_query, batch, head, first, barrier, s_query, True)
    hopper.copy(t_d_out, batch, head, first, barrier, s_d_out, True)
    zeros = gl.full([BLOCK_M, BLOCK_N], 0.0, gl.float32, SCORES)
    for step in range(n_steps):
        first_key, _, near, far = tiles.step_at(step, walk, bands, BLOCK_N, INTERVALS)
        barrier = hopper.expect(ready, 2 * step, BLOCK_N * HEAD_DIM * 2, True)
        hopper.copy(t_key, batch, key_head, first_key, barrier, s_rows, True)
        if step == 0:
            hopper.arrived(query_ready, 0)
        hopper.arrived(ready, 2 * step)
        scores = warpgroup_mma(s_query, s_rows.permute((1, 0)), zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, [scores])
        barrier = hopper.expect(ready, 2 * step + 1, BLOCK_N * HEAD_DIM * 2, True)
        hopper.copy(t_value, batch, key_head, first_key, barrier, s_rows, True)
        hopper.arrived(ready, 2 * step + 1)
        d_weights = warpgroup_mma(
            s_d_out, s_rows.permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        d_weights = warpgroup_mma_wait(0, [d_weights])
        delta += delta_of_keys(
            scores, d_weights, o_query, first_key, near, far, base, scale, SCORES
        )
    gl.store(p_delta + row_pitched + o_query, delta, mask=o_query < pitch)
    hopper.retire(query_ready)
    hopper.retire(ready)
