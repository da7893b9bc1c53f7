# mypy: allow-untyped-defs
"""Sizes that the Hopper kernels take, and the prologue that they share. `Form`, `Heads` and
`RowStats` are those of the portable kernels.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .. import scheduler, tiles


class ForwardCounts(NamedTuple):
    """Sizes of a forward pass, as `arguments.Counts` of the portable kernels.

    `order` is a `TileOrder`, `n_query_blocks` the number of blocks of one head.
    """

    n_heads: Any
    group: Any
    n_batch: Any
    n_query_blocks: Any
    n_queries: Any
    n_keys: Any
    order: Any


class BackwardCounts(NamedTuple):
    """Sizes of a backward pass: those of a forward pass, and of the work of dK/dV.

    `pitch` is the number of rows of `lse_log2` and `delta` per head. The first `key_programs`
    programs compute dK and dV.
    """

    n_heads: Any
    group: Any
    n_batch: Any
    n_query_blocks: Any
    n_queries: Any
    n_keys: Any
    order: Any
    pitch: Any
    n_key_blocks: Any
    key_programs: Any


class QueryTile(NamedTuple):
    """A block of queries of one head: positions of its first and last query, and the `BlockRange`
    of its keys.
    """

    batch: Any
    bands: Any
    first: Any
    last: Any
    keys: Any


@gluon.jit
def query_tile(
    batch,
    bands,
    block,
    counts,
    BLOCK_M: gl.constexpr,
    FORM: gl.constexpr,
):
    """The `QueryTile` of a block index, with BLOCK_M queries."""
    first = block * BLOCK_M
    last = min(first + BLOCK_M, counts.n_queries) - 1
    keys = tiles.key_blocks(
        bands, first, last, 0, counts.n_keys, FORM.BLOCK_N, FORM.INTERVALS, FORM.PREFIX
    )
    return QueryTile(batch, bands, first, last, keys)


@gluon.jit
def visible(o_query, o_key, near, far, PREFIX: gl.constexpr):
    """Mask of a tile; `o_query` and `o_key` broadcast against each other."""
    o_last, o_count = tiles.visible_keys(o_query, near, far, 0, PREFIX)
    return tiles.visible(o_last, o_key, 0, o_count)


@gluon.jit
def query_block(rank, bands, n_blocks, BLOCK, PREFIX: gl.constexpr):
    """`scheduler.query_block` of a head. With a prefix no block is without keys, and those that see
    nothing else come last.
    """
    near = bands.near_0
    if PREFIX > 0:
        near = 0
    return scheduler.query_block(rank, near, n_blocks, BLOCK)
