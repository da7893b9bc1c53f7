"""Small cases for the interpreter: what a test does not name is drawn, always alike."""

from __future__ import annotations

from typing import Any

import torch

from spattention import BandPattern, BandStore
from spattention.testing import Case


def case(
    pattern: BandPattern,
    queries: int,
    keys: int,
    key_heads: int | None = None,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    batch: int = 2,
    **options: Any,
) -> Case:
    """`sinks=True` draws them too; other options are those of the operator."""
    generator = torch.Generator().manual_seed(0)
    heads = pattern.num_heads

    def draw(tokens: int, n_heads: int) -> torch.Tensor:
        shape = (batch, n_heads, tokens, head_dim)
        return torch.randn(shape, generator=generator).to(dtype)

    if options.pop("sinks", False):
        options["sinks"] = torch.randn(heads, generator=generator).to(dtype)
    few = key_heads or heads
    return Case(draw(queries, heads), draw(keys, few), draw(keys, few), pattern, options)


def int32(*values: Any) -> torch.Tensor:
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.int32)


def rings(store: BandStore) -> dict[str, torch.Tensor]:
    """Arguments of `attend_rings` that a store has."""
    return {
        "offsets": store.offsets,
        "lengths": store.lengths,
        "prefixes": store.layout.all_heads.prefix,
        "documents": store.documents,
        "position": store.position,
    }
