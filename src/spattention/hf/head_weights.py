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


def causal_weights(
    module: Any,
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    sinks: Tensor | None,
    start: int,
    stop: int,
) -> Tensor:
    """Weights of a module with bands, or of one with dense attention; see `HeadWeights`."""
    plan = plan_of(module)
    if plan is None or plan.pattern is None:
        pattern = BandPattern.dense(query.shape[1], key.shape[2])
    else:
        pattern = plan.pattern
        sinks = current_sinks(module) if plan.sinks else sinks
    mask = pattern.mask(stop - start, key.shape[2], query_start=start, device=query.device)
    if sinks is None:
        sinks = query.new_full(query.shape[1:2], -torch.inf)
    return masked_weights(query[:, :, start:stop], key, mask, scale, sinks)


def masked_weights(
    query: Tensor, key: Tensor, mask: Tensor, scale: float, sinks: Tensor | None = None
) -> Tensor:
    """Float32 weights `[B, H, R, N]` of queries `[B, H, R, D]` over keys `[B, Hkv, N, D]`, where
    the mask is True; zeros for a row without keys. With sinks `[H]` the last column is theirs.
    """
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).float()
    scores = ((query.float() @ key.mT) * scale).masked_fill(~mask, -torch.inf)
    if sinks is not None:
        column = sinks.float()[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    return scores.softmax(dim=-1).nan_to_num(0.0)
