"""Places of the keys of an exchange: in a rank's own tensors, in messages and in tables.

A message from one rank to another holds the keys of all its pieces one after another, head by head,
and then their values in the same order. A table has the keys of its heads in the order in which
they are in memory, with zeros in the gaps:

    message from rank 1    0 0 0 0 1 1 1 1 1 1 2 2     the digit is the head
    table, head 0          . . 0 0 0 0
    table, head 1          1 1 1 1 1 1
    table, head 2          k k . . 2 2                 k: a key of this rank
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, product
from typing import NamedTuple

from torch import Tensor

from .pieces import Piece, Placed, RankPlan, Table
from .plan import Plan


class Run(NamedTuple):
    """Consecutive keys of one head of one batch entry in a tensor `[B, G, tokens, D]`."""

    entry: int
    head: int
    first: int
    length: int

    def of(self, tensor: Tensor) -> Tensor:
        """The keys, a view `[length, D]`."""
        return tensor[self.entry, self.head].narrow(0, self.first, self.length)


class Link(NamedTuple):
    """Consecutive keys of a table, and where they come from.

    Attributes:
        source: the rank that holds them; None for zeros, which no query sees.
        there: their place in this rank's own tensors if that is `source`; else in the message from
            it, a tensor of one batch entry and one head.
        table: index of the table.
        here: their place in the table.
    """

    source: int | None
    there: Run
    table: int
    here: Run


class Layout(NamedTuple):
    """Everything that a rank sends and receives, for one number of batch entries.

    Attributes:
        sends: per destination, the runs of this rank's tensors that its message holds.
        received: per source, the number of keys in its message.
        tables: per table, its keys in the order of memory.
        is_copied: per table, False if a message holds just that.
        fetched: per source, the keys of tables in the order of its message.
    """

    sends: tuple[tuple[Run, ...], ...]
    received: tuple[int, ...]
    tables: tuple[tuple[Link, ...], ...]
    is_copied: tuple[bool, ...]
    fetched: tuple[tuple[Link, ...], ...]


def layout(plan: Plan, work: RankPlan, batch: int) -> Layout:
    """The layout of one rank's work with `batch` batch entries, made once."""
    if batch not in work.layouts:
        work.layouts[batch] = _layout(plan, work, batch)
    found: Layout = work.layouts[batch]
    return found


def _layout(plan: Plan, work: RankPlan, batch: int) -> Layout:
    rank = work.rank
    sends = tuple(
        tuple(run for piece in pieces for run in _own_runs(plan, rank, piece, batch))
        for pieces in work.sends
    )
    received = tuple(sum(_size(piece, batch) for piece in pieces) for pieces in work.receives)
    tables = []
    for index, table in enumerate(work.tables):
        links = []
        for part in table.parts:
            if part.source == rank:
                there = _own_runs(plan, rank, part.piece, batch)
            else:
                there = _message_runs(work.receives[part.source], part, batch)
            for (entry, head), run in zip(_heads(part.piece, batch), there, strict=True):
                place = entry - table.entries[0], head - table.heads[0]
                links.append(Link(part.source, run, index, Run(*place, part.offset, run.length)))
        tables.append(tuple(_without_gaps(links, index, table, batch)))
    fetched = []
    for source in range(plan.shards.ranks):
        found = [link for links in tables for link in links if link.source == source != rank]
        fetched.append(tuple(sorted(found, key=lambda link: link.there)))
    is_copied = tuple(not _is_in_message(links, rank) for links in tables)
    return Layout(sends, received, tuple(tables), is_copied, tuple(fetched))


def consecutive(runs: Sequence[Run]) -> list[Run]:
    """The same numbers of keys one after another, as in a message."""
    starts = accumulate((run.length for run in runs), initial=0)
    return [Run(0, 0, start, run.length) for start, run in zip(starts, runs)]


def _is_in_message(links: Sequence[Link], rank: int) -> bool:
    """True if all keys of a table follow one another in one message."""
    sources = {link.source for link in links}
    if len(sources) > 1 or sources & {None, rank}:
        return False
    runs = [link.there for link in links]
    starts = [runs[0].first + run.first for run in consecutive(runs)]
    return [run.first for run in runs] == starts


def _without_gaps(links: Sequence[Link], index: int, table: Table, batch: int) -> Iterator[Link]:
    """The links of a table in the order of memory, with those of zeros between them."""
    entries = len(range(batch)[slice(*table.entries)])
    for place in product(range(entries), range(table.heads[1] - table.heads[0])):
        end = 0
        for link in sorted(
            (each for each in links if each.here[:2] == place), key=lambda link: link.here
        ):
            yield from _zeros(index, place, end, link.here.first)
            yield link
            end = link.here.first + link.here.length
        yield from _zeros(index, place, end, table.length)


def _zeros(index: int, place: tuple[int, int], first: int, stop: int) -> Iterator[Link]:
    if first < stop:
        yield Link(None, Run(0, 0, 0, stop - first), index, Run(*place, first, stop - first))


def _heads(piece: Piece, batch: int) -> Iterator[tuple[int, int]]:
    """Batch entry and key/value head of each run of a piece."""
    for entry in range(batch)[slice(*piece.entries)]:
        for head in range(*piece.heads):
            yield entry, head


def _size(piece: Piece, batch: int) -> int:
    entries, heads = range(batch)[slice(*piece.entries)], range(*piece.heads)
    return len(entries) * len(heads) * (piece.keys[1] - piece.keys[0])


def _own_runs(plan: Plan, rank: int, piece: Piece, batch: int) -> Iterator[Run]:
    """The runs of a piece in the tensors of the rank that holds it."""
    start, stop = piece.keys
    for entry, head in _heads(piece, batch):
        yield Run(entry, head, plan.offset(rank, start), stop - start)


def _message_runs(pieces: tuple[Piece, ...], part: Placed, batch: int) -> Iterator[Run]:
    """The runs of a part of a table in a message of these pieces."""
    before = 0
    for piece in pieces:
        if _holds(piece, part.piece):
            break
        before += _size(piece, batch)
    else:
        raise AssertionError(f"no piece of rank {part.source} holds {part.piece}")
    length, heads = piece.keys[1] - piece.keys[0], piece.heads[1] - piece.heads[0]
    start, stop = part.piece.keys
    for entry, head in _heads(part.piece, batch):
        index = (entry - piece.entries[0]) * heads + head - piece.heads[0]
        yield Run(0, 0, before + index * length + start - piece.keys[0], stop - start)


def _holds(piece: Piece, other: Piece) -> bool:
    """True if all keys of `other` are in `piece`."""
    ranges = (piece.heads, other.heads), (piece.keys, other.keys)
    inside = all(a[0] <= b[0] and b[1] <= a[1] for a, b in ranges)
    return piece.entries == other.entries and inside
