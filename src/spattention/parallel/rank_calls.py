"""The calls of the operator that a rank makes, and the tables that those on fetched keys read.

A range of queries that continues a document from before it sees keys of that document alone, so
its calls need no document starts: their keys are cut at the document's first. Queries of documents
that start inside the range see keys of the range alone.

Keys outside the range, fetched or of another range of the rank, are one call for many heads. Each
head of its table has only the keys that its bands reach:

    head      keys before the queries, by position        in the table
    0         . . . . . . . . . . . . . . # # # #          . . . # # # #
    1         . . # # # . . . . . . . . . # # # #          # # # # # # #
    2         # # # # . . . . . . . . . . . . . .          # # # # . . .

Keys right before the queries are at the end of the table, and those at the start of the document
at its start: there the table's ends bound bands that reach further. Other bands bound themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from ..bands import Interval
from .pieces import Call, Piece, Placed, RankPlan, Slice, Table, most_at_once
from .plan import Plan, continued
from .shards import Range, intersect, union

# A call costs about as much as reading and writing this many keys of one head.
CALL_TOKENS = 65536


class Rows(NamedTuple):
    """Queries of one document in a range of a rank: `[start, stop)`. The document starts at
    `first`, and its bands reach keys from `early` on, after the prefix."""

    entries: Slice
    first: int
    early: int
    start: int
    stop: int


class Reached(NamedTuple):
    """Keys before the rows that a key/value head's bands reach, as sorted ranges apart, and the
    rows that see any of them."""

    regions: list[Range]
    rows: Range

    @property
    def length(self) -> int:
        return sum(stop - start for start, stop in self.regions)


@lru_cache(maxsize=64)
def rank_plan(plan: Plan, rank: int) -> RankPlan:
    """The work of one rank."""
    ranks = range(plan.shards.ranks)

    def between(source: int, destination: int) -> tuple[Piece, ...]:
        pieces = (each for buffer in plan.buffers[destination] for each in buffer.sources)
        return tuple(piece for holder, piece in pieces if holder == source)

    local: list[Call] = []
    fetched: list[Call] = []
    tables: list[Table] = []
    for entries, starts in plan.layouts:
        for segment in plan.shards.ranges[rank]:
            first, stop = continued(segment, starts)
            rows = Rows(entries, first, first + plan.pattern.prefix, segment[0], stop)
            local += _own_calls(plan, rows, segment[1], starts)
            for table, call in _outside(plan, rank, rows):
                fetched.append(replace(call, table=len(tables)))
                tables.append(table)
    sends = tuple(between(rank, other) for other in ranks)
    receives = tuple(between(other, rank) for other in ranks)
    calls = _mark_shared([*local, *fetched])
    local, fetched = calls[: len(local)], calls[len(local) :]
    placed = [part for table in tables for part in table.parts]
    own = [Piece(call.entries, call.heads, call.keys) for call in local]
    own += [part.piece for part in placed if part.source == rank]
    own += [piece for pieces in sends for piece in pieces]
    others = [part.piece for part in placed if part.source != rank]
    tokens = len(plan.layouts) * plan.num_key_value_heads * plan.shards.sizes[rank]

    def cover(queries: bool, calls: Sequence[Call]) -> bool:
        ranges = ((call.heads, call.queries if queries else call.keys) for call in calls)
        return sum((b - a) * (d - c) for (a, b), (c, d) in ranges) == tokens

    direct = [call for call in local if call.first and call.first_keys]
    return RankPlan(
        rank,
        tuple(tables),
        tuple(local),
        tuple(fetched),
        sends,
        receives,
        sums=most_at_once([Piece(call.entries, call.heads, call.queries) for call in calls]),
        key_sums=most_at_once(own),
        fetched_once=most_at_once(others) <= 1,
        covers=(
            cover(True, [call for call in local if call.first]),
            cover(True, direct) and cover(False, direct),
        ),
    )


def _own_calls(plan: Plan, rows: Rows, end: int, starts: Sequence[int]) -> Iterator[Call]:
    """Calls on the keys of the queries' own range, which ends at `end`."""
    everyone = (0, plan.num_key_value_heads)
    if rows.start < rows.stop:
        seen = _in_bands(plan, rows)
        if seen is not None:
            heads, queries, keys = seen
            edges = [_shifted(head, queries[0] - keys[0]) for head in plan.bands_of(heads)]
            yield Call(rows.entries, heads, queries, keys, _flat(edges))
        early = rows.start, min(rows.early, rows.stop)
        if early[0] < early[1] and any(plan.reach):
            edges = [_everything(plan, head) for head in plan.bands_of(everyone)]
            yield Call(rows.entries, everyone, (rows.start, rows.stop), early, _flat(edges))
    if rows.stop < end:
        inside = tuple(each for each in starts if rows.stop < each < end)
        yield Call(
            rows.entries,
            everyone,
            (rows.stop, end),
            (rows.stop, end),
            plan.pattern.flat,
            prefix=plan.pattern.prefix,
            starts=(rows.stop, *inside) if inside else None,
            is_whole=True,
        )


def _in_bands(plan: Plan, rows: Rows) -> tuple[Range, Range, Range] | None:
    """The smallest range each of key/value heads, queries and own keys that has all pairs in
    bands."""
    first, stop = max(rows.start, rows.early), rows.stop
    found: list[tuple[Range, Range, Range]] = []
    for group, reach in enumerate(plan.reach):
        for near, far in reach:
            seen = max(first, rows.start - far + 1), stop - near
            if seen[0] < seen[1]:
                queries = max(rows.start, seen[0] + near), min(stop, seen[1] - 1 + far)
                found.append(((group, group + 1), queries, seen))
    if not found:
        return None
    heads, queries, keys = (_hull(each) for each in zip(*found))
    return heads, queries, keys


def _outside(plan: Plan, rank: int, rows: Rows) -> Iterator[tuple[Table, Call]]:
    """Calls on keys before the queries' range, each with its table: those of the bands, and that
    of the prefix."""
    if rows.start == rows.stop:
        return
    for reached, in_prefix in (_by_bands(plan, rows), False), (_by_prefix(plan, rows), True):
        for heads in _runs(reached):
            some = {g: reached[g] for g in range(*heads) if g in reached}
            queries = _hull([each.rows for each in some.values()])
            length = max(each.length for each in some.values())
            places = {g: _places(each, length, rows.start) for g, each in some.items()}
            edges: list[tuple[Interval, ...]] = []
            for g in range(*heads):
                for head in plan.bands_of((g, g + 1)):
                    if in_prefix:
                        edges.append(_shifted(_everything(plan, head), length))
                    else:
                        edges.append(_in_table(head, rows, queries[0], places.get(g, ())))
            parts = tuple(_parts(plan, rank, rows.entries, places))
            table = Table(rows.entries, heads, length, parts)
            yield table, Call(rows.entries, heads, queries, (0, length), _flat(edges))


def _by_bands(plan: Plan, rows: Rows) -> dict[int, Reached]:
    """Per key/value head, what its bands reach before the rows' range."""
    found = {}
    for group, reach in enumerate(plan.reach):
        ranges, queries = [], []
        for near, far in reach:
            seen = _before(rows, near, far)
            if seen[0] < seen[1]:
                ranges.append(seen)
                queries.append((max(rows.start, seen[0] + near), min(rows.stop, seen[1] - 1 + far)))
        if ranges:
            found[group] = Reached(union(ranges), _hull(queries))
    return found


def _by_prefix(plan: Plan, rows: Rows) -> dict[int, Reached]:
    """Per key/value head, the prefix before the rows' range."""
    keys = rows.first, min(rows.early, rows.start)
    if keys[0] >= keys[1]:
        return {}
    seen = Reached([keys], (rows.start, rows.stop))
    return {group: seen for group, reach in enumerate(plan.reach) if reach}


def _before(rows: Rows, near: int, far: int) -> Range:
    """Keys before the rows' range that some row sees through an interval."""
    return max(rows.early, rows.start - far + 1), min(rows.start, rows.stop - near)


def _runs(reached: dict[int, Reached]) -> list[Range]:
    """Adjacent heads that share a call, so that calls and what they read in vain cost least."""
    heads = sorted(reached)
    best: list[tuple[int, list[Range]]] = [(0, [])]
    for last in range(len(heads)):
        options = []
        length, rows = 0, reached[heads[last]].rows
        for first in range(last, -1, -1):
            one = reached[heads[first]]
            length, rows = max(length, one.length), _hull([rows, one.rows])
            count = heads[last] + 1 - heads[first]
            cost = best[first][0] + CALL_TOKENS + count * (length + rows[1] - rows[0])
            options.append((cost, [*best[first][1], (heads[first], heads[last] + 1)]))
        best.append(min(options))
    return best[-1][1]


def _places(reached: Reached, length: int, before: int) -> list[tuple[Range, int]]:
    """The ranges of a head with the index of each in a table: one after another from its start on.
    One right before the queries ends with the table instead."""
    found, index = [], 0
    for start, stop in reached.regions:
        if stop == before:
            index = length - (stop - start)
        found.append(((start, stop), index))
        index += stop - start
    return found


def _in_table(
    head: Sequence[Interval], rows: Rows, query: int, places: Sequence[tuple[Range, int]]
) -> tuple[Interval, ...]:
    """Bands as distances from the first query to indices of a table."""
    found = []
    for near, far in head:
        seen = _before(rows, near, far)
        for (start, stop), index in places:
            if start <= seen[0] < seen[1] <= stop:
                shift = query - (start - index)
                found.append((near - shift, far - shift))
    return tuple(found)


def _parts(
    plan: Plan, rank: int, entries: Slice, places: dict[int, list[tuple[Range, int]]]
) -> Iterator[Placed]:
    """The pieces of a table with their places; adjacent heads that share one stay together."""
    everyone = 0, plan.num_key_value_heads
    own = [(rank, Piece(entries, everyone, keys)) for keys in plan.shards.ranges[rank]]
    fetched = [each for buffer in plan.buffers[rank] for each in buffer.sources]
    for source, piece in (*own, *fetched):
        if piece.entries != entries:
            continue
        found: list[Placed] = []
        for group in range(*piece.heads):
            for (start, stop), index in places.get(group, ()):
                keys = intersect(piece.keys, (start, stop))
                if keys is not None:
                    here = Piece(entries, (group, group + 1), keys)
                    found.append(Placed(source, here, index + keys[0] - start))
        yield from _joined(found)


def _joined(parts: Sequence[Placed]) -> list[Placed]:
    """Parts with the same keys and places in adjacent heads, made one."""
    found: list[Placed] = []
    for part in sorted(parts, key=lambda part: (part.piece.keys, part.offset, part.piece.heads)):
        last = found[-1] if found else None
        same = last is not None and last.piece.keys == part.piece.keys
        follows = last is not None and last.piece.heads[1] == part.piece.heads[0]
        if last and same and follows and last.offset == part.offset:
            heads = last.piece.heads[0], part.piece.heads[1]
            found[-1] = replace(last, piece=replace(last.piece, heads=heads))
        else:
            found.append(part)
    return found


def _everything(plan: Plan, head: Sequence[Interval]) -> tuple[Interval, ...]:
    """All keys, for a head with any band."""
    return ((0, max(plan.pattern.span, plan.shards.length)),) if head else ()


def _shifted(head: Sequence[Interval], shift: int) -> tuple[Interval, ...]:
    return tuple((near - shift, far - shift) for near, far in head)


def _flat(heads: Sequence[Sequence[Interval]]) -> tuple[int, ...]:
    """`near, far, near, far` per head; a missing interval is `0, 0`."""
    return tuple(
        edge for head in heads for near_far in (*head, (0, 0), (0, 0))[:2] for edge in near_far
    )


def _hull(ranges: Sequence[Range]) -> Range:
    starts, stops = zip(*ranges)
    return min(starts), max(stops)


def _mark_shared(calls: Sequence[Call]) -> list[Call]:
    """The calls with `first`, `first_keys` and `joined`, by the queries and keys they share."""

    def others(call: Call, some: Sequence[Call]) -> list[Call]:
        same = (other for other in some if other.entries == call.entries)
        return [other for other in same if intersect(call.heads, other.heads)]

    found = []
    for index, call in enumerate(calls):
        before, after = others(call, calls[:index]), others(call, calls[index + 1 :])
        queries = [
            any(intersect(call.queries, other.queries) for other in some)
            for some in (before, after)
        ]
        keys = any(
            intersect(call.keys, other.keys) for other in before if other.table == call.table
        )
        found.append(replace(call, first=not queries[0], first_keys=not keys, joined=queries[1]))
    return found
