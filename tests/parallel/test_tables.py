"""Calls on tables of fetched keys, all ranks in one process."""

from __future__ import annotations

import in_turns
import pytest
import torch

from spattention import BandPattern, band_attention
from spattention.parallel import Shards, plan_exchange, rank_calls
from spattention.parallel.rank_calls import rank_plan

LENGTH, HEADS = 203, 8
PATTERNS = {
    "geometric": BandPattern.shared_local(HEADS, LENGTH, widths="geometric", first=3, local=9),
    "exclusive": BandPattern.exclusive(HEADS, LENGTH),
    "dense": BandPattern.dense(HEADS, LENGTH),
    "prefix": BandPattern.shared_local(HEADS, LENGTH, local=5, prefix=70),
    "holes": BandPattern(
        (((0, 9), (90, 120)), (), ((150, 160),), ((0, 1), (199, 203))) * 2, LENGTH
    ),
}


def expected(pattern, tensors) -> list[torch.Tensor]:
    *inputs, d_out = tensors
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    out = band_attention(*inputs, pattern, impl="reference")
    return [out.detach(), *torch.autograd.grad(out, inputs, d_out)]


@pytest.mark.parametrize("cost", [0, 40, 1 << 16])
@pytest.mark.parametrize("key_heads", [8, 2])
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", PATTERNS)
def test_tables_give_the_whole_sequence(name, ranks, key_heads, cost, monkeypatch):
    """A call for each head that fetches, for a few heads, and for all of them."""
    monkeypatch.setattr(rank_calls, "CALL_TOKENS", cost)
    rank_plan.cache_clear()
    random = torch.Generator().manual_seed(0)
    shapes = [(1, heads, LENGTH, 4) for heads in (HEADS, key_heads, key_heads, HEADS)]
    tensors = [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]
    plan = plan_exchange(PATTERNS[name], Shards.balanced(LENGTH, ranks), key_heads)
    found = in_turns.results(plan, tensors, impl="reference")
    for mine, other in zip(found, expected(PATTERNS[name], tensors)):
        torch.testing.assert_close(mine, other, rtol=0.0, atol=1e-12)
    rank_plan.cache_clear()


def test_few_calls_attend_what_many_heads_fetch():
    """Each rank of two: a call a range on its own keys, and three on those before, at 131,072."""
    length = 131072
    pattern = BandPattern.shared_local(16, length, widths="geometric")
    plan = plan_exchange(pattern, Shards.balanced(length, 2), 16)
    for rank, ranges in ((0, 2), (1, 1)):
        work = rank_plan(plan, rank)
        assert len(work.local) == ranges
        assert len(work.fetched) <= 3
        held = sum((t.heads[1] - t.heads[0]) * t.length for t in work.tables)
        assert held < 2 * plan.fetched_keys(rank), "tables are mostly padding"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("impl", [pytest.param("triton", marks=pytest.mark.slow), "blockwise"])
def test_every_implementation_takes_tables(impl, packed):
    """Float32, with a prefix; documents that start inside a range and before it."""
    length = 45
    pattern = BandPattern.shared_local(4, length, widths="geometric", first=2, local=4, prefix=3)
    random = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, heads, length, 16, generator=random) for heads in (4, 2, 2, 4)]
    starts = (0, 7, 30) if packed else (0,)
    plan = plan_exchange(pattern, Shards.balanced(length, 2), 2, documents=[starts])
    found = in_turns.results(plan, tensors, impl=impl)
    wanted = [torch.zeros_like(each) for each in (tensors[0], *tensors[:3])]
    for first, last in zip(starts, (*starts[1:], length)):
        here = slice(first, last)
        for whole, part in zip(wanted, expected(pattern, [t[:, :, here] for t in tensors])):
            whole[:, :, here] = part
    for mine, other in zip(found, wanted):
        torch.testing.assert_close(mine, other, rtol=0.0, atol=2e-5)
