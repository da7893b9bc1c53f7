# mypy: allow-untyped-defs
"""Tile scheduler: which head, batch entry and block of queries or keys a program works on.

A *work tile* is a `(head_batch, rank)` pair. `head_batch` counts the heads of all batch entries by
descending work, in the order of `call.band_table`. `rank` counts the blocks of one head by
descending work. `query_block` and `key_block` turn a rank into a block index.
"""

import triton
import triton.language as tl

from . import tiles

# The values of `hopper.TileOrder`.
HEAD_MAJOR = tl.constexpr(0)
ROUND_ROBIN = tl.constexpr(1)
PAIRED = tl.constexpr(2)


@triton.jit
def work_tile(program, n_blocks, n_head_batches, round_robin):
    """Map a program ID to `(head_batch, rank)`: head-major by default, block-major (one block of
    every head in turn) if `round_robin` is not 0.
    """
    if round_robin != 0:
        return program % n_head_batches, program // n_head_batches
    return program // n_blocks, program % n_blocks


@triton.jit
def paired_work_tile(program, p_bands, n_blocks, n_batch, n_heads, BLOCK):
    """Map a program ID to `(head_batch, rank)` in round-robin order over pairs of heads, one with
    much work and one with little. A pair shares its slots. Blocks that reach the last interval of
    their head come first.
    """
    n_head_batches = n_batch * n_heads
    column, slot = program % n_head_batches, program // n_head_batches
    first = min(column, n_head_batches - 1 - column)
    second = n_head_batches - 1 - first
    paired = first != second
    slot += (slot + (column != first)) * paired
    long = num_long_blocks(p_bands, first // n_batch, n_blocks, BLOCK)
    other = num_long_blocks(p_bands, second // n_batch, n_blocks, BLOCK) * paired
    of_second, rank = block_of_pair(slot, long, other, n_blocks)
    return first + (second - first) * of_second, rank


@triton.jit
def num_long_blocks(p_bands, entry, n_blocks, BLOCK):
    """Number of blocks of queries that reach the last interval of their head; they are the last
    blocks of the sequence.
    """
    p_entry = p_bands + 8 * entry
    near_0, near_1 = tl.load(p_entry + 1), tl.load(p_entry + 3)
    near = near_1 * (near_1 < tiles.MISSING) + near_0 * (near_1 >= tiles.MISSING)
    return n_blocks - min(max(near, 0) // BLOCK, n_blocks)


@triton.jit
def block_of_pair(slot, long, other, n_blocks):
    """`(of_second, rank)` of a slot of two heads with `n_blocks` blocks each: the long blocks of
    the first, those of the second, then the rest of the first and of the second.
    """
    of_second_long = (slot >= long) & (slot < long + other)
    of_first_short = (slot >= long + other) & (slot < n_blocks + other)
    of_second_short = slot >= n_blocks + other
    rank = slot - of_second_long * long - of_first_short * other - of_second_short * n_blocks
    return of_second_long | of_second_short, rank


@triton.jit
def query_block(rank, near, n_blocks, BLOCK):
    """Index of the block of queries with this rank: late blocks first, because early ones see the
    fewest keys. Blocks that see no key have the lowest ranks: they cost nothing, and the last
    programs to run should be short ones.
    """
    return (n_blocks - 1 - rank + min(max(near, 0) // BLOCK, n_blocks)) % n_blocks


@triton.jit
def key_block(rank, near, n_blocks, n_queries, BLOCK):
    """Index of the block of keys with this rank, like `query_block`: early blocks are seen by the
    most queries.
    """
    seen = (max(n_queries - near, 0) + BLOCK - 1) // BLOCK
    return (seen + rank) % n_blocks
