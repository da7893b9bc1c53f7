"""Attention of the newest tokens of each request to a paged key/value cache, for engines."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..attention import Result, band_attention, choose, kernels_for
from ..bands import BandPattern
from ..checks import check_attention, check_tensors
from ..impl.layout import empty_like_query, lse_dtype, score_scale

IMPLEMENTATIONS = ("triton", "gather")


def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    pattern: BandPattern,
    *,
    scale: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Result:
    """Attention of the last tokens of each request to a paged cache, equal to `band_attention` over
    the request's tokens. No gradient.

    Token p of a request is token `p % block_size` of block `block_table[request, p // block_size]`.
    The queries are the request's last Q tokens, so its first query is at position
    `seq_lens - Q`; their keys are in the cache already. A query at a negative position sees
    nothing. Blocks that no band and no prefix reaches are not read: an engine may have freed them,
    and their entries of the table may hold anything.

    Both layouts of vLLM are views of what this takes: `cache[0], cache[1]` of
    `[2, blocks, block_size, Hkv, D]`, and `cache[:, 0], cache[:, 1]` of
    `[blocks, 2, block_size, Hkv, D]`.

    Args:
        query: `[B, H, Q, D]`, one entry per request, any strides.
        key: `[blocks, block_size, Hkv, D]`, query's dtype, any strides and any block size;
            `H % Hkv == 0`. Kernels need a contiguous D.
        value: `[blocks, block_size, Hkv, Dv]`, the same. Kernels need `Dv == D`.
        block_table: int32 `[B, columns]`. Numbers that are no block are clamped.
        seq_lens: int32 `[B]`, tokens of each request, its queries included; 0 for a row that only
            pads the batch, whose output is 0. At most `columns * block_size`, to which kernels
            clamp it.
        pattern: the bands, one entry per query head.
        scale: factor of the scores before the softmax; default `1 / sqrt(D)`.
        sinks: `[H]`, as in `band_attention`.
        out: `[B, H, Q, Dv]` of query's dtype, which the result is written to; D is contiguous.
            Default: a new tensor with query's memory layout.
        return_lse: also return the natural log-sum-exp, `[B, H, Q]`.
        impl: `"triton"`, kernels that read the block table, for at most 16 queries; `"gather"`,
            PyTorch on any device. None chooses kernels where `band_attention` would and there are
            at most 16 queries. In a CUDA graph they read the tensors of the capture; the first call
            with a number of requests and queries must come before it.

    Returns:
        `out`, or `(out, lse)`.

    Raises:
        ValueError: if an argument breaks a rule above; values of tensors are checked on the CPU
            alone.
    """
    _check(query, key, value, block_table, seq_lens, pattern, scale, sinks)
    if out is None:
        out = empty_like_query(query, value.shape[-1])
    _check_out(out, query, value)
    kernels = _kernels(impl, query, key, value)
    factor = score_scale(query, scale)
    with torch.no_grad():
        if kernels is None:
            found, lse = _gathered(query, key, value, block_table, seq_lens, pattern, factor, sinks)
            out.copy_(found)
        else:
            lse = query.new_empty(query.shape[:3], dtype=torch.float32)
            table = block_table if block_table.stride(-1) == 1 else block_table.contiguous()
            kernels.attend_paged(
                query,
                key,
                value,
                table,
                seq_lens,
                pattern,
                scale=factor,
                sinks=sinks,
                out=out,
                lse=lse,
            )
    return (out, lse) if return_lse else out


def _kernels(impl: str | None, query: Tensor, key: Tensor, value: Tensor) -> ModuleType | None:
    """The kernels that compute a call; None for the gather."""
    if impl == "gather":
        return None
    if impl is None:
        kernels = kernels_for(query, value)
        few = kernels is not None and query.shape[2] <= kernels.MAX_QUERIES
        inner = key.stride(-1) == value.stride(-1) == 1
        return kernels if few and inner else None
    if impl != "triton":
        raise ValueError(f"`impl` must be None or one of {IMPLEMENTATIONS}, got {impl!r}")
    triton = choose(impl, query, value)
    if query.shape[2] > triton.MAX_QUERIES:
        raise ValueError(
            f'`impl="triton"` takes at most {triton.MAX_QUERIES} queries, got {query.shape[2]}'
        )
    for name, tensor in (("key", key), ("value", value)):
        if tensor.stride(-1) != 1:
            raise ValueError(
                f'`impl="triton"` needs a contiguous head_dim, got stride {tensor.stride(-1)} in '
                f"`{name}`"
            )
    return triton


def _gathered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    pattern: BandPattern,
    scale: float,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`paged_attention` over copies of all blocks.

    Q keys that nobody sees come before them, so that no query is at a negative position.
    """
    queries = query.shape[2]
    if query.numel() == 0:
        return query.new_empty((*query.shape[:3], value.shape[-1])), query.new_empty(
            query.shape[:3], dtype=lse_dtype(query)
        )
    blocks = block_table.clamp(0, key.shape[0] - 1).long()
    # [B, columns, block_size, Hkv, D] to [B, Hkv, Q + columns * block_size, D]
    keys, values = (
        pad(cache[blocks].flatten(1, 2).transpose(1, 2), (0, 0, queries, 0))
        for cache in (key, value)
    )
    result = band_attention(
        query,
        keys,
        values,
        pattern,
        scale=scale,
        sinks=sinks,
        query_start=seq_lens,
        key_start=torch.full_like(seq_lens, queries),
        return_lse=True,
    )
    return result[0], result[1]


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    pattern: BandPattern,
    scale: float | None,
    sinks: Tensor | None,
) -> None:
    """Raise ValueError for an argument that breaks a rule of `paged_attention`."""
    check_tensors(query=query, key=key, value=value, block_table=block_table, seq_lens=seq_lens)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dim() != 4 or 0 in tensor.shape[:2]:
            raise ValueError(
                f"`{name}` must be [blocks, block_size, Hkv, D] with at least one block of one "
                f"token, got shape {list(tensor.shape)}"
            )
    if value.shape[:2] != key.shape[:2]:
        raise ValueError(
            f"`value` must have key's blocks, {list(key.shape[:2])}, got {list(value.shape[:2])}"
        )
    if query.dim() != 4:
        raise ValueError(f"`query` must be [B, H, Q, D], got shape {list(query.shape)}")
    batch = query.shape[0]
    # One block as the keys of each request: heads, dtypes and devices follow the same rules.
    keys, values = (tensor[:1].transpose(1, 2).expand(batch, -1, -1, -1) for tensor in (key, value))
    check_attention(
        query,
        keys,
        values,
        pattern,
        scale=scale,
        sinks=sinks,
        query_start=0,
        key_start=None,
    )
    for name, tensor, shape in (
        ("block_table", block_table, "[B, columns]"),
        ("seq_lens", seq_lens, "[B]"),
    ):
        if tensor.dtype != torch.int32 or tensor.device != query.device:
            raise ValueError(
                f"`{name}` must be int32 on {query.device}, got {tensor.dtype} on {tensor.device}"
            )
        if tensor.dim() != shape.count(",") + 1 or tensor.shape[0] != batch:
            raise ValueError(
                f"`{name}` must be {shape} with B = {batch}, got shape {list(tensor.shape)}"
            )
    if seq_lens.device.type == "cpu" and batch:
        lowest, highest = int(seq_lens.min()), int(seq_lens.max())
        room = block_table.shape[1] * key.shape[1]
        if lowest < 0 or highest > room:
            raise ValueError(
                f"`seq_lens` must be from 0 to {room}, the tokens of a row of `block_table`, got "
                f"{lowest if lowest < 0 else highest}"
            )


def _check_out(out: Tensor, query: Tensor, value: Tensor) -> None:
    """Raise ValueError unless the result can be written there."""
    check_tensors(out=out)
    shape = [*query.shape[:3], value.shape[-1]]
    if list(out.shape) != shape or out.dtype != query.dtype or out.device != query.device:
        raise ValueError(
            f"`out` must be {shape} of {query.dtype} on {query.device}, got {list(out.shape)} of "
            f"{out.dtype} on {out.device}"
        )
    if out.stride(-1) != 1 and out.shape[-1] > 1:
        raise ValueError(f"`out` must have a contiguous head_dim, got stride {out.stride(-1)}")
