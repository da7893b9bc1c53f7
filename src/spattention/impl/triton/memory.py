# mypy: allow-untyped-defs
"""Blocks of rows, in and out of memory. What lies outside a row's range or beyond head_dim is never
touched.

R  rows of a block        D  BLOCK_D >= HEAD_DIM
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(p_rows, o_row, stride, low, high, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """`[R, D]` from rows `o_row` of a matrix; zeros outside rows `low .. high - 1`."""
    m_row = (o_row >= low) & (o_row < high)
    return gather_rows(p_rows, o_row, m_row, stride, HEAD_DIM, BLOCK_D)


@triton.jit
def gather_rows(p_rows, o_row, m_row, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """`[R, D]` from rows `o_row` of a matrix; zeros where `m_row` `[R]` is false."""
    o_dim = tl.arange(0, BLOCK_D)
    m_row = m_row[:, None]
    if HEAD_DIM < BLOCK_D:
        m_row = m_row & (o_dim < HEAD_DIM)[None, :]
    p_block = p_rows + o_row.to(tl.int64)[:, None] * stride + o_dim[None, :]
    return tl.load(p_block, mask=m_row, other=0.0)


@triton.jit
def store_rows(
    p_rows, b_rows, o_row, stride, n_rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """`b_rows` `[R, D]` into rows `o_row` of a matrix, those before `n_rows`."""
    o_dim = tl.arange(0, BLOCK_D)
    m_row = (o_row < n_rows)[:, None]
    if HEAD_DIM < BLOCK_D:
        m_row = m_row & (o_dim < HEAD_DIM)[None, :]
    p_block = p_rows + o_row.to(tl.int64)[:, None] * stride + o_dim[None, :]
    tl.store(p_block, b_rows.to(p_rows.dtype.element_ty), mask=m_row)
