"""Attention over a part of the keys of each row, and the share of the gradients that it gives.

Positions count from the first query: a key before it has a negative distance added to all edges of
the bands. So queries start at position 0, whatever keys they have, and the Hopper kernels run such
calls too. They read whole blocks of keys: those that no query sees must be numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..layout import empty_like_query
from ..partial import Part
from . import launch, merging
from .arguments import Positions
from .call import BackwardTensors, Call, ForwardTensors, ensure_inner_contiguous

# Programs of a persistent kernel per multiprocessor that fit one after another: an exchange that
# runs meanwhile gets its share of the multiprocessors as soon as the first end.
TURNS = 8


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    part: Part,
    *,
    merge: bool,
) -> None:
    """Output and log-sum-exp of these keys, without a graph; arguments as in `attend_part`."""
    query, key, value = (ensure_inner_contiguous(each) for each in (query, key, value))
    direct = not merge and out.dtype == query.dtype and out.stride(-1) == 1
    found = out if direct else empty_like_query(query, query.shape[3])
    found_lse = lse if direct and lse.is_contiguous() else torch.empty_like(lse).contiguous()
    launch.forward(
        _call(query, key, part), ForwardTensors(query, key, value, found, found_lse, None)
    )
    if merge:
        merging.merge(out, lse, found, found_lse)
        return
    if found is not out:
        out.copy_(found)
    if found_lse is not lse:
        lse.copy_(found_lse)


def differentiate(
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    gradients: Sequence[torch.Tensor],
    part: Part,
) -> None:
    """The share of these keys in the gradients of query, key and value; arguments as in
    `differentiate_part`."""
    inputs = query, key, value, out, d_out
    query, key, value, out, d_out = (ensure_inner_contiguous(each) for each in inputs)
    found = [
        gradient
        if gradient.dtype == query.dtype and gradient.stride(-1) == 1
        else torch.empty_like(gradient, dtype=query.dtype).contiguous()
        for gradient in gradients
    ]
    call = _call(query, key, part)
    call.has_all_keys = False
    launch.backward(
        call, BackwardTensors(query, key, value, out, d_out, *found), lse.contiguous(), d_lse
    )
    for gradient, each in zip(gradients, found):
        if each is not gradient:
            gradient.copy_(each)
    if part.scale == 0.0:
        for gradient in gradients[:2]:
            gradient.zero_()


def _call(query: torch.Tensor, key: torch.Tensor, part: Part) -> Call:
    positions = Positions(None, part.key_start, None, None)
    call = Call(query, key, part.intervals, part.scale, 0, positions, part.prefix)
    call.turns = TURNS
    return call
