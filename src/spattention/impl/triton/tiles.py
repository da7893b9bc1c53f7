# mypy: allow-untyped-defs
"""Block ranges and masks: which tiles of keys and queries a band needs.

This is the one place where tile arithmetic and masks are written. A head's band `[near, far)` lets
the query at position p see the keys `p - far < j <= p - near`. For a block of queries at
consecutive positions, the visible keys are therefore one range per interval. The kernels go through
both ranges block by block, in one loop:

    key_range     keys that some query of the block sees, `[low, high)`
    key_blocks    the blocks that cover both ranges, a `BlockRange`
    block_at      start of one of these blocks, and the interval that it belongs to
    is_inside     whether every query of a tile sees every key of it, so that no mask is needed
    visible       mask of the tiles at the edge

A prefix of p keys is one more interval, `[0, IN_PREFIX)`, of which a query sees the first p keys
that it may see. The bands then see the keys after those, so that no key counts twice.

`query_range` and `query_blocks` are the same for a block of keys, for dK and dV. The functions of
scalars are plain integer arithmetic. The tests call them as Python (`key_range.fn`) for thousands
of shapes and compare them with the dense mask.

    first, last    positions of a block's first and last query
    o_             offsets, int32
    BLOCK          queries or keys of a block
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

# A missing interval is (MISSING, MISSING): farther than any distance, so that no range needs a
# special case.
MISSING = tl.constexpr(1 << 30)
# The far end of the interval of a prefix: farther than any distance, and than that of any band.
IN_PREFIX = tl.constexpr(1 << 30)
# Positions are clamped below this, so that sums of a position and a distance fit in int32.
MAX_POSITION = tl.constexpr(1 << 29)


class HeadBands(NamedTuple):
    """A query head and its two intervals of distances."""

    head: Any
    near_0: Any
    far_0: Any
    near_1: Any
    far_1: Any


class PrefixRange(NamedTuple):
    """The blocks that cover the prefix, as in `BlockRange`, and then those that cover the prefixes
    of later documents.
    """

    start: Any
    limit: Any
    count: Any
    next_start: Any
    next_limit: Any
    next_count: Any


class BlockRange(NamedTuple):
    """The blocks that cover the ranges of both intervals: where the first block of each starts, the
    limit of its range, and how many blocks it has. Those of the `PrefixRange` come before them.
    """

    start_0: Any
    limit_0: Any
    count_0: Any
    start_1: Any
    limit_1: Any
    count_1: Any
    prefix: Any


class Block(NamedTuple):
    """One block of a `BlockRange`: its start, the limit of its range, and its interval."""

    start: Any
    limit: Any
    near: Any
    far: Any


@triton.jit
def key_range(first, last, near, far, key_start, n_keys):
    """Keys that some query at a position in `first .. last` sees: `[low, high)`, empty if `low >=
    high`.

    `key_start` is the lowest first key of these queries.
    """
    low = max(first - far + 1, key_start)
    high = min(last - near + 1, n_keys)
    return low, high


@triton.jit
def query_range(first_key, last_key, near, far, query_start, n_queries):
    """Queries (indices) that see some key in `first_key .. last_key`: `[low, high)`, empty if `low
    >= high`.
    """
    low = max(first_key + near - query_start, 0)
    high = min(last_key + far - query_start, n_queries)
    return low, high


@triton.jit
def num_blocks(low, high, BLOCK):
    """Number of blocks that cover `[low, high)`."""
    return (max(high - low, 0) + BLOCK - 1) // BLOCK


@triton.jit
def load_bands(p_bands, entry):
    """The `HeadBands` of one entry of the table that `call.band_table` makes."""
    p_entry = p_bands + 8 * entry
    near_0, far_0 = tl.load(p_entry + 1), tl.load(p_entry + 2)
    near_1, far_1 = tl.load(p_entry + 3), tl.load(p_entry + 4)
    return HeadBands(tl.load(p_entry), near_0, far_0, near_1, far_1)


@triton.jit
def no_prefix(start, limit):
    """The `PrefixRange` without blocks."""
    return PrefixRange(start, limit, 0, start, limit, 0)


@triton.jit
def key_blocks(
    bands, first, last, key_start, n_keys, BLOCK, INTERVALS: tl.constexpr, PREFIX: tl.constexpr = 0
):
    """The blocks of keys that a block of queries needs.

    Blocks end where their range ends, so that no key after it is read. The first block may start
    before `low`, which is the range's `limit`.
    """
    band_start = key_start + PREFIX
    low_0, high_0 = key_range(first, last, bands.near_0, bands.far_0, band_start, n_keys)
    count_0 = num_blocks(low_0, high_0, BLOCK)
    start_0 = high_0 - count_0 * BLOCK
    start_1, low_1, count_1 = start_0, low_0, 0
    if INTERVALS == 2:
        low_1, high_1 = key_range(first, last, bands.near_1, bands.far_1, band_start, n_keys)
        count_1 = num_blocks(low_1, high_1, BLOCK)
        start_1 = high_1 - count_1 * BLOCK
    prefix = no_prefix(start_0, low_0)
    if PREFIX > 0:
        low = key_start
        high = prefix_end(bands, low, min(last + 1, min(n_keys, low + PREFIX)))
        count = num_blocks(low, high, BLOCK)
        start = high - count * BLOCK
        prefix = PrefixRange(start, low, count, start, low, 0)
    return BlockRange(start_0, low_0, count_0, start_1, low_1, count_1, prefix)


@triton.jit
def prefix_end(bands, low, high):
    """`high`; `low` for a head without intervals, which sees no prefix."""
    return tl.where(bands.near_0 < MISSING, high, low)


@triton.jit
def with_next_prefixes(blocks, bands, low, high, BLOCK):
    """A `BlockRange` of queries of several documents: with the keys `[low, high)`, which have the
    prefixes of those after the first. The first of these blocks may have keys of another before
    `low`, its limit, which its mask must leave out.
    """
    prefix = blocks.prefix
    count = num_blocks(low, prefix_end(bands, low, high), BLOCK)
    prefix = PrefixRange(prefix.start, prefix.limit, prefix.count, high - count * BLOCK, low, count)
    return BlockRange(
        blocks.start_0,
        blocks.limit_0,
        blocks.count_0,
        blocks.start_1,
        blocks.limit_1,
        blocks.count_1,
        prefix,
    )


@triton.jit
def from_zero(blocks):
    """A `BlockRange` of keys without tokens before key 0: a range whose first block would start
    there is covered from key 0 on instead. Its last block may then end after its range.
    """
    prefix = blocks.prefix
    return BlockRange(
        max(blocks.start_0, 0),
        blocks.limit_0,
        blocks.count_0,
        max(blocks.start_1, 0),
        blocks.limit_1,
        blocks.count_1,
        PrefixRange(
            max(prefix.start, 0),
            prefix.limit,
            prefix.count,
            prefix.next_start,
            prefix.next_limit,
            prefix.next_count,
        ),
    )


@triton.jit
def aligned_range(start, limit, count, BLOCK, UNIT):
    """`(start, count)` of blocks that end at the next multiple of UNIT instead, and still cover the
    keys from `limit` on. BLOCK is a multiple of UNIT.
    """
    end = (start + count * BLOCK + UNIT - 1) // UNIT * UNIT
    count = tl.where(count > 0, num_blocks(limit, end, BLOCK), 0)
    return end - count * BLOCK, count


@triton.jit
def aligned(blocks, BLOCK, UNIT, INTERVALS: tl.constexpr):
    """A `BlockRange` whose bands' blocks start at multiples of UNIT, as pages of keys do."""
    start_0, count_0 = aligned_range(blocks.start_0, blocks.limit_0, blocks.count_0, BLOCK, UNIT)
    start_1, count_1 = start_0, 0
    if INTERVALS == 2:
        start_1, count_1 = aligned_range(
            blocks.start_1, blocks.limit_1, blocks.count_1, BLOCK, UNIT
        )
    return BlockRange(
        start_0, blocks.limit_0, count_0, start_1, blocks.limit_1, count_1, blocks.prefix
    )


@triton.jit
def query_blocks(
    bands, first_key, last_key, query_start, n_queries, BLOCK, INTERVALS: tl.constexpr, offset=0
):
    """The blocks of queries that a block of keys needs for the bands.

    Blocks start where their range starts, or up to three queries before: TMA copies float32 in
    units of 16 bytes. The last block may end after `high`, which is the range's `limit`. `offset`
    is the index in memory of query 0.
    """
    low_0, high_0 = query_range(
        first_key, last_key, bands.near_0, bands.far_0, query_start, n_queries
    )
    start_0 = (offset + low_0) // 4 * 4 - offset
    count_0 = tl.where(low_0 < high_0, num_blocks(start_0, high_0, BLOCK), 0)
    start_1, high_1, count_1 = start_0, high_0, 0
    if INTERVALS == 2:
        low_1, high_1 = query_range(
            first_key, last_key, bands.near_1, bands.far_1, query_start, n_queries
        )
        start_1 = (offset + low_1) // 4 * 4 - offset
        count_1 = tl.where(low_1 < high_1, num_blocks(start_1, high_1, BLOCK), 0)
    return BlockRange(
        start_0, high_0, count_0, start_1, high_1, count_1, no_prefix(start_0, high_0)
    )


@triton.jit
def whole_query_blocks(
    first_key, near, far, n_queries, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """`(last, count)`: the last block of queries that sees some of the BLOCK_N keys from
    `first_key` on, and how many consecutive ones do. Blocks start at multiples of BLOCK_M.
    """
    low = max(first_key + near, 0)
    high = min(first_key + BLOCK_N - 2 + far, n_queries - 1)
    last = max(high, 0) // BLOCK_M
    return last, (low <= high) * (last - low // BLOCK_M + 1)


@triton.jit
def with_prefix_queries(blocks, bands, low, high, BLOCK, WITH_BANDS: tl.constexpr):
    """A `BlockRange` of queries with the queries `[low, high)` that see a block of keys as their
    prefix. Without those of the bands unless `WITH_BANDS`.
    """
    start = low // 4 * 4
    count = tl.where(low < prefix_end(bands, low, high), num_blocks(start, high, BLOCK), 0)
    prefix = PrefixRange(start, high, count, start, high, 0)
    count_0, count_1 = blocks.count_0, blocks.count_1
    if not WITH_BANDS:
        count_0, count_1 = 0, 0
    return BlockRange(
        blocks.start_0,
        blocks.limit_0,
        count_0,
        blocks.start_1,
        blocks.limit_1,
        count_1,
        prefix,
    )


@triton.jit
def total_blocks(blocks):
    """Number of blocks of a `BlockRange`: those of the prefix, of interval 0, of interval 1."""
    return blocks.prefix.count + blocks.prefix.next_count + blocks.count_0 + blocks.count_1


@triton.jit
def block_at(n, blocks, bands, BLOCK, INTERVALS: tl.constexpr, PREFIX: tl.constexpr = 0):
    """The n-th `Block` of a `BlockRange`."""
    prefix = blocks.prefix
    n_prefix = prefix.count + prefix.next_count
    n_prefixes = n
    if PREFIX > 0:
        n = n - n_prefix
    start, limit = blocks.start_0 + n * BLOCK, blocks.limit_0
    near, far = bands.near_0, bands.far_0
    if INTERVALS == 2:
        second = n >= blocks.count_0
        start = (
            tl.where(second, blocks.start_1 - blocks.count_0 * BLOCK, blocks.start_0) + n * BLOCK
        )
        limit = tl.where(second, blocks.limit_1, blocks.limit_0)
        near = tl.where(second, bands.near_1, bands.near_0)
        far = tl.where(second, bands.far_1, bands.far_0)
    if PREFIX > 0:
        later = n_prefixes >= prefix.count
        prefix_start = (
            tl.where(later, prefix.next_start - prefix.count * BLOCK, prefix.start)
            + n_prefixes * BLOCK
        )
        prefix_limit = tl.where(later, prefix.next_limit, prefix.limit)
        start = tl.where(n < 0, prefix_start, start)
        limit = tl.where(n < 0, prefix_limit, limit)
        near = tl.where(n < 0, 0, near)
        far = tl.where(n < 0, IN_PREFIX, far)
    return Block(start, limit, near, far)


@triton.jit
def blocks_within(start, low, high, BLOCK):
    """Count consecutive blocks from `start` on: how many are before `[low, high)`, and how many
    overlap it.
    """
    some = low < high
    before = some * (max(low - start, 0) // BLOCK)
    return before, some * ((high - start + BLOCK - 1) // BLOCK) - before


@triton.jit
def is_inside(first, last, first_key, last_key, near, far, key_start):
    """True if all queries at `first .. last` see all keys in `first_key .. last_key`.

    `key_start` is the highest first key of these queries.
    """
    return (last - first_key < far) & (first - last_key >= near) & (first_key >= key_start)


@triton.jit
def visible_count(o_position, near, far, key_start):
    """Number of distances from `near` on that a query sees: the band's width, cut at its first key.

    `key_start` is a scalar, or one per query.
    """
    return tl.maximum(tl.minimum(far, o_position - key_start + 1) - near, 0)


@triton.jit
def visible_keys(o_position, near, far, key_start, PREFIX: tl.constexpr = 0):
    """`(o_last, o_count)` of the keys that queries see through an interval: the last one, and how
    many there are up to it.

    With a prefix those of the bands start after it, and those of its own interval end with it.
    """
    if PREFIX == 0:
        o_count = visible_count(o_position, near, far, key_start)
        return o_position - near, o_count
    else:
        in_prefix = far == IN_PREFIX
        end = key_start + tl.where(in_prefix, PREFIX, 2 * MAX_POSITION)
        o_near = tl.maximum(near, o_position - end + 1)
        first = key_start + tl.where(in_prefix, 0, PREFIX)
        return o_position - o_near, visible_count(o_position, o_near, far, first)


@triton.jit
def visible(o_position, o_key, near, o_count):
    """Mask of a tile. All arguments broadcast against each other; `o_count` is what `visible_count`
    gave for these queries.

    A key outside the band, on either side, gives a number that is too large when read as unsigned.
    One comparison is enough.
    """
    return (o_position - near - o_key).to(tl.uint32, bitcast=True) < o_count.to(
        tl.uint32, bitcast=True
    )
