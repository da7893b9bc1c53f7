"""The specification: a dense mask and a softmax, in any dtype up to float64, differentiable by
autograd.

Memory is O(H * Q * K). Half precision is computed in float32. Keys that no query sees are never
read: they may be NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..bands import BandPattern, attended
from . import masked
from .attention_call import AttentionCall, WholeResults
from .layout import laid_out_like_query, lse_dtype
from .partial import Part, PartResults, store


def attend(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Output `[B, H, Q, Dv]` and log-sum-exp `[B, H, Q]`."""
    inputs = call.query, call.key, call.value
    return _masked_attention(*inputs, visible(call), call.scale, call.sinks)


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
    mask = _part_mask(query, key, part)
    store(results, _masked_attention(query, key, value, mask, part.scale, None), merge)


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
    dtype = lse_dtype(query)
    group = query.shape[1] // key.shape[1]
    mask = _part_mask(query, key, part)
    q, d_o, o = (tensor.to(dtype) for tensor in (query, whole.d_out, whole.out))
    k, v = (tensor.to(dtype).repeat_interleave(group, dim=1) for tensor in (key, value))
    scores = masked.scores(q, k, mask) * part.scale
    weights = torch.exp(scores - whole.lse[..., None]).masked_fill(~mask, 0.0)
    delta = (d_o * o).sum(dim=-1) - (0.0 if whole.d_lse is None else whole.d_lse)
    d_scores = weights * (masked.scores(d_o, v, mask) - delta[..., None])
    d_scores = d_scores.masked_fill(~mask, 0.0) * part.scale
    d_query = masked.weighted_sum(d_scores, k, mask)
    d_key, d_value = (
        masked.weighted_sum(rows.mT, others, mask.mT).unflatten(1, (-1, group)).sum(dim=2)
        for rows, others in ((d_scores, q), (weights, d_o))
    )
    for gradient, found in zip(gradients, (d_query, d_key, d_value)):
        gradient.copy_(found)


def visible(call: AttentionCall) -> Tensor:
    """Which keys each query sees: bool `[B or 1, H, Q, K]`."""
    if call.cu_seqlens_q is not None and call.cu_seqlens_k is not None:
        query, key = (tensor[0].transpose(0, 1) for tensor in (call.query, call.key))
        return packed_mask(query, key, call.pattern, call.cu_seqlens_q, call.cu_seqlens_k)
    start = call.query_start if call.query_start_tensor is None else call.query_start_tensor
    return row_mask(call.query, call.key, call.pattern, start, call.key_start)


def row_mask(
    query: Tensor,
    key: Tensor,
    pattern: BandPattern,
    query_start: int | Tensor,
    key_start: Tensor | None,
) -> Tensor:
    """Which keys each query of `band_attention` sees: bool `[B or 1, H, Q, K]`."""
    keys = torch.arange(key.shape[2], device=query.device)
    start = torch.as_tensor(query_start, device=query.device).reshape(-1, 1)
    positions = start + torch.arange(query.shape[2], device=query.device)  # [B or 1, Q]
    distance = positions[:, :, None] - keys
    if key_start is None:
        return attended(pattern.intervals, pattern.prefix, distance, keys)
    first = key_start if key_start.dim() == 2 else key_start[:, None]
    place = keys - first.clamp(min=0)[:, :, None]
    return attended(pattern.intervals, pattern.prefix, distance, place) & (place >= 0)[:, None]


def _part_mask(query: Tensor, key: Tensor, part: Part) -> Tensor:
    """Which keys each query of a call on a part sees: bool `[B or 1, H, Q, K]`."""
    edges = part.intervals
    bands = [(near, far) for near, far in zip(edges[::2], edges[1::2])]
    heads = tuple(
        tuple(band for band in pair if band[0] < band[1]) for pair in zip(bands[::2], bands[1::2])
    )
    queries, keys = (torch.arange(t.shape[2], device=query.device) for t in (query, key))
    distance = (queries[:, None] - keys)[None]
    first = distance.new_zeros(1, 1) if part.key_start is None else part.key_start.clamp(min=0)
    place = keys - first[:, :, None]
    return attended(heads, part.prefix, distance, place) & (place >= 0)[:, None]


def packed_mask(
    query: Tensor, key: Tensor, pattern: BandPattern, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> Tensor:
    """Which keys each query of `band_attention_varlen` sees: bool `[1, H, T, T_k]`."""
    cu_seqlens_q, cu_seqlens_k = (
        offsets.clamp(0, tensor.shape[0]).cummax(0).values
        for offsets, tensor in ((cu_seqlens_q, query), (cu_seqlens_k, key))
    )
    query_document, query_offset = _place(query.shape[0], cu_seqlens_q)
    key_document, key_position = _place(key.shape[0], cu_seqlens_k)
    keys_before = (cu_seqlens_k.diff() - cu_seqlens_q.diff()).long()
    # Tokens before the first document or past the last one belong to none: index 0 only keeps the
    # gather in bounds.
    inside = (query_document < len(keys_before)) & (query_offset >= 0)
    query_position = query_offset + keys_before[query_document * inside]
    distance = query_position[:, None] - key_position
    mask = attended(pattern.intervals, pattern.prefix, distance, key_position)
    mask = mask & (key_position >= 0)
    return (mask & (query_document[:, None] == key_document) & inside[:, None])[None]


def _place(total: int, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """The document of each token and the token's position in it, both `[T]`."""
    tokens = torch.arange(total, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens[1:].long(), tokens, right=True)
    return document, tokens - cu_seqlens.long()[document]


def _masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = lse_dtype(query)
    group = query.shape[1] // key.shape[1]
    q = query.to(dtype)
    k, v = (t.to(dtype).repeat_interleave(group, dim=1) for t in (key, value))

    scores = (masked.scores(q, k, mask) * scale).masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sink = sinks.to(dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    if scores.shape[-1] == 0:  # no keys and no sinks: amax needs an entry
        scores = pad(scores, (0, 1), value=-torch.inf)
    highest = scores.detach().amax(dim=-1, keepdim=True)
    highest = highest.masked_fill(highest.isinf(), 0.0)
    weights = torch.exp(scores - highest)
    total = weights.sum(dim=-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (highest + torch.log(total)).masked_fill(empty, -torch.inf)
    result = masked.weighted_sum((weights / total)[..., : k.shape[2]], v, mask)
    return laid_out_like_query(result, query), lse[..., 0]
