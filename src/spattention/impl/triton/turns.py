# mypy: allow-untyped-defs
"""Whose turn it is to add to dQ of a block of queries.

`hopper/fused_backward.py` sums dQ over blocks of keys that run at the same time. Floating-point
sums depend on their order, so every block of queries takes the blocks of keys in turn:

    visit   a block of queries that some key of a block of keys is seen by, through one interval
    turn    how many visits to the same block of queries come before this one

Blocks of keys come from the last one to the first, and a block's nearer interval before its farther
one. A visit waits for those of blocks of keys with a higher index alone. They start first, so that
none waits for one that cannot run.

A block of keys makes its visits from the first block of queries to the last. Blocks of keys that
start together thus have different first visits, and reach each block of queries one after another,
as many steps apart as there are blocks of queries in one of keys.

Blocks of queries start at multiples of `BLOCK_M`, and all bounds are of whole blocks, except that
no query is after the last one. `KEYS` is the number of keys of a block.
"""

import triton
import triton.language as tl


@triton.jit
def turns_before(
    key_block, query_block, near, far, n_queries, n_keys, BLOCK_M: tl.constexpr, KEYS: tl.constexpr
):
    """`(count, total, visits)` of a block of queries: how many blocks of keys after `key_block`
    visit it through an interval, how many do at all, and whether `key_block` does.
    """
    first = query_block * BLOCK_M
    low = max(first - far + 1, 0) // KEYS
    keys = min(first + BLOCK_M, n_queries) - near  # before the end of those that it sees
    end = (max(min(keys, n_keys), 0) + KEYS - 1) // KEYS
    count = max(end - max(key_block + 1, low), 0)
    return count, max(end - low, 0), (key_block >= low) & (key_block < end)


@triton.jit
def turn_of(
    key_block,
    query_block,
    nearer,
    bands,
    n_queries,
    n_keys,
    BLOCK_M: tl.constexpr,
    KEYS: tl.constexpr,
    INTERVALS: tl.constexpr,
):
    """`(turn, total)` of a visit through the nearer interval or the other one."""
    near, far = bands.near_0, bands.far_0
    turn, total, also = turns_before(
        key_block, query_block, near, far, n_queries, n_keys, BLOCK_M, KEYS
    )
    if INTERVALS == 2:
        near, far = bands.near_1, bands.far_1
        count, more, _ = turns_before(
            key_block, query_block, near, far, n_queries, n_keys, BLOCK_M, KEYS
        )
        turn += count + (also & (nearer == 0))
        total += more
    return turn, total
