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


class PartResults(NamedTuple):
    """Results that calls on parts of the keys write, one after another.

    Attributes:
        out: `[B, H, Q, D]`.
        lse: `[B, H, Q]`, float32 or float64.
        remainder: what rounding to the dtype of `out` took from an output that another is to be
            joined to, with the shape, dtype and strides of `out`. A call that joins nothing writes
            it where the queries see keys, one that joins reads it. None: nothing, or not wanted.
    """

    out: Tensor
    lse: Tensor
    remainder: Tensor | None = None


def store(results: PartResults, found: tuple[Tensor, Tensor], merge: bool) -> None:
    """Write output `[B, H, Q, D]` and log-sum-exp `[B, H, Q]` into `results`, or join them to
    what is there."""
    if merge:
        merge_into(results, *found)
        return
    out, lse, remainder = results
    out.copy_(found[0])
    lse.copy_(found[1])
    if remainder is not None:
        remainder.copy_(found[0] - out)


def merge_into(results: PartResults, part: Tensor, part_lse: Tensor) -> None:
    """Join a partial result, `part [B, H, Q, D]` of any dtype and `part_lse [B, H, Q]`, to `out`
    and `lse` in place; they see disjoint keys."""
    out, lse, remainder = results
    total = torch.logaddexp(lse, part_lse)
    weight = torch.exp(part_lse - total).masked_fill_(part_lse == -torch.inf, 0.0)
    base = out.to(lse.dtype)
    if remainder is not None:
        base = base + remainder.masked_fill((lse == -torch.inf)[..., None], 0.0)
    out.copy_(torch.lerp(base, part.to(lse.dtype), weight[..., None]))
    lse.copy_(total)
