# mypy: allow-untyped-defs
"""What the Hopper kernels share, in Gluon: layouts, the copies into shared memory, the mask, the
way out.

On Hopper (compute capability 9.0) a copy engine brings blocks into shared memory and warpgroups
multiply from there, both beside the program. Triton schedules that by itself, but waits for each
product before it goes on; these kernels say when to wait, so that the softmax of one block runs
during the products of another. They cover the calls of training and of a first pass over a prompt:
half precision, head_dim 64 or 128, queries from position 0, no `key_start`, no packing.

    M = BLOCK_M queries of a block   N = BLOCK_N keys of a block   D head_dim
    p_ pointer   t_ tensor descriptor   s_ block in shared memory   b_ block in registers
    o_ offset   m_ mask

One warpgroup (4 warps) owns 64 rows. Two or three such programs share a multiprocessor: one
multiplies while another exponentiates. A ring of one or two buffers takes the blocks in turn; `n`
counts the blocks that went through it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .. import tiles


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr = 1):
    """Barriers `[COUNT, 1]`, ready for use, that a copy completes, or so many arrivals."""
    s_barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(s_barriers.index(i), count=ARRIVALS)
    fence_async_shared()
    return s_barriers


@gluon.jit
def expect(s_barriers, n, BYTES: gl.constexpr, wanted):
    """Announces the copies of block `n`; the barrier on which they complete."""
    barrier = s_barriers.index(n % s_barriers.shape[0])
    mbarrier.expect(barrier, BYTES, pred=wanted)
    return barrier


@gluon.jit
def arrived(s_barriers, n):
    """Waits until block `n` is in its buffer."""
    RING: gl.constexpr = s_barriers.shape[0]
    mbarrier.wait(s_barriers.index(n % RING), (n // RING) & 1)


@gluon.jit
def freed(s_barriers, n):
    """Waits until the buffer of block `n` is free: until the block before it was released."""
    RING: gl.constexpr = s_barriers.shape[0]
    mbarrier.wait(s_barriers.index(n % RING), (n // RING + 1) & 1)


@gluon.jit
def release(s_barriers, n):
    """Says that this reader is done with block `n`."""
    mbarrier.arrive(s_barriers.index(n % s_barriers.shape[0]))


@gluon.jit
def retire(s_barriers):
    """The end of barriers, at the end of a kernel: up to here nothing else lies in their memory.

    Without it they end at their last wait for Triton, which then puts other values there; PTX
    forbids that before `mbarrier.inval`, and values were lost where another process had the GPU in
    between (tests/gpu/test_gpu_shared.py).
    """
    COUNT: gl.constexpr = s_barriers.shape[0]
    for i in gl.static_range(COUNT):
        mbarrier.invalidate(s_barriers.index(i))


@gluon.jit
def copy(t_rows, batch, head, start, barrier, s_rows, wanted):
    """Rows from `start` on of a `[B, H, tokens, D]` tensor, on their way into shared memory; zeros
    outside the tensor.
    """
    tma.async_copy_global_to_shared(t_rows, [batch, head, start, 0], barrier, s_rows, pred=wanted)


@gluon.jit
def copy_vector(t_elements, start, barrier, s_elements, wanted):
    """Consecutive elements from `start` on, a multiple of 16 bytes."""
    tma.async_copy_global_to_shared(t_elements, [start], barrier, s_elements, pred=wanted)


@gluon.jit
def seen(o_query, o_key, near, far):
    """The mask of a tile; `o_query` and `o_key` broadcast against each other."""
    o_reach = tiles.reach(o_query, near, far, 0)
    return tiles.visible(o_query, o_key, near, o_reach)


@gluon.constexpr_function
def wide_layout(head_dim, warps):
    """Rows spread so that a thread holds 16 bytes of half precision."""
    return gl.BlockedLayout([1, 8], [32 // (head_dim // 8), head_dim // 8], [warps, 1], [1, 0])


@gluon.jit
def store_rows(p_rows, b_rows, first, stride, n_rows, ROWS: gl.constexpr, HEAD_DIM: gl.constexpr):
    """`b_rows` `[ROWS, D]` into the rows from `first` on, those before `n_rows`."""
    WIDE: gl.constexpr = wide_layout(HEAD_DIM, gl.num_warps())
    b_wide = gl.convert_layout(b_rows.to(p_rows.dtype.element_ty), WIDE)
    o_row = first + gl.arange(0, ROWS, gl.SliceLayout(1, WIDE))
    o_dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, WIDE))
    p_block = p_rows + o_row.to(gl.int64)[:, None] * stride + o_dim[None, :]
    gl.store(p_block, b_wide, mask=(o_row < n_rows)[:, None])


@gluon.jit
def store_zeros(p_rows, first, stride, n_rows, ROWS: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Zeros into the rows from `first` on, those before `n_rows`."""
    WIDE: gl.constexpr = wide_layout(HEAD_DIM, gl.num_warps())
    o_row = first + gl.arange(0, ROWS, gl.SliceLayout(1, WIDE))
    o_dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, WIDE))
    b_zeros = gl.full([ROWS, HEAD_DIM], 0.0, p_rows.dtype.element_ty, WIDE)
    p_block = p_rows + o_row.to(gl.int64)[:, None] * stride + o_dim[None, :]
    gl.store(p_block, b_zeros, mask=(o_row < n_rows)[:, None])


@gluon.jit
def load_rows(p_rows, first, stride, n_rows, ROWS: gl.constexpr, HEAD_DIM: gl.constexpr):
    """`[ROWS, D]` from the rows from `first` on, zeros from row `n_rows` on."""
    WIDE: gl.constexpr = wide_layout(HEAD_DIM, gl.num_warps())
    o_row = first + gl.arange(0, ROWS, gl.SliceLayout(1, WIDE))
    o_dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, WIDE))
    p_block = p_rows + o_row.to(gl.int64)[:, None] * stride + o_dim[None, :]
    return gl.load(p_block, mask=(o_row < n_rows)[:, None], other=0.0)
