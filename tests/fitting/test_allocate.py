"""Allocation against every choice there is, for few bins."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spattention.fitting.allocate import allocate, best_at_price


def random_values(units, bins, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(units, bins, generator=generator, dtype=torch.float64) ** 3


def runs(bins):
    return sum(now and not before for before, now in zip((False, *bins), bins))


def every_choice(bins, forced):
    for choice in product((False, True), repeat=bins):
        if all(choice[:forced]) and runs(choice) <= 2:
            yield choice


@given(st.integers(1, 7), st.integers(1, 3), st.integers(0, 10**6), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_the_best_two_runs_are_found(bins, forced, seed, price):
    forced = min(forced, bins)
    gains = random_values(3, bins, seed) - price
    leading = torch.arange(bins) < forced
    found = best_at_price(gains, leading)
    for unit in range(3):
        best = max(
            sum(g for g, chosen in zip(gains[unit].tolist(), choice) if chosen)
            for choice in every_choice(bins, forced)
        )
        assert found[unit, :forced].all()
        assert runs(found[unit].tolist()) <= 2
        assert float(gains[unit][found[unit]].sum()) == pytest.approx(best, abs=1e-12)


@given(st.integers(2, 5), st.integers(0, 10**6), st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_no_choice_of_equal_pairs_is_better(bins, seed, share):
    """The allocation is optimal for the pairs that it takes, up to the last step of one unit."""
    values = random_values(2, bins, seed)
    costs = torch.arange(bins, 0, -1) * 10
    leading = torch.arange(bins) < 1
    budget = 2 * int(costs[0]) + int(share * 2 * costs[1:].sum())
    found = allocate(values, costs, leading, budget)
    assert int((found * costs).sum()) <= budget
    best = max(
        sum(
            float(values[unit, k])
            for unit, choice in enumerate(pair)
            for k in range(bins)
            if choice[k]
        )
        for pair in product(every_choice(bins, 1), repeat=2)
        if sum(int(costs[k]) for choice in pair for k in range(bins) if choice[k]) <= budget
    )
    got = float((values * found).sum())
    step = float(values[:, 1:].sum(dim=1).max())
    assert best - step - 1e-9 <= got <= best + 1e-9


@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 10**6))
@settings(max_examples=8, deadline=None)
def test_more_budget_never_captures_less(units, bins, seed):
    values = random_values(units, bins, seed)
    values[0] = values[-1]  # equals change one by one
    costs = torch.arange(bins, 0, -1)
    leading = torch.arange(bins) < 1
    before = -1.0
    for budget in range(units * bins, units * int(costs.sum()) + 2, 5):
        found = allocate(values, costs, leading, budget)
        assert int((found * costs).sum()) <= budget
        assert all(runs(row) <= 2 and row[0] for row in found.tolist())
        now = float((values * found).sum())
        assert now >= before - 1e-12
        before = now


def test_equal_units_do_not_wait_for_each_other():
    """With even attention every pair captures equally much, so the budget is spent."""
    costs = torch.arange(16, 0, -1)
    values = costs.double().expand(8, 16) / 100
    budget = 8 * int(costs.sum()) // 2
    found = allocate(values, costs, torch.arange(16) < 1, budget)
    assert budget - 16 < int((found * costs).sum()) <= budget


def test_dense_units_attend_everything_first():
    values, costs = random_values(3, 5, 0), torch.full((5,), 4)
    leading = torch.arange(5) < 1
    dense = torch.tensor([False, True, False])
    found = allocate(values, costs, leading, 5 * 4 + 2 * 4 + 5, dense=dense)
    assert found[1].all()
    assert int(found.sum()) == 5 + 2 + 1
    with pytest.raises(ValueError, match="`budget` must be at least 28 pairs, got 27"):
        allocate(values, costs, leading, 27, dense=dense)
