"""Attention of one batch of blocks, and its gradients, given all that the blocks reach.

`fused` and `fused_gradients` call PyTorch's attention kernel for CPUs, which writes no scores to
memory. A masked pair has the weight 0 there, so a value that is infinite or NaN reaches every query
of its block. `exact` and `exact_gradients` write the scores and leave masked pairs out.

Shapes: n heads or batch entries, r blocks of each, Q queries and K keys a block, D head_dim.
A bias `[Q, K]` is 0 where the query sees the key and -inf elsewhere; None where all are seen.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..compat.pytorch import cpu_attention, cpu_attention_backward
from .blocks import Run
from .masked import sum_of_seen


class Edges:
    """The bias of a run's blocks. The last few are cached."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._made: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, run: Run) -> Tensor | None:
        if run.inside:
            return None
        at = (run.queries, run.keys, run.ahead, run.width)
        if at not in self._made:
            if len(self._made) == 4:
                self._made.clear()
            self._made[at] = self._make(*at)
        return self._made[at]

    def _make(self, queries: int, keys: int, ahead: int, width: int) -> Tensor:
        # One entry a distance, from the last query and first key down to the opposite corner.
        longest = ahead + queries - 1
        bias = torch.full((queries + keys - 1,), -torch.inf, dtype=self._dtype, device=self._device)
        bias[max(0, longest - width + 1) : max(0, longest + 1)] = 0.0
        return bias.unfold(0, keys, 1).flip(0)


def fused_or_exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    early: int,
    late: int,
) -> tuple[Tensor, Tensor]:
    """The same as `exact`, by `fused` where nothing infinite or NaN can have spread.

    Args:
        q, k, v, bias, scale: as in `exact`.
        early, late: number of the first and of the last queries without keys.
    """
    out, lse = fused(q, k, v, bias, scale)
    rows = lse[..., early : lse.shape[-1] - late] if early or late else lse
    # The kernel also loses NaN: a query that sees nothing else gets 0, and 0 as log-sum-exp. Sums
    # show all of it in one number. One that overflows by itself costs time alone.
    if not math.isfinite(out.sum() + rows.sum() + rows.reciprocal().sum()):
        return exact(q, k, v, bias, scale)
    if early or late:
        lse[..., :early] = -torch.inf
        lse[..., lse.shape[-1] - late :] = -torch.inf
    return out, lse


def fused(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of blocks by PyTorch's kernel. The log-sum-exp of a query without
    keys is undefined."""
    head_dim = v.shape[-1]
    q, k, v = _padded(q, k, v)
    out, lse = cpu_attention(q, k, v, 0.0, False, attn_mask=bias, scale=scale)
    return out[..., :head_dim], lse


def exact(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output `[n, r, Q, Dv]` and log-sum-exp `[n, r, Q]` of blocks, in which no masked key or value
    reaches a query. A query without keys has 0 and -inf.

    On devices other than the CPU `v` must be finite (see `spared`).

    Args:
        q: `[n, r, Q, D]`.
        k, v: `[n, r, K, D]`.
        bias: see above.
        scale: factor of the scores.
    """
    scores = (q @ k.mT).mul_(scale)
    if bias is not None:
        scores.masked_fill_(bias != 0, -torch.inf)
    highest = scores.amax(dim=-1, keepdim=True)
    highest = highest.masked_fill(highest.isinf(), 0.0)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    lse = highest + torch.log(total)
    return _product(weights.div_(total.masked_fill(total == 0, 1.0)), v, bias), lse[..., 0]


def fused_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the queries, keys and values of blocks.

    Args:
        q, d_out, out: `[n, r, Q, D]`; `out` is the output over all keys, those of other blocks
            included.
        k, v: `[n, r, K, D]`.
        lse: `[n, r, Q, 1]`, over all keys.
        d_lse: `[n, r, Q, 1]`, or None for zeros.
        bias: see above.
        scale: factor of the scores.
    """
    head_dim, value_dim = q.shape[-1], v.shape[-1]
    if d_lse is not None:
        v, d_out = _append_lse_column(v, d_out, d_lse)
    q, k, v, out, d_out = _padded(q, k, v, out, d_out)
    # Products with fewer keys are rounded in another order than those of the forward pass.
    halves = q.shape[0] * q.shape[1] == 1 and k.shape[2] % 2 == 0 and k.shape[2] >= 32
    if halves:  # the kernel has a thread for each block
        q, out, lse, d_out = (t.expand(-1, 2, -1, -1) for t in (q, out, lse, d_out))
        k, v, bias = _split_keys(k, v, bias)
    d_q, d_k, d_v = cpu_attention_backward(
        d_out, q, k, v, out, lse[..., 0], 0.0, False, attn_mask=bias, scale=scale
    )
    if halves:
        d_q = d_q.sum(dim=1, keepdim=True)
        d_k, d_v = (t.flatten(1, 2)[:, None] for t in (d_k, d_v))
    return d_q[..., :head_dim], d_k[..., :head_dim], d_v[..., :value_dim]


def exact_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same as `fused_gradients`, in which no masked pair adds to a gradient.

    On devices other than the CPU `q`, `k`, `v` and `d_out` must be finite (see
    `spared_gradients`).
    """
    weights = (q @ k.mT).mul_(scale).sub_(lse).exp_()
    delta = (d_out * out).sum(dim=-1, keepdim=True)
    if d_lse is not None:
        delta -= d_lse
    d_scores = (d_out @ v.mT).sub_(delta).mul_(weights).mul_(scale)
    if bias is not None:
        weights.masked_fill_(bias != 0, 0.0)
        d_scores.masked_fill_(bias != 0, 0.0)
    across = None if bias is None else bias.mT
    d_k, d_v = _product(d_scores.mT, q, across), _product(weights.mT, d_out, across)
    return _product(d_scores, k, bias), d_k, d_v


def may_overflow(dtype: torch.dtype, scale: float, *factors: tuple[Tensor, Tensor]) -> bool:
    """True where a product of rows of some pairs of tensors, times a scale in a dtype, may be
    infinite or NaN: as a masked pair it would reach its whole block. Reads the values, so it waits
    for a device."""
    largest = torch.finfo(dtype).max / 4
    for left, right in factors:
        bound = _magnitude(left) * _magnitude(right) * left.shape[-1] * max(1.0, abs(scale))
        if not bound < largest:  # nor is NaN
            return True
    return False


def _magnitude(tensor: Tensor) -> float:
    if tensor.numel() == 0:
        return 0.0
    low, high = torch.aminmax(tensor)
    return max(-float(low), float(high))


def spared(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values for `exact` where reading a flag would wait for the device.

    A value that is not finite is 0 here. Its key is NaN instead, so the queries that see the token
    have NaN as output and log-sum-exp, and no other query does.
    """
    finite = value.isfinite()
    key = key.masked_fill(~finite.all(dim=-1, keepdim=True), torch.nan)
    return key, value.masked_fill(~finite, 0.0)


def spared_gradients(
    query: Tensor, key: Tensor, value: Tensor, d_out: Tensor, lse: Tensor
) -> tuple[Tensor, ...]:
    """The same tensors for `exact_gradients`. Everything that is not finite is 0; where that is a
    query's, its log-sum-exp is NaN instead, and so are the gradients of the tokens it sees."""
    finite = [tensor.isfinite() for tensor in (query, key, value, d_out)]
    lse = lse.masked_fill(~(finite[0].all(dim=-1) & finite[3].all(dim=-1)), torch.nan)
    given = (query, key, value, d_out)
    return *(tensor.masked_fill(~each, 0.0) for tensor, each in zip(given, finite)), lse


def _product(weights: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None or not values.is_cpu:
        return weights @ values
    return sum_of_seen(weights, values, bias == 0)


def _append_lse_column(v: Tensor, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Values and output's gradient with one more column. The kernel knows no gradient of the
    log-sum-exp, but it is that of a column of ones that the output does not count."""
    return torch.cat([v, torch.ones_like(v[..., :1])], -1), torch.cat([d_out, d_lse], -1)


def _split_keys(k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The keys of a single block as two blocks."""
    k, v = (t[0, 0].unflatten(0, (2, -1))[None] for t in (k, v))
    return k, v, None if bias is None else bias.unflatten(1, (2, -1)).movedim(1, 0)[None]


def _padded(*tensors: Tensor) -> list[Tensor]:
    """Filled up with zeros to one head_dim."""
    widest = max(tensor.shape[-1] for tensor in tensors)
    return [
        tensor if tensor.shape[-1] == widest else pad(tensor, (0, widest - tensor.shape[-1]))
        for tensor in tensors
    ]
