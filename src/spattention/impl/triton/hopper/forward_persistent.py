# mypy: allow-untyped-defs
"""Persistent forward pass on Hopper for queries that see thousands of keys: `forward.py` with
blocks of 128 queries and specialised warps.

With blocks of 64, fetching keys and values from the L2 cache is what bounds long bands; here half
as many programs read each of them. One producer warp copies blocks of keys and values into rings.
Two consumer warpgroups own 64 queries each and share these blocks. A program stays on its
multiprocessor and takes one block of queries after the other. The producer is therefore already in
the next block of queries while the consumers store their results.

    M = 64 queries of a consumer   N = BLOCK_N keys of a block   D head_dim
    n  counts the blocks of keys that a program went through, in all its blocks of queries

Each consumer works on the blocks of keys that its own queries see (`own_steps.py`), a part of those
that the program's queries see, and skips the others.
"""

from typing import Any, NamedTuple

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .. import scheduler, softmax, tiles
from . import arguments, memory, pipeline, prefix
from .forward import init_softmax, mask_scores
from .own_steps import own_step, own_steps, own_total

ROWS = gl.constexpr(64)
CONSUMERS = gl.constexpr(2)
# Triton 3.9 reduces the numbers of a row that a thread holds in a tree. ptxas then computes one row
# after the other, and the tensor cores wait for the second row.
APART = gl.constexpr(triton.__version__.startswith("3.9."))


class Work(NamedTuple):
    """Arguments that the consumers share: results and tables, rings, sizes."""

    out: Any
    p_lse: Any
    p_bands: Any
    p_sinks: Any
    query_ring: Any
    key_ring: Any
    value_ring: Any
    counts: Any
    n_tiles: Any
    scale: Any


class Progress(NamedTuple):
    """How far a consumer is: blocks of keys before this block of queries, the blocks of keys of
    this one, and its place in the ring of queries.
    """

    done: Any
    n_steps: Any
    n_query: Any


@gluon.jit
def tile_at(n, p_bands, counts, FORM: gl.constexpr):
    """The n-th `QueryTile` of all heads."""
    n_batch, n_blocks = counts.n_batch, counts.n_query_blocks
    BLOCK_M: gl.constexpr = CONSUMERS * ROWS
    head_batch, rank = scheduler.work_tile(
        n, n_blocks, n_batch * counts.n_heads, scheduler.HEAD_MAJOR
    )
    bands = tiles.load_bands(p_bands, head_batch // n_batch)
    block = arguments.query_block(rank, bands, n_blocks, BLOCK_M, FORM)
    return arguments.query_tile(head_batch % n_batch, bands, block, None, counts, BLOCK_M, FORM)


@gluon.jit
def fill(t_tensor, batch, head, start, ring, n):
    """Start to copy block `n` into its buffer as soon as that is free."""
    STAGES: gl.constexpr = ring.buffers.shape[0]
    pipeline.producer_acquire(ring.empty, n)
    barrier = ring.full.index(n % STAGES)
    mbarrier.expect(barrier, ring.buffers.shape[1] * ring.buffers.shape[2] * 2)
    s_buffer = ring.buffers.index(n % STAGES)
    pipeline.copy_tokens(t_tensor, batch, head, start, barrier, s_buffer, True)


@gluon.jit
def produce(t_query, t_key, t_value, work, FORM: gl.constexpr):
    """The producer warp: queries, keys and values of one block of queries after the other."""
    BLOCK_N: gl.constexpr = FORM.BLOCK_N
    counts = work.counts
    n = 0
    n_tile = 0  # tiles whose queries were copied
    for index in range(gl.program_id(0), work.n_tiles, gl.num_programs(0)):
        tile = tile_at(index, work.p_bands, counts, FORM)
        head = tile.bands.head
        n_steps = tiles.total_blocks(tile.keys)
        if n_steps > 0:
            for consumer in gl.static_range(CONSUMERS):
                start = tile.first + consumer * ROWS
                n_query = n_tile * CONSUMERS + consumer
                fill(t_query, tile.batch, head, start, work.query_ring, n_query)
            n_tile += 1
        for step in range(n_steps):
            start = tiles.block_at(
                step, tile.keys, tile.bands, BLOCK_N, FORM.INTERVALS, FORM.PREFIX
            ).start
            fill(t_key, tile.batch, head // counts.group, start, work.key_ring, n)
            fill(t_value, tile.batch, head // counts.group, start, work.value_ring, n)
            n += 1


@gluon.jit
def skip(begin, end, keys, values):
    """Release blocks of keys that only the other consumer needs."""
    for n in range(begin, end):
        pipeline.consumer_wait(keys.full, n)
        pipeline.consumer_release(keys.empty, n)
        pipeline.consumer_wait(values.full, n)
        pipeline.consumer_release(values.empty, n)


@gluon.jit
def consume(
    consumer,
    work,
    FORM: gl.constexpr,
):
    """A consumer warpgroup: its 64 rows of one block of queries after the other."""
    BLOCK_N: gl.constexpr = FORM.BLOCK_N
    HEAD_DIM: gl.constexpr = FORM.HEAD_DIM
    out, counts, queries = work.out, work.counts, work.query_ring
    n_heads, n_queries = counts.n_heads, counts.n_queries
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    done = 0  # blocks of keys before those of this tile
    n_tile = 0  # tiles whose queries were copied
    for index in range(gl.program_id(0), work.n_tiles, gl.num_programs(0)):
        tile = tile_at(index, work.p_bands, counts, FORM)
        bands, keys = tile.bands, tile.keys
        first = tile.first + consumer * ROWS
        last = min(first + ROWS - 1, tile.last)
        own = own_steps(keys, bands, first, last, counts.n_keys, FORM)
        tile = arguments.QueryTile(
            tile.batch, bands, first, first, last, keys, 0, n_queries, 0, counts.n_keys
        )
        batch, head = tile.batch.to(gl.int64), bands.head
        p_out = out.pointer + batch * out.stride_b + head.to(gl.int64) * out.stride_h
        p_lse = work.p_lse + (batch * n_heads + head) * n_queries
        o_query = first + gl.arange(0, ROWS, ROW)  # [M]
        row_max, row_sum = init_softmax(work.p_sinks, head, ROWS, ROW, FORM.HAS_SINKS)
        n_steps = tiles.total_blocks(keys)
        n_query = n_tile * CONSUMERS + consumer
        if own_total(own, FORM) == 0:
            if n_steps > 0:
                pipeline.consumer_wait(queries.full, n_query)
                pipeline.consumer_release(queries.empty, n_query)
                skip(done, done + n_steps, work.key_ring, work.value_ring)
            lse = softmax.finalize(row_max, row_sum)[0]
            gl.store(p_lse + o_query, lse, mask=o_query < n_queries)
            memory.store_zeros(p_out, first, out.stride_t, n_queries, ROWS, HEAD_DIM)
        else:
            progress = Progress(done, n_steps, n_query)
            b_out, lse = attend(
                work,
                tile,
                own,
                progress,
                row_max,
                row_sum,
                o_query,
                FORM,
            )
            gl.store(p_lse + o_query, lse, mask=o_query < n_queries)
            memory.store_tokens(p_out, b_out, first, out.stride_t, n_queries, ROWS, HEAD_DIM)
        if n_steps > 0:
            n_tile += 1
        done += n_steps


@gluon.jit
def attend(
    work,
    tile,
    own,
    progress,
    row_max,
    row_sum,
    o_query,
    FORM: gl.constexpr,
):
    """Output `[M, D]` and log-sum-exp `[M]` of a consumer's rows, which see at least one key."""
    HEAD_DIM: gl.constexpr = FORM.HEAD_DIM
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    queries, keys, values = work.query_ring, work.key_ring, work.value_ring
    done, n_query = progress.done, progress.n_query
    b_out = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, OUT)
    pipeline.consumer_wait(queries.full, n_query)
    if not prefix.is_narrow(FORM):
        b_out, row_max, row_sum = attend_blocks(
            work, tile, own, progress, o_query, b_out, row_max, row_sum, FORM
        )
    else:
        b_out, row_max, row_sum = attend_prefix(
            work, tile, progress, o_query, b_out, row_max, row_sum, FORM
        )
        if own_total(own, FORM) > 1:
            b_out, row_max, row_sum = attend_blocks(
                work, tile, own, progress, o_query, b_out, row_max, row_sum, FORM
            )
        else:
            pipeline.consumer_release(queries.empty, n_query)
            skip(done + 1, done + progress.n_steps, keys, values)
    lse, row_sum = softmax.finalize(row_max, row_sum)
    b_out = b_out * gl.convert_layout(1.0 / row_sum, gl.SliceLayout(1, OUT))[:, None]
    return b_out, lse


@gluon.jit
def attend_prefix(work, tile, progress, o_query, b_out, row_max, row_sum, FORM: gl.constexpr):
    """`b_out`, `row_max` and `row_sum` after the keys of a prefix, the program's step 0."""
    BLOCK_N: gl.constexpr = FORM.BLOCK_N
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, b_out.type.layout, 2)
    keys, values, n = work.key_ring, work.value_ring, progress.done
    STAGES: gl.constexpr = keys.buffers.shape[0]
    s_query = work.query_ring.buffers.index(progress.n_query % CONSUMERS)
    key_block = tiles.block_at(0, tile.keys, tile.bands, BLOCK_N, FORM.INTERVALS, FORM.PREFIX)
    pipeline.consumer_wait(keys.full, n)
    scores = prefix.product(s_query, keys.buffers.index(n % STAGES), FORM)
    scores = warpgroup_mma_wait(0, [scores])
    pipeline.consumer_release(keys.empty, n)
    p, row_max, row_sum, _ = prefix.probabilities(
        scores, o_query, key_block, row_max, row_sum, work.scale, FORM
    )
    pipeline.consumer_wait(values.full, n)
    # [M, D] += [M, WIDTH] @ [WIDTH, D]
    b_p = gl.convert_layout(p.to(keys.buffers.dtype), OPERAND)
    s_value = prefix.tokens(values.buffers.index(n % STAGES), FORM)
    b_out = warpgroup_mma(b_p, s_value, b_out, is_async=True)
    b_out = warpgroup_mma_wait(0, [b_out])
    pipeline.consumer_release(values.empty, n)
    return b_out, row_max, row_sum


@gluon.jit
def attend_blocks(work, tile, own, progress, o_query, b_out, row_max, row_sum, FORM: gl.constexpr):
    """`b_out`, `row_max` and `row_sum` after a consumer's blocks of keys from the first step on,
    which must exist. Releases the queries and all blocks of the program's tile.
    """
    BLOCK_N: gl.constexpr = FORM.BLOCK_N
    FIRST: gl.constexpr = 1 if prefix.is_narrow(FORM) else 0  # step after that of the prefix
    queries, keys, values = work.query_ring, work.key_ring, work.value_ring
    done, n_query = progress.done, progress.n_query
    DTYPE: gl.constexpr = keys.buffers.dtype
    STAGES: gl.constexpr = keys.buffers.shape[0]
    # [M, N] scores, [M, D] output, and the former as the left operand of a product
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = b_out.type.layout
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    s_query = queries.buffers.index(n_query % CONSUMERS)
    zeros = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, SCORES)

    step = gl.where(own.count_0 > 0, own.before, own.gap)
    if FORM.PREFIX > 0:
        step = own_step(FIRST, own, FORM)
    n = done + step
    skip(done + FIRST, n, keys, values)
    key_block = tiles.block_at(step, tile.keys, tile.bands, BLOCK_N, FORM.INTERVALS, FORM.PREFIX)
    pipeline.consumer_wait(keys.full, n)
    # [M, N] = [M, D] @ [D, N]
    s_key = keys.buffers.index(n % STAGES).permute((1, 0))
    scores = warpgroup_mma(s_query, s_key, zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, [scores])
    pipeline.consumer_release(keys.empty, n)
    scores = mask_scores(scores, tile, o_query, key_block, SCORES, FORM)
    p, row_max, row_sum, factor = softmax.update(scores, row_max, row_sum, work.scale, FORM.FALLING)
    if FIRST > 0:
        b_out = b_out * gl.convert_layout(factor, gl.SliceLayout(1, OUT))[:, None]
    b_p = gl.convert_layout(p.to(DTYPE), OPERAND)

    for s in range(FIRST + 1, own_total(own, FORM)):
        # All products of the step before are done.
        previous = n
        step = own_step(s, own, FORM)
        n = done + step
        skip(previous + 1, n, keys, values)
        key_block = tiles.block_at(
            step, tile.keys, tile.bands, BLOCK_N, FORM.INTERVALS, FORM.PREFIX
        )
        pipeline.consumer_wait(keys.full, n)
        # [M, N] = [M, D] @ [D, N]
        s_key = keys.buffers.index(n % STAGES).permute((1, 0))
        scores = warpgroup_mma(s_query, s_key, zeros, use_acc=False, is_async=True)
        pipeline.consumer_wait(values.full, previous)
        # [M, D] += [M, N] @ [N, D]
        s_value = values.buffers.index(previous % STAGES)
        b_out = warpgroup_mma(b_p, s_value, b_out, is_async=True)
        scores = warpgroup_mma_wait(1, [scores])
        pipeline.consumer_release(keys.empty, n)
        scores = mask_scores(scores, tile, o_query, key_block, SCORES, FORM)
        p, row_max, factor = softmax.exponentials(scores, row_max, work.scale, FORM.FALLING)
        if APART:
            # A scheduling barrier, as below: the maxima of both rows come first.
            pipeline.consumer_wait(values.full, previous)
        row_sum = softmax.add(p, row_sum, factor)
        b_next = gl.convert_layout(p.to(DTYPE), OPERAND)
        # Redundant wait, as a scheduling barrier: ptxas moves nothing across the wait loop. Without
        # it the softmax would start after the end of the product.
        pipeline.consumer_wait(values.full, previous)
        b_out = warpgroup_mma_wait(0, [b_out])
        pipeline.consumer_release(values.empty, previous)
        b_out = b_out * gl.convert_layout(factor, gl.SliceLayout(1, OUT))[:, None]
        b_p = b_next

    pipeline.consumer_release(queries.empty, n_query)
    pipeline.consumer_wait(values.full, n)
    b_out = warpgroup_mma(b_p, values.buffers.index(n % STAGES), b_out, is_async=True)
    b_out = warpgroup_mma_wait(0, [b_out])
    pipeline.consumer_release(values.empty, n)
    skip(n + 1, done + progress.n_steps, keys, values)
    return b_out, row_max, row_sum


@gluon.jit(do_not_specialize=[*arguments.ForwardCounts._fields, "n_tiles"])
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
    n_tiles,
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
    gl.static_assert(BLOCK_M == CONSUMERS * ROWS)
    gl.static_assert(not arguments.is_bounded(FORM))
    gl.static_assert(gl.num_warps() == 4)
    DTYPE: gl.constexpr = t_key.dtype
    queries = pipeline.allocate_ring(CONSUMERS, ROWS, HEAD_DIM, DTYPE, 1)
    keys = pipeline.allocate_ring(FORM.STAGES, BLOCK_N, HEAD_DIM, DTYPE, CONSUMERS)
    values = pipeline.allocate_ring(FORM.STAGES, BLOCK_N, HEAD_DIM, DTYPE, CONSUMERS)
    fence_async_shared()
    work = Work(out, p_lse, p_bands, p_sinks, queries, keys, values, counts, n_tiles, scale)
    gl.warp_specialize(
        [
            (consume, (0, work, FORM)),
            (consume, (1, work, FORM)),
            (produce, (t_query, t_key, t_value, work, FORM)),
        ],
        [4, 1],  # warps of the second consumer, and of the producer
        [232, 40],  # their registers; the first consumer gets the rest, as many as the second
    )
    pipeline.invalidate_ring(queries)
    pipeline.invalidate_ring(keys)
    pipeline.invalidate_ring(values)
