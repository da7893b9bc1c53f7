# mypy: allow-untyped-defs
"""Joining a partial result to another, in one pass over both.

M = BLOCK_M rows   D = BLOCK_D >= head_dim
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..partial import PartResults
from .arguments import heads
from .call import on_device
from .compiled import CompiledKernelCache, specialization
from .config import OPTIONS, block_d

BLOCK_M = 64


class Rows(NamedTuple):
    """Log-sum-exp `[B, H, Q]` and its strides."""

    pointer: Any
    stride_b: Any
    stride_h: Any
    stride_t: Any


class MergeCounts(NamedTuple):
    """Query heads, rows, blocks of rows."""

    n_heads: Any
    n_rows: Any
    n_blocks: Any


@triton.jit
def merge_kernel(
    out,
    p_remainder,
    lse,
    part,
    part_lse,
    counts,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of rows of one head: `out` and `lse` become those of both parts. `p_remainder` is
    None, or has the strides of `out`.
    """
    program = tl.program_id(0)
    head_batch = (program // counts.n_blocks).to(tl.int64)
    batch, head = head_batch // counts.n_heads, head_batch % counts.n_heads
    o_row = program % counts.n_blocks * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    o_dim = tl.arange(0, BLOCK_D)
    m_row = o_row < counts.n_rows
    o_row = o_row.to(tl.int64)
    p_lse = lse.pointer + batch * lse.stride_b + head * lse.stride_h + o_row * lse.stride_t
    p_part_lse = part_lse.pointer + batch * part_lse.stride_b + head * part_lse.stride_h
    b_lse = tl.load(p_lse, mask=m_row, other=-float("inf"))
    b_part_lse = tl.load(p_part_lse + o_row * part_lse.stride_t, mask=m_row, other=-float("inf"))
    # Rows that the part does not see keep their bits.
    m_row &= b_part_lse > -float("inf")
    highest = tl.where(m_row, tl.maximum(b_lse, b_part_lse), 0.0)
    part_weight = tl.where(m_row, tl.exp(b_part_lse - highest), 1.0)
    total = part_weight + tl.where(m_row, tl.exp(b_lse - highest), 0.0)
    share = part_weight / total
    m_tile = m_row[:, None] & (o_dim < HEAD_DIM)[None, :]
    offset = batch * out.stride_b + head * out.stride_h
    offset += o_row[:, None] * out.stride_t + o_dim[None, :]  # [M, D]
    p_part = part.pointer + batch * part.stride_b + head * part.stride_h
    p_part += o_row[:, None] * part.stride_t + o_dim[None, :]
    b_out = tl.load(out.pointer + offset, mask=m_tile, other=0.0).to(tl.float32)
    if p_remainder is not None:
        # It was not written where the first part sees no keys.
        m_seen = m_tile & (b_lse > -float("inf"))[:, None]
        b_out += tl.load(p_remainder + offset, mask=m_seen, other=0.0).to(tl.float32)
    b_part = tl.load(p_part, mask=m_tile, other=0.0).to(tl.float32)
    b_out += share[:, None] * (b_part - b_out)
    tl.store(out.pointer + offset, b_out.to(out.pointer.dtype.element_ty), mask=m_tile)
    # The log-sum-exp may be loaded once for each of two layouts, by other warps than store it.
    tl.debug_barrier()
    tl.store(p_lse, highest + tl.log(total), mask=m_row)


_merge = CompiledKernelCache(merge_kernel)


def merge(results: PartResults, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Join a partial result to `results` in place; arguments as in `partial.merge_into`, with rows
    contiguous in D."""
    out, lse, remainder = results
    batch, n_heads, n_rows, head_dim = out.shape
    if out.numel() == 0:
        return
    assert out.stride(-1) == part.stride(-1) == 1
    counts = MergeCounts(n_heads, n_rows, triton.cdiv(n_rows, BLOCK_M))
    tensors = (
        heads(out),
        remainder,
        Rows(lse, *lse.stride()),
        heads(part),
        Rows(part_lse, *part_lse.stride()),
    )
    with on_device(out.device):
        _merge(
            batch * n_heads * counts.n_blocks,
            (
                out.device,
                specialization(out, remainder, lse, part, part_lse),
                *[tensor.stride() for tensor in (out, lse, part, part_lse)],
                counts,
            ),
            *tensors,
            counts,
            HEAD_DIM=head_dim,
            BLOCK_M=BLOCK_M,
            BLOCK_D=block_d(head_dim),
            **OPTIONS,
        )
