# mypy: allow-untyped-defs
"""The queue of blocks of queries of `forward_persistent.py`.

How long a block takes depends on its bands: dealt in advance, some programs would get up to twice
the mean work. So every program draws its next block from a counter in memory. The producer warp
draws ahead of time, and announces each block to the consumers through shared memory.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents

from .. import tiles
from . import arguments, counters, pipeline

SLOTS = gl.constexpr(2)
FIELDS = gl.constexpr(16)


class TileRing(NamedTuple):
    """Announced blocks of queries, each as `FIELDS` numbers in shared memory, and two barriers for
    each, as in `pipeline.Ring`.
    """

    fields: Any
    full: Any
    empty: Any


@gluon.jit
def allocate_fields():
    """The `fields` of a `TileRing`."""
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return gl.allocate_shared_memory(gl.int32, [SLOTS * FIELDS, 1], LAYOUT)


@gluon.jit
def put(ring, n, FIELD: gl.constexpr, number):
    """Write a field of the n-th block of this program."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    s_field = ring.fields.index(n % SLOTS * FIELDS + FIELD)
    s_field.store(gl.full([1], 0, gl.int32, LAYOUT) + number)


@gluon.jit
def got(ring, n, FIELD: gl.constexpr):
    """Read a field of the n-th block of this program."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(ring.fields.index(n % SLOTS * FIELDS + FIELD).load(LAYOUT), 0)


@gluon.jit
def announce(ring, n, index, tile, FORM: gl.constexpr):
    """Announce a program's n-th block: its index among all and, without a prefix, its tile."""
    pipeline.producer_acquire(ring.empty, n)
    put(ring, n, 0, index)
    if FORM.PREFIX == 0:
        keys, bands = tile.keys, tile.bands
        put(ring, n, 1, tile.batch)
        put(ring, n, 2, bands.head)
        put(ring, n, 3, tile.first)
        put(ring, n, 4, tile.last)
        put(ring, n, 5, keys.start_0)
        put(ring, n, 6, keys.count_0)
        put(ring, n, 7, bands.near_0)
        put(ring, n, 8, bands.far_0)
        if FORM.INTERVALS == 2:
            put(ring, n, 9, keys.start_1)
            put(ring, n, 10, keys.count_1)
            put(ring, n, 11, bands.near_1)
            put(ring, n, 12, bands.far_1)
    pipeline.consumer_release(ring.full, n)


@gluon.jit
def announce_end(ring, n, index):
    """Announce that there is no n-th block, by an index beyond all."""
    pipeline.producer_acquire(ring.empty, n)
    put(ring, n, 0, index)
    pipeline.consumer_release(ring.full, n)


@gluon.jit
def announced_index(ring, n):
    """Index of a program's n-th block; waits for its announcement."""
    pipeline.consumer_wait(ring.full, n)
    return got(ring, n, 0)


@gluon.jit
def announced_tile(ring, n, counts, FORM: gl.constexpr):
    """The `QueryTile` of a program's n-th block, whose index was read; not one after the last."""
    start, count = got(ring, n, 5), got(ring, n, 6)
    near, far = got(ring, n, 7), got(ring, n, 8)
    start_1, count_1, near_1, far_1 = start, 0, near, far
    if FORM.INTERVALS == 2:
        start_1, count_1 = got(ring, n, 9), got(ring, n, 10)
        near_1, far_1 = got(ring, n, 11), got(ring, n, 12)
    prefix = tiles.no_prefix(start, start)
    keys = tiles.BlockRange(start, start, count, start_1, start_1, count_1, prefix)
    bands = tiles.HeadBands(got(ring, n, 2), near, far, near_1, far_1)
    batch, first, last = got(ring, n, 1), got(ring, n, 3), got(ring, n, 4)
    return arguments.QueryTile(
        batch, bands, first, first, last, keys, 0, counts.n_queries, 0, counts.n_keys
    )


@gluon.jit
def next_index(p_drawn, n_drawn):
    """Index of a program's block after `n_drawn` others; dealt in advance if `p_drawn` is None."""
    if p_drawn is None:
        return gl.program_id(0) + n_drawn * gl.num_programs(0)
    else:
        return gl.num_programs(0) + counters.count(p_drawn)


@gluon.jit
def reset_kernel(p_drawn):
    """Set the number of drawn blocks to 0. The forward pass that follows may begin meanwhile."""
    gdc_launch_dependents()
    gl.store(p_drawn, 0)
