"""Caches of classes of heads, with new tokens for them."""

from __future__ import annotations

from typing import NamedTuple

import torch

SHAPES = ((5, 3, 8), (4, 2, 16), (9, 1, 32))  # blocks, heads, tokens of a block


class Given(NamedTuple):
    """Arguments of `class_store.store`."""

    key: torch.Tensor
    value: torch.Tensor
    caches: list[torch.Tensor]
    slots: list[torch.Tensor]


def given(
    seed: int, dtype: torch.dtype = torch.float32, head_dim: int = 24, shift: int = 0
) -> Given:
    """Five tokens of seven have slots, one of them a negative one. Keys and values are views of one
    projection, which starts `shift` elements after an aligned address.
    """
    generator = torch.Generator().manual_seed(seed)
    heads = sum(heads for _, heads, _ in SHAPES)
    room = torch.randn(7 * heads * 3 * head_dim + shift, generator=generator).to(dtype)
    mixed = room[shift:].view(7, heads, 3, head_dim)
    caches = [
        torch.zeros(blocks, size, heads, 2 * head_dim, dtype=dtype).transpose(1, 2)
        for blocks, heads, size in SHAPES
    ]
    slots = []
    for blocks, _, size in SHAPES:
        numbers = torch.randperm(blocks * size, generator=generator)[:5]
        numbers[3] = -1
        slots.append(numbers)
    return Given(mixed[:, :, 0], mixed[:, :, 2], caches, slots)
