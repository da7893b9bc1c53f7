"""Pure PyTorch, any device: blocks of queries against the slices of keys that their bands reach.

Forward is an online softmax over those slices, in base 2; backward recomputes the scores from the
saved log-sum-exp. Nothing is kept beyond inputs, output and log-sum-exp, and temporary scores stay
near `_SCORES` elements. Consecutive blocks whose slices lie alike relative to their queries run as
one batched product over a strided view of the keys.

Work is float32 (float64 for float64 input). `query_start`, `key_start` and cu_seqlens are read on
the host, so on an accelerator a tensor among them waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..bands import BandPattern, Interval
from .layout import empty_like_query, lse_dtype, without_autocast

_LOG2E = math.log2(math.e)
# Elements of score matrices: small ones are joined, to spare calls, until they fill a core's cache.
_SMALL, _SCORES = 1 << 16, 1 << 18
_BLOCK = 256  # queries of a block where a band fills up; elsewhere half of it or less
_SLICE = 2048  # longest slice of keys
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
    """Consecutive queries of some batch rows, with consecutive positions, that share the first key
    they may see."""

    rows: slice
    queries: slice
    position: int  # of the first query, counted in keys
    first_key: int


class _Slice(NamedTuple):
    """Keys `[start, stop)`, relative to the position of a block's first query, and their interval
    of distances."""

    start: int
    stop: int
    near: int
    far: int


class _Run(NamedTuple):
    """`repeats` consecutive blocks of `block` queries whose slices lie alike."""

    query: int
    position: int
    block: int
    repeats: int
    slices: tuple[_Slice, ...]


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
    biases = _Biases(query.device, dtype)
    for h, head in enumerate(_heads(intervals)):
        sink = None if sinks is None else sinks[h].to(dtype) * _LOG2E
        for segment in segments:
            q, k, v = (
                query[segment.rows, h],
                key[segment.rows, h // group],
                value[segment.rows, h // group],
            )
            for run in _runs(segment, head, q.shape[0], k.shape[1]):
                length = run.repeats * run.block
                at = slice(run.query, run.query + length)
                result, log2_sum = _attend_run(
                    _blocks(q, run).to(dtype) * (scale * _LOG2E), k, v, run, sink, biases
                )
                out[segment.rows, h, at] = result.view(q.shape[0], length, result.shape[-1])
                lse[segment.rows, h, at] = log2_sum.view(q.shape[0], length) / _LOG2E
    return out, lse


@_forward.register_fake
def _(query, key, value, *rest):  # type: ignore[no-untyped-def]
    lse = query.new_empty(query.shape[:3], dtype=lse_dtype(query))
    return empty_like_query(query, value.shape[-1]), lse


def _attend_run(
    q: Tensor, k: Tensor, v: Tensor, run: _Run, sink: Tensor | None, biases: _Biases
) -> tuple[Tensor, Tensor]:
    """Output `[n, block, Dv]` and log2 of the sum of exponentials `[n, block]`; q is scaled by
    scale * log2(e)."""
    highest = q.new_full((*q.shape[:2], 1), _LOWEST)
    total = torch.zeros_like(highest)
    if sink is not None:
        highest = highest.clamp_(min=sink)
        total = torch.exp2(sink - highest)
    weighted = q.new_zeros((*q.shape[:2], v.shape[-1]))
    for part in run.slices:
        scores = _scores(q, k, run, part, biases)
        raised = torch.maximum(highest, scores.amax(dim=-1, keepdim=True))
        shrink = torch.exp2(highest - raised)
        weights = scores.sub_(raised).exp2_()
        total = total.mul_(shrink).add_(weights.sum(dim=-1, keepdim=True))
        weighted = weighted.mul_(shrink).baddbmm_(weights, _windows(v, run, part).to(q.dtype).mT)
        highest = raised
    out = weighted.div_(total.masked_fill(total == 0, 1.0))
    return out, highest.add_(total.log2_()).squeeze(-1)


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
    biases = _Biases(query.device, dtype)
    log_sum = lse.masked_fill(lse == -torch.inf, 0.0)
    for h_key in range(key.shape[1]):
        d_k = d_key[:, h_key].to(dtype).zero_()
        d_v = d_value[:, h_key].to(dtype).zero_()
        for h in range(h_key * group, (h_key + 1) * group):
            head = _heads(intervals)[h]
            for segment in segments:
                rows = segment.rows
                q, k, v = query[rows, h], key[rows, h_key], value[rows, h_key]
                for run in _runs(segment, head, q.shape[0], k.shape[1]):
                    length = run.repeats * run.block
                    at = slice(run.query, run.query + length)
                    d_o, o = (_blocks(t[rows, h], run).to(dtype) for t in (d_out, out))
                    d_l, log_z = (_blocks(t[rows, h, :, None], run) for t in (d_lse, log_sum))
                    # d score = weight * (d weight - delta): the gradient of the log-sum-exp joins
                    # here.
                    delta = (d_o * o).sum(dim=-1, keepdim=True).sub_(d_l)
                    if sinks is not None:
                        sink_weight = torch.exp(sinks[h].to(dtype) - log_z)
                        d_sinks[h] -= (sink_weight * delta).sum(dtype=torch.float64)
                    d_q = _backward_run(
                        _blocks(q, run).to(dtype) * (scale * _LOG2E),
                        k,
                        v,
                        d_o,
                        delta,
                        log_z,
                        d_k[rows],
                        d_v[rows],
                        run,
                        biases,
                    )
                    d_query[rows, h, at] = d_q.view(q.shape[0], length, d_q.shape[-1]).mul_(scale)
        d_k.div_(_LOG2E)
        if dtype != key.dtype:
            d_key[:, h_key], d_value[:, h_key] = d_k, d_v
    return d_query, d_key, d_value, d_sinks.to(dtype)


@_backward.register_fake
def _(d_out, d_lse, query, key, value, out, lse, sinks, *rest):  # type: ignore[no-untyped-def]
    grads = (torch.empty_like(tensor) for tensor in (query, key, value))
    return (*grads, lse.new_empty(query.shape[1]))


def _backward_run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    delta: Tensor,
    log_sum: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    run: _Run,
    biases: _Biases,
) -> Tensor:
    """The unscaled gradient of the blocks' queries; adds to `d_k` and `d_v` in place. q as in
    `_attend_run`."""
    d_q = torch.zeros_like(q)
    for part in run.slices:
        weights = _scores(q, k, run, part, biases).add_(log_sum, alpha=-_LOG2E).exp2_()
        _add_product(d_v, run, part, weights, d_out)
        d_scores = torch.bmm(d_out, _windows(v, run, part).to(q.dtype))
        d_scores = d_scores.sub_(delta).mul_(weights)
        _add_product(d_k, run, part, d_scores, q)
        d_q.baddbmm_(d_scores, _windows(k, run, part).to(q.dtype).mT)
    return d_q


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


def _heads(intervals: Sequence[int]) -> list[tuple[Interval, ...]]:
    """The intervals of each head, from the flat form `BandPattern.flat`."""
    pairs = list(zip(intervals[::2], intervals[1::2]))
    return [
        tuple(pair for pair in pairs[h : h + 2] if pair[0] < pair[1])
        for h in range(0, len(pairs), 2)
    ]


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
    block = _block_size(head)
    run: _Run | None = None
    query = segment.queries.start
    while query < segment.queries.stop:
        position = segment.position + query - segment.queries.start
        # Where a band fills up, at the first keys, no two blocks lie alike: take larger ones.
        filling = any(
            position - far + 1 < segment.first_key < position + block - near for near, far in head
        )
        size = min(_BLOCK if filling else block, segment.queries.stop - query)
        slices = tuple(_slices(position, size, head, segment.first_key, keys))
        if run is not None and (size, slices) == (run.block, run.slices):
            widest = max((part.stop - part.start for part in slices), default=1)
            scores = rows * size * widest
            if scores <= _SMALL and (run.repeats + 1) * scores <= _SCORES:
                run = run._replace(repeats=run.repeats + 1)
                query += size
                continue
        if run is not None:
            yield run
        run = _Run(query, position, size, 1, slices)
        query += size
    if run is not None:
        yield run


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


def _blocks(tensor: Tensor, run: _Run) -> Tensor:
    """The run's queries, `[rows, Q, D]` to `[rows * repeats, block, D]`."""
    at = slice(run.query, run.query + run.repeats * run.block)
    return tensor[:, at].unflatten(1, (run.repeats, run.block)).flatten(0, 1)


def _windows(tensor: Tensor, run: _Run, part: _Slice) -> Tensor:
    """The keys or values of each block, `[rows, K, D]` to `[rows * repeats, D, part's length]`."""
    return _window_view(tensor, run, part.start, part.stop).flatten(0, 1)


def _add_product(total: Tensor, run: _Run, part: _Slice, left: Tensor, right: Tensor) -> None:
    """Add `left.mT @ right`, `[rows * repeats, length, D]`, to the keys that it belongs to.

    Windows of neighbouring blocks overlap, so those of several blocks are added in strips of one
    block's length, which do not.
    """
    if run.repeats == 1:
        keys = slice(run.position + part.start, run.position + part.stop)
        total[:, keys].baddbmm_(left.mT, right)
        return
    windows = torch.bmm(left.mT, right).unflatten(0, (-1, run.repeats)).mT
    for start in range(part.start, part.stop, run.block):
        stop = min(start + run.block, part.stop)
        strip = _window_view(total, run, start, stop)
        strip += windows[..., start - part.start : stop - part.start]


def _window_view(tensor: Tensor, run: _Run, start: int, stop: int) -> Tensor:
    """`[rows, K, D]` to a view `[rows, repeats, D, stop - start]`, one window per block, a block
    apart."""
    reach = (run.repeats - 1) * run.block
    keys = tensor[:, run.position + start : run.position + stop + reach]
    return keys.unfold(1, stop - start, run.block)


class _Biases:
    """0 where a slice's key lies in the interval, -inf elsewhere; None for a slice that lies in it
    whole."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._made: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, block: int, part: _Slice) -> Tensor | None:
        # Distances beyond `near` are all that counts: heads with bands of one width share their
        # biases.
        nearest, farthest = 1 - part.stop - part.near, block - 1 - part.start - part.near
        width = part.far - part.near
        if nearest >= 0 and farthest < width:
            return None
        at = (nearest, farthest, width)
        if at not in self._made:
            if len(self._made) == 8:
                self._made.clear()
            # Row i is the same line of distances, one step further: cut from one vector, last row
            # first.
            line = torch.arange(farthest, nearest - 1, -1, device=self._device)
            outside = (line < 0) | (line >= width)
            bias = torch.zeros_like(line, dtype=self._dtype).masked_fill_(outside, -torch.inf)
            self._made[at] = bias.unfold(0, part.stop - part.start, 1).flip(0)
        return self._made[at]


def _scores(q: Tensor, k: Tensor, run: _Run, part: _Slice, biases: _Biases) -> Tensor:
    """Scores in base 2, `[rows * repeats, block, length]`, -inf outside the interval."""
    keys = _windows(k, run, part).to(q.dtype)
    bias = biases(run.block, part)
    return torch.bmm(q, keys) if bias is None else torch.baddbmm(bias, q, keys)
