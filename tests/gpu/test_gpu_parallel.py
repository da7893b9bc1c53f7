"""Attention on shards by the kernels, all ranks in turns on one GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spattention import BandPattern
from spattention.impl.triton import hopper
from spattention.parallel import Shards, plan_exchange, rank_calls
from spattention.parallel.rank_calls import rank_plan
from spattention.testing import Case, check_error, exact, noise, plain
from tests.parallel import in_turns

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
    generator = torch.Generator("cuda").manual_seed(0)
    drawn = [
        torch.randn(1, heads, LENGTH, head_dim, generator=generator, device="cuda").to(dtype)
        for heads in (HEADS, key_heads, key_heads, HEADS)
    ]
    case = Case(*drawn[:3], PATTERNS[name], {})
    grads = drawn[3], torch.zeros(1, HEADS, LENGTH, device="cuda")
    truth, rough, deviations = exact(case, grads), plain(case, grads), noise(case, grads)
    plan = plan_exchange(PATTERNS[name], Shards.balanced(LENGTH, ranks), key_heads)
    found = in_turns.results(plan, drawn, impl="triton")
    rank_plan.cache_clear()
    for label, mine in zip(("out", "d_query", "d_key", "d_value"), found):
        check_error(label, mine, rough[label], truth[label], deviations[label])


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
    generator = torch.Generator("cuda").manual_seed(0)
    drawn = [
        torch.randn(1, heads, 2048, head_dim, generator=generator, device="cuda").to(torch.bfloat16)
        for heads in (HEADS, key_heads, key_heads, HEADS)
    ]
    pattern = BandPattern.shared_local(HEADS, 2048, widths="geometric", first=20, local=90)
    starts = (0, 300, 611, 1000, 1400, 1750)
    rows = torch.tensor(starts, dtype=torch.int32, device="cuda")
    places = torch.arange(2048, device="cuda")
    first = rows[torch.searchsorted(rows, places, right=True) - 1][None]
    case = Case(*drawn[:3], pattern, {"key_start": first})
    grads = drawn[3], torch.zeros(1, HEADS, 2048, device="cuda")
    truth, rough, deviations = exact(case, grads), plain(case, grads), noise(case, grads)
    for shards in (Shards.balanced(2048, 2), Shards.contiguous(2048, 2)):
        looked_for.clear()
        plan = plan_exchange(pattern, shards, key_heads, documents=[starts])
        found = in_turns.results(plan, drawn, impl="triton")
        for label, mine in zip(("out", "d_query", "d_key", "d_value"), found):
            check_error(label, mine, rough[label], truth[label], deviations[label])
        if torch.cuda.get_device_capability()[0] == 9:
            # Forward and backward of the calls on whole documents, in each pass of all ranks.
            whole = [call for rank in (0, 1) for call in rank_plan(plan, rank).local]
            lengths = [call.queries[1] - call.queries[0] for call in whole if call.starts]
            multiples = [length for length in lengths if length % 64 == 0]
            assert multiples
            assert sorted(looked_for) == sorted(2 * in_turns.PASSES * multiples)
