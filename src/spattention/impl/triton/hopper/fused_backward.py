# mypy: allow-untyped-defs
"""Backward pass on Hopper in five products per tile, with the legend of `pipeline.py`.

`backward.py` computes the scores and the gradients of the weights twice, once for dQ and once for
dK and dV: seven products. Here one program has them once:

    scores = K Q^T    dV += P dO    d_p = V dO^T    dS = P (d_p - delta)    dK += dS Q
    dQ += dS^T K

Keys stay in shared memory while blocks of 64 queries pass. Two consumer warpgroups, or three with
head_dim 64, have 64 keys each. They keep dK and dV in registers, and leave dS in shared memory.
Another warpgroup multiplies dS with the keys. It adds that to a sum of dQ in memory
(`query_sums.py`), because other programs have the other keys. Nobody waits while two blocks are
between them.

Where sums have an order, single warps fetch the blocks (`fused_fetch.py`) and keep the turns
(`fused_turns.py`), in a warpgroup of few registers. Otherwise the warpgroup of dQ fetches too.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_wait

from .. import softmax, tiles
from . import arguments, memory, pipeline
from .backward import Descriptors
from .fused_fetch import fetch_all
from .fused_turns import begin_turns, end_turns
from .fused_work import ROWS, STAGES, TURNS, Ring, Work, key_block, visits_of
from .query_sums import sum_d_query
from .registers import hidden_zero, packed, unpacked


@gluon.jit
def pass_over(begin, end, consumer: gl.constexpr, work):
    """Pass over visits of queries that see keys of other consumers alone: dS is 0."""
    CONSUMERS: gl.constexpr = work.s_keys.shape[0]
    WIDE: gl.constexpr = memory.wide_layout(ROWS, 4)
    b_zeros = gl.full([ROWS, ROWS], 0.0, work.s_keys.dtype, WIDE)
    for n in range(begin, end):
        pipeline.consumer_wait(work.ring.full, n)
        pipeline.producer_acquire(work.scores_empty, n)
        place = n % work.scores_empty.shape[0]
        work.s_scores.index(place * CONSUMERS + consumer).store(b_zeros)
        fence_async_shared()
        pipeline.consumer_release(work.scores_full, CONSUMERS * n + consumer)
        pipeline.consumer_release(work.ring.empty, n)


@gluon.jit
def nearest_of(p_bands, block, counts, FORM: gl.constexpr):
    """The smallest distance at which a head of the group sees a key."""
    nearest = gl.load(p_bands + 8 * block.entry + 1)
    if FORM.GROUPED:
        for member in range(1, counts.group):
            nearest = min(nearest, gl.load(p_bands + 8 * (block.entry + member) + 1))
    return nearest


@gluon.jit
def load_interval(p_bands, entry, n, INTERVALS: gl.constexpr):
    """`near, far` of the n-th interval of the heads from `entry` on, a head's nearer one first."""
    p_interval = p_bands + 8 * entry + 1
    if INTERVALS == 2:
        p_interval += 8 * (n // 2) + 2 * (n % 2)
    else:
        p_interval += 8 * n
    return gl.load(p_interval), gl.load(p_interval + 1)


@gluon.jit
def consume(consumer: gl.constexpr, work, FORM: gl.constexpr):
    """A consumer: dK and dV of its 64 keys."""
    HEAD_DIM: gl.constexpr = FORM.HEAD_DIM
    KEYS: gl.constexpr = FORM.BLOCK_N
    CONSUMERS: gl.constexpr = KEYS // ROWS
    # [N, M] transposed scores, [N, D] gradients, and the former as the left operand of a product
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    QUERIES: gl.constexpr = gl.SliceLayout(0, SCORES)
    counts, ring, scale = work.counts, work.ring, work.scale
    n_queries, n_keys = counts.n_queries, counts.n_keys
    block = key_block(counts, FORM)
    key_head = gl.load(work.p_bands + 8 * block.entry) // counts.group
    first_key = block.first_key + consumer * ROWS
    seen = n_queries - nearest_of(work.p_bands, block, counts, FORM)
    pipeline.consumer_wait(work.key_full, consumer)
    # Keys that no query sees may hold anything, NaN included.
    if first_key + ROWS > seen:
        memory.zero_outside(work.s_keys.index(consumer), first_key, 0, seen)
        memory.zero_outside(work.s_values.index(consumer), first_key, 0, seen)

    zeros = gl.full([ROWS, ROWS], 0.0, gl.float32, SCORES)
    b_d_key = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, OUT)
    b_d_value = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, OUT)
    done = 0  # visits before those of this interval
    for interval in range(FORM.INTERVALS * (counts.group if FORM.GROUPED else 1)):
        near, far = load_interval(work.p_bands, block.entry, interval, FORM.INTERVALS)
        last, n_steps = tiles.whole_query_blocks(block.first_key, near, far, n_queries, ROWS, KEYS)
        own_last, own_steps = tiles.whole_query_blocks(first_key, near, far, n_queries, ROWS, ROWS)
        own_done = done
        if own_steps > 0:
            own_done += own_last - own_steps - (last - n_steps)
        pass_over(done, own_done, consumer, work)
        width = far - near
        beyond = (own_last - own_steps + 1) * ROWS - first_key - near  # of the first query and key
        for step in range(own_steps):
            n = own_done + step
            slot = n % STAGES
            s_query, s_d_out = ring.queries.index(slot), ring.d_outs.index(slot)
            place = n % work.scores_empty.shape[0]
            s_scores = work.s_scores.index(CONSUMERS * place + consumer)
            zero = hidden_zero(step)
            s_key = work.s_keys.index(consumer + zero)
            s_value = work.s_values.index(consumer + zero)
            pipeline.consumer_wait(ring.full, n)
            # [N, M] = [N, D] @ [D, M]
            scores = warpgroup_mma(
                s_key, s_query.permute((1, 0)), zeros, use_acc=False, is_async=True
            )
            lse_log2 = ring.lses.index(slot).load(QUERIES)  # [M]
            scores = warpgroup_mma_wait(0, [scores])
            p = softmax.recompute(scores, lse_log2[None, :], scale)
            if (beyond < ROWS - 1) | (beyond + ROWS - 1 >= width) | (first_key + ROWS > n_keys):
                # `tiles.visible` with 32 fewer values in registers through the loop
                o_key = gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
                o_query = gl.arange(0, ROWS, QUERIES) ^ zero
                distance = (beyond + o_query)[None, :] - o_key[:, None]
                m_seen = tiles.visible(distance, 0, 0, width)
                m_seen &= (o_key < n_keys - first_key)[:, None]
                p = gl.where(m_seen, p, 0.0)
            b_p = packed(p, s_query)
            # [N, M] = [N, D] @ [D, M]
            d_p = warpgroup_mma(
                s_value, s_d_out.permute((1, 0)), zeros, use_acc=False, is_async=True
            )
            # [N, D] += [N, M] @ [M, D]
            b_operand = gl.convert_layout(b_p, OPERAND)
            b_d_value = warpgroup_mma(b_operand, s_d_out, b_d_value, is_async=True)
            d_p = warpgroup_mma_wait(1, [d_p])
            # A scheduling barrier: ptxas moves nothing across the loop of a wait.
            pipeline.consumer_wait(ring.full, n)
            delta = ring.deltas.index(slot).load(QUERIES)  # [M]
            b_d_scores = packed(unpacked(b_p) * (d_p - delta[None, :]), s_query)
            pipeline.producer_acquire(work.scores_empty, n)
            s_scores.store(b_d_scores)
            fence_async_shared()
            pipeline.consumer_release(work.scores_full, CONSUMERS * n + consumer)
            # [N, D] += [N, M] @ [M, D]
            b_operand = gl.convert_layout(b_d_scores, OPERAND)
            b_d_key = warpgroup_mma(b_operand, s_query, b_d_key, is_async=True)
            b_d_key, b_d_value = warpgroup_mma_wait(0, [b_d_key, b_d_value])
            pipeline.consumer_release(ring.empty, n)
            beyond += ROWS
        done += n_steps
        pass_over(own_done + own_steps, done, consumer, work)

    batch_64, head_64 = block.batch.to(gl.int64), key_head.to(gl.int64)
    d_key, d_value = work.d_key, work.d_value
    p_d_key = d_key.pointer + batch_64 * d_key.stride_b + head_64 * d_key.stride_h
    p_d_value = d_value.pointer + batch_64 * d_value.stride_b + head_64 * d_value.stride_h
    b_d_key = b_d_key * softmax.natural(scale)
    memory.store_tokens(p_d_key, b_d_key, first_key, d_key.stride_t, n_keys, ROWS, HEAD_DIM)
    memory.store_tokens(p_d_value, b_d_value, first_key, d_value.stride_t, n_keys, ROWS, HEAD_DIM)


@gluon.jit(do_not_specialize=arguments.BackwardCounts._fields)
def fused_backward_kernel(
    t_query,
    t_key,
    t_value,
    t_d_out,
    t_lse_log2,
    t_delta,
    d_query,
    d_key,
    d_value,
    p_sums,
    p_turns,
    p_bands,
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
    """dK and dV of a block of keys, and their share of dQ."""
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
    HEAD_DIM: gl.constexpr = FORM.HEAD_DIM
    KEYS: gl.constexpr = FORM.BLOCK_N
    CONSUMERS: gl.constexpr = KEYS // ROWS
    DTYPE: gl.constexpr = t_key.dtype
    gl.static_assert(gl.num_warps() == 4)
    gl.static_assert(FORM.PREFIX == 0 and not arguments.is_bounded(FORM))
    TOKENS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, HEAD_DIM], DTYPE)
    SCORES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, ROWS], DTYPE)
    STATS: gl.constexpr = gl.NVMMASharedLayout(0, 32, 1)
    if gl.program_id(0) == 0:
        gdc_wait()  # even without work: this kernel must not end before the previous one
    if not FORM.GROUPED:  # in a group, keys that no query sees are too rare to test for
        block = key_block(counts, FORM)
        bands = tiles.load_bands(p_bands, block.entry)
        visits = visits_of(bands, block.first_key, n_queries, FORM)
        if visits.count_0 + visits.count_1 == 0:
            batch_64, head_64 = block.batch.to(gl.int64), (bands.head // group).to(gl.int64)
            p_d_key = d_key.pointer + batch_64 * d_key.stride_b + head_64 * d_key.stride_h
            p_d_value = d_value.pointer + batch_64 * d_value.stride_b + head_64 * d_value.stride_h
            PART: gl.constexpr = KEYS & -KEYS  # as many as a tile can have
            for part in gl.static_range(KEYS // PART):
                first = block.first_key + part * PART
                memory.store_zeros(p_d_key, first, d_key.stride_t, n_keys, PART, HEAD_DIM)
                memory.store_zeros(p_d_value, first, d_value.stride_t, n_keys, PART, HEAD_DIM)
            return
    ring_full = pipeline.allocate_barriers(STAGES)
    ring_empty = pipeline.allocate_barriers(STAGES, CONSUMERS)
    ring = Ring(
        gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, HEAD_DIM], TOKENS),
        gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, HEAD_DIM], TOKENS),
        gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], STATS),
        gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], STATS),
        ring_full,
        ring_empty,
    )
    key_full = pipeline.allocate_barriers(CONSUMERS)
    scores_full = pipeline.allocate_barriers(2 * CONSUMERS)
    scores_empty = pipeline.allocate_barriers(2)
    turn_begun = pipeline.allocate_barriers(TURNS)
    turn_added = pipeline.allocate_barriers(TURNS)
    turn_over = pipeline.allocate_barriers(TURNS)
    work = Work(
        d_query,
        d_key,
        d_value,
        p_sums,
        p_turns,
        p_bands,
        gl.allocate_shared_memory(DTYPE, [CONSUMERS, ROWS, HEAD_DIM], TOKENS),
        gl.allocate_shared_memory(DTYPE, [CONSUMERS, ROWS, HEAD_DIM], TOKENS),
        key_full,
        ring,
        gl.allocate_shared_memory(DTYPE, [2 * CONSUMERS, ROWS, ROWS], SCORES),
        scores_full,
        scores_empty,
        turn_begun,
        turn_added,
        turn_over,
        counts,
        scale,
    )
    fence_async_shared()
    inputs = Descriptors(t_query, t_key, t_value, t_d_out, t_lse_log2, t_delta)
    # Warps and registers of all but the first consumer, which gets the rest, as many as the second
    if FORM.ORDERED:
        gl.static_assert(CONSUMERS == 2)
        gl.warp_specialize(
            [
                (consume, (0, work, FORM)),
                (consume, (1, work, FORM)),
                (sum_d_query, (inputs, work, FORM)),
                (fetch_all, (inputs, work, FORM)),
                (begin_turns, (work, FORM)),
                (end_turns, (work, FORM)),
            ],
            [4, 4, 1, 1, 1],
            [208, 72, 24, 24, 24],
        )
    elif CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (0, work, FORM)),
                (consume, (1, work, FORM)),
                (sum_d_query, (inputs, work, FORM)),
            ],
            [4, 4],
            [208, 88],
        )
    else:
        gl.static_assert(CONSUMERS == 3)
        gl.warp_specialize(
            [
                (consume, (0, work, FORM)),
                (consume, (1, work, FORM)),
                (consume, (2, work, FORM)),
                (sum_d_query, (inputs, work, FORM)),
            ],
            [4, 4, 4],
            [144, 144, 80],
        )
    pipeline.invalidate(key_full)
    pipeline.invalidate(scores_full)
    pipeline.invalidate(scores_empty)
    pipeline.invalidate(turn_begun)
    pipeline.invalidate(turn_added)
    pipeline.invalidate(turn_over)
    pipeline.invalidate(ring_full)
    pipeline.invalidate(ring_empty)
