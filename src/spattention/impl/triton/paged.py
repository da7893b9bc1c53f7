"""Attention of packed documents whose keys are in a paged cache, read through the block table."""

from __future__ import annotations

import torch

from ...bands import BandPattern
from . import launch
from .arguments import Positions
from .call import ForwardTensors, PagedKeys, call_of, ensure_inner_contiguous


def attend_documents(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    max_seqlen_k: int,
    pattern: BandPattern,
    scale: float,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Fill `out [T, H, D]`; no gradient.

    Args:
        query: `[T, H, D]`, document after document.
        key, value: `[blocks, block_size, Hkv, D]`, contiguous in D.
        cu_seqlens_q: int32 `[documents + 1]`, from 0 to T.
        block_table: int32 `[documents, columns]`; numbers within reach must be blocks.
        seq_lens: int32 `[documents]`, keys of each, those of its queries the last ones.
        max_seqlen_k: at least the most of these; it decides the kernel's form alone.
        pattern: the bands.
        scale: factor of the scores.
        sinks: `[H]`, contiguous.
        out: `[T, H, D]`, contiguous in D.
    """
    if query.numel() == 0:
        return
    query, packed_out = _packed(ensure_inner_contiguous(query)), _packed(out)
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    table = block_table.contiguous()  # rows follow one another
    positions = Positions(None, None, cu_seqlens_q, None, pages=table, seq_lens=seq_lens)
    page, columns = key.shape[2], table.shape[1]
    keys = key[:1, :, :1].expand(-1, -1, columns * page, -1)  # for its shape
    longest = 1 << (max_seqlen_k - 1).bit_length()  # few forms, as lengths vary
    facts = query, keys, pattern.flat, scale, 0, positions, pattern.prefix
    call = call_of(*facts, paged=PagedKeys(page, longest))
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    launch.forward(call, ForwardTensors(query, key, value, packed_out, lse, sinks))


def _packed(tokens: torch.Tensor) -> torch.Tensor:
    """`[T, H, D]` as `[1, H, T, D]`."""
    return tokens.transpose(0, 1)[None]
