"""Pure PyTorch, any device: blocks of queries against the slices of keys that their bands reach.

Forward is an online softmax over those slices, in base 2; backward recomputes the scores from the
saved log-sum-exp. Nothing is kept beyond inputs, output and log-sum-exp, and temporary scores stay
near `_SCORES` elements. Blocks whose slices lie alike relative to their queries run as one batched
product over a strided view of the keys; they are taken so far apart that gradients of keys and
values can be added in place. Where heads are short, those whose bands are copies of one another,
shifted, stand in for the rows of a batch.

Work is float32 (float64 for float64 input). `query_start`, `key_start` and cu_seqlens are read on
the host, so on an accelerator a tensor among them waits for the device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..bands import BandPattern, Interval
from .layout import empty_like_query, lse_dtype, without_autocast

_LOG2E = math.log2(math.e)
_SCORES = 1 << 18  # elements of score matrices: blocks are joined, to spare calls, up to so many
_BLOCK = 256  # queries of a block where a band fills up; elsewhere half of it or less
_SLICE = 2048  # longest slice of keys
# Heads run together while a block has few scores, and all their queries, or keys, few elements.
_SMALL, _BUNDLE = 1 << 17, 1 << 20
_VECTOR = 16
_LOWEST = -1e30  # a finite stand-in for -inf as a row's maximum: -inf minus -inf would be NaN


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BandPattern,
    *,
    scale: float,
    sinks: Tensor | None,
    query_start: int | Tensor,
    key_start: Tensor | None,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor]:
    """`[B, H, Q, D]` attention; arguments and results as in `spattention.band_attention`."""
    rows = isinstance(query_start, Tensor)
    return _forward(
        query,
        key,
        value,
        sinks,
        query_start if rows else None,
        key_start,
        None,
        None,
        pattern.flat,
        0 if rows else query_start,
        scale,
    )


def attend_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BandPattern,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float,
    sinks: Tensor | None,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor]:
    """`[T, H, D]` packed documents; arguments and results as in
    `spattention.band_attention_varlen`."""
    row = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
    out, lse = _forward(*row, sinks, None, None, cu_seqlens_q, cu_seqlens_k, pattern.flat, 0, scale)
    return out.squeeze(0).transpose(0, 1), lse.squeeze(0)


class _Segment(NamedTuple):
    """Consecutive queries of some rows, with consecutive positions, that share the first key they
    may see. Rows are those of the batch, or the heads of a bundle."""

    rows: slice
    queries: slice  # in the first of these rows
    position: int  # of the first query, counted in keys
    first_key: int
    shift: int = 0  # queries that each row is ahead of the one before


class _Slice(NamedTuple):
    """Keys `[start, stop)`, relative to the position of a block's first query, and their interval
    of distances."""

    start: int
    stop: int
    near: int
    far: int


class _Run(NamedTuple):
    """`repeats` blocks of `block` queries, `step` queries apart, whose slices lie alike; in each
    row `shift` queries further on."""

    query: int
    position: int
    block: int
    repeats: int
    step: int
    shift: int
    slices: tuple[_Slice, ...]


class _Bundle(NamedTuple):
    """`size` heads from `head` on whose bands are those of the first, each `shift` distances
    beyond the one before."""

    head: int
    size: int
    shift: int
    bands: tuple[Interval, ...]

    def rows(self, tensor: Tensor, group: int = 1) -> Tensor:
        """`[B, H, N, D]` to `[B, N, D]` of the one head, or `[size, N, D]` of the one batch row;
        with `group`, of the key heads."""
        if self.size == 1:
            return tensor[:, self.head // group]
        return tensor[0, self.head : self.head + self.size]

    def sinks(self, sinks: Tensor, rows: Tensor) -> Tensor:
        """`[H]` to `[rows, 1, 1]`."""
        mine = sinks[self.head : self.head + self.size]
        return mine.expand(rows.shape[0])[:, None, None]

    def segments(self, segments: list[_Segment], queries: int) -> Iterator[_Segment]:
        """Those of the batch; or the bundle's, in which all heads see the same keys. Of each head
        the first `queries` lie `shift` before those of the next."""
        if self.size == 1:
            yield from segments
            return
        ends = {-self.shift * i for i in range(self.size)}
        ends |= {end + queries for end in ends}
        for start, stop in itertools.pairwise(sorted(ends)):
            heads = [
                i
                for i in range(self.size)
                if -self.shift * i <= start and stop <= queries - self.shift * i
            ]
            if heads:
                ahead = start + self.shift * heads[0]
                yield _Segment(
                    slice(heads[0], heads[-1] + 1),
                    slice(ahead, ahead + stop - start),
                    segments[0].position + start,
                    0,
                    self.shift,
                )


@torch.library.custom_op("spattention::blockwise", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    query_start: Tensor | None,
    key_start: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    intervals: Sequence[int],
    start: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    dtype = lse_dtype(query)
    out = empty_like_query(query, value.shape[-1])
    lse = query.new_empty(query.shape[:3], dtype=dtype)
    if cu_seqlens_q is not None:  # tokens past the last document are in no segment
        out.zero_()
        lse.fill_(-torch.inf)
    segments = _segments(query, key, query_start, key_start, cu_seqlens_q, cu_seqlens_k, start)
    group = query.shape[1] // key.shape[1]
    edges = _Edges(query.device, dtype)
    for bundle in _bundles(intervals, query, key, segments):
        if bundle.head % group == 0:
            k, v = (bundle.rows(tensor, group).to(dtype) for tensor in (key, value))
        q = bundle.rows(query).to(dtype) * (scale * _LOG2E)
        sink = None if sinks is None else bundle.sinks(sinks, q).to(dtype) * _LOG2E
        results = bundle.rows(out), bundle.rows(lse[..., None])
        for segment in bundle.segments(segments, q.shape[1]):
            rows = segment.rows
            tensors = q[rows], k[rows], v[rows], None if sink is None else sink[rows]
            for run in _runs(segment, bundle.bands, *tensors[1].shape[:2]):
                for tensor, result in zip(results, _attend_run(*tensors, run, edges)):
                    _queries(tensor[rows], run).copy_(_unflat(result, run))
    return out, lse.div_(_LOG2E)


@_forward.register_fake
def _(query, key, value, *rest):  # type: ignore[no-untyped-def]
    lse = query.new_empty(query.shape[:3], dtype=lse_dtype(query))
    return empty_like_query(query, value.shape[-1]), lse


def _attend_run(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, run: _Run, edges: _Edges
) -> tuple[Tensor, Tensor]:
    """Output `[n, block, Dv]` and log2 of the sum of exponentials `[n, block, 1]`; q is scaled by
    scale * log2(e)."""
    q = _flat(_queries(q, run))
    highest = q.new_full((*q.shape[:2], 1), _LOWEST)
    total = torch.zeros_like(highest)
    if sink is not None:
        sink = sink.repeat_interleave(run.repeats, dim=0)
        highest = highest.maximum(sink)
        total = torch.exp2(sink - highest)
    weighted: Tensor | None = None
    for part in run.slices:
        scores = _scores(q, k, run, part, edges)
        raised = scores.amax(dim=-1, keepdim=True).maximum(highest)
        weights = scores.sub_(raised).exp2_()
        shrink = highest.sub_(raised).exp2_()
        total = total.mul_(shrink).add_(weights.sum(dim=-1, keepdim=True))
        values = _flat(_keys(v, run, part))
        if weighted is None:
            weighted = torch.bmm(weights, values)
        else:
            weighted = weighted.mul_(shrink).baddbmm_(weights, values)
        highest = raised
    if weighted is None:
        weighted = q.new_zeros(*q.shape[:2], v.shape[-1])
    out = weighted.div_(total.masked_fill(total == 0, 1.0))
    return out, highest.add_(total.log2_())


@torch.library.custom_op("spattention::blockwise_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    d_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    query_start: Tensor | None,
    key_start: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    intervals: Sequence[int],
    start: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = lse.dtype
    d_query, d_key, d_value = (torch.empty_like(tensor) for tensor in (query, key, value))
    if cu_seqlens_q is not None:  # tokens past the last document are in no segment
        d_query.zero_()
    d_sinks = lse.new_zeros(query.shape[1], dtype=torch.float64)
    segments = _segments(query, key, query_start, key_start, cu_seqlens_q, cu_seqlens_k, start)
    group = query.shape[1] // key.shape[1]
    edges = _Edges(query.device, dtype)
    for bundle in _bundles(intervals, query, key, segments):
        if bundle.head % group == 0:
            k, v = (bundle.rows(tensor, group).to(dtype) for tensor in (key, value))
            d_k, d_v = (torch.zeros_like(tensor) for tensor in (k, v))
        q = bundle.rows(query).to(dtype) * (scale * _LOG2E)
        d_o = bundle.rows(d_out).to(dtype)
        log_sum = bundle.rows(lse[..., None])
        nothing = log_sum == -torch.inf
        log_sum = log_sum.masked_fill(nothing, 0.0)
        # d score = weight * (d weight - delta): the gradient of the log-sum-exp joins here.
        delta = (d_o * bundle.rows(out)).sum(dim=-1, keepdim=True)
        delta -= bundle.rows(d_lse[..., None])
        if sinks is not None:
            sink = bundle.sinks(sinks, q).to(dtype)
            sink_weight = torch.exp(sink - log_sum).masked_fill_(nothing, 0.0)
            d_sinks[bundle.head : bundle.head + bundle.size] = (
                (sink_weight * -delta).view(bundle.size, -1).sum(dim=1, dtype=torch.float64)
            )
        d_q = bundle.rows(d_query)
        for segment in bundle.segments(segments, q.shape[1]):
            rows = segment.rows
            tensors = [t[rows] for t in (q, k, v, d_o, delta, log_sum, d_k, d_v)]
            for run in _runs(segment, bundle.bands, *tensors[1].shape[:2]):
                result = _backward_run(run, edges, *tensors).mul_(scale)
                _queries(d_q[rows], run).copy_(_unflat(result, run))
        if (bundle.head + bundle.size) % group == 0:
            bundle.rows(d_key, group).copy_(d_k.div_(_LOG2E))
            bundle.rows(d_value, group).copy_(d_v)
    return d_query, d_key, d_value, d_sinks.to(dtype)


@_backward.register_fake
def _(d_out, d_lse, query, key, value, out, lse, sinks, *rest):  # type: ignore[no-untyped-def]
    grads = (torch.empty_like(tensor) for tensor in (query, key, value))
    return (*grads, lse.new_empty(query.shape[1]))


def _backward_run(
    run: _Run,
    edges: _Edges,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    delta: Tensor,
    log_sum: Tensor,
    d_k: Tensor,
    d_v: Tensor,
) -> Tensor:
    """The unscaled gradient of the blocks' queries, `[n, block, D]`; adds to `d_k` and `d_v` in
    place. q as in `_attend_run`."""
    q, d_out, delta, log_sum = (
        _flat(_queries(tensor, run)) for tensor in (q, d_out, delta, log_sum)
    )
    d_q = None
    for part in run.slices:
        weights = _scores(q, k, run, part, edges).add_(log_sum, alpha=-_LOG2E).exp2_()
        _add_product(d_v, run, part, weights, d_out)
        d_scores = torch.bmm(d_out, _flat(_keys(v, run, part)).mT).sub_(delta).mul_(weights)
        _add_product(d_k, run, part, d_scores, q)
        keys = _flat(_keys(k, run, part))
        d_q = torch.bmm(d_scores, keys) if d_q is None else d_q.baddbmm_(d_scores, keys)
    return torch.zeros_like(q) if d_q is None else d_q


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, intervals, start, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.constants = (intervals, start, scale)


def _differentiate(ctx, d_out: Tensor, d_lse: Tensor):  # type: ignore[no-untyped-def]
    query, key, value, sinks, *index, out, lse = ctx.saved_tensors
    with without_autocast(query):
        d_query, d_key, d_value, d_sinks = _backward(
            d_out, d_lse, query, key, value, out, lse, sinks, *index, *ctx.constants
        )
    return d_query, d_key, d_value, None if sinks is None else d_sinks.to(sinks.dtype), *(None,) * 7


_forward.register_autograd(_differentiate, setup_context=_save)


def _bundles(
    intervals: Sequence[int], query: Tensor, key: Tensor, segments: list[_Segment]
) -> Iterator[_Bundle]:
    """The heads in order, from the flat form `BandPattern.flat`; several where that pays."""
    pairs = list(zip(intervals[::2], intervals[1::2]))
    heads = [
        tuple(pair for pair in pairs[h : h + 2] if pair[0] < pair[1])
        for h in range(0, len(pairs), 2)
    ]
    batch, _, queries, head_dim = query.shape
    plain = [_Segment(slice(0, 1), slice(0, queries), s.position, 0) for s in segments[:1]]
    most = 1
    if batch == 1 and len(heads) == key.shape[1] and segments == plain:
        most = max(1, _BUNDLE // max(1, max(queries, key.shape[2]) * head_dim))
    h = 0
    while h < len(heads):
        shift, count = _copies(heads[h : h + most])
        yield _Bundle(h, count, shift, heads[h])
        h += count


def _copies(heads: list[tuple[Interval, ...]]) -> tuple[int, int]:
    """How far the second band lies beyond the first, and how many heads have one band each of the
    first one's width, every one as far beyond the last."""
    count = 1
    shift = heads[1][0][0] - heads[0][0][0] if len(heads) > 1 and heads[0] and heads[1] else -1
    if shift >= 0 and len(heads[0]) == 1:
        near, far = heads[0][0]
        block = _block_size(heads[0])
        few = block * (far - near + block) <= _SMALL
        while (
            few
            and count < len(heads)
            and heads[count] == ((near + count * shift, far + count * shift),)
        ):
            count += 1
    return (shift, count) if count > 1 else (0, 1)


def _segments(
    query: Tensor,
    key: Tensor,
    query_start: Tensor | None,
    key_start: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    start: int,
) -> list[_Segment]:
    batch, _, queries, _ = query.shape
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        q_ends, k_ends = (
            offsets.clamp(0, tensor.shape[2]).cummax(0).values.tolist()
            for offsets, tensor in ((cu_seqlens_q, query), (cu_seqlens_k, key))
        )
        return [
            _Segment(slice(0, 1), slice(q0, q1), k1 - (q1 - q0), k0)
            for q0, q1, k0, k1 in zip(q_ends, q_ends[1:], k_ends, k_ends[1:])
        ]
    if query_start is None and key_start is None:
        return [_Segment(slice(0, batch), slice(0, queries), start, 0)]
    starts = [start] * batch if query_start is None else query_start.expand(batch).tolist()
    if key_start is None:
        return [_Segment(slice(b, b + 1), slice(0, queries), p, 0) for b, p in enumerate(starts)]
    first_keys = key_start.clamp(0, key.shape[2])
    first_keys = first_keys if key_start.dim() == 2 else first_keys[:, None].expand(-1, queries)
    segments = []
    for b, (position, row) in enumerate(zip(starts, first_keys)):
        documents, lengths = torch.unique_consecutive(row, return_counts=True)
        at = 0
        for first_key, length in zip(documents.tolist(), lengths.tolist()):
            segments.append(
                _Segment(slice(b, b + 1), slice(at, at + length), position + at, first_key)
            )
            at += length
    return segments


def _runs(segment: _Segment, head: tuple[Interval, ...], rows: int, keys: int) -> Iterator[_Run]:
    """The segment's blocks of queries, those that lie alike joined; each query is in exactly
    one."""
    for alike, count in _groups(segment, head, keys):
        first, left = alike, count
        while left:
            repeats, step = _joined(first, left, rows)
            for i in range(step):
                ahead = i * first.block
                yield first._replace(
                    query=first.query + ahead,
                    position=first.position + ahead,
                    repeats=repeats,
                    step=step * first.block,
                )
            ahead = repeats * step * first.block
            first = first._replace(query=first.query + ahead, position=first.position + ahead)
            left -= repeats * step


def _groups(segment: _Segment, head: tuple[Interval, ...], keys: int) -> Iterator[tuple[_Run, int]]:
    """The first block and the number of consecutive ones that lie alike, for all queries."""
    block = _block_size(head)
    group: _Run | None = None
    count = 0
    query = segment.queries.start
    while query < segment.queries.stop:
        position = segment.position + query - segment.queries.start
        # Where a band fills up, at the first keys, no two blocks lie alike: take larger ones.
        filling = any(
            position - far + 1 < segment.first_key < position + block - near for near, far in head
        )
        size = min(_BLOCK if filling else block, segment.queries.stop - query)
        slices = tuple(_slices(position, size, head, segment.first_key, keys))
        if group is not None and (size, slices) == (group.block, group.slices):
            count += 1
        else:
            if group is not None:
                yield group, count
            group, count = _Run(query, position, size, 1, size, segment.shift, slices), 1
        query += size
    if group is not None:
        yield group, count


def _joined(group: _Run, count: int, rows: int) -> tuple[int, int]:
    """How many of `count` blocks run as one, and the blocks from one of them to the next.

    At least two, so that each core has a product of its own; and, where there are enough, so far
    apart that their slices do not overlap.
    """
    longest = max((part.stop - part.start for part in group.slices), default=1)
    least = 2 if rows == 1 else 1
    most = max(least, _SCORES // max(1, rows * group.block * longest))
    apart = max(least, count * group.block // max(1, longest))
    repeats = min(most, apart, count)
    if repeats > 2:
        repeats -= repeats % 2
    return repeats, count // repeats


def _block_size(head: tuple[Interval, ...]) -> int:
    """Queries per block: at most half of the narrowest interval, so that few scores fall outside
    it, and no fewer than a product is fast with."""
    narrowest = min((far - near for near, far in head), default=1)
    return min(_BLOCK // 2, max(_BLOCK // 4, 1 << (narrowest // 2).bit_length() >> 1))


def _slices(
    position: int, size: int, head: tuple[Interval, ...], first_key: int, keys: int
) -> Iterator[_Slice]:
    for near, far in head:
        start = max(first_key, position - far + 1)
        stop = min(keys, position + size - near)
        # Whole vectors make the products some 15 % faster; the keys added lie outside and are
        # masked.
        start = max(first_key, start - (start - stop) % _VECTOR)
        for at in range(start, stop, _SLICE):
            yield _Slice(at - position, min(at + _SLICE, stop) - position, near, far)


def _queries(tensor: Tensor, run: _Run) -> Tensor:
    """A view of the run's queries, `[rows, Q, D]` to `[rows, repeats, block, D]`."""
    return _strided(tensor, run, run.query, run.block, run.shift)


def _keys(tensor: Tensor, run: _Run, part: _Slice) -> Tensor:
    """A view of each block's keys, `[rows, K, D]` to `[rows, repeats, part's length, D]`."""
    return _strided(tensor, run, run.position + part.start, part.stop - part.start)


def _strided(tensor: Tensor, run: _Run, start: int, length: int, shift: int = 0) -> Tensor:
    rows, _, dim = tensor.shape
    row, token, one = tensor.stride()
    return tensor.as_strided(
        (rows, run.repeats, length, dim),
        (row + shift * token, run.step * token, token, one),
        tensor.storage_offset() + start * token,
    )


def _flat(tensor: Tensor) -> Tensor:
    """`[rows, repeats, ...]` to the batch of a product, `[rows * repeats, ...]`."""
    return tensor.flatten(0, 1)


def _unflat(tensor: Tensor, run: _Run) -> Tensor:
    return tensor.unflatten(0, (-1, run.repeats))


def _add_product(total: Tensor, run: _Run, part: _Slice, left: Tensor, right: Tensor) -> None:
    """Add `left.mT @ right`, `[rows * repeats, length, D]`, to the keys that it belongs to."""
    keys = _keys(total, run, part)
    left, right = _unflat(left.mT, run), _unflat(right, run)
    # One product for all rows, or for all blocks of a row: those that do not overlap.
    overlap = part.stop - part.start > run.step
    axis = 1 if overlap or keys.shape[0] > keys.shape[1] else 0
    for batch in zip(*(tensor.unbind(axis) for tensor in (keys, left, right))):
        batch[0].baddbmm_(*batch[1:])


class _Edges:
    """The columns of a slice in which some query's distance lies outside the interval, with a bias
    for each: 0 inside, -inf outside."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._made: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, block: int, part: _Slice) -> Iterator[tuple[slice, Tensor]]:
        length, width = part.stop - part.start, part.far - part.near
        # Distance beyond `near` of row i and column c: i - c + shift.
        shift = -part.start - part.near
        far = min(length, max(0, block + shift - width))  # columns too far for the last row
        near = max(0, min(length, shift + 1))  # from here on they are too near for the first row
        if far >= near:
            if far > 0 or near < length:
                yield slice(0, length), self._bias(block, length, shift, width)
            return
        if far > 0:
            yield slice(0, far), self._bias(block, far, shift, width)
        if near < length:
            yield slice(near, length), self._bias(block, length - near, shift - near, width)

    def _bias(self, block: int, columns: int, shift: int, width: int) -> Tensor:
        # Heads with bands of one width share their biases.
        at = (block, columns, shift, width)
        if at not in self._made:
            if len(self._made) == 8:
                self._made.clear()
            distance = torch.arange(shift, block + shift, device=self._device)[
                :, None
            ] - torch.arange(columns, device=self._device)
            outside = (distance < 0) | (distance >= width)
            bias = torch.zeros(block, columns, dtype=self._dtype, device=self._device)
            self._made[at] = bias.masked_fill_(outside, -torch.inf)
        return self._made[at]


def _scores(q: Tensor, k: Tensor, run: _Run, part: _Slice, edges: _Edges) -> Tensor:
    """Scores in base 2, `[rows * repeats, block, length]`, -inf outside the interval."""
    scores = torch.bmm(q, _flat(_keys(k, run, part)).mT)
    for columns, bias in edges(run.block, part):
        scores[:, :, columns].add_(bias)  # (`+=` would also copy the view onto itself)
    return scores
