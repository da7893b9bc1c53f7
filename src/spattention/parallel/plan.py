"""The plan of context-parallel attention: which keys each rank lacks, and who holds them.

Everything follows from the pattern, the layout of the shards and the starts of packed documents.
Ranks therefore make the plan without asking one another. `rank_calls.py` has the calls that follow.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from numbers import Integral

import torch

from ..bands import BandPattern, Intervals
from ..scalars import as_int, shown_number
from .pieces import Buffer, Call, Piece, Slice
from .shards import Range, Shards, intersect, subtract, union

Documents = tuple[tuple[int, ...], ...]
EVERY: Slice = (0, None)
ONE_DOCUMENT = (0,)


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

    def fetched_keys(self, rank: int) -> int:
        """Number of keys that a rank fetches, counted per key/value head, and for one batch entry
        where the plan holds for any number.
        """
        total = 0
        for buffer in self.buffers[rank]:
            (first, last), (g0, g1) = buffer.piece.entries, buffer.piece.heads
            start, stop = buffer.piece.keys
            count = 1 if last is None else last - first
            total += count * (g1 - g0) * (stop - start)
        return total

    def heads_of(self, heads: Range) -> tuple[int, int]:
        """Query heads of a range of key/value heads."""
        return heads[0] * self.group_size, heads[1] * self.group_size

    def bands_of(self, heads: Range) -> Intervals:
        """Intervals of the query heads of a range of key/value heads."""
        return self.pattern.intervals[slice(*self.heads_of(heads))]

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
            found = intersect(held, piece.keys)
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
            f"{shown_number(num_key_value_heads)}"
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
