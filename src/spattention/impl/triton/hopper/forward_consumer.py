# mypy: allow-untyped-defs
"""Consumers of `forward_persistent.py`, with its legend."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from .. import softmax, tiles
from . import memory, pipeline, prefix
from .forward import init_softmax, mask_scores
from .forward_work import (
    APART,
    CONSUMERS,
    QUERY_BUFFERS,
    ROWS,
    head_offset,
    part_of,
    skip,
    store_lse,
    store_without_keys,
    take_tile,
)
from .own_steps import own_step, own_steps, own_total


class Progress(NamedTuple):
    """How far a consumer is: blocks of keys before this block of queries, the blocks of keys of
    this one, and its place in the ring of queries.
    """

    done: Any
    n_steps: Any
    n_query: Any


@gluon.jit
def consume(consumer, work, FORM: gl.constexpr):
    """A consumer warpgroup: its 64 rows of one block of queries after the other."""
    counts, queries = work.counts, work.query_ring
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FORM.BLOCK_N, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    o_row = gl.arange(0, ROWS, ROW)  # [M]
    done = 0  # blocks of keys before those of this tile
    n_tile, n_query = 0, consumer  # blocks of queries before, and its place in their ring
    index, tile = take_tile(n_tile, work, FORM)
    while index < work.n_tiles:
        n_steps = tiles.total_blocks(tile.keys)
        tile = part_of(tile, consumer, counts)
        own = own_steps(tile.keys, tile.bands, tile.first, tile.last, counts.n_keys, FORM)
        if own_total(own, FORM) == 0:
            if n_steps > 0:
                pipeline.consumer_wait(queries.full, n_query)
                pipeline.consumer_release(queries.empty, n_query)
                skip(done, done + n_steps, work.key_ring, work.value_ring)
            store_without_keys(tile, o_row, work, FORM)
        else:
            row_max, row_sum = init_softmax(
                work.p_sinks, tile.bands.head, ROWS, ROW, FORM.HAS_SINKS
            )
            progress = Progress(done, n_steps, n_query)
            b_out, row_max, row_sum = attend(
                work, tile, own, progress, row_max, row_sum, tile.first + o_row, FORM
            )
            row_sum = store_lse(row_max, row_sum, tile, o_row, work)
            OUT: gl.constexpr = b_out.type.layout
            b_out = b_out * gl.convert_layout(1.0 / row_sum, gl.SliceLayout(1, OUT))[:, None]
            out, offset = work.out, head_offset(work.out, tile)
            n_queries = counts.n_queries
            memory.store_output(
                out, work.p_remainder, offset, b_out, tile.first, n_queries, ROWS, FORM.HEAD_DIM
            )
        if n_steps > 0:
            n_query += CONSUMERS
        done += n_steps
        n_tile += 1
        index, tile = take_tile(n_tile, work, FORM)


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
    """`b_out`, `row_max` and `row_sum` of a consumer's rows, which see at least one key."""
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
    return b_out, row_max, row_sum


@gluon.jit
def attend_prefix(work, tile, progress, o_query, b_out, row_max, row_sum, FORM: gl.constexpr):
    """`b_out`, `row_max` and `row_sum` after the keys of a prefix, the program's step 0."""
    BLOCK_N: gl.constexpr = FORM.BLOCK_N
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, b_out.type.layout, 2)
    keys, values, n = work.key_ring, work.value_ring, progress.done
    STAGES: gl.constexpr = keys.buffers.shape[0]
    s_query = work.query_ring.buffers.index(progress.n_query % QUERY_BUFFERS)
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
    s_query = queries.buffers.index(n_query % QUERY_BUFFERS)
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
