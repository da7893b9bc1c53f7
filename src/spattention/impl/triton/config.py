"""How a kernel is launched, chosen by a written rule; nothing is tried out during a user's step.

`spattention tune` measures other choices and prints them in this form.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton

# Arguments of the kernels whose value must not choose a compiled variant: a new length or start
# compiles nothing.
COUNTS = (
    "query_start_stride",
    "key_start_stride_b",
    "key_start_stride_t",
    "n_heads",
    "group",
    "n_batch",
    "n_documents",
    "n_slots",
    "n_queries",
    "n_keys",
    "query_start",
)
HOPPER_COUNTS = ("n_heads", "group", "n_batch", "n_slots", "n_queries", "n_keys", "pitch")


@dataclass(frozen=True)
class LaunchConfig:
    """One kernel's launch.

    Args:
        block_m: queries of a block.
        block_n: keys of a block.
        num_warps: warps of a program.
        num_stages: blocks of keys (or queries) in flight; the Hopper kernels always have two.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int = 2


@dataclass(frozen=True)
class Launches:
    """The launches of the three kernels."""

    forward: LaunchConfig
    query_gradient: LaunchConfig
    key_gradient: LaunchConfig


INTERPRETED = Launches(
    forward=LaunchConfig(16, 16, 1, 1),
    query_gradient=LaunchConfig(16, 16, 1, 1),
    key_gradient=LaunchConfig(16, 16, 1, 1),
)

# The portable kernels in half precision on Hopper (compute capability 9.0), by BLOCK_D.
HOPPER_HALF = {
    64: Launches(
        forward=LaunchConfig(64, 64, 4, 3),
        query_gradient=LaunchConfig(64, 64, 4, 3),
        key_gradient=LaunchConfig(64, 64, 4, 3),
    ),
    128: Launches(
        forward=LaunchConfig(64, 64, 4, 2),
        query_gradient=LaunchConfig(64, 64, 4, 2),
        key_gradient=LaunchConfig(64, 64, 4, 2),
    ),
}

HOPPER_TRITON = "3.6."
# The Hopper kernels, by head_dim: one warpgroup, two programs on a multiprocessor.
HOPPER = {
    64: Launches(LaunchConfig(64, 64, 4), LaunchConfig(64, 64, 4), LaunchConfig(64, 64, 4)),
    128: Launches(LaunchConfig(64, 64, 4), LaunchConfig(64, 64, 4), LaunchConfig(64, 64, 4)),
}

# Everything else: small blocks that fit the shared memory and registers of any GPU with 99 KiB per
# program.
HALF = {
    16: LaunchConfig(64, 64, 4, 2),
    32: LaunchConfig(64, 64, 4, 2),
    64: LaunchConfig(64, 64, 4, 2),
    128: LaunchConfig(64, 32, 4, 2),
    256: LaunchConfig(32, 32, 4, 1),
}
SINGLE = {
    16: LaunchConfig(32, 32, 4, 1),
    32: LaunchConfig(32, 32, 4, 1),
    64: LaunchConfig(32, 32, 4, 1),
    128: LaunchConfig(32, 32, 4, 1),
    256: LaunchConfig(16, 16, 4, 1),
}


def pitch(queries: int) -> int:
    """Rows of `base` and `delta` per head: a multiple of four, so that each head's rows begin at 16
    bytes.
    """
    return -(-queries // 4) * 4


def block_d(head_dim: int) -> int:
    """The power of two, at least 16, that a kernel pads head_dim to."""
    return max(16, 1 << (head_dim - 1).bit_length())


def launches(itemsize: int, head_dim: int, capability: tuple[int, int] | None) -> Launches:
    """The rule: the interpreter gets 16 x 16; half precision on Hopper its measured table; the rest
    small blocks.

    Args:
        itemsize: bytes of an element, 2 or 4.
        head_dim: 1 to 256.
        capability: CUDA compute capability; None for Triton's interpreter.
    """
    if capability is None:
        return INTERPRETED
    width = block_d(head_dim)
    if itemsize == 2 and capability[0] == 9 and width in HOPPER_HALF:
        return HOPPER_HALF[width]
    launch = (HALF if itemsize == 2 else SINGLE)[width]
    return Launches(launch, launch, launch)


def hopper_launches(
    itemsize: int, head_dim: int, capability: tuple[int, int] | None
) -> Launches | None:
    """The launches of the Hopper kernels: half precision, head_dim 64 and 128, compute capability
    9.0, Triton 3.6. None elsewhere.
    """
    if capability is None or capability[0] != 9 or itemsize != 2:
        return None
    # Gluon is experimental: these kernels are written for, and tested with, one release of it.
    if not triton.__version__.startswith(HOPPER_TRITON):
        return None
    return HOPPER.get(head_dim)
