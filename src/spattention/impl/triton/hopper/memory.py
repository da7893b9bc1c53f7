# mypy: allow-untyped-defs
"""Blocks of tokens between registers and memory, without TMA."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared


@gluon.constexpr_function
def wide_layout(head_dim, warps):
    """A layout in which a thread holds 16 bytes of half precision."""
    return gl.BlockedLayout([1, 8], [32 // (head_dim // 8), head_dim // 8], [warps, 1], [1, 0])


@gluon.jit
def load_tokens(p_head, first, stride, n_tokens, TOKENS: gl.constexpr, HEAD_DIM: gl.constexpr):
    """`[TOKENS, D]` from token `first` on; zeros from token `n_tokens` on."""
    WIDE: gl.constexpr = wide_layout(HEAD_DIM, gl.num_warps())
    o_token = first + gl.arange(0, TOKENS, gl.SliceLayout(1, WIDE))
    o_dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, WIDE))
    p_block = p_head + o_token.to(gl.int64)[:, None] * stride + o_dim[None, :]
    return gl.load(p_block, mask=(o_token < n_tokens)[:, None], other=0.0)


@gluon.jit
def before_end(o_token, n_tokens, FROM_ZERO: gl.constexpr):
    """Mask of the tokens before token `n_tokens`; if `FROM_ZERO`, without those before token 0."""
    m_token = o_token < n_tokens
    if FROM_ZERO:
        m_token = m_token & (o_token >= 0)
    return m_token


@gluon.jit
def store_tokens(
    p_head,
    b_tokens,
    first,
    stride,
    n_tokens,
    TOKENS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    FROM_ZERO: gl.constexpr = False,
):
    """Store `b_tokens` `[TOKENS, D]` from token `first` on, where `before_end`."""
    WIDE: gl.constexpr = wide_layout(HEAD_DIM, gl.num_warps())
    b_wide = gl.convert_layout(b_tokens.to(p_head.dtype.element_ty), WIDE)
    o_token = first + gl.arange(0, TOKENS, gl.SliceLayout(1, WIDE))
    o_dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, WIDE))
    p_block = p_head + o_token.to(gl.int64)[:, None] * stride + o_dim[None, :]
    gl.store(p_block, b_wide, mask=before_end(o_token, n_tokens, FROM_ZERO)[:, None])


@gluon.jit
def store_output(
    out, p_remainder, offset, b_out, first, n_tokens, TOKENS: gl.constexpr, HEAD_DIM: gl.constexpr
):
    """Store `b_out` `[TOKENS, D]` in a head that starts at `offset`, and what rounding takes from
    it unless `p_remainder` is None, which has the strides of `out`."""
    b_rounded = b_out.to(out.pointer.dtype.element_ty)
    store_tokens(out.pointer + offset, b_rounded, first, out.stride_t, n_tokens, TOKENS, HEAD_DIM)
    if p_remainder is not None:
        b_lost = b_out - b_rounded.to(gl.float32)
        store_tokens(p_remainder + offset, b_lost, first, out.stride_t, n_tokens, TOKENS, HEAD_DIM)


@gluon.jit
def store_zeros(
    p_head,
    first,
    stride,
    n_tokens,
    TOKENS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    FROM_ZERO: gl.constexpr = False,
):
    """Store zeros from token `first` on, where `before_end`."""
    WIDE: gl.constexpr = wide_layout(HEAD_DIM, gl.num_warps())
    o_token = first + gl.arange(0, TOKENS, gl.SliceLayout(1, WIDE))
    o_dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, WIDE))
    b_zeros = gl.full([TOKENS, HEAD_DIM], 0.0, p_head.dtype.element_ty, WIDE)
    p_block = p_head + o_token.to(gl.int64)[:, None] * stride + o_dim[None, :]
    gl.store(p_block, b_zeros, mask=before_end(o_token, n_tokens, FROM_ZERO)[:, None])


@gluon.jit
def zero_outside(s_tokens, first, low, high):
    """Zero the tokens of a block `[TOKENS, D]` in shared memory that are not in `[low, high)`. Its
    first is token `first`. A product may then read it whole: 0 * NaN would be NaN.
    """
    HEAD_DIM: gl.constexpr = s_tokens.shape[1]
    WIDE: gl.constexpr = wide_layout(HEAD_DIM, gl.num_warps())
    # A part at a time: the kernels have few registers to spare.
    PART: gl.constexpr = 16
    PARTS: gl.constexpr = s_tokens.shape[0] // PART
    b_zeros = gl.full([PART, HEAD_DIM], 0.0, s_tokens.dtype, WIDE)
    for part in gl.static_range(PARTS):
        s_part = s_tokens.slice(part * PART, PART)
        o_token = first + part * PART + gl.arange(0, PART, gl.SliceLayout(1, WIDE))
        m_token = (o_token >= low) & (o_token < high)
        s_part.store(gl.where(m_token[:, None], s_part.load(WIDE), b_zeros))
    fence_async_shared()
