"""The chunks that a pattern's bands are cut into for decoding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..call import MAX_POSITION, compute_capability
from ..constants import ConstantCache, int32_table
from .config import DecodeLaunch, decode_launch

Union = list[tuple[int, int]]


class DecodePlan(NamedTuple):
    """Facts that are the same in every call with a pattern, a batch size and a number of queries.

    Args:
        launch: of the chunks.
        bands: int32 `[H, 4]` on the device, near, far, near, far; a missing interval is empty.
        chunks: int32 `[chunks, 8]` on the device, `key head, near, far, 0`, in distances from the
            newest query, or `key head, begin, end, 1`, in places of the prefix; then of the
            key/value head the first chunk, the number of chunks and `near` of the last, and 0. The
            chunks of a head are consecutive: those of the prefix, then the others by distance.
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
    spans = [far - near for union in unions for near, far in union]
    rows = len(intervals) // 4 // key_heads * queries
    longest = launch.chunk(spans, batch * -(-rows // launch.block_m), multiprocessors)
    chunks: list[list[int]] = []
    ranges = [0]
    for key_head, union in enumerate(unions):
        parts = (
            [[key_head, *part, 1] for part in cut(0, prefix, longest)] if union and prefix else []
        )
        parts += [[key_head, *part, 0] for near, far in union for part in cut(near, far, longest)]
        parts = parts or [[key_head, 0, 0, 0]]  # a head without keys has a result too
        farthest = parts[-1][1]
        chunks += [[*part, ranges[-1], len(parts), farthest, 0] for part in parts]
        ranges.append(len(chunks))

    def table(entries: list[Any], width: int) -> torch.Tensor:
        return int32_table(entries, device).view(-1, width)

    bands = [min(edge, MAX_POSITION) for edge in intervals]
    return DecodePlan(
        launch,
        table(bands, 4),
        table(chunks, 8),
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
