# mypy: allow-untyped-defs
"""The steps of a consumer of the persistent forward pass among those of its program, whose blocks
of keys serve the queries of both consumers.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .. import tiles


class OwnSteps(NamedTuple):
    """A consumer's steps among those of its program: its step s is the program's if `s < prefix`,
    else the program's step `s + before` if `s < prefix + count_0`, else `s + gap`.
    """

    before: Any
    count_0: Any
    gap: Any
    count_1: Any
    prefix: Any


@gluon.jit
def own_steps(keys, bands, first, last, n_keys, FORM: gl.constexpr):
    """The `OwnSteps` of the queries at `first .. last` in the `BlockRange` of a program."""
    BLOCK_N: gl.constexpr = FORM.BLOCK_N
    low, high = tiles.key_range(first, last, bands.near_0, bands.far_0, FORM.PREFIX, n_keys)
    high = gl.where(first <= last, high, low)
    before, count_0 = tiles.blocks_within(keys.start_0, low, high, BLOCK_N)
    before_1, count_1 = 0, 0
    if FORM.INTERVALS == 2:
        low, high = tiles.key_range(first, last, bands.near_1, bands.far_1, FORM.PREFIX, n_keys)
        high = gl.where(first <= last, high, low)
        before_1, count_1 = tiles.blocks_within(keys.start_1, low, high, BLOCK_N)
    of_prefix = 0
    if FORM.PREFIX > 0:
        of_prefix = gl.where(first <= last, keys.prefix.count, 0)
    return OwnSteps(before, count_0, keys.count_0 + before_1 - count_0, count_1, of_prefix)


@gluon.jit
def own_total(own, FORM: gl.constexpr):
    """Number of a consumer's steps."""
    total = own.count_0 + own.count_1
    if FORM.PREFIX > 0:
        total += own.prefix
    return total


@gluon.jit
def own_step(s, own, FORM: gl.constexpr):
    """The program's step of a consumer's step."""
    if FORM.PREFIX > 0:
        skipped = gl.where(s < own.prefix + own.count_0, own.before, own.gap)
        return s + gl.where(s < own.prefix, 0, skipped)
    else:
        return s + gl.where(s < own.count_0, own.before, own.gap)
