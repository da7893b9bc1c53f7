"""Pure PyTorch, any device: blocks of queries and keys along the bands, each computed by itself.

Forward merges the partial outputs of blocks of queries by their log-sum-exp; backward, given output
and log-sum-exp of the whole, adds up the gradients of blocks of keys. Nothing is kept beyond
inputs, output and log-sum-exp, and a batch of blocks needs some megabytes.

On the CPU a batch of blocks is computed by PyTorch's own attention kernel, which writes no scores
to memory; on every other device by batched products. Work is float32 (float64 for float64 input).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..bands import BandPattern
from .blocks import Run, runs, segments
from .layout import empty_like_query, lse_dtype, without_autocast


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BandPattern,
    *,
    scale: float,
    sinks: Tensor | None,
    query_start: int | Tensor,
    key_start: Tensor | None,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor]:
    """`[B, H, Q, D]` attention; arguments and results as in `spattention.band_attention`."""
    rows = isinstance(query_start, Tensor)
    return _forward(
        query,
        key,
        value,
        sinks,
        query_start if rows else None,
        key_start,
        None,
        None,
        pattern.flat,
        0 if rows else query_start,
        scale,
    )


def attend_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BandPattern,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float,
    sinks: Tensor | None,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor]:
    """`[T, H, D]` packed documents; arguments and results as in
    `spattention.band_attention_varlen`."""
    row = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
    out, lse = _forward(*row, sinks, None, None, cu_seqlens_q, cu_seqlens_k, pattern.flat, 0, scale)
    return out.squeeze(0).transpose(0, 1), lse.squeeze(0)


@torch.library.custom_op("spattention::blockwise", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    query_start: Tensor | None,
    key_start: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    intervals: Sequence[int],
    start: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    dtype = lse_dtype(query)
    out = empty_like_query(query, value.shape[-1])
    total = out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)
    total.zero_()
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=dtype)
    query, key, value = (_last_dense(tensor) for tensor in (query, key, value))
    query, scale, _ = _scaled(query, scale, dtype)
    group = query.shape[1] // key.shape[1]
    edges = _Edges(query.device, dtype)
    for segment in segments(query, key, query_start, key_start, cu_seqlens_q, cu_seqlens_k, start):
        rows = segment.rows
        if sinks is not None:
            lse[rows, :, segment.queries] = sinks[:, None].to(dtype)
        for run in runs(intervals, segment, query, key, value, total, by_keys=False):
            q = run.query_view(query, rows).to(dtype)
            k, v = (run.key_view(tensor, rows, group).to(dtype) for tensor in (key, value))
            part, log_sum = (_fused if q.is_cpu else _plain)(q, k, v, edges(run), scale)
            if run.early or run.late:
                log_sum[:, :, : run.early] = -torch.inf
                log_sum[:, :, run.queries - run.late :] = -torch.inf
            o, whole = (run.query_view(tensor, rows) for tensor in (total, lse[..., None]))
            if run.first and sinks is None:
                o.copy_(part)
                whole.copy_(log_sum[..., None])
            else:
                _merge(o, whole, part, log_sum[..., None])
    return out if total is out else out.copy_(total), lse


@_forward.register_fake
def _(query, key, value, *rest):  # type: ignore[no-untyped-def]
    lse = query.new_empty(query.shape[:3], dtype=lse_dtype(query))
    return empty_like_query(query, value.shape[-1]), lse


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Join a partial output with log-sum-exp, `[..., Q, 1]`, to `out` and `lse` in place."""
    total = torch.logaddexp(lse, part_lse)
    base = total.masked_fill(total == -torch.inf, 0.0)
    out.mul_(torch.exp(lse - base)).addcmul_(part, torch.exp(part_lse - base))
    lse.copy_(total)


@torch.library.custom_op("spattention::blockwise_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    d_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    query_start: Tensor | None,
    key_start: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    intervals: Sequence[int],
    start: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = lse.dtype
    d_query, d_key, d_value = (torch.zeros_like(t, dtype=dtype) for t in (query, key, value))
    query, key, value, d_out, out = (_last_dense(t) for t in (query, key, value, d_out, out))
    d_sinks = lse.new_zeros(query.shape[1])
    if sinks is not None:
        d_sinks = _sink_gradient(sinks, d_out, d_lse, out, lse)
    given = query.dtype
    query, scale, factor = _scaled(query, scale, dtype)
    any_d_lse = not query.is_cpu or bool(d_lse.any())  # elsewhere this would wait for the device
    # A row without keys: every weight is exp(score - inf) = 0.
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    group = query.shape[1] // key.shape[1]
    edges = _Edges(query.device, dtype)
    for segment in segments(query, key, query_start, key_start, cu_seqlens_q, cu_seqlens_k, start):
        rows = segment.rows
        others = value, out, d_out, d_query, d_key, d_value
        for run in runs(intervals, segment, query, key, *others, by_keys=True):
            q, d_o, o = (run.query_view(t, rows).to(dtype) for t in (query, d_out, out))
            log_sum = run.query_view(lse[..., None], rows)
            d_log_sum = run.query_view(d_lse[..., None], rows) if any_d_lse else None
            k, v = (run.key_view(t, rows, group).to(dtype) for t in (key, value))
            differentiate = _differentiate_fused if q.is_cpu else _differentiate_plain
            grads = differentiate(q, k, v, o, log_sum, d_o, d_log_sum, edges(run), scale)
            for blocks, alone in run.apart():
                alone.query_view(d_query, rows).add_(grads[0][:, blocks])
            run.key_view(d_key, rows, group).add_(grads[1])
            run.key_view(d_value, rows, group).add_(grads[2])
    if factor != 1.0:
        d_query *= factor
    return d_query.to(given), d_key.to(given), d_value.to(given), d_sinks


@_backward.register_fake
def _(d_out, d_lse, query, key, value, out, lse, sinks, *rest):  # type: ignore[no-untyped-def]
    grads = (torch.empty_like(tensor) for tensor in (query, key, value))
    return (*grads, lse.new_empty(query.shape[1]))


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, intervals, start, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.constants = (intervals, start, scale)


def _differentiate(ctx, d_out: Tensor, d_lse: Tensor):  # type: ignore[no-untyped-def]
    query, key, value, sinks, *index, out, lse = ctx.saved_tensors
    with without_autocast(query):
        d_query, d_key, d_value, d_sinks = _backward(
            d_out, d_lse, query, key, value, out, lse, sinks, *index, *ctx.constants
        )
    return d_query, d_key, d_value, None if sinks is None else d_sinks.to(sinks.dtype), *(None,) * 7


_forward.register_autograd(_differentiate, setup_context=_save)


def _last_dense(tensor: Tensor) -> Tensor:
    """The same values, each vector contiguous: PyTorch's kernel reads no other."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _scaled(query: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, float, float]:
    """Queries, the scale that is left for their scores, and the scale that they hold already.

    Forward and backward must round scores alike: then the errors of score and log-sum-exp cancel
    where a weight is near 1. Of PyTorch's kernels one scales before the product and one after it,
    which is the same for powers of two alone.
    """
    if scale == 0 or abs(math.frexp(scale)[0]) == 0.5:
        return query, scale, 1.0
    return query.to(dtype) * scale, 1.0, scale


def _sink_gradient(sinks: Tensor, d_out: Tensor, d_lse: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """`[H]`, head by head to spare memory."""
    found = []
    for head, sink in enumerate(sinks.to(lse.dtype)):
        log_sum = lse[:, head]
        delta = (d_out[:, head].to(lse.dtype) * out[:, head]).sum(dim=-1) - d_lse[:, head]
        weight = torch.exp(sink - log_sum).masked_fill_(log_sum == -torch.inf, 0.0)
        found.append((weight * -delta).sum(dtype=torch.float64))
    return torch.stack(found).to(lse.dtype)


class _Edges:
    """A bias for the scores of a run's blocks, `[queries, keys]`: 0 inside the band, -inf outside;
    None where all lie inside."""

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
        # For each distance, from that of the last query and first key down to the opposite one.
        longest = ahead + queries - 1
        bias = torch.full((queries + keys - 1,), -torch.inf, dtype=self._dtype, device=self._device)
        bias[max(0, longest - width + 1) : max(0, longest + 1)] = 0.0
        return bias.unfold(0, keys, 1).flip(0)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output `[n, repeats, queries, Dv]` and log-sum-exp `[n, repeats, queries]` of blocks; in rows
    without keys the log-sum-exp is undefined."""
    head_dim = v.shape[-1]
    q, k, v = _alike(q, k, v)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, False, attn_mask=bias, scale=scale
    )
    return out[..., :head_dim], lse


def _plain(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """As `_fused`."""
    scores = (q @ k.mT).mul_(scale)
    if bias is not None:
        scores += bias
    lse = torch.logsumexp(scores, dim=-1)
    base = lse.masked_fill(lse == -torch.inf, 0.0)
    return scores.sub_(base[..., None]).exp_() @ v, lse


def _differentiate_fused(
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
    """Gradients of blocks of queries, keys and values, given output and log-sum-exp, `[..., 1]`, of
    all keys."""
    head_dim, value_dim = q.shape[-1], v.shape[-1]
    if d_lse is not None:
        # The kernel knows no gradient of the log-sum-exp: it is that of one more column of value,
        # all ones, which the kernel does not count among the output's.
        v, d_out = torch.cat([v, torch.ones_like(v[..., :1])], -1), torch.cat([d_out, d_lse], -1)
    q, k, v, out, d_out = _alike(q, k, v, out, d_out)
    halves = q.shape[0] * q.shape[1] == 1 and k.shape[2] % 2 == 0
    if halves:  # the kernel has a thread for each block
        q, out, lse, d_out = (t.expand(-1, 2, -1, -1) for t in (q, out, lse, d_out))
        k, v = (t[0, 0].unflatten(0, (2, -1))[None] for t in (k, v))
        bias = None if bias is None else bias.unflatten(1, (2, -1)).movedim(1, 0)[None]
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        d_out, q, k, v, out, lse[..., 0], 0.0, False, attn_mask=bias, scale=scale
    )
    d_q, d_k, d_v = grads
    if halves:
        d_q = d_q.sum(dim=1, keepdim=True)
        d_k, d_v = (t.flatten(1, 2)[:, None] for t in (d_k, d_v))
    return d_q[..., :head_dim], d_k[..., :head_dim], d_v[..., :value_dim]


def _alike(*tensors: Tensor) -> list[Tensor]:
    """Filled up with zeros to one head_dim."""
    widest = max(tensor.shape[-1] for tensor in tensors)
    return [
        tensor if tensor.shape[-1] == widest else pad(tensor, (0, widest - tensor.shape[-1]))
        for tensor in tensors
    ]


def _differentiate_plain(
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
    """As `_differentiate_fused`."""
    scores = (q @ k.mT).mul_(scale)
    if bias is not None:
        scores += bias
    weights = scores.sub_(lse).exp_()
    delta = (d_out * out).sum(dim=-1, keepdim=True)
    if d_lse is not None:
        delta -= d_lse
    d_scores = (d_out @ v.mT).sub_(delta).mul_(weights).mul_(scale)
    return d_scores @ k, d_scores.mT @ q, weights.mT @ d_out
