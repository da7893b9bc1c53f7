"""Attention over a part of the keys of each row, and the share of the gradients that it gives.

Positions count from the first query: a key before it has a negative distance added to all edges of
the bands. So queries start at position 0, whatever keys they have, and the Hopper kernels run such
calls too. They read whole blocks of keys; all keys of a part are keys that some query sees.
"""

from __future__ import annotations

import torch

from ..attention_call import AttentionCall, WholeResults
from ..layout import empty_like_query
from . import launch
from .arguments import Positions
from .call import BackwardTensors, Call, ForwardTensors, ensure_inner_contiguous


def attend_part(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[B, H, Q, D]` and log-sum-exp `[B, H, Q]` of these keys, without a graph.

    With a prefix, queries and keys must both have the document's start: `key_start` `[B, Q]`.
    """
    out = empty_like_query(call.query, call.query.shape[3])
    lse = call.query.new_empty(call.query.shape[:3], dtype=torch.float32)
    query, key, value = (ensure_inner_contiguous(t) for t in (call.query, call.key, call.value))
    launch.forward(_facts(call, query, key), ForwardTensors(query, key, value, out, lse, None))
    return out, lse


def differentiate_part(
    call: AttentionCall, whole: WholeResults
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value that these keys give to attention over more keys."""
    tensors = call.query, call.key, call.value, whole.out, whole.d_out
    query, key, value, out, d_out = (ensure_inner_contiguous(each) for each in tensors)
    d_query, d_key, d_value = (empty_like_query(t, t.shape[3]) for t in (query, key, value))
    launch.backward(
        _facts(call, query, key),
        BackwardTensors(query, key, value, out, d_out, d_query, d_key, d_value),
        whole.lse.contiguous(),
        whole.d_lse,
    )
    if call.scale == 0.0:
        d_query.zero_()
        d_key.zero_()
    return d_query, d_key, d_value


def _facts(call: AttentionCall, query: torch.Tensor, key: torch.Tensor) -> Call:
    pattern, start = call.pattern, call.query_start
    positions = Positions(None, call.key_start, None, None)
    edges = pattern.flat
    if call.key_start is None:  # else an index into the keys, which stays where it is
        shifted = []
        for near, far in zip(edges[::2], edges[1::2]):
            shifted += [near - start, far - start] if near < far else [0, 0]
        edges, start = tuple(shifted), 0
    scale, prefix = call.scale, pattern.prefix
    return Call(query, key, edges, scale, start, positions, prefix, has_all_keys=False)
