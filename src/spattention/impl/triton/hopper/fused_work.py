# mypy: allow-untyped-defs
"""Buffers that the warpgroups of `fused_backward.py` share, and their walk over tiles.

A program has the keys of two or three consumers, of one key head. It goes through the query heads
of the group, in each through the intervals, the nearer one first, and in each interval through the
blocks of queries that see some of the keys, the first one first: these are its *visits*, which `n`
counts. Keys start from the last block on (`turns.py` says why).
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .. import scheduler, tiles

ROWS = gl.constexpr(64)  # queries of a block, and keys of a consumer
STAGES = gl.constexpr(3)  # blocks of queries in flight
TURNS = gl.constexpr(4)  # visits between the start of a turn and its end
COLUMNS = gl.constexpr(64)  # of dQ that are summed at a time


class Ring(NamedTuple):
    """Buffers of blocks of queries and what belongs to them, with the barriers of a
    `pipeline.Ring`.
    """

    queries: Any
    d_outs: Any
    lses: Any
    deltas: Any
    full: Any
    empty: Any


class Work(NamedTuple):
    """Results and tables, buffers in shared memory with their barriers, and sizes.

    `p_sums` are the sums of dQ, float32 `[B, H, blocks, 64 * D]`. `s_keys` and `s_values` are
    `[C, 64, D]` with C consumers; `s_scores` are their transposed gradients of the scores for two
    blocks of queries, `[2 C, 64, 64]`. `p_turns` are the turns that are over, int32
    `[B, H, blocks]`; `turn_begun`, `turn_added` and `turn_over` are barriers.
    """

    d_query: Any
    d_key: Any
    d_value: Any
    p_sums: Any
    p_turns: Any
    p_bands: Any
    s_keys: Any
    s_values: Any
    key_full: Any
    ring: Any
    s_scores: Any
    scores_full: Any
    scores_empty: Any
    turn_begun: Any
    turn_added: Any
    turn_over: Any
    counts: Any
    scale: Any


class KeyBlock(NamedTuple):
    """The keys of a program, and the entry of its first query head in the table of bands."""

    batch: Any
    entry: Any
    first_key: Any


class Visits(NamedTuple):
    """A query head's visits: the first block of queries and the number of blocks, by interval."""

    first_0: Any
    count_0: Any
    first_1: Any
    count_1: Any


@gluon.jit
def key_block(counts, FORM: gl.constexpr):
    """The `KeyBlock` of this program."""
    n_head_batches = counts.n_batch * (counts.n_heads // counts.group)
    head_batch, rank = scheduler.work_tile(
        gl.program_id(0), counts.n_key_blocks, n_head_batches, counts.order
    )
    entry = head_batch // counts.n_batch * counts.group
    # From the last block on, for `turns.py`; those that no query sees come first and cost nothing.
    index = counts.n_key_blocks - 1 - rank
    return KeyBlock(head_batch % counts.n_batch, entry, index * FORM.BLOCK_N)


@gluon.jit
def visits_of(bands, first_key, n_queries, FORM: gl.constexpr):
    """The `Visits` of the keys from `first_key` on."""
    KEYS: gl.constexpr = FORM.BLOCK_N
    near, far = bands.near_0, bands.far_0
    last_0, count_0 = tiles.whole_query_blocks(first_key, near, far, n_queries, ROWS, KEYS)
    last_1, count_1 = last_0, 0
    if FORM.INTERVALS == 2:
        near, far = bands.near_1, bands.far_1
        last_1, count_1 = tiles.whole_query_blocks(first_key, near, far, n_queries, ROWS, KEYS)
    return Visits(last_0 - count_0 + 1, count_0, last_1 - count_1 + 1, count_1)


@gluon.jit
def visit_at(step, visits, INTERVALS: gl.constexpr):
    """Index of the block of queries of a step."""
    index = visits.first_0 + step
    if INTERVALS == 2:
        nearer = step < visits.count_0
        index = gl.where(nearer, visits.first_0, visits.first_1 - visits.count_0) + step
    return index


@gluon.jit
def member_visits(work, block, member, FORM: gl.constexpr):
    """Bands and `Visits` of a query head of the group."""
    bands = tiles.load_bands(work.p_bands, block.entry + member)
    return bands, visits_of(bands, block.first_key, work.counts.n_queries, FORM)


@gluon.jit
def place_of(index, block, bands, counts):
    """Number of a block of queries among those of all heads and batch entries."""
    return (block.batch * counts.n_heads + bands.head) * counts.n_query_blocks + index
