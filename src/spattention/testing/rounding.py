"""The noise that rounding adds to each result: its standard deviation, to first order.

Every rounding in the working precision (float32, or float64) is taken as independent and uniform
within half a unit in the last place, so its variance is `u^2 / 3` times the square of what is
rounded, with u = eps / 2. A sum is rounded once a term, each time at its partial sum. Partial sums
wander from 0 to the total: their mean square is `total^2 / 3 + squares / 6`, where `squares` sums
the terms' squares (a Brownian bridge). What is rounded:

- the scores `s = scale * query . key`, also `query * scale` where the scale is no power of two, and
  the products `t = d_out . value`;
- a weight `p = exp(s - lse)`: its exponent, and the exponential within two units;
- `lse`, in the logarithm and whenever a part joins the whole, which shifts a row's weights in the
  backward pass: four times, for two bands in two pieces each;
- `delta = d_out . out - d_lse`;
- the sums over keys or queries that make the results;
- in half precision, what kernels store or multiply in it: the output, and weights and their
  gradients `g`.

The variances go through the derivatives of every result; squares add up, as independent errors do.
The backward pass computes scores again, in blocks of other shapes, so their errors are new ones.
With `mean = sum_j p t`, `delta = mean - d_lse`, `g = p (t - delta)`, `c = p (t - mean)` and the
backward pass's scores s':

    d lse_i / d s_ij = p_ij            d out_i / d s_ij = p_ij (value_j - out_i)
    d p_ij / d s'_ij = p_ij            d p_ij / d s_il = -p_ij p_il
    d g_ij / d s'_ij = g_ij            d g_ij / d s_il = -g_ij p_il - p_ij c_il
    d g_ij / d t_ij = p_ij             d delta_i / d s_ij = c_ij

and `d_query = scale * g key`, `d_key = scale * g' query`, `d_value = p' d_out`, and
`d_sinks = -sum_i exp(sink - lse_i) delta_i`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .cases import Case
from .oracle import operands

EXPONENTIAL = 2  # units in the last place by which a library's may be wrong
JOINS = 4


def noise(case: Case, grads: tuple[Tensor, Tensor] | None = None) -> dict[str, float]:
    """The greatest standard deviation among each result's elements.

    Args:
        case: a call in its own dtype, which gives the working precision.
        grads: gradients of output and log-sum-exp. Without them only those two have entries.
    """
    q, k, v, mask, scale, sinks, group, d_out, d_lse = operands(case.to(torch.float64), grads)
    work = torch.float64 if case.query.dtype == torch.float64 else torch.float32
    # Variances of the rounding of 1.
    unit, half = ((torch.finfo(dtype).eps / 2) ** 2 / 3 for dtype in (work, case.query.dtype))
    half = half if case.query.dtype != work else 0.0

    s, squares = scale * (q @ k.mT), scale**2 * (q.square() @ k.square().mT)
    rounded = 0.0 if math.frexp(abs(scale))[0] in (0.0, 0.5) else 1.0
    of_s = unit * (_partial_sums(s, squares, q.shape[-1]) + rounded * squares)
    of_s = of_s.masked_fill(~mask, 0.0)
    s = s.masked_fill(~mask, -torch.inf)
    sink = q.new_full((q.shape[1], 1), -torch.inf) if sinks is None else sinks[:, None]
    lse = torch.logaddexp(torch.logsumexp(s, dim=-1), sink)[..., None]
    base = lse.masked_fill(lse == -torch.inf, 0.0)
    p = torch.exp(s - base)
    seen = _row_sum(mask.to(p.dtype))
    of_weight = unit * ((s - base).masked_fill(~mask, 0.0).square() + EXPONENTIAL**2)

    # Forward: the error of a weight is in the sum that divides it, as is that of its score.
    out, weighted = p @ v, p.square() * (of_s + of_weight)
    total = _row_sum(weighted)
    of_out = weighted @ v.square() - 2 * out * (weighted @ v) + out.square() * total
    terms = p.square() @ v.square()
    of_out += unit * _partial_sums(out, terms, seen) + half * terms
    of_lse = unit * JOINS * base.square()
    variances = {"lse": total + of_lse, "out": of_out}
    if d_out is None or d_lse is None:
        return {name: _largest_root(variance) for name, variance in variances.items()}

    t = d_out @ v.mT
    of_t = unit * _partial_sums(t, d_out.square() @ v.square().mT, v.shape[-1])
    mean = _row_sum(p * t)
    delta = mean - d_lse.double()[..., None]
    g, c = p * (t - delta), p * (t - mean)
    terms = (d_out * out).square().sum(dim=-1, keepdim=True)
    of_delta = unit * (_partial_sums(mean, terms, v.shape[-1]) + delta.square())
    of_delta += (unit + half) * terms

    # Of a weight, of g, and of a row's sum of g times key. `shift` is that of a row's log-sum-exp.
    total, c_total, pc = (_row_sum(x * of_s) for x in (p.square(), c.square(), p * c))
    alone, shift = of_s + of_weight + half, total + of_lse
    of_p = p.square() * (alone + shift)
    of_g = g.square() * (alone + shift) + 2 * g * p * pc
    of_g += p.square() * (of_t + c_total + of_delta)
    gk, pk = g @ k, p @ k
    of_gk = (g.square() * alone + p.square() * of_t) @ k.square() + gk.square() * shift
    of_gk += 2 * gk * pk * pc + pk.square() * (c_total + of_delta)
    of_gk += unit * _partial_sums(gk, g.square() @ k.square(), seen)

    def by_keys(of_weights: Tensor, weights: Tensor, tensor: Tensor) -> Tensor:
        summed, squares = weights.mT @ tensor, weights.square().mT @ tensor.square()
        rounding = _partial_sums(summed, squares, group * mask.sum(dim=2)[..., None])
        each = of_weights.mT @ tensor.square() + unit * rounding
        return each.unflatten(1, (-1, group)).sum(dim=2)

    variances["d_query"] = scale**2 * of_gk
    variances["d_key"] = scale**2 * by_keys(of_g, g, q)
    variances["d_value"] = by_keys(of_p, p, d_out)
    if sinks is not None:
        share = torch.exp(sink[..., None] - base)
        by_score = _row_sum((p * delta - c).square() * of_s) + delta.square() * of_lse
        of_sink = share.square() * (by_score + of_delta)
        variances["d_sinks"] = of_sink.sum(dim=(0, 2))
    return {name: _largest_root(variance) for name, variance in variances.items()}


def _partial_sums(total: Tensor, squares: Tensor, terms: int | Tensor) -> Tensor:
    """The squares of all that is rounded in a sum: each partial sum, and the result."""
    return terms * (total.square() / 3 + squares / 6) + total.square()


def _row_sum(tensor: Tensor) -> Tensor:
    return tensor.sum(dim=-1, keepdim=True)


def _largest_root(variance: Tensor) -> float:
    # Differences of large terms: what is left of them may be just below 0.
    return math.sqrt(max(0.0, float(variance.max()))) if variance.numel() else 0.0
