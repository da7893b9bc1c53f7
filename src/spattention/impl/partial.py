"""Attention over a part of the keys of each row: what calls on parts share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """Which keys the queries of a call see, and the scale.

    Attributes:
        intervals: `near, far, near, far` per query head: query `i` of the call sees key `j` of the
            call if `near <= i - j < far`. Edges are negative where a key at index 0 has another
            position than the first query; `0, 0` is an empty interval.
        prefix: number of first keys that all queries of a head with intervals see; the edges are
            then those of a pattern, and queries and keys have the same positions.
        scale: factor of the scores.
        key_start: int32 `[B, Q]`, the first key that each query may see, or None.
        is_whole: whether these are all the keys of the queries.
    """

    intervals: tuple[int, ...]
    prefix: int
    scale: float
    key_start: Tensor | None
    is_whole: bool = False


def store(results: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor], merge: bool) -> None:
    """Write output `[B, H, Q, D]` and log-sum-exp `[B, H, Q]` into `results`, or join them to
    what is there."""
    if merge:
        merge_into(*results, *found)
        return
    for result, each in zip(results, found):
        result.copy_(each)


def merge_into(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Join a partial result, `part [B, H, Q, D]` of any dtype and `part_lse [B, H, Q]`, to `out`
    and `lse` in place; they see disjoint keys."""
    total = torch.logaddexp(lse, part_lse)
    weight = torch.exp(part_lse - total).masked_fill_(part_lse == -torch.inf, 0.0)
    out.copy_(torch.lerp(out.to(lse.dtype), part.to(lse.dtype), weight[..., None]))
    lse.copy_(total)
