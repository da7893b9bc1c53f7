"""Tokens of another document never matter to the kernels, whatever they hold, nor do those before
the first key; in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from small_cases import case, int32

import spattention as spa
from spattention.impl.triton import op
from spattention.testing import check_case
from tests.gpu.hostile import PLACES, check_hostile, documents

pytestmark = pytest.mark.skipif(not op.INTERPRETED, reason="tests/gpu has them for the GPU")
P = spa.BandPattern
# Blocks of 16 tokens: documents end inside of them, and two are in one block.
ENDS = (7, 26, 30, 37)
HEADS = P((((0, 9),), ((0, 4), (6, 40))), 40)
SINGLE, HALF = torch.float32, torch.float16


@pytest.mark.parametrize(
    ("dtype", "number", "document"),
    [
        (SINGLE, torch.nan, 0),
        (SINGLE, torch.nan, 1),
        (SINGLE, torch.inf, 2),
        (HALF, torch.nan, 1),
        (HALF, torch.inf, 3),
    ],
)
@pytest.mark.parametrize("place", PLACES)
def test_another_document_never_matters(
    place: str, dtype: torch.dtype, number: float, document: int
) -> None:
    tokens = slice(([0, *ENDS])[document], ENDS[document])
    check_hostile(documents(HEADS, ENDS, dtype, 16, 1), place, tokens, number)


@pytest.mark.parametrize("place", PLACES)
def test_padding_never_matters(place: str) -> None:
    """Tokens before the first key of a row."""
    padded = case(HEADS, 37, 37, 1, batch=1, key_start=int32([20]))
    check_hostile(padded, place, slice(0, 20), torch.nan)


def test_queries_without_keys_never_matter() -> None:
    """Their first keys are after all keys."""
    padded = case(HEADS, 37, 37, 1, batch=1, key_start=int32([[0] * 20 + [37] * 17]))
    for place in PLACES:
        check_hostile(padded, place, slice(20, 37), torch.nan)


@pytest.mark.parametrize("place", ["query", "key", "value"])
def test_a_document_shows_its_own_nan(place: str) -> None:
    """The loop over documents hides nothing: the queries that see the token are NaN."""
    hostile = documents(HEADS, ENDS, SINGLE, 16, 1)
    getattr(hostile, place)[:, :, 12] = torch.nan
    tensors = (hostile.query, hostile.key, hostile.value)
    out = spa.band_attention(*tensors, HEADS, impl="triton", **hostile.options)
    assert out[0, 0, 12 : 13 if place == "query" else 21].isnan().all()
    assert out[0, 0, :7].isfinite().all()
    assert out[0, 0, 26:].isfinite().all()


def test_first_keys_that_are_no_documents() -> None:
    """They may move with every query, like a window."""
    first = (torch.arange(37, dtype=torch.int32) - 5).clamp(min=0)[None]
    window = case(HEADS, 37, 37, 1, batch=1, key_start=first)
    check_case(window, impl="triton")
    window.value[:, :, :3] = torch.nan
    tensors = (window.query, window.key, window.value)
    out = spa.band_attention(*tensors, HEADS, impl="triton", key_start=first)
    assert out[0, :, 8:].isfinite().all()


@pytest.mark.parametrize("place", ["query", "key", "value"])
def test_decoding_keeps_documents_apart(place: str) -> None:
    """The last four tokens are of three documents."""
    starts, queries = int32([[40, 67, 68, 68]]), 4
    for document in (slice(0, 40), slice(40, 67), slice(67, 68), slice(68, 70)):
        last = case(HEADS, queries, 70, 1, batch=1, key_start=starts)
        options = {"impl": "triton", "return_lse": True, **last.options}
        tensors = (last.query, last.key, last.value)
        expected = spa.band_attention(*tensors, HEADS, **options)
        offset = 70 - queries if place == "query" else 0
        tokens = slice(max(document.start - offset, 0), max(document.stop - offset, 0))
        getattr(last, place)[:, :, tokens] = torch.nan
        found = spa.band_attention(*tensors, HEADS, **options)
        others = [i for i in range(queries) if not document.start <= 66 + i < document.stop]
        for pair in zip(found, expected):
            torch.testing.assert_close(*(each[:, :, others] for each in pair))
