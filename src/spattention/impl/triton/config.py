"""Block sizes and warps of the portable kernels, chosen by a written rule. Nothing is tried out
during a user's step.

`spattention tune` measures other choices and prints them in this form.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

# Options of every kernel. Triton announced that it will change this default.
OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class LaunchConfig:
    """One kernel's launch.

    Args:
        block_m: queries of a block.
        block_n: keys of a block.
        num_warps: warps of a program.
        num_stages: blocks of keys (or queries) in flight. Of the Hopper kernels only the persistent
            forward pass has another number than two.
        max_registers: limit of the registers of a thread; None for the compiler's choice.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int = 2
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Triton's options, without `num_stages`, which Gluon kernels do not have."""
        options = {"num_warps": self.num_warps, **OPTIONS}
        return options if self.max_registers is None else options | {"maxnreg": self.max_registers}


@dataclass(frozen=True)
class Launches:
    """The launches of the three portable kernels."""

    forward: LaunchConfig
    query_gradient: LaunchConfig
    key_gradient: LaunchConfig


INTERPRETED = Launches(
    forward=LaunchConfig(16, 16, 1, 1),
    query_gradient=LaunchConfig(16, 16, 1, 1),
    key_gradient=LaunchConfig(16, 16, 1, 1),
)

# Half precision on Hopper and datacenter Blackwell (compute capability 9.x and 10.x), by BLOCK_D.
# Measured on Hopper. On Blackwell, blocks below 64 rows would miss its tensor core instructions.
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
# With first keys the forward pass and dQ have a second loop. Its registers must not keep three
# programs from sharing a multiprocessor.
HOPPER_HALF_FIRST_KEYS = HOPPER_HALF | {
    64: replace(
        HOPPER_HALF[64],
        forward=LaunchConfig(64, 64, 4, 3, max_registers=168),
        query_gradient=LaunchConfig(64, 64, 4, 3, max_registers=168),
    )
}
# Everything else: small blocks that fit the shared memory and registers of any GPU with 99 KiB per
# program, or with 64 KiB in half precision on AMD's.
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


# Queries of a program that computes the gradients of a prefix: about as much work as that of other
# programs.
PREFIX_CHUNK = 1024
PREFIX_CHUNK_INTERPRETED = 32


def prefix_chunk(capability: tuple[int, int] | None) -> int:
    """Queries of a program of `portable/prefix_gradient.py`; `capability` as in `launches`."""
    return PREFIX_CHUNK_INTERPRETED if capability is None else PREFIX_CHUNK


@lru_cache(maxsize=64)
def prefix_launch(launch: LaunchConfig, prefix: int) -> LaunchConfig:
    """The launch of `portable/prefix_gradient.py` where all queries see one prefix: that of dK and
    dV, with no more keys of a block than the prefix needs.
    """
    return replace(launch, block_n=min(launch.block_n, block_d(prefix)))


def block_d(head_dim: int) -> int:
    """The power of two, at least 16, that a kernel pads head_dim to."""
    return max(16, 1 << (head_dim - 1).bit_length())


@lru_cache(maxsize=256)
def launches(
    itemsize: int, head_dim: int, capability: tuple[int, int] | None, first_keys: bool = False
) -> Launches:
    """The launches of the portable kernels: 16 x 16 blocks for the interpreter, a measured table
    for half precision on Hopper and Blackwell, small blocks for the rest.

    Args:
        itemsize: bytes of an element, 2 or 4.
        head_dim: 1 to 256.
        capability: CUDA compute capability, (0, 0) for AMD; None for Triton's interpreter.
        first_keys: whether the call has `key_start`.
    """
    if capability is None:
        return INTERPRETED
    width = block_d(head_dim)
    if itemsize == 2 and capability[0] in (9, 10) and width in HOPPER_HALF:
        return (HOPPER_HALF_FIRST_KEYS if first_keys else HOPPER_HALF)[width]
    launch = (HALF if itemsize == 2 else SINGLE)[width]
    # With 4 warps, dQ in single precision keeps kilobytes per thread in memory.
    warps = 8 if itemsize == 4 and width >= 128 else launch.num_warps
    return Launches(launch, replace(launch, num_warps=warps), launch)
