# mypy: allow-untyped-defs
"""Copies of keys, values and blocks of queries for `fused_backward.py`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_wait

from . import pipeline
from .fused_work import ROWS, key_block, member_visits, visit_at


@gluon.jit
def fetch_keys(inputs, block, work):
    """Start to copy the keys and values of all consumers."""
    CONSUMERS: gl.constexpr = work.s_keys.shape[0]
    BYTES: gl.constexpr = 2 * ROWS * work.s_keys.shape[2] * 2
    key_head = gl.load(work.p_bands + 8 * block.entry) // work.counts.group
    for consumer in gl.static_range(CONSUMERS):
        barrier = pipeline.expect_tx(work.key_full, consumer, BYTES, True)
        start = block.first_key + consumer * ROWS
        s_key, s_value = work.s_keys.index(consumer), work.s_values.index(consumer)
        pipeline.copy_tokens(inputs.key, block.batch, key_head, start, barrier, s_key, True)
        pipeline.copy_tokens(inputs.value, block.batch, key_head, start, barrier, s_value, True)


@gluon.jit
def fetch(inputs, batch, head, index, work, n, pred):
    """Start to copy a block of queries, and what belongs to it, as block `n` of the ring."""
    ring, counts = work.ring, work.counts
    BYTES: gl.constexpr = 2 * ROWS * ring.queries.shape[2] * 2 + 2 * ROWS * 4
    if pred:
        pipeline.producer_acquire(ring.empty, n)
    slot = n % ring.full.shape[0]
    first = index * ROWS
    row = (batch * counts.n_heads + head) * counts.pitch + first
    barrier = pipeline.expect_tx(ring.full, n, BYTES, pred)
    pipeline.copy_tokens(inputs.query, batch, head, first, barrier, ring.queries.index(slot), pred)
    pipeline.copy_tokens(inputs.d_out, batch, head, first, barrier, ring.d_outs.index(slot), pred)
    pipeline.copy_vector(inputs.lse_log2, row, barrier, ring.lses.index(slot), pred)
    pipeline.copy_vector(inputs.delta, row, barrier, ring.deltas.index(slot), pred)


@gluon.jit
def fetch_all(inputs, work, FORM: gl.constexpr):
    """A warp that fetches keys, values and blocks of queries."""
    block = key_block(work.counts, FORM)
    fetch_keys(inputs, block, work)
    gdc_wait()  # for the preprocess kernel
    done = 0  # visits before those of this member
    for member in range(work.counts.group if FORM.GROUPED else 1):
        bands, visits = member_visits(work, block, member, FORM)
        n_steps = visits.count_0 + visits.count_1
        for step in range(n_steps):
            index = visit_at(step, visits, FORM.INTERVALS)
            fetch(inputs, block.batch, bands.head, index, work, done + step, True)
        done += n_steps
