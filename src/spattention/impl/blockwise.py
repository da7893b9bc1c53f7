"""Pure PyTorch, any device: blocks of queries and keys along the bands, each computed by itself.

Forward merges the partial outputs of blocks of queries by their log-sum-exp; backward, given output
and log-sum-exp of the whole, adds up the gradients of blocks of keys. Nothing is kept beyond
inputs, output and log-sum-exp, and a batch of blocks needs some megabytes.

On the CPU a batch of blocks is computed by PyTorch's own attention kernel, and again by exact
products where a value may have reached queries that do not see it. Other devices run the exact
products at once. Work is float32 (float64 for float64 input).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import block_products
from .attention_call import AttentionCall, WholeResults
from .block_products import Edges
from .blocks import runs, segments
from .layout import empty_like_query, lse_dtype, without_autocast
from .library import batched, differentiable, register
from .partial import Part, PartResults, store
from .sinks import sink_gradient


def attend(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Output `[B, H, Q, Dv]` and log-sum-exp `[B, H, Q]`, recorded for autograd."""
    return forward(call.query, call.key, call.value, *_rest(call))


def attend_part(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    results: PartResults,
    part: Part,
    *,
    merge: bool,
) -> None:
    """Attention over a part of the keys, into `results`."""
    # Results of half precision would be rounded before they are joined.
    query, key, value = (each.to(results.lse.dtype) for each in (query, key, value))
    rest = 0, None, part.key_start, None, None, part.intervals, part.prefix, part.scale
    store(results, _forward(query, key, value, None, *rest), merge)


def differentiate_part(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    whole: WholeResults,
    gradients: Sequence[Tensor],
    part: Part,
) -> None:
    """Gradients of query, key and value that these keys give to attention over more keys, into
    `gradients`."""
    d_lse = torch.zeros_like(whole.lse) if whole.d_lse is None else whole.d_lse
    inputs = whole.d_out, d_lse, query, key, value, whole.out, whole.lse, None
    rest = 0, None, part.key_start, None, None, part.intervals, part.prefix, part.scale
    for gradient, found in zip(gradients, _backward(*inputs, *rest)):
        gradient.copy_(found)


def _rest(call: AttentionCall) -> tuple[Any, ...]:
    """Arguments of both operators after their tensors."""
    return (
        call.sinks,
        call.query_start,
        call.query_start_tensor,
        call.key_start,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        call.pattern.flat,
        call.pattern.prefix,
        call.scale,
    )


def _forward(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    """`out [B, H, Q, Dv]` and the log-sum-exp `[B, H, Q]`; packed calls have B = 1. Arguments are
    those of `_COMMON`.
    """
    *positions, intervals, prefix, scale = rest
    dtype = lse_dtype(query)
    out = empty_like_query(query, value.shape[-1])
    total = out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)
    lse = query.new_empty(query.shape[:3], dtype=dtype)
    parts = segments(query, key, *positions)
    query, key, value = (_last_dense(tensor) for tensor in (query, key, value))
    query, scale, _ = _scaled(query, scale, dtype)
    if not query.is_cpu:
        key, value = block_products.spared(key, value)
    total.zero_()
    lse.fill_(-torch.inf)
    edges = Edges(query.device, dtype)
    group = query.shape[1] // key.shape[1]
    for segment in parts:
        rows = segment.rows
        if sinks is not None:
            lse[rows, :, segment.queries] = sinks[:, None].to(dtype)
        views = query, key, value, total
        for run in runs(intervals, segment, *views, prefix=prefix, by_keys=False):
            q = run.query_view(query, rows).to(dtype)
            k, v = (run.key_view(tensor, rows, group).to(dtype) for tensor in (key, value))
            blocks = q, k, v, edges(run), scale
            if q.is_cpu:
                part, log_sum = block_products.fused_or_exact(*blocks, run.early, run.late)
            else:
                part, log_sum = block_products.exact(*blocks)
            o, whole = (run.query_view(tensor, rows) for tensor in (total, lse[..., None]))
            if run.first and sinks is None:
                o.copy_(part)
                whole.copy_(log_sum[..., None])
            else:
                _merge(o, whole, part, log_sum[..., None])
    return out if total is out else out.copy_(total), lse


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(query.shape[:3], dtype=lse_dtype(query))
    return empty_like_query(query, value.shape[-1]), lse


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Join a partial output with log-sum-exp, `[..., Q, 1]`, to `out` and `lse` in place."""
    total = torch.logaddexp(lse, part_lse)
    base = total.masked_fill(total == -torch.inf, 0.0)
    out.mul_(torch.exp(lse - base)).addcmul_(part, torch.exp(part_lse - base))
    lse.copy_(total)


def _backward(
    d_out: Tensor,
    d_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and sinks (zeros without sinks)."""
    *positions, intervals, prefix, scale = rest
    dtype, given = lse.dtype, query.dtype
    d_query, d_key, d_value = (torch.zeros_like(t, dtype=dtype) for t in (query, key, value))
    parts = segments(query, key, *positions)
    query, key, value, d_out, out = (_last_dense(t) for t in (query, key, value, d_out, out))
    d_sinks = lse.new_zeros(query.shape[1])
    if sinks is not None:
        d_sinks = sink_gradient(sinks, d_out, d_lse, out, lse)
    query, scale, factor = _scaled(query, scale, dtype)
    any_d_lse, exact = True, True
    if query.is_cpu:  # elsewhere reading a flag would wait for the device
        any_d_lse = bool(d_lse.any())
        exact = block_products.may_overflow(dtype, scale, (query, key), (d_out, value))
        exact = exact or not bool((d_lse.isfinite() & (lse < torch.inf)).all())
    else:
        query, key, value, d_out, lse = block_products.spared_gradients(
            query, key, value, d_out, lse
        )
    # A row without keys: every weight is exp(score - inf) = 0.
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    differentiate = block_products.exact_gradients if exact else block_products.fused_gradients
    group = query.shape[1] // key.shape[1]
    edges = Edges(query.device, dtype)
    for segment in parts:
        rows = segment.rows
        others = value, out, d_out, d_query, d_key, d_value
        for run in runs(intervals, segment, query, key, *others, prefix=prefix, by_keys=True):
            q, d_o, o = (run.query_view(t, rows).to(dtype) for t in (query, d_out, out))
            log_sum = run.query_view(lse[..., None], rows)
            d_log_sum = run.query_view(d_lse[..., None], rows) if any_d_lse else None
            k, v = (run.key_view(t, rows, group).to(dtype) for t in (key, value))
            grads = differentiate(q, k, v, o, log_sum, d_o, d_log_sum, edges(run), scale)
            for blocks, alone in run.apart():
                alone.query_view(d_query, rows).add_(grads[0][:, blocks])
            run.key_view(d_key, rows, group).add_(grads[1])
            run.key_view(d_value, rows, group).add_(grads[2])
    if factor != 1.0:
        d_query *= factor
    return d_query.to(given), d_key.to(given), d_value.to(given), d_sinks


def _fake_backward(
    d_out: Tensor,
    d_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    grads = (torch.empty_like(tensor) for tensor in (query, key, value))
    return (*grads, lse.new_empty(query.shape[1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, sinks, query_start, *index, intervals, prefix, scale = inputs
    ctx.save_for_backward(query, key, value, *output, sinks, *index)
    ctx.constants = query_start, intervals, prefix, scale


def _gradients(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    *saved, sinks, starts, key_start, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    query_start, *bands = ctx.constants
    positions = query_start, starts, key_start, cu_seqlens_q, cu_seqlens_k
    with without_autocast(d_out):
        gradients = backward(d_out, d_lse, *saved, sinks, *positions, *bands)
    d_query, d_key, d_value, d_sinks = gradients
    return d_query, d_key, d_value, None if sinks is None else d_sinks.to(sinks.dtype), *(None,) * 8


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


_COMMON = (
    "Tensor? sinks, SymInt query_start, Tensor? query_start_tensor, Tensor? key_start, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, int[] intervals, int prefix, float scale"
)
_ANY_DEVICE = ("CompositeExplicitAutograd",)
forward = register(
    "blockwise",
    f"(Tensor query, Tensor key, Tensor value, {_COMMON}) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    keys=_ANY_DEVICE,
)
backward = register(
    "blockwise_backward",
    "(Tensor d_out, Tensor d_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    f"{_COMMON}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    keys=_ANY_DEVICE,
)
differentiable(forward, _save, _gradients)
differentiable(backward)
batched(forward, packed="cu_seqlens_q")
batched(backward, packed="cu_seqlens_q", sums_sinks=True)
