"""The PyTorch operator around the decoding kernels: `spattention::triton_decode`.

It has no gradient: training runs `spattention::triton_forward`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..layout import empty_like_query
from ..library import differentiable, register
from .decode_launch import launch_decode, plan
from .launch import unit_rows

MAX_QUERIES = 16


def _decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    intervals: Sequence[int],
    scale: float,
    query_start: int,
    query_starts: torch.Tensor | None,
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
        scale: factor of the scores.
        query_start: position of the first query; used when `query_starts` is None.
        query_starts: the same as int32 `[]` or `[B]`, read on the device. Of a store int64 `[B]`,
            its tokens, the queries among them.
        key_start: int32 `[B]` or `[B, Q]`.
        sinks: `[H]`.
        offsets, lengths: int64 `[Hkv]`, first slot and slots of the ring of each key/value head,
            with `far + Q - 1` slots or more, far the farthest distance of its group.
    """
    out, lse = _results(query)
    if out.numel() == 0:
        return out, lse
    query, key, value = unit_rows(query), unit_rows(key), unit_rows(value)
    batch, _, queries, head_dim = query.shape
    key_heads = key.shape[1] if offsets is None else offsets.shape[0]
    made = plan(intervals, key_heads, queries, batch, query.element_size(), head_dim, query.device)
    launch_decode(
        made,
        query,
        key,
        value,
        out,
        lse,
        scale,
        query_start,
        query_starts,
        key_start,
        sinks,
        offsets,
        lengths,
    )
    return out, lse


def _fake_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    intervals: Sequence[int],
    scale: float,
    query_start: int,
    query_starts: torch.Tensor | None,
    key_start: torch.Tensor | None,
    sinks: torch.Tensor | None,
    offsets: torch.Tensor | None,
    lengths: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _results(query)


def _results(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    return empty_like_query(query, query.shape[3]), lse


decode = register(
    "triton_decode",
    "(Tensor query, Tensor key, Tensor value, int[] intervals, float scale, SymInt query_start, "
    "Tensor? query_starts, Tensor? key_start, Tensor? sinks, Tensor? offsets, Tensor? lengths) -> "
    "(Tensor, Tensor)",
    _decode,
    _fake_decode,
)
differentiable(decode)
