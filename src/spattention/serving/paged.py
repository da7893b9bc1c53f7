"""One step of an engine over a paged key/value cache, for one class of heads in one layer.

The cache is `[blocks, Hkv, block_size, 2 * D]`, strided at will: the key of a token, then its
value. A request's tokens are in the blocks that its row of the block table names, in order. Rows
may name any block where the engine has freed one: no band and no prefix reaches it.

Requests with one new token are decoded by kernels that read the block table, where there are
kernels. For all others the readable blocks are gathered, and `band_attention` reads the copies.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from ..attention import band_attention, kernels_for
from ..bands import BandPattern


@dataclass(frozen=True)
class RequestBatch:
    """Requests with the same number of new tokens, which attend in one call.

    Attributes:
        tokens: int64 `[R * Q]`, their rows in the flat query; request after request.
        first: int64 `[R, P]`, the blocks of the prefix; P is 0 without one.
        blocks: int64 `[R, M]`, the blocks that hold readable keys, in order of position.
        query_start: int32 `[R]`, the place of each request's first query among the gathered keys,
            those of the prefix before them.
        key_start: int32 `[R]`, the place of the first key: 0, or after the prefix where `blocks`
            starts with the same tokens. None without a prefix.
        prefix: tokens of the prefix.
    """

    tokens: torch.Tensor
    first: torch.Tensor
    blocks: torch.Tensor
    query_start: torch.Tensor
    key_start: torch.Tensor | None
    prefix: int


@dataclass(frozen=True)
class Decodes:
    """The first requests of a step, with one new token each, for kernels.

    Attributes:
        block_table: int32 `[R, columns]`.
        seq_lens: int32 `[R]`, tokens of each request, the new one included.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor


@dataclass(frozen=True)
class Step:
    """One step of an engine, shared by all layers of one class of heads.

    Attributes:
        decodes: the requests that kernels compute, the first of the step; None without any.
        batches: all other requests.
    """

    decodes: Decodes | None
    batches: list[RequestBatch]


def leading_decodes(query_offsets: Sequence[int]) -> int:
    """How many of the first requests have exactly one new token."""
    pairs = zip(query_offsets, query_offsets[1:])
    return next((i for i, (a, b) in enumerate(pairs) if b - a != 1), len(query_offsets) - 1)


def request_batches(
    query_offsets: Sequence[int],
    seq_lens: Sequence[int],
    block_table: torch.Tensor,
    block_size: int,
    window: int | None,
    prefix: int = 0,
) -> list[RequestBatch]:
    """The requests of one engine step, grouped by their number of new tokens.

    Args:
        query_offsets: `[requests + 1]`, where each request's new tokens start in the flat query.
        seq_lens: per request its tokens so far, the new ones included.
        block_table: `[requests, max_blocks]` integers.
        block_size: tokens a block.
        window: how far back a query reads, in tokens, itself included; None: to the start.
        prefix: how many of the first tokens it reads besides.
    """
    by_queries: dict[int, list[int]] = defaultdict(list)
    for request, (start, stop) in enumerate(zip(query_offsets, query_offsets[1:])):
        if stop > start:
            by_queries[stop - start].append(request)
    return [
        _batch(requests, queries, query_offsets, seq_lens, block_table, block_size, window, prefix)
        for queries, requests in by_queries.items()
    ]


def _batch(
    requests: list[int],
    queries: int,
    query_offsets: Sequence[int],
    seq_lens: Sequence[int],
    block_table: torch.Tensor,
    block_size: int,
    window: int | None,
    prefix: int,
) -> RequestBatch:
    device = block_table.device
    computed = [seq_lens[request] - queries for request in requests]
    oldest = [0 if window is None else max(0, length - window + 1) for length in computed]
    first = [position // block_size for position in oldest]
    # Where the window starts inside of the prefix, it is read from the start.
    first = [block if block * block_size >= prefix else 0 for block in first]
    last = [(seq_lens[request] - 1) // block_size for request in requests]
    width = max(end - start for start, end in zip(first, last)) + 1
    columns = torch.tensor(first)[:, None] + torch.arange(width)
    # Requests with fewer blocks than others read their last one again, after their last query.
    columns = columns.minimum(torch.tensor(last)[:, None]).to(device)
    offsets = torch.tensor([query_offsets[request] for request in requests])
    starts = [length - block * block_size + prefix for length, block in zip(computed, first)]
    table = block_table[torch.tensor(requests, device=device)].long()
    in_prefix = min(-(-prefix // block_size), table.shape[1])
    key_start = [0 if block else prefix for block in first]

    def int32(numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    return RequestBatch(
        tokens=(offsets[:, None] + torch.arange(queries)).flatten().to(device),
        first=table[:, :in_prefix],
        blocks=table.gather(1, columns),
        query_start=int32(starts),
        key_start=int32(key_start) if prefix else None,
        prefix=prefix,
    )


def attend(
    query: torch.Tensor,
    cache: torch.Tensor,
    step: Step,
    pattern: BandPattern,
    out: torch.Tensor,
    *,
    scale: float,
    sinks: torch.Tensor | None = None,
    kernels: ModuleType | None = None,
) -> None:
    """Write the attention of every request into its rows of `out`; other rows stay as they are.

    Args:
        query: `[T, H, D]`, the new tokens of all requests; their keys are in the cache already.
        cache: `[blocks, Hkv, block_size, 2 * D]`.
        step: its requests.
        pattern: the bands of the H heads.
        out: `[T, H, D]`.
        scale: factor of the scores.
        sinks: `[H]`, as in `band_attention`.
        kernels: what computes the decodes; default the kernels for CUDA tensors.
    """
    if step.decodes is not None:
        kernels = kernels or kernels_for(query, query)
        assert kernels is not None
        _decode(query, cache, step.decodes, pattern, out, scale, sinks, kernels)
    heads, head_dim = query.shape[1:]
    for batch in step.batches:
        requests, _ = batch.blocks.shape
        key, value = _gather(cache, batch).split(head_dim, dim=-1)
        rows = query[batch.tokens].view(requests, -1, heads, head_dim).transpose(1, 2)
        result = band_attention(
            rows,
            key,
            value,
            pattern,
            scale=scale,
            sinks=sinks,
            query_start=batch.query_start,
            key_start=batch.key_start,
        )
        assert isinstance(result, torch.Tensor)  # no log-sum-exp was asked for
        out[batch.tokens] = result.transpose(1, 2).flatten(0, 1)


def _gather(cache: torch.Tensor, batch: RequestBatch) -> torch.Tensor:
    """Keys and values `[R, Hkv, prefix + M * block_size, 2 * D]`: those of the prefix, then those
    in the bands. The first are thus the first that a query sees, whatever lies between.
    """
    # [R, M, Hkv, block_size, 2 * D] to [R, Hkv, M * block_size, 2 * D]
    pages = cache[batch.blocks].transpose(1, 2).flatten(2, 3)
    prefix = batch.prefix
    if not prefix:
        return pages
    first = cache[batch.first].transpose(1, 2).flatten(2, 3)[:, :, :prefix]
    # A row of the block table may have no room for the whole prefix: no request is so long.
    first = torch.nn.functional.pad(first, (0, 0, 0, prefix - first.shape[2]))
    return torch.cat((first, pages), dim=2)


def _decode(
    query: torch.Tensor,
    cache: torch.Tensor,
    decodes: Decodes,
    pattern: BandPattern,
    out: torch.Tensor,
    scale: float,
    sinks: torch.Tensor | None,
    kernels: ModuleType,
) -> None:
    """Write the first rows of `out` by kernels, which a CUDA graph can capture."""
    requests, heads, head_dim = decodes.seq_lens.shape[0], *query.shape[1:]
    key, value = cache.transpose(1, 2).split(head_dim, dim=-1)
    kernels.attend_paged(
        query[:requests, :, None],
        key,
        value,
        decodes.block_table,
        decodes.seq_lens,
        pattern,
        scale=scale,
        sinks=sinks,
        out=out[:requests, :, None],
        lse=query.new_empty((requests, heads, 1), dtype=torch.float32),
    )


def write(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """Store new keys and values.

    Args:
        key: `[T, Hkv, D]`.
        value: `[T, Hkv, D]`.
        cache: `[blocks, Hkv, block_size, 2 * D]`.
        slots: `[T]`, the place of each token, `block * block_size + offset`; negative for tokens
            that only pad the batch. Those go to the first slot, which engines keep unused.
    """
    block_size = cache.shape[2]
    places = slots.long().clamp(min=0)
    cache[places // block_size, :, places % block_size] = torch.cat((key, value), dim=-1)
