"""Gradients of calls on a part of the keys in five products per tile, all ranks on one GPU."""

from __future__ import annotations

import pytest
import torch

from spattention.impl.triton import call
from spattention.impl.triton.hopper import planning
from spattention.parallel import Shards, plan_exchange, rank_calls
from spattention.parallel.rank_calls import rank_plan
from spattention.testing import Case, check_error, exact, noise, plain
from tests.parallel import in_turns

from .test_gpu_parallel import HEADS, LENGTH, PATTERNS

NAMES = ("geometric", "exclusive", "dense")


@pytest.mark.parametrize("key_heads", [8, 2])
@pytest.mark.parametrize(("ranks", "cost"), [(2, 1 << 16), (3, 0)])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", NAMES)
def test_parts_in_five_products_are_exact(
    name: str, head_dim: int, ranks: int, cost: int, key_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Own ranges and tables, whose edges are negative, within the budget of one call over all keys;
    and the same bits every time.
    """
    fused = []

    def use(each: call.Call) -> bool:
        can = planning.can_fuse(each)
        fused.append(can and not each.has_all_keys)
        return can

    monkeypatch.setattr(planning, "use_fused", use)
    monkeypatch.setattr(call, "_calls", type(call._calls)(max_entries=4096, copies=False))
    monkeypatch.setattr(rank_calls, "CALL_TOKENS", cost)
    rank_plan.cache_clear()
    generator = torch.Generator("cuda").manual_seed(0)
    drawn = [
        torch.randn(1, heads, LENGTH, head_dim, generator=generator, device="cuda").bfloat16()
        for heads in (HEADS, key_heads, key_heads, HEADS)
    ]
    case = Case(*drawn[:3], PATTERNS[name], {})
    grads = drawn[3], torch.zeros(1, HEADS, LENGTH, device="cuda")
    truth, rough, deviations = exact(case, grads), plain(case, grads), noise(case, grads)
    plan = plan_exchange(PATTERNS[name], Shards.balanced(LENGTH, ranks), key_heads)
    found = in_turns.results(plan, drawn, impl="triton")
    again = in_turns.results(plan, drawn, impl="triton")
    rank_plan.cache_clear()
    assert any(fused)
    for label, mine, other in zip(("out", "d_query", "d_key", "d_value"), found, again):
        check_error(label, mine, rough[label], truth[label], deviations[label])
        assert torch.equal(mine, other)
