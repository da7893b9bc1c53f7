"""Ulysses: ranks exchange tokens for heads, attend whole sequences, and exchange back.

Jacobs et al., "DeepSpeed Ulysses" (arXiv:2309.14509). Each rank sends all its queries, keys, values
and outputs but its own heads', whatever the bands reach. Heads are dealt so that ranks have about
equal work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention import Result, band_attention
from .agreement import Group
from .deal import deal, deal_pattern, head_order
from .exchange import start_all_to_all
from .plan import Plan
from .prepare import prepare
from .shards import Shards


def ulysses_attention(
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
    """`sharded_attention` by an exchange of tokens for heads; arguments and results as there.

    The query heads must be a multiple of the ranks, and the key/value heads a multiple or a
    divisor of them: fewer key/value heads than ranks are repeated.

    Raises:
        ValueError: on all ranks, if heads do not divide or an argument breaks a rule.
    """
    query, key, value, rank = prepare(query, key, value, plan, group, scale=scale, sinks=sinks)
    ranks, heads, groups = plan.shards.ranks, plan.pattern.num_heads, plan.num_key_value_heads
    if heads % ranks or (groups % ranks and ranks % groups):
        raise ValueError(
            f"`plan` must have query heads that {ranks} ranks divide, and key/value heads that "
            f"they divide or are a multiple of, got {heads} and {groups}; "
            "`sharded_attention` takes any number"
        )
    if groups % ranks:
        key, value = (tensor.repeat_interleave(ranks // groups, dim=1) for tensor in (key, value))
        groups = ranks
    order = deal(plan.pattern, ranks, groups)
    here = rank * heads // ranks, (rank + 1) * heads // ranks
    swap = _Swap(plan.shards, rank, group)
    query_order = head_order(order, heads)
    q = _ToHeads.apply(query[:, query_order], swap)
    k, v = (_ToHeads.apply(tensor[:, list(order)], swap) for tensor in (key, value))
    found = band_attention(
        q,
        k,
        v,
        deal_pattern(plan.pattern, order).heads(*here),
        scale=scale,
        sinks=None if sinks is None else sinks[query_order[slice(*here)]],
        key_start=plan.key_starts((0, plan.shards.length), query.device),
        return_lse=return_lse,
        impl=impl,
    )
    back = torch.tensor(query_order, device=query.device).argsort()
    if isinstance(found, Tensor):
        return _ToTokens.apply(found, swap)[:, back]
    out, lse = (_ToTokens.apply(each, swap) for each in (found[0], found[1][..., None]))
    return out[:, back], lse[:, back, :, 0]


class _Swap(NamedTuple):
    """The exchange of one rank."""

    shards: Shards
    rank: int
    group: Group

    def to_heads(self, tensor: Tensor) -> Tensor:
        """`[B, H, tokens, D]` of this rank's tokens to `[B, H / ranks, N, D]` of its heads."""
        batch, heads, _, width = tensor.shape
        part = heads // self.shards.ranks
        blocks = list(tensor.split(part, dim=1))
        sizes = self.shards.sizes
        found = self._exchange(blocks, [(batch, part, size, width) for size in sizes])
        whole = tensor.new_empty(batch, part, self.shards.length, width)
        for view, block in zip(self._views(whole), self._cut(found)):
            view.copy_(block)
        return whole

    def to_tokens(self, tensor: Tensor) -> Tensor:
        """`[B, H / ranks, N, D]` of this rank's heads to `[B, H, tokens, D]` of its tokens."""
        batch, part, _, width = tensor.shape
        blocks = [
            torch.cat([tensor[:, :, start:stop] for start, stop in ranges], dim=2)
            if ranges
            else tensor[:, :, :0]
            for ranges in self.shards.ranges
        ]
        mine = self.shards.sizes[self.rank]
        shape = (batch, part, mine, width)
        return torch.cat(self._exchange(blocks, [shape] * self.shards.ranks), dim=1)

    def _exchange(
        self, blocks: Sequence[Tensor], shapes: Sequence[tuple[int, int, int, int]]
    ) -> list[Tensor]:
        if self.shards.ranks == 1:
            return list(blocks)
        sent = torch.cat([block.reshape(-1) for block in blocks])
        sizes = [a * b * c * d for a, b, c, d in shapes]
        received = sent.new_empty(sum(sizes))
        pending = start_all_to_all(
            sent, received, [block.numel() for block in blocks], sizes, self.group
        )
        parts = pending.wait().split(sizes)
        return [part.view(shape) for part, shape in zip(parts, shapes)]

    def _views(self, whole: Tensor) -> list[Tensor]:
        """The tokens of each range of each rank in the whole sequence."""
        ranges = [each for rank in self.shards.ranges for each in rank]
        return [whole[:, :, start:stop] for start, stop in ranges]

    def _cut(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The same tokens in what came from each rank."""
        return [
            block
            for part, ranges in zip(parts, self.shards.ranges)
            if ranges
            for block in part.split([stop - start for start, stop in ranges], dim=2)
        ]


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, swap: _Swap) -> Tensor:
        ctx.swap = swap
        return swap.to_heads(tensor)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.swap.to_tokens(gradient), None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, swap: _Swap) -> Tensor:
        ctx.swap = swap
        return swap.to_tokens(tensor)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.swap.to_heads(gradient), None
