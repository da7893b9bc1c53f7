"""The door of the operators: arguments of a user in, one checked `AttentionCall` out.

Autocast and defaults are applied here and nowhere else.
"""

from __future__ import annotations

from torch import Tensor

from .bands import BandPattern
from .checks import check_attention, check_tensors, check_varlen
from .impl.attention_call import AttentionCall
from .impl.layout import score_scale, under_autocast


def bind(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BandPattern,
    *,
    scale: float | None,
    sinks: Tensor | None,
    query_start: int | Tensor | None,
    key_start: Tensor | None,
) -> AttentionCall:
    """The call of `band_attention` with these arguments; raises as that does."""
    check_tensors(query=query, key=key, value=value)  # autocast asks them for their device
    query, key, value = under_autocast(query, key, value)
    check_attention(
        query,
        key,
        value,
        pattern,
        scale=scale,
        sinks=sinks,
        query_start=query_start,
        key_start=key_start,
    )
    scale = score_scale(query, scale)
    if query_start is None:
        query_start = key.shape[2] - query.shape[2]
    if isinstance(query_start, Tensor):
        return AttentionCall(query, key, value, pattern, scale, sinks, 0, query_start, key_start)
    return AttentionCall(query, key, value, pattern, scale, sinks, query_start, None, key_start)


def bind_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BandPattern,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float | None,
    sinks: Tensor | None,
) -> AttentionCall:
    """The call of `band_attention_varlen` with these arguments; raises as that does.

    The maximal lengths are checked and dropped: implementations read documents from the offsets.
    """
    check_tensors(query=query, key=key, value=value)  # autocast asks them for their device
    query, key, value = under_autocast(query, key, value)
    check_varlen(
        query,
        key,
        value,
        pattern,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        scale=scale,
        sinks=sinks,
    )
    scale = score_scale(query, scale)
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    return AttentionCall(
        query,
        key,
        value,
        pattern,
        scale,
        sinks,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )
