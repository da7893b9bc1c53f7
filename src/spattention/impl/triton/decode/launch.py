"""From tensors to the two launches of decoding: chunks of the bands, strides and grids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..compiled import Kernel, kinds
from ..config import BLOCK_P, DecodeLaunch, block_d, decode_launch
from ..launch import (
    LONGEST,
    check_start,
    compute_capability,
    constant,
    on_device,
    scaled,
    start_strides,
)
from .kernels import chunk_kernel, join_kernel

Union = list[tuple[int, int]]

_chunk = Kernel(chunk_kernel)
_join = Kernel(join_kernel)


class Plan(NamedTuple):
    """What is the same in every call with a pattern, a batch size and a number of queries.

    Args:
        launch: of the chunks.
        bands: int32 `[H, 4]` on the device, near, far, near, far; a missing interval is empty.
        chunks: int32 `[chunks, 4]` on the device, `key head, near, far, 0`, in distances from the
            newest query; those of a key/value head stand together.
        ranges: int32 `[Hkv + 1]` on the device, where those of each key/value head begin.
        n_chunks: all of them.
        two_bands: whether some head has two intervals.
    """

    launch: DecodeLaunch
    bands: torch.Tensor
    chunks: torch.Tensor
    ranges: torch.Tensor
    n_chunks: int
    two_bands: bool


# Pure constants, as the table in launch.py is.
_plans: dict[tuple[Any, ...], Plan] = {}


def plan(
    intervals: Sequence[int],
    key_heads: int,
    queries: int,
    batch: int,
    itemsize: int,
    head_dim: int,
    device: torch.device,
) -> Plan:
    """Made once per combination. Raises RuntimeError if that would be inside the capture of a CUDA
    graph, where the copy to the device is not allowed.
    """
    key = (tuple(intervals), key_heads, queries, batch, itemsize, head_dim, device)
    found = _plans.get(key)
    if found is None:
        multiprocessors = 1
        if device.type == "cuda":
            multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        capability = compute_capability(device)
        heads = len(intervals) // 4
        launch = decode_launch(itemsize, head_dim, heads // key_heads * queries, capability)
        found = make_plan(launch, key[0], key_heads, queries, batch, multiprocessors, device)
        _plans[key] = found
    return found


def make_plan(
    launch: DecodeLaunch,
    intervals: tuple[int, ...],
    key_heads: int,
    queries: int,
    batch: int,
    multiprocessors: int,
    device: torch.device,
) -> Plan:
    """A plan for any launch."""
    unions = reached(intervals, key_heads, queries)
    keys = sum(far - near for union in unions for near, far in union)
    longest = launch.chunk(keys * batch, multiprocessors)
    chunks, ranges = [], [0]
    for key_head, union in enumerate(unions):
        chunks += [[key_head, *part, 0] for near, far in union for part in cut(near, far, longest)]
        ranges.append(len(chunks))

    def table(rows: list[Any], width: int) -> torch.Tensor:
        return constant(rows, device).view(-1, width)

    bands = [min(edge, LONGEST) for edge in intervals]
    return Plan(
        launch,
        table(bands, 4),
        table(chunks, 4),
        table(ranges, 1),
        len(chunks),
        two_bands=any(intervals[3::4]),
    )


def reached(intervals: tuple[int, ...], key_heads: int, queries: int) -> list[Union]:
    """Per key/value head the distances from the newest query at which some query of its group sees
    a key: sorted intervals that are apart.
    """
    group = len(intervals) // 4 // key_heads
    unions = []
    for first in range(0, len(intervals), 4 * group):
        edges = intervals[first : first + 4 * group]
        union: Union = []
        for near, far in sorted(zip(edges[::2], edges[1::2])):
            if near >= far:
                continue
            end = min(far, LONGEST) + queries - 1
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
    made: Plan,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    query_start: int,
    query_starts: torch.Tensor | None,
    key_start: torch.Tensor | None,
    sinks: torch.Tensor | None,
    offsets: torch.Tensor | None,
    lengths: torch.Tensor | None,
) -> None:
    """Writes `out` and `lse`; arguments as in `decode_op`."""
    check_start(query_start)
    batch, heads, queries, head_dim = query.shape
    key_heads = made.ranges.shape[0] - 1
    group = heads // key_heads
    rows, launch = group * queries, made.launch
    precise = query.dtype == torch.float32
    part = lse.new_empty((batch, made.n_chunks, rows, head_dim))
    part_lse = lse.new_empty((batch, made.n_chunks, rows))
    if offsets is None:
        strides = (*key.stride()[:3], *value.stride()[:3])
    else:
        strides = (key.stride(0), 0, key.stride(1), value.stride(0), 0, value.stride(1))
    blocks = -(-rows // launch.block_m)
    with on_device(query.device):
        if made.n_chunks:
            starts = start_strides(query_starts, key_start)
            _chunk(
                made.n_chunks * blocks * batch,
                (
                    query.device,
                    kinds(query, key, value, query_starts, key_start, offsets, lengths),
                    query.stride(),
                    strides,
                    starts,
                ),
                query,
                key,
                value,
                part,
                part_lse,
                made.chunks,
                made.bands,
                query_starts,
                key_start,
                offsets,
                lengths,
                *query.stride()[:3],
                *strides,
                *starts,
                made.n_chunks,
                blocks,
                group,
                queries,
                key.shape[-2],
                query_start,
                scaled(scale, precise),
                HEAD_DIM=head_dim,
                BLOCK_D=block_d(head_dim),
                BLOCK_M=launch.block_m,
                BLOCK_N=launch.block_n,
                STAGES=launch.num_stages,
                INTERVALS=2 if made.two_bands else 1,
                RINGS=offsets is not None,
                START_ON_DEVICE=query_starts is not None,
                HAS_KEY_START=key_start is not None,
                PRECISE=precise,
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
            )
        _join(
            batch * heads * queries,
            (query.device, kinds(out, lse, sinks), out.stride()),
            part,
            part_lse,
            out,
            lse,
            sinks,
            made.ranges,
            *out.stride()[:3],
            made.n_chunks,
            heads,
            group,
            queries,
            HEAD_DIM=head_dim,
            BLOCK_D=block_d(head_dim),
            BLOCK_P=BLOCK_P,
            HAS_SINKS=sinks is not None,
            PRECISE=precise,
            num_warps=4,
        )
