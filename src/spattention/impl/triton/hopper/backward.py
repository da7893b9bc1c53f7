# mypy: allow-untyped-defs
"""Backward pass on Hopper: `backward.py` for the calls that `hopper.py` covers, with its legend.

The weights are computed while the tensor cores multiply the output's gradient with the values.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .. import softmax, tiles
from ..config import HOPPER_COUNTS
from . import pipeline as hopper
from .backward_preprocess import EXACT_STEPS, delta_of_keys, rows_of


@gluon.jit
def query_gradient(
    program,
    t_query,
    t_key,
    t_value,
    t_d_out,
    p_out,
    p_lse,
    p_d_lse,
    p_d_query,
    p_base,
    p_delta,
    p_bands,
    out_stride_b,
    out_stride_h,
    out_stride_t,
    d_query_stride_b,
    d_query_stride_h,
    d_query_stride_t,
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
    WITH_ROWS: gl.constexpr,
):
    """dQ of a block; `WITH_ROWS`, also `base` and `delta` of its rows, which else are there."""
    WARPS: gl.constexpr = gl.num_warps()
    DTYPE: gl.constexpr = t_key.dtype
    STEP_BYTES: gl.constexpr = 2 * BLOCK_N * HEAD_DIM * 2
    # [M, N] scores, [M, D] gradient, and the former as the left operand of a product
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HEAD_DIM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    SHARED_Q: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, HEAD_DIM], DTYPE)
    SHARED_K: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, HEAD_DIM], DTYPE)

    place, rank = tiles.turn(program, n_slots, n_batch * n_heads, in_turn)
    batch = place % n_batch
    bands = tiles.bands_of(p_bands, place // n_batch)
    slot = tiles.query_slot(rank, bands[1], n_slots, BLOCK_M)
    head = bands[0]
    key_head = head // group
    first = slot * BLOCK_M
    last = min(first + BLOCK_M, n_queries) - 1
    walk = tiles.key_walk(bands, first, last, 0, n_keys, BLOCK_N, INTERVALS)
    n_steps = tiles.steps_of(walk)
    batch_64 = batch.to(gl.int64)
    head_64 = head.to(gl.int64)
    p_d_query += batch_64 * d_query_stride_b + head_64 * d_query_stride_h
    row_pitched = (batch_64 * n_heads + head_64) * pitch

    o_query = first + gl.arange(0, BLOCK_M, ROW)  # [M]
    m_pitch = o_query < pitch
    if WITH_ROWS:
        row = (batch_64 * n_heads + head_64) * n_queries
        m_query = o_query < n_queries
        base, delta = rows_of(p_lse, p_d_lse, row + o_query, m_query, BLOCK_M, ROW, HAS_D_LSE)
        # Rows up to the pitch are read with the last block of queries: they must hold numbers.
        gl.store(p_base + row_pitched + o_query, base, mask=m_pitch)
    if n_steps == 0:
        if WITH_ROWS:
            gl.store(p_delta + row_pitched + o_query, delta, mask=m_pitch)
        hopper.store_zeros(p_d_query, first, d_query_stride_t, n_queries, BLOCK_M, HEAD_DIM)
        return

    s_query = gl.allocate_shared_memory(DTYPE, [BLOCK_M, HEAD_DIM], SHARED_Q)
    s_d_out = gl.allocate_shared_memory(DTYPE, [BLOCK_M, HEAD_DIM], SHARED_Q)
    s_keys = gl.allocate_shared_memory(DTYPE, [2, BLOCK_N, HEAD_DIM], SHARED_K)
    s_values = gl.allocate_shared_memory(DTYPE, [2, BLOCK_N, HEAD_DIM], SHARED_K)
    query_ready = hopper.barriers(1)
    key_ready = hopper.barriers(2)
    barrier = hopper.expect(query_ready, 0, 2 * BLOCK_M * HEAD_DIM * 2, True)
    hopper.copy(t_query, batch, head, first, barrier, s_query, True)
    hopper.copy(t_d_out, batch, head, first, barrier, s_d_out, True)
    for i in gl.static_range(2):
        first_key, _, _, _ = tiles.step_at(i, walk, bands, BLOCK_N, INTERVALS)
        barrier = hopper.expect(key_ready, i, STEP_BYTES, i < n_steps)
        hopper.copy(t_key, batch, key_head, first_key, barrier, s_keys.index(i), i < n_steps)
        hopper.copy(t_value, batch, key_head, first_key, barrier, s_values.index(i), i < n_steps)

    zeros = gl.full([BLOCK_M, BLOCK_N], 0.0, gl.float32, SCORES)
    if WITH_ROWS:
        p_out += batch_64 * out_stride_b + head_64 * out_stride_h
        b_out = hopper.load_rows(p_out, first, out_stride_t, n_queries, BLOCK_M, HEAD_DIM)
    else:
        gdc_wait()  # for the rows
        base = gl.load(p_base + row_pitched + o_query, mask=m_pitch, other=0.0)  # [M]
        delta = gl.load(p_delta + row_pitched + o_query, mask=m_pitch, other=0.0)  # [M]
    hopper.arrived(query_ready, 0)
    if WITH_ROWS:
        if n_steps > EXACT_STEPS:
            b_d_out = s_d_out.load(hopper.wide_layout(HEAD_DIM, WARPS))
            summed = gl.sum(b_out.to(gl.float32) * b_d_out.to(gl.float32), 1)
            delta += gl.convert_layout(summed, ROW)
        else:
            for step in range(n_steps):
                first_key, _, near, far = tiles.step_at(step, walk, bands, BLOCK_N, INTERVALS)
                hopper.arrived(key_ready, step)
                s_key, s_value = s_keys.index(step).permute((1, 0)), s_values.index(step)
                scores = warpgroup_mma(s_query, s_key, zeros, use_acc=False, is_async=True)
                d_weights = warpgroup_mma(
                    s_d_out, s_value.permute((1, 0)), zeros, use_acc=False, is_async=True
                )
                scores, d_weights = warpgroup_mma_wait(0, [scores, d_weights])
                delta += delta_of_keys(
                    scores, d_weights, o_query, first_key, near, far, base, scale, SCORES
                )
        gl.store(p_delta + row_pitched + o_query, delta, mask=m_pitch)
    b_d_query = warpgroup_mma_init(gl.full([BLOCK_M, HEAD_DIM], 0.0, gl.float32, OUT))
    for step in range(n_steps):
        first_key, _, near, far = tiles.step_at(step, walk, bands, BLOCK_N, INTERVALS)
        next_key, _, _, _ = tiles.step_at(step + 1, walk, bands, BLOCK_N, INTERVALS)
        s_key, s_value = s_keys.index(step % 2), s_values.index(step % 2)
        hopper.arrived(key_ready, step)
        # [M, N] = [M, D] @ [D, N], both
        scores = warpgroup_mma(s_query, s_key.permute((1, 0)), zeros, use_acc=False, is_async=True)
        d_weights = warpgroup_mma(
            s_d_out, s_value.permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        scores = warpgroup_mma_wait(1, [scores])
        # With the scores, every product of the step before is done: its buffers make room.
        more = (step > 0) & (step + 1 < n_steps)
        barrier = hopper.expect(key_ready, step + 1, STEP_BYTES, more)
        hopper.copy(t_key, batch, key_head, next_key, barrier, s_keys.index((step + 1) % 2), more)
        hopper.copy(
            t_value, batch, key_head, next_key, barrier, s_values.index((step + 1) % 2), more
        )

        weights = softmax.weights_of(scores, base[:, None], scale)
        if not tiles.is_inside(first, last, first_key, first_key + BLOCK_N - 1, near, far, 0):
            o_key = first_key + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
            m_seen = hopper.seen(o_query[:, None], o_key[None, :], near, far)
            weights = gl.where(m_seen, weights, 0.0)
        d_weights = warpgroup_mma_wait(0, [d_weights])
        d_scores = weights * (d_weights - delta[:, None])
        # [M, D] += [M, N] @ [N, D]
        b_d_scores = gl.convert_layout(d_scores.to(DTYPE), OPERAND)
        b_d_query = warpgroup_mma(b_d_scores, s_key, b_d_query, is_async=True)

    b_d_query = warpgroup_mma_wait(0, [b_d_query]) * softmax.natural(scale)
    hopper.store_rows(p_d_query, b_d_query, first, d_query_stride_t, n_queries, BLOCK_M, HEAD_DIM)
    hopper.retire(query_ready)
    hopper.retire(key_ready)


@gluon.jit
def fetch(
    t_query,
    t_d_out,
    t_base,
    t_delta,
    batch,
    head,
    row,
    start,
    s_queries,
    s_d_outs,
    s_bases,
    s_deltas,
    query_ready,
    n,
    wanted,
    STEP_BYTES: gl.constexpr,
):
    """A block of queries with what belongs to it, on its way into the ring as block `n`."""
    barrier = hopper.expect(query_ready, n, STEP_BYTES, wanted)
    hopper.copy(t_query, batch, head, start, barrier, s_queries.index(n % 2), wanted)
    hopper.copy(t_d_out, batch, head, start, barrier, s_d_outs.index(n % 2), wanted)
    hopper.copy_vector(t_base, row + start, barrier, s_bases.index(n % 2), wanted)
    hopper.copy_vector(t_delta, row + start, barrier, s_deltas.index(n % 2), wanted)


@gluon.jit
def key_gradient(
    program,
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
    in_turn,
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
    STEP_BYTES: gl.constexpr = 2 * BLOCK_M * HEAD_DIM * 2 + 2 * BLOCK_M * 4
    # [N, M] transposed scores, [N, D] gradients, and the former as the left operand of a product
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HEAD_DIM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    QUERIES: gl.constexpr = gl.SliceLayout(0, SCORES)
    SHARED_K: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, HEAD_DIM], DTYPE)
    SHARED_Q: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, HEAD_DIM], DTYPE)
    SHARED_ROWS: gl.constexpr = gl.NVMMASharedLayout(0, 32, 1)

    place, rank = tiles.turn(program, n_slots, n_batch * (n_heads // group), in_turn)
    batch = place % n_batch
    row_bands = place // n_batch * group
    bands = tiles.bands_of(p_bands, row_bands)
    slot = tiles.key_slot(rank, bands[1], n_slots, n_queries, BLOCK_N)
    head = bands[0]
    key_head = head // group
    first_key = slot * BLOCK_N
    last_key = min(first_key + BLOCK_N, n_keys) - 1
    o_key = first_key + gl.arange(0, BLOCK_N, gl.SliceLayout(1, SCORES))  # [N]

    p_d_key += batch.to(gl.int64) * d_key_stride_b + key_head.to(gl.int64) * d_key_stride_h
    p_d_value += batch.to(gl.int64) * d_value_stride_b + key_head.to(gl.int64) * d_value_stride_h
    if not GROUPED:  # with several members, keys that no query sees are too rare to ask
        walk = tiles.query_walk(bands, first_key, last_key, 0, n_queries, BLOCK_M, INTERVALS)
        if tiles.steps_of(walk) == 0:
            hopper.store_zeros(p_d_key, first_key, d_key_stride_t, n_keys, BLOCK_N, HEAD_DIM)
            hopper.store_zeros(p_d_value, first_key, d_value_stride_t, n_keys, BLOCK_N, HEAD_DIM)
            return

    s_key = gl.allocate_shared_memory(DTYPE, [BLOCK_N, HEAD_DIM], SHARED_K)
    s_value = gl.allocate_shared_memory(DTYPE, [BLOCK_N, HEAD_DIM], SHARED_K)
    s_queries = gl.allocate_shared_memory(DTYPE, [2, BLOCK_M, HEAD_DIM], SHARED_Q)
    s_d_outs = gl.allocate_shared_memory(DTYPE, [2, BLOCK_M, HEAD_DIM], SHARED_Q)
    s_bases = gl.allocate_shared_memory(gl.float32, [2, BLOCK_M], SHARED_ROWS)
    s_deltas = gl.allocate_shared_memory(gl.float32, [2, BLOCK_M], SHARED_ROWS)
    key_ready = hopper.barriers(1)
    query_ready = hopper.barriers(2)

    barrier = hopper.expect(key_ready, 0, 2 * BLOCK_N * HEAD_DIM * 2, True)
    hopper.copy(t_key, batch, key_head, first_key, barrier, s_key, True)
    hopper.copy(t_value, batch, key_head, first_key, barrier, s_value, True)

    b_d_key = gl.full([BLOCK_N, HEAD_DIM], 0.0, gl.float32, OUT)
    b_d_value = gl.full([BLOCK_N, HEAD_DIM], 0.0, gl.float32, OUT)
    zeros = gl.full([BLOCK_N, BLOCK_M], 0.0, gl.float32, SCORES)
    nearest = bands[1]
    done = 0  # blocks of queries behind us, over all members
    gdc_wait()  # for the rows
    for member in range(group if GROUPED else 1):
        if GROUPED:
            bands = tiles.bands_of(p_bands, row_bands + member)
            head = bands[0]
            nearest = min(nearest, bands[1])
        walk = tiles.query_walk(bands, first_key, last_key, 0, n_queries, BLOCK_M, INTERVALS)
        n_steps = tiles.steps_of(walk)
        row = (batch * n_heads + head) * pitch
        start, _, _, _ = tiles.step_at(0, walk, bands, BLOCK_M, INTERVALS)
        fetch(
            t_query,
            t_d_out,
            t_base,
            t_delta,
            batch,
            head,
            row,
            start,
            s_queries,
            s_d_outs,
            s_bases,
            s_deltas,
            query_ready,
            done,
            n_steps > 0,
            STEP_BYTES,
        )
        if member == 0:
            hopper.arrived(key_ready, 0)
        for step in range(n_steps):
            # All products of the step before are done: its buffers make room.
            n = done + step
            first, high, near, far = tiles.step_at(step, walk, bands, BLOCK_M, INTERVALS)
            start, _, _, _ = tiles.step_at(step + 1, walk, bands, BLOCK_M, INTERVALS)
            fetch(
                t_query,
                t_d_out,
                t_base,
                t_delta,
                batch,
                head,
                row,
                start,
                s_queries,
                s_d_outs,
                s_bases,
                s_deltas,
                query_ready,
                n + 1,
                step + 1 < n_steps,
                STEP_BYTES,
            )
            s_query, s_d_out = s_queries.index(n % 2), s_d_outs.index(n % 2)
            hopper.arrived(query_ready, n)
            # [N, M] = [N, D] @ [D, M], both
            scores = warpgroup_mma(
                s_key, s_query.permute((1, 0)), zeros, use_acc=False, is_async=True
            )
            d_weights = warpgroup_mma(
                s_value, s_d_out.permute((1, 0)), zeros, use_acc=False, is_async=True
            )
            base = s_bases.index(n % 2).load(QUERIES)  # [M]
            scores = warpgroup_mma_wait(1, [scores])
            weights = softmax.weights_of(scores, base[None, :], scale)
            last = first + BLOCK_M - 1
            inside = tiles.is_inside(first, last, first_key, last_key, near, far, 0)
            # What lies behind the range belongs to other rows, or is zero and would weigh 1.
            if (not inside) | (last >= high):
                o_query = first + gl.arange(0, BLOCK_M, QUERIES)  # [M]
                m_seen = hopper.seen(o_query[None, :], o_key[:, None], near, far)
                weights = gl.where(m_seen & (o_query < high)[None, :], weights, 0.0)
            # [N, D] += [N, M] @ [M, D], both
            b_weights = gl.convert_layout(weights.to(DTYPE), OPERAND)
            b_d_value = warpgroup_mma(b_weights, s_d_out, b_d_value, is_async=True)
            d_weights = warpgroup_mma_wait(1, [d_weights])
            delta = s_deltas.index(n % 2).load(QUERIES)  # [M]
            d_scores = weights * (d_weights - delta[None, :])
            b_d_scores = gl.convert_layout(d_scores.to(DTYPE), OPERAND)
            b_d_key = warpgroup_mma(b_d_scores, s_query, b_d_key, is_async=True)
            b_d_key, b_d_value = warpgroup_mma_wait(0, [b_d_key, b_d_value])
        done += n_steps

    # A key that no query sees may hold anything; its gradient is zero.
    m_key = first_key + gl.arange(0, BLOCK_N, gl.SliceLayout(1, OUT)) + nearest < n_queries
    b_d_key = gl.where(m_key[:, None], b_d_key * softmax.natural(scale), 0.0)
    hopper.store_rows(p_d_key, b_d_key, first_key, d_key_stride_t, n_keys, BLOCK_N, HEAD_DIM)
    hopper.store_rows(p_d_value, b_d_value, first_key, d_value_stride_t, n_keys, BLOCK_N, HEAD_DIM)
    hopper.retire(key_ready)
    hopper.retire(query_ready)


@gluon.jit(do_not_specialize=HOPPER_COUNTS)
def gradient_kernel(
    t_query,
    t_key,
    t_value,
    t_d_out,
    t_base,
    t_delta,
    p_out,
    p_lse,
    p_d_lse,
    p_base,
    p_delta,
    p_d_query,
    p_d_key,
    p_d_value,
    p_bands,
    out_stride_b,
    out_stride_h,
    out_stride_t,
    d_query_stride_b,
    d_query_stride_h,
    d_query_stride_t,
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
    in_turn,
    pitch,
    n_key_slots,
    key_programs,
    scale,
    HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    INTERVALS: gl.constexpr,
    GROUPED: gl.constexpr,
    HAS_D_LSE: gl.constexpr,
    WITH_ROWS: gl.constexpr,
):
    """dK and dV by the first `key_programs`, the longer blocks, then dQ: each fills the other's
    tail. `WITH_ROWS`, dQ alone, with what a launch of dK and dV reads.
    """
    program = gl.program_id(0)
    if WITH_ROWS:
        gdc_wait()
        gdc_launch_dependents()
    elif program == 0:
        gdc_wait()  # even without work: this kernel must not end before the one ahead of it
    if not WITH_ROWS and program < key_programs:
        key_gradient(
            program,
            t_query,
            t_key,
            t_value,
            t_d_out,
            t_base,
            t_delta,
            p_d_key,
            p_d_value,
            p_bands + 8 * n_heads,
            d_key_stride_b,
            d_key_stride_h,
            d_key_stride_t,
            d_value_stride_b,
            d_value_stride_h,
            d_value_stride_t,
            n_heads,
            group,
            n_batch,
            n_key_slots,
            n_queries,
            n_keys,
            in_turn,
            pitch,
            scale,
            HEAD_DIM,
            BLOCK_M,
            BLOCK_N,
            INTERVALS,
            GROUPED,
        )
        return
    query_gradient(
        program - key_programs,
        t_query,
        t_key,
        t_value,
        t_d_out,
        p_out,
        p_lse,
        p_d_lse,
        p_d_query,
        p_base,
        p_delta,
        p_bands,
        out_stride_b,
        out_stride_h,
        out_stride_t,
        d_query_stride_b,
        d_query_stride_h,
        d_query_stride_t,
        n_heads,
        group,
        n_batch,
        n_slots,
        n_queries,
        n_keys,
        in_turn,
        pitch,
        scale,
        HEAD_DIM,
        BLOCK_M,
        BLOCK_N,
        INTERVALS,
        HAS_D_LSE,
        WITH_ROWS,
    )
