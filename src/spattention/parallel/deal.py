"""Key/value groups dealt to ranks, so that tensor parallelism gives every rank equal work.

Tensor parallelism cuts the heads of a layer into consecutive parts. Heads with bands of different
widths then give ranks different work. `deal` finds an order of the key/value heads, each with its
query heads, in which consecutive parts have about the same number of attended pairs. The order
changes no result: `deal_heads` applies it to the rows of the query, key and value projections and
to the columns of the output projection, and `undeal_heads` takes it back before weights are saved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..bands import BandPattern
from ..scalars import int_at_least


def deal(pattern: BandPattern, ranks: int, num_key_value_heads: int) -> tuple[int, ...]:
    """An order of the key/value heads in which consecutive parts give ranks about equal work.

    Work is counted in attended pairs over the pattern's span. The largest work of a rank is found
    by dealing heads from the most work to the least, and then by exchanging two heads for as long
    as that helps. The natural order is returned where no other is better.

    Args:
        pattern: the bands of a layer, one entry per query head.
        ranks: number of tensor-parallel ranks, which divides `num_key_value_heads`.
        num_key_value_heads: number of key/value heads G, which divides the pattern's heads; query
            head h reads key/value head `h // (H // G)`.

    Returns:
        G numbers: key/value head `order[i]` comes to place i, and rank r has the places from
        `r * G // ranks` to `(r + 1) * G // ranks`.

    Raises:
        ValueError: if an argument breaks a rule above.
    """
    work = group_work(pattern, num_key_value_heads)
    ranks = int_at_least("ranks", ranks, 1)
    if len(work) % ranks:
        raise ValueError(
            f"`ranks` must divide `num_key_value_heads` = {len(work)}, so that every rank has "
            f"whole key/value heads, got {ranks}"
        )
    size = len(work) // ranks
    natural = [list(range(first, first + size)) for first in range(0, len(work), size)]
    hands: list[list[int]] = [[] for _ in range(ranks)]
    for group in sorted(range(len(work)), key=lambda group: (-work[group], group)):
        free = [hand for hand in hands if len(hand) < size]
        min(free, key=lambda hand: sum(work[each] for each in hand)).append(group)
    _exchange(hands, work)

    def largest(parts: list[list[int]]) -> int:
        return max(sum(work[group] for group in part) for part in parts)

    if largest(natural) <= largest(hands):
        hands = natural
    return tuple(group for hand in sorted(sorted(hand) for hand in hands) for group in hand)


def group_work(pattern: BandPattern, num_key_value_heads: int) -> list[int]:
    """Attended pairs of each key/value head with its query heads, over the pattern's span."""
    if not isinstance(pattern, BandPattern):
        raise ValueError(f"`pattern` must be a BandPattern, got {type(pattern).__name__}")
    groups = int_at_least("num_key_value_heads", num_key_value_heads, 1)
    if pattern.num_heads % groups:
        raise ValueError(
            f"`num_key_value_heads` must divide the pattern's {pattern.num_heads} heads, got "
            f"{groups}"
        )
    pairs = pattern.pairs(pattern.span)
    size = pattern.num_heads // groups
    return [sum(pairs[first : first + size]) for first in range(0, len(pairs), size)]


def deal_pattern(pattern: BandPattern, order: Sequence[int]) -> BandPattern:
    """The pattern with its heads in the order that `deal` gave, without a constructor.

    Rank r of R then has `heads(r * H // R, (r + 1) * H // R)` of it.
    """
    heads = head_order(order, pattern.num_heads)
    intervals = tuple(pattern.intervals[head] for head in heads)
    return BandPattern(intervals, pattern.span, prefix=pattern.prefix)


def deal_heads(tensor: torch.Tensor, order: Sequence[int], dim: int = 0) -> torch.Tensor:
    """A copy of a weight whose heads along `dim` are in the order that `deal` gave.

    Args:
        tensor: its size along `dim` is a multiple of the key/value heads: a weight or bias of the
            query, key or value projection (dim 0), a weight of the output projection (dim 1), or
            one number per head, as sinks.
        order: from `deal`.
        dim: the dimension that consists of heads.
    """
    return tensor.index_select(dim, _rows(tensor, order, dim))


def undeal_heads(tensor: torch.Tensor, order: Sequence[int], dim: int = 0) -> torch.Tensor:
    """A copy of a weight whose heads are in their natural order again; undoes `deal_heads`."""
    return tensor.index_select(dim, _rows(tensor, order, dim).argsort())


def head_order(order: Sequence[int], num_heads: int) -> list[int]:
    """The order of the query heads that follows from an order of the key/value heads."""
    check_order(order)
    if num_heads % len(order):
        raise ValueError(
            f"`order` must have a length that divides {num_heads} heads, got {len(order)}"
        )
    size = num_heads // len(order)
    return [group * size + i for group in order for i in range(size)]


def check_order(order: Sequence[int]) -> None:
    """Check that an order names every key/value head once; raises `ValueError`."""
    if not len(order) or sorted(order) != list(range(len(order))):
        raise ValueError(
            f"`order` must name each of the {len(order)} key/value heads once, got {tuple(order)}"
        )


def _exchange(hands: list[list[int]], work: list[int]) -> None:
    """Exchange single groups between the hand of most work and another, in place, for as long as
    the larger of both falls."""
    while True:
        totals = [sum(work[group] for group in hand) for hand in hands]
        most = max(range(len(hands)), key=lambda rank: totals[rank])
        best: tuple[int, int, int, int] | None = None
        for other in range(len(hands)):
            gap = totals[most] - totals[other]
            for i, mine in enumerate(hands[most]):
                for j, theirs in enumerate(hands[other]):
                    moved = work[mine] - work[theirs]
                    if 0 < moved < gap and (best is None or abs(gap - 2 * moved) < best[0]):
                        best = abs(gap - 2 * moved), other, i, j
        if best is None:
            return
        _, other, i, j = best
        hands[most][i], hands[other][j] = hands[other][j], hands[most][i]


def _rows(tensor: torch.Tensor, order: Sequence[int], dim: int) -> torch.Tensor:
    check_order(order)
    if tensor.shape[dim] % len(order):
        raise ValueError(
            f"`tensor` must have a multiple of {len(order)} key/value heads along dimension {dim}, "
            f"got {tensor.shape[dim]}"
        )
    rows = torch.arange(tensor.shape[dim], device=tensor.device).view(len(order), -1)
    return rows[torch.tensor(list(order), device=tensor.device)].flatten()
