"""The two launches of decoding, and the chunks that a pattern's bands are cut into."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from ..arguments import Form, Heads, heads
from ..call import (
    MAX_POSITION,
    check_query_start,
    compute_capability,
    on_device,
    softmax_scale,
    start_strides,
)
from ..compiled import CompiledKernelCache, specialization
from ..config import OPTIONS, block_d
from ..constants import ConstantCache, int32_table
from .config import BLOCK_P, DecodeLaunch, decode_launch
from .kernels import DecodePositions, chunk_kernel, combine_kernel

Union = list[tuple[int, int]]

_chunk = CompiledKernelCache(chunk_kernel)
_combine = CompiledKernelCache(combine_kernel)


class DecodePlan(NamedTuple):
    """Facts that are the same in every call with a pattern, a batch size and a number of queries.

    Args:
        launch: of the chunks.
        bands: int32 `[H, 4]` on the device, near, far, near, far; a missing interval is empty.
        chunks: int32 `[chunks, 4]` on the device, `key head, near, far, 0`, in distances from the
            newest query, or `key head, begin, end, 1`, in places of the prefix; those of a
            key/value head are consecutive.
        ranges: int32 `[Hkv + 1]` on the device, the first chunks of each key/value head.
        n_chunks: number of chunks.
        n_intervals: intervals of the fullest head, 1 or 2.
        prefix: number of keys of the prefix.
    """

    launch: DecodeLaunch
    bands: torch.Tensor
    chunks: torch.Tensor
    ranges: torch.Tensor
    n_chunks: int
    n_intervals: int
    prefix: int = 0


class DecodeTensors(NamedTuple):
    """Tensors of a call; it writes `out`, and `lse` `[B, H, Q]`.

    `key` and `value` are `[B, Hkv, K, D]`, or the `[B, slots, D]` buffers of a store.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    sinks: torch.Tensor | None


_plans = ConstantCache[DecodePlan](max_entries=1024)


def plan(query: torch.Tensor, intervals: Sequence[int], prefix: int, key_heads: int) -> DecodePlan:
    """The plan for queries `[B, H, Q, D]`, made once per combination.

    Raises RuntimeError for a first call inside the capture of a CUDA graph, where the copy to the
    device is not allowed.
    """
    batch, n_heads, queries, head_dim = query.shape
    itemsize, device = query.element_size(), query.device
    key = (tuple(intervals), prefix, key_heads, queries, batch, itemsize, head_dim)

    def make() -> DecodePlan:
        multiprocessors = 1
        if device.type == "cuda":
            multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        capability = compute_capability(device)
        launch = decode_launch(itemsize, head_dim, n_heads // key_heads * queries, capability)
        return make_plan(launch, key[0], key_heads, queries, batch, multiprocessors, device, prefix)

    return _plans.get(key, device, make)


def make_plan(
    launch: DecodeLaunch,
    intervals: tuple[int, ...],
    key_heads: int,
    queries: int,
    batch: int,
    multiprocessors: int,
    device: torch.device,
    prefix: int = 0,
) -> DecodePlan:
    """A plan for any launch."""
    unions = visible_distances(intervals, key_heads, queries)
    keys = sum(far - near for union in unions for near, far in union)
    longest = launch.chunk(keys * batch, multiprocessors)
    chunks, ranges = [], [0]
    for key_head, union in enumerate(unions):
        chunks += [[key_head, *part, 0] for near, far in union for part in cut(near, far, longest)]
        if union and prefix:
            chunks += [[key_head, *part, 1] for part in cut(0, prefix, longest)]
        ranges.append(len(chunks))

    def table(entries: list[Any], width: int) -> torch.Tensor:
        return int32_table(entries, device).view(-1, width)

    bands = [min(edge, MAX_POSITION) for edge in intervals]
    return DecodePlan(
        launch,
        table(bands, 4),
        table(chunks, 4),
        table(ranges, 1),
        len(chunks),
        n_intervals=2 if any(intervals[3::4]) else 1,
        prefix=prefix,
    )


def visible_distances(intervals: tuple[int, ...], key_heads: int, queries: int) -> list[Union]:
    """Per key/value head, the distances from the newest query at which some query of its group sees
    a key: sorted, disjoint intervals.
    """
    group = len(intervals) // 4 // key_heads
    unions = []
    for first in range(0, len(intervals), 4 * group):
        edges = intervals[first : first + 4 * group]
        union: Union = []
        for near, far in sorted(zip(edges[::2], edges[1::2])):
            if near >= far:
                continue
            end = min(far, MAX_POSITION) + queries - 1
            if union and near <= union[-1][1]:
                union[-1] = (union[-1][0], max(union[-1][1], end))
            else:
                union.append((near, end))
        unions.append(union)
    return unions


def cut(near: int, far: int, longest: int) -> Union:
    """The fewest parts of at most `longest`, of sizes that differ by no more than one."""
    parts = math.ceil((far - near) / longest)
    edges = [near + (far - near) * part // parts for part in range(parts + 1)]
    return list(zip(edges, edges[1:]))


def launch_decode(
    made: DecodePlan,
    tensors: DecodeTensors,
    positions: DecodePositions,
    scale: float,
    query_start: int,
) -> None:
    """Launch both kernels; fills `out` and `lse`. Positions and scale as in `op.py`."""
    check_query_start(query_start)
    query, key, value, out, lse, sinks = tensors
    batch, n_heads, queries, head_dim = query.shape
    group = n_heads // (made.ranges.shape[0] - 1)
    rows, launch = group * queries, made.launch
    precise = query.dtype == torch.float32
    part = lse.new_empty((batch, made.n_chunks, rows, head_dim))
    part_lse = lse.new_empty((batch, made.n_chunks, rows))
    blocks = -(-rows // launch.block_m)
    # The fields of `DecodeCounts`
    counts = (
        *start_strides(positions.query_start, positions.key_start),
        made.n_chunks,
        blocks,
        n_heads,
        group,
        queries,
        key.shape[-2],
        query_start,
    )
    with on_device(query.device):
        if made.n_chunks:
            _chunk(
                made.n_chunks * blocks * batch,
                (
                    query.device,
                    specialization(query, key, value, *positions),
                    query.stride(),
                    key.stride(),
                    value.stride(),
                    counts[:3],
                ),
                heads(query),
                _key_heads(key),
                _key_heads(value),
                part,
                part_lse,
                made.chunks,
                made.bands,
                positions,
                *counts,
                softmax_scale(scale, precise),
                FORM=_chunk_form(
                    head_dim,
                    launch.block_m,
                    launch.block_n,
                    launch.num_stages,
                    made.n_intervals,
                    made.prefix,
                    positions.ring_offsets is not None,
                    positions.query_start is not None,
                    positions.key_start is not None,
                    precise,
                ),
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
                **OPTIONS,
            )
        _combine(
            batch * n_heads * queries,
            (query.device, specialization(out, lse, sinks), out.stride()),
            part,
            part_lse,
            heads(out),
            lse,
            sinks,
            made.ranges,
            made.n_chunks,
            n_heads,
            group,
            queries,
            FORM=_combine_form(head_dim, sinks is not None, precise),
            num_warps=4,
            **OPTIONS,
        )


@lru_cache(maxsize=256)
def _chunk_form(
    head_dim: int,
    block_m: int,
    block_n: int,
    stages: int,
    n_intervals: int,
    prefix: int,
    rings: bool,
    start_on_device: bool,
    has_key_start: bool,
    precise: bool,
) -> Form:
    """The `Form` of `chunk_kernel`; cached, because it takes longer to make than to look up."""
    return Form(
        HEAD_DIM=head_dim,
        BLOCK_D=block_d(head_dim),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        STAGES=stages,
        INTERVALS=n_intervals,
        PREFIX=prefix,
        RINGS=rings,
        START_ON_DEVICE=start_on_device,
        HAS_KEY_START=has_key_start,
        PRECISE=precise,
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


def _key_heads(tensor: torch.Tensor) -> Heads:
    """The kernel argument of keys or values, dense or in rings."""
    if tensor.dim() == 4:
        return heads(tensor)
    return Heads(tensor, tensor.stride(0), 0, tensor.stride(1))
