"""Attention weights of single heads, to be looked at: recomputed from queries and keys."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ..bands import BandPattern
from .decoder import plan_of
from .sinks import current_sinks


class HeadWeights(Protocol):
    """Weights of some queries of whole sequences, over the N keys and, at the end, the sink."""

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        *,
        scale: float,
        sinks: Tensor | None,
        start: int,
        stop: int,
    ) -> Tensor:
        """Recompute the weights of an attention module.

        Args:
            module: the attention module.
            query: `[B, H, N, D]`, all queries.
            key: `[B, Hkv, N, D]`.
            scale: factor of the scores.
            sinks: `[H]` sinks that the model itself has, or None.
            start: first query.
            stop: first query beyond.

        Returns:
            Float32 `[B, H, stop - start, N + 1]`; zeros for a query without keys and sink.
        """


def stock_weights(
    module: Any,
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    sinks: Tensor | None,
    start: int,
    stop: int,
) -> Tensor:
    """Weights of dense causal attention; see `HeadWeights`."""
    pattern = BandPattern.dense(query.shape[1], key.shape[2])
    return _weights(pattern, query, key, scale, sinks, start, stop)


def band_weights(
    module: Any,
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    sinks: Tensor | None,
    start: int,
    stop: int,
) -> Tensor:
    """Weights of a module with bands, or of one that is left dense; see `HeadWeights`."""
    plan = plan_of(module)
    if plan is None or plan.pattern is None:
        return stock_weights(module, query, key, scale=scale, sinks=sinks, start=start, stop=stop)
    sinks = current_sinks(module) if plan.sinks else sinks
    return _weights(plan.pattern, query, key, scale, sinks, start, stop)


def _weights(
    pattern: BandPattern,
    query: Tensor,
    key: Tensor,
    scale: float,
    sinks: Tensor | None,
    start: int,
    stop: int,
) -> Tensor:
    heads, length = query.shape[1], key.shape[2]
    key = key.repeat_interleave(heads // key.shape[1], dim=1).float()
    scores = (query[:, :, start:stop].float() @ key.mT) * scale
    mask = pattern.mask(stop - start, length, query_start=start, device=query.device)
    scores = scores.masked_fill(~mask, -torch.inf)
    own = scores.new_full((heads,), -torch.inf) if sinks is None else sinks.float()
    column = own[:, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], dim=-1).softmax(dim=-1).nan_to_num(0.0)
