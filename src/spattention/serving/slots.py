"""Attention over a pool of slots, one per token, for engines that number the slots of each request
in a table.

Token p of the request in row r of `req_to_token` is in slot `req_to_token[r, p]`; keys and values
are `[slots, Hkv, D]`. Where a page holds several tokens, those of one page lie side by side, from a
multiple of the page size on. Slots that no band and no prefix reaches may hold anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from ..attention import band_attention_varlen
from ..bands import BandPattern
from .head_classes import kv_reaches
from .paged import Decodes, PagedPrefills, Prefills, page_kernels, prefills_of
from .paged_decode import paged_attention


@dataclass(frozen=True)
class NewTokens:
    """Requests with any number of new tokens each, whose keys are in the pool already.

    Attributes:
        slots: int32 `[requests, columns]`, the slots of each request's tokens.
        computed: per request its tokens before the new ones.
        new: per request its new tokens.
        page_size: tokens of a page.
    """

    slots: Tensor
    computed: Sequence[int]
    new: Sequence[int]
    page_size: int = 1
    _found: dict[tuple[int, int], Prefills | None] = field(init=False, default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return sum(self.new)

    @cached_property
    def in_pages(self) -> PagedPrefills:
        """The requests for kernels that read pages, made once for all layers."""
        lengths = [computed + new for computed, new in zip(self.computed, self.new)]
        offsets = [0, *accumulate(self.new)]
        starts, seq_lens = (
            torch.tensor(each, dtype=torch.int32, device=self.slots.device)
            for each in (offsets, lengths)
        )
        pages = self.slots[:, :: self.page_size]
        if self.page_size > 1:
            pages = pages // self.page_size
        return PagedPrefills(0, offsets[-1], starts, pages.contiguous(), seq_lens, max(lengths))

    def keys(self, pattern: BandPattern) -> Prefills | None:
        """The keys that the heads of `pattern` read, found once for all layers alike.

        `blocks` of the result are slots.
        """
        reach, prefix = max(kv_reaches(pattern, 1)), pattern.prefix
        if (reach, prefix) not in self._found:
            offsets = [0, *accumulate(self.new)]
            lengths = [computed + new for computed, new in zip(self.computed, self.new)]
            found = prefills_of(offsets, lengths, self.slots, 1, reach, prefix)
            self._found[reach, prefix] = found
        return self._found[reach, prefix]


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
    call. No gradient. Kernels read the pool in place where the rule of `page_kernels` has them.

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
    out = query.new_zeros(*query.shape[:2], value.shape[-1])
    count = tokens.num_tokens
    if not count:
        return out
    new_tokens, longest = count // len(tokens.new), max(map(sum, zip(tokens.computed, tokens.new)))
    kernels = page_kernels(query, value, tokens.page_size, new_tokens)
    if kernels and not kernels.prefers_copies(pattern, new_tokens, longest):
        requests = tokens.in_pages
        kernels.attend_paged_documents(
            query[:count],
            _by_pages(key, tokens.page_size),
            _by_pages(value, tokens.page_size),
            requests.cu_seqlens_q,
            requests.block_table,
            requests.seq_lens,
            requests.max_seqlen_k,
            pattern,
            scale=scale,
            sinks=sinks,
            out=out[:count],
        )
        return out
    keys = tokens.keys(pattern)
    if keys is not None:
        with torch.no_grad():
            result = band_attention_varlen(
                query[:count],
                key[keys.blocks],
                value[keys.blocks],
                pattern,
                keys.cu_seqlens_q,
                keys.cu_seqlens_k,
                keys.max_seqlen_q,
                keys.max_seqlen_k,
                scale=scale,
                sinks=sinks,
            )
        assert isinstance(result, Tensor)  # no log-sum-exp was asked for
        out[:count] = result
    return out


def fill_pages(
    decodes: Decodes, page_size: int, req_to_token: Tensor, rows: Tensor, seq_lens: Tensor
) -> None:
    """Write the pages and lengths of the requests in `rows` into `decodes`, in place.

    It has no more columns than the table has pages. Nothing here waits for the device, so that a
    CUDA graph can capture it.
    """
    table = decodes.block_table
    first_slots = req_to_token[:, ::page_size][:, : table.shape[1]]
    torch.index_select(first_slots, 0, rows, out=table)
    if page_size > 1:
        table.div_(page_size, rounding_mode="floor")
    decodes.seq_lens.copy_(seq_lens)


def attend_newest_token(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decodes: Decodes,
    page_size: int,
    pattern: BandPattern,
    *,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of the newest token of each request: `[B, H, Dv]` for `query [B, H, D]`.

    `decodes` are those of `fill_pages`; other arguments those of `attend_new_tokens`.
    """
    result = paged_attention(
        query[:, :, None],
        _by_pages(key, page_size),
        _by_pages(value, page_size),
        decodes.block_table,
        decodes.seq_lens,
        pattern,
        scale=scale,
        sinks=sinks,
    )
    assert isinstance(result, Tensor)
    return result[:, :, 0]


def _by_pages(pool: Tensor, page_size: int) -> Tensor:
    """`[slots, Hkv, D]` as `[pages, page_size, Hkv, D]`, without slots that fill no page."""
    return pool[: pool.shape[0] // page_size * page_size].unflatten(0, (-1, page_size))
