# mypy: allow-untyped-defs
"""Forward pass on Hopper where queries see thousands of keys: `hopper_forward.py` with blocks of
128 queries.

Half as many programs read every key and value: with blocks of 64, bringing them from the cache is
what bounds long bands. The warps of a program have parts of their own. One warp, the loader, brings
blocks of keys and values into rings; two warpgroups, the readers, own 64 queries each and share
what it brings. Barriers say when a buffer of a ring is full (the copy is done) and when it is free
again (the readers are done). A program stays on its multiprocessor and takes one block of queries
after the other, so that the loader is already ahead in the next one while the readers write their
results.

    M = 64 queries of a reader   N = BLOCK_N keys of a block   D head_dim
    n  counts the blocks of keys that a program went through, in all its blocks of queries

Each reader works on the keys that its own queries see, a part of those that the block sees
(`own_steps`), and passes over the others.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .. import softmax, tiles
from ..config import HOPPER_COUNTS
from . import pipeline as hopper
from .forward import masked

ROWS = gl.constexpr(64)
READERS = gl.constexpr(2)


@gluon.jit
def block_of(tile, p_bands, counts, BLOCK_N: gl.constexpr, INTERVALS: gl.constexpr):
    """`(batch, bands, first, last, walk)` of a program's block of queries, the `tile`-th of all."""
    n_slots, n_batch, n_heads, _, n_queries, n_keys = counts
    BLOCK_M: gl.constexpr = READERS * ROWS
    place, rank = tiles.turn(tile, n_slots, n_batch * n_heads, 0)
    bands = tiles.bands_of(p_bands, place // n_batch)
    first = tiles.query_slot(rank, bands[1], n_slots, BLOCK_M) * BLOCK_M
    last = min(first + BLOCK_M, n_queries) - 1
    walk = tiles.key_walk(bands, first, last, 0, n_keys, BLOCK_N, INTERVALS)
    return place % n_batch, bands, first, last, walk


@gluon.jit
def own_steps(walk, bands, first, last, n_keys, BLOCK_N: gl.constexpr, INTERVALS: gl.constexpr):
    """A reader's steps among those of `walk`: `(front, count_0, gap, count_1)`. Its step s is the
    walk's step `s + front` if `s < count_0`, else `s + gap`.
    """
    begin_0, _, steps_0, begin_1, _, _ = walk
    _, near_0, far_0, near_1, far_1 = bands
    low, high = tiles.key_range(first, last, near_0, far_0, 0, n_keys)
    high = gl.where(first <= last, high, low)
    front, count_0 = tiles.steps_within(begin_0, low, high, BLOCK_N)
    front_1, count_1 = 0, 0
    if INTERVALS == 2:
        low, high = tiles.key_range(first, last, near_1, far_1, 0, n_keys)
        high = gl.where(first <= last, high, low)
        front_1, count_1 = tiles.steps_within(begin_1, low, high, BLOCK_N)
    return front, count_0, steps_0 + front_1 - count_0, count_1


@gluon.jit
def fill(t_rows, batch, head, start, ring, n):
    """Block `n` on its way into its buffer, as soon as that is free."""
    s_blocks, full, free = ring
    SLOTS: gl.constexpr = s_blocks.shape[0]
    hopper.freed(free, n)
    barrier = full.index(n % SLOTS)
    mbarrier.expect(barrier, s_blocks.shape[1] * s_blocks.shape[2] * 2)
    hopper.copy(t_rows, batch, head, start, barrier, s_blocks.index(n % SLOTS), True)


@gluon.jit
def load(
    t_query,
    t_key,
    t_value,
    p_bands,
    rings,
    counts,
    n_tiles,
    BLOCK_N: gl.constexpr,
    INTERVALS: gl.constexpr,
):
    """The loader: queries, keys and values of one block after the other."""
    queries, keys, values = rings
    group = counts[3]
    n = 0
    n_queries = 0  # pairs of blocks of queries
    for tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        batch, bands, first, _, walk = block_of(tile, p_bands, counts, BLOCK_N, INTERVALS)
        head = bands[0]
        n_steps = tiles.steps_of(walk)
        if n_steps > 0:
            for reader in gl.static_range(READERS):
                start = first + reader * ROWS
                fill(t_query, batch, head, start, queries, n_queries * READERS + reader)
            n_queries += 1
        for step in range(n_steps):
            start, _, _, _ = tiles.step_at(step, walk, bands, BLOCK_N, INTERVALS)
            fill(t_key, batch, head // group, start, keys, n)
            fill(t_value, batch, head // group, start, values, n)
            n += 1


@gluon.jit
def pass_over(begin, end, keys, values):
    """Blocks of keys that the other reader needs."""
    for n in range(begin, end):
        hopper.arrived(keys[1], n)
        hopper.release(keys[2], n)
        hopper.arrived(values[1], n)
        hopper.release(values[2], n)


@gluon.jit
def read(
    reader,
    work,
    HEAD_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr,
    INTERVALS: gl.constexpr,
    HAS_SINKS: gl.constexpr,
    FALLING: gl.constexpr,
):
    """A reader: its rows of one block after the other."""
    pointers, out_strides, rings, counts, n_tiles, scale = work
    p_out, p_lse, p_bands, p_sinks = pointers
    queries, keys, values = rings
    n_heads, n_queries, n_keys = counts[2], counts[4], counts[5]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    done = 0  # blocks of keys before those of this block
    n_block = 0  # blocks of queries that the loader brought
    for tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        batch, bands, first, last, walk = block_of(tile, p_bands, counts, BLOCK_N, INTERVALS)
        first += reader * ROWS
        last = min(first + ROWS - 1, last)
        own = own_steps(walk, bands, first, last, n_keys, BLOCK_N, INTERVALS)
        batch_64 = batch.to(gl.int64)
        p_rows = p_out + batch_64 * out_strides[0] + bands[0].to(gl.int64) * out_strides[1]
        p_row_lse = p_lse + (batch_64 * n_heads + bands[0]) * n_queries
        o_query = first + gl.arange(0, ROWS, ROW)  # [M]
        highest = gl.full([ROWS], float("-inf"), gl.float32, ROW)
        total = gl.full([ROWS], 0.0, gl.float32, ROW)
        if HAS_SINKS:
            sink = gl.load(p_sinks + bands[0]).to(gl.float32) * softmax.LOG2_E
            highest = gl.full([ROWS], 0.0, gl.float32, ROW) + sink
            total += gl.where(sink == float("-inf"), 0.0, 1.0)
        n_steps = tiles.steps_of(walk)
        n_query = n_block * READERS + reader
        if own[1] + own[3] == 0:
            if n_steps > 0:
                hopper.arrived(queries[1], n_query)
                hopper.release(queries[2], n_query)
                pass_over(done, done + n_steps, keys, values)
            gl.store(
                p_row_lse + o_query, softmax.finish(highest, total)[0], mask=o_query < n_queries
            )
            hopper.store_zeros(p_rows, first, out_strides[2], n_queries, ROWS, HEAD_DIM)
        else:
            attend(
                p_rows,
                p_row_lse,
                out_strides[2],
                highest,
                total,
                o_query,
                first,
                last,
                n_queries,
                walk,
                bands,
                own,
                done,
                n_query,
                queries,
                keys,
                values,
                scale,
                HEAD_DIM,
                BLOCK_N,
                INTERVALS,
                FALLING,
            )
        if n_steps > 0:
            n_block += 1
        done += n_steps


@gluon.jit
def attend(
    p_rows,
    p_lse,
    out_stride_t,
    highest,
    total,
    o_query,
    first,
    last,
    n_queries,
    walk,
    bands,
    own,
    done,
    n_query,
    queries,
    keys,
    values,
    scale,
    HEAD_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr,
    INTERVALS: gl.constexpr,
    FALLING: gl.constexpr,
):
    """The rows of a reader, which see at least one key."""
    s_keys, key_full, key_free = keys
    s_values, value_full, value_free = values
    DTYPE: gl.constexpr = s_keys.dtype
    RING: gl.constexpr = s_keys.shape[0]
    # [M, N] scores, [M, D] output, and the former as the left operand of a product
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    front, count_0, gap, count_1 = own
    s_query = queries[0].index(n_query % READERS)
    zeros = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, SCORES)
    b_out = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, OUT)

    step = gl.where(count_0 > 0, front, gap)
    n = done + step
    pass_over(done, n, keys, values)
    first_key, _, near, far = tiles.step_at(step, walk, bands, BLOCK_N, INTERVALS)
    hopper.arrived(queries[1], n_query)
    hopper.arrived(key_full, n)
    # [M, N] = [M, D] @ [D, N]
    s_key = s_keys.index(n % RING).permute((1, 0))
    scores = warpgroup_mma(s_query, s_key, zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, [scores])
    hopper.release(key_free, n)
    scores = masked(scores, first, last, o_query, first_key, near, far, BLOCK_N, SCORES, FALLING)
    weights, highest, total, factor = softmax.extend(scores, highest, total, scale, FALLING)
    b_weights = gl.convert_layout(weights.to(DTYPE), OPERAND)

    for s in range(1, count_0 + count_1):
        # All products of the step before are done.
        before = n
        step = s + gl.where(s < count_0, front, gap)
        n = done + step
        pass_over(before + 1, n, keys, values)
        first_key, _, near, far = tiles.step_at(step, walk, bands, BLOCK_N, INTERVALS)
        hopper.arrived(key_full, n)
        # [M, N] = [M, D] @ [D, N]
        s_key = s_keys.index(n % RING).permute((1, 0))
        scores = warpgroup_mma(s_query, s_key, zeros, use_acc=False, is_async=True)
        hopper.arrived(value_full, before)
        # [M, D] += [M, N] @ [N, D]
        b_out = warpgroup_mma(b_weights, s_values.index(before % RING), b_out, is_async=True)
        scores = warpgroup_mma_wait(1, [scores])
        hopper.release(key_free, n)
        scores = masked(
            scores, first, last, o_query, first_key, near, far, BLOCK_N, SCORES, FALLING
        )
        weights, highest, total, factor = softmax.extend(scores, highest, total, scale, FALLING)
        b_next = gl.convert_layout(weights.to(DTYPE), OPERAND)
        # This has arrived before, but waiting is a loop, beyond which the assembler moves nothing:
        # without it, the softmax would begin after the product's end.
        hopper.arrived(value_full, before)
        b_out = warpgroup_mma_wait(0, [b_out])
        hopper.release(value_free, before)
        b_out = b_out * gl.convert_layout(factor, gl.SliceLayout(1, OUT))[:, None]
        b_weights = b_next

    hopper.release(queries[2], n_query)
    hopper.arrived(value_full, n)
    b_out = warpgroup_mma(b_weights, s_values.index(n % RING), b_out, is_async=True)
    b_out = warpgroup_mma_wait(0, [b_out])
    hopper.release(value_free, n)
    pass_over(n + 1, done + tiles.steps_of(walk), keys, values)

    lse, total = softmax.finish(highest, total)
    gl.store(p_lse + o_query, lse, mask=o_query < n_queries)
    b_out = b_out * gl.convert_layout(1.0 / total, gl.SliceLayout(1, OUT))[:, None]
    hopper.store_rows(p_rows, b_out, first, out_stride_t, n_queries, ROWS, HEAD_DIM)


@gluon.jit
def ring(
    SLOTS: gl.constexpr,
    TOKENS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    DTYPE: gl.constexpr,
    USERS: gl.constexpr,
):
    """Buffers, and their barriers: full, and free."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, HEAD_DIM], DTYPE)
    s_blocks = gl.allocate_shared_memory(DTYPE, [SLOTS, TOKENS, HEAD_DIM], LAYOUT)
    return s_blocks, hopper.barriers(SLOTS), hopper.barriers(SLOTS, USERS)


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
    n_tiles,
    scale,
    HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    INTERVALS: gl.constexpr,
    HAS_SINKS: gl.constexpr,
    FALLING: gl.constexpr,
):
    gl.static_assert(BLOCK_M == READERS * ROWS)
    gl.static_assert(gl.num_warps() == 4)
    DTYPE: gl.constexpr = t_key.dtype
    queries = ring(READERS, ROWS, HEAD_DIM, DTYPE, 1)
    keys = ring(STAGES, BLOCK_N, HEAD_DIM, DTYPE, READERS)
    values = ring(STAGES, BLOCK_N, HEAD_DIM, DTYPE, READERS)
    fence_async_shared()
    rings = (queries, keys, values)
    pointers = (p_out, p_lse, p_bands, p_sinks)
    out_strides = (out_stride_b, out_stride_h, out_stride_t)
    counts = (n_slots, n_batch, n_heads, group, n_queries, n_keys)
    work = (pointers, out_strides, rings, counts, n_tiles, scale)
    gl.warp_specialize(
        [
            (read, (0, work, HEAD_DIM, BLOCK_N, INTERVALS, HAS_SINKS, FALLING)),
            (read, (1, work, HEAD_DIM, BLOCK_N, INTERVALS, HAS_SINKS, FALLING)),
            (load, (t_query, t_key, t_value, p_bands, rings, counts, n_tiles, BLOCK_N, INTERVALS)),
        ],
        [4, 1],  # warps of the second reader, and of the loader
        [232, 40],  # their registers; the first reader gets the rest, as many as the second
    )
    for i in gl.static_range(3):
        hopper.retire(rings[i][1])
        hopper.retire(rings[i][2])
