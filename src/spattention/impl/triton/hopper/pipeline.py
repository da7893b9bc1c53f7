# mypy: allow-untyped-defs
"""Barriers and TMA copies of the Hopper kernels, in Gluon.

On Hopper, TMA copies blocks into shared memory and warpgroups multiply from there, both
asynchronously. Triton schedules that by itself, but waits for each product before it continues.
These kernels say when to wait, so that the softmax of one block runs during the products of
another.

    M = BLOCK_M queries of a block   N = BLOCK_N keys of a block   D head_dim
    p_ pointer   t_ tensor descriptor   s_ block in shared memory   b_ block in registers
    o_ offset   m_ mask

One warpgroup (4 warps) owns 64 rows. Two or three such programs share a multiprocessor: one
multiplies while another computes exponentials. Blocks go through a ring of one or more buffers; `n`
counts the blocks that went through it.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

# Triton 3.8 renamed the copy. The old name still exists in 3.9, and raises.
_copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

# All threads of a partition wait for one another. Triton 3.7 renamed it.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


class Ring(NamedTuple):
    """Buffers of a ring and two barriers for each: `full` when a copy is complete, `empty` when all
    consumers have released it.
    """

    buffers: Any
    full: Any
    empty: Any


@gluon.jit
def allocate_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr = 1):
    """`[COUNT, 1]` initialised barriers, each completed by a copy or by `ARRIVALS` arrivals."""
    s_barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(s_barriers.index(i), count=ARRIVALS)
    fence_async_shared()
    return s_barriers


@gluon.jit
def allocate_ring(
    STAGES: gl.constexpr,
    TOKENS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    DTYPE: gl.constexpr,
    CONSUMERS: gl.constexpr,
):
    """A `Ring` of `STAGES` buffers `[TOKENS, HEAD_DIM]`."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, HEAD_DIM], DTYPE)
    s_buffers = gl.allocate_shared_memory(DTYPE, [STAGES, TOKENS, HEAD_DIM], LAYOUT)
    return Ring(s_buffers, allocate_barriers(STAGES), allocate_barriers(STAGES, CONSUMERS))


@gluon.jit
def expect_tx(s_full, n, BYTES: gl.constexpr, pred):
    """Announce the copies of block `n`, `BYTES` in all, and return the barrier that they complete.
    Nothing happens unless `pred`.
    """
    barrier = s_full.index(n % s_full.shape[0])
    mbarrier.expect(barrier, BYTES, pred=pred)
    return barrier


@gluon.jit
def consumer_wait(s_full, n):
    """Wait until block `n` is in its buffer."""
    STAGES: gl.constexpr = s_full.shape[0]
    mbarrier.wait(s_full.index(n % STAGES), (n // STAGES) & 1)


@gluon.jit
def producer_acquire(s_empty, n):
    """Wait until the buffer of block `n` is free: until the block before it was released."""
    STAGES: gl.constexpr = s_empty.shape[0]
    mbarrier.wait(s_empty.index(n % STAGES), (n // STAGES + 1) & 1)


@gluon.jit
def consumer_release(s_empty, n):
    """Release block `n`: this consumer reads it no more."""
    mbarrier.arrive(s_empty.index(n % s_empty.shape[0]))


@gluon.jit
def invalidate(s_barriers):
    """Invalidate barriers at the end of a kernel, so that nothing else uses their memory before.

    For Triton a barrier's lifetime ends at its last wait, and other values may then use its memory.
    PTX forbids that before `mbarrier.inval`, and values were lost when another process interrupted
    the kernel there (tests/gpu/test_gpu_shared.py).
    """
    COUNT: gl.constexpr = s_barriers.shape[0]
    for i in gl.static_range(COUNT):
        mbarrier.invalidate(s_barriers.index(i))


@gluon.jit
def invalidate_ring(ring):
    """Invalidate both barriers of a ring's buffers, as `invalidate` does."""
    invalidate(ring.full)
    invalidate(ring.empty)


@gluon.jit
def copy_tokens(t_tensor, batch, head, start, barrier, s_tokens, pred):
    """Start to copy tokens from `start` on of a `[B, H, tokens, D]` tensor into shared memory;
    zeros outside the tensor.
    """
    _copy(t_tensor, [batch, head, start, 0], barrier, s_tokens, pred=pred)


@gluon.jit
def copy_vector(t_vector, start, barrier, s_vector, pred):
    """Start to copy consecutive elements from `start` on, a multiple of 16 bytes."""
    _copy(t_vector, [start], barrier, s_vector, pred=pred)
