"""One step of an engine over a paged key/value cache, for one class of heads in one layer.

The cache is `[blocks, Hkv, block_size, 2 * D]`, strided at will: the key of a token, then its
value. A request's tokens are in the blocks that its row of the block table names, in order. Rows
may name any block where the engine has freed one: no band and no prefix reaches it.

Requests with one new token are decoded by kernels that read the block table, where there are
kernels. The others are packed documents, which kernels read through the block table too. Without
kernels, or where those for contiguous keys are faster (`page_kernels`), their readable keys are
gathered, and one call of `band_attention_varlen` reads the copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from ..attention import band_attention_varlen, kernels_for
from ..bands import BandPattern


@dataclass(frozen=True)
class PagedPrefills:
    """Requests of a step as packed documents, whose keys kernels read through the block table.

    Tensors that do not start at a multiple of 16 bytes are copied, as slices of an engine's may.
    The kernels would be compiled again for them, in the middle of serving.

    Attributes:
        first, last: the rows of their new tokens in the flat query.
        cu_seqlens_q: int32 `[documents + 1]`, offsets of the documents in these rows.
        block_table: int32 `[documents, columns]`.
        seq_lens: int32 `[documents]`, tokens of each request, the new ones included.
        max_seqlen_k: at least the most of these.
        copies: the same requests for `band_attention_varlen`, for heads whose keys are faster to
            copy; None to read all in place.
    """

    first: int
    last: int
    cu_seqlens_q: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    max_seqlen_k: int
    copies: Callable[[], Prefills | None] | None = None

    def __post_init__(self) -> None:
        for name in ("cu_seqlens_q", "block_table", "seq_lens"):
            tensor: torch.Tensor = getattr(self, name)
            if tensor.data_ptr() & 15:
                object.__setattr__(self, name, tensor.clone())

    @property
    def new_tokens(self) -> int:
        """The mean of the requests."""
        return (self.last - self.first) // self.block_table.shape[0]


@dataclass(frozen=True)
class Prefills:
    """Requests of a step as packed documents, which have the keys that their queries read.

    Attributes:
        first, last: the rows of their new tokens in the flat query.
        blocks: int64 `[T_k]`, the block of each key, one document after another.
        places: int64 `[T_k]`, its place in the block.
        cu_seqlens_q: int32 `[documents + 1]`, offsets of the documents in these rows.
        cu_seqlens_k: int32 `[documents + 1]`, in the keys.
        max_seqlen_q, max_seqlen_k: the most queries and keys of a document.
    """

    first: int
    last: int
    blocks: torch.Tensor
    places: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int


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
        prefills: the requests after them; None without any.
    """

    decodes: Decodes | None
    prefills: PagedPrefills | Prefills | None


def page_kernels(
    query: torch.Tensor, value: torch.Tensor, block_size: int, new_tokens: int
) -> ModuleType | None:
    """The kernels for queries and values like these `[..., D]`, where they read blocks of the cache
    in place for requests with this many new tokens on average.
    """
    kernels = kernels_for(query, value)
    in_place = kernels is not None and kernels.reads_pages(query, block_size, new_tokens)
    return kernels if in_place else None


def leading_decodes(query_offsets: Sequence[int]) -> int:
    """How many of the first requests have exactly one new token."""
    pairs = zip(query_offsets, query_offsets[1:])
    return next((i for i, (a, b) in enumerate(pairs) if b - a != 1), len(query_offsets) - 1)


def prefills_of(
    query_offsets: Sequence[int],
    seq_lens: Sequence[int],
    block_table: torch.Tensor,
    block_size: int,
    window: int | None,
    prefix: int = 0,
) -> Prefills | None:
    """Requests of one engine step as packed documents; None if they have no new token.

    Args:
        query_offsets: `[requests + 1]`, where each request's new tokens start in the flat query.
        seq_lens: per request its tokens so far, the new ones included.
        block_table: `[requests, max_blocks]` integers.
        block_size: tokens a block.
        window: how far back a query reads, in tokens, itself included; None: to the start.
        prefix: how many of the first tokens it reads besides.
    """
    rows, queries, held, gaps = [], [], [], []
    for row, (start, stop) in enumerate(zip(query_offsets, query_offsets[1:])):
        if stop == start:
            continue
        oldest = 0 if window is None else seq_lens[row] - (stop - start) - window + 1
        rows.append(row)
        queries.append(stop - start)
        gaps.append(max(0, oldest - prefix))  # tokens between the prefix and the window
        held.append(seq_lens[row] - gaps[-1])
    if not rows:
        return None
    device, keys = block_table.device, sum(held)

    def on_device(numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, device=device)

    lengths = torch.tensor([queries, held], device=device)
    offsets = torch.nn.functional.pad(lengths.cumsum(1), (1, 0))
    documents = torch.arange(len(rows), device=device)
    documents = documents.repeat_interleave(lengths[1], output_size=keys)
    positions = torch.arange(keys, device=device) - offsets[1][documents]
    positions += on_device(gaps)[documents] * (positions >= prefix)
    cu_seqlens_q, cu_seqlens_k = offsets.int()
    return Prefills(
        first=query_offsets[0],
        last=query_offsets[-1],
        blocks=block_table[on_device(rows)[documents], positions // block_size].long(),
        places=positions % block_size,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max(queries),
        max_seqlen_k=max(held),
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
        kernels: what reads the block table; default the kernels for CUDA tensors.
    """
    prefills = step.prefills
    kernels = kernels or kernels_for(query, query)
    if step.decodes is not None:
        assert kernels is not None
        _decode(query, cache, step.decodes, pattern, out, scale, sinks, kernels)
    if isinstance(prefills, PagedPrefills):
        assert kernels is not None
        facts = pattern, prefills.new_tokens, prefills.max_seqlen_k
        if prefills.copies is None or not kernels.prefers_copies(*facts):
            _prefill_in_place(query, cache, prefills, pattern, out, scale, sinks, kernels)
            return
        prefills = prefills.copies()
    if prefills is not None:
        _prefill(query, cache, prefills, pattern, out, scale, sinks)


def gather(cache: torch.Tensor, prefills: Prefills) -> torch.Tensor:
    """Keys and values of packed documents, `[T_k, Hkv, 2 * D]`."""
    return cache.transpose(1, 2)[prefills.blocks, prefills.places]


def _prefill(
    query: torch.Tensor,
    cache: torch.Tensor,
    prefills: Prefills,
    pattern: BandPattern,
    out: torch.Tensor,
    scale: float,
    sinks: torch.Tensor | None,
) -> None:
    """Write the rows of `out` that belong to packed documents."""
    key, value = gather(cache, prefills).split(query.shape[2], dim=-1)
    rows = slice(prefills.first, prefills.last)
    result = band_attention_varlen(
        query[rows],
        key,
        value,
        pattern,
        prefills.cu_seqlens_q,
        prefills.cu_seqlens_k,
        prefills.max_seqlen_q,
        prefills.max_seqlen_k,
        scale=scale,
        sinks=sinks,
    )
    assert isinstance(result, torch.Tensor)  # no log-sum-exp was asked for
    out[rows] = result


def _prefill_in_place(
    query: torch.Tensor,
    cache: torch.Tensor,
    prefills: PagedPrefills,
    pattern: BandPattern,
    out: torch.Tensor,
    scale: float,
    sinks: torch.Tensor | None,
    kernels: ModuleType,
) -> None:
    """Write the rows of `out` that belong to packed documents, by kernels."""
    rows = slice(prefills.first, prefills.last)
    key, value = cache.transpose(1, 2).split(query.shape[2], dim=-1)
    kernels.attend_paged_documents(
        query[rows],
        key,
        value,
        prefills.cu_seqlens_q,
        prefills.block_table,
        prefills.seq_lens,
        prefills.max_seqlen_k,
        pattern,
        scale=scale,
        sinks=sinks,
        out=out[rows],
    )


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
