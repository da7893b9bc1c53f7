"""Attention over a part of the keys of each row, and the share of the gradients that it gives.

Positions count from the first query: a key before it has a negative distance added to all edges of
the bands. So queries start at position 0, whatever keys they have, and the Hopper kernels run such
calls too. They read whole blocks of keys: those that no query sees must be numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..attention_call import WholeResults
from ..layout import empty_like_query
from ..partial import Part
from . import launch, merging
from .arguments import Positions
from .call import BackwardTensors, Call, ForwardTensors, call_of, ensure_inner_contiguous


def attend_part(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    results: tuple[torch.Tensor, torch.Tensor],
    part: Part,
    *,
    merge: bool,
) -> None:
    """Attention over a part of the keys, into `results`: output and log-sum-exp."""
    query, key, value = (ensure_inner_contiguous(each) for each in (query, key, value))
    out, lse = results
    direct = not merge and out.dtype == query.dtype and out.stride(-1) == 1
    found = out if direct else empty_like_query(query, query.shape[3])
    found_lse = lse
    if not (direct and lse.is_contiguous()):
        found_lse = lse.new_empty(lse.shape)
    tensors = ForwardTensors(query, key, value, found, found_lse, None)
    launch.forward(_call(query, key, part), tensors)
    if merge:
        merging.merge(out, lse, found, found_lse)
        return
    if found is not out:
        out.copy_(found)
    if found_lse is not lse:
        lse.copy_(found_lse)


def differentiate_part(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    whole: WholeResults,
    gradients: Sequence[torch.Tensor],
    part: Part,
) -> None:
    """Gradients of query, key and value that these keys give to attention over more keys, into
    `gradients`."""
    inputs = query, key, value, whole.out, whole.d_out
    tensors = [ensure_inner_contiguous(each) for each in inputs]
    found = [
        gradient
        if gradient.dtype == query.dtype and gradient.stride(-1) == 1
        else gradient.new_empty(gradient.shape, dtype=query.dtype)
        for gradient in gradients
    ]
    call = _call(tensors[0], tensors[1], part)
    launch.backward(call, BackwardTensors(*tensors, *found), whole.lse.contiguous(), whole.d_lse)
    for gradient, each in zip(gradients, found):
        if each is not gradient:
            gradient.copy_(each)
    if part.scale == 0.0:
        for gradient in gradients[:2]:
            gradient.zero_()


def _call(query: torch.Tensor, key: torch.Tensor, part: Part) -> Call:
    positions = Positions(None, part.key_start, None, None)
    facts = part.intervals, part.scale, 0, positions, part.prefix
    return call_of(query, key, *facts, has_all_keys=part.is_whole)
