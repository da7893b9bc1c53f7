# mypy: allow-untyped-defs
"""The first step of a block of queries that sees a prefix of at most `WIDTH` keys, with the legend
of `pipeline.py`.

The block of keys that holds the prefix is copied like every other, and has its place in the ring.
But products read `WIDTH` of its tokens alone: a quarter of the work, or an eighth.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from .. import softmax
from . import arguments, memory

# Keys of the products.
WIDTH = gl.constexpr(16)


@gluon.constexpr_function
def first_step(form):
    """The first step with all keys of a block: 1 after a step of this file, else 0."""
    return int(0 < form.PREFIX <= WIDTH)


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
