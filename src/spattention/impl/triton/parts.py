"""Attention over a part of the keys of each row, and the share of the gradients that it gives.

Positions count from the first query: a key before it has a negative distance added to all edges of
the bands. So queries start at position 0, whatever keys they have, and the Hopper kernels run such
calls too. They read whole blocks of keys; all keys of a part are keys that some query sees.
"""

from __future__ import annotations

import torch

from ...bands import BandPattern
from ..layout import empty_like_query
from . import launch
from .arguments import Positions
from .call import BackwardTensors, Call, ForwardTensors, ensure_inner_contiguous


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: BandPattern,
    *,
    scale: float,
    query_start: int,
    key_start: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[B, H, Q, D]` and log-sum-exp `[B, H, Q]` of these keys, without a graph.

    Args:
        query, key, value: `[B, H, Q, D]`, `[B, Hkv, K, D]` twice.
        pattern: the bands; with a prefix, queries and keys must both have the document's start.
        scale: factor of the scores.
        query_start: position of the first query, counted from the first key.
        key_start: int32 `[B, Q]`.
    """
    out = empty_like_query(query, query.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    query, key, value = (ensure_inner_contiguous(each) for each in (query, key, value))
    call = _call(query, key, pattern, scale, query_start, key_start)
    launch.forward(call, ForwardTensors(query, key, value, out, lse, None))
    return out, lse


def differentiate(
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
    """The share of these keys in the gradients of query, key and value; `out` and `lse` are those
    of all keys."""
    tensors = query, key, value, out, d_out
    query, key, value, out, d_out = (ensure_inner_contiguous(each) for each in tensors)
    gradients = [empty_like_query(each, each.shape[3]) for each in (query, key, value)]
    call = _call(query, key, pattern, scale, query_start, key_start)
    call.has_all_keys = False
    launch.backward(
        call, BackwardTensors(query, key, value, out, d_out, *gradients), lse.contiguous(), d_lse
    )
    d_query, d_key, d_value = gradients
    if scale == 0.0:
        d_query.zero_()
        d_key.zero_()
    return d_query, d_key, d_value


def _call(
    query: torch.Tensor,
    key: torch.Tensor,
    pattern: BandPattern,
    scale: float,
    query_start: int,
    key_start: torch.Tensor | None,
) -> Call:
    positions = Positions(None, key_start, None, None)
    if key_start is not None:  # an index into the keys, which stays where it is
        return Call(query, key, pattern.flat, scale, query_start, positions, pattern.prefix)
    shifted = []
    for near, far in zip(pattern.flat[::2], pattern.flat[1::2]):
        shifted += [near - query_start, far - query_start] if near < far else [0, 0]
    return Call(query, key, shifted, scale, 0, positions, pattern.prefix)
