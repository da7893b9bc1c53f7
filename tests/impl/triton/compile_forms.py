"""Calls whose kernels `compile_table.py` compiles: every form of the Hopper kernels, and the core
of the portable and decoding ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

import spattention as spa
from spattention.impl import triton as kernels
from spattention.impl.partial import Part, PartResults
from spattention.impl.triton import merging
from spattention.impl.triton.decode import append
from spattention.impl.triton.hopper import TileOrder, planning
from tests.gpu.plans import changed_plans
from tests.impl.triton.small_cases import rings as ring_tensors

TWO = spa.BandPattern((((0, 20), (40, 90)),) * 8, 256)
ONE = spa.BandPattern((((0, 90),),) * 8, 256)
PREFIX = spa.BandPattern(TWO.intervals, 256, prefix=4)
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


# Forms that are compiled in every run of the tests' script.
CORE = (
    "hopper D64, two bands, persistent, split",
    "hopper D64, two bands, fused, any order",
    "hopper D64, two bands, fused, in turn",
    "hopper D128, two bands",
    "hopper D128, two bands, persistent, split",
    "hopper D128, two bands, prefix",
    "hopper D128, two bands, fused, any order",
    "hopper D128, two bands, fused, in turn",
    "portable D128",
    "portable D128, prefix",
    "decode D128, 1 query",
    "decode D128, 1 query, prefix",
    "decode D128, 1 query of 4, pages of 16",
)


def train(
    dtype: torch.dtype,
    head_dim: int,
    pattern: spa.BandPattern,
    key_heads: int = 8,
    sinks: bool = False,
    d_lse: bool = False,
    **options: Any,
) -> None:
    like = {"dtype": dtype, "requires_grad": True}
    query = torch.zeros(1, 8, 256, head_dim, **like)
    key, value = (torch.zeros(1, key_heads, 256, head_dim, **like) for _ in range(2))
    if sinks:
        options["sinks"] = torch.zeros(8, dtype=dtype)
    out, lse = spa.band_attention(
        query, key, value, pattern, impl="triton", return_lse=True, **options
    )
    results = [out, lse] if d_lse else [out]
    torch.autograd.grad(results, (query, key, value), [torch.ones_like(each) for each in results])


def train_packed(
    dtype: torch.dtype, head_dim: int, key_heads: int = 8, pattern: spa.BandPattern = TWO
) -> None:
    query = torch.zeros(256, 8, head_dim, dtype=dtype, requires_grad=True)
    key, value = (
        torch.zeros(256, key_heads, head_dim, dtype=dtype, requires_grad=True) for _ in range(2)
    )
    offsets = torch.tensor([0, 100, 256], dtype=torch.int32)
    out = spa.band_attention_varlen(
        query, key, value, pattern, offsets, offsets, 156, 156, impl="triton"
    )
    torch.autograd.grad(out, (query, key, value), torch.ones_like(out))


def decode(
    dtype: torch.dtype,
    head_dim: int,
    queries: int,
    key_heads: int,
    pattern: spa.BandPattern = TWO,
    **options: Any,
) -> None:
    query = torch.zeros(1, 8, queries, head_dim, dtype=dtype)
    key, value = (torch.zeros(1, key_heads, 256, head_dim, dtype=dtype) for _ in range(2))
    spa.band_attention(query, key, value, pattern, impl="triton", **options)


def decode_pages(dtype: torch.dtype, head_dim: int, key_heads: int, block_size: int) -> None:
    query = torch.zeros(1, 8, 1, head_dim, dtype=dtype)
    key, value = torch.zeros(2, 20, block_size, key_heads, head_dim, dtype=dtype)
    table, lengths = torch.zeros(1, 20, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    out, lse = torch.empty_like(query), torch.zeros(1, 8, 1)
    kernels.attend_paged(
        query, key, value, table, lengths, TWO, scale=0.1, sinks=None, out=out, lse=lse
    )


def prefill_pages(
    dtype: torch.dtype,
    head_dim: int,
    key_heads: int,
    block_size: int,
    pattern: spa.BandPattern = TWO,
    sinks: bool = False,
) -> None:
    query = torch.zeros(200, 8, head_dim, dtype=dtype)
    pool = torch.zeros(20, key_heads, block_size, 2 * head_dim, dtype=dtype).transpose(1, 2)
    key, value = pool.split(head_dim, dim=-1)
    table, lengths = torch.zeros(2, 16, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    offsets = torch.tensor([0, 100, 200], dtype=torch.int32)
    given = torch.zeros(8) if sinks else None
    out = torch.empty_like(query)
    kernels.attend_paged_documents(
        query, key, value, offsets, table, lengths, 200, pattern, scale=0.1, sinks=given, out=out
    )


def rings(dtype: torch.dtype, queries: int, key_heads: int, head_dim: int = 128) -> None:
    kept = spa.BandStore(TWO, 1, key_heads, head_dim, dtype=dtype, slack=16)
    key, value = torch.zeros(2, 1, key_heads, queries, head_dim, dtype=dtype)
    append.write(key, value, kept.keys, kept.values, kept.position, kept.offsets, kept.lengths)
    kernels.attend_rings(
        torch.zeros(1, 8, queries, head_dim, dtype=dtype),
        kept.keys,
        kept.values,
        TWO,
        **ring_tensors(kept),
        scale=0.1,
        sinks=torch.zeros(8, dtype=dtype),
        key_start=None,
    )


def merge(dtype: torch.dtype, head_dim: int) -> None:
    out, remainder = torch.zeros(2, 1, 8, 256, head_dim, dtype=dtype)
    part, lse = torch.zeros(1, 8, 256, head_dim), torch.zeros(1, 8, 256)
    given = None if dtype == SINGLE else remainder
    merging.merge(PartResults(out, lse, given), part, torch.zeros_like(lse))


def first_part(dtype: torch.dtype, head_dim: int) -> None:
    """A call whose output another is joined to."""
    query, key, value, out, remainder = torch.zeros(5, 1, 8, 256, head_dim, dtype=dtype)
    results = PartResults(out, torch.zeros(1, 8, 256), remainder)
    kernels.attend_part(query, key, value, results, Part(TWO.flat, 0, 0.1, None), merge=False)


def later_part(dtype: torch.dtype, head_dim: int) -> None:
    """A call whose output is joined to that of another: it is float32."""
    query, key, value = torch.zeros(3, 1, 8, 256, head_dim, dtype=dtype)
    results = PartResults(torch.zeros(1, 8, 256, head_dim), torch.zeros(1, 8, 256))
    kernels.attend_part(query, key, value, results, Part(TWO.flat, 0, 0.1, None), merge=False)


def forms() -> Iterator[tuple[str, Any]]:
    """Name and call of every form; a call launches one kernel or several."""
    grouped = {"dtype": HALF, "key_heads": 2, "sinks": True, "d_lse": True}
    for head_dim in (64, 128):
        variants = {
            "two bands": {"dtype": BRAIN, "pattern": TWO},
            "one band": {"dtype": BRAIN, "pattern": ONE},
            "grouped, sinks": {"pattern": TWO, **grouped},
            "two bands, prefix": {"dtype": BRAIN, "pattern": PREFIX},
        }
        for variant, options in variants.items():
            for persistent in (False, True):
                order = TileOrder.HEAD_MAJOR if persistent else TileOrder.ROUND_ROBIN
                plan = {"order": order, "persistent": persistent, "split_backward": persistent}

                def call(options: Any = options, head_dim: int = head_dim, plan: Any = plan):
                    with changed_plans(**plan):
                        train(head_dim=head_dim, **options)

                shape = ", persistent, split" if persistent else ""
                yield f"hopper D{head_dim}, {variant}{shape}", call
            for deterministic in () if "prefix" in variant else (False, True):
                own = {**options, "head_dim": head_dim, "deterministic": deterministic}

                def fused(options: Any = own):
                    with changed_plans(fused_backward=True):
                        train(**options)

                order = "in turn" if deterministic else "any order"
                yield f"hopper D{head_dim}, {variant}, fused, {order}", fused

    def in_waves() -> None:
        order = TileOrder.HEAD_MAJOR
        with changed_plans(order=order, persistent=True, split_backward=True, waves=8):
            train(BRAIN, 128, TWO)

    yield "hopper D128, two bands, persistent in waves, split", in_waves
    start = torch.zeros(1, 256, dtype=torch.int32)
    first = torch.zeros(1, dtype=torch.int32)
    for head_dim in (64, 128, 256):
        options = {"pattern": TWO, "key_start": start}
        yield f"portable D{head_dim}", lambda d=head_dim: train(BRAIN, d, TWO, query_start=1)
        yield f"portable D{head_dim}, float32", lambda d=head_dim: train(SINGLE, d, TWO)
        yield (
            f"portable D{head_dim}, grouped, sinks, first keys",
            lambda d=head_dim, o=options: train(head_dim=d, **o, **grouped),
        )
        suite = "portable" if head_dim == 256 else "hopper"
        yield f"{suite} D{head_dim}, packed", lambda d=head_dim: train_packed(BRAIN, d)
        padded = {"pattern": TWO, "key_start": first}
        yield f"{suite} D{head_dim}, padded", lambda d=head_dim, o=padded: train(BRAIN, d, **o)
    for head_dim in (64, 128):
        options = {"pattern": PREFIX, "key_start": start}
        yield (
            f"portable D{head_dim}, prefix",
            lambda d=head_dim: train(BRAIN, d, PREFIX, query_start=1),
        )
        yield (
            f"portable D{head_dim}, grouped, sinks, first keys, prefix",
            lambda d=head_dim, o=options: train(head_dim=d, **o, **grouped),
        )
    for head_dim in (64, 128):
        rows = {"pattern": TWO, "key_start": start}

        def row_call(options: Any = rows, head_dim: int = head_dim) -> None:
            with mock.patch.object(planning, "MIN_ROW_QUERIES", 0):
                train(BRAIN, head_dim, **options)

        yield f"hopper D{head_dim}, rows of documents", row_call
    yield "hopper D128, packed, prefix", lambda: train_packed(BRAIN, 128, pattern=PREFIX)
    yield "portable D128, start on device", lambda: train(BRAIN, 128, ONE, query_start=first)
    for head_dim in (64, 128, 256):
        yield f"decode D{head_dim}, 1 query", lambda d=head_dim: decode(BRAIN, d, 1, 8)
    yield "decode D128, 1 query of 4", lambda: decode(BRAIN, 128, 1, 2)
    yield "decode D128, 16 queries of 4", lambda: decode(BRAIN, 128, 16, 2)
    yield (
        "decode D128, first keys, start on device",
        lambda: decode(BRAIN, 128, 4, 2, key_start=first, query_start=first),
    )
    yield "decode D128, 1 query, prefix", lambda: decode(BRAIN, 128, 1, 8, PREFIX)
    yield (
        "decode D128, first keys, start on device, prefix",
        lambda: decode(BRAIN, 128, 4, 2, PREFIX, key_start=first, query_start=first),
    )
    yield "decode D128, 1 query, float32, prefix", lambda: decode(SINGLE, 128, 1, 8, PREFIX)
    yield "decode D128, 1 query, float32", lambda: decode(SINGLE, 128, 1, 8)
    yield "decode D128, 16 queries of 4, float32", lambda: decode(SINGLE, 128, 16, 2)
    yield "decode D128, 1 query of 4, pages of 16", lambda: decode_pages(BRAIN, 128, 2, 16)
    yield "decode D128, 1 query of 4, pages of 1", lambda: decode_pages(BRAIN, 128, 2, 1)
    for size in (16, 64):
        for head_dim in (64, 128):
            yield (
                f"hopper D{head_dim}, pages of {size}",
                lambda d=head_dim, s=size: prefill_pages(BRAIN, d, 2, s),
            )
        yield (
            f"hopper D128, pages of {size}, prefix, sinks",
            lambda s=size: prefill_pages(HALF, 128, 2, s, PREFIX, sinks=True),
        )
    yield "portable D256, pages of 16", lambda: prefill_pages(BRAIN, 256, 2, 16)
    yield "portable D128, pages of 16, float32", lambda: prefill_pages(SINGLE, 128, 2, 16)
    yield "store D128, 1 query", lambda: rings(BRAIN, 1, 2)
    yield "store D128, 16 queries", lambda: rings(BRAIN, 16, 2)
    for head_dim in (64, 128):
        for persistent in (False, True) if head_dim == 128 else (False,):
            for name, attend in (("first", first_part), ("later", later_part)):

                def part(attend: Any = attend, d: int = head_dim, persistent: bool = persistent):
                    with changed_plans(order=TileOrder.HEAD_MAJOR, persistent=persistent):
                        attend(BRAIN, d)

                shape = ", persistent" if persistent else ""
                yield f"hopper D{head_dim}, {name} part{shape}", part
    yield "portable D256, first part", lambda: first_part(BRAIN, 256)
    yield "merge D128", lambda: merge(BRAIN, 128)
