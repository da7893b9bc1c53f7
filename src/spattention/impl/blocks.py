"""Which queries and keys are computed together: blocks of a band, as strided views.

A band of distances is covered by blocks of consecutive queries with the keys that they reach, or by
blocks of consecutive keys with the queries that reach them. Blocks that lie alike, and heads whose
blocks do, run as one batch. Keys of the prefix have blocks of their own, and bands cover the keys
after it, so that no pair is in two. `query_start`, `key_start` and cu_seqlens are read on the host,
so on an accelerator a tensor among them waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

_ELEMENTS = 1 << 19  # of a view: blocks and heads are joined up to so many
_LONGEST = 4096  # queries or keys that a block reaches at once
_PAIRS = 1 << 20  # of a block of the prefix
_VECTOR = 16
_LARGE = 128


class Segment(NamedTuple):
    """Consecutive queries of some rows of the batch, with consecutive positions, that share the
    first key they may see."""

    rows: slice
    queries: slice
    position: int  # of the first query, counted in keys
    first_key: int


class Run(NamedTuple):
    """`repeats` blocks of `queries` by `keys`, each `step` tokens beyond the one before; in `heads`
    heads, each `query_shift` and `key_shift` tokens beyond the one before."""

    query: int  # the first one's place
    key: int
    queries: int
    keys: int
    repeats: int
    step: int
    ahead: int  # by how much the distance of the first query and key exceeds the band's nearest
    width: int  # of the band
    first: bool  # of those that have these queries; not so with `by_keys`
    head: int = 0
    heads: int = 1
    query_shift: int = 0
    key_shift: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self[2:9]

    @property
    def inside(self) -> bool:
        """All distances lie in the band."""
        return self.ahead >= self.keys - 1 and self.ahead + self.queries <= self.width

    @property
    def early(self) -> int:
        """The number of a block's first queries that lie before every key's band."""
        return min(self.queries, max(0, -self.ahead))

    @property
    def late(self) -> int:
        """The number of its last ones that lie beyond."""
        return min(self.queries, max(0, self.ahead + self.queries - self.width - self.keys + 1))

    def query_view(self, tensor: Tensor, rows: slice) -> Tensor:
        """`[B, H, Q, D]` to `[rows or heads, repeats, queries, D]`."""
        return self._view(tensor, rows, self.head, self.query, self.queries, self.query_shift)

    def key_view(self, tensor: Tensor, rows: slice, group: int) -> Tensor:
        """`[B, Hkv, K, D]` to `[rows or heads, repeats, keys, D]`."""
        head = self.head // group
        return self._view(tensor, rows, head, self.key, self.keys, self.key_shift)

    def apart(self) -> Iterator[tuple[slice, Run]]:
        """The blocks that lie in `[:, i::n]` of a batch, of which no two share a token."""
        longest = max(self.queries, self.keys)
        n = min(self.repeats, -(-longest // self.step))
        for i in range(n):
            ahead = i * self.step
            yield (
                slice(i, None, n),
                self._replace(
                    query=self.query + ahead,
                    key=self.key + ahead,
                    repeats=len(range(i, self.repeats, n)),
                    step=n * self.step,
                ),
            )

    def _view(
        self, tensor: Tensor, rows: slice, head: int, start: int, length: int, shift: int
    ) -> Tensor:
        row, across, token, one = tensor.stride()
        offset = tensor.storage_offset() + rows.start * row + head * across + start * token
        count, stride = rows.stop - rows.start, row
        if self.heads > 1:
            count, stride = self.heads, across + shift * token
        return tensor.as_strided(
            (count, self.repeats, length, tensor.shape[3]),
            (stride, self.step * token, token, one),
            offset,
        )


def segments(
    query: Tensor,
    key: Tensor,
    query_start: int,
    query_start_tensor: Tensor | None,
    key_start: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> list[Segment]:
    batch, _, queries, _ = query.shape
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        q_ends, k_ends = (
            offsets.clamp(0, tensor.shape[2]).cummax(0).values.tolist()
            for offsets, tensor in ((cu_seqlens_q, query), (cu_seqlens_k, key))
        )
        return [
            Segment(slice(0, 1), slice(q0, q1), k1 - (q1 - q0), k0)
            for q0, q1, k0, k1 in zip(q_ends, q_ends[1:], k_ends, k_ends[1:])
        ]
    if query_start_tensor is None and key_start is None:
        rows = slice(0, batch)
        return [Segment(rows, slice(0, queries), query_start, 0)] if batch else []
    starts = [query_start] * batch
    if query_start_tensor is not None:
        starts = query_start_tensor.expand(batch).tolist()
    if key_start is None:
        return [Segment(slice(b, b + 1), slice(0, queries), p, 0) for b, p in enumerate(starts)]
    first_keys = key_start.clamp(0, key.shape[2])
    first_keys = first_keys if key_start.dim() == 2 else first_keys[:, None].expand(-1, queries)
    found = []
    for b, (position, row) in enumerate(zip(starts, first_keys)):
        documents, lengths = torch.unique_consecutive(row, return_counts=True)
        at = 0
        for first_key, length in zip(documents.tolist(), lengths.tolist()):
            found.append(Segment(slice(b, b + 1), slice(at, at + length), position + at, first_key))
            at += length
    return found


def runs(
    intervals: Sequence[int],
    segment: Segment,
    query: Tensor,
    key: Tensor,
    *others: Tensor,
    prefix: int,
    by_keys: bool,
) -> tuple[Run, ...]:
    """Every pair of a query and a key in its head's bands or prefix, in exactly one run.

    A block is of few queries and all the keys that they reach; `by_keys`, of few keys and all the
    queries that reach them. Views of `others` are to be had too.
    """
    offset = segment.queries.start - segment.position
    positions = range(segment.position, segment.queries.stop - offset)
    keys = range(segment.first_key, key.shape[2])
    # Heads stand in for the rows of a batch, where there is one row and each has its own keys.
    alone = segment.rows.stop - segment.rows.start > 1 or key.shape[1] < query.shape[1]
    outer = all(t.stride(1) >= t.shape[2] * t.stride(2) for t in (query, key, *others))
    shape = query.shape[3], torch.get_num_threads(), alone, outer, by_keys
    return _runs(tuple(intervals), prefix, positions, keys, offset, *shape)


@lru_cache(maxsize=64)
def _runs(
    intervals: tuple[int, ...],
    prefix: int,
    positions: range,
    keys: range,
    offset: int,
    head_dim: int,
    threads: int,
    alone: bool,
    outer: bool,
    by_keys: bool,
) -> tuple[Run, ...]:
    alike: dict[tuple[int, ...], list[Run]] = {}
    in_prefix, beyond = keys[:prefix], keys[prefix:]
    for part in range(3):
        for head in range(len(intervals) // 4):
            edges = intervals[4 * head : 4 * head + 4]
            shape = head_dim, threads, by_keys
            if part < 2:
                near, far = edges[2 * part : 2 * part + 2]
                found = _band_runs(near, far, positions, beyond, *shape)
            elif any(edges):
                found = _prefix_runs(positions, in_prefix, *shape)
            else:
                continue
            for order, run in enumerate(found):
                first = run.first and part == 0
                run = run._replace(head=head, query=run.query + offset, first=first)
                alike.setdefault((order, *run.shape), []).append(run)
    plan: list[Run] = []
    for same in sorted(alike.values(), key=lambda same: not same[0].first):
        plan += same if alone else _joined(same, head_dim, threads, outer)
    return tuple(plan)


def _joined(alike: list[Run], head_dim: int, threads: int, outer: bool) -> Iterator[Run]:
    """Consecutive heads, each as far ahead of the one before, made one. Unless heads are the outer
    axis in memory, a shift back would be a negative stride, which PyTorch does not have."""
    run, *rest = alike
    most = _most(run, head_dim, threads)
    for other in rest:
        shifts = other.query - run.query, other.key - run.key
        n = run.heads
        follows = other.head == run.head + n and n * run.repeats < most
        follows = follows and (outer or min(shifts) >= 0)
        if n == 1 and follows:
            run = run._replace(heads=2, query_shift=shifts[0], key_shift=shifts[1])
        elif follows and shifts == (n * run.query_shift, n * run.key_shift):
            run = run._replace(heads=n + 1)
        else:
            yield run
            run = other
    yield run


def _band_runs(
    near: int, far: int, positions: range, keys: range, head_dim: int, threads: int, by_keys: bool
) -> Iterator[Run]:
    """The runs of one head's interval of distances; their `query` is a position."""
    width = far - near
    if width <= 0 or not positions or not keys:
        return
    size = _block_size(min(width, len(keys)), by_keys)
    # Products of whole vectors are faster; the tokens added are masked.
    padding = -(width + size - 1) % _VECTOR
    if by_keys:
        blocks = _blocks(keys, positions, near, far - 1 + padding, size)
    else:
        blocks = _blocks(positions, keys, 1 - far - padding, -near, size)
    for own, reached, repeats, first in blocks:
        query, key = (reached, own) if by_keys else (own, reached)
        run = Run(
            query.start,
            key.start,
            len(query),
            len(key),
            repeats,
            size,
            query.start - key.start - near,
            width,
            not by_keys and first,
        )
        most = _most(run, head_dim, threads)
        for at in range(0, repeats, most):
            yield run._replace(
                query=run.query + at * size,
                key=run.key + at * size,
                repeats=min(most, repeats - at),
            )


def _prefix_runs(
    positions: range, keys: range, head_dim: int, threads: int, by_keys: bool
) -> Iterator[Run]:
    """The runs of one head's prefix: causal among its keys, and everything after them."""
    if not keys:
        return
    last = min(max(keys.stop - 1, positions.start), positions.stop)  # sees all of the prefix
    among = range(min(max(keys.start, positions.start), last), last)
    yield from _band_runs(0, len(keys), among, keys, head_dim, threads, by_keys)
    after = range(last, positions.stop)
    for key in range(keys.start, keys.stop, _LONGEST):
        reached = min(_LONGEST, keys.stop - key)
        size = min(_LONGEST, _PAIRS // reached)
        for query in range(after.start, after.stop, size):
            queries = min(size, after.stop - query)
            ahead = query - key
            yield Run(query, key, queries, reached, 1, size, ahead, ahead + queries, False)


def _blocks(
    own: range, other: range, first: int, last: int, size: int
) -> Iterator[tuple[range, range, int, bool]]:
    """Blocks of up to `size` that cover what of `own` reaches `other`, and what they reach: from
    `first` on from their first token up to `last` on from their last. With each pair the number of
    blocks that lie so, one after another, and whether it is the first piece of what they reach."""
    start, stop = max(own.start, other.start - last), min(own.stop, other.stop - first)
    # Blocks in the middle reach nothing outside.
    inner = min(max(start, other.start - first), stop)
    outer = max(inner, min(stop, other.stop - last))
    count, left = divmod(outer - inner, size)
    if inner > start:
        inner += left
    else:
        outer -= left
    # Blocks at the ends are calls of their own: take larger ones.
    large = max(size, _LARGE)
    ragged = [range(at, min(at + large, inner)) for at in range(start, inner, large)]
    ragged += [range(at, min(at + large, stop)) for at in range(outer, stop, large)]
    blocks = [(block, 1) for block in ragged]
    if count:
        blocks.append((range(inner, inner + size), count))
    for block, repeats in blocks:
        reached = range(max(other.start, block.start + first), min(other.stop, block.stop + last))
        pieces = -(-len(reached) // _LONGEST)
        length = -(-len(reached) // (pieces * _VECTOR)) * _VECTOR
        for at in range(0, len(reached), length):
            yield block, reached[at : at + length], repeats, at == 0


def _most(run: Run, head_dim: int, threads: int) -> int:
    """How many blocks of this shape a batch may hold: as many for each thread."""
    most = _ELEMENTS // (max(run.queries, run.keys) * max(64, head_dim))
    return max(threads, most - most % threads)


def _block_size(width: int, by_keys: bool) -> int:
    """Few enough that little falls outside the band, and enough to be computed fast."""
    if by_keys:
        return min(256, max(64, width // 4))
    return 32 if width <= 256 else 64
