"""The noise that rounding adds to each result: its standard deviation, to first order.

Attention has two kinds of long sums that are rounded in the working precision, float32 or float64:
the scores `s = scale * query . key` and the products `t = d_out . value`. A sum of D terms in one
accumulator is rounded D times. Each rounding is a fraction of its partial sum, independent and
uniform within half a unit in the last place, so its variance is `u^2 / 3` times that partial sum's
square, with u = eps / 2. The partial sums wander from 0 to the total; their mean square is
`total^2 / 3 + squares / 6`, where `squares` sums the terms' squares (a Brownian bridge). Rounding
`query * scale` first, as kernels do where the scale is no power of two, adds `squares` once, and
rounding the result `total^2` once.

Those variances go through the derivatives of every result by the scores and the products: squares
add up, as independent errors do. With weights `p`, their gradient's `delta = sum_j p t - d_lse`,
`g = p (t - delta)` and `c = p (t - sum_j p t)`:

    d lse_i     / d s_ij = p_ij                      d delta_i / d s_ij = c_ij
    d out_i     / d s_ij = p_ij (value_j - out_i)    d delta_i / d t_ij = p_ij
    d p_ij      / d s_il = p_ij (1[l = j] - p_il)
    d g_ij      / d s_il = g_ij (1[l = j] - p_il) - p_ij c_il
    d g_ij      / d t_il = p_ij (1[l = j] - p_il)

and `d_query = scale * g key`, `d_key = scale * g' query`, `d_value = p' d_out`, and
`d_sinks = -sum_i exp(sink - lse_i) delta_i`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .cases import Case
from .oracle import operands


def noise(case: Case, grads: tuple[Tensor, Tensor] | None = None) -> dict[str, float]:
    """The greatest standard deviation among each result's elements.

    Args:
        case: a call in its own dtype, which gives the working precision.
        grads: gradients of output and log-sum-exp. Without them only those two have entries.
    """
    unit = (
        torch.finfo(torch.float64 if case.query.dtype == torch.float64 else torch.float32).eps / 2
    )
    q, k, v, mask, scale, sinks, group, d_out, d_lse = operands(case.to(torch.float64), grads)
    s, squares = scale * (q @ k.mT), scale**2 * (q.square() @ k.square().mT)
    rounded = 0.0 if math.frexp(abs(scale))[0] in (0.0, 0.5) else 1.0
    s_noise = _sum_variance(s, squares, q.shape[-1], unit) + unit**2 / 3 * rounded * squares
    s_noise = s_noise.masked_fill(~mask, 0.0)
    s = s.masked_fill(~mask, -torch.inf)
    sink = q.new_full((q.shape[1], 1), -torch.inf) if sinks is None else sinks[:, None]
    lse = torch.logaddexp(torch.logsumexp(s, dim=-1), sink)
    base = lse.masked_fill(lse == -torch.inf, 0.0)
    p = torch.exp(s - base[..., None])
    out = p @ v
    weighted = p.square() * s_noise
    total = _row_sum(weighted)
    variances = {
        "lse": total,
        "out": weighted @ v.square() - 2 * out * (weighted @ v) + out.square() * total,
    }
    if d_out is not None and d_lse is not None:
        d_lse = d_lse.double()[..., None]
        t = d_out @ v.mT
        t_noise = _sum_variance(t, d_out.square() @ v.square().mT, v.shape[-1], unit)
        mean = _row_sum(p * t)
        delta = mean - d_lse
        g, c = p * (t - delta), p * (t - mean)
        by_product = p.square() * t_noise
        # Of `g_ij` by every score and product of its row, and of `g key` likewise.
        c_total, pc = _row_sum(c.square() * s_noise), _row_sum(p * c * s_noise)
        of_g = g.square() * (s_noise * (1 - 2 * p) + total) + p.square() * c_total
        of_g += 2 * g * p * (pc - c * s_noise)
        of_g += p.square() * (t_noise * (1 - 2 * p) + _row_sum(by_product))
        gk, pk = g @ k, p @ k
        of_gk = (g.square() * s_noise) @ k.square() + gk.square() * total + pk.square() * c_total
        of_gk += 2 * gk * pk * pc - 2 * gk * ((g * p * s_noise) @ k)
        of_gk -= 2 * pk * ((g * c * s_noise) @ k)
        of_gk += by_product @ k.square() - 2 * pk * (by_product @ k)
        of_gk += pk.square() * _row_sum(by_product)
        of_p = p.square() * (s_noise * (1 - 2 * p) + total)
        variances["d_query"] = scale**2 * of_gk
        variances["d_key"] = scale**2 * _group_sum(of_g.mT @ q.square(), group)
        variances["d_value"] = _group_sum(of_p.mT @ d_out.square(), group)
        if sinks is not None:
            share = torch.exp(sink - base)[..., None]
            by_score = _row_sum((p * delta - c).square() * s_noise)
            of_sink = share.square() * (by_score + _row_sum(by_product))
            variances["d_sinks"] = of_sink.sum(dim=(0, 2))
    return {name: _largest_root(variance) for name, variance in variances.items()}


def _sum_variance(total: Tensor, squares: Tensor, terms: int, unit: float) -> Tensor:
    """Of sums of products: each partial sum is rounded, and the result."""
    return unit**2 / 3 * (terms * (total.square() / 3 + squares / 6) + total.square())


def _row_sum(tensor: Tensor) -> Tensor:
    return tensor.sum(dim=-1, keepdim=True)


def _group_sum(tensor: Tensor, group: int) -> Tensor:
    """Over the query heads of each key head."""
    return tensor.unflatten(1, (-1, group)).sum(dim=2)


def _largest_root(variance: Tensor) -> float:
    # Differences of large terms: what is left of them may be just below 0.
    return math.sqrt(max(0.0, float(variance.max()))) if variance.numel() else 0.0
