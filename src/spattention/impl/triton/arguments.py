# mypy: allow-untyped-defs
"""Arguments of the kernels as named tuples, and the prologue that the portable kernels share.

Triton specialises each field by itself, and passes the fields to the GPU one after the other.
`Form` is one compile-time argument.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import tiles, varlen


class Form(NamedTuple):
    """Compile-time facts of a kernel; it leaves out those that it does not ask for.

    `BLOCK_D` is the power of two that head_dim is padded to. `INTERVALS` is the number of intervals
    of the fullest head, 1 or 2, `PREFIX` the number of keys of the prefix, and `CHUNK` of the
    queries that a program of `portable/prefix_gradient.py` takes. `DOCUMENTS` says that a row may
    hold several, packed or by first keys, `FALLING` that `scale < 0`, `PRECISE` that the
    softmax is computed in powers of e. `EXACT_STEPS` is the number of blocks of keys up to which
    delta is summed over the keys instead of taken from the output, whose rounding would show. Both
    buffers of the ring of keys hold that many. It is 0 where a call has some of its rows' keys
    alone. In decoding, `PAGE` is the number of tokens of a block of a paged cache, `PAGES` the
    power of two of block numbers that a chunk keeps, 0 where each step loads its own, and
    `MERGED_ROWS` the power of two of rows that the last program of a head merges; 0 where there is
    none. The forward kernels take `PAGE`, too. `FUSED` says that a kernel is part of
    `hopper/fused_backward.py`, and `ORDERED` that dQ is summed there in a fixed order.
    """

    HEAD_DIM: int
    BLOCK_D: int
    BLOCK_M: int = 0
    BLOCK_N: int = 0
    STAGES: int = 0
    INTERVALS: int = 1
    PREFIX: int = 0
    CHUNK: int = 0
    DOCUMENTS: bool = False
    GROUPED: bool = False
    PACKED: bool = False
    RINGS: bool = False
    START_ON_DEVICE: bool = False
    HAS_KEY_START: bool = False
    UNLESS_DESCRIBED: bool = False
    HAS_SINKS: bool = False
    HAS_D_LSE: bool = False
    COMPUTE_DELTA: bool = False
    FUSED: bool = False
    ORDERED: bool = False
    FALLING: bool = False
    PRECISE: bool = False
    EXACT_STEPS: int = 2
    PAGE: int = 0
    PAGES: int = 0
    MERGED_ROWS: int = 0


class Heads(NamedTuple):
    """A `[B, H, tokens, D]` tensor, or a pointer to it in a kernel, and its strides; D is
    contiguous.
    """

    pointer: Any
    stride_b: Any
    stride_h: Any
    stride_t: Any


class RowStats(NamedTuple):
    """Statistics of every query row that the backward pass uses, float32.

    `lse` is the forward pass's log-sum-exp and `d_lse` its gradient, or None. `lse_log2` is `lse`
    in the unit of the exponentials (`softmax.py`), and `delta = rowsum(dO * O) - d_lse`.
    """

    lse: Any
    d_lse: Any
    lse_log2: Any
    delta: Any


class Positions(NamedTuple):
    """The tensors that positions are read from on the device, each or None. `described` int32 `[B]`
    is not 0 for the batch entries that the kernels must leave out (`hopper/documents.py`).

    Of documents whose keys are in a paged cache: `pages` int32 `[documents, columns]`, the block of
    each PAGE keys, and `seq_lens` int32 `[documents]`, how many keys there are.
    """

    query_start: Any
    key_start: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    described: Any = None
    pages: Any = None
    seq_lens: Any = None


class Counts(NamedTuple):
    """Sizes of a call for the portable kernels.

    Triton specialises on the fields of a tuple argument, whatever `do_not_specialize` says. Kernels
    therefore take counts one by one and put them together again: a new length or start compiles
    nothing.

    `group` is the number of query heads per key/value head. `n_slots` is the number of blocks per
    head and batch entry (`varlen.num_slots`).
    """

    query_start_stride: Any
    key_start_stride_b: Any
    key_start_stride_t: Any
    n_heads: Any
    group: Any
    n_batch: Any
    n_documents: Any
    n_slots: Any
    n_queries: Any
    n_keys: Any
    query_start: Any


class QueryBlock(NamedTuple):
    """A block of queries of one head, and the sequence that it belongs to.

    `first_query` and `n_queries` are indices in the sequence, `first` and `last` positions.
    """

    bands: Any
    batch: Any
    first_query: Any
    first: Any
    last: Any
    offset_q: Any
    n_queries: Any
    offset_k: Any
    n_keys: Any
    start: Any


class KeyStarts(NamedTuple):
    """First keys that a block of queries may see: of each query `[M]`, the lowest, the highest, and
    the lowest of a later document, `tiles.MISSING` without one. The last is known with a prefix
    alone.
    """

    each: Any
    lowest: Any
    highest: Any
    next: Any


class Rows(NamedTuple):
    """Positions of the queries of a block `[M]`, of the first and of the last, and their
    `KeyStarts`.
    """

    o_position: Any
    first: Any
    last: Any
    starts: Any


class Document(NamedTuple):
    """The queries of a block that share a first key: their `Rows`, the mask `[M]` of them, and the
    first key of the next document of the block, `tiles.MISSING` after the last.
    """

    rows: Any
    m_query: Any
    next: Any


class PageRow(NamedTuple):
    """The pages of a document: pointer to its row of the block table, and the strides of blocks of
    keys and of values.
    """

    p_numbers: Any
    stride_key: Any
    stride_value: Any


class Keys(NamedTuple):
    """Pointers to the keys and values of one head, their strides, and the number of keys. In a
    paged cache also the `PageRow`.
    """

    p_key: Any
    stride_key: Any
    p_value: Any
    stride_value: Any
    n_keys: Any
    pages: Any = None


class KeyPart(NamedTuple):
    """Keys of a block, the first and the last, and the queries `[low_query, high_query)` of which
    those that see the keys as part of their prefix are computed.
    """

    first: Any
    last: Any
    low_query: Any
    high_query: Any


class QuerySource(NamedTuple):
    """The queries that a block of keys needs in dK and dV: `Heads` of query and d_out at their
    sequence, two of the `RowStats`, where rows start and how many a head has, the bands of the
    group, and the sequence's sizes and first keys.
    """

    query: Any
    d_out: Any
    lse_log2: Any
    delta: Any
    first_row: Any
    rows_of_head: Any
    p_bands: Any
    group: Any
    start: Any
    n_queries: Any
    n_keys: Any
    p_start: Any
    stride_start: Any


def heads(tensor: torch.Tensor) -> Heads:
    """The kernel argument of a `[B, H, tokens, D]` tensor."""
    stride_b, stride_h, stride_t, _ = tensor.stride()
    return Heads(tensor, stride_b, stride_h, stride_t)


@triton.jit
def head_pointer(tensor, batch, head, offset):
    """Pointer to one head of one batch entry of a `Heads`, `offset` tokens from its start; all
    int64.
    """
    return (
        tensor.pointer + batch * tensor.stride_b + head * tensor.stride_h + offset * tensor.stride_t
    )


@triton.jit
def page_row(positions, document, n_keys, PAGE: tl.constexpr):
    """Pointer to a document's row of the block table, whose rows follow one another. `n_keys` keys
    would fill one.
    """
    return positions.pages + document * (n_keys // PAGE)


@triton.jit
def entry_of(tensor, batch, offset):
    """The `Heads` of one batch entry, `offset` tokens from its start; both int64."""
    pointer = tensor.pointer + batch * tensor.stride_b + offset * tensor.stride_t
    return Heads(pointer, 0, tensor.stride_h, tensor.stride_t)


@triton.jit
def query_block(p_bands, positions, counts, FORM: tl.constexpr):
    """The `QueryBlock` of this program. Heads with the most work come first, and the last block of
    each, which sees the most keys: short programs end the run.
    """
    program = tl.program_id(0)
    slot = counts.n_slots - 1 - program % counts.n_slots
    batch = (program // counts.n_slots) % counts.n_batch
    bands = tiles.load_bands(p_bands, program // counts.n_slots // counts.n_batch)
    sequence = varlen.sequence_at(positions, counts, slot, batch, FORM.BLOCK_M, False, FORM)
    first_query = sequence.block * FORM.BLOCK_M
    return QueryBlock(
        bands,
        batch,
        first_query,
        sequence.start + first_query,
        sequence.start + min(first_query + FORM.BLOCK_M, sequence.n_queries) - 1,
        sequence.offset_q,
        sequence.n_queries,
        sequence.offset_k,
        sequence.n_keys,
        sequence.start,
    )


@triton.jit
def key_starts(block, o_query, positions, counts, FORM: tl.constexpr):
    """The `KeyStarts` of the queries `o_query` `[M]` of a `QueryBlock`."""
    each = 0
    lowest = 0
    highest = 0
    if FORM.HAS_KEY_START:
        p_start = positions.key_start + block.batch.to(tl.int64) * counts.key_start_stride_b
        stride = counts.key_start_stride_t
        each = varlen.first_keys(p_start, o_query, block.n_queries, stride, block.n_keys)
        lowest = varlen.first_keys(
            p_start, block.first_query, block.n_queries, stride, block.n_keys
        )
        highest = varlen.first_keys(
            p_start, block.last - block.start, block.n_queries, stride, block.n_keys
        )
    following = tiles.MISSING
    if FORM.PREFIX > 0 and FORM.HAS_KEY_START:
        m_later = (o_query < block.n_queries) & (each > lowest)
        following = tl.min(tl.where(m_later, each, tiles.MISSING), 0)
    return KeyStarts(each, lowest, highest, following)


@triton.jit
def key_blocks(rows, bands, n_keys, FORM: tl.constexpr):
    """The `BlockRange` of the keys that `Rows` need."""
    starts, last, BLOCK_N = rows.starts, rows.last, FORM.BLOCK_N
    blocks = tiles.key_blocks(
        bands, rows.first, last, starts.lowest, n_keys, BLOCK_N, FORM.INTERVALS, FORM.PREFIX
    )
    if FORM.PREFIX > 0 and FORM.HAS_KEY_START:
        low = tl.maximum(starts.next, starts.lowest + FORM.PREFIX)
        high = tl.minimum(starts.highest + FORM.PREFIX, tl.minimum(last + 1, n_keys))
        blocks = tiles.with_next_prefixes(blocks, bands, low, high, BLOCK_N)
    return blocks


@triton.jit
def visible(rows, o_key, low, near, far, FORM: tl.constexpr):
    """Mask `[M, N]` of the keys that `Rows` see in a block of keys."""
    o_last, o_count = tiles.visible_keys(
        rows.o_position, near, far, rows.starts.each, FORM.PREFIX
    )  # [M], [M]
    m_seen = tiles.visible(o_last[:, None], o_key[None, :], 0, o_count[:, None])
    if FORM.PREFIX > 0 and FORM.HAS_KEY_START:
        m_seen = m_seen & (o_key >= low)[None, :]
    return m_seen


@triton.jit
def document_at(start, rows, m_query):
    """The `Document` whose first key is `start` of a block of queries; `m_query` `[M]` is the mask
    of the block.

    A product spreads a key or a value that is not finite to every query of its block. Where that
    would reach another document, kernels compute each document of a block separately. Its queries
    then meet no tokens but its own.
    """
    each, o_position = rows.starts.each, rows.o_position
    m_document = m_query & (each == start)
    first = tl.min(tl.where(m_document, o_position, tiles.MISSING), 0)
    last = tl.max(tl.where(m_document, o_position, -1), 0)
    following = tl.min(tl.where(m_query & (each > start), each, tiles.MISSING), 0)
    starts = KeyStarts(each, start, start, tiles.MISSING)
    return Document(Rows(o_position, first, last, starts), m_document, following)


@triton.jit
def is_finite(b_block):
    """True if no element of a block `[M, D]` is NaN or infinite."""
    # One sum: for compute capability 10.0, Triton 3.6 and 3.7 do not compile a sum of sums.
    return tl.sum(b_block * 0.0) == 0.0


@triton.jit
def first_document(starts, b_block):
    """First key of the first document of a block of queries if its documents have to be computed
    separately, given the block's result `[M, D]`; else `tiles.MISSING`, which ends their loop.
    """
    start = starts.lowest * 0 + tiles.MISSING
    if starts.lowest < starts.highest:
        start = tl.where(is_finite(b_block), tiles.MISSING, starts.lowest)
    return start
