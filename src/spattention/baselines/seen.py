"""Pairs that each head of a baseline attends, for pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .adapter import Baseline

UNSEEN, SEEN, GROUPED = 0, 1, 2
ROWS = 64  # queries at a time
HEAD_DIM = 16


def seen(baseline: Baseline, length: int, index: int = 0, num_layers: int = 1) -> Tensor:
    """The pairs that a layer attends over queries and keys from a fixed seed.

    Where they depend on the data, this is one example.

    Args:
        baseline: any of them.
        length: tokens.
        index: of the layer.
        num_layers: of the model.

    Returns:
        uint8 `[H, length, length]`, rows are queries: 0 not attended, 1 attended by itself, 2 as a
        member of a group that is attended as one.
    """
    generator = torch.Generator().manual_seed(0)
    shape = 1, baseline.num_heads, length, HEAD_DIM
    query, key = (torch.randn(shape, generator=generator) for _ in range(2))
    layer: Any = baseline.layer(index, num_layers)
    grouped = getattr(layer, "grouped", None)
    found = torch.zeros(shape[1], length, length, dtype=torch.uint8)
    for start in range(0, length, ROWS):
        stop = min(start + ROWS, length)
        given = query, key, HEAD_DIM**-0.5, start, stop
        found[:, start:stop] = (layer.weights(*given)[0] != 0).to(torch.uint8)
        if grouped is not None:
            found[:, start:stop][grouped(*given)[0]] = GROUPED
    return found
