"""The PyTorch operator around the decoding kernels: `spattention::triton_decode`.

It has no gradient: training runs `spattention::triton_forward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...layout import empty_like_query
from ...library import differentiable, register
from ..call import ensure_inner_contiguous
from .kernels import DecodePositions
from .launch import DecodeTensors, launch_decode, plan

MAX_QUERIES = 16


def _decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    intervals: Sequence[int],
    prefix: int,
    scale: float,
    query_start: int,
    query_start_tensor: torch.Tensor | None,
    key_start: torch.Tensor | None,
    sinks: torch.Tensor | None,
    offsets: torch.Tensor | None,
    lengths: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`out [B, H, Q, D]` and the log-sum-exp, float32 `[B, H, Q]`.

    Args:
        query: `[B, H, Q, D]`, Q at most `MAX_QUERIES`.
        key, value: `[B, Hkv, K, D]`; of a store `[B, slots, D]`, with `offsets` and `lengths`.
        intervals: the bands, `BandPattern.flat`.
        prefix: `BandPattern.prefix`; 0 for a store.
        scale: factor of the scores.
        query_start: position of the first query; used when `query_start_tensor` is None.
        query_start_tensor: the same as int32 `[]` or `[B]`, read on the device. Of a store int64
            `[B]`, its number of tokens, the queries among them.
        key_start: int32 `[B]` or `[B, Q]`.
        sinks: `[H]`.
        offsets, lengths: int64 `[Hkv]`, first slot and slots of the ring of each key/value head,
            with `far + Q - 1` slots or more, far the farthest distance of its group.
    """
    assert prefix == 0 or offsets is None, "the prefix of a store is merged by its caller"
    out, lse = _fake_decode(query)
    if out.numel() == 0:
        return out, lse
    query, key, value = (ensure_inner_contiguous(tensor) for tensor in (query, key, value))
    key_heads = key.shape[1] if offsets is None else offsets.shape[0]
    made = plan(query, intervals, prefix, key_heads)
    tensors = DecodeTensors(query, key, value, out, lse, sinks)
    positions = DecodePositions(query_start_tensor, key_start, offsets, lengths)
    launch_decode(made, tensors, positions, scale, query_start)
    return out, lse


def _fake_decode(query: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    return empty_like_query(query, query.shape[3]), lse


_operator = register(
    "triton_decode",
    "(Tensor query, Tensor key, Tensor value, int[] intervals, int prefix, float scale, "
    "SymInt query_start, Tensor? query_start_tensor, Tensor? key_start, Tensor? sinks, "
    "Tensor? offsets, Tensor? lengths) -> (Tensor, Tensor)",
    _decode,
    _fake_decode,
)
decode = differentiable(_operator, compute=_decode)
