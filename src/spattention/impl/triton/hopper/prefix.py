# mypy: allow-untyped-defs
"""The step of a prefix of at most `WIDTH` keys, with the legend of `pipeline.py`.

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
from . import arguments
from .planning import PREFIX_WIDTH

# Keys of the products.
WIDTH = gl.constexpr(PREFIX_WIDTH)
# Parts that a program adds at a time, and the elements of a key that it adds.
PARTS = tl.constexpr(128)
COLUMNS = tl.constexpr(32)


class PrefixProducts(NamedTuple):
    """Block of keys of the prefix, and `[M, WIDTH]` probabilities and their gradients there."""

    key_block: Any
    p: Any
    d_p: Any


@gluon.constexpr_function
def is_narrow(form):
    """True if the prefix has a step of its own."""
    return 0 < form.PREFIX <= WIDTH


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
    """`[M, WIDTH]` products of a block `[M, D]` with the tokens of the prefix, under way."""
    LAYOUT: gl.constexpr = scores_layout(gl.num_warps())
    zeros = gl.full([s_left.shape[0], WIDTH], 0.0, gl.float32, LAYOUT)
    s_right = tokens(s_tokens, FORM).permute((1, 0))
    # [M, WIDTH] = [M, D] @ [D, WIDTH]
    return warpgroup_mma(s_left, s_right, zeros, use_acc=False, is_async=True)


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
def probabilities(scores, o_position, key_block, row_max, row_sum, scale, FORM: gl.constexpr):
    """`softmax.update` with scores `[M, WIDTH]`, which are masked here."""
    ROW: gl.constexpr = row_max.type.layout
    NARROW: gl.constexpr = gl.SliceLayout(1, scores.type.layout)
    m_seen = visible(o_position, key_block, FORM.BLOCK_N, FORM)
    scores = gl.where(m_seen, scores, float("inf") if FORM.FALLING else float("-inf"))
    row_max, row_sum = gl.convert_layout(row_max, NARROW), gl.convert_layout(row_sum, NARROW)
    p, row_max, row_sum, factor = softmax.update(scores, row_max, row_sum, scale, FORM.FALLING)
    row_max, row_sum = gl.convert_layout(row_max, ROW), gl.convert_layout(row_sum, ROW)
    return p, row_max, row_sum, gl.convert_layout(factor, ROW)


@gluon.jit
def recompute(s_query, s_d_out, s_key, s_value, tile, lse_log2, scale, FORM: gl.constexpr):
    """The `PrefixProducts` of a tile, whose block of keys 0 is there."""
    BLOCK_N: gl.constexpr = FORM.BLOCK_N
    NARROW: gl.constexpr = gl.SliceLayout(1, scores_layout(gl.num_warps()))
    key_block = tiles.block_at(0, tile.keys, tile.bands, BLOCK_N, FORM.INTERVALS, FORM.PREFIX)
    if arguments.is_bounded(FORM):
        arguments.zero_unseen(tile, key_block, tokens(s_key, FORM), FORM)
        arguments.zero_unseen(tile, key_block, tokens(s_value, FORM), FORM)
    scores, d_p = product(s_query, s_key, FORM), product(s_d_out, s_value, FORM)
    scores, d_p = warpgroup_mma_wait(0, [scores, d_p])
    o_position = tile.first + gl.arange(0, s_query.shape[0], NARROW)
    m_seen = visible(o_position, key_block, BLOCK_N, FORM)
    p = softmax.recompute(scores, gl.convert_layout(lse_log2, NARROW)[:, None], scale)
    return PrefixProducts(key_block, gl.where(m_seen, p, 0.0), d_p)


@gluon.jit
def part_of(p_parts, tile, n_heads, n_tiles, FORM: gl.constexpr):
    """Pointer to the part of a tile among `[B, H, tiles, 2, PREFIX, D]`, where there are parts."""
    p_part = 0
    if has_parts(FORM):
        n_tile = (tile.batch.to(gl.int64) * n_heads + tile.bands.head) * n_tiles
        n_tile += tile.first_query // FORM.BLOCK_M
        p_part = p_parts + n_tile * (2 * FORM.PREFIX * FORM.HEAD_DIM)
    return p_part


@gluon.jit
def gradients(s_query, s_d_out, s_key, of_prefix, delta, b_d_query, p_part, FORM: gl.constexpr):
    """`b_d_query` with what the prefix adds. Stores the tile's part of dK and dV."""
    LAYOUT: gl.constexpr = scores_layout(gl.num_warps())
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, b_d_query.type.layout, 2)
    DTYPE: gl.constexpr = s_key.dtype
    SHAPE: gl.constexpr = of_prefix.p.shape
    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for(SHAPE, DTYPE)
    delta = gl.convert_layout(delta, gl.SliceLayout(1, LAYOUT))
    b_p = of_prefix.p.to(DTYPE)
    b_d_scores = (of_prefix.p * (of_prefix.d_p - delta[:, None])).to(DTYPE)
    b_left = gl.convert_layout(b_d_scores, OPERAND)
    if has_parts(FORM):
        s_p = gl.allocate_shared_memory(DTYPE, SHAPE, SHARED, b_p)
        s_d_scores = gl.allocate_shared_memory(DTYPE, SHAPE, SHARED, b_d_scores)
        fence_async_shared()
        zeros = gl.full([FORM.HEAD_DIM, WIDTH], 0.0, gl.float32, LAYOUT)
        # [D, WIDTH] = [D, M] @ [M, WIDTH], both
        s_left = s_query.permute((1, 0))
        d_key = warpgroup_mma(s_left, s_d_scores, zeros, use_acc=False, is_async=True)
        s_left = s_d_out.permute((1, 0))
        d_value = warpgroup_mma(s_left, s_p, zeros, use_acc=False, is_async=True)
    # [M, D] += [M, WIDTH] @ [WIDTH, D]
    b_d_query = warpgroup_mma(b_left, tokens(s_key, FORM), b_d_query, is_async=True)
    if has_parts(FORM):
        d_key, d_value, b_d_query = warpgroup_mma_wait(0, [d_key, d_value, b_d_query])
        first_key = of_prefix.key_block.start + first_row(FORM.BLOCK_N, arguments.is_bounded(FORM))
        o_dim = gl.arange(0, FORM.HEAD_DIM, gl.SliceLayout(1, LAYOUT))
        o_key = first_key + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
        m_key = ((o_key >= 0) & (o_key < FORM.PREFIX))[None, :]
        p_tile = p_part + o_key[None, :] * FORM.HEAD_DIM + o_dim[:, None]
        gl.store(p_tile, d_key, mask=m_key)
        gl.store(p_tile + FORM.PREFIX * FORM.HEAD_DIM, d_value, mask=m_key)
        return b_d_query
    else:
        return warpgroup_mma_wait(0, [b_d_query])


@triton.jit(do_not_specialize=["n_heads", "group", "n_batch", "n_tiles", "n_queries", "n_keys"])
def sum_parts_kernel(
    d_key,
    d_value,
    p_parts,
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
    """Add the parts `[B, H, tiles, 2, PREFIX, D]` to dK and dV; a program for `COLUMNS` elements of
    each key of the prefix of each key head in one of both.
    """
    HEAD_DIM: tl.constexpr = FORM.HEAD_DIM
    PREFIX: tl.constexpr = FORM.PREFIX
    program = tl.program_id(0)
    o_dim = program % (HEAD_DIM // COLUMNS) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    program = program // (HEAD_DIM // COLUMNS)
    of_value = program % 2
    key = program // 2 % PREFIX
    program = program // (2 * PREFIX)
    batch, entry = (program % n_batch).to(tl.int64), program // n_batch * group
    offset = 0
    if FORM.HAS_KEY_START:
        offset = tl.minimum(tl.maximum(tl.load(positions.key_start + batch), 0), n_keys)
    if offset + key >= n_keys:
        return
    total = tl.zeros([COLUMNS], tl.float32)
    for member in range(group if FORM.GROUPED else 1):
        bands = tiles.load_bands(p_bands, entry + member)
        first_tile = (batch * n_heads + bands.head) * n_tiles
        for first in range(0, tl.where(bands.near_0 < tiles.MISSING, n_tiles, 0), PARTS):
            o_tile = first + tl.arange(0, PARTS)  # [PARTS]
            # A tile of queries before the key has no part.
            o_end = tl.minimum((o_tile + 1) * FORM.BLOCK_M, n_queries) - offset
            m_tile = (o_tile < n_tiles) & (o_end > key)
            o_part = (((first_tile + o_tile) * 2 + of_value) * PREFIX + key) * HEAD_DIM
            p_tile = p_parts + o_part[:, None] + o_dim[None, :]  # [PARTS, COLUMNS]
            total += tl.sum(tl.load(p_tile, mask=m_tile[:, None], other=0.0), 0)
    head = (tl.load(p_bands + 8 * entry) // group).to(tl.int64)
    token = tl.zeros([], tl.int64) + offset + key
    if of_value:
        add(portable_arguments.head_pointer(d_value, batch, head, token) + o_dim, total)
    else:
        p_d_key = portable_arguments.head_pointer(d_key, batch, head, token) + o_dim
        add(p_d_key, total * softmax.natural(scale))


@triton.jit
def add(p_elements, b_elements):
    """Add to elements in memory."""
    b_elements += tl.load(p_elements).to(tl.float32)
    tl.store(p_elements, b_elements.to(p_elements.dtype.element_ty))
