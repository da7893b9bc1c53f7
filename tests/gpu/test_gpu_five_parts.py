"""Gradients of calls on a part of the keys in five products per tile, all ranks on one GPU."""

from __future__ import annotations

import pytest
import torch

from spattention.impl.triton import call
from spattention.impl.triton.hopper import planning
from spattention.parallel import Shards, plan_exchange, rank_calls
from spattention.parallel.rank_calls import rank_plan
from tests.parallel import in_turns

from .shards import Budget, drawn
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
    tensors = drawn(HEADS, key_heads, LENGTH, head_dim)
    plan = plan_exchange(PATTERNS[name], Shards.balanced(LENGTH, ranks), key_heads)
    found = Budget(PATTERNS[name], tensors).check(plan, tensors)
    again = in_turns.results(plan, tensors, impl="triton")
    rank_plan.cache_clear()
    assert any(fused)
    assert all(torch.equal(mine, other) for mine, other in zip(found, again))
