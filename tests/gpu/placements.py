"""Calls whose tensors do not lie in memory as fresh ones do. A compiled kernel depends on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

import spattention as spa
from spattention.impl.triton.decode import append
from spattention.serving import paged_attention
from spattention.testing import Case


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same values and strides, one element after an aligned address."""
    room = tensor.new_empty(tensor.numel() + 1)
    return torch.as_strided(room, tensor.shape, tensor.stride(), 1).copy_(tensor)


def apart(tensor: torch.Tensor, elements: int) -> torch.Tensor:
    """The same values, with so many elements between rows."""
    *leading, head_dim = tensor.shape
    return tensor.new_empty(*leading, head_dim + elements)[..., :head_dim].copy_(tensor)


PLACES: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    shifted,
    lambda tensor: apart(tensor, 1),
    lambda tensor: apart(tensor, 8),
)


def placed(case: Case) -> Iterator[tuple[Case, torch.Tensor]]:
    """The case with a gradient of its output: as it is, with its options one element further, then
    with one tensor after the other in each place.
    """
    inputs = [case.query, case.key, case.value, torch.randn_like(case.query)]
    yield case, inputs[3]
    options = {
        name: shifted(value) if isinstance(value, torch.Tensor) else value
        for name, value in case.options.items()
    }
    yield Case(*inputs[:3], case.pattern, options), inputs[3]
    for place in PLACES:
        for at in range(len(inputs)):
            *moved, d_out = (place(each) if i == at else each for i, each in enumerate(inputs))
            yield Case(*moved, case.pattern, case.options), d_out


def train(case: Case) -> None:
    """Forward and backward in every place."""
    attend: Callable[..., Any] = spa.band_attention_varlen if case.packed else spa.band_attention
    for moved, d_out in placed(case):
        leaves = [each.detach().requires_grad_() for each in (moved.query, moved.key, moved.value)]
        out = attend(*leaves, moved.pattern, impl="triton", **moved.options)
        torch.autograd.grad(out, leaves, d_out)


def decode(case: Case) -> None:
    """Forward in every place."""
    for moved, _ in placed(case):
        inputs = (moved.query, moved.key, moved.value)
        spa.band_attention(*inputs, moved.pattern, impl="triton", **moved.options)


def paged(device: str) -> None:
    """Decoding from paged caches, with each tensor in every place."""
    pattern = spa.BandPattern.shared_local(8, 64, kv_heads=2)
    table = torch.zeros(3, 9, dtype=torch.int32, device=device)
    seq_lens = torch.full((3,), 70, dtype=torch.int32, device=device)
    for head_dim in (64, 20):
        query = torch.zeros(3, 8, 1, head_dim, dtype=torch.bfloat16, device=device)
        key, value = torch.zeros(2, 9, 16, 2, head_dim, dtype=torch.bfloat16, device=device)
        rest = table, seq_lens, pattern
        for place in PLACES:
            paged_attention(place(query), key, value, *rest, impl="triton")
            paged_attention(query, place(key), value, *rest, impl="triton")
            paged_attention(query, key, place(value), *rest, impl="triton")
            paged_attention(query, key, value, *rest, out=place(query), impl="triton")
            paged_attention(query, key, value, shifted(table), *rest[1:], impl="triton")


def write(device: str) -> None:
    """Tokens into stores, in every place."""
    pattern = spa.BandPattern.shared_local(4, 64)
    for key_heads in (1, 2):
        store = spa.BandStore(
            pattern, 2, key_heads, 64, device=device, dtype=torch.bfloat16, slack=40
        )
        rest = (store.keys, store.values, store.position, store.offsets, store.lengths)
        for tokens in (1, 2, 3, 16, 40):
            key = torch.randn(2, key_heads, tokens, 64, device=device, dtype=torch.bfloat16)
            for place in PLACES:
                append.write(key, place(key), *rest)
