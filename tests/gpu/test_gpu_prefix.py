"""Prefixes in the kernels, on a GPU."""

from __future__ import annotations

import pytest
import torch

import spattention as spa
from spattention import BandPattern
from spattention.impl.triton.hopper import TileOrder
from spattention.testing import Case, check_case
from spattention.testing.cases import run

from .cases import VARIANTS, Variant, draw
from .hostile import PLACES, check_hostile, documents
from .plans import changed_plans

DEVICE = "cuda"
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
BANDS = (((0, 90),), ((0, 40), (60, 400)), (), ((3, 300),))


def with_prefix(case: Case, prefix: int) -> Case:
    pattern = case.pattern
    pattern = BandPattern(pattern.intervals, pattern.span, prefix=min(prefix, pattern.span))
    return Case(case.query, case.key, case.value, pattern, case.options)


@pytest.mark.parametrize("prefix", [1, 4, 64, 65, 200])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_random_cases(variant: Variant, prefix: int) -> None:
    for seed in range(4):
        check_case(with_prefix(draw(variant, seed), prefix), impl="triton")


def inputs(
    tokens: int, pattern: BandPattern, key_heads: int, head_dim: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    return [
        torch.randn(1, heads, tokens, head_dim, generator=generator, device=DEVICE).to(dtype)
        for heads in (pattern.num_heads, key_heads, key_heads)
    ]


def starts(tokens: int, *documents: int) -> torch.Tensor:
    """First keys of a row of documents that start at these tokens."""
    found = torch.zeros(1, tokens, dtype=torch.int32, device=DEVICE)
    for start in documents:
        found[:, start:] = start
    return found


LONG = 2600  # three chunks of queries of the gradients of a prefix


@pytest.mark.parametrize("prefix", [1, 4, 64, 100])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("layout", ["plain", "left padding", "documents", "moving first keys"])
def test_prefixes_that_many_queries_see(layout: str, head_dim: int, prefix: int) -> None:
    """Their gradients are split over programs."""
    pattern = BandPattern(BANDS, 400, prefix=prefix)
    options = {}
    if layout == "left padding":
        options["key_start"] = torch.tensor([70], dtype=torch.int32, device=DEVICE)
    elif layout == "documents":
        options["key_start"] = starts(LONG, 70, 75, 300, 2590)
    elif layout == "moving first keys":
        first = torch.arange(LONG, device=DEVICE, dtype=torch.int32) // 30
        options["key_start"] = first[None]
    case = Case(*inputs(LONG, pattern, 2, head_dim, BRAIN), pattern, options)
    check_case(case, impl="triton")


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("persistent", "split"), [(True, True), (False, True), (False, False)])
def test_narrow_prefixes_of_larger_plans(persistent: bool, split: bool, head_dim: int) -> None:
    """Prefixes of at most 16 keys have a step of their own, and parts of dK and dV."""
    for prefix in (4, 16):
        pattern = BandPattern(BANDS, 400, prefix=prefix)
        case = Case(*inputs(LONG, pattern, 2, head_dim, BRAIN), pattern)
        order = TileOrder.HEAD_MAJOR
        with changed_plans(order=order, persistent=persistent, split_backward=split):
            check_case(case, impl="triton")


def test_packed_documents_of_many_queries() -> None:
    pattern = BandPattern(BANDS, 400, prefix=100)
    tensors = [each[0].transpose(0, 1) for each in inputs(LONG, pattern, 2, 128, BRAIN)]
    offsets = torch.tensor([0, 10, 1500, LONG], dtype=torch.int32, device=DEVICE)
    options = {
        "cu_seqlens_q": offsets,
        "cu_seqlens_k": offsets,
        "max_seqlen_q": 1490,
        "max_seqlen_k": 1490,
    }
    check_case(Case(*tensors, pattern, options), impl="triton")


@pytest.mark.parametrize("layout", ["plain", "documents"])
def test_the_same_bits_on_every_run(layout: str) -> None:
    pattern = BandPattern(BANDS, 400, prefix=4)
    options = {"key_start": starts(LONG, 70, 75, 300)} if layout == "documents" else {}
    case = Case(*inputs(LONG, pattern, 2, 128, BRAIN), pattern, options)
    grads = (torch.randn_like(case.query), torch.randn(1, 4, LONG, device=DEVICE))
    first = run(case, grads, impl="triton")
    for _ in range(3):
        again = run(case, grads, impl="triton")
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("dtype", "head_dim"), [(BRAIN, 128), (HALF, 64), (SINGLE, 64)])
def test_another_document_never_matters(place: str, dtype: torch.dtype, head_dim: int) -> None:
    ends = (90, 133, 140, 333, 400)
    pattern = BandPattern(BANDS, 400, prefix=20)
    case = documents(pattern, ends, dtype, head_dim, 2, DEVICE)
    check_case(case, impl="triton")
    for document in range(5):
        tokens = slice(([0, *ends])[document], ends[document])
        check_hostile(case, place, tokens, torch.nan)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_keys_after_the_last_query_are_not_read(head_dim: int) -> None:
    """The unfilled tail of a static cache, also where it starts inside of the prefix."""
    pattern = BandPattern(BANDS, 400, prefix=64)
    for queries in (10, 100):
        query, key, value = inputs(300, pattern, 2, head_dim, BRAIN)
        key[:, :, queries:] = torch.nan
        value[:, :, queries:] = torch.nan
        case = Case(query[:, :, :queries], key, value, pattern, {"query_start": 0})
        found = run(case, (torch.ones_like(case.query), torch.ones(1, 4, queries, device=DEVICE)),
                    impl="triton")  # fmt: skip
        assert all(each.isfinite().all() for name, each in found.items() if name != "lse")


def test_explain_names_the_kernels() -> None:
    pattern = BandPattern(BANDS, 400, prefix=4)
    query, key, value = inputs(300, pattern, 2, 128, BRAIN)
    assert "kernels (Triton" in str(spa.explain(query, key, value, pattern))
