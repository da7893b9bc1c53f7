"""The PyTorch operators around the decoding kernels: `spattention::triton_decode`, over keys that
are dense or in the rings of a store, and `spattention::triton_decode_paged`.

They have no gradient: training runs `spattention::triton_forward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...layout import empty_like_query
from ...library import differentiable, register
from ..call import ensure_inner_contiguous
from .kernels import DecodePositions
from .launch import DecodeTensors, launch_decode
from .plan import plan

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
    prefixes: torch.Tensor | None,
    held: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`out [B, H, Q, D]` and the log-sum-exp, float32 `[B, H, Q]`.

    Args:
        query: `[B, H, Q, D]`, Q at most `MAX_QUERIES`.
        key, value: `[B, Hkv, K, D]`; of a store `[B, slots, D]`, with `offsets` and what follows.
        intervals: the bands, `BandPattern.flat`.
        prefix: `BandPattern.prefix`.
        scale: factor of the scores.
        query_start: position of the first query; used when `query_start_tensor` is None.
        query_start_tensor: the same as int32 `[]` or `[B]`, read on the device. Of a store int64
            `[B]`, its number of tokens, the queries among them.
        key_start: int32 `[B]` or `[B, Q]`.
        sinks: `[H]`.
        offsets, lengths: int64 `[Hkv]`, first slot and slots of the ring of each key/value head,
            with `far + Q - 1` slots or more, far the farthest distance of its group.
        prefixes: int64 `[Hkv]`, first slot of each prefix.
        held: int64 `[B]`, where the document of these prefixes starts.
    """
    out, lse = _fake_decode(query)
    if out.numel() == 0:
        return out, lse
    query, key, value = (ensure_inner_contiguous(tensor) for tensor in (query, key, value))
    positions = DecodePositions(query_start_tensor, key_start, offsets, lengths, prefixes, held)
    made = plan(query, intervals, prefix, key.shape[1] if offsets is None else offsets.shape[0])
    tensors = DecodeTensors(query, key, value, out, lse, sinks)
    launch_decode(made, tensors, positions, scale, query_start)
    return out, lse


def _fake_decode(query: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    return empty_like_query(query, query.shape[3]), lse


def _decode_paged(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    intervals: Sequence[int],
    prefix: int,
    scale: float,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Fill `out [B, H, Q, D]` and the log-sum-exp, float32 `[B, H, Q]`.

    Args:
        query: `[B, H, Q, D]`, the last Q tokens of each entry, Q at most `MAX_QUERIES`.
        key, value: `[blocks, block_size, Hkv, D]`, contiguous in D.
        block_table: int32 `[B, columns]`, contiguous along the columns.
        seq_lens: int32 `[B]`, tokens of each entry, the queries among them.
        intervals, prefix, scale, sinks: as in `_decode`.
        out: contiguous in D.
        lse: contiguous.
    """
    if out.numel() == 0:
        return
    query = ensure_inner_contiguous(query)
    positions = DecodePositions(query_start=seq_lens, pages=block_table)
    made = plan(query, intervals, prefix, key.shape[2])
    launch_decode(made, DecodeTensors(query, key, value, out, lse, sinks), positions, scale, 0)


def _fake_decode_paged(*inputs: Any) -> None:
    return None


_operator = register(
    "triton_decode",
    "(Tensor query, Tensor key, Tensor value, int[] intervals, int prefix, float scale, "
    "SymInt query_start, Tensor? query_start_tensor, Tensor? key_start, Tensor? sinks, "
    "Tensor? offsets, Tensor? lengths, Tensor? prefixes, Tensor? held) -> (Tensor, Tensor)",
    _decode,
    _fake_decode,
)
decode = differentiable(_operator, compute=_decode)

decode_paged = register(
    "triton_decode_paged",
    "(Tensor query, Tensor key, Tensor value, Tensor block_table, Tensor seq_lens, "
    "int[] intervals, int prefix, float scale, Tensor? sinks, Tensor(a!) out, Tensor(b!) lse) "
    "-> ()",
    _decode_paged,
    _fake_decode_paged,
)
