# mypy: allow-untyped-defs
"""Backward pass on Hopper, with the legend of `pipeline.py`.

The probabilities are computed while the tensor cores multiply the output's gradient with the
values.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .. import scheduler, softmax, tiles
from . import arguments, memory, pipeline, prefix
from .backward_preprocess import KeyRing, delta_of_step, init_stats


class Descriptors(NamedTuple):
    """Tensor descriptors of the inputs."""

    query: Any
    key: Any
    value: Any
    d_out: Any
    lse_log2: Any
    delta: Any


class QueryRing(NamedTuple):
    """Two buffers of queries and what belongs to them, and the barriers of their copies."""

    queries: Any
    d_outs: Any
    lses: Any
    deltas: Any
    full: Any


@gluon.jit
def query_gradient(
    program,
    inputs,
    out,
    d_query,
    stats,
    p_bands,
    positions,
    counts,
    scale,
    FORM: gl.constexpr,
):
    """dQ of a block. If `FORM.COMPUTE_DELTA`, compute `lse_log2` and `delta` of its rows too, else
    read them.
    """
    BLOCK_M: gl.constexpr = FORM.BLOCK_M
    BLOCK_N: gl.constexpr = FORM.BLOCK_N
    HEAD_DIM: gl.constexpr = FORM.HEAD_DIM
    WARPS: gl.constexpr = gl.num_warps()
    DTYPE: gl.constexpr = inputs.key.dtype
    STEP_BYTES: gl.constexpr = 2 * BLOCK_N * HEAD_DIM * 2
    FIRST: gl.constexpr = 1 if prefix.is_narrow(FORM) else 0  # step after that of the prefix
    # [M, N] scores, [M, D] gradient, and the former as the left operand of a product
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HEAD_DIM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    SHARED_Q: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, HEAD_DIM], DTYPE)
    SHARED_K: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, HEAD_DIM], DTYPE)

    n_batch, n_heads, n_blocks = counts.n_batch, counts.n_heads, counts.n_query_blocks
    n_queries, pitch = counts.n_queries, counts.pitch
    head_batch, rank = scheduler.work_tile(program, n_blocks, n_batch * n_heads, counts.order)
    batch = head_batch % n_batch
    bands = tiles.load_bands(p_bands, head_batch // n_batch)
    slot = arguments.query_block(rank, bands, n_blocks, BLOCK_M, FORM)
    tile = arguments.query_tile(batch, bands, slot, positions, counts, BLOCK_M, FORM)
    first_query, first, last, keys = tile.first_query, tile.first, tile.last, tile.keys
    offset_q, offset_k = tile.offset_q, tile.offset_k
    head = bands.head
    key_head = head // counts.group
    n_steps = tiles.total_blocks(keys)
    batch_64 = batch.to(gl.int64)
    head_64 = head.to(gl.int64)
    p_d_query = d_query.pointer + batch_64 * d_query.stride_b + head_64 * d_query.stride_h
    row_pitched = (batch_64 * n_heads + head_64) * pitch + offset_q
    row = (batch_64 * n_heads + head_64) * n_queries + offset_q
    if FORM.PACKED:
        n_queries, pitch = tile.n_queries, tile.n_queries
        if first_query >= n_queries:
            return
        p_d_query += offset_q.to(gl.int64) * d_query.stride_t

    o_query = first_query + gl.arange(0, BLOCK_M, ROW)  # [M]
    o_position = first + gl.arange(0, BLOCK_M, ROW)  # [M]
    m_pitch = o_query < pitch
    if FORM.COMPUTE_DELTA:
        m_query = o_query < n_queries
        lse_log2, delta = init_stats(stats, row + o_query, m_query, BLOCK_M, ROW, FORM.HAS_D_LSE)
        # Rows up to the pitch are read with the last block of queries: they must hold numbers.
        gl.store(stats.lse_log2 + row_pitched + o_query, lse_log2, mask=m_pitch)
    if n_steps == 0:
        if FORM.COMPUTE_DELTA:
            gl.store(stats.delta + row_pitched + o_query, delta, mask=m_pitch)
        memory.store_zeros(p_d_query, first_query, d_query.stride_t, n_queries, BLOCK_M, HEAD_DIM)
        return
    # Otherwise Triton 3.9 keeps a path around the main loop, and ptxas then serialises every wgmma.
    gl.assume(n_steps > 0)

    s_query = gl.allocate_shared_memory(DTYPE, [BLOCK_M, HEAD_DIM], SHARED_Q)
    s_d_out = gl.allocate_shared_memory(DTYPE, [BLOCK_M, HEAD_DIM], SHARED_Q)
    s_keys = gl.allocate_shared_memory(DTYPE, [2, BLOCK_N, HEAD_DIM], SHARED_K)
    s_values = gl.allocate_shared_memory(DTYPE, [2, BLOCK_N, HEAD_DIM], SHARED_K)
    query_full = pipeline.allocate_barriers(1)
    key_full = pipeline.allocate_barriers(2)
    barrier = pipeline.expect_tx(query_full, 0, 2 * BLOCK_M * HEAD_DIM * 2, True)
    first_row = offset_q + first_query
    pipeline.copy_tokens(inputs.query, batch, head, first_row, barrier, s_query, True)
    pipeline.copy_tokens(inputs.d_out, batch, head, first_row, barrier, s_d_out, True)
    for i in gl.static_range(2):
        start = tiles.block_at(i, keys, bands, BLOCK_N, FORM.INTERVALS, FORM.PREFIX).start
        start += offset_k
        barrier = pipeline.expect_tx(key_full, i, STEP_BYTES, i < n_steps)
        s_first_key, s_first_value = s_keys.index(i), s_values.index(i)
        pipeline.copy_tokens(inputs.key, batch, key_head, start, barrier, s_first_key, i < n_steps)
        pipeline.copy_tokens(
            inputs.value, batch, key_head, start, barrier, s_first_value, i < n_steps
        )

    zeros = gl.full([BLOCK_M, BLOCK_N], 0.0, gl.float32, SCORES)
    if FORM.COMPUTE_DELTA:
        p_out = out.pointer + batch_64 * out.stride_b + head_64 * out.stride_h
        if FORM.PACKED:
            p_out += offset_q.to(gl.int64) * out.stride_t
        end = gl.where(n_steps > FORM.EXACT_STEPS, n_queries, 0)  # else it is not needed
        b_out = memory.load_tokens(p_out, first_query, out.stride_t, end, BLOCK_M, HEAD_DIM)
    else:
        gdc_wait()  # for the preprocess kernel
        lse_log2 = gl.load(stats.lse_log2 + row_pitched + o_query, mask=m_pitch, other=0.0)  # [M]
        delta = gl.load(stats.delta + row_pitched + o_query, mask=m_pitch, other=0.0)  # [M]
    pipeline.consumer_wait(query_full, 0)
    if FIRST > 0:
        pipeline.consumer_wait(key_full, 0)
        of_prefix = prefix.recompute(
            s_query, s_d_out, s_keys.index(0), s_values.index(0), tile, lse_log2, scale, FORM
        )
    if FORM.COMPUTE_DELTA:
        if n_steps > FORM.EXACT_STEPS:
            b_d_out = s_d_out.load(memory.wide_layout(HEAD_DIM, WARPS))
            summed = gl.sum(b_out.to(gl.float32) * b_d_out.to(gl.float32), 1)
            delta += gl.convert_layout(summed, ROW)
        else:
            if FIRST > 0:
                delta += gl.convert_layout(gl.sum(of_prefix.p * of_prefix.d_p, 1), ROW)
            ring = KeyRing(s_keys, s_values, key_full)
            for step in range(FIRST, n_steps):
                delta += delta_of_step(step, s_query, s_d_out, ring, tile, lse_log2, scale, FORM)
        gl.store(stats.delta + row_pitched + o_query, delta, mask=m_pitch)
    b_d_query = gl.full([BLOCK_M, HEAD_DIM], 0.0, gl.float32, OUT)
    if FIRST > 0:
        p_part = prefix.part_of(stats.part, tile, n_heads, n_blocks, FORM)
        b_d_query = prefix.gradients(
            s_query, s_d_out, s_keys.index(0), of_prefix, delta, b_d_query, p_part, FORM
        )
    b_d_query = warpgroup_mma_init(b_d_query)
    for step in range(FIRST, n_steps):
        key_block = tiles.block_at(step, keys, bands, BLOCK_N, FORM.INTERVALS, FORM.PREFIX)
        first_key, near, far = key_block.start, key_block.near, key_block.far
        start = tiles.block_at(step + 1, keys, bands, BLOCK_N, FORM.INTERVALS, FORM.PREFIX).start
        start += offset_k
        s_key, s_value = s_keys.index(step % 2), s_values.index(step % 2)
        pipeline.consumer_wait(key_full, step)
        if arguments.is_bounded(FORM):
            arguments.zero_unseen(tile, key_block, s_key, FORM)
            arguments.zero_unseen(tile, key_block, s_value, FORM)
        # [M, N] = [M, D] @ [D, N], both
        scores = warpgroup_mma(s_query, s_key.permute((1, 0)), zeros, use_acc=False, is_async=True)
        d_p = warpgroup_mma(s_d_out, s_value.permute((1, 0)), zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(1, [scores])
        # With the scores, every product of the step before is done: its buffers are free.
        more = (step > 0) & (step + 1 < n_steps)
        barrier = pipeline.expect_tx(key_full, step + 1, STEP_BYTES, more)
        s_next_key, s_next_value = s_keys.index((step + 1) % 2), s_values.index((step + 1) % 2)
        pipeline.copy_tokens(inputs.key, batch, key_head, start, barrier, s_next_key, more)
        pipeline.copy_tokens(inputs.value, batch, key_head, start, barrier, s_next_value, more)

        p = softmax.recompute(scores, lse_log2[:, None], scale)
        if not tiles.is_inside(
            first, last, first_key, first_key + BLOCK_N - 1, near, far, FORM.PREFIX
        ):
            o_key = first_key + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
            m_seen = arguments.visible(o_position[:, None], o_key[None, :], near, far, FORM.PREFIX)
            p = gl.where(m_seen, p, 0.0)
        d_p = warpgroup_mma_wait(0, [d_p])
        d_scores = p * (d_p - delta[:, None])
        # [M, D] += [M, N] @ [N, D]
        b_d_scores = gl.convert_layout(d_scores.to(DTYPE), OPERAND)
        b_d_query = warpgroup_mma(b_d_scores, s_key, b_d_query, is_async=True)

    b_d_query = warpgroup_mma_wait(0, [b_d_query]) * softmax.natural(scale)
    memory.store_tokens(
        p_d_query, b_d_query, first_query, d_query.stride_t, n_queries, BLOCK_M, HEAD_DIM
    )
    pipeline.invalidate(query_full)
    pipeline.invalidate(key_full)


@gluon.jit
def fetch_queries(inputs, batch, head, offset, row, start, ring, n, pred, STEP_BYTES: gl.constexpr):
    """Start to copy a block of queries, and what belongs to it, into the ring as block `n`.

    Its first query is `start` in a sequence that starts at `offset` of the batch entry, whose
    statistics start at `row`.
    """
    start += offset
    barrier = pipeline.expect_tx(ring.full, n, STEP_BYTES, pred)
    pipeline.copy_tokens(inputs.query, batch, head, start, barrier, ring.queries.index(n % 2), pred)
    pipeline.copy_tokens(inputs.d_out, batch, head, start, barrier, ring.d_outs.index(n % 2), pred)
    pipeline.copy_vector(inputs.lse_log2, row + start, barrier, ring.lses.index(n % 2), pred)
    pipeline.copy_vector(inputs.delta, row + start, barrier, ring.deltas.index(n % 2), pred)


@gluon.jit
def key_gradient(
    program,
    inputs,
    d_key,
    d_value,
    p_bands,
    positions,
    counts,
    scale,
    FORM: gl.constexpr,
):
    """dK and dV of a block, without what the prefix adds (`portable/prefix_gradient.py`)."""
    BLOCK_M: gl.constexpr = FORM.BLOCK_M
    BLOCK_N: gl.constexpr = FORM.BLOCK_N
    HEAD_DIM: gl.constexpr = FORM.HEAD_DIM
    WARPS: gl.constexpr = gl.num_warps()
    DTYPE: gl.constexpr = inputs.key.dtype
    STEP_BYTES: gl.constexpr = 2 * BLOCK_M * HEAD_DIM * 2 + 2 * BLOCK_M * 4
    # [N, M] transposed scores, [N, D] gradients, and the former as the left operand of a product
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HEAD_DIM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    QUERIES: gl.constexpr = gl.SliceLayout(0, SCORES)
    SHARED_K: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, HEAD_DIM], DTYPE)
    SHARED_Q: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, HEAD_DIM], DTYPE)
    SHARED_STATS: gl.constexpr = gl.NVMMASharedLayout(0, 32, 1)
    BOUNDED: gl.constexpr = arguments.is_bounded(FORM)

    n_batch, n_heads, n_blocks = counts.n_batch, counts.n_heads, counts.n_key_blocks
    n_queries, n_keys = counts.n_queries, counts.n_keys
    head_batch, rank = scheduler.work_tile(
        program, n_blocks, n_batch * (n_heads // counts.group), counts.order
    )
    batch = head_batch % n_batch
    entry = head_batch // n_batch * counts.group
    bands = tiles.load_bands(p_bands, entry)
    slot = rank  # documents have no order
    if not FORM.PACKED:
        slot = scheduler.key_block(rank, bands.near_0, n_blocks, n_queries, BLOCK_N)
    head = bands.head
    key_head = head // counts.group
    sequence = arguments.sequence_at(positions, counts, n_blocks, slot, batch, BLOCK_N, True, FORM)
    offset_q, offset_k, query_start = sequence.offset_q, sequence.offset_k, sequence.start
    n_queries, n_keys = sequence.n_queries, sequence.n_keys
    first_key = sequence.block * BLOCK_N
    if FORM.HAS_KEY_START:
        first_key -= offset_k  # negative in the padding
    if FORM.PACKED:
        first_key -= arguments.shift_of_keys(sequence, BLOCK_N)
    if FORM.PACKED:
        if first_key >= n_keys:
            return
    last_key = min(first_key + BLOCK_N, n_keys) - 1
    if FORM.HAS_KEY_START:
        n_queries = gl.where(last_key < 0, 0, n_queries)
    o_key = first_key + gl.arange(0, BLOCK_N, gl.SliceLayout(1, SCORES))  # [N]

    batch_64, key_head_64 = batch.to(gl.int64), key_head.to(gl.int64)
    p_d_key = d_key.pointer + batch_64 * d_key.stride_b + key_head_64 * d_key.stride_h
    p_d_value = d_value.pointer + batch_64 * d_value.stride_b + key_head_64 * d_value.stride_h
    if BOUNDED:
        p_d_key += offset_k.to(gl.int64) * d_key.stride_t
        p_d_value += offset_k.to(gl.int64) * d_value.stride_t
    if not FORM.GROUPED:  # in a group, keys that no query sees are too rare to test for
        queries = tiles.query_blocks(
            bands, first_key, last_key, query_start, n_queries, BLOCK_M, FORM.INTERVALS, offset_q
        )
        if tiles.total_blocks(queries) == 0:
            memory.store_zeros(
                p_d_key, first_key, d_key.stride_t, n_keys, BLOCK_N, HEAD_DIM, FORM.PACKED
            )
            memory.store_zeros(
                p_d_value, first_key, d_value.stride_t, n_keys, BLOCK_N, HEAD_DIM, FORM.PACKED
            )
            return

    s_key = gl.allocate_shared_memory(DTYPE, [BLOCK_N, HEAD_DIM], SHARED_K)
    s_value = gl.allocate_shared_memory(DTYPE, [BLOCK_N, HEAD_DIM], SHARED_K)
    s_queries = gl.allocate_shared_memory(DTYPE, [2, BLOCK_M, HEAD_DIM], SHARED_Q)
    s_d_outs = gl.allocate_shared_memory(DTYPE, [2, BLOCK_M, HEAD_DIM], SHARED_Q)
    s_lses = gl.allocate_shared_memory(gl.float32, [2, BLOCK_M], SHARED_STATS)
    s_deltas = gl.allocate_shared_memory(gl.float32, [2, BLOCK_M], SHARED_STATS)
    key_full = pipeline.allocate_barriers(1)
    query_full = pipeline.allocate_barriers(2)
    ring = QueryRing(s_queries, s_d_outs, s_lses, s_deltas, query_full)

    barrier = pipeline.expect_tx(key_full, 0, 2 * BLOCK_N * HEAD_DIM * 2, True)
    first_row = offset_k + first_key
    pipeline.copy_tokens(inputs.key, batch, key_head, first_row, barrier, s_key, True)
    pipeline.copy_tokens(inputs.value, batch, key_head, first_row, barrier, s_value, True)

    b_d_key = gl.full([BLOCK_N, HEAD_DIM], 0.0, gl.float32, OUT)
    b_d_value = gl.full([BLOCK_N, HEAD_DIM], 0.0, gl.float32, OUT)
    zeros = gl.full([BLOCK_N, BLOCK_M], 0.0, gl.float32, SCORES)
    nearest = bands.near_0
    lowest = max(-query_start, 0)  # first query after a padding
    done = 0  # blocks of queries before those of this member
    gdc_wait()  # for the kernel that writes lse_log2 and delta
    for member in range(counts.group if FORM.GROUPED else 1):
        if FORM.GROUPED:
            bands = tiles.load_bands(p_bands, entry + member)
            head = bands.head
            nearest = min(nearest, bands.near_0)
        queries = tiles.query_blocks(
            bands, first_key, last_key, query_start, n_queries, BLOCK_M, FORM.INTERVALS, offset_q
        )
        n_steps = tiles.total_blocks(queries)
        row = (batch * n_heads + head) * counts.pitch
        start = tiles.block_at(0, queries, bands, BLOCK_M, FORM.INTERVALS).start
        fetch_queries(
            inputs, batch, head, offset_q, row, start, ring, done, n_steps > 0, STEP_BYTES
        )
        if member == 0:
            pipeline.consumer_wait(key_full, 0)
        for step in range(n_steps):
            # All products of the step before are done: its buffers are free.
            n = done + step
            first, high, near, far = tiles.block_at(step, queries, bands, BLOCK_M, FORM.INTERVALS)
            start = tiles.block_at(step + 1, queries, bands, BLOCK_M, FORM.INTERVALS).start
            more = step + 1 < n_steps
            fetch_queries(inputs, batch, head, offset_q, row, start, ring, n + 1, more, STEP_BYTES)
            s_query, s_d_out = s_queries.index(n % 2), s_d_outs.index(n % 2)
            pipeline.consumer_wait(query_full, n)
            if BOUNDED:
                if (first < lowest) | (first + BLOCK_M > n_queries):
                    memory.zero_outside(s_query, first, lowest, n_queries)
                    memory.zero_outside(s_d_out, first, lowest, n_queries)
            # [N, M] = [N, D] @ [D, M], both
            scores = warpgroup_mma(
                s_key, s_query.permute((1, 0)), zeros, use_acc=False, is_async=True
            )
            d_p = warpgroup_mma(
                s_value, s_d_out.permute((1, 0)), zeros, use_acc=False, is_async=True
            )
            lse_log2 = s_lses.index(n % 2).load(QUERIES)  # [M]
            scores = warpgroup_mma_wait(1, [scores])
            p = softmax.recompute(scores, lse_log2[None, :], scale)
            last = first + BLOCK_M - 1
            position = query_start + first
            inside = tiles.is_inside(
                position, position + BLOCK_M - 1, first_key, last_key, near, far, FORM.PREFIX
            )
            # Rows after the end of the range belong to another head, or are zero and would get the
            # probability 1.
            masked = (not inside) | (last >= high)
            if BOUNDED:
                masked = masked | (first < lowest)
            if masked:
                o_query = first + gl.arange(0, BLOCK_M, QUERIES)  # [M]
                o_position = query_start + o_query
                m_seen = arguments.visible(
                    o_position[None, :], o_key[:, None], near, far, FORM.PREFIX
                )
                m_query = o_query < high
                if BOUNDED:
                    m_query = m_query & (o_query >= lowest)
                p = gl.where(m_seen & m_query[None, :], p, 0.0)
            # [N, D] += [N, M] @ [M, D], both
            b_p = gl.convert_layout(p.to(DTYPE), OPERAND)
            b_d_value = warpgroup_mma(b_p, s_d_out, b_d_value, is_async=True)
            d_p = warpgroup_mma_wait(1, [d_p])
            delta = s_deltas.index(n % 2).load(QUERIES)  # [M]
            d_scores = p * (d_p - delta[None, :])
            if BOUNDED:
                if masked:  # what is not seen may be NaN
                    d_scores = gl.where(p == 0.0, 0.0, d_scores)
            b_d_scores = gl.convert_layout(d_scores.to(DTYPE), OPERAND)
            b_d_key = warpgroup_mma(b_d_scores, s_query, b_d_key, is_async=True)
            b_d_key, b_d_value = warpgroup_mma_wait(0, [b_d_key, b_d_value])
        done += n_steps

    # A key that no query sees may hold anything; its gradient is zero.
    o_key = first_key + gl.arange(0, BLOCK_N, gl.SliceLayout(1, OUT))  # [N]
    m_key = o_key + nearest < query_start + n_queries
    if FORM.HAS_KEY_START:
        m_key = m_key & (o_key >= 0)
        b_d_value = gl.where(m_key[:, None], b_d_value, 0.0)
    b_d_key = gl.where(m_key[:, None], b_d_key * softmax.natural(scale), 0.0)
    memory.store_tokens(
        p_d_key, b_d_key, first_key, d_key.stride_t, n_keys, BLOCK_N, HEAD_DIM, FORM.PACKED
    )
    memory.store_tokens(
        p_d_value, b_d_value, first_key, d_value.stride_t, n_keys, BLOCK_N, HEAD_DIM, FORM.PACKED
    )
    pipeline.invalidate(key_full)
    pipeline.invalidate(query_full)


@gluon.jit(do_not_specialize=arguments.BackwardCounts._fields)
def backward_kernel(
    t_query,
    t_key,
    t_value,
    t_d_out,
    t_lse_log2,
    t_delta,
    out,
    d_query,
    d_key,
    d_value,
    stats,
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
    """dK and dV by the first `key_programs` programs, the longer blocks, then dQ: each fills the
    other's tail. If `FORM.COMPUTE_DELTA`, dQ alone, with what a later launch of dK and dV reads.
    """
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
    inputs = Descriptors(t_query, t_key, t_value, t_d_out, t_lse_log2, t_delta)
    program = gl.program_id(0)
    if FORM.COMPUTE_DELTA:
        gdc_wait()
        gdc_launch_dependents()
    elif program == 0:
        gdc_wait()  # even without work: this kernel must not end before the previous one
    if not FORM.COMPUTE_DELTA and program < counts.key_programs:
        key_gradient(
            program,
            inputs,
            d_key,
            d_value,
            p_bands + 8 * counts.n_heads,
            positions,
            counts,
            scale,
            FORM,
        )
        return
    query_gradient(
        program - counts.key_programs,
        inputs,
        out,
        d_query,
        stats,
        p_bands,
        positions,
        counts,
        scale,
        FORM,
    )
