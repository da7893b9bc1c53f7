"""All-gather: every rank receives all keys and values and attends them with its own queries.

The simplest context parallelism, for comparison: each rank's memory holds the keys and values of
the whole sequence, and the bands save no communication.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from ..attention import Result, band_attention
from .agreement import Group
from .plan import Plan
from .prepare import prepare
from .shards import Shards

# PyTorch renames them; the former names warn.
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gathered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    *,
    group: Group = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Result:
    """`sharded_attention` by an all-gather of keys and values; arguments and results as there.

    Gradients of keys and values are summed over ranks in their own dtype.
    """
    query, key, value, rank = prepare(query, key, value, plan, group, scale=scale, sinks=sinks)
    gather = _Gather(plan.shards, rank, group)
    key, value = (_Gathered.apply(tensor, gather) for tensor in (key, value))
    parts: list[tuple[Tensor, Tensor]] = []
    offset = 0
    for start, stop in plan.shards.ranges[rank] or ((0, 0),):
        found = band_attention(
            query[:, :, offset : offset + stop - start],
            key[:, :, :stop],
            value[:, :, :stop],
            plan.pattern,
            scale=scale,
            sinks=sinks,
            query_start=start,
            key_start=plan.key_starts((start, stop), query.device),
            return_lse=True,
            impl=impl,
        )
        assert isinstance(found, tuple)
        parts.append(found)
        offset += stop - start
    out, lse = (torch.cat(each, dim=2) for each in zip(*parts))
    return (out, lse) if return_lse else out


class _Gather(NamedTuple):
    """The exchange of one rank. Shards are padded to the largest."""

    shards: Shards
    rank: int
    group: Group

    def gather(self, tensor: Tensor) -> Tensor:
        """`[B, G, tokens, D]` of this rank to `[B, G, N, D]`."""
        largest = max(self.shards.sizes)
        mine = pad(tensor, (0, 0, 0, largest - tensor.shape[2])).contiguous()
        found = mine.new_empty(self.shards.ranks, *mine.shape)
        ALL_GATHER(found.flatten(0, 1), mine, group=self.group)
        whole = tensor.new_empty(*tensor.shape[:2], self.shards.length, tensor.shape[3])
        for rank, tokens, place in self._places():
            whole[:, :, tokens] = found[rank, :, :, place]
        return whole

    def scatter_sum(self, whole: Tensor) -> Tensor:
        """`[B, G, N, D]` on every rank to the sum over ranks of this rank's tokens."""
        largest = max(self.shards.sizes)
        parts = whole.new_zeros(self.shards.ranks, *whole.shape[:2], largest, whole.shape[3])
        for rank, tokens, place in self._places():
            parts[rank, :, :, place] = whole[:, :, tokens]
        found = torch.empty_like(parts[0])
        REDUCE_SCATTER(found, parts.flatten(0, 1), group=self.group)
        return found[:, :, : self.shards.sizes[self.rank]]

    def _places(self) -> Iterator[tuple[int, slice, slice]]:
        """Each range of a sequence: its rank, its tokens, and their places on the rank."""
        for rank, ranges in enumerate(self.shards.ranges):
            offset = 0
            for start, stop in ranges:
                yield rank, slice(start, stop), slice(offset, offset + stop - start)
                offset += stop - start


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, gather: _Gather) -> Tensor:
        ctx.gather = gather
        return tensor.clone() if gather.shards.ranks == 1 else gather.gather(tensor)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.gather.shards.ranks == 1:
            return gradient, None
        return ctx.gather.scatter_sum(gradient), None
