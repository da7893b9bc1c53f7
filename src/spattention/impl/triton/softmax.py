# mypy: allow-untyped-defs
"""The softmax of all passes: its online form, its end, and its recomputation in the backward pass.

In half precision exponentials are powers of two, which is the instruction that GPUs have. Scores
are scaled by `scale * log2(e)`, and `row_max` and `lse_log2` are in that unit. In float32
(`PRECISE`) they are powers of e: changing the unit would cost more than the last bit, and so would
the instruction. The log-sum-exp that a kernel returns is natural.

    M  queries of a block        N  keys of a block        m_  mask
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exponential(x, PRECISE: tl.constexpr):
    """2 to the x; e to the x if `PRECISE`."""
    if PRECISE and INTERPRETED:
        return tl.exp(x)
    elif PRECISE:
        return libdevice.exp(x)
    else:
        return tl.exp2(x)


@triton.jit
def logarithm(x, PRECISE: tl.constexpr):
    """The inverse of `exponential`."""
    if PRECISE and INTERPRETED:
        return tl.log(x)
    elif PRECISE:
        return libdevice.log(x)
    else:
        return tl.log2(x)


@triton.jit
def scaled(scores, scale, PRECISE: tl.constexpr):
    """`scores * scale`, rounded if `PRECISE`. Fused into the subtraction that follows, it would
    give the only key of a row a probability that is not 1.
    """
    if PRECISE and not INTERPRETED:
        return libdevice.mul_rn(scores, scale)
    else:
        return scores * scale


@triton.jit
def init(
    p_sinks, head, BLOCK_M: tl.constexpr, HAS_SINKS: tl.constexpr, PRECISE: tl.constexpr = False
):
    """`row_max` and `row_sum` `[M]` before the first key: those of the head's sink, which carries
    no value, or of nothing.
    """
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        sink = tl.load(p_sinks + head).to(tl.float32) * (1.0 if PRECISE else LOG2_E)
        row_max = tl.full([BLOCK_M], 0.0, tl.float32) + sink
        row_sum += tl.where(sink == float("-inf"), 0.0, 1.0)
    return row_max, row_sum


@triton.jit
def update(scores, row_max, row_sum, scale, FALLING: tl.constexpr, PRECISE: tl.constexpr = False):
    """Add one block of raw scores `[M, N]`.

    Returns the probabilities `[M, N]` (not normalised), the new `row_max` and `row_sum` `[M]`, and
    the factor `[M]` that rescales the output so far. Masked scores are -inf (+inf where `FALLING`,
    that is `scale < 0`).
    """
    p, new_max, factor = exponentials(scores, row_max, scale, FALLING, PRECISE)
    return p, new_max, add(p, row_sum, factor), factor


@triton.jit
def exponentials(scores, row_max, scale, FALLING: tl.constexpr, PRECISE: tl.constexpr = False):
    """The results of `update`, except for `row_sum`."""
    block_max = (tl.min(scores, 1) if FALLING else tl.max(scores, 1)) * scale
    new_max = tl.maximum(row_max, block_max)
    # A row that has seen no key yet keeps -inf. Subtracting 0 instead keeps -inf - -inf out of the
    # exponent.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = exponential(scaled(scores, scale, PRECISE) - shift[:, None], PRECISE)
    return p, new_max, exponential(row_max - shift, PRECISE)


@triton.jit
def add(p, row_sum, factor):
    """The new `row_sum` `[M]` after a block of probabilities `[M, N]`."""
    return row_sum * factor + tl.sum(p, 1)


@triton.jit
def finalize(row_max, row_sum, PRECISE: tl.constexpr = False):
    """Natural log-sum-exp `[M]`, and the sum `[M]` that normalises the output; -inf and 1 for a row
    without keys.
    """
    empty = row_sum == 0.0
    safe = tl.where(empty, 1.0, row_sum)
    lse = (row_max + logarithm(safe, PRECISE)) * (1.0 if PRECISE else LN_2)
    return tl.where(empty, float("-inf"), lse), safe


@triton.jit
def to_lse_log2(lse, PRECISE: tl.constexpr = False):
    """The natural log-sum-exp `[M]` in the unit of `exponential`: what `recompute` subtracts. A row
    without keys is always masked.
    """
    return tl.where(lse == float("-inf"), 0.0, lse * (1.0 if PRECISE else LOG2_E))


@triton.jit
def natural(scale, PRECISE: tl.constexpr = False):
    """The factor of the scores as the caller gave it, which dQ and dK carry."""
    return scale * (1.0 if PRECISE else LN_2)


@triton.jit
def recompute(scores, lse_log2, scale, PRECISE: tl.constexpr = False):
    """Probabilities of raw scores, from `lse_log2` shaped to broadcast along the keys."""
    return exponential(scaled(scores, scale, PRECISE) - lse_log2, PRECISE)
