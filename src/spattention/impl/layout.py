"""The memory layout of outputs, the same for every implementation and for its fake (shape-only) form."""

from __future__ import annotations

import torch


def empty_like_query(query: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Uninitialised `[..., head_dim]` with query's leading shape, dtype and order of strides, dense in memory."""
    shape = [*query.shape[:-1], head_dim]
    order = sorted(range(query.dim()), key=query.stride, reverse=True)
    packed = query.new_empty([shape[d] for d in order])
    return packed.permute([order.index(d) for d in range(query.dim())])


def lse_dtype(query: torch.Tensor) -> torch.dtype:
    """float64 for float64 input, float32 for every other."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32
