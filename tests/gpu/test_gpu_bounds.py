"""How far NaN reaches in padded rows and packed documents, on a GPU: results that it must not reach
keep their bits.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spattention import BandPattern
from spattention.testing import Case, run

from .plans import changed_plans

DEVICE = "cuda"
BLOCK = 64  # queries or keys
BANDS = (((0, 90),), ((0, 40), (60, 400)), (), ((3, 300),))
PLACES = ("query", "key", "value", "d_out")
HALF, BRAIN = torch.float16, torch.bfloat16


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def draw(
    pattern: BandPattern, dtype: torch.dtype, head_dim: int, queries: int, keys: int, **options: Any
) -> Case:
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = ((queries, 4), (keys, 2), (keys, 2))
    tensors = [
        torch.randn(*shape, head_dim, generator=generator, device=DEVICE).to(dtype)
        for shape in shapes
    ]
    if "key_start" in options:
        tensors = [each.transpose(0, 1)[None] for each in tensors]
    return Case(*tensors, pattern, options)


def results(case: Case, place: str = "", tokens: Any = None) -> dict[str, torch.Tensor]:
    """Outputs and gradients, with NaN in these tokens of a tensor."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    d_out = torch.randn(case.query.shape, generator=generator, device=DEVICE)
    tensors = {"query": case.query, "key": case.key, "value": case.value}
    tensors["d_out"] = d_out.to(case.query.dtype)
    if place:
        changed = tensors[place].clone()
        changed[tokens] = torch.nan
        tensors[place] = changed
    hostile = Case(tensors["query"], tensors["key"], tensors["value"], case.pattern, case.options)
    rows = case.query.shape[:2][::-1] if case.packed else case.query.shape[:3]
    d_lse = torch.zeros(rows, device=DEVICE)
    return run(hostile, (tensors["d_out"], d_lse), impl="triton")


@pytest.mark.parametrize("prefix", [0, 4, 20])
@pytest.mark.parametrize("place", ["key", "value"])
@pytest.mark.parametrize(("dtype", "head_dim"), [(BRAIN, 128), (HALF, 64)])
def test_nan_stays_in_its_block_of_padded_rows(
    dtype: torch.dtype, head_dim: int, place: str, prefix: int
) -> None:
    """A block of keys at the start of the text starts at its first token, and may end after the
    last query of a block of queries.
    """
    pattern = BandPattern(BANDS, 400, prefix=prefix)
    case = draw(pattern, dtype, head_dim, 200, 200, key_start=int32(10))
    clean = results(case)
    for token in (66, 73, 128, 131):
        found = results(case, place, (0, slice(None), token))
        before = token // BLOCK * BLOCK
        for name in ("out", "d_query"):
            assert torch.equal(found[name][:, :, :before], clean[name][:, :, :before])
            assert found[name][:, :, token:].isnan().any()


@pytest.mark.parametrize("prefix", [0, 4, 20])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("more", [0, 5])
@pytest.mark.parametrize(("dtype", "head_dim"), [(BRAIN, 128), (HALF, 64)])
def test_packed_documents_keep_their_nan(
    dtype: torch.dtype, head_dim: int, more: int, split: bool, prefix: int
) -> None:
    """Documents start anywhere in memory; every one has `more` keys before its queries."""
    lengths = (90, 43, 1, 7, 193, 130)
    ends = [sum(lengths[: d + 1]) for d in range(6)]
    key_ends = [end + more * (d + 1) for d, end in enumerate(ends)]
    options = {
        "cu_seqlens_q": int32(0, *ends),
        "cu_seqlens_k": int32(0, *key_ends),
        "max_seqlen_q": 193,
        "max_seqlen_k": 193 + more,
    }
    pattern = BandPattern(BANDS, 400, prefix=prefix)
    case = draw(pattern, dtype, head_dim, ends[-1], key_ends[-1], **options)
    with changed_plans(split_backward=split):
        clean = results(case)
        for place in PLACES:
            of_keys = place in ("key", "value")
            for document in range(6):
                tokens = document_tokens(key_ends if of_keys else ends, document)
                found = results(case, place, tokens)
                for name in ("out", "d_query", "d_key", "d_value"):
                    keys = name in ("d_key", "d_value")
                    own = document_tokens(key_ends if keys else ends, document)
                    expected = clean[name].clone()
                    expected[own] = found[name][own] = 0.0
                    assert torch.equal(found[name], expected), (place, document, name)
        assert not any(each.isnan().any() for each in clean.values())


def document_tokens(ends: list[int], document: int) -> slice:
    return slice(ends[document - 1] if document else 0, ends[document])


def test_more_documents_than_one_load_of_offsets() -> None:
    """Programs count the offsets before theirs, 512 at a time."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    ends = torch.randint(0, 5, (1200,), generator=generator, device=DEVICE).cumsum(0).int()
    tokens = int(ends[-1])
    options = {
        "cu_seqlens_q": torch.cat([int32(0), ends]),
        "cu_seqlens_k": torch.cat([int32(0), ends]),
        "max_seqlen_q": 5,
        "max_seqlen_k": 5,
    }
    case = draw(BandPattern(BANDS, 400), BRAIN, 64, tokens, tokens, **options)
    found = results(case)
    document = torch.searchsorted(ends, torch.arange(tokens, device=DEVICE).int(), right=True)
    first = torch.cat([int32(0), ends])[document].int()
    rows = Case(
        *(each.transpose(0, 1)[None] for each in (case.query, case.key, case.value)),
        case.pattern,
        {"key_start": first[None]},
    )
    expected = run(rows, impl="reference")["out"][0].transpose(0, 1)
    torch.testing.assert_close(found["out"], expected, rtol=0.02, atol=0.02)
