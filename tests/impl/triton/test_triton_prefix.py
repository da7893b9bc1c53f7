"""Prefixes in the portable and decoding kernels, in Triton's interpreter: blocks of 16 tokens, and
chunks of 32 queries in the gradients of a prefix.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_cases import case, int32

import spattention as spa
from spattention.impl.triton import op
from spattention.testing import Case, check_case
from spattention.testing.cases import run
from tests.gpu.hostile import PLACES, check_hostile, documents

pytestmark = pytest.mark.skipif(not op.INTERPRETED, reason="tests/gpu has them for the GPU")
P = spa.BandPattern
BANDS = (((0, 3), (7, 12)), ((0, 30),), (), ((2, 5), (20, 26)))


def first_keys(tokens: int, *starts: int) -> torch.Tensor:
    found = torch.zeros(1, tokens, dtype=torch.int32)
    for start in starts:
        found[:, start:] = start
    return found


def packed(prefix: int) -> Case:
    """Documents of 17, 0, 3 and 40 queries; more keys than queries."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, 2, 16, generator=generator) for n in (60, 89, 89)]
    options = {
        "cu_seqlens_q": int32(0, 17, 17, 20, 60),
        "cu_seqlens_k": int32(0, 17, 19, 39, 89),
        "max_seqlen_q": 40,
        "max_seqlen_k": 50,
    }
    return Case(*tensors, P.exclusive(2, 24, prefix=prefix), options)


MOVING = (torch.arange(70, dtype=torch.int32) - 5).clamp(min=0)[None]
CASES: dict[str, Callable[[], Case]] = {
    "exclusive, one key": lambda: case(P.exclusive(3, 37, prefix=1), 37, 37, 1, batch=1),
    "shared local": lambda: case(P.shared_local(2, 37, prefix=4), 37, 37),
    "dense": lambda: case(P.dense(1, 37, prefix=4), 37, 37, batch=1),
    "gapped, groups": lambda: case(P.gapped(4, 37, kv_heads=2, prefix=20), 37, 37, 2, batch=1),
    "the whole text": lambda: case(P.exclusive(2, 37, prefix=37), 30, 30, batch=1),
    "longer than the text": lambda: case(P.exclusive(2, 99, prefix=64), 21, 21, batch=1),
    "two bands, an empty head, groups, sinks": lambda: case(
        P(BANDS, 30, prefix=5), 70, 70, 2, sinks=True, batch=1
    ),
    "float16, head_dim 20": lambda: case(
        P.exclusive(2, 37, prefix=17), 37, 37, head_dim=20, dtype=torch.float16
    ),
    "one token": lambda: case(P.dense(1, 1, prefix=1), 1, 1, dtype=torch.float16),
    "last queries": lambda: case(P.exclusive(2, 70, prefix=6), 10, 70, batch=1),
    "start on the device": lambda: case(
        P.shared_local(2, 40, prefix=9), 7, 30, query_start=int32(4, 23)
    ),
    "left padding": lambda: case(P(BANDS, 30, prefix=5), 70, 70, 2, key_start=int32(3, 60)),
    "first keys below zero": lambda: case(
        P.shared_local(2, 70, prefix=6),
        70,
        70,
        1,
        batch=1,
        key_start=int32([[-9] * 40 + [40] * 30]),
    ),
    "documents, some of many queries": lambda: case(
        P.shared_local(2, 130, prefix=17), 130, 130, 1, batch=1, key_start=first_keys(130, 7, 70)
    ),
    "documents shorter than the prefix": lambda: case(
        P.shared_local(2, 70, prefix=20), 70, 70, 1, batch=1, key_start=first_keys(70, 7, 10, 35)
    ),
    "first keys that are no documents": lambda: case(
        P(BANDS, 30, prefix=5), 70, 70, 2, batch=1, key_start=MOVING
    ),
    "packed": lambda: packed(4),
    "packed, longer than documents": lambda: packed(20),
    "negative scale": lambda: case(P.exclusive(2, 21, prefix=4), 21, 21, scale=-0.3, batch=1),
}


@pytest.mark.parametrize("name", CASES)
def test_feature(name: str) -> None:
    check_case(CASES[name](), impl="triton")


DECODING: dict[str, Callable[[spa.BandPattern], Case]] = {
    "one query": lambda pattern: case(pattern, 1, 130, 4, sinks=True),
    "one query of a group": lambda pattern: case(pattern, 1, 130, 2),
    "four queries, float16": lambda pattern: case(pattern, 4, 130, 2, dtype=torch.float16),
    "documents": lambda pattern: case(
        pattern, 4, 130, 2, key_start=int32([[0, 0, 128, 129], [20, 128, 128, 128]])
    ),
    "padding": lambda pattern: case(pattern, 4, 130, 2, key_start=int32(128, 200)),
    "start on the device": lambda pattern: case(pattern, 3, 130, 2, query_start=int32(3, 160)),
}


@pytest.mark.parametrize("prefix", [1, 5, 64])
@pytest.mark.parametrize("name", DECODING)
def test_decoding(name: str, prefix: int) -> None:
    check_case(DECODING[name](P(BANDS, 130, prefix=prefix)), impl="triton", backward=False)


@pytest.mark.parametrize("place", PLACES)
def test_another_document_never_matters(place: str) -> None:
    pattern = P((((0, 9),), ((0, 4), (6, 40))), 40, prefix=6)
    for document in (slice(7, 26), slice(26, 30)):
        check_hostile(
            documents(pattern, (7, 26, 30, 70), torch.float32, 16, 1), place, document, torch.nan
        )


def test_decoding_keeps_documents_apart() -> None:
    pattern = P(BANDS, 130, prefix=4)
    last = case(pattern, 4, 70, 2, batch=1, key_start=int32([[40, 67, 68, 68]]))
    tensors = (last.query, last.key, last.value)
    expected = spa.band_attention(*tensors, pattern, impl="triton", **last.options)
    for document, others in ((slice(40, 67), [1, 2, 3]), (slice(67, 68), [0, 2, 3])):
        hostile = last.value.clone()
        hostile[:, :, document] = torch.nan
        found = spa.band_attention(
            last.query, last.key, hostile, pattern, impl="triton", **last.options
        )
        torch.testing.assert_close(found[:, :, others], expected[:, :, others])


@pytest.mark.parametrize("queries", [5, 20])
def test_keys_after_the_last_query_are_not_read(queries: int) -> None:
    """The unfilled tail of a static cache, also where it starts inside of the prefix."""
    pattern = P.shared_local(2, 40, prefix=16)
    tail = case(pattern, queries, 50, batch=1, query_start=0)
    tail.key[:, :, queries:] = torch.nan
    tail.value[:, :, queries:] = torch.nan
    grads = (torch.ones_like(tail.query), torch.ones(1, 2, queries))
    assert all(each.isfinite().all() for each in run(tail, grads, impl="triton").values())


def test_the_same_bits_on_every_run() -> None:
    long = case(P.shared_local(2, 130, prefix=17), 130, 130, 1, batch=1)
    grads = (torch.ones_like(long.query), torch.ones(1, 2, 130))
    first, second = (run(long, grads, impl="triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
