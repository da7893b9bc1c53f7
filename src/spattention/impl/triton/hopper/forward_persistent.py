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

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared
from triton.language.extra.cuda import gdc_wait

from .. import tiles
from . import arguments, forward_queue, pipeline
from .forward_consumer import consume
from .forward_work import CONSUMERS, QUERY_BUFFERS, ROWS, Work, tile_at


@gluon.jit
def fill(t_tensor, batch, head, start, ring, n):
    """Start to copy block `n` into its buffer as soon as that is free."""
    STAGES: gl.constexpr = ring.buffers.shape[0]
    pipeline.producer_acquire(ring.empty, n)
    BYTES: gl.constexpr = ring.buffers.shape[1] * ring.buffers.shape[2] * 2
    barrier = pipeline.expect_tx(ring.full, n, BYTES, True)
    s_buffer = ring.buffers.index(n % STAGES)
    pipeline.copy_tokens(t_tensor, batch, head, start, barrier, s_buffer, True)


@gluon.jit
def produce(t_query, t_key, t_value, work, FORM: gl.constexpr):
    """The producer warp: queries, keys and values of one block of queries after the other."""
    BLOCK_N: gl.constexpr = FORM.BLOCK_N
    counts, ring = work.counts, work.tile_ring
    n = 0
    n_tile = 0
    n_query = 0  # tiles whose queries were copied
    index = gl.program_id(0)
    while index < work.n_tiles:
        tile = tile_at(index, work.p_bands, counts, FORM)
        head = tile.bands.head
        key_head = head // counts.group
        n_steps = tiles.total_blocks(tile.keys)
        forward_queue.announce(ring, n_tile, index, tile, FORM)
        if n_steps > 0:
            start = tiles.block_at(
                0, tile.keys, tile.bands, BLOCK_N, FORM.INTERVALS, FORM.PREFIX
            ).start
            fill(t_key, tile.batch, key_head, start, work.key_ring, n)
            for consumer in gl.static_range(CONSUMERS):
                first = tile.first + consumer * ROWS
                n_consumer = n_query * CONSUMERS + consumer
                fill(t_query, tile.batch, head, first, work.query_ring, n_consumer)
            fill(t_value, tile.batch, key_head, start, work.value_ring, n)
            n_query += 1
        if work.p_drawn is not None:
            if n_tile == 0:
                gdc_wait()  # for the kernel that resets the number of drawn blocks
        n_tile += 1
        index = forward_queue.next_index(work.p_drawn, n_tile)
        for step in range(1, n_steps):
            start = tiles.block_at(
                step, tile.keys, tile.bands, BLOCK_N, FORM.INTERVALS, FORM.PREFIX
            ).start
            fill(t_key, tile.batch, key_head, start, work.key_ring, n + step)
            fill(t_value, tile.batch, key_head, start, work.value_ring, n + step)
        n += n_steps
    forward_queue.announce_end(ring, n_tile, index)


@gluon.jit(do_not_specialize=[*arguments.ForwardCounts._fields, "n_tiles"])
def forward_kernel(
    t_query,
    t_key,
    t_value,
    out,
    p_remainder,
    p_lse,
    p_bands,
    p_sinks,
    p_drawn,
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
    tile_full = pipeline.allocate_barriers(forward_queue.SLOTS)
    tile_empty = pipeline.allocate_barriers(forward_queue.SLOTS, CONSUMERS)
    tile_ring = forward_queue.TileRing(forward_queue.allocate_fields(), tile_full, tile_empty)
    queries = pipeline.allocate_ring(QUERY_BUFFERS, ROWS, HEAD_DIM, DTYPE, 1)
    keys = pipeline.allocate_ring(FORM.STAGES, BLOCK_N, HEAD_DIM, DTYPE, CONSUMERS)
    values = pipeline.allocate_ring(FORM.STAGES, BLOCK_N, HEAD_DIM, DTYPE, CONSUMERS)
    fence_async_shared()
    work = Work(
        out,
        p_remainder,
        p_lse,
        p_bands,
        p_sinks,
        queries,
        keys,
        values,
        tile_ring,
        p_drawn,
        counts,
        n_tiles,
        scale,
    )
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
    pipeline.invalidate(tile_full)
    pipeline.invalidate(tile_empty)
