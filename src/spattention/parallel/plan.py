"""The plan of context-parallel attention: which keys each rank lacks, and the calls that it makes.

Everything follows from the pattern, the layout of the shards and the starts of packed documents.
Ranks therefore make the plan without asking one another.

A range of queries that continues a document from before it sees keys of that document alone, so
its calls need no document starts: their keys are cut at the document's first. Queries of documents
that start inside the range see keys of the range alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from numbers import Integral

import torch

from ..bands import BandPattern, Intervals
from ..scalars import as_int
from .shards import Range, Shards, intersect, subtract, union

Slice = tuple[int, int | None]
Documents = tuple[tuple[int, ...], ...]
EVERY: Slice = (0, None)
ONE_DOCUMENT = (0,)


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
class Call:
    """One call of the operator: queries of one range against consecutive keys.

    Attributes:
        entries: batch entries.
        heads: key/value heads.
        queries: positions of the queries, in a range of this rank.
        keys: positions of the keys.
        pattern: of the query heads that read these key/value heads.
        buffer: index of the buffer that holds the keys; None if they are this rank's own.
        starts: first positions of the documents among the keys; None for one document.
        first: whether no call before it has these queries and heads.
    """

    entries: Slice
    heads: Range
    queries: Range
    keys: Range
    pattern: BandPattern
    buffer: int | None = None
    starts: tuple[int, ...] | None = None
    first: bool = True


@dataclass(frozen=True)
class RankPlan:
    """Work of one rank.

    Attributes:
        rank: its number.
        buffers: the keys and values that it fetches.
        local: calls on its own keys.
        fetched: calls on fetched keys.
        sends: pieces per destination.
        receives: pieces per source, in the source's order.
    """

    rank: int
    buffers: tuple[Buffer, ...]
    local: tuple[Call, ...]
    fetched: tuple[Call, ...]
    sends: tuple[tuple[Piece, ...], ...]
    receives: tuple[tuple[Piece, ...], ...]


@dataclass(frozen=True)
class Plan:
    """An exchange for one pattern and one layout of shards; `plan_exchange` makes it.

    Attributes:
        pattern: the bands, one entry per query head.
        shards: positions per rank.
        num_key_value_heads: key/value heads G.
        documents: starts of packed documents per batch entry; None: a document per entry.
    """

    pattern: BandPattern
    shards: Shards
    num_key_value_heads: int
    documents: Documents | None = None
    agreed: set[object] = field(default_factory=set, init=False, compare=False, repr=False)
    _starts: dict[object, torch.Tensor] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    @cached_property
    def group_size(self) -> int:
        """Query heads per key/value head."""
        return self.pattern.num_heads // self.num_key_value_heads

    @cached_property
    def reach(self) -> tuple[tuple[Range, ...], ...]:
        """Per key/value head, the distances that some query head of its group attends."""
        size = self.group_size
        return tuple(
            tuple(union([each for h in range(g * size, (g + 1) * size) for each in heads[h]]))
            for heads in (self.pattern.intervals,)
            for g in range(self.num_key_value_heads)
        )

    @cached_property
    def layouts(self) -> tuple[tuple[Slice, tuple[int, ...]], ...]:
        """Batch entries with the starts of their documents; adjacent entries alike are joined."""
        if self.documents is None:
            return ((EVERY, ONE_DOCUMENT),)
        found: list[tuple[Slice, tuple[int, ...]]] = []
        for entry, starts in enumerate(self.documents):
            if found and found[-1][1] == starts:
                found[-1] = (found[-1][0][0], entry + 1), starts
            else:
                found.append(((entry, entry + 1), starts))
        return tuple(found)

    @cached_property
    def buffers(self) -> tuple[tuple[Buffer, ...], ...]:
        """Fetched keys and values of each rank."""
        return tuple(tuple(self._buffers(rank)) for rank in range(self.shards.ranks))

    @cached_property
    def exchanges(self) -> bool:
        """True if some rank lacks anything."""
        return any(self.buffers)

    def fetched_keys(self, rank: int, entries: int = 1) -> int:
        """Number of keys that a rank fetches, counted per key/value head.

        Args:
            rank: the rank.
            entries: batch entries, where the plan holds for any number.
        """
        total = 0
        for buffer in self.buffers[rank]:
            (first, last), (g0, g1) = buffer.piece.entries, buffer.piece.heads
            start, stop = buffer.piece.keys
            count = entries if last is None else last - first
            total += count * (g1 - g0) * (stop - start)
        return total

    def for_rank(self, rank: int) -> RankPlan:
        """The work of one rank."""
        return _rank_plan(self, rank)

    def heads_of(self, heads: Range) -> tuple[int, int]:
        """Query heads of a range of key/value heads."""
        return heads[0] * self.group_size, heads[1] * self.group_size

    def offset(self, rank: int, position: int) -> int:
        """Index of a position among a rank's tokens."""
        offset = 0
        for start, stop in self.shards.ranges[rank]:
            if start <= position < stop:
                return offset + position - start
            offset += stop - start
        raise AssertionError(f"rank {rank} does not hold position {position}")

    def key_start(self, call: Call, device: torch.device) -> torch.Tensor | None:
        """int32 `[entries, queries]`: index of the first key that each query of a call may see;
        None if all keys may be seen. Made once per device."""
        if call.starts is None:
            return None
        known = self._starts.get((call, device))
        if known is None:
            first, last = call.entries
            assert last is not None
            rows = _first_tokens(call.starts, call.queries) - call.keys[0]
            known = rows.expand(last - first, -1).contiguous().to(device)
            self._starts[call, device] = known
        return known

    def key_starts(self, queries: Range, device: torch.device) -> torch.Tensor | None:
        """int32 `[B, queries]`: position of the first token of each query's document; None without
        packed documents."""
        if self.documents is None:
            return None
        rows = [_first_tokens(starts, queries) for starts in self.documents]
        return torch.stack(rows).to(device)

    def _buffers(self, rank: int) -> Iterator[Buffer]:
        for entries, starts in self.layouts:
            lacks = [tuple(self._lacks(rank, g, starts)) for g in range(self.num_key_value_heads)]
            g = 0
            while g < len(lacks):
                last = g + 1
                while last < len(lacks) and lacks[last] == lacks[g]:
                    last += 1
                for keys in lacks[g]:
                    piece = Piece(entries, (g, last), keys)
                    yield Buffer(piece, tuple(self._sources(piece)))
                g = last

    def _lacks(self, rank: int, group: int, starts: Sequence[int]) -> list[Range]:
        """Keys of a key/value head that a rank needs and does not hold."""
        needed: list[Range] = []
        for segment in self.shards.ranges[rank]:
            first, stop = continued(segment, starts)
            start = segment[0]
            for near, far in self.reach[group] if start < stop else ():
                needed.append((max(first, start - far + 1), min(start, stop - near)))
            if start < stop and self.reach[group]:
                needed.append((first, min(first + self.pattern.prefix, start)))
        return subtract(needed, self.shards.ranges[rank])

    def _sources(self, piece: Piece) -> Iterator[tuple[int, Piece]]:
        start, stop = piece.keys
        for (_, last), rank, held in self._holders[self._holder_of(start) :]:
            found = intersect(held, (start, stop))
            if found is None:
                break
            yield rank, Piece(piece.entries, piece.heads, found)
            if last >= stop:
                break

    @cached_property
    def _holders(self) -> list[tuple[Range, int, Range]]:
        ranges = self.shards.ranges
        return sorted((each, rank, each) for rank, held in enumerate(ranges) for each in held)

    def _holder_of(self, position: int) -> int:
        return bisect_right([start for (start, _), _, _ in self._holders], position) - 1


def plan_exchange(
    pattern: BandPattern,
    shards: Shards,
    num_key_value_heads: int,
    *,
    documents: Sequence[Sequence[int]] | None = None,
) -> Plan:
    """Plan context-parallel attention. No rank asks another: equal arguments give equal plans.

    Args:
        pattern: the bands, one entry per query head.
        shards: positions per rank.
        num_key_value_heads: key/value heads G, which divide the pattern's heads.
        documents: per batch entry, the positions at which its packed documents start, from 0 on.
            None: one document per entry, and any number of entries.

    Raises:
        ValueError: if an argument breaks a rule above.
    """
    if not isinstance(pattern, BandPattern):
        raise ValueError(f"`pattern` must be a BandPattern, got {type(pattern).__name__}")
    if not isinstance(shards, Shards):
        raise ValueError(f"`shards` must be Shards, got {type(shards).__name__}")
    groups = as_int(num_key_value_heads)
    if groups is None or groups < 1 or pattern.num_heads % groups:
        raise ValueError(
            f"`num_key_value_heads` must divide the pattern's {pattern.num_heads} heads, got "
            f"{num_key_value_heads!r}"
        )
    return _plan(pattern, shards, groups, _documents(documents, shards.length))


@lru_cache(maxsize=64)
def _plan(pattern: BandPattern, shards: Shards, groups: int, documents: Documents | None) -> Plan:
    return Plan(pattern, shards, groups, documents)


def _documents(documents: Sequence[Sequence[int]] | None, length: int) -> Documents | None:
    if documents is None:
        return None
    rows = documents if isinstance(documents, Sequence) else ()
    if not rows or any(isinstance(row, str) or not isinstance(row, Sequence) for row in rows):
        raise ValueError(
            "`documents` must hold the starts of each batch entry, as in [[0, 5], [0]], got "
            f"{documents!r}"
        )
    if not all(isinstance(each, Integral) for starts in rows for each in starts):
        raise ValueError(f"`documents` must hold ints, got {documents!r}")
    found = tuple(tuple(int(each) for each in starts) for starts in rows)
    for entry, starts in enumerate(found):
        rising = all(a < b for a, b in zip(starts, starts[1:]))
        if not starts or starts[0] != 0 or not rising or (length and starts[-1] >= length):
            raise ValueError(
                f"`documents` must hold rising starts from 0 to below {length}, got {starts} for "
                f"batch entry {entry}"
            )
    return None if all(starts == ONE_DOCUMENT for starts in found) else found


def continued(segment: Range, starts: Sequence[int]) -> Range:
    """First position of the document that is at the start of a range of queries, and the position
    after the last query of it; the start of the range if no document continues there."""
    start, stop = segment
    index = bisect_right(starts, start)
    first = starts[index - 1]
    if first == start:
        return start, start
    return first, min(stop, starts[index]) if index < len(starts) else stop


def _first_tokens(starts: Sequence[int], queries: Range) -> torch.Tensor:
    """int32 `[queries]`: position of the first token of each query's document."""
    first = torch.tensor(tuple(starts), dtype=torch.int32)
    return first[torch.searchsorted(first, torch.arange(*queries), right=True) - 1]


@lru_cache(maxsize=64)
def _rank_plan(plan: Plan, rank: int) -> RankPlan:
    ranks = range(plan.shards.ranks)

    def between(source: int, destination: int) -> tuple[Piece, ...]:
        pieces = (each for buffer in plan.buffers[destination] for each in buffer.sources)
        return tuple(piece for holder, piece in pieces if holder == source)

    local: list[Call] = []
    fetched: list[Call] = []
    for entries, starts in plan.layouts:
        for segment in plan.shards.ranges[rank]:
            own: list[Call] = []
            others: list[Call] = []
            for call in _calls(plan, rank, entries, starts, segment):
                (own if call.buffer is None else others).append(call)
            calls = _mark_first([*own, *others])
            local += calls[: len(own)]
            fetched += calls[len(own) :]
    return RankPlan(
        rank,
        plan.buffers[rank],
        tuple(local),
        tuple(fetched),
        tuple(between(rank, other) for other in ranks),
        tuple(between(other, rank) for other in ranks),
    )


def _calls(
    plan: Plan, rank: int, entries: Slice, starts: Sequence[int], segment: Range
) -> Iterator[Call]:
    """Calls of one range of queries, each of which sees disjoint keys."""
    everyone = (0, plan.num_key_value_heads)
    start, end = segment
    first, stop = continued(segment, starts)
    if start < stop:
        queries = start, stop
        for keys in reversed(plan.shards.ranges[rank]):  # the queries' own range first
            own = intersect(keys, (first, stop))
            if own is not None:
                yield from _against(plan, entries, queries, first, everyone, own, None)
        for index, buffer in enumerate(plan.buffers[rank]):
            piece = buffer.piece
            if piece.entries == entries and piece.keys[1] <= start:
                held = intersect(piece.keys, (first, stop))
                if held is not None:
                    yield from _against(plan, entries, queries, first, piece.heads, held, index)
    if stop < end:
        inside = tuple(each for each in starts if stop < each < end)
        fresh = (stop, *inside) if inside else None
        yield Call(entries, everyone, (stop, end), (stop, end), plan.pattern, None, fresh)


def _mark_first(calls: Sequence[Call]) -> list[Call]:
    """The calls, in which `first` tells those whose queries and heads none before them has."""
    found: list[Call] = []
    for call in calls:
        shared = any(
            intersect(call.queries, other.queries) and intersect(call.heads, other.heads)
            for other in found
        )
        found.append(replace(call, first=not shared))
    return found


def _against(
    plan: Plan,
    entries: Slice,
    queries: Range,
    first: int,
    heads: Range,
    keys: Range,
    buffer: int | None,
) -> Iterator[Call]:
    """Calls of queries of one document, whose first token is at `first`, against keys of it: those
    in the bands, and those of the prefix."""
    early = first + plan.pattern.prefix
    found = _in_bands(plan, queries, heads, (max(keys[0], early), keys[1]))
    if found is not None:
        heads_here, rows, seen = found
        yield Call(entries, heads_here, rows, seen, _without_prefix(plan, heads_here), buffer)
    seen_first = intersect(keys, (first, early))
    rows = max(queries[0], keys[0]), queries[1]
    if seen_first is not None and rows[0] < rows[1] and any(plan.reach[slice(*heads)]):
        yield Call(entries, heads, rows, seen_first, _everything(plan, heads), buffer)


def _in_bands(
    plan: Plan, queries: Range, heads: Range, keys: Range
) -> tuple[Range, Range, Range] | None:
    """The smallest range each of key/value heads, queries and keys that has all pairs in bands."""
    found: list[tuple[int, Range, Range]] = []
    for group in range(*heads):
        for near, far in plan.reach[group]:
            seen = max(keys[0], queries[0] - far + 1), min(keys[1], queries[1] - near)
            if seen[0] < seen[1]:
                rows = max(queries[0], seen[0] + near), min(queries[1], seen[1] - 1 + far)
                found.append((group, rows, seen))
    if not found:
        return None
    groups, rows_of, seen_of = zip(*found)
    return (min(groups), max(groups) + 1), _hull(rows_of), _hull(seen_of)


def _hull(ranges: Sequence[Range]) -> Range:
    starts, stops = zip(*ranges)
    return min(starts), max(stops)


def _without_prefix(plan: Plan, heads: Range) -> BandPattern:
    return _pattern(plan.pattern.intervals[slice(*plan.heads_of(heads))], plan.pattern.span)


def _everything(plan: Plan, heads: Range) -> BandPattern:
    """All keys, for heads with any band."""
    span = max(plan.pattern.span, plan.shards.length)
    chosen = plan.pattern.intervals[slice(*plan.heads_of(heads))]
    return _pattern(tuple(((0, span),) if head else () for head in chosen), span)


@lru_cache(maxsize=1024)
def _pattern(intervals: Intervals, span: int) -> BandPattern:
    return BandPattern(intervals, span)
