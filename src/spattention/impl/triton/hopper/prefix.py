# mypy: allow-untyped-defs
"""The first step of a block of queries that sees a prefix of at most `WIDTH` keys, with the legend
of `pipeline.py`.

The block of keys that holds the prefix is copied like every other, and has its place in the ring.
But products read `WIDTH` of its tokens alone: a quarter of the work, or an eighth.

Every query sees the prefix: its dK and dV would be one program's work long after all others. A
program of dQ holds all that its queries add to them, and writes that as a part of its own.
`sum_parts_kernel` adds the parts in the order of the queries: the same bits on every run. Packed
documents have no parts; `portable/prefix_gradient.py` computes their dK and dV.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .. import arguments as portable_arguments
from .. import softmax, tiles
from . import arguments, memory
from .planning import PREFIX_WIDTH

# Keys of the products.
WIDTH = gl.constexpr(PREFIX_WIDTH)
# Parts that a program adds at a time.
PARTS = tl.constexpr(32)


class PrefixProducts(NamedTuple):
    """Block of keys of the prefix, and `[M, WIDTH]` probabilities and their gradients there."""

    key_block: Any
    p: Any
    d_p: Any


@gluon.constexpr_function
def first_step(form):
    """The first step with all keys of a block: 1 after a step of this file, else 0."""
    return int(0 < form.PREFIX <= WIDTH)


@gluon.constexpr_function
def has_parts(form):
    """True if programs of dQ write parts of dK and dV."""
    return 0 < form.PREFIX <= WIDTH and not form.PACKED


@gluon.constexpr_function
def first_row(rows, bounded):
    """First of the `WIDTH` tokens of a block `[rows, D]` that hold the prefix. The block ends with
    it, or starts with it where nothing may be read before (`tiles.from_zero`).
    """
    return 0 if bounded else rows - WIDTH


@gluon.constexpr_function
def scores_layout(warps):
    """The layout of `[M, WIDTH]` scores."""
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, WIDTH, 16])


@gluon.jit
def tokens(s_tokens, FORM: gl.constexpr):
    """The `WIDTH` tokens of a block in shared memory that hold the prefix."""
    ROW: gl.constexpr = first_row(s_tokens.shape[0], arguments.is_bounded(FORM))
    return s_tokens.slice(ROW, WIDTH)


@gluon.jit
def product(s_left, s_tokens, FORM: gl.constexpr):
    """`[M, WIDTH]` products of a block `[M, D]` with the tokens of the prefix."""
    LAYOUT: gl.constexpr = scores_layout(gl.num_warps())
    zeros = gl.full([s_left.shape[0], WIDTH], 0.0, gl.float32, LAYOUT)
    s_right = tokens(s_tokens, FORM).permute((1, 0))
    # [M, WIDTH] = [M, D] @ [D, WIDTH]
    result = warpgroup_mma(s_left, s_right, zeros, use_acc=False, is_async=True)
    return warpgroup_mma_wait(0, [result])


@gluon.jit
def visible(o_position, key_block, BLOCK_N: gl.constexpr, FORM: gl.constexpr):
    """Mask `[M, WIDTH]` of the keys that the queries see; `o_position` has any layout of rows."""
    LAYOUT: gl.constexpr = scores_layout(gl.num_warps())
    first_key = key_block.start + first_row(BLOCK_N, arguments.is_bounded(FORM))
    o_key = first_key + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    o_query = gl.convert_layout(o_position, gl.SliceLayout(1, LAYOUT))
    near, far = key_block.near, key_block.far
    return arguments.visible(o_query[:, None], o_key[None, :], near, far, FORM.PREFIX)


@gluon.jit
def probabilities(scores, row_max, row_sum, scale, FORM: gl.constexpr):
    """`softmax.update` with masked scores `[M, WIDTH]`, before all other keys; probabilities,
    `row_max` and `row_sum`.
    """
    ROW: gl.constexpr = row_max.type.layout
    NARROW: gl.constexpr = gl.SliceLayout(1, scores.type.layout)
    row_max, row_sum = gl.convert_layout(row_max, NARROW), gl.convert_layout(row_sum, NARROW)
    p, row_max, row_sum, _ = softmax.update(scores, row_max, row_sum, scale, FORM.FALLING)
    return p, gl.convert_layout(row_max, ROW), gl.convert_layout(row_sum, ROW)


@gluon.jit
def zero_unseen(tile, key_block, s_tokens, FORM: gl.constexpr):
    """Zero those of the `WIDTH` tokens that no query of the tile sees, where they may be another
    sequence's or a later query's.
    """
    if arguments.is_bounded(FORM):
        low, high = arguments.seen_keys(tile, key_block, FORM)
        if WIDTH > high:
            memory.zero_outside(s_tokens, key_block.start, low, high)


@gluon.jit
def recompute(s_query, s_d_out, s_key, s_value, tile, lse_log2, scale, FORM: gl.constexpr):
    """The `PrefixProducts` of a tile, whose block of keys 0 is there."""
    BLOCK_N: gl.constexpr = FORM.BLOCK_N
    NARROW: gl.constexpr = gl.SliceLayout(1, scores_layout(gl.num_warps()))
    key_block = tiles.block_at(0, tile.keys, tile.bands, BLOCK_N, FORM.INTERVALS, FORM.PREFIX)
    zero_unseen(tile, key_block, tokens(s_key, FORM), FORM)
    zero_unseen(tile, key_block, tokens(s_value, FORM), FORM)
    scores, d_p = product(s_query, s_key, FORM), product(s_d_out, s_value, FORM)
    o_position = tile.first + gl.arange(0, s_query.shape[0], NARROW)
    m_seen = visible(o_position, key_block, BLOCK_N, FORM)
    p = softmax.recompute(scores, gl.convert_layout(lse_log2, NARROW)[:, None], scale)
    return PrefixProducts(key_block, gl.where(m_seen, p, 0.0), d_p)


@gluon.jit
def gradients(
    s_query, s_d_out, s_key, tile, of_prefix, delta, b_d_query, p_part, FORM: gl.constexpr
):
    """`b_d_query` with what the prefix adds. Stores the tile's part of dK and dV."""
    LAYOUT: gl.constexpr = scores_layout(gl.num_warps())
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, b_d_query.type.layout, 2)
    DTYPE: gl.constexpr = s_key.dtype
    delta = gl.convert_layout(delta, gl.SliceLayout(1, LAYOUT))
    b_p = of_prefix.p.to(DTYPE)
    b_d_scores = (of_prefix.p * (of_prefix.d_p - delta[:, None])).to(DTYPE)
    # [M, D] += [M, WIDTH] @ [WIDTH, D]
    b_left = gl.convert_layout(b_d_scores, OPERAND)
    b_d_query = warpgroup_mma(b_left, tokens(s_key, FORM), b_d_query, is_async=True)
    if has_parts(FORM):
        first_key = of_prefix.key_block.start + first_row(FORM.BLOCK_N, arguments.is_bounded(FORM))
        store_part(p_part, s_query, b_d_scores, first_key, FORM)
        store_part(p_part + FORM.PREFIX * FORM.HEAD_DIM, s_d_out, b_p, first_key, FORM)
    return warpgroup_mma_wait(0, [b_d_query])


@gluon.jit
def store_part(p_part, s_rows, b_weights, first_key, FORM: gl.constexpr):
    """Store the sum over the rows `[M, D]` with weights `[M, WIDTH]`, `[D, WIDTH]`, by key."""
    HEAD_DIM: gl.constexpr = FORM.HEAD_DIM
    LAYOUT: gl.constexpr = scores_layout(gl.num_warps())
    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for(b_weights.shape, b_weights.dtype)
    s_weights = gl.allocate_shared_memory(b_weights.dtype, b_weights.shape, SHARED, b_weights)
    fence_async_shared()
    zeros = gl.full([HEAD_DIM, WIDTH], 0.0, gl.float32, LAYOUT)
    # [D, WIDTH] = [D, M] @ [M, WIDTH]
    sums = warpgroup_mma(
        s_rows.permute((1, 0)), s_weights, zeros, use_acc=False, is_async=True
    )
    sums = warpgroup_mma_wait(0, [sums])
    o_dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(1, LAYOUT))
    o_key = first_key + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    m_key = (o_key >= 0) & (o_key < FORM.PREFIX)
    gl.store(p_part + o_key[None, :] * HEAD_DIM + o_dim[:, None], sums, mask=m_key[None, :])


@triton.jit(do_not_specialize=["n_heads", "group", "n_batch", "n_tiles", "n_queries", "n_keys"])
def sum_parts_kernel(
    d_key,
    d_value,
    p_part,
    p_bands,
    positions,
    n_heads,
    group,
    n_batch,
    n_tiles,
    n_queries,
    n_keys,
    scale,
    FORM: tl.constexpr,
):
    """Add the parts `[B, H, tiles, 2, PREFIX, D]` to dK and dV; a program for each key of the
    prefix of each key head.
    """
    HEAD_DIM: tl.constexpr = FORM.HEAD_DIM
    PREFIX: tl.constexpr = FORM.PREFIX
    program = tl.program_id(0)
    key = program % PREFIX
    batch = program // PREFIX % n_batch
    entry = program // PREFIX // n_batch * group
    batch_64 = batch.to(tl.int64)
    offset = 0
    if FORM.HAS_KEY_START:
        offset = tl.minimum(tl.maximum(tl.load(positions.key_start + batch), 0), n_keys)
    if offset + key >= n_keys:
        return
    o_dim = tl.arange(0, HEAD_DIM)  # [D]
    b_d_key = tl.zeros([HEAD_DIM], tl.float32)
    b_d_value = tl.zeros([HEAD_DIM], tl.float32)
    for member in range(group if FORM.GROUPED else 1):
        bands = tiles.load_bands(p_bands, entry + member)
        first_tile = (batch_64 * n_heads + bands.head) * n_tiles
        for first in range(0, tl.where(bands.near_0 < tiles.MISSING, n_tiles, 0), PARTS):
            o_tile = first + tl.arange(0, PARTS)  # [PARTS]
            o_end = tl.minimum((o_tile + 1) * FORM.BLOCK_M, n_queries) - offset
            m_tile = (o_tile < n_tiles) & (o_end > key)
            o_part = ((first_tile + o_tile) * 2 * PREFIX + key) * HEAD_DIM
            p_tile = p_part + o_part[:, None] + o_dim[None, :]  # [PARTS, D]
            b_d_key += tl.sum(tl.load(p_tile, mask=m_tile[:, None], other=0.0), 0)
            p_tile += PREFIX * HEAD_DIM
            b_d_value += tl.sum(tl.load(p_tile, mask=m_tile[:, None], other=0.0), 0)
    head = (tl.load(p_bands + 8 * entry) // group).to(tl.int64)
    token = tl.zeros([], tl.int64) + offset + key
    p_d_key = portable_arguments.head_pointer(d_key, batch_64, head, token) + o_dim
    p_d_value = portable_arguments.head_pointer(d_value, batch_64, head, token) + o_dim
    b_d_key = b_d_key * softmax.natural(scale) + tl.load(p_d_key).to(tl.float32)
    b_d_value += tl.load(p_d_value).to(tl.float32)
    tl.store(p_d_key, b_d_key.to(d_key.pointer.dtype.element_ty))
    tl.store(p_d_value, b_d_value.to(d_value.pointer.dtype.element_ty))
