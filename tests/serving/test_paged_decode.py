"""Attention of the newest tokens over a paged cache, against float64 over contiguous tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import spattention as spa
from spattention.serving import paged_attention

from .blocks import Paged, paged

pytest.importorskip("triton")
P = spa.BandPattern
SPAN = 60
BY_HAND = P((((0, 3), (7, 12)), ((0, 30),), (), ((2, 5), (20, 60))), SPAN)
FAR = P((((30, 50),), (), ((59, 60),), ((0, 1),)), SPAN)
SINKS = torch.tensor([0.3, -1.0, 2.0, 0.0])
LENGTHS = [97, 0, 1, 40, 64, 7]
IMPLEMENTATIONS = ["gather", "triton"]


def _check(case: Paged, pattern: P, impl: str, **options: Any) -> None:
    out, lse = paged_attention(*case.given, pattern, impl=impl, return_lse=True, **options)
    wanted = case.expected(pattern, **options)
    error = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3}[case.query.dtype]
    for found, truth in zip((out, lse), wanted):
        torch.testing.assert_close(found.double(), truth, rtol=error, atol=error)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("block_size", [1, 5, 16, 64])
@pytest.mark.parametrize("pattern", [BY_HAND, FAR, replace(BY_HAND, prefix=5)], ids=str)
def test_paged_equals_contiguous(pattern: P, block_size: int, impl: str) -> None:
    """Odd lengths, an empty request, and freed blocks full of NaN."""
    case = paged(pattern, LENGTHS, block_size, key_heads=2, seed=block_size)
    _check(case, pattern, impl, sinks=SINKS)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("queries", [2, 5, 16])
@pytest.mark.parametrize("prefix", [0, 3])
def test_several_queries_of_each_request(queries: int, prefix: int, impl: str) -> None:
    """Chunks and drafts; in requests with fewer tokens the first queries see nothing."""
    pattern = replace(BY_HAND, prefix=prefix)
    case = paged(pattern, LENGTHS, 16, key_heads=2, queries=queries, outer_first=False)
    _check(case, pattern, impl)


def test_float64_is_gathered() -> None:
    case = paged(BY_HAND, LENGTHS, 8, key_heads=4, dtype=torch.float64)
    _check(case, BY_HAND, "gather", sinks=SINKS.double())


def test_half_precision_and_an_odd_head_dim() -> None:
    pattern = P.shared_local(6, SPAN, kv_heads=3)
    case = paged(pattern, LENGTHS, 16, key_heads=3, head_dim=20, dtype=torch.float16)
    _check(case, pattern, "triton", scale=-0.3)


def test_layouts_give_the_same_bits() -> None:
    """The cache of vLLM in both orders, and ours with key and value side by side."""
    results = []
    for outer_first in (True, False):
        case = paged(BY_HAND, LENGTHS, 16, key_heads=2, outer_first=outer_first)
        results.append(paged_attention(*case.given, BY_HAND, impl="triton"))
    both = torch.cat([case.key, case.value], dim=-1).transpose(1, 2).contiguous().transpose(1, 2)
    key, value = both.split(16, dim=-1)
    rest = case.block_table, case.seq_lens, BY_HAND
    results.append(paged_attention(case.query, key, value, *rest, impl="triton"))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_the_result_is_written_where_it_is_wanted() -> None:
    """An engine's output has the heads inside the tokens, and more rows than there are requests."""
    case = paged(BY_HAND, LENGTHS, 16, key_heads=2)
    buffer = torch.full((9, 1, 4, 16), 7.0)
    out = paged_attention(*case.given, BY_HAND, impl="triton", out=buffer[:6].transpose(1, 2))
    assert torch.equal(out, paged_attention(*case.given, BY_HAND, impl="triton"))
    assert torch.equal(buffer[:6].transpose(1, 2), out)
    assert buffer[6:].eq(7).all()


@pytest.mark.parametrize("lengths", [[2**31 - 1, -5], [97, -(2**31)]])
def test_hostile_tables_stay_in_bounds(lengths: list[int]) -> None:
    """The interpreter reads real memory: a wild address ends the process."""
    from spattention.impl import triton as kernels

    case = paged(BY_HAND, [97, 40], 16, key_heads=2)
    table = torch.full_like(case.block_table, 2**31 - 1)
    table[1] = -(2**31)
    out, lse = torch.empty_like(case.query), case.query.new_empty(2, 4, 1)
    kernels.attend_paged(
        case.query, case.key, case.value, table, torch.tensor(lengths, dtype=torch.int32), BY_HAND,
        scale=0.3, sinks=None, out=out, lse=lse,
    )  # fmt: skip


def test_no_requests_give_nothing() -> None:
    case = paged(BY_HAND, [5], 16, key_heads=2)
    for impl in IMPLEMENTATIONS:
        out = paged_attention(
            case.query[:0], case.key, case.value, case.block_table[:0], case.seq_lens[:0], BY_HAND,
            impl=impl,
        )  # fmt: skip
        assert out.shape == (0, 4, 1, 16)


GOOD = paged(BY_HAND, [40, 7], 16, key_heads=2)
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"key": GOOD.key[0]}, "`key` must be [blocks, block_size, Hkv, D]"),
    ({"value": GOOD.value[1:]}, "`value` must have key's blocks"),
    ({"query": GOOD.query[0]}, "`query` must be [B, H, Q, D], got shape [4, 1, 16]"),
    ({"query": GOOD.query.double()}, "`key` must have query's dtype torch.float64"),
    ({"query": GOOD.query[:, :3]}, "`pattern` has 4 heads but `query` has 3"),
    ({"block_table": GOOD.block_table.long()}, "`block_table` must be int32 on cpu, got torch.int"),
    ({"block_table": GOOD.block_table[0]}, "`block_table` must be [B, columns] with B = 2"),
    ({"seq_lens": GOOD.seq_lens[:1]}, "`seq_lens` must be [B] with B = 2, got shape [1]"),
    ({"seq_lens": GOOD.seq_lens - 9}, "`seq_lens` must be from 0 to 80, the tokens of a row of"),
    ({"seq_lens": GOOD.seq_lens + 90}, "the tokens of a row of `block_table`, got 130"),
    ({"sinks": SINKS[:3]}, "`sinks` must be [H] = [4]"),
    ({"out": GOOD.query[:1]}, "`out` must be [2, 4, 1, 16] of torch.float32 on cpu"),
    (
        {"out": torch.zeros(2, 4, 1, 32)[..., ::2]},
        "`out` must have a contiguous head_dim",
    ),
    ({"impl": "cuda"}, "`impl` must be None or one of ('triton', 'gather'), got 'cuda'"),
    ({"impl": "triton", "query": torch.zeros(2, 4, 17, 16)}, "takes at most 16 queries, got 17"),
    (
        {"impl": "triton", "key": GOOD.key.transpose(-1, -2).contiguous().transpose(-1, -2)},
        '`impl="triton"` needs a contiguous head_dim, got stride 2 in `key`',
    ),
]


@pytest.mark.parametrize(("changed", "message"), WRONG, ids=[text for _, text in WRONG])
def test_wrong_arguments_are_named(changed: dict[str, Any], message: str) -> None:
    names = ("query", "key", "value", "block_table", "seq_lens")
    arguments: dict[str, Any] = dict(zip(names, GOOD.given)) | {"pattern": BY_HAND} | changed
    with pytest.raises(ValueError) as error:  # noqa: PT011
        paged_attention(**arguments)
    assert message in str(error.value)
