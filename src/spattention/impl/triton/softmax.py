# mypy: allow-untyped-defs
"""The softmax, once for all passes: its running form, its end, and its recomputation for the
gradients.

In half precision exponentials are powers of two, the instruction that there is: scores are scaled
by `scale * log2(e)`, and `highest` and `base` are in that unit. In float32 (`PRECISE`) they are
powers of e: the changes of unit would cost more than the last bit, and so would the instruction.
The log-sum-exp that leaves a kernel is natural.

    M  queries of a block        N  keys of a block        m_  mask
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def power(x, PRECISE: tl.constexpr):
    """2 to the x; e to the x if `PRECISE`."""
    if PRECISE and INTERPRETED:
        return tl.exp(x)
    elif PRECISE:
        return libdevice.exp(x)
    else:
        return tl.exp2(x)


@triton.jit
def logarithm(x, PRECISE: tl.constexpr):
    """The inverse of `power`."""
    if PRECISE and INTERPRETED:
        return tl.log(x)
    elif PRECISE:
        return libdevice.log(x)
    else:
        return tl.log2(x)


@triton.jit
def scaled(scores, scale, PRECISE: tl.constexpr):
    """`scores * scale`, rounded if `PRECISE`: fused into the subtraction that follows, it would
    give the only key of a row a weight that is not 1.
    """
    if PRECISE and not INTERPRETED:
        return libdevice.mul_rn(scores, scale)
    else:
        return scores * scale


@triton.jit
def begin(
    p_sinks, head, BLOCK_M: tl.constexpr, HAS_SINKS: tl.constexpr, PRECISE: tl.constexpr = False
):
    """Running maximum and sum `[M]` before the first key: of nothing, or of the head's sink, which
    carries no value.
    """
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        sink = tl.load(p_sinks + head).to(tl.float32) * (1.0 if PRECISE else LOG2_E)
        highest = tl.full([BLOCK_M], 0.0, tl.float32) + sink
        total += tl.where(sink == float("-inf"), 0.0, 1.0)
    return highest, total


@triton.jit
def extend(scores, highest, total, scale, FALLING: tl.constexpr, PRECISE: tl.constexpr = False):
    """One block of raw scores `[M, N]` joins: weights `[M, N]`, new maximum and sum `[M]`, factor
    of what was summed.

    Masked scores are -inf (+inf where `FALLING`, that is `scale < 0`).
    """
    block_highest = (tl.min(scores, 1) if FALLING else tl.max(scores, 1)) * scale
    new = tl.maximum(highest, block_highest)
    # A row that has seen nothing yet keeps -inf; 0 in its place keeps -inf - -inf out of the
    # exponent.
    base = tl.where(new == float("-inf"), 0.0, new)
    weights = power(scaled(scores, scale, PRECISE) - base[:, None], PRECISE)
    factor = power(highest - base, PRECISE)
    return weights, new, total * factor + tl.sum(weights, 1), factor


@triton.jit
def finish(highest, total, PRECISE: tl.constexpr = False):
    """Natural log-sum-exp `[M]`, and the sum `[M]` that normalises the output; a row without keys
    gives -inf and 1.
    """
    empty = total == 0.0
    safe = tl.where(empty, 1.0, total)
    lse = (highest + logarithm(safe, PRECISE)) * (1.0 if PRECISE else LN_2)
    return tl.where(empty, float("-inf"), lse), safe


@triton.jit
def base_of(lse, PRECISE: tl.constexpr = False):
    """What `weights_of` subtracts, for rows `[M]` of a natural log-sum-exp; a row without keys is
    always masked.
    """
    return tl.where(lse == float("-inf"), 0.0, lse * (1.0 if PRECISE else LOG2_E))


@triton.jit
def natural(scale, PRECISE: tl.constexpr = False):
    """The factor of the scores as the caller gave it, which the gradients of query and key
    carry.
    """
    return scale * (1.0 if PRECISE else LN_2)


@triton.jit
def weights_of(scores, base, scale, PRECISE: tl.constexpr = False):
    """The weights of raw scores; `base` is `base_of` the log-sum-exp, shaped to broadcast along the
    keys.
    """
    return power(scaled(scores, scale, PRECISE) - base, PRECISE)
