"""Padding anywhere in a row, moved to the left end of the row, and back.

    tokens      a . b . c        mask   1 0 1 0 1
    order       1 3 0 2 4
    reordered   . . a b c

A row whose padding is at its left end needs no more than `key_start`: its tokens are neighbours, so
that positions count tokens alone. Shapes do not depend on the mask, and no value is read, so that
all of this compiles and waits for no device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def padding_first(mask: Tensor) -> Tensor:
    """The order that moves padding to the left end and keeps everything else in order.

    Args:
        mask: `[B, n]`, bool: True for tokens; or integers, whose lowest come first.

    Returns:
        int64 `[B, n]`: the column that comes to each place, for `reorder`.
    """
    # bool has no stable sort on every device.
    return torch.argsort(mask.to(torch.int32), dim=1, stable=True)


def reorder(tensor: Tensor, order: Tensor) -> Tensor:
    """`tensor [B, H, n, D]` with column `order[b, i]` of batch entry b in place i; differentiable.
    Each row of `order [B, n]` is a permutation of the columns."""
    return _Reorder.apply(tensor, order.to(torch.int64))


def restore(tensor: Tensor, order: Tensor) -> Tensor:
    """Undo `reorder(tensor, order)`."""
    order = order.to(torch.int64)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return reorder(tensor, torch.empty_like(order).scatter_(1, order, places))


class _Reorder(torch.autograd.Function):
    """Autograd's own backward of a gather adds into zeros, atomically on a GPU. A permutation is
    undone by another gather, with the same bits on every run."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor, order: Tensor) -> Tensor:
        rows = torch.arange(order.shape[0], device=order.device)[:, None]
        return tensor[rows, :, order].transpose(1, 2)  # [B, n, H, D] to [B, H, n, D]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return restore(gradient, order), None
