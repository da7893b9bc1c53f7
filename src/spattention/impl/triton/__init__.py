"""Triton kernels for CUDA GPUs: forward and backward for every `BandPattern`, in half and single
precision.

Reading order: `tiles.py` (which blocks a band needs), `softmax.py`, `forward.py`, `backward.py`,
`config.py`, `launch.py`, `op.py`; then `hopper.py`, `hopper_forward.py`, `hopper_backward.py`, the
same passes for Hopper GPUs in Gluon, used for half precision with head_dim 64 or 128 where queries
begin at position 0 (training, first pass over a prompt).

float32 is computed in IEEE float32, not TensorFloat32. Both values of `deterministic` run the same
kernels, which give the same bits on every run.
"""

from __future__ import annotations

import torch

from ...bands import BandPattern
from . import op
from .op import refusal

__all__ = ["attend", "attend_varlen", "refusal"]


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
    _check(query, value)
    on_device = isinstance(query_start, torch.Tensor)
    return op.forward(
        query,
        key,
        value,
        pattern.flat,
        scale,
        0 if on_device else query_start,
        query_start if on_device else None,
        key_start,
        sinks,
        None,
        None,
    )


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
    `spattention.band_attention_varlen`.

    The longest lengths are not needed: the kernels find their documents from the offsets alone.
    """
    _check(query, value)
    rows = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    out, lse = op.forward(
        *rows, pattern.flat, scale, 0, None, None, sinks, cu_seqlens_q, cu_seqlens_k
    )
    return out[0].transpose(0, 1), lse[0]


def _check(query: torch.Tensor, value: torch.Tensor) -> None:
    reason = refusal(query, value)
    if reason is not None:
        raise ValueError(f'`impl="triton"` {reason}')
