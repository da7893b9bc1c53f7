"""Triton kernels for CUDA GPUs: forward and backward for every `BandPattern`, in half and single
precision.

Three suites of kernels stand on a shared ground (`tiles.py`, `scheduler.py`, `varlen.py`,
`arguments.py`, `softmax.py`, `memory.py`, `config.py`, `compiled.py`, `call.py`):

    portable/  every call, on every GPU
    hopper/    training and the first pass over a prompt on Hopper GPUs, in Gluon
    decode/    few queries against many keys, and writing into a `BandStore`

`launch.py` chooses between the first two, and `op.py` registers their operators. Start with
`tiles.py`, `softmax.py` and `portable/forward.py`.

Decoding is chosen for at most 16 queries, with at least 8 keys for each, where no input needs a
gradient. Its first call with a pattern, a batch size and a number of queries makes a table on the
device. That call cannot be inside the capture of a CUDA graph: call once to warm up.

float32 is computed in IEEE float32, not TensorFloat32. All kernels give the same bits on every run,
but for `hopper/fused_backward.py`, which long bands get with `deterministic=False`.
"""

from __future__ import annotations

import torch

from ...bands import BandPattern
from ...compat.pytorch import in_transform
from . import launch, op, parts
from .arguments import Positions
from .call import Call, ensure_inner_contiguous
from .decode import append
from .decode import op as decode_op
from .decode.op import MAX_QUERIES
from .op import refusal

__all__ = [
    "MAX_QUERIES",
    "attend",
    "attend_part",
    "attend_rings",
    "attend_varlen",
    "describe",
    "differentiate_part",
    "refusal",
    "write_rings",
]

DECODE_KEYS = 8  # keys per query from which on decoding is worth its second kernel


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
    start = (0, query_start) if on_device else (query_start, None)
    tensors = (query, key, value, pattern.flat, pattern.prefix, scale)
    if _is_decoding(query, key, value, sinks):
        return decode_op.decode(*tensors, *start, key_start, _dense(sinks), None, None)
    return op.attend(
        *tensors, start[0], deterministic, start[1], key_start, _dense(sinks), None, None
    )


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
    """`attend` over a part of the keys, every one of which some query sees; without a graph."""
    _check(query, value)
    return parts.attend(
        query,
        key,
        value,
        pattern,
        scale=scale,
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
    _check(query, value)
    return parts.differentiate(
        d_out,
        d_lse,
        query,
        key,
        value,
        out,
        lse,
        pattern,
        scale=scale,
        query_start=query_start,
        key_start=key_start,
    )


def attend_rings(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pattern: BandPattern,
    *,
    offsets: torch.Tensor,
    lengths: torch.Tensor,
    position: torch.Tensor,
    scale: float,
    sinks: torch.Tensor | None,
    key_start: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the last tokens of a `BandStore`; results as in `spattention.band_attention`,
    without a gradient.

    Args:
        query: `[B, H, Q, D]`, at most `MAX_QUERIES` tokens and at most one more than the store's
            slack.
        keys, values, offsets, lengths, position: the store's.
        pattern: the store's, without its prefix, which is another part for the caller to merge.
        scale: factor of the scores.
        sinks: `[H]`.
        key_start: int32 `[B]` or `[B, Q]`.
    """
    _check(query, values)
    assert query.shape[2] <= MAX_QUERIES
    return decode_op.decode(
        query,
        keys,
        values,
        pattern.flat,
        pattern.prefix,
        scale,
        0,
        position,
        key_start,
        _dense(sinks),
        offsets,
        lengths,
    )


def write_rings(
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    offsets: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    """Write the next tokens `[B, Hkv, n, D]` into a `BandStore`, in place. The other arguments are
    the store's, as they are before these tokens.
    """
    append.write(key, value, keys, values, position, offsets, lengths)


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

    The maximal lengths are not needed: the kernels find their documents from the offsets alone.
    """
    _check(query, value)
    tensors = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    dense = map(_dense, (sinks, cu_seqlens_q, cu_seqlens_k))
    bands = (pattern.flat, pattern.prefix)
    out, lse = op.attend(*tensors, *bands, scale, 0, deterministic, None, None, *dense)
    return out[0].transpose(0, 1), lse[0]


def _dense(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The same values without strides: kernels read consecutive sinks and offsets."""
    return None if tensor is None else tensor.contiguous()


def describe(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: BandPattern,
    *,
    sinks: torch.Tensor | None,
    query_start: int | torch.Tensor,
    key_start: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
) -> tuple[str, str | None]:
    """Name of the kernels that `attend` or `attend_varlen` runs, and what the Hopper kernels would
    need instead; None if there are no faster ones. Launches nothing.
    """
    packed = cu_seqlens_q is not None
    if not packed and _is_decoding(query, key, value, sinks):
        return launch.DECODING, None
    if packed:
        query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        query_start = 0
    on_device = isinstance(query_start, torch.Tensor)
    positions = Positions(query_start if on_device else None, key_start, cu_seqlens_q, cu_seqlens_k)
    start = 0 if isinstance(query_start, torch.Tensor) else query_start
    query, key, value = (ensure_inner_contiguous(tensor) for tensor in (query, key, value))
    call = Call(query, key, pattern.flat, 1.0, start, positions, pattern.prefix)
    return launch.describe(call, query, key, value)


def _is_decoding(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None
) -> bool:
    queries = query.shape[2]
    if queries > MAX_QUERIES or key.shape[2] < DECODE_KEYS * queries:
        return False
    if in_transform():
        return False  # what `vmap` wraps does not show whether it needs a gradient
    inputs = [tensor for tensor in (query, key, value, sinks) if tensor is not None]
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs))


def _check(query: torch.Tensor, value: torch.Tensor) -> None:
    reason = refusal(query, value)
    if reason is not None:
        raise ValueError(f'`impl="triton"` {reason}')
