"""Attention over a part of the keys of each row, and the share of the gradients that it gives.

Positions count from the first query: a key before it has a negative distance added to all edges of
the bands. So queries start at position 0, whatever keys they have, and the Hopper kernels run such
calls too. They read whole blocks of keys: those that no query sees must be numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..attention_call import WholeResults
from ..partial import Part, PartResults
from . import launch, merging
from .arguments import Positions
from .call import BackwardTensors, Call, ForwardTensors, call_of, ensure_inner_contiguous


def attend_part(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    results: PartResults,
    part: Part,
    *,
    merge: bool,
) -> None:
    """Attention over a part of the keys, into `results`, whose rows are contiguous in D."""
    query, key, value = (ensure_inner_contiguous(each) for each in (query, key, value))
    out, lse, remainder = results
    assert out.stride(-1) == 1
    assert remainder is None or remainder.stride() == out.stride()
    call = _call(query, key, part)
    found_lse = lse if lse.is_contiguous() and not merge else lse.new_empty(lse.shape)
    if merge:
        found = out.new_empty(out.shape, dtype=lse.dtype)
        launch.forward(call, ForwardTensors(query, key, value, found, found_lse, None))
        merging.merge(results, found, found_lse)
        return
    launch.forward(call, ForwardTensors(query, key, value, out, found_lse, None, remainder))
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
