# mypy: allow-untyped-defs
"""Sizes that the Hopper kernels take, and the prologue that they share. `Form`, `Heads` and
`RowStats` are those of the portable kernels.
"""

import math
from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .. import scheduler, tiles, varlen
from . import memory

# Offsets of documents that a program reads at a time.
OFFSETS = gl.constexpr(512)


class ForwardCounts(NamedTuple):
    """Sizes of a forward pass, as `arguments.Counts` of the portable kernels.

    `order` is a `TileOrder`, `n_query_blocks` the number of blocks of one head.
    """

    n_heads: Any
    group: Any
    n_batch: Any
    n_query_blocks: Any
    n_queries: Any
    n_keys: Any
    order: Any


class BackwardCounts(NamedTuple):
    """Sizes of a backward pass: those of a forward pass, and of the work of dK/dV.

    `pitch` is the number of rows of `lse_log2` and `delta` per head. The first `key_programs`
    programs compute dK and dV.
    """

    n_heads: Any
    group: Any
    n_batch: Any
    n_query_blocks: Any
    n_queries: Any
    n_keys: Any
    order: Any
    pitch: Any
    n_key_blocks: Any
    key_programs: Any


class BackwardStats(NamedTuple):
    """`RowStats`, and the parts of dK and dV of a prefix that `prefix.py` adds, or None."""

    lse: Any
    d_lse: Any
    lse_log2: Any
    delta: Any
    part: Any


class QueryTile(NamedTuple):
    """A block of queries of one head, in the sequence that it belongs to.

    `first_query` and `n_queries` are indices in the sequence, `first` and `last` positions, and
    `keys` the `BlockRange` of its keys. The sequence's queries and `n_keys` keys start at
    `offset_q` and `offset_k` of the batch entry; in a paged cache, `offset_k` is a row of the block
    table.
    """

    batch: Any
    bands: Any
    first_query: Any
    first: Any
    last: Any
    keys: Any
    offset_q: Any
    n_queries: Any
    offset_k: Any
    n_keys: Any


@gluon.constexpr_function
def is_bounded(form):
    """True if a batch entry holds tokens of other sequences, or padding: they may hold anything,
    NaN included, and must not reach a product.
    """
    return form.PACKED or form.HAS_KEY_START


@gluon.constexpr_function
def box_tokens(form):
    """Tokens of a block of keys that TMA copies at once: all, or those of a page, or a part that
    divides both.
    """
    return math.gcd(form.PAGE, form.BLOCK_N)


@gluon.constexpr_function
def leaves_no_block(form):
    """True if no blocks of queries are known to be without keys. With a prefix none are, and those
    that see nothing else come last; the blocks of documents have no order.
    """
    return form.PREFIX > 0 or form.PACKED


@gluon.constexpr_function
def whole_in_every_warp(length, warps):
    """A layout of a vector of which every warp holds all elements: its sum needs no barrier."""
    registers = [[1 << bit] for bit in range(5, length.bit_length() - 1)]
    lanes = [[1 << bit] for bit in range(5)]
    repeated = [[0]] * (warps.bit_length() - 1)
    return gl.DistributedLinearLayout(registers, lanes, repeated, [], [length])


@gluon.jit
def document_at(p_cu_seqlens, slot, n_documents, n_tokens, BLOCK: gl.constexpr):
    """`varlen.document_at`, by counting the documents that start up to a slot: loads that do not
    wait for one another. Where offsets decrease, which they must not, the block may be one that the
    document does not have.
    """
    LAYOUT: gl.constexpr = whole_in_every_warp(OFFSETS, gl.num_warps())
    document = slot * 0
    for done in range(0, n_documents, OFFSETS):
        o_document = done + 1 + gl.arange(0, OFFSETS, LAYOUT)
        o_offset = gl.load(
            p_cu_seqlens + o_document, mask=o_document <= n_documents, other=n_tokens
        )
        o_first = gl.minimum(gl.maximum(o_offset, 0), n_tokens) // BLOCK + o_document
        m_before = (o_first <= slot) & (o_document <= n_documents)
        document += gl.sum(m_before.to(gl.int32), 0)
    offset = varlen.offset_at(p_cu_seqlens, document, n_documents, n_tokens)
    block = slot - (offset // BLOCK + document)
    return document, gl.where(block < 0, n_tokens // BLOCK + 1, block)


@gluon.jit
def sequence_at(
    positions,
    counts,
    n_slots,
    slot,
    batch,
    BLOCK: gl.constexpr,
    OF_KEYS: gl.constexpr,
    FORM: gl.constexpr,
):
    """The `varlen.Sequence` of a slot, with its block of keys if `OF_KEYS`, else of queries.

    Under `key_start` `[B]` the sequence's keys start there, and earlier queries have negative
    positions.
    """
    if FORM.PACKED:
        n_tokens = counts.n_keys if OF_KEYS else counts.n_queries
        n_documents = n_slots - n_tokens // BLOCK - 1  # `varlen.num_slots`
        p_offsets_q = positions.cu_seqlens_q + batch * (n_documents + 1)
        p_offsets_k = p_offsets_q
        if FORM.PAGE == 0:
            p_offsets_k = positions.cu_seqlens_k + batch * (n_documents + 1)
        p_offsets = p_offsets_k if OF_KEYS else p_offsets_q
        document, block = document_at(p_offsets, slot, n_documents, n_tokens, BLOCK)
        if FORM.PAGE > 0:
            sequence = varlen.paged_sequence(positions, counts, n_documents, document, block)
        else:
            sequence = varlen.document_sequence(
                p_offsets_q, p_offsets_k, counts, n_documents, document, block, OF_KEYS
            )
    elif FORM.HAS_KEY_START:
        start = gl.load(positions.key_start + batch)
        start = min(max(start, 0), counts.n_keys)
        sequence = varlen.Sequence(slot, 0, counts.n_queries, start, counts.n_keys - start, -start)
    else:
        sequence = varlen.Sequence(slot, 0, counts.n_queries, 0, counts.n_keys, 0)
    return sequence


@gluon.jit
def shift_of_keys(sequence, BLOCK: gl.constexpr):
    """Tokens, 0 to 3, by which the blocks of keys of a packed document start before multiples of
    BLOCK.

    Blocks of queries start at multiples of four in memory (`tiles.query_blocks`). With this shift
    the queries that see a block of keys do too, as far as their bands allow it. Else some blocks of
    keys would need one more block of queries.
    """
    shift = (sequence.offset_q - sequence.start) & 3
    # Then the document's slots are enough.
    return shift * (shift <= sequence.offset_k % BLOCK)


@gluon.jit
def query_tile(
    batch,
    bands,
    slot,
    positions,
    counts,
    BLOCK_M: gl.constexpr,
    FORM: gl.constexpr,
):
    """The `QueryTile` of a slot with BLOCK_M queries; it has none if `first_query >= n_queries`."""
    sequence = sequence_at(
        positions, counts, counts.n_query_blocks, slot, batch, BLOCK_M, False, FORM
    )
    first_query = sequence.block * BLOCK_M
    first = sequence.start + first_query
    last = sequence.start + min(first_query + BLOCK_M, sequence.n_queries) - 1
    keys = tiles.key_blocks(
        bands, first, last, 0, sequence.n_keys, FORM.BLOCK_N, FORM.INTERVALS, FORM.PREFIX
    )
    if FORM.PAGE > 0:
        keys = tiles.aligned(keys, FORM.BLOCK_N, box_tokens(FORM), FORM.INTERVALS)
    if is_bounded(FORM):
        keys = tiles.from_zero(keys)
    return QueryTile(
        batch,
        bands,
        first_query,
        first,
        last,
        keys,
        sequence.offset_q,
        sequence.n_queries,
        sequence.offset_k,
        sequence.n_keys,
    )


@gluon.jit
def seen_keys(tile, key_block, FORM: gl.constexpr):
    """Keys of a block that the queries of a tile, or earlier ones of their sequence, may see:
    `[low, high)`. The others may hold anything, NaN included, or belong to later queries alone.
    """
    # From position 0 on, some query sees every key before the end.
    low = key_block.limit * (tile.first > tile.first_query)
    high = tile.last + 1 - key_block.near
    if FORM.PREFIX > 0:
        high = gl.where(key_block.far == tiles.IN_PREFIX, min(FORM.PREFIX, tile.last + 1), high)
    return low, min(tile.n_keys, high)


@gluon.jit
def zero_unseen(tile, key_block, s_tokens, FORM: gl.constexpr):
    """Zero the first tokens of a block of keys or values in shared memory, `s_tokens`, where they
    are not among `seen_keys`.
    """
    low, high = seen_keys(tile, key_block, FORM)
    if (key_block.start < low) | (key_block.start + s_tokens.shape[0] > high):
        memory.zero_outside(s_tokens, key_block.start, low, high)


@gluon.jit
def visible(o_query, o_key, near, far, PREFIX: gl.constexpr):
    """Mask of a tile; `o_query` and `o_key` broadcast against each other."""
    o_last, o_count = tiles.visible_keys(o_query, near, far, 0, PREFIX)
    return tiles.visible(o_last, o_key, 0, o_count)


@gluon.jit
def query_block(rank, bands, n_blocks, BLOCK, FORM: gl.constexpr):
    """`scheduler.query_block` of a head."""
    near = bands.near_0
    if leaves_no_block(FORM):
        near = 0
    return scheduler.query_block(rank, near, n_blocks, BLOCK)
