"""The layout and dtypes that every implementation keeps to, and its fake (shape-only) form too."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def empty_like_query(query: Tensor, head_dim: int) -> Tensor:
    """Uninitialised `[..., head_dim]` with query's leading shape and dtype, dense in memory: its
    leading axes in query's order of strides, those that query expands outermost, and rows of
    head_dim contiguous, as kernels write them.
    """
    shape = [*query.shape[:-1], head_dim]
    if query.is_contiguous():  # this and heads inside tokens are nearly all calls
        return torch.empty_like(query) if query.shape[-1] == head_dim else query.new_empty(shape)
    if query.dim() == 4:
        heads, tokens, width = query.shape[1:]
        if query.stride() == (tokens * heads * width, width, heads * width, 1):
            inside = (tokens * heads * head_dim, head_dim, heads * head_dim, 1)
            return query.new_empty_strided(shape, inside)
    order = _order(query)
    packed = query.new_empty([shape[d] for d in order])
    return packed.permute([order.index(d) for d in range(query.dim())])


def laid_out_like_query(result: Tensor, query: Tensor) -> Tensor:
    """`result` with query's dtype, in the memory order of `empty_like_query`."""
    order = _order(query)
    packed = result.to(query.dtype).permute(order).contiguous()
    return packed.permute([order.index(d) for d in range(query.dim())])


def _order(query: Tensor) -> list[int]:
    """Query's axes from the outermost in memory to the innermost, head_dim last."""
    # Not `sorted`: torch.compile cannot sort by a key when strides are symbolic.
    strides = query.stride()
    order: list[int] = []
    for axis in range(query.dim() - 1):
        inner = [
            i
            for i, other in enumerate(order)
            if strides[other] != 0 and (strides[axis] == 0 or strides[other] < strides[axis])
        ]
        order.insert(inner[0] if inner else len(order), axis)
    order.append(query.dim() - 1)
    return order


def lse_dtype(query: Tensor) -> torch.dtype:
    """float64 for float64 input, float32 for every other."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """The public operator has cast its arguments: products inside keep the dtypes that they are
    given."""
    device = tensor.device.type
    # (`torch.amp.is_autocast_available` would ask this better, but torch 2.11 cannot compile it.)
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on, as `scaled_dot_product_attention` casts."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
        for tensor in tensors
    )


def score_scale(query: Tensor, scale: float | None) -> float:
    """Factor of the scores: `1 / sqrt(head_dim)` by default."""
    return 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
