"""Allocation of a budget of pairs: which distances each unit attends, so that they capture most.

A unit is a head, or the heads of one key/value head, which attend the same distances: the bins up
to `local`, and from there on any bins that make at most two intervals in all. At a price per pair,
the best choice of a unit is found exactly, bin by bin, since only the last interval matters for
what may follow. The price falls until the budget is spent: that is greedy allocation by captured
attention per pair along the concave envelope of every unit, and optimal among all choices of as
many pairs.
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

STEPS = 200  # of the price at most; some twenty suffice


def allocate(
    values: Tensor, costs: Tensor, forced: Tensor, budget: int, *, dense: Tensor | None = None
) -> Tensor:
    """The bins that each unit attends, bool `[U, E]`, with costs of at most `budget` in all.

    Args:
        values: float64 `[U, E]`, what a unit gains from a bin, at least 0.
        costs: int64 `[E]`, pairs of a bin for one unit, at least 1.
        forced: bool `[E]`, leading bins that every unit attends, at least one.
        budget: pairs of all units together.
        dense: bool `[U]`, units that attend every bin whatever it captures; default none.

    Returns:
        Per unit a union of at most two runs of bins, the first of which starts at distance 0. More
        budget never captures less.

    Raises:
        ValueError: if the budget does not suffice for the forced bins and dense units.
    """
    whole = torch.zeros(len(values), dtype=torch.bool) if dense is None else dense
    chosen = whole[:, None] | forced
    spent = int((chosen * costs).sum())
    if spent > budget:
        raise ValueError(f"`budget` must be at least {spent} pairs, got {budget}")
    if not bool(whole.all()):
        left = budget - int(whole.sum()) * int(costs.sum())
        chosen[~whole] = _spend(values[~whole], costs, forced, left)
    return chosen


def _spend(values: Tensor, costs: Tensor, forced: Tensor, budget: int) -> Tensor:
    lean, rich = forced.expand_as(values).clone(), torch.ones_like(values, dtype=torch.bool)
    if int((rich * costs).sum()) <= budget:
        return rich
    for _ in range(STEPS):
        # The price at which both gain equally much: a choice that gains more lies between them.
        more = int((rich * costs).sum()) - int((lean * costs).sum())
        price = max(0.0, float((values * rich).sum() - (values * lean).sum()) / more)
        gains = values - price * costs
        found = best_at_price(gains, forced)
        gained, before = float((gains * found).sum()), float((gains * lean).sum())
        if gained <= before or torch.equal(found, lean) or torch.equal(found, rich):
            break
        if int((found * costs).sum()) <= budget:
            lean = found
        else:
            rich = found
    # Both are best at this price, so units may change one by one.
    left = budget - int((lean * costs).sum())
    for unit in range(len(lean)):
        more = int(((rich[unit].int() - lean[unit].int()) * costs).sum())
        if more > left:
            break
        if more > 0:
            lean[unit] = rich[unit]
            left -= more
    return _fill(lean, values, costs, left)


def best_at_price(gains: Tensor, forced: Tensor) -> Tensor:
    """The bins of at most two runs with the largest sum of gains, bool `[U, E]`.

    Args:
        gains: float64 `[U, E]`, value less price.
        forced: bool `[E]`, leading bins that every unit attends: the first run starts with them.
    """
    units, bins = gains.shape
    first = int(forced.sum())
    never = torch.full((units,), -torch.inf, dtype=gains.dtype)
    # Best sums of gains so far: in the first run, after it, in the second run, after it.
    in_first = gains[:, :first].sum(dim=1)
    after_first, in_second, after_second = never, never, never
    steps: list[tuple[Tensor, Tensor, Tensor]] = []
    for k in range(first, bins):
        gain = gains[:, k]
        left_first = in_first >= after_first
        opened = after_first > in_second
        left_second = in_second >= after_second
        steps.append((left_first, opened, left_second))
        in_first, after_first, in_second, after_second = (
            in_first + gain,
            torch.where(left_first, in_first, after_first),
            torch.where(opened, after_first, in_second) + gain,
            torch.where(left_second, in_second, after_second),
        )
    ends = torch.stack([after_first, in_first, after_second, in_second])
    state = ends.argmax(dim=0)  # the first of equals: fewer runs, and rather ended than open
    chosen = forced.expand_as(gains).clone()
    for k in range(bins - 1, first - 1, -1):
        left_first, opened, left_second = steps[k - first]
        chosen[:, k] = (state == 1) | (state == 3)
        before = state.clone()
        before[(state == 0) & left_first] = 1
        before[(state == 3) & opened] = 0
        before[(state == 2) & left_second] = 3
        state = before
    return chosen


def _fill(chosen: Tensor, values: Tensor, costs: Tensor, left: int) -> Tensor:
    """Lengthen runs bin by bin, the most captured per pair first, until a bin does not fit."""
    table = chosen.tolist()
    density = (values / costs).tolist()
    price = costs.tolist()
    queue = [
        (-density[unit][k], unit, k)
        for unit, row in enumerate(table)
        for k in range(len(row))
        if not row[k] and _beside(row, k)
    ]
    heapq.heapify(queue)
    while queue:
        _, unit, k = heapq.heappop(queue)
        row = table[unit]
        if row[k]:
            continue
        if price[k] > left:
            break
        row[k] = True
        left -= price[k]
        for near in (k - 1, k + 1):
            if 0 <= near < len(row) and not row[near]:
                heapq.heappush(queue, (-density[unit][near], unit, near))
    return torch.tensor(table, dtype=torch.bool)


def _beside(row: list[bool], k: int) -> bool:
    return (k > 0 and row[k - 1]) or (k + 1 < len(row) and row[k + 1])
