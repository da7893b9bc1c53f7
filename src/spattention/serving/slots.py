"""Attention over a pool of slots, one per token, for engines that number the slots of each request
in a table.

Token p of the request in row r of `req_to_token` is in slot `req_to_token[r, p]`; keys and values
are `[slots, Hkv, D]`. Where a page holds several tokens, those of one page lie side by side, from a
multiple of the page size on. Slots that no band and no prefix reaches may hold anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..attention import band_attention_varlen
from ..bands import BandPattern
from .head_classes import kv_reaches
from .paged_decode import paged_attention


@dataclass(frozen=True)
class Pages:
    """The newest tokens of a step of decoding, one per request.

    Attributes:
        block_table: int32 `[B, columns]`, the pages of each request.
        seq_lens: int32 `[B]`, tokens of each request, the new one included.
        page_size: tokens of a page.
    """

    block_table: Tensor
    seq_lens: Tensor
    page_size: int


@dataclass(frozen=True)
class Keys:
    """The keys that the new tokens of a step read, request after request, in the form of
    `band_attention_varlen`: of each request its prefix, then what the bands reach.

    Attributes:
        slots: int64 `[T_k]`.
        cu_seqlens_k: int32 `[requests + 1]`.
        max_seqlen_k: keys of the longest request.
    """

    slots: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_k: int


@dataclass(frozen=True)
class NewTokens:
    """Requests with any number of new tokens each, whose keys are in the pool already.

    Attributes:
        req_to_token: int32 `[rows, columns]`, the table of slots.
        rows: integers `[requests]`, the row of each request.
        computed: per request its tokens before the new ones.
        new: per request its new tokens.
    """

    req_to_token: Tensor
    rows: Tensor
    computed: Sequence[int]
    new: Sequence[int]
    cu_seqlens_q: Tensor = field(init=False)
    _keys: dict[tuple[int, int], Keys] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        offsets = _offsets(self.new, self.req_to_token.device)
        object.__setattr__(self, "cu_seqlens_q", offsets)

    @property
    def num_tokens(self) -> int:
        return sum(self.new)

    def keys(self, pattern: BandPattern) -> Keys:
        """The keys that the heads of `pattern` read, found once for all layers alike."""
        reach, prefix = max(kv_reaches(pattern, 1)), pattern.prefix
        if (reach, prefix) not in self._keys:
            self._keys[reach, prefix] = self._find_keys(reach, prefix)
        return self._keys[reach, prefix]

    def _find_keys(self, reach: int, prefix: int) -> Keys:
        device = self.req_to_token.device
        parts, counts = [], []
        for computed, new in zip(self.computed, self.new):
            if not new:
                counts.append(0)
                continue
            stop, start = computed + new, max(computed - reach + 1, 0)
            # Where the bands start inside of the prefix, all is read from the start.
            first = prefix if start > prefix else 0
            start = start if start > prefix else 0
            parts += [torch.arange(first), torch.arange(start, stop)]
            counts.append(first + stop - start)
        position = torch.cat(parts).to(device)
        request = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(device)
        slots = self.req_to_token[self.rows.long()[request], position].long()
        return Keys(slots, _offsets(counts, device), max(counts))


def _offsets(counts: Sequence[int], device: torch.device) -> Tensor:
    """Offsets of the parts, from 0 to the end of the last one."""
    ends = torch.tensor([0, *counts]).cumsum(0)
    return ends.to(device=device, dtype=torch.int32)


def attend_new_tokens(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens: NewTokens,
    pattern: BandPattern,
    *,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of all new tokens of a step, equal to `band_attention` over each request, in one
    call. No gradient.

    Args:
        query: `[T, H, D]`, request after request; rows after the last request's only pad.
        key: `[slots, Hkv, D]`.
        value: `[slots, Hkv, Dv]`.
        tokens: the requests.
        pattern: the bands of the H heads.
        scale: factor of the scores.
        sinks: `[H]`, as in `band_attention`.

    Returns:
        `[T, H, Dv]`, 0 in rows that only pad.
    """
    count = tokens.num_tokens
    out = query.new_zeros(*query.shape[:2], value.shape[-1])
    if count:
        keys = tokens.keys(pattern)
        with torch.no_grad():
            result = band_attention_varlen(
                query[:count],
                key[keys.slots],
                value[keys.slots],
                pattern,
                tokens.cu_seqlens_q,
                keys.cu_seqlens_k,
                max(tokens.new),
                keys.max_seqlen_k,
                scale=scale,
                sinks=sinks,
            )
        assert isinstance(result, Tensor)  # no log-sum-exp was asked for
        out[:count] = result
    return out


def fill_pages(pages: Pages, req_to_token: Tensor, rows: Tensor, seq_lens: Tensor) -> None:
    """Write the pages and lengths of the requests in `rows` into `pages`, in place.

    It has no more columns than the table. Nothing here waits for the device, so that a CUDA graph
    can capture it.
    """
    table, page_size = pages.block_table, pages.page_size
    first_slots = req_to_token[:, ::page_size][:, : table.shape[1]]
    torch.index_select(first_slots, 0, rows, out=table)
    if page_size > 1:
        table.div_(page_size, rounding_mode="floor")
    pages.seq_lens.copy_(seq_lens)


def attend_newest_token(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: Pages,
    pattern: BandPattern,
    *,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of the newest token of each request: `[B, H, Dv]` for `query [B, H, D]`.

    Arguments are those of `attend_new_tokens`.
    """
    result = paged_attention(
        query[:, :, None],
        _by_pages(key, pages.page_size),
        _by_pages(value, pages.page_size),
        pages.block_table,
        pages.seq_lens,
        pattern,
        scale=scale,
        sinks=sinks,
    )
    assert isinstance(result, Tensor)
    return result[:, :, 0]


def _by_pages(pool: Tensor, page_size: int) -> Tensor:
    """`[slots, Hkv, D]` as `[pages, page_size, Hkv, D]`, without slots that fill no page."""
    return pool[: pool.shape[0] // page_size * page_size].unflatten(0, (-1, page_size))
