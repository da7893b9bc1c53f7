"""Random cases for the kernels, drawn from few compiled variants: a variant fixes what chooses a
kernel.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch

from spattention import BandPattern
from spattention.impl import reference
from spattention.testing import Case


@dataclass(frozen=True)
class Variant:
    """What a compiled kernel depends on.

    Args:
        dtype: of query, key and value.
        head_dim: D.
        mode: "self" (as many queries as keys), "suffix" (the queries are the last positions),
            "device_start", "left_pad", "packed_rows" (`key_start` per query) or "packed" (varlen).
        intervals: at most so many per head, and one head with that many.
        group: query heads per key head; 1 or more than 1.
        sinks: with learned sinks.
    """

    dtype: torch.dtype
    head_dim: int
    mode: str
    intervals: int
    group: int = 1
    sinks: bool = False

    @property
    def hopper(self) -> bool:
        """Whether the kernels for Hopper cover it, on such a GPU."""
        modes = ("self", "packed", "left_pad")
        return self.mode in modes and self.head_dim in (64, 128) and self.dtype != SINGLE

    @property
    def fuses(self) -> bool:
        """Whether five products per tile cover it, on such a GPU."""
        return self.hopper and self.mode == "self"

    def __str__(self) -> str:
        parts = [str(self.dtype).removeprefix("torch."), f"D{self.head_dim}", self.mode]
        parts += [f"{self.intervals}_bands", f"group{self.group}", *["sinks"] * self.sinks]
        return "-".join(parts)


HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
# 20 variants, three kernels each.
VARIANTS = (
    Variant(BRAIN, 128, "self", 2),
    Variant(BRAIN, 128, "self", 1),
    Variant(HALF, 64, "self", 2),
    Variant(BRAIN, 64, "self", 1, group=3, sinks=True),
    Variant(BRAIN, 128, "self", 2, group=4, sinks=True),
    Variant(BRAIN, 128, "suffix", 2),
    Variant(BRAIN, 128, "packed", 2),
    Variant(HALF, 64, "packed", 1, group=2),
    Variant(BRAIN, 128, "packed_rows", 2),
    Variant(BRAIN, 64, "packed_rows", 1, sinks=True),
    Variant(BRAIN, 128, "left_pad", 1, group=2),
    Variant(BRAIN, 128, "device_start", 2),
    Variant(HALF, 80, "self", 2),
    Variant(BRAIN, 96, "packed", 1),
    Variant(BRAIN, 192, "self", 2),
    Variant(BRAIN, 256, "self", 1),
    Variant(BRAIN, 16, "self", 2, sinks=True),
    Variant(SINGLE, 64, "self", 2),
    Variant(SINGLE, 128, "packed", 1),
    Variant(BRAIN, 32, "suffix", 1, group=2),
)


def draw(variant: Variant, seed: int, device: str = "cuda", longest: int = 300) -> Case:
    """One random case of a variant: lengths, layout, pattern, documents, starts."""
    rng = random.Random(f"{variant}{seed}")
    generator = torch.Generator(device).manual_seed(rng.getrandbits(40))
    heads = variant.group * rng.choice((1, 2, 3, 8))
    lengths = [1, 2, 17, 64, 65, rng.randint(1, longest), rng.randint(1, longest)]
    if variant.mode == "packed_rows":
        lengths += [128, 192, 256]  # whole blocks, which the kernels for Hopper need
    if variant.dtype == SINGLE:
        # Over few numbers the plain computation may be exact by luck, and the budget with it.
        lengths = [rng.randint(150, 300)]
    keys = rng.choice(lengths)
    batch = rng.choice((1, 1, 2, 3))
    queries, options = keys, dict[str, Any]()

    def integers(values: list[Any]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    if variant.mode == "suffix":
        # A start of 0 would be another kernel's.
        keys += 1
        queries = rng.randint(1, keys - 1)
    elif variant.mode == "device_start":
        queries = rng.randint(1, keys + 3)
        first = [rng.randint(0, keys + 2) for _ in range(batch)]
        options["query_start"] = integers(first) if rng.random() < 0.7 else integers(first)[0]
    elif variant.mode == "left_pad":
        options["key_start"] = integers([rng.randint(0, keys + 2) for _ in range(batch)])
    elif variant.mode == "packed_rows":
        rows = [sorted(rng.randint(0, keys) for _ in range(queries)) for _ in range(batch)]
        if rng.random() < 0.5:  # documents: a first key never behind its query
            cuts = sorted(rng.randint(0, queries) for _ in range(3))
            rows = [[max([c for c in cuts if c <= i], default=0) for i in range(queries)]] * batch
        options["key_start"] = integers(rows)
    elif variant.mode == "packed":
        each = [lengths[-1], *(rng.choice([0, *lengths]) for _ in range(rng.randint(0, 4)))]
        rng.shuffle(each)
        more = [n + rng.choice((0, 0, 1, 40)) for n in each]
        queries, keys, batch = sum(each), sum(more), 1
        options["cu_seqlens_q"] = integers([sum(each[:i]) for i in range(len(each) + 1)])
        options["cu_seqlens_k"] = integers([sum(more[:i]) for i in range(len(more) + 1)])
        options |= {"max_seqlen_q": max(each), "max_seqlen_k": max(more)}
    if rng.random() < 0.2:
        options["scale"] = rng.choice((0.3, 0.05))
    if variant.sinks:
        options["sinks"] = torch.randn(heads, generator=generator, device=device).to(variant.dtype)

    def tensor(tokens: int, n_heads: int) -> torch.Tensor:
        tokens_first = rng.random() < 0.5
        shape = [batch, tokens, n_heads] if tokens_first else [batch, n_heads, tokens]
        found = torch.randn(*shape, variant.head_dim, generator=generator, device=device)
        found = found.to(variant.dtype)
        found = found.transpose(1, 2) if tokens_first else found
        return found[0].transpose(0, 1) if variant.mode == "packed" else found

    tensors = (
        tensor(queries, heads),
        tensor(keys, heads // variant.group),
        tensor(keys, heads // variant.group),
    )
    return Case(*tensors, draw_pattern(rng, variant, heads, max(keys, queries, 4)), options)


def draw_pattern(rng: random.Random, variant: Variant, heads: int, length: int) -> BandPattern:
    """A pattern whose fullest head has `variant.intervals` intervals."""
    span = rng.choice((length, length + 7, max(4, length - 3)))
    if variant.intervals == 1:
        found = [
            BandPattern.exclusive(heads, span),
            BandPattern.exclusive(heads, span, widths="geometric"),
            BandPattern.sliding_window(heads, span, rng.randint(1, span)),
            BandPattern.dense(heads, span),
        ]
        if variant.dtype != SINGLE:
            # With one key the gradients of a float32 score cancel to rounding noise, which the
            # budget of the plain computation, exact there, does not cover.
            found.append(
                BandPattern(tuple(((d % span, d % span + 1),) for d in range(heads)), span)
            )
            found.append(BandPattern((((0, span),), *((),) * (heads - 1)), span))
        return rng.choice(found)
    intervals = []
    for head in range(heads):
        edges = sorted(rng.sample(range(span + 1), 4))
        pair = ((edges[0], edges[1]), (edges[2], edges[3]))
        kept = 2 if head == 0 else rng.choice((0, 1, 2, 2))
        intervals.append(pair[:kept])
    return BandPattern(tuple(intervals), span)


def poison_unseen(case: Case) -> Case:
    """The case with NaN in every key and value that no query of its heads sees.

    Not where queries have first keys of their own: inside a row the kernels may read what they do
    not use.
    """
    key_start = case.options.get("key_start")
    if key_start is not None and key_start.dim() == 2:
        return case
    if case.packed:
        offsets = (case.options["cu_seqlens_q"], case.options["cu_seqlens_k"])
        mask = reference.packed_mask(case.query, case.key, case.pattern, *offsets)
    else:
        start = case.options.get("query_start")
        start = case.key.shape[2] - case.query.shape[2] if start is None else start
        mask = reference.row_mask(case.query, case.key, case.pattern, start, key_start)
    heads = case.key.shape[1]
    seen = mask.any(dim=2).unflatten(1, (heads, -1)).any(dim=2)  # [B or 1, Hkv, K]
    hidden = ~seen[0].mT[..., None] if case.packed else ~seen[..., None]
    key, value = (t.masked_fill(hidden, torch.nan) for t in (case.key, case.value))
    return Case(case.query, key, value, case.pattern, case.options)
