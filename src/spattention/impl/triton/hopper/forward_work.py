# mypy: allow-untyped-defs
"""Arguments and work of the warps of `forward_persistent.py`, with its legend: blocks of queries,
and what is stored of them.
"""

from typing import Any, NamedTuple

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .. import scheduler, softmax, tiles
from . import arguments, forward_queue, memory, pipeline
from .forward import init_softmax

ROWS = gl.constexpr(64)
CONSUMERS = gl.constexpr(2)
QUERY_BUFFERS = gl.constexpr(4)  # those of a block of queries and the next, for each consumer
# Triton 3.9 reduces the numbers of a row that a thread holds in a tree. ptxas then computes one row
# after the other, and the tensor cores wait for the second row.
APART = gl.constexpr(triton.__version__.startswith("3.9."))


class Work(NamedTuple):
    """Arguments that the consumers share: results and tables, rings, sizes."""

    out: Any
    p_remainder: Any
    p_lse: Any
    p_bands: Any
    p_sinks: Any
    query_ring: Any
    key_ring: Any
    value_ring: Any
    tile_ring: Any
    p_drawn: Any
    counts: Any
    n_tiles: Any
    scale: Any


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
def take_tile(n_tile, work, FORM: gl.constexpr):
    """`(index, tile)` of a program's block after `n_tile` others."""
    ring = work.tile_ring
    index = forward_queue.announced_index(ring, n_tile)
    if FORM.PREFIX == 0:
        tile = forward_queue.announced_tile(ring, n_tile, work.counts, FORM)
    else:
        tile = tile_at(min(index, work.n_tiles - 1), work.p_bands, work.counts, FORM)
    pipeline.consumer_release(ring.empty, n_tile)
    return index, tile


@gluon.jit
def part_of(tile, consumer, counts):
    """The part of a tile that belongs to a consumer."""
    first = tile.first + consumer * ROWS
    last = min(first + ROWS - 1, tile.last)
    return arguments.QueryTile(
        tile.batch,
        tile.bands,
        first,
        first,
        last,
        tile.keys,
        0,
        counts.n_queries,
        0,
        counts.n_keys,
    )


@gluon.jit
def skip(begin, end, keys, values):
    """Release blocks of keys that only the other consumer needs."""
    for n in range(begin, end):
        pipeline.consumer_wait(keys.full, n)
        pipeline.consumer_release(keys.empty, n)
        pipeline.consumer_wait(values.full, n)
        pipeline.consumer_release(values.empty, n)


@gluon.jit
def head_offset(out, tile):
    """Offset at which the output of a tile's head starts."""
    batch, head = tile.batch.to(gl.int64), tile.bands.head.to(gl.int64)
    return batch * out.stride_b + head * out.stride_h


@gluon.jit
def store_lse(row_max, row_sum, tile, o_row, work):
    """Store the log-sum-exp of a consumer's rows; returns the sum `[M]` that normalises them."""
    n_queries = work.counts.n_queries
    head_batch = tile.batch.to(gl.int64) * work.counts.n_heads + tile.bands.head
    o_query = tile.first + o_row
    lse, row_sum = softmax.finalize(row_max, row_sum)
    gl.store(work.p_lse + head_batch * n_queries + o_query, lse, mask=o_query < n_queries)
    return row_sum


@gluon.jit
def store_without_keys(tile, o_row, work, FORM: gl.constexpr):
    """Store the results of a consumer's rows that see no key."""
    ROW: gl.constexpr = o_row.type.layout
    row_max, row_sum = init_softmax(work.p_sinks, tile.bands.head, ROWS, ROW, FORM.HAS_SINKS)
    store_lse(row_max, row_sum, tile, o_row, work)
    out, n_queries = work.out, work.counts.n_queries
    p_out = out.pointer + head_offset(out, tile)
    memory.store_zeros(p_out, tile.first, out.stride_t, n_queries, ROWS, FORM.HEAD_DIM)
