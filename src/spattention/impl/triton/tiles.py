# mypy: allow-untyped-defs
"""Which tiles of keys and queries a band needs: the one place where tile arithmetic and masks are
written.

A head's band `[near, far)` lets the query at position p see the keys `p - far < j <= p - near`. For
a block of queries at consecutive positions the seen keys are therefore one range per interval,
which the kernels walk in steps of one block, both intervals in one loop:

    key_range     the keys that some query of the block sees, `[low, high)`
    key_walk      the blocks that cover both ranges
    step_at       where a step of the walk begins, and which interval it belongs to
    is_inside     whether every query of a tile sees every key of it, so that it needs no mask
    visible       the mask of the tiles at the edge

`query_range` and `query_walk` are the same seen from a block of keys, for the gradients of key and
value. The functions of scalars are plain integer arithmetic; the tests call them as Python
(`key_range.fn`) for thousands of shapes against the dense mask.

    first, last    positions of a block's first and last query
    o_             offsets, int32
    BLOCK          queries or keys of a block
"""

import triton
import triton.language as tl

# A missing interval is (MISSING, MISSING): farther than any distance, so that no range needs a
# special case.
MISSING = tl.constexpr(1 << 30)
# Positions are clamped below this, so that sums of a position and a distance fit in int32.
MAX_POSITION = tl.constexpr(1 << 29)


@triton.jit
def key_range(first, last, near, far, key_start, n_keys):
    """Keys that some query at a position in `first .. last` sees: `[low, high)`, empty if `low >=
    high`.

    `key_start` is the least first key of these queries.
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
def steps(low, high, BLOCK):
    """How many blocks cover `[low, high)`."""
    return (max(high - low, 0) + BLOCK - 1) // BLOCK


@triton.jit
def bands_of(p_bands, row):
    """Head and bands `(head, near_0, far_0, near_1, far_1)` in a row of the table that
    `launch.band_table` makes.
    """
    p_row = p_bands + 8 * row
    near_0, far_0 = tl.load(p_row + 1), tl.load(p_row + 2)
    near_1, far_1 = tl.load(p_row + 3), tl.load(p_row + 4)
    return tl.load(p_row), near_0, far_0, near_1, far_1


@triton.jit
def key_walk(bands, first, last, key_start, n_keys, BLOCK, INTERVALS: tl.constexpr):
    """The blocks of keys that a block of queries needs, for `steps_of` and `step_at`.

    They end where their range ends, so that no key behind it is read; the first may begin before
    `low`, its `limit`.
    """
    _, near_0, far_0, near_1, far_1 = bands
    low_0, high_0 = key_range(first, last, near_0, far_0, key_start, n_keys)
    steps_0 = steps(low_0, high_0, BLOCK)
    begin_0 = high_0 - steps_0 * BLOCK
    begin_1, low_1, steps_1 = begin_0, low_0, 0
    if INTERVALS == 2:
        low_1, high_1 = key_range(first, last, near_1, far_1, key_start, n_keys)
        steps_1 = steps(low_1, high_1, BLOCK)
        begin_1 = high_1 - steps_1 * BLOCK
    return begin_0, low_0, steps_0, begin_1, low_1, steps_1


@triton.jit
def query_walk(bands, first_key, last_key, query_start, n_queries, BLOCK, INTERVALS: tl.constexpr):
    """The blocks of queries that a block of keys needs, for `steps_of` and `step_at`.

    They begin where their range does, or up to three queries before it: the copy engine wants
    float32 in steps of 16 bytes. The last may end behind `high`, its `limit`.
    """
    _, near_0, far_0, near_1, far_1 = bands
    low_0, high_0 = query_range(first_key, last_key, near_0, far_0, query_start, n_queries)
    begin_0 = low_0 // 4 * 4
    steps_0 = tl.where(low_0 < high_0, steps(begin_0, high_0, BLOCK), 0)
    begin_1, high_1, steps_1 = begin_0, high_0, 0
    if INTERVALS == 2:
        low_1, high_1 = query_range(first_key, last_key, near_1, far_1, query_start, n_queries)
        begin_1 = low_1 // 4 * 4
        steps_1 = tl.where(low_1 < high_1, steps(begin_1, high_1, BLOCK), 0)
    return begin_0, high_0, steps_0, begin_1, high_1, steps_1


@triton.jit
def steps_of(walk):
    """Steps of a walk: those of interval 0, then those of interval 1."""
    return walk[2] + walk[5]


@triton.jit
def step_at(step, walk, bands, BLOCK, INTERVALS: tl.constexpr):
    """`(start, limit, near, far)` of a step: where its block begins, the limit of its range, its
    interval.
    """
    begin_0, limit_0, steps_0, begin_1, limit_1, _ = walk
    _, near_0, far_0, near_1, far_1 = bands
    start, limit, near, far = begin_0 + step * BLOCK, limit_0, near_0, far_0
    if INTERVALS == 2:
        second = step >= steps_0
        start = tl.where(second, begin_1 - steps_0 * BLOCK, begin_0) + step * BLOCK
        limit = tl.where(second, limit_1, limit_0)
        near = tl.where(second, near_1, near_0)
        far = tl.where(second, far_1, far_0)
    return start, limit, near, far


@triton.jit
def steps_within(begin, low, high, BLOCK):
    """Of the blocks that follow one another from `begin` on: how many lie before `[low, high)`, and
    how many hold a part of it.
    """
    some = low < high
    front = some * (max(low - begin, 0) // BLOCK)
    return front, some * ((high - begin + BLOCK - 1) // BLOCK) - front


@triton.jit
def is_inside(first, last, first_key, last_key, near, far, key_start):
    """Whether all queries at `first .. last` see all keys in `first_key .. last_key`.

    `key_start` is the greatest first key of these queries.
    """
    return (last - first_key < far) & (first - last_key >= near) & (first_key >= key_start)


@triton.jit
def reach(o_position, near, far, key_start):
    """How many distances from `near` on a query sees: the band's width, cut where its keys begin.

    `key_start` is a scalar, or one per query.
    """
    return tl.maximum(tl.minimum(far, o_position - key_start + 1) - near, 0)


@triton.jit
def visible(o_position, o_key, near, o_reach):
    """Mask of a tile. All arguments broadcast against each other; `o_reach` is what `reach` gave
    for these queries.

    A key beyond the band on either side gives a number that is too large when read as unsigned: one
    comparison.
    """
    return (o_position - near - o_key).to(tl.uint32, bitcast=True) < o_reach.to(
        tl.uint32, bitcast=True
    )


@triton.jit
def turn(program, n_slots, n_places, in_turn):
    """`(place, rank)` of a program: which head of which batch it works on, counted from the most
    work, and the rank of its block there. One place after the other; or `in_turn`, the first block
    of every place, then the second.
    """
    if in_turn != 0:
        return program % n_places, program // n_places
    return program // n_slots, program % n_slots


@triton.jit
def paired_turn(program, p_bands, n_slots, n_batch, n_heads, BLOCK):
    """As `turn`, with places in pairs of one with much work and one with little, which share their
    turns: those blocks of both come first which reach the last interval of their head.
    """
    n_places = n_batch * n_heads
    column, step = program % n_places, program // n_places
    first = min(column, n_places - 1 - column)
    second = n_places - 1 - first
    paired = first != second
    step += (step + (column != first)) * paired
    long = long_blocks(p_bands, first // n_batch, n_slots, BLOCK)
    other = long_blocks(p_bands, second // n_batch, n_slots, BLOCK) * paired
    of_second, rank = shared_turn(step, long, other, n_slots)
    return first + (second - first) * of_second, rank


@triton.jit
def long_blocks(p_bands, row, n_slots, BLOCK):
    """How many blocks of queries reach the last interval of their head, the last ones of all."""
    p_row = p_bands + 8 * row
    near_0, near_1 = tl.load(p_row + 1), tl.load(p_row + 3)
    near = near_1 * (near_1 < MISSING) + near_0 * (near_1 >= MISSING)
    return n_slots - min(near // BLOCK, n_slots)


@triton.jit
def shared_turn(step, long, other, n_slots):
    """`(of_second, rank)` of a step of two places with `n_slots` blocks each: the long blocks of
    the first, those of the second, then the rest of the first and of the second.
    """
    of_second_long = (step >= long) & (step < long + other)
    of_first_short = (step >= long + other) & (step < n_slots + other)
    of_second_short = step >= n_slots + other
    rank = step - of_second_long * long - of_first_short * other - of_second_short * n_slots
    return of_second_long | of_second_short, rank


@triton.jit
def query_slot(rank, near, n_slots, BLOCK):
    """The block of queries of a rank: from the last on, those that see the least keys late. Those
    that see none come first: they cost nothing, and leave the shortest for the end.
    """
    return (n_slots - 1 - rank + min(near // BLOCK, n_slots)) % n_slots


@triton.jit
def key_slot(rank, near, n_slots, n_queries, BLOCK):
    """The block of keys of a rank, as in `query_slot`: seen by many queries, then by few."""
    seen = (max(n_queries - near, 0) + BLOCK - 1) // BLOCK
    return (seen + rank) % n_slots


@triton.jit
def first_after(p_key_start, stride, n_queries, key):
    """The first query whose first key is after `key`, or `n_queries`; first keys never decrease."""
    low = n_queries * 0  # a tensor, as the loop needs it
    high = n_queries
    while low < high:
        middle = (low + high) // 2
        if tl.load(p_key_start + middle.to(tl.int64) * stride) > key:
            high = middle
        else:
            low = middle + 1
    return low


@triton.jit
def offset_at(p_offsets, document, n_documents, n_tokens):
    """Where a document begins, clamped to `[0, n_tokens]`; `n_documents + 1` is where everything
    ends.
    """
    inside = document <= n_documents
    offset = tl.load(p_offsets + document, mask=inside, other=n_tokens)
    return tl.minimum(tl.maximum(offset, 0), n_tokens)


@triton.jit
def document_at(p_offsets, slot, n_documents, n_tokens, BLOCK):
    """Document and block of a slot. Document d owns the slots from `offset_d // BLOCK + d` on, at
    least as many as it has blocks, so that no sum over documents is needed. What lies behind the
    last offset is document `n_documents`.
    """
    low = 0
    high = n_documents
    while low < high:
        middle = (low + high + 1) // 2
        begin = offset_at(p_offsets, middle, n_documents, n_tokens) // BLOCK + middle
        if begin <= slot:
            low = middle
        else:
            high = middle - 1
    begin = offset_at(p_offsets, low, n_documents, n_tokens) // BLOCK + low
    return low, slot - begin


def slots(n_tokens: int, n_documents: int, block: int) -> int:
    """Slots that `document_at` deals out; without packing (`n_documents` 0), the blocks of one
    row.
    """
    return n_tokens // block + n_documents + 1 if n_documents else -(-n_tokens // block)


@triton.jit
def place(
    p_offsets_q,
    p_offsets_k,
    p_query_start,
    query_start_stride,
    query_start,
    slot,
    batch,
    n_documents,
    n_queries,
    n_keys,
    BLOCK: tl.constexpr,
    OF_KEYS: tl.constexpr,
    PACKED: tl.constexpr,
    START_ON_DEVICE: tl.constexpr,
):
    """Where a program works: `(block, row_q, queries, row_k, keys, query_start)`.

    The block counts from row `row_q` of the queries (`row_k` of the keys if `OF_KEYS`), from where
    its row of the batch, or its document, has so many `queries` and `keys`; `query_start` is the
    position of the first of these queries.
    """
    if PACKED:
        if OF_KEYS:
            document, block = document_at(p_offsets_k, slot, n_documents, n_keys, BLOCK)
        else:
            document, block = document_at(p_offsets_q, slot, n_documents, n_queries, BLOCK)
        row_q = offset_at(p_offsets_q, document, n_documents, n_queries)
        row_k = offset_at(p_offsets_k, document, n_documents, n_keys)
        queries = offset_at(p_offsets_q, document + 1, n_documents, n_queries) - row_q
        keys = offset_at(p_offsets_k, document + 1, n_documents, n_keys) - row_k
        # Tokens behind the last offset belong to no document and see nothing.
        behind = document == n_documents
        if OF_KEYS:
            queries = tl.where(behind, 0, queries)
        else:
            keys = tl.where(behind, 0, keys)
        start = keys - queries
    else:
        block, row_q, row_k, queries, keys = slot, 0, 0, n_queries, n_keys
        start = query_start
        if START_ON_DEVICE:
            start = tl.load(p_query_start + batch.to(tl.int64) * query_start_stride)
        start = tl.minimum(tl.maximum(start, 0), MAX_POSITION)
    return block, row_q, queries, row_k, keys, start


@triton.jit
def first_key_of(p_key_start, o_query, n_queries, stride, n_keys):
    """First key that queries (a block of indices, or one) may see, clamped to `[0, n_keys]`; 0
    behind the last query.
    """
    o_first = tl.load(
        p_key_start + o_query.to(tl.int64) * stride, mask=o_query < n_queries, other=0
    )
    return tl.minimum(tl.maximum(o_first, 0), n_keys)
