"""Attention on shards by the kernels, all ranks in turns on one GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spattention import BandPattern
from spattention.impl import triton
from spattention.impl.partial import Part, PartResults
from spattention.impl.triton import hopper
from spattention.parallel import Shards, plan_exchange, rank_calls
from spattention.parallel.rank_calls import rank_plan
from tests.parallel import in_turns

from .cases import BRAIN, HALF
from .shards import Budget, drawn

LENGTH, HEADS = 1403, 8
PATTERNS = {
    "geometric": BandPattern.shared_local(HEADS, LENGTH, widths="geometric", first=20, local=90),
    "exclusive": BandPattern.exclusive(HEADS, LENGTH),
    "dense": BandPattern.dense(HEADS, LENGTH),
    "prefix": BandPattern.shared_local(HEADS, LENGTH, local=50, prefix=70),
}


@pytest.mark.parametrize("key_heads", [8, 2])
@pytest.mark.parametrize(("ranks", "cost"), [(2, 1 << 16), (3, 0)])
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.bfloat16, 128), (torch.float32, 64)])
@pytest.mark.parametrize("name", PATTERNS)
def test_shards_are_as_exact_as_the_whole(
    name: str,
    dtype: torch.dtype,
    head_dim: int,
    ranks: int,
    cost: int,
    key_heads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Within the budget of one call over all keys, whatever the calls that add up to it."""
    monkeypatch.setattr(rank_calls, "CALL_TOKENS", cost)
    rank_plan.cache_clear()
    tensors = drawn(HEADS, key_heads, LENGTH, head_dim, dtype)
    plan = plan_exchange(PATTERNS[name], Shards.balanced(LENGTH, ranks), key_heads)
    Budget(PATTERNS[name], tensors).check(plan, tensors)
    rank_plan.cache_clear()


@pytest.mark.parametrize("length", [1403, 8192])
@pytest.mark.parametrize(
    ("dtype", "head_dim"), [(HALF, 64), (BRAIN, 64), (BRAIN, 128), (BRAIN, 96)]
)
def test_joined_outputs_are_rounded_once(dtype: torch.dtype, head_dim: int, length: int) -> None:
    """They are those of float32 outputs, rounded, by the kernels of short and of long bands. When
    each part was rounded before they were joined, one number in seven was another."""
    query, key, value, _ = drawn(2, 2, length, head_dim, dtype)
    middle = length // 2
    found = []
    for given in (dtype, torch.float32):
        out = torch.empty_like(query, dtype=given)
        lse = torch.empty(query.shape[:3], device="cuda")
        # Where the first part sees no key, the remainder may hold anything.
        remainder = torch.full_like(out, torch.nan) if given == dtype else None
        for start, stop in ((middle, length), (0, middle)):
            part = Part((start, length + start, 0, 0) * 2, 0, head_dim**-0.5, None)
            keys = key[:, :, start:stop], value[:, :, start:stop]
            results = PartResults(out, lse, remainder)
            triton.attend_part(query, *keys, results, part, merge=start == 0)
        found.append(out)
    assert found[0].isfinite().all()
    assert (found[0] != found[1].to(dtype)).float().mean() < 0.004


@pytest.mark.parametrize("key_heads", [8, 2])
@pytest.mark.parametrize("head_dim", [128, 64])
def test_documents_of_shards_are_as_exact_as_alone(
    head_dim: int, key_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents that start inside a range and before it; those inside run as a packed row does."""
    looked_for = []
    if torch.cuda.get_device_capability()[0] == 9:
        kernels = hopper.kernels()
        stock = kernels.find_documents

        def find(call: Any) -> Any:
            looked_for.append(call.queries)
            return stock(call)

        monkeypatch.setattr(kernels, "find_documents", find)
    tensors = drawn(HEADS, key_heads, 2048, head_dim)
    pattern = BandPattern.shared_local(HEADS, 2048, widths="geometric", first=20, local=90)
    starts = (0, 300, 611, 1000, 1400, 1750)
    rows = torch.tensor(starts, dtype=torch.int32, device="cuda")
    places = torch.arange(2048, device="cuda")
    first = rows[torch.searchsorted(rows, places, right=True) - 1][None]
    budget = Budget(pattern, tensors, key_start=first)
    for shards in (Shards.balanced(2048, 2), Shards.contiguous(2048, 2)):
        looked_for.clear()
        plan = plan_exchange(pattern, shards, key_heads, documents=[starts])
        budget.check(plan, tensors)
        if torch.cuda.get_device_capability()[0] == 9:
            # Forward and backward of the calls on whole documents, in each pass of all ranks.
            whole = [call for rank in (0, 1) for call in rank_plan(plan, rank).local]
            lengths = [call.queries[1] - call.queries[0] for call in whole if call.starts]
            multiples = [length for length in lengths if length % 64 == 0]
            assert multiples
            assert sorted(looked_for) == sorted(2 * in_turns.PASSES * multiples)
