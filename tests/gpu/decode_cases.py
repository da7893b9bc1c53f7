"""Random cases for the decoding kernels, drawn from few compiled variants."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch

from spattention.testing import Case

from .cases import BRAIN, HALF, SINGLE, draw_pattern
from .cases import Variant as Bands


class Variant(NamedTuple):
    """What a compiled decoding kernel depends on, and the queries."""

    dtype: torch.dtype
    head_dim: int
    queries: int
    group: int = 1
    intervals: int = 2
    start: str = "last"  # or "number", "device"
    padded: bool = False
    sinks: bool = False


VARIANTS = (
    Variant(BRAIN, 128, 1),
    Variant(BRAIN, 128, 1, intervals=1, start="device"),
    Variant(BRAIN, 128, 1, padded=True, sinks=True),
    Variant(HALF, 64, 1, start="number"),
    Variant(BRAIN, 64, 1, group=4, start="device"),
    Variant(BRAIN, 128, 1, group=8, padded=True),
    Variant(BRAIN, 128, 3),
    Variant(BRAIN, 128, 16, group=4, sinks=True),
    Variant(BRAIN, 128, 16, group=7, intervals=1, padded=True, start="device"),
    Variant(HALF, 80, 1),
    Variant(BRAIN, 96, 2, group=3),
    Variant(BRAIN, 192, 1),
    Variant(BRAIN, 192, 5, start="device"),
    Variant(BRAIN, 256, 1, intervals=1),
    Variant(BRAIN, 256, 16, group=2),
    Variant(BRAIN, 16, 1),
    Variant(HALF, 32, 7, sinks=True),
    Variant(SINGLE, 64, 1, padded=True),
    Variant(SINGLE, 128, 4, group=2),
    Variant(SINGLE, 256, 16, start="device"),
)


def draw(variant: Variant, seed: int, device: str = "cuda") -> Case:
    """One random case of a variant: batch, lengths, layout, pattern, starts."""
    rng = random.Random(f"{variant}{seed}")
    generator = torch.Generator(device).manual_seed(rng.getrandbits(40))
    queries, batch = variant.queries, rng.choice((1, 2, 5))
    heads = variant.group * rng.choice((1, 2, 3, 8))
    keys = max(8 * queries, rng.choice((150, 700, 3000)) + rng.randint(0, 90))

    def tensor(n_heads: int, tokens: int) -> torch.Tensor:
        tokens_first = rng.random() < 0.5
        shape = [batch, tokens, n_heads] if tokens_first else [batch, n_heads, tokens]
        made = torch.randn(*shape, variant.head_dim, generator=generator, device=device)
        made = made.to(variant.dtype)
        return made.transpose(1, 2) if tokens_first else made

    def integers(values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    options: dict[str, Any] = {}
    if variant.start == "number":
        options["query_start"] = rng.randint(0, keys)
    elif variant.start == "device":
        first = [rng.randint(0, keys + 2) for _ in range(batch)]
        options["query_start"] = integers(first) if rng.random() < 0.7 else integers(first)[0]
    if variant.padded:
        rows = [sorted(rng.randint(0, keys + 2) for _ in range(queries)) for _ in range(batch)]
        few = [min(row[0], 200) for row in rows]
        options["key_start"] = integers(rows) if rng.random() < 0.5 else integers(few)
    if variant.sinks:
        sinks = torch.randn(heads, generator=generator, device=device)
        options["sinks"] = sinks.to(variant.dtype)
    bands = Bands(variant.dtype, variant.head_dim, "", variant.intervals)
    pattern = draw_pattern(rng, bands, heads, keys)
    few_heads = heads // variant.group
    return Case(
        tensor(heads, queries), tensor(few_heads, keys), tensor(few_heads, keys), pattern, options
    )
