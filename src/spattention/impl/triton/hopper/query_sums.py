# mypy: allow-untyped-defs
"""The warpgroup of `fused_backward.py` that sums dQ over the blocks of keys.

A sum is kept in float32 in the order in which threads hold it: four consecutive numbers each, so
that one instruction adds 512 consecutive bytes. It is made of 64 of the head's columns at a
time, for want of registers.

If `FORM.ORDERED`, programs add in turn (`turns.py`), so that dQ has the same bits on every run. The
first one stores, and the last one writes dQ. Otherwise they add to zeros in any order. This
warpgroup then fetches tokens too, and `finish_kernel` writes dQ.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_wait

from .. import softmax
from . import memory, pipeline
from .fused_fetch import fetch, fetch_keys
from .fused_turns import turn_of_visit
from .fused_work import COLUMNS, ROWS, STAGES, key_block, member_visits, place_of, visit_at
from .registers import hidden_zero


@gluon.jit
def sum_d_query(inputs, work, FORM: gl.constexpr):
    """Add the share of these keys in dQ; fetch too unless `FORM.ORDERED`."""
    HEAD_DIM: gl.constexpr = FORM.HEAD_DIM
    CONSUMERS: gl.constexpr = FORM.BLOCK_N // ROWS
    SIDES: gl.constexpr = HEAD_DIM // COLUMNS
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    block = key_block(work.counts, FORM)
    if not FORM.ORDERED:
        fetch_keys(inputs, block, work)
        gdc_wait()  # for the preprocess kernel
    zeros = gl.full([ROWS, COLUMNS], 0.0, gl.float32, OUT)
    done = 0  # visits before those of this member
    for member in range(work.counts.group if FORM.GROUPED else 1):
        bands, visits = member_visits(work, block, member, FORM)
        n_steps = visits.count_0 + visits.count_1
        if not FORM.ORDERED:
            for step in gl.static_range(STAGES):
                index = visit_at(step, visits, FORM.INTERVALS)
                fetch(inputs, block.batch, bands.head, index, work, done + step, step < n_steps)
        for step in range(n_steps):
            n = done + step
            index = visit_at(step, visits, FORM.INTERVALS)
            zero = hidden_zero(step)
            pipeline.consumer_wait(work.scores_full, CONSUMERS * n)
            b_left = product(work, n, zero, 0, 0, zeros)
            for consumer in gl.static_range(1, CONSUMERS):
                pipeline.consumer_wait(work.scores_full, CONSUMERS * n + consumer)
                b_left = product(work, n, zero, consumer, 0, b_left)
            b_left = warpgroup_mma_wait(0, [b_left])
            if SIDES == 1:
                pipeline.consumer_release(work.scores_empty, n)
            turn, total = 0, 0
            if FORM.ORDERED:
                turn, total = turn_of_visit(step, block, bands, visits, work, FORM)
                pipeline.consumer_wait(work.turn_begun, n)
            else:
                later = visit_at(step + STAGES, visits, FORM.INTERVALS)
                more = step + STAGES < n_steps
                fetch(inputs, block.batch, bands.head, later, work, n + STAGES, more)
            add(b_left, 0, index, block, bands, turn, total, work, FORM)
            if SIDES == 2:
                # A scheduling barrier: ptxas moves nothing across the loop of a wait.
                pipeline.consumer_wait(work.scores_full, CONSUMERS * n + (CONSUMERS - 1))
                b_right = product(work, n, zero, 0, 1, zeros)
                for consumer in gl.static_range(1, CONSUMERS):
                    b_right = product(work, n, zero, consumer, 1, b_right)
                b_right = warpgroup_mma_wait(0, [b_right])
                pipeline.consumer_release(work.scores_empty, n)
                add(b_right, 1, index, block, bands, turn, total, work, FORM)
            if FORM.ORDERED:
                pipeline.barrier()
                pipeline.consumer_release(work.turn_added, n)
        done += n_steps


@gluon.jit
def product(work, n, zero, consumer: gl.constexpr, side: gl.constexpr, b_sum):
    """Start to multiply: 64 columns of dQ from the keys of one consumer, added to those of the
    consumer before it.
    """
    CONSUMERS: gl.constexpr = work.s_keys.shape[0]
    slot = n % work.scores_empty.shape[0]
    # [M, D / 2] += [M, N] @ [N, D / 2]
    s_scores = work.s_scores.index(CONSUMERS * slot + consumer).permute((1, 0))
    s_key = work.s_keys.index(consumer + zero).slice(side * COLUMNS, COLUMNS, 1)
    return warpgroup_mma(s_scores, s_key, b_sum, use_acc=consumer > 0, is_async=True)


@gluon.jit
def flat(b_tile):
    """A tile `[64, N]` of a product in the order in which threads hold it."""
    TILES: gl.constexpr = b_tile.shape[1] // 8
    b_parts = gl.reshape(b_tile, [4, 2, 8, TILES, 4, 2])
    return gl.reshape(gl.permute(b_parts, (0, 3, 2, 4, 1, 5)), [b_tile.shape[0] * b_tile.shape[1]])


@gluon.jit
def unflat(b_flat):
    """The opposite of `flat`."""
    b_parts = gl.permute(gl.reshape(b_flat, [4, COLUMNS // 8, 8, 4, 2, 2]), (0, 4, 2, 1, 3, 5))
    return gl.reshape(b_parts, [ROWS, COLUMNS])


@gluon.jit
def add(b_tile, side: gl.constexpr, index, block, bands, turn, total, work, FORM: gl.constexpr):
    """Add some columns to the sums of a block of queries; the last turn writes dQ."""
    PART: gl.constexpr = ROWS * COLUMNS
    place = place_of(index, block, bands, work.counts)
    p_sums = work.p_sums + (place.to(gl.int64) * (FORM.HEAD_DIM // COLUMNS) + side) * PART
    b_flat = flat(b_tile)
    o_flat = gl.arange(0, PART, b_flat.type.layout)
    if FORM.ORDERED:
        if turn + 1 == total:
            if turn > 0:
                b_others = unflat(gl.load(p_sums + o_flat, cache_modifier=".cg"))
                b_tile += gl.convert_layout(b_others, b_tile.type.layout, assert_trivial=True)
            write(b_tile, side, index, block, bands, work)
        elif turn == 0:
            gl.store(p_sums + o_flat, b_flat)
        else:
            reduce_add(p_sums + (o_flat & -4), b_flat)
    else:
        reduce_add(p_sums + (o_flat & -4), b_flat)


@gluon.jit
def write(b_tile, side: gl.constexpr, index, block, bands, work):
    """Write some columns of dQ from where they are in registers: few turns are the last ones."""
    TILE: gl.constexpr = b_tile.type.layout
    d_query = work.d_query
    batch_64, head_64 = block.batch.to(gl.int64), bands.head.to(gl.int64)
    p_d_query = d_query.pointer + batch_64 * d_query.stride_b + head_64 * d_query.stride_h
    o_token = index * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, TILE))
    o_dim = side * COLUMNS + gl.arange(0, COLUMNS, gl.SliceLayout(0, TILE))
    p_block = p_d_query + o_token.to(gl.int64)[:, None] * d_query.stride_t + o_dim[None, :]
    b_d_query = (b_tile * softmax.natural(work.scale)).to(d_query.pointer.dtype.element_ty)
    gl.store(p_block, b_d_query, mask=(o_token < work.counts.n_queries)[:, None])


@gluon.jit
def reduce_add(p_first, b_flat):
    """Add to memory, a thread's four consecutive numbers at `p_first` at a time. Triton's own
    atomic add would wait for the sums.
    """
    gl.inline_asm_elementwise(
        """
        red.relaxed.gpu.global.add.v4.f32 [$4], {$8, $9, $10, $11};
        mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;
        """,
        "=r,=r,=r,=r,l,l,l,l,r,r,r,r",
        [p_first.to(gl.int64), b_flat],
        dtype=gl.int32,
        is_pure=False,
        pack=4,
    )


@gluon.jit(do_not_specialize=["n_heads", "n_query_blocks", "n_queries"])
def finish_kernel(p_sums, d_query, n_heads, n_query_blocks, n_queries, scale, FORM: gl.constexpr):
    """Write dQ of a block of queries from its sums."""
    HEAD_DIM: gl.constexpr = FORM.HEAD_DIM
    FLAT: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    program = gl.program_id(0)
    row, index = program // n_query_blocks, program % n_query_blocks
    batch_64, head_64 = (row // n_heads).to(gl.int64), (row % n_heads).to(gl.int64)
    p_d_query = d_query.pointer + batch_64 * d_query.stride_b + head_64 * d_query.stride_h
    p_sums += program.to(gl.int64) * (ROWS * HEAD_DIM) + gl.arange(0, ROWS * COLUMNS, FLAT)
    for side in gl.static_range(HEAD_DIM // COLUMNS):
        b_sums = unflat(gl.load(p_sums + side * ROWS * COLUMNS))
        b_d_query = b_sums * softmax.natural(scale)
        first, stride = index * ROWS, d_query.stride_t
        p_columns = p_d_query + side * COLUMNS
        memory.store_tokens(p_columns, b_d_query, first, stride, n_queries, ROWS, COLUMNS)
