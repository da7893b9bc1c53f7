# mypy: allow-untyped-defs
"""Starts of the sequence of a program: packed documents, positions and first keys.

Everything read from tensors is clamped, so that no value can make a kernel read or write out of
bounds. Numbers of blocks of a paged cache are not: those within reach must be blocks.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import tiles


class Sequence(NamedTuple):
    """The sequence (batch entry or document) of a program, and its block there.

    `offset_q` and `offset_k` are its first tokens in query and key. `start` is the position of its
    first query.
    """

    block: Any
    offset_q: Any
    n_queries: Any
    offset_k: Any
    n_keys: Any
    start: Any


@triton.jit
def offset_at(p_cu_seqlens, document, n_documents, n_tokens):
    """First token of a document, clamped to `[0, n_tokens]`; the end of all tokens for document
    `n_documents + 1`.
    """
    inside = document <= n_documents
    offset = tl.load(p_cu_seqlens + document, mask=inside, other=n_tokens)
    return tl.minimum(tl.maximum(offset, 0), n_tokens)


@triton.jit
def document_at(p_cu_seqlens, slot, n_documents, n_tokens, BLOCK):
    """`(document, block)` of a slot.

    Document d owns the slots from `offset_d // BLOCK + d` on. These are at least as many as its
    blocks, so that no sum over documents is needed. Tokens after the last offset count as document
    `n_documents`.
    """
    low = 0
    high = n_documents
    while low < high:
        middle = (low + high + 1) // 2
        first = offset_at(p_cu_seqlens, middle, n_documents, n_tokens) // BLOCK + middle
        if first <= slot:
            low = middle
        else:
            high = middle - 1
    first = offset_at(p_cu_seqlens, low, n_documents, n_tokens) // BLOCK + low
    return low, slot - first


def num_slots(n_tokens: int, n_documents: int, block: int) -> int:
    """Number of slots that `document_at` maps to blocks; without packing (`n_documents` 0), the
    blocks of one sequence.
    """
    return n_tokens // block + n_documents + 1 if n_documents else -(-n_tokens // block)


@triton.jit
def sequence_at(
    positions,
    counts,
    slot,
    batch,
    BLOCK: tl.constexpr,
    OF_KEYS: tl.constexpr,
    FORM: tl.constexpr,
):
    """The `Sequence` of a slot, with its block of keys if `OF_KEYS`, else of queries; empty where
    other kernels compute the batch entry.
    """
    if FORM.PACKED:
        p_offsets_q, p_offsets_k = positions.cu_seqlens_q, positions.cu_seqlens_k
        n_documents = counts.n_documents
        if OF_KEYS:
            document, block = document_at(p_offsets_k, slot, n_documents, counts.n_keys, BLOCK)
        else:
            document, block = document_at(p_offsets_q, slot, n_documents, counts.n_queries, BLOCK)
        if FORM.PAGE > 0:
            sequence = paged_sequence(positions, counts, n_documents, document, block)
        else:
            sequence = document_sequence(
                p_offsets_q, p_offsets_k, counts, n_documents, document, block, OF_KEYS
            )
    else:
        start = counts.query_start
        if FORM.START_ON_DEVICE:
            start = tl.load(positions.query_start + batch.to(tl.int64) * counts.query_start_stride)
        start = tl.minimum(tl.maximum(start, 0), tiles.MAX_POSITION)
        n_queries, n_keys = counts.n_queries, counts.n_keys
        if FORM.UNLESS_DESCRIBED:
            rest = tl.load(positions.described + batch) == 0
            n_queries, n_keys = n_queries * rest, n_keys * rest
        sequence = Sequence(slot, 0, n_queries, 0, n_keys, start)
    return sequence


@triton.jit
def document_sequence(
    p_offsets_q, p_offsets_k, counts, n_documents, document, block, OF_KEYS: tl.constexpr
):
    """The `Sequence` of a block of a packed document, of its keys if `OF_KEYS`, else of queries."""
    n_queries, n_keys = counts.n_queries, counts.n_keys
    offset_q = offset_at(p_offsets_q, document, n_documents, n_queries)
    offset_k = offset_at(p_offsets_k, document, n_documents, n_keys)
    queries = offset_at(p_offsets_q, document + 1, n_documents, n_queries) - offset_q
    keys = offset_at(p_offsets_k, document + 1, n_documents, n_keys) - offset_k
    # Tokens after the last offset belong to no document and see nothing.
    behind = document == n_documents
    if OF_KEYS:
        queries = tl.where(behind, 0, queries)
    else:
        keys = tl.where(behind, 0, keys)
    return Sequence(block, offset_q, queries, offset_k, keys, keys - queries)


@triton.jit
def paged_sequence(positions, counts, n_documents, document, block):
    """The `Sequence` of a block of queries of a document whose keys are in pages. `offset_k` is the
    document, whose row of the block table they are in.
    """
    p_offsets = positions.cu_seqlens_q
    offset_q = offset_at(p_offsets, document, n_documents, counts.n_queries)
    queries = offset_at(p_offsets, document + 1, n_documents, counts.n_queries) - offset_q
    # Tokens after the last offset belong to no document and see nothing.
    keys = tl.load(positions.seq_lens + document, mask=document < n_documents, other=0)
    keys = tl.minimum(tl.maximum(keys, 0), counts.n_keys)
    return Sequence(block, offset_q, queries, document, keys, keys - queries)


@triton.jit
def first_keys(p_key_start, o_query, n_queries, stride, n_keys):
    """First keys that queries (a block of indices, or one) may see, clamped to `[0, n_keys]`; 0
    after the last query.
    """
    o_first = tl.load(
        p_key_start + o_query.to(tl.int64) * stride, mask=o_query < n_queries, other=0
    )
    return tl.minimum(tl.maximum(o_first, 0), n_keys)


@triton.jit
def first_query_after(p_key_start, stride, n_queries, key):
    """First query whose first key is after `key`, or `n_queries`; first keys never decrease."""
    low = n_queries * 0  # a tensor, as the loop needs it
    high = n_queries
    while low < high:
        middle = (low + high) // 2
        if tl.load(p_key_start + middle.to(tl.int64) * stride) > key:
            high = middle
        else:
            low = middle + 1
    return low


@triton.jit
def first_key_after(p_key_start, stride, n_queries, key, end):
    """Lowest first key of a query after `key`, at most `end`: where the document of `key` ends.
    Always after `key`, also where first keys decrease.
    """
    query = first_query_after(p_key_start, stride, n_queries, key)
    first = tl.load(p_key_start + query.to(tl.int64) * stride, mask=query < n_queries, other=end)
    return tl.minimum(tl.maximum(first, key + 1), end)
