# mypy: allow-untyped-defs
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from . import softmax, tiles
from .config import HOPPER_COUNTS


@gluon.jit
def masked(
    scores,
    first,
    last,
    o_query,
    first_key,
    near,
    far,
    FALLING: gl.constexpr,
    BLOCK_N: gl.constexpr,
    layout: gl.constexpr,
):
    if not tiles.is_inside(first, last, first_key, first_key + BLOCK_N - 1, near, far, 0):
        o_key = first_key + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
        o_reach = tiles.reach(o_query, near, far, 0)
        m_seen = tiles.visible(o_query[:, None], o_key[None, :], near, o_reach[:, None])
        scores = gl.where(m_seen, scores, float("inf") if FALLING else float("-inf"))
    return scores


@gluon.jit(do_not_specialize=HOPPER_COUNTS)
def forward_kernel(
    t_query,
    t_key,
    t_value,
    p_out,
    p_lse,
    p_bands,
    p_sinks,
    out_stride_b,
    out_stride_h,
    out_stride_t,
    n_heads,
    group,
    n_batch,
    n_slots,
    n_queries,
    n_keys,
    scale,
    HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    INTERVALS: gl.constexpr,
    HAS_SINKS: gl.constexpr,
    FALLING: gl.constexpr,
):
    WARPS: gl.constexpr = gl.num_warps()
    DTYPE: gl.constexpr = t_key.dtype
    mma_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    mma_out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HEAD_DIM, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma_out, 2)
    shared_k: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, HEAD_DIM], DTYPE)
    shared_q: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, HEAD_DIM], DTYPE)
    per_row: gl.constexpr = gl.SliceLayout(1, mma_scores)

    program = gl.program_id(0)
    slot = n_slots - 1 - program % n_slots
    batch = (program // n_slots) % n_batch
    head, near_0, far_0, near_1, far_1 = tiles.bands_of(p_bands, program // n_slots // n_batch)
    key_head = head // group
    first = slot * BLOCK_M
    last = min(first + BLOCK_M, n_queries) - 1
    begin_0, low_0, begin_1, low_1, steps_0, steps_1 = tiles.key_walk(
        near_0, far_0, near_1, far_1, first, last, 0, n_keys, BLOCK_N, INTERVALS
    )
    n_steps = steps_0 + steps_1

    b_queries = gl.allocate_shared_memory(DTYPE, [BLOCK_M, HEAD_DIM], shared_q)
    b_keys = gl.allocate_shared_memory(DTYPE, [2, BLOCK_N, HEAD_DIM], shared_k)
    b_values = gl.allocate_shared_memory(DTYPE, [2, BLOCK_N, HEAD_DIM], shared_k)
    bar_q = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    bar_k = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    bar_v = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bar_q, count=1)
    for i in gl.static_range(2):
        mbarrier.init(bar_k.index(i), count=1)
        mbarrier.init(bar_v.index(i), count=1)
    fence_async_shared()

    o_query = first + gl.arange(0, BLOCK_M, per_row)
    highest = gl.full([BLOCK_M], float("-inf"), gl.float32, per_row)
    total = gl.full([BLOCK_M], 0.0, gl.float32, per_row)
    if HAS_SINKS:
        sink = gl.load(p_sinks + head).to(gl.float32) * softmax.LOG2_E
        highest = gl.full([BLOCK_M], 0.0, gl.float32, per_row) + sink
        total += gl.where(sink == float("-inf"), 0.0, 1.0)
    b_out = gl.full([BLOCK_M, HEAD_DIM], 0.0, gl.float32, mma_out)
    zero = gl.full([BLOCK_M, BLOCK_N], 0.0, gl.float32, mma_scores)

    if n_steps > 0:
        mbarrier.expect(bar_q, BLOCK_M * HEAD_DIM * 2)
        tma.async_copy_global_to_shared(t_query, [batch, head, first, 0], bar_q, b_queries)
        for i in gl.static_range(2):
            n, f, start, l = tiles.step_at(
                i,
                steps_0,
                near_0,
                far_0,
                begin_0,
                low_0,
                near_1,
                far_1,
                begin_1,
                low_1,
                BLOCK_N,
                INTERVALS,
            )
            mbarrier.expect(bar_k.index(i), BLOCK_N * HEAD_DIM * 2, pred=i < n_steps)
            tma.async_copy_global_to_shared(
                t_key,
                [batch, key_head, start, 0],
                bar_k.index(i),
                b_keys.index(i),
                pred=i < n_steps,
            )
            if i == 0:
                mbarrier.expect(bar_v.index(0), BLOCK_N * HEAD_DIM * 2)
                tma.async_copy_global_to_shared(
                    t_value, [batch, key_head, start, 0], bar_v.index(0), b_values.index(0)
                )
        mbarrier.wait(bar_q, 0)
        mbarrier.wait(bar_k.index(0), 0)
        scores = warpgroup_mma(
            b_queries, b_keys.index(0).permute((1, 0)), zero, use_acc=False, is_async=True
        )
        scores = warpgroup_mma_wait(0, [scores])
        near, far, first_key, l0 = tiles.step_at(
            0,
            steps_0,
            near_0,
            far_0,
            begin_0,
            low_0,
            near_1,
            far_1,
            begin_1,
            low_1,
            BLOCK_N,
            INTERVALS,
        )
        scores = masked(
            scores, first, last, o_query, first_key, near, far, FALLING, BLOCK_N, mma_scores
        )
        weights, highest, total, factor = softmax.extend(scores, highest, total, scale, FALLING)
        b_weights = gl.convert_layout(weights.to(DTYPE), operand)

        for step in range(n_steps - 1):
            slot_k = step % 2
            other = 1 - slot_k
            n2, f2, start2, l2 = tiles.step_at(
                step + 2,
                steps_0,
                near_0,
                far_0,
                begin_0,
                low_0,
                near_1,
                far_1,
                begin_1,
                low_1,
                BLOCK_N,
                INTERVALS,
            )
            near, far, first_key, l1 = tiles.step_at(
                step + 1,
                steps_0,
                near_0,
                far_0,
                begin_0,
                low_0,
                near_1,
                far_1,
                begin_1,
                low_1,
                BLOCK_N,
                INTERVALS,
            )
            # Both wgmma of the step before are done: their keys and values may be overwritten.
            more = step + 2 < n_steps
            mbarrier.expect(bar_k.index(slot_k), BLOCK_N * HEAD_DIM * 2, pred=more)
            tma.async_copy_global_to_shared(
                t_key,
                [batch, key_head, start2, 0],
                bar_k.index(slot_k),
                b_keys.index(slot_k),
                pred=more,
            )
            mbarrier.expect(bar_v.index(other), BLOCK_N * HEAD_DIM * 2)
            tma.async_copy_global_to_shared(
                t_value, [batch, key_head, first_key, 0], bar_v.index(other), b_values.index(other)
            )
            mbarrier.wait(bar_k.index(other), ((step + 1) // 2) & 1)
            ahead = warpgroup_mma(
                b_queries, b_keys.index(other).permute((1, 0)), zero, use_acc=False, is_async=True
            )
            mbarrier.wait(bar_v.index(slot_k), (step // 2) & 1)
            running = warpgroup_mma(b_weights, b_values.index(slot_k), b_out, is_async=True)
            scores = warpgroup_mma_wait(1, [ahead])
            scores = masked(
                scores, first, last, o_query, first_key, near, far, FALLING, BLOCK_N, mma_scores
            )
            weights, highest, total, factor = softmax.extend(scores, highest, total, scale, FALLING)
            b_out = warpgroup_mma_wait(0, [running])
            b_out = b_out * gl.convert_layout(factor, gl.SliceLayout(1, mma_out))[:, None]
            b_weights = gl.convert_layout(weights.to(DTYPE), operand)
        final = n_steps - 1
        mbarrier.wait(bar_v.index(final % 2), (final // 2) & 1)
        b_out = warpgroup_mma(b_weights, b_values.index(final % 2), b_out, is_async=True)
        b_out = warpgroup_mma_wait(0, [b_out])

    lse, norm = softmax.finish(highest, total)
    wide: gl.constexpr = gl.BlockedLayout(
        [1, 8], [32 // (HEAD_DIM // 8), HEAD_DIM // 8], [WARPS, 1], [1, 0]
    )
    b_out = b_out * gl.convert_layout(norm, gl.SliceLayout(1, mma_out))[:, None]
    b_final = gl.convert_layout(b_out.to(DTYPE), wide)
    o_row = first + gl.arange(0, BLOCK_M, gl.SliceLayout(1, wide))
    o_dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, wide))
    p_out += batch.to(gl.int64) * out_stride_b + head.to(gl.int64) * out_stride_h
    gl.store(
        p_out + o_row.to(gl.int64)[:, None] * out_stride_t + o_dim[None, :],
        b_final,
        mask=(o_row < n_queries)[:, None],
    )
    p_lse += (batch.to(gl.int64) * n_heads + head) * n_queries
    gl.store(p_lse + o_query, lse, mask=o_query < n_queries)
