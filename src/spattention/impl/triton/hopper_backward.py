# mypy: allow-untyped-defs
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from . import softmax, tiles
from .config import HOPPER_COUNTS


@gluon.jit
def store_block(p_rows, b_rows, first, stride, n_rows, ROWS: gl.constexpr, HEAD_DIM: gl.constexpr):
    WARPS: gl.constexpr = gl.num_warps()
    wide: gl.constexpr = gl.BlockedLayout(
        [1, 8], [32 // (HEAD_DIM // 8), HEAD_DIM // 8], [WARPS, 1], [1, 0]
    )
    b_wide = gl.convert_layout(b_rows.to(p_rows.dtype.element_ty), wide)
    o_row = first + gl.arange(0, ROWS, gl.SliceLayout(1, wide))
    o_dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, wide))
    p_block = p_rows + o_row.to(gl.int64)[:, None] * stride + o_dim[None, :]
    gl.store(p_block, b_wide, mask=(o_row < n_rows)[:, None])


@gluon.jit(do_not_specialize=HOPPER_COUNTS)
def query_gradient_kernel(
    t_query,
    t_key,
    t_value,
    t_d_out,
    p_out,
    p_d_out,
    p_d_query,
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
    d_query_stride_b,
    d_query_stride_h,
    d_query_stride_t,
    n_heads,
    group,
    n_batch,
    n_slots,
    n_queries,
    n_keys,
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
    BYTES: gl.constexpr = 2 * BLOCK_N * HEAD_DIM * 2
    mma_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    mma_out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HEAD_DIM, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma_out, 2)
    shared_k: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, HEAD_DIM], DTYPE)
    shared_q: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, HEAD_DIM], DTYPE)
    per_row: gl.constexpr = gl.SliceLayout(1, mma_scores)
    wide: gl.constexpr = gl.BlockedLayout(
        [1, 8], [32 // (HEAD_DIM // 8), HEAD_DIM // 8], [WARPS, 1], [1, 0]
    )

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
    b_d_outs = gl.allocate_shared_memory(DTYPE, [BLOCK_M, HEAD_DIM], shared_q)
    b_keys = gl.allocate_shared_memory(DTYPE, [2, BLOCK_N, HEAD_DIM], shared_k)
    b_values = gl.allocate_shared_memory(DTYPE, [2, BLOCK_N, HEAD_DIM], shared_k)
    bar_q = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    bar_k = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bar_q, count=1)
    for i in gl.static_range(2):
        mbarrier.init(bar_k.index(i), count=1)
    fence_async_shared()
    if n_steps > 0:
        mbarrier.expect(bar_q, 2 * BLOCK_M * HEAD_DIM * 2)
        tma.async_copy_global_to_shared(t_query, [batch, head, first, 0], bar_q, b_queries)
        tma.async_copy_global_to_shared(t_d_out, [batch, head, first, 0], bar_q, b_d_outs)
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
            mbarrier.expect(bar_k.index(i), BYTES, pred=i < n_steps)
            tma.async_copy_global_to_shared(
                t_key,
                [batch, key_head, start, 0],
                bar_k.index(i),
                b_keys.index(i),
                pred=i < n_steps,
            )
            tma.async_copy_global_to_shared(
                t_value,
                [batch, key_head, start, 0],
                bar_k.index(i),
                b_values.index(i),
                pred=i < n_steps,
            )

    # delta, with 16-byte loads
    batch_64 = batch.to(gl.int64)
    head_64 = head.to(gl.int64)
    row = (batch_64 * n_heads + head_64) * n_queries
    row_pitched = (batch_64 * n_heads + head_64) * pitch
    o_row = first + gl.arange(0, BLOCK_M, gl.SliceLayout(1, wide))
    o_dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, wide))
    m_row = (o_row < n_queries) & (n_steps > 0)
    b_o = gl.load(
        p_out
        + batch_64 * out_stride_b
        + head_64 * out_stride_h
        + o_row.to(gl.int64)[:, None] * out_stride_t
        + o_dim[None, :],
        mask=m_row[:, None],
        other=0.0,
    )
    b_do = gl.load(
        p_d_out
        + batch_64 * d_out_stride_b
        + head_64 * d_out_stride_h
        + o_row.to(gl.int64)[:, None] * d_out_stride_t
        + o_dim[None, :],
        mask=m_row[:, None],
        other=0.0,
    )
    delta_wide = gl.sum(b_o.to(gl.float32) * b_do.to(gl.float32), 1)
    delta = gl.convert_layout(delta_wide, per_row)
    o_query = first + gl.arange(0, BLOCK_M, per_row)
    m_query = o_query < n_queries
    if HAS_D_LSE:
        delta -= gl.load(p_d_lse + row + o_query, mask=m_query, other=0.0)
    base = softmax.base_of(gl.load(p_lse + row + o_query, mask=m_query, other=0.0))
    gl.store(p_delta + row_pitched + o_query, delta, mask=o_query < pitch)
    gl.store(p_base + row_pitched + o_query, base, mask=o_query < pitch)

    b_d_query = warpgroup_mma_init(gl.full([BLOCK_M, HEAD_DIM], 0.0, gl.float32, mma_out))
    zero = gl.full([BLOCK_M, BLOCK_N], 0.0, gl.float32, mma_scores)
    if n_steps > 0:
        mbarrier.wait(bar_q, 0)
    for step in range(n_steps):
        buffer = step % 2
        near, far, first_key, l1 = tiles.step_at(
            step,
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
        n, f, start, l = tiles.step_at(
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
        mbarrier.wait(bar_k.index(buffer), (step // 2) & 1)
        scores = warpgroup_mma(
            b_queries, b_keys.index(buffer).permute((1, 0)), zero, use_acc=False, is_async=True
        )
        d_weights = warpgroup_mma(
            b_d_outs, b_values.index(buffer).permute((1, 0)), zero, use_acc=False, is_async=True
        )
        scores = warpgroup_mma_wait(1, [scores])
        # what the step before used is free
        other = 1 - buffer
        more = (step > 0) & (step + 1 < n_steps)
        mbarrier.expect(bar_k.index(other), BYTES, pred=more)
        tma.async_copy_global_to_shared(
            t_key, [batch, key_head, start, 0], bar_k.index(other), b_keys.index(other), pred=more
        )
        tma.async_copy_global_to_shared(
            t_value,
            [batch, key_head, start, 0],
            bar_k.index(other),
            b_values.index(other),
            pred=more,
        )
        weights = softmax.weights_of(scores, base[:, None], scale)
        if not tiles.is_inside(first, last, first_key, first_key + BLOCK_N - 1, near, far, 0):
            o_key = first_key + gl.arange(0, BLOCK_N, gl.SliceLayout(0, mma_scores))
            o_reach = tiles.reach(o_query, near, far, 0)
            m_seen = tiles.visible(o_query[:, None], o_key[None, :], near, o_reach[:, None])
            weights = gl.where(m_seen, weights, 0.0)
        d_weights = warpgroup_mma_wait(0, [d_weights])
        d_scores = weights * (d_weights - delta[:, None])
        b_d_query = warpgroup_mma(
            gl.convert_layout(d_scores.to(DTYPE), operand),
            b_keys.index(buffer),
            b_d_query,
            is_async=True,
        )
    b_d_query = warpgroup_mma_wait(0, [b_d_query])
    p_d_query += batch_64 * d_query_stride_b + head_64 * d_query_stride_h
    store_block(
        p_d_query,
        b_d_query * (scale * softmax.LN_2),
        first,
        d_query_stride_t,
        n_queries,
        BLOCK_M,
        HEAD_DIM,
    )


@gluon.jit
def fetch_queries(
    t_query,
    t_d_out,
    t_base,
    t_delta,
    batch,
    head,
    row,
    start,
    wanted,
    buffer,
    bar_q,
    b_queries,
    b_d_outs,
    b_bases,
    b_deltas,
    BYTES: gl.constexpr,
):
    """A step's queries, output gradients, bases and deltas, on their way into a buffer."""
    bar = bar_q.index(buffer)
    mbarrier.expect(bar, BYTES, pred=wanted)
    tma.async_copy_global_to_shared(
        t_query, [batch, head, start, 0], bar, b_queries.index(buffer), pred=wanted
    )
    tma.async_copy_global_to_shared(
        t_d_out, [batch, head, start, 0], bar, b_d_outs.index(buffer), pred=wanted
    )
    tma.async_copy_global_to_shared(t_base, [row + start], bar, b_bases.index(buffer), pred=wanted)
    tma.async_copy_global_to_shared(
        t_delta, [row + start], bar, b_deltas.index(buffer), pred=wanted
    )


@gluon.jit(do_not_specialize=HOPPER_COUNTS)
def key_gradient_kernel(
    t_query,
    t_key,
    t_value,
    t_d_out,
    t_base,
    t_delta,
    p_d_key,
    p_d_value,
    p_bands,
    d_key_stride_b,
    d_key_stride_h,
    d_key_stride_t,
    d_value_stride_b,
    d_value_stride_h,
    d_value_stride_t,
    n_heads,
    group,
    n_batch,
    n_slots,
    n_queries,
    n_keys,
    pitch,
    scale,
    HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    INTERVALS: gl.constexpr,
    GROUPED: gl.constexpr,
):
    WARPS: gl.constexpr = gl.num_warps()
    DTYPE: gl.constexpr = t_key.dtype
    BYTES: gl.constexpr = 2 * BLOCK_M * HEAD_DIM * 2 + 2 * BLOCK_M * 4
    mma_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
    mma_out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HEAD_DIM, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma_out, 2)
    shared_k: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, HEAD_DIM], DTYPE)
    shared_q: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, HEAD_DIM], DTYPE)
    shared_row: gl.constexpr = gl.NVMMASharedLayout(0, 32, 1)
    per_query: gl.constexpr = gl.SliceLayout(0, mma_scores)
    per_key: gl.constexpr = gl.SliceLayout(1, mma_scores)

    program = gl.program_id(0)
    slot = program % n_slots
    batch = (program // n_slots) % n_batch
    row_bands = program // n_slots // n_batch * group
    head, near_0, far_0, near_1, far_1 = tiles.bands_of(p_bands, row_bands)
    key_head = head // group
    first_key = slot * BLOCK_N
    last_key = min(first_key + BLOCK_N, n_keys) - 1

    b_key = gl.allocate_shared_memory(DTYPE, [BLOCK_N, HEAD_DIM], shared_k)
    b_value = gl.allocate_shared_memory(DTYPE, [BLOCK_N, HEAD_DIM], shared_k)
    b_queries = gl.allocate_shared_memory(DTYPE, [2, BLOCK_M, HEAD_DIM], shared_q)
    b_d_outs = gl.allocate_shared_memory(DTYPE, [2, BLOCK_M, HEAD_DIM], shared_q)
    b_bases = gl.allocate_shared_memory(gl.float32, [2, BLOCK_M], shared_row)
    b_deltas = gl.allocate_shared_memory(gl.float32, [2, BLOCK_M], shared_row)
    bar_k = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    bar_q = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bar_k, count=1)
    for i in gl.static_range(2):
        mbarrier.init(bar_q.index(i), count=1)
    fence_async_shared()

    b_d_key = gl.full([BLOCK_N, HEAD_DIM], 0.0, gl.float32, mma_out)
    b_d_value = gl.full([BLOCK_N, HEAD_DIM], 0.0, gl.float32, mma_out)
    zero = gl.full([BLOCK_N, BLOCK_M], 0.0, gl.float32, mma_scores)
    o_key = first_key + gl.arange(0, BLOCK_N, per_key)
    # Keys that no query sees are not read; with several members that is too rare to ask.
    wanted = near_0 >= 0
    if not GROUPED:
        _, _, _, _, steps_0, steps_1 = tiles.query_walk(
            near_0, far_0, near_1, far_1, first_key, last_key, 0, n_queries, BLOCK_M, INTERVALS
        )
        wanted = steps_0 + steps_1 > 0
    mbarrier.expect(bar_k, 2 * BLOCK_N * HEAD_DIM * 2, pred=wanted)
    tma.async_copy_global_to_shared(
        t_key, [batch, key_head, first_key, 0], bar_k, b_key, pred=wanted
    )
    tma.async_copy_global_to_shared(
        t_value, [batch, key_head, first_key, 0], bar_k, b_value, pred=wanted
    )
    mbarrier.wait(bar_k, 0, pred=wanted)

    done = 0
    for member in range(group if GROUPED else 1):
        if GROUPED:
            head, near_0, far_0, near_1, far_1 = tiles.bands_of(p_bands, row_bands + member)
        begin_0, high_0, begin_1, high_1, steps_0, steps_1 = tiles.query_walk(
            near_0, far_0, near_1, far_1, first_key, last_key, 0, n_queries, BLOCK_M, INTERVALS
        )
        n_steps = steps_0 + steps_1
        row = (batch * n_heads + head) * pitch
        start = begin_0
        if steps_0 == 0:
            start = begin_1
        fetch_queries(
            t_query,
            t_d_out,
            t_base,
            t_delta,
            batch,
            head,
            row,
            start,
            n_steps > 0,
            done % 2,
            bar_q,
            b_queries,
            b_d_outs,
            b_bases,
            b_deltas,
            BYTES,
        )
        for step in range(n_steps):
            near, far, first, high = tiles.step_at(
                step,
                steps_0,
                near_0,
                far_0,
                begin_0,
                high_0,
                near_1,
                far_1,
                begin_1,
                high_1,
                BLOCK_M,
                INTERVALS,
            )
            n, f, start, l = tiles.step_at(
                step + 1,
                steps_0,
                near_0,
                far_0,
                begin_0,
                high_0,
                near_1,
                far_1,
                begin_1,
                high_1,
                BLOCK_M,
                INTERVALS,
            )
            buffer = (done + step) % 2
            fetch_queries(
                t_query,
                t_d_out,
                t_base,
                t_delta,
                batch,
                head,
                row,
                start,
                step + 1 < n_steps,
                1 - buffer,
                bar_q,
                b_queries,
                b_d_outs,
                b_bases,
                b_deltas,
                BYTES,
            )
            mbarrier.wait(bar_q.index(buffer), ((done + step) // 2) & 1)
            scores = warpgroup_mma(
                b_key, b_queries.index(buffer).permute((1, 0)), zero, use_acc=False, is_async=True
            )
            d_weights = warpgroup_mma(
                b_value, b_d_outs.index(buffer).permute((1, 0)), zero, use_acc=False, is_async=True
            )
            base = b_bases.index(buffer).load(per_query)
            scores = warpgroup_mma_wait(1, [scores])
            weights = softmax.weights_of(scores, base[None, :], scale)
            last = first + BLOCK_M - 1
            inside = tiles.is_inside(first, last, first_key, last_key, near, far, 0)
            if (not inside) | (last >= high):
                o_query = first + gl.arange(0, BLOCK_M, per_query)
                o_reach = tiles.reach(o_query, near, far, 0)
                m_seen = tiles.visible(o_query[None, :], o_key[:, None], near, o_reach[None, :])
                weights = gl.where(m_seen & (o_query < high)[None, :], weights, 0.0)
            b_weights = gl.convert_layout(weights.to(DTYPE), operand)
            b_d_value = warpgroup_mma(b_weights, b_d_outs.index(buffer), b_d_value, is_async=True)
            d_weights = warpgroup_mma_wait(1, [d_weights])
            delta = b_deltas.index(buffer).load(per_query)
            d_scores = weights * (d_weights - delta[None, :])
            b_d_scores = gl.convert_layout(d_scores.to(DTYPE), operand)
            b_d_key = warpgroup_mma(b_d_scores, b_queries.index(buffer), b_d_key, is_async=True)
            b_d_key, b_d_value = warpgroup_mma_wait(0, [b_d_key, b_d_value])
        done += n_steps
    p_d_key += batch.to(gl.int64) * d_key_stride_b + key_head.to(gl.int64) * d_key_stride_h
    p_d_value += batch.to(gl.int64) * d_value_stride_b + key_head.to(gl.int64) * d_value_stride_h
    store_block(
        p_d_key,
        b_d_key * (scale * softmax.LN_2),
        first_key,
        d_key_stride_t,
        n_keys,
        BLOCK_N,
        HEAD_DIM,
    )
    store_block(p_d_value, b_d_value, first_key, d_value_stride_t, n_keys, BLOCK_N, HEAD_DIM)
