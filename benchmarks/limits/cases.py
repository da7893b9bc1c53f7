"""The cases of one run: which attention, on which mask and shape, by which implementation.

Multi-head shapes have head_dim 128. Grouped shapes `(B, H/Hkv, N, D)` are those of Llama-3.2-1B
(D 64) and Qwen3-4B (D 128), with geometric bands: plain, with learned sinks, with documents packed
into one row, and with a prefix of 4 tokens, one band per query head and one per key/value head.
Decoding is one query of 1 and of 16 requests over 65,536 tokens each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..serving_memory import LONGEST
from ..serving_patterns import HEAD_DIM
from ..serving_replay import SHAPES

MULTI_HEAD = ((1, 16, 65536), (1, 16, 16384), (4, 16, 4096), (1, 8, 4096), (16, 8, 1024))
LONG_EAGER = (1, 16, 131072)  # plain calls: a graph would need twice the memory
MASKS = ("exclusive", "shared_local", "geometric")
GROUPED = ((1, 16384, 64), (4, 4096, 128))  # batch, tokens, head_dim
LONG_GROUPED = (1, 65536, 64)
HEADS, KEY_HEADS = 32, 8
VARIANTS = ("plain", "sinks", "packed", "prefix")
BANDS = {"query head": "geometric", "key/value head": "geometric, per key/value head"}
LONG = 16384  # longer sequences run other kernels
DECODE = "decode"
REQUESTS = (1, 16)

OURS, ANY_ORDER, PAGED = "spattention", "spattention, any order", "spattention, paged"
DENSE = ("dense, cuDNN", "dense, FlashAttention-2", "dense, FlashAttention-4")
FLEX, FLEX_FLASH = "FlexAttention", "FlexAttention FLASH"
FLASH_4, FLASH_SPARSE = "FlashAttention-4", "flash-sparse-attn"
BY = (OURS, ANY_ORDER, PAGED, *DENSE, FLEX, FLEX_FLASH, FLASH_4, FLASH_SPARSE)


@dataclass(frozen=True)
class Case:
    """One measurement.

    Args:
        by: implementation, one of `BY`.
        mask: "dense", one of `MASKS`, or one of the values of `BANDS`.
        variant: one of `VARIANTS`, or `DECODE`.
        batch: B; requests when decoding.
        heads: H.
        key_heads: Hkv.
        length: N; documents are packed into one row of `batch * length` tokens.
        head_dim: D.
    """

    by: str
    mask: str
    variant: str
    batch: int
    heads: int
    key_heads: int
    length: int
    head_dim: int

    def __str__(self) -> str:
        heads = (
            f"{self.heads}" if self.heads == self.key_heads else f"{self.heads}/{self.key_heads}"
        )
        shape = f"{self.batch} x {heads} x {self.length}, D {self.head_dim}"
        return f"{shape}, {self.variant}, {self.mask}, {self.by}"

    @property
    def place(self) -> tuple[Any, ...]:
        """Shape and variant: all that cases have in common that are compared."""
        return (
            self.variant,
            self.batch,
            self.heads,
            self.key_heads,
            self.length,
            self.head_dim,
        )


def cases() -> list[Case]:
    """All measurements, those that say most first."""
    found = [case for shape in MULTI_HEAD for case in multi_head(*shape)]
    found += [
        case for variant in VARIANTS for shape in GROUPED for case in grouped(variant, *shape)
    ]
    found += decoding()
    found += multi_head(*LONG_EAGER)
    found += [case for variant in VARIANTS for case in grouped(variant, *LONG_GROUPED)]
    return found


def multi_head(batch: int, heads: int, length: int) -> Iterator[Case]:
    """Dense attention, and every mask by all implementations."""
    shape = ("plain", batch, heads, heads, length, 128)
    yield Case(DENSE[0], "dense", *shape)
    yield Case(DENSE[2], "dense", *shape)
    for mask in MASKS:
        for by in (OURS, ANY_ORDER, FLEX, FLEX_FLASH, FLASH_4, FLASH_SPARSE):
            yield Case(by, mask, *shape)


def grouped(variant: str, batch: int, length: int, head_dim: int) -> Iterator[Case]:
    """Dense attention where it can be asked, and both ways to deal bands to heads."""
    shape = (variant, batch, HEADS, KEY_HEADS, length, head_dim)
    if variant == "plain":
        yield Case(DENSE[0], "dense", *shape)
        yield Case(DENSE[2], "dense", *shape)
    if variant == "packed":  # cuDNN has no documents here
        yield Case(DENSE[1], "dense", *shape)
    for mask in BANDS.values():
        yield Case(OURS, mask, *shape)
        if variant in ("plain", "sinks"):  # the others have one backward pass
            yield Case(ANY_ORDER, mask, *shape)
        yield Case(FLEX, mask, *shape)
        if variant == "plain":
            yield Case(FLEX_FLASH, mask, *shape)
        if variant in ("plain", "sinks"):
            yield Case(FLASH_4, mask, *shape)
        if mask != BANDS["query head"]:
            yield Case(FLASH_SPARSE, mask, *shape)  # its windows belong to key/value heads


def decoding() -> Iterator[Case]:
    """One query of each request, over contiguous keys and over a paged cache."""
    for name, (pattern, key_heads) in SHAPES.items():
        for requests in REQUESTS:
            shape = (DECODE, requests, pattern.num_heads, key_heads, LONGEST, HEAD_DIM)
            for by in (OURS, PAGED):
                yield Case(by, name, *shape)
            for by in DENSE[:2]:
                yield Case(by, "dense", *shape)
            for by in (FLEX, FLASH_SPARSE):
                yield Case(by, name, *shape)


def worker_name(case: Case) -> tuple[Any, ...]:
    """Cases of the same name share a worker, and so what it compiled."""
    if case.variant == DECODE:
        family = case.by if case.by in (FLEX, FLASH_SPARSE) else OURS
        return (DECODE, family)
    kind = "multi-head" if case.heads == case.key_heads else case.head_dim
    if case.by in DENSE[:2]:
        return ("dense", kind, case.length > LONG)
    if case.by in (OURS, ANY_ORDER):
        return (OURS, kind, case.variant, case.length > LONG)
    if case.by in (FLEX, FLEX_FLASH):  # compiled for one shape
        return (case.by, *case.place)
    return (case.by, kind, "plain" if case.variant == "prefix" else case.variant)
