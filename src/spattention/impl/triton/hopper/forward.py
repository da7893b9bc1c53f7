# mypy: allow-untyped-defs
"""Forward pass on Hopper: `forward.py` for the calls that `hopper.py` covers, with its legend.

While the tensor cores add the values of one block of keys, the softmax of the next block's scores
is computed.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .. import softmax, tiles
from ..config import HOPPER_COUNTS
from . import pipeline as hopper


@gluon.jit
def masked(
    scores,
    first,
    last,
    o_query,
    first_key,
    near,
    far,
    BLOCK_N: gl.constexpr,
    LAYOUT: gl.constexpr,
    FALLING: gl.constexpr,
):
    """Scores `[M, N]`, with -inf (+inf where `FALLING`) for the keys that a query does not see."""
    if not tiles.is_inside(first, last, first_key, first_key + BLOCK_N - 1, near, far, 0):
        o_key = first_key + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
        m_seen = hopper.seen(o_query[:, None], o_key[None, :], near, far)
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
    order,
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
    KEY_BYTES: gl.constexpr = BLOCK_N * HEAD_DIM * 2
    # [M, N] scores, [M, D] output, and the former as the left operand of a product
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HEAD_DIM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    SHARED_Q: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, HEAD_DIM], DTYPE)
    SHARED_K: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, HEAD_DIM], DTYPE)

    program = gl.program_id(0)
    if order == 2:
        place, rank = tiles.paired_turn(program, p_bands, n_slots, n_batch, n_heads, BLOCK_M)
    else:
        place, rank = tiles.turn(program, n_slots, n_batch * n_heads, order)
    batch = place % n_batch
    bands = tiles.bands_of(p_bands, place // n_batch)
    slot = tiles.query_slot(rank, bands[1] * (order != 2), n_slots, BLOCK_M)
    head = bands[0]
    key_head = head // group
    first = slot * BLOCK_M
    last = min(first + BLOCK_M, n_queries) - 1
    walk = tiles.key_walk(bands, first, last, 0, n_keys, BLOCK_N, INTERVALS)
    n_steps = tiles.steps_of(walk)
    p_out += batch.to(gl.int64) * out_stride_b + head.to(gl.int64) * out_stride_h
    p_lse += (batch.to(gl.int64) * n_heads + head) * n_queries
    o_query = first + gl.arange(0, BLOCK_M, ROW)  # [M]

    highest = gl.full([BLOCK_M], float("-inf"), gl.float32, ROW)
    total = gl.full([BLOCK_M], 0.0, gl.float32, ROW)
    if HAS_SINKS:
        sink = gl.load(p_sinks + head).to(gl.float32) * softmax.LOG2_E
        highest = gl.full([BLOCK_M], 0.0, gl.float32, ROW) + sink
        total += gl.where(sink == float("-inf"), 0.0, 1.0)
    b_out = gl.full([BLOCK_M, HEAD_DIM], 0.0, gl.float32, OUT)
    zeros = gl.full([BLOCK_M, BLOCK_N], 0.0, gl.float32, SCORES)

    if n_steps == 0:
        lse, _ = softmax.finish(highest, total)
        gl.store(p_lse + o_query, lse, mask=o_query < n_queries)
        hopper.store_zeros(p_out, first, out_stride_t, n_queries, BLOCK_M, HEAD_DIM)
        return

    # One buffer of keys is enough, they are free once the scores are there; with it three programs
    # fit beside each other.
    s_query = gl.allocate_shared_memory(DTYPE, [BLOCK_M, HEAD_DIM], SHARED_Q)
    s_key = gl.allocate_shared_memory(DTYPE, [BLOCK_N, HEAD_DIM], SHARED_K)
    s_values = gl.allocate_shared_memory(DTYPE, [2, BLOCK_N, HEAD_DIM], SHARED_K)
    query_ready = hopper.barriers(1)
    key_ready = hopper.barriers(1)
    value_ready = hopper.barriers(2)

    first_key, _, near, far = tiles.step_at(0, walk, bands, BLOCK_N, INTERVALS)
    next_key, _, _, _ = tiles.step_at(1, walk, bands, BLOCK_N, INTERVALS)
    barrier = hopper.expect(query_ready, 0, BLOCK_M * HEAD_DIM * 2, True)
    hopper.copy(t_query, batch, head, first, barrier, s_query, True)
    barrier = hopper.expect(key_ready, 0, KEY_BYTES, True)
    hopper.copy(t_key, batch, key_head, first_key, barrier, s_key, True)
    barrier = hopper.expect(value_ready, 0, KEY_BYTES, True)
    hopper.copy(t_value, batch, key_head, first_key, barrier, s_values.index(0), True)

    hopper.arrived(query_ready, 0)
    hopper.arrived(key_ready, 0)
    # [M, N] = [M, D] @ [D, N]
    scores = warpgroup_mma(s_query, s_key.permute((1, 0)), zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, [scores])
    barrier = hopper.expect(key_ready, 1, KEY_BYTES, n_steps > 1)
    hopper.copy(t_key, batch, key_head, next_key, barrier, s_key, n_steps > 1)
    scores = masked(scores, first, last, o_query, first_key, near, far, BLOCK_N, SCORES, FALLING)
    weights, highest, total, factor = softmax.extend(scores, highest, total, scale, FALLING)
    b_weights = gl.convert_layout(weights.to(DTYPE), OPERAND)

    for step in range(1, n_steps):
        # All products of the step before are done.
        first_key, _, near, far = tiles.step_at(step, walk, bands, BLOCK_N, INTERVALS)
        next_key, _, _, _ = tiles.step_at(step + 1, walk, bands, BLOCK_N, INTERVALS)
        barrier = hopper.expect(value_ready, step, KEY_BYTES, True)
        hopper.copy(t_value, batch, key_head, first_key, barrier, s_values.index(step % 2), True)
        hopper.arrived(key_ready, step)
        # [M, N] = [M, D] @ [D, N]
        scores = warpgroup_mma(s_query, s_key.permute((1, 0)), zeros, use_acc=False, is_async=True)
        hopper.arrived(value_ready, step - 1)
        # [M, D] += [M, N] @ [N, D]
        b_out = warpgroup_mma(b_weights, s_values.index((step - 1) % 2), b_out, is_async=True)
        scores = warpgroup_mma_wait(1, [scores])
        more = step + 1 < n_steps
        barrier = hopper.expect(key_ready, step + 1, KEY_BYTES, more)
        hopper.copy(t_key, batch, key_head, next_key, barrier, s_key, more)
        scores = masked(
            scores, first, last, o_query, first_key, near, far, BLOCK_N, SCORES, FALLING
        )
        weights, highest, total, factor = softmax.extend(scores, highest, total, scale, FALLING)
        b_out = warpgroup_mma_wait(0, [b_out])
        b_out = b_out * gl.convert_layout(factor, gl.SliceLayout(1, OUT))[:, None]
        b_weights = gl.convert_layout(weights.to(DTYPE), OPERAND)

    hopper.arrived(value_ready, n_steps - 1)
    b_out = warpgroup_mma(b_weights, s_values.index((n_steps - 1) % 2), b_out, is_async=True)
    b_out = warpgroup_mma_wait(0, [b_out])

    lse, total = softmax.finish(highest, total)
    gl.store(p_lse + o_query, lse, mask=o_query < n_queries)
    b_out = b_out * gl.convert_layout(1.0 / total, gl.SliceLayout(1, OUT))[:, None]
    hopper.store_rows(p_out, b_out, first, out_stride_t, n_queries, BLOCK_M, HEAD_DIM)
    hopper.retire(query_ready)
    hopper.retire(key_ready)
    hopper.retire(value_ready)
