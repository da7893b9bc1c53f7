"""The launches of decoding: one, or a second for many rows of a key/value head."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from ..arguments import Form, Heads, heads
from ..call import check_query_start, on_device, softmax_scale, start_strides
from ..compiled import CompiledKernelCache, specialization
from ..config import OPTIONS, block_d
from .config import BLOCK_P, DecodeLaunch, held_pages, merged_rows, paged_stages
from .counters import arrival_counters
from .kernels import DecodeCounts, DecodePositions, chunk_kernel
from .merge import Result, combine_kernel
from .plan import DecodePlan

_chunk = CompiledKernelCache(chunk_kernel)
_combine = CompiledKernelCache(combine_kernel)


class DecodeTensors(NamedTuple):
    """Tensors of a call; it writes `out`, and `lse` `[B, H, Q]`.

    `key` and `value` are `[B, Hkv, K, D]`, the `[B, slots, D]` buffers of a store, or the
    `[blocks, block_size, Hkv, D]` of a paged cache.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    sinks: torch.Tensor | None


def launch_decode(
    made: DecodePlan,
    tensors: DecodeTensors,
    positions: DecodePositions,
    scale: float,
    query_start: int,
) -> None:
    """Launch the kernels; fills `out` and `lse`. Positions and scale as in `op.py`."""
    check_query_start(query_start)
    query, key, value, out, lse, sinks = tensors
    batch, n_heads, queries, head_dim = query.shape
    key_heads = made.ranges.shape[0] - 1
    rows, launch = n_heads // key_heads * queries, made.launch
    merged, precise = merged_rows(rows), query.dtype == torch.float32
    blocks = -(-rows // launch.block_m)
    part = lse.new_empty((batch, made.n_chunks, rows, head_dim))
    part_lse = lse.new_empty((batch, made.n_chunks, rows))
    arrived = arrival_counters.get(query.device, batch * key_heads) if merged else None
    result = Result(*heads(out), lse, sinks, part, part_lse, arrived)
    result_key = specialization(out, lse, sinks, arrived), out.stride()
    counts = _counts(made, tensors, positions, blocks, query_start)
    page = 0 if positions.pages is None else key.shape[1]
    pages = held_pages(launch, page)
    stages = paged_stages(launch.num_stages) if page and not pages else launch.num_stages
    with on_device(query.device):
        _chunk(
            made.n_chunks * blocks * batch,
            (
                query.device,
                specialization(query, key, value, *positions),
                query.stride(),
                key.stride(),
                value.stride(),
                result_key,
                counts[:5],
            ),
            heads(query),
            _key_heads(key, page),
            _key_heads(value, page),
            result,
            made.chunks,
            made.bands,
            positions,
            *counts,
            softmax_scale(scale, precise),
            FORM=_chunk_form(
                head_dim,
                launch,
                stages,
                made.n_intervals,
                made.prefix,
                page,
                tuple(tensor is not None for tensor in (*positions, sinks)),
                merged,
                precise,
            ),
            num_warps=launch.num_warps,
            num_stages=stages,
            **OPTIONS,
        )
        if not merged:
            _combine(
                batch * n_heads * queries,
                (query.device, result_key),
                result,
                made.ranges,
                made.n_chunks,
                n_heads,
                n_heads // key_heads,
                queries,
                FORM=_combine_form(head_dim, sinks is not None, precise),
                num_warps=4,
                **OPTIONS,
            )


def _counts(
    made: DecodePlan,
    tensors: DecodeTensors,
    positions: DecodePositions,
    blocks: int,
    query_start: int,
) -> DecodeCounts:
    """Sizes of a call whose rows of a key/value head are `blocks` blocks."""
    _, n_heads, queries, _ = tensors.query.shape
    pages, held, keys = positions.pages, positions.held, tensors.key.shape[-2]
    if pages is not None:
        keys = pages.shape[1] * tensors.key.shape[1]
    return DecodeCounts(
        *start_strides(positions.query_start, positions.key_start),
        0 if held is None else held.stride(0),
        0 if pages is None else pages.stride(0),
        made.n_chunks,
        blocks,
        n_heads,
        n_heads // (made.ranges.shape[0] - 1),
        queries,
        keys,
        tensors.key.shape[0],
        query_start,
    )


@lru_cache(maxsize=256)
def _chunk_form(
    head_dim: int,
    launch: DecodeLaunch,
    stages: int,
    n_intervals: int,
    prefix: int,
    page: int,
    given: tuple[bool, ...],
    merged: int,
    precise: bool,
) -> Form:
    """The `Form` of `chunk_kernel`; cached, because it takes longer to make than to look up.
    `given` says which of `DecodePositions` there are, and whether there are sinks.
    """
    there = DecodePositions(*given[:-1])
    return Form(
        HEAD_DIM=head_dim,
        BLOCK_D=block_d(head_dim),
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        STAGES=stages,
        INTERVALS=n_intervals,
        PREFIX=prefix,
        RINGS=there.ring_offsets,
        START_ON_DEVICE=there.query_start,
        HAS_KEY_START=there.key_start,
        HAS_SINKS=given[-1] and merged > 0,
        PRECISE=precise,
        PAGE=page,
        PAGES=held_pages(launch, page),
        MERGED_ROWS=merged,
    )


@lru_cache(maxsize=256)
def _combine_form(head_dim: int, has_sinks: bool, precise: bool) -> Form:
    """The `Form` of `combine_kernel`."""
    return Form(
        HEAD_DIM=head_dim,
        BLOCK_D=block_d(head_dim),
        BLOCK_N=BLOCK_P,
        HAS_SINKS=has_sinks,
        PRECISE=precise,
    )


def _key_heads(tensor: torch.Tensor, page: int) -> Heads:
    """The kernel argument of keys or values, dense, in rings or paged."""
    if page:
        return Heads(tensor, tensor.stride(0), tensor.stride(2), tensor.stride(1))
    if tensor.dim() == 4:
        return heads(tensor)
    return Heads(tensor, tensor.stride(0), 0, tensor.stride(1))
