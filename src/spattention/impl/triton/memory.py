# mypy: allow-untyped-defs
"""Blocks of tokens, in and out of memory. Tokens outside the given range and elements after
head_dim are never touched.

T  tokens of a block        D  FORM.BLOCK_D
"""

import triton
import triton.language as tl


@triton.jit
def load_tokens(p_head, o_token, stride, low, high, FORM: tl.constexpr):
    """`[T, D]` from tokens `o_token` of a head; zeros outside tokens `low .. high - 1`."""
    m_token = (o_token >= low) & (o_token < high)
    return gather_tokens(p_head, o_token, m_token, stride, FORM)


@triton.jit
def gather_tokens(p_head, o_token, m_token, stride, FORM: tl.constexpr):
    """`[T, D]` from tokens `o_token` of a head; zeros where `m_token` `[T]` is false."""
    o_dim = tl.arange(0, FORM.BLOCK_D)
    m_token = m_token[:, None]
    if FORM.HEAD_DIM < FORM.BLOCK_D:
        m_token = m_token & (o_dim < FORM.HEAD_DIM)[None, :]
    p_block = p_head + o_token.to(tl.int64)[:, None] * stride + o_dim[None, :]
    return tl.load(p_block, mask=m_token, other=0.0)


@triton.jit
def store_tokens(p_head, b_tokens, o_token, stride, n_tokens, FORM: tl.constexpr):
    """Store `b_tokens` `[T, D]` as tokens `o_token` of a head, except those from `n_tokens` on."""
    scatter_tokens(p_head, b_tokens, o_token, o_token < n_tokens, stride, FORM)


@triton.jit
def scatter_tokens(p_head, b_tokens, o_token, m_token, stride, FORM: tl.constexpr):
    """Store `b_tokens` `[T, D]` as tokens `o_token` of a head where `m_token` `[T]` is true."""
    o_dim = tl.arange(0, FORM.BLOCK_D)
    m_token = m_token[:, None]
    if FORM.HEAD_DIM < FORM.BLOCK_D:
        m_token = m_token & (o_dim < FORM.HEAD_DIM)[None, :]
    p_block = p_head + o_token.to(tl.int64)[:, None] * stride + o_dim[None, :]
    tl.store(p_block, b_tokens.to(p_head.dtype.element_ty), mask=m_token)
