# mypy: allow-untyped-defs
"""Two warps that keep the turns of `turns.py` for `fused_backward.py`.

    begin_turns    waits in memory until the turns before a visit's are over, then completes
                   `turn_begun`, which the warpgroup of dQ waits for
    end_turns      waits until that warpgroup has added, and counts the turn as over in memory

Waiting for memory takes about a microsecond each. Here it takes as long, but beside the products
of other visits: a turn may begin `TURNS` visits ahead.

A turn is over when all programs see what was added in it. The release that counts it comes from
another warp than the sums: it covers what happened before the barrier between the two.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_wait

from .. import turns
from . import counters, pipeline
from .fused_work import ROWS, key_block, member_visits, place_of, visit_at


@gluon.jit
def turn_of_visit(step, block, bands, visits, work, FORM: gl.constexpr):
    """`(turn, total)` of a visit of this program."""
    return turns.turn_of(
        block.first_key // FORM.BLOCK_N,
        visit_at(step, visits, FORM.INTERVALS),
        step < visits.count_0,
        bands,
        work.counts.n_queries,
        work.counts.n_keys,
        ROWS,
        FORM.BLOCK_N,
        FORM.INTERVALS,
    )


@gluon.jit
def begin_turns(work, FORM: gl.constexpr):
    """A warp that begins each turn when those before it are over."""
    block = key_block(work.counts, FORM)
    gdc_wait()  # for the preprocess kernel
    done = 0  # visits before those of this member
    for member in range(work.counts.group if FORM.GROUPED else 1):
        bands, visits = member_visits(work, block, member, FORM)
        n_steps = visits.count_0 + visits.count_1
        for step in range(n_steps):
            turn, _ = turn_of_visit(step, block, bands, visits, work, FORM)
            index = visit_at(step, visits, FORM.INTERVALS)
            p_turns = work.p_turns + place_of(index, block, bands, work.counts)
            pipeline.producer_acquire(work.turn_over, done + step)
            reached = 0
            while reached < turn:
                reached = counters.acquire(p_turns)
            pipeline.consumer_release(work.turn_begun, done + step)
        done += n_steps


@gluon.jit
def end_turns(work, FORM: gl.constexpr):
    """A warp that ends each turn when its sums are on their way."""
    block = key_block(work.counts, FORM)
    done = 0  # visits before those of this member
    for member in range(work.counts.group if FORM.GROUPED else 1):
        bands, visits = member_visits(work, block, member, FORM)
        n_steps = visits.count_0 + visits.count_1
        for step in range(n_steps):
            index = visit_at(step, visits, FORM.INTERVALS)
            pipeline.consumer_wait(work.turn_added, done + step)
            counters.release(work.p_turns + place_of(index, block, bands, work.counts))
            pipeline.consumer_release(work.turn_over, done + step)
        done += n_steps
