"""Band attention over a paged key/value cache.

The cache is `[blocks, Hkv, block_size, 2 * D]`, strided at will: the key of a token, then its
value. A request's tokens are in the blocks that its row of the block table names, in order. Rows
may name any block where the engine has freed one: no band reaches it.

`attend` gathers the readable blocks of each request and calls `band_attention`. It is the one place
that reads the cache, so that a kernel that reads the block table itself can take its place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..attention import band_attention
from ..bands import BandPattern
from .checks import check_no_prefix


@dataclass(frozen=True)
class RequestBatch:
    """Requests with the same number of new tokens, which attend in one call.

    Attributes:
        tokens: int64 `[R * Q]`, their rows in the flat query; request after request.
        blocks: int64 `[R, M]`, the blocks that hold readable keys, in order of position.
        query_start: int32 `[R]`, the place of each request's first query among the gathered keys.
    """

    tokens: torch.Tensor
    blocks: torch.Tensor
    query_start: torch.Tensor


def request_batches(
    query_offsets: Sequence[int],
    seq_lens: Sequence[int],
    block_table: torch.Tensor,
    block_size: int,
    window: int | None,
) -> list[RequestBatch]:
    """The requests of one engine step, grouped by their number of new tokens.

    Args:
        query_offsets: `[requests + 1]`, where each request's new tokens start in the flat query.
        seq_lens: per request its tokens so far, the new ones included.
        block_table: `[requests, max_blocks]` integers.
        block_size: tokens a block.
        window: how far back a query reads, in tokens, itself included; None: to the start.
    """
    by_queries: dict[int, list[int]] = defaultdict(list)
    for request, (start, stop) in enumerate(zip(query_offsets, query_offsets[1:])):
        if stop > start:
            by_queries[stop - start].append(request)
    return [
        _batch(requests, queries, query_offsets, seq_lens, block_table, block_size, window)
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
) -> RequestBatch:
    device = block_table.device
    computed = [seq_lens[request] - queries for request in requests]
    oldest = [0 if window is None else max(0, length - window + 1) for length in computed]
    first = [position // block_size for position in oldest]
    last = [(seq_lens[request] - 1) // block_size for request in requests]
    width = max(end - start for start, end in zip(first, last)) + 1
    columns = torch.tensor(first)[:, None] + torch.arange(width)
    # Requests with fewer blocks than others read their last one again, after their last query.
    columns = columns.minimum(torch.tensor(last)[:, None]).to(device)
    offsets = torch.tensor([query_offsets[request] for request in requests])
    starts = [length - block * block_size for length, block in zip(computed, first)]
    return RequestBatch(
        tokens=(offsets[:, None] + torch.arange(queries)).flatten().to(device),
        blocks=block_table[torch.tensor(requests, device=device)].gather(1, columns).long(),
        query_start=torch.tensor(starts, dtype=torch.int32, device=device),
    )


def attend(
    query: torch.Tensor,
    cache: torch.Tensor,
    batches: Sequence[RequestBatch],
    pattern: BandPattern,
    out: torch.Tensor,
    *,
    scale: float,
    sinks: torch.Tensor | None = None,
) -> None:
    """Write the attention of every batch into its rows of `out`; other rows stay as they are.

    Args:
        query: `[T, H, D]`, the new tokens of all requests; their keys are in the cache already.
        cache: `[blocks, Hkv, block_size, 2 * D]`.
        batches: from `request_batches`.
        pattern: the bands of the H heads.
        out: `[T, H, D]`.
        scale: factor of the scores.
        sinks: `[H]`, as in `band_attention`.

    Raises:
        NotImplementedError: for a pattern with a prefix.
    """
    check_no_prefix(pattern)
    heads, head_dim = query.shape[1:]
    for batch in batches:
        requests, _ = batch.blocks.shape
        # [R, M, Hkv, block_size, 2 * D] to [R, Hkv, M * block_size, 2 * D]
        pages = cache[batch.blocks].transpose(1, 2).flatten(2, 3)
        key, value = pages.split(head_dim, dim=-1)
        rows = query[batch.tokens].view(requests, -1, heads, head_dim).transpose(1, 2)
        result = band_attention(
            rows,
            key,
            value,
            pattern,
            scale=scale,
            sinks=sinks,
            query_start=batch.query_start,
        )
        assert isinstance(result, torch.Tensor)  # no log-sum-exp was asked for
        out[batch.tokens] = result.transpose(1, 2).flatten(0, 1)


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
