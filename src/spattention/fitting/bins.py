"""Bins of distances: exact up to 64 tokens, then 8 per doubling."""

from __future__ import annotations

EXACT = 64
PER_DOUBLING = 8


def distance_edges(length: int) -> tuple[int, ...]:
    """Edges of the bins that cover `[0, length)`: bin k is `[edges[k], edges[k + 1])`.

    The edges of a shorter length are those of a longer one, cut off: only the last bin differs.
    """
    edges = list(range(min(EXACT, length)))
    step = 0
    while (edge := round(EXACT * 2 ** (step / PER_DOUBLING))) < length:
        edges.append(edge)
        step += 1
    return (*edges, length)


def causal_pairs(near: int, far: int, length: int) -> int:
    """Pairs (query, key) of `length` tokens whose distance is in `[near, far)`."""

    def at_least(distance: int) -> int:
        rows = max(0, length - distance)
        return rows * (rows + 1) // 2

    return at_least(near) - at_least(far) if near < far else 0


def prefix_pairs(prefix: int, length: int) -> int:
    """Pairs of `length` queries with the first `prefix` keys that are not after them."""
    first = min(prefix, length)
    return first * (first + 1) // 2 + (length - first) * first
