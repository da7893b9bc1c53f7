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
    of the fullest head, 1 or 2. `FALLING` says that `scale < 0`, `PRECISE` that the softmax is
    computed in powers of e. `EXACT_STEPS` is the number of blocks of keys up to which delta is
    summed over the keys instead of taken from the output, whose rounding would show. Both buffers
    of the ring of keys hold that many. It is 0 where a call has some of its rows' keys alone.
    """

    HEAD_DIM: int
    BLOCK_D: int
    BLOCK_M: int = 0
    BLOCK_N: int = 0
    STAGES: int = 0
    INTERVALS: int = 1
    GROUPED: bool = False
    PACKED: bool = False
    RINGS: bool = False
    START_ON_DEVICE: bool = False
    HAS_KEY_START: bool = False
    HAS_SINKS: bool = False
    HAS_D_LSE: bool = False
    COMPUTE_DELTA: bool = False
    FALLING: bool = False
    PRECISE: bool = False
    EXACT_STEPS: int = 2


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
    """The tensors that positions are read from on the device, each or None."""

    query_start: Any
    key_start: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any


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
    """First keys that a block of queries may see: of each query `[M]`, the lowest, the highest."""

    each: Any
    lowest: Any
    highest: Any


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
    return KeyStarts(each, lowest, highest)
