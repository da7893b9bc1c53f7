# mypy: allow-untyped-defs
"""Which blocks of queries a block of keys visits, and whose turn it is to add to their dQ.

`hopper/fused_backward.py` sums dQ over blocks of keys that run at the same time. Floating-point
sums depend on their order, so every block of queries takes the blocks of keys in turn:

    visit   a block of queries that some key of a block of keys is seen by, through one interval
    turn    how many visits to the same block of queries come before this one

Blocks of keys come by their index, and the farther interval of a block before the nearer one. A
block of keys makes its visits from the last block of queries to the first one. So where blocks of
keys run side by side, each reaches a block of queries just after its predecessor, and seldom waits.

A visit waits for those of blocks of keys with a lower index alone. They start first
(`scheduler.key_block`), so that none waits for one that cannot run.

Blocks of queries start at multiples of `BLOCK_M`, and all bounds are of whole blocks, except that
no query is after the last one. `KEYS` is the number of keys of a block.
"""

import triton
import triton.language as tl


@triton.jit
def visits(first_key, near, far, n_queries, BLOCK_M: tl.constexpr, KEYS: tl.constexpr):
    """`(last, count)`: the last block of queries that sees some of the keys from `first_key` on,
    and how many do; they are consecutive.
    """
    low = first_key + near
    last = min(first_key + KEYS - 2 + far, n_queries - 1) // BLOCK_M
    return last, (low < n_queries) * (last - low // BLOCK_M + 1)


@triton.jit
def turns_before(
    key_block, query_block, near, far, n_queries, BLOCK_M: tl.constexpr, KEYS: tl.constexpr
):
    """`(count, visits)`: how many blocks of keys before `key_block` visit a block of queries
    through an interval, and whether `key_block` does.
    """
    first = query_block * BLOCK_M
    low = max(first - far + 1, 0) // KEYS
    end = max(min(first + BLOCK_M, n_queries) - near, 0)  # keys before this one
    count = max(min(key_block, (end + KEYS - 1) // KEYS) - low, 0)
    return count, (key_block >= low) & (key_block * KEYS < end)
