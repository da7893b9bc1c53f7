"""The specification: a dense mask and a softmax, in any dtype up to float64, differentiable by
autograd.

Memory is O(H * Q * K). Half precision is computed in float32. Keys that no query sees are never
read: they may be NaN.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from ..bands import BandPattern, attended
from . import masked
from .layout import laid_out_like_query, lse_dtype


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: BandPattern,
    *,
    scale: float,
    sinks: torch.Tensor | None,
    query_start: int | torch.Tensor,
    key_start: torch.Tensor | None,
    deterministic: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[B, H, Q, D]` attention; arguments and results as in `spattention.band_attention`."""
    mask = row_mask(query, key, pattern, query_start, key_start)
    return _masked_attention(query, key, value, mask, scale, sinks)


def attend_part(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: BandPattern,
    *,
    scale: float,
    query_start: int,
    key_start: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend` over a part of the keys, every one of which some query sees."""
    return attend(
        query,
        key,
        value,
        pattern,
        scale=scale,
        sinks=None,
        query_start=query_start,
        key_start=key_start,
    )


def differentiate_part(
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    pattern: BandPattern,
    *,
    scale: float,
    query_start: int,
    key_start: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value that these keys give to attention over more keys.

    `out` and `lse` are those over all keys, sinks included; the other arguments are those of
    `attend_part`.
    """
    dtype = lse_dtype(query)
    group = query.shape[1] // key.shape[1]
    mask = row_mask(query, key, pattern, query_start, key_start)
    q, d_o, o = (tensor.to(dtype) for tensor in (query, d_out, out))
    k, v = (tensor.to(dtype).repeat_interleave(group, dim=1) for tensor in (key, value))
    scores = masked.scores(q, k, mask) * scale
    weights = torch.exp(scores - lse[..., None]).masked_fill(~mask, 0.0)
    delta = (d_o * o).sum(dim=-1) - (0.0 if d_lse is None else d_lse)
    d_scores = weights * (masked.scores(d_o, v, mask) - delta[..., None])
    d_scores = d_scores.masked_fill(~mask, 0.0) * scale
    d_query = masked.weighted_sum(d_scores, k, mask)
    d_key, d_value = (
        masked.weighted_sum(rows.mT, others, mask.mT).unflatten(1, (-1, group)).sum(dim=2)
        for rows, others in ((d_scores, q), (weights, d_o))
    )
    return d_query.to(query.dtype), d_key.to(query.dtype), d_value.to(query.dtype)


def attend_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: BandPattern,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float,
    sinks: torch.Tensor | None,
    deterministic: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[T, H, D]` packed documents; arguments and results as in
    `spattention.band_attention_varlen`."""
    mask = packed_mask(query, key, pattern, cu_seqlens_q, cu_seqlens_k)
    out, lse = _masked_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        mask,
        scale,
        sinks,
    )
    return out[0].transpose(0, 1), lse[0]


def row_mask(
    query: torch.Tensor,
    key: torch.Tensor,
    pattern: BandPattern,
    query_start: int | torch.Tensor,
    key_start: torch.Tensor | None,
) -> torch.Tensor:
    """Which keys each query of `band_attention` sees: bool `[B or 1, H, Q, K]`."""
    keys = torch.arange(key.shape[2], device=query.device)
    start = torch.as_tensor(query_start, device=query.device).reshape(-1, 1)
    positions = start + torch.arange(query.shape[2], device=query.device)  # [B or 1, Q]
    distance = positions[:, :, None] - keys
    if key_start is None:
        return attended(pattern, distance, keys)
    first = key_start if key_start.dim() == 2 else key_start[:, None]
    place = keys - first.clamp(min=0)[:, :, None]
    return attended(pattern, distance, place) & (place >= 0)[:, None]


def packed_mask(
    query: torch.Tensor,
    key: torch.Tensor,
    pattern: BandPattern,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
) -> torch.Tensor:
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
    mask = attended(pattern, query_position[:, None] - key_position, key_position)
    mask = mask & (key_position >= 0)
    return (mask & (query_document[:, None] == key_document) & inside[:, None])[None]


def _place(total: int, cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The document of each token and the token's position in it, both `[T]`."""
    tokens = torch.arange(total, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens[1:].long(), tokens, right=True)
    return document, tokens - cu_seqlens.long()[document]


def _masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
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
