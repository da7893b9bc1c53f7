"""The parts of a plan: what travels between ranks, and the calls of the operator on each rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .shards import Range

Slice = tuple[int, int | None]


@dataclass(frozen=True)
class Piece:
    """Keys and values that one rank sends to another in one block.

    Attributes:
        entries: batch entries, `(start, stop)`.
        heads: key/value heads, `(start, stop)`.
        keys: positions, `(start, stop)`.
    """

    entries: Slice
    heads: Range
    keys: Range


@dataclass(frozen=True)
class Buffer:
    """Consecutive fetched keys of adjacent key/value heads, which all lack the same.

    Attributes:
        piece: all of them.
        sources: the rank that holds each part, with the part, in order of position.
    """

    piece: Piece
    sources: tuple[tuple[int, Piece], ...]


@dataclass(frozen=True)
class Placed:
    """Keys of a table: those of `piece`, from rank `source`, from index `offset` on.

    They were fetched, or are this rank's own if `source` is this rank.
    """

    source: int
    piece: Piece
    offset: int


@dataclass(frozen=True)
class Table:
    """Keys and values of adjacent heads side by side, `[entries, heads, length, D]`.

    Each head has the keys that its own bands reach, without those between: what is at an index
    has another position in every head. The bands of a call on a table are shifted accordingly. A
    head with fewer keys than another has zeros between them, which no query sees.

    Attributes:
        entries: batch entries.
        heads: key/value heads.
        length: keys of the head that has most.
        parts: the keys.
    """

    entries: Slice
    heads: Range
    length: int
    parts: tuple[Placed, ...]


@dataclass(frozen=True)
class Call:
    """One call of the operator: queries of one range against own keys, or those of a table.

    Attributes:
        entries: batch entries.
        heads: key/value heads.
        queries: positions of the queries, in a range of this rank.
        keys: positions of own keys; indices of a table's.
        intervals: `near, far, near, far` per query head: query `i` of the call sees key `j` of the
            call if `i - j` lies between them. Edges are negative where keys count from an earlier
            position.
        prefix: number of first keys that every query sees, as in a pattern.
        table: index of the table; None for own keys.
        starts: first positions of the documents among the keys; None for one document.
        is_whole: whether these are all the keys of the queries.
        first: whether no call before it has these queries and heads.
        first_keys: whether no call before it has these own keys and heads.
        joined: whether a call after it has some of these queries and heads.
    """

    entries: Slice
    heads: Range
    queries: Range
    keys: Range
    intervals: tuple[int, ...]
    prefix: int = 0
    table: int | None = None
    starts: tuple[int, ...] | None = None
    is_whole: bool = False
    first: bool = True
    first_keys: bool = True
    joined: bool = False


@dataclass(frozen=True)
class RankPlan:
    """Work of one rank.

    Attributes:
        rank: its number.
        tables: keys and values that calls on fetched keys read.
        local: calls on its own keys.
        fetched: calls on tables, one for each.
        sends: pieces per destination.
        receives: pieces per source, in the source's order.
        sums: how many parts at most the result of a query is the sum of.
        key_sums: how many parts at most the gradient of an own key is the sum of.
        fetched_once: whether each fetched key is in one table only.
        covers: whether calls on own keys that nothing precedes have every query, in the forward
            pass and in the backward pass, where they must also have every key.
        layouts: what `runs.layout` made of it, per number of batch entries.
    """

    rank: int
    tables: tuple[Table, ...]
    local: tuple[Call, ...]
    fetched: tuple[Call, ...]
    sends: tuple[tuple[Piece, ...], ...]
    receives: tuple[tuple[Piece, ...], ...]
    sums: int
    key_sums: int
    fetched_once: bool
    covers: tuple[bool, bool]
    layouts: dict[int, Any] = field(default_factory=dict, init=False, compare=False, repr=False)


def most_at_once(pieces: list[Piece]) -> int:
    """How many pieces at most hold the same key of the same head."""
    edges: dict[tuple[Slice, int], list[tuple[int, int]]] = {}
    for piece in pieces:
        for head in range(*piece.heads):
            found = edges.setdefault((piece.entries, head), [])
            found += [(piece.keys[0], 1), (piece.keys[1], -1)]
    most = 0
    for found in edges.values():
        held = 0
        for _, step in sorted(found):
            held += step
            most = max(most, held)
    return most
