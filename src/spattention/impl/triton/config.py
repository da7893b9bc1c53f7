"""How a kernel is launched, chosen by a written rule; nothing is tried out during a user's step.

`spattention tune` measures other choices and prints them in this form.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

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
DECODE_COUNTS = (
    "query_start_stride",
    "key_start_stride_b",
    "key_start_stride_t",
    "n_chunks",
    "n_blocks",
    "n_heads",
    "group",
    "n_queries",
    "n_keys",
    "query_start",
)
HOPPER_COUNTS = (
    "n_heads",
    "group",
    "n_batch",
    "n_slots",
    "n_queries",
    "n_keys",
    "order",
    "in_turn",
    "pitch",
    "n_key_slots",
    "n_tiles",
    "key_programs",
)


@dataclass(frozen=True)
class LaunchConfig:
    """One kernel's launch.

    Args:
        block_m: queries of a block.
        block_n: keys of a block.
        num_warps: warps of a program.
        num_stages: blocks of keys (or queries) in flight; the Hopper kernels have two, but for the
            one for long bands.
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


@dataclass(frozen=True)
class HopperLaunches:
    """The launches of the Hopper kernels; all gradients come from one. `long` is the forward pass
    of long bands.
    """

    forward: LaunchConfig
    long: LaunchConfig
    gradient: LaunchConfig


@dataclass(frozen=True)
class DecodeLaunch:
    """The launch for few queries, and into how many chunks their keys are cut.

    Args:
        block_m: queries of a block; 1 sums products in registers, 16 and more are matrix products.
        block_n: keys of a block.
        num_warps: warps of a program.
        num_stages: blocks of keys in flight.
        programs: programs on a multiprocessor that short bands are cut for.
        longest: keys that a program reads at most, a power of two times block_n.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs: int = 8
    longest: int = 512

    def chunk(self, keys: int, multiprocessors: int) -> int:
        """Keys of a chunk: `block_n` times the least power of two that leaves no more than
        `programs` chunks for each multiprocessor, at most `longest`.

        Args:
            keys: of all key/value heads of all rows together.
            multiprocessors: of the GPU.
        """
        chunk = self.block_n
        while chunk < self.longest and keys > chunk * self.programs * multiprocessors:
            chunk *= 2
        return chunk


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
# The Hopper kernels, by head_dim: one warpgroup, two or three programs on a multiprocessor.
HOPPER = {
    64: HopperLaunches(LaunchConfig(64, 64, 4), LaunchConfig(128, 128, 4), LaunchConfig(64, 64, 4)),
    128: HopperLaunches(
        LaunchConfig(64, 64, 4), LaunchConfig(128, 128, 4), LaunchConfig(64, 64, 4)
    ),
}
HOPPER_LONG = 2000  # keys that a query sees on average
HOPPER_PLACES = 3 * 132  # programs of the forward pass that an H100 or H200 runs at once
HOPPER_APART = 160  # blocks of queries of a call, for each step that one takes
HOPPER_BLOCK = 64
HOPPER_CACHE = 30 << 20  # bytes, half of an H200's second level

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

# Decoding with one query per key/value head in single precision, by BLOCK_D.
ONE_SINGLE = {
    16: DecodeLaunch(1, 128, 4, 1),
    32: DecodeLaunch(1, 64, 4, 1),
    64: DecodeLaunch(1, 64, 4, 1),
    128: DecodeLaunch(1, 32, 4, 1),
    256: DecodeLaunch(1, 16, 4, 1),
}
# Several, or in half precision any number, with the most rows that a block may have.
FEW_HALF = {
    16: DecodeLaunch(64, 64, 4, 2),
    32: DecodeLaunch(64, 64, 4, 2),
    64: DecodeLaunch(64, 64, 4, 2),
    128: DecodeLaunch(64, 64, 4, 2),
    256: DecodeLaunch(32, 32, 4, 2),
}
FEW_SINGLE = {
    16: DecodeLaunch(32, 32, 4, 1),
    32: DecodeLaunch(32, 32, 4, 1),
    64: DecodeLaunch(32, 32, 4, 1),
    128: DecodeLaunch(16, 16, 4, 1),
    256: DecodeLaunch(16, 16, 4, 1),
}
# On Hopper another block of keys is in flight.
FEW_HALF_HOPPER = FEW_HALF | {128: DecodeLaunch(64, 64, 4, 3)}
ONE_INTERPRETED = DecodeLaunch(1, 16, 1, 1, longest=32)
FEW_INTERPRETED = DecodeLaunch(64, 16, 1, 1, longest=32)
BLOCK_P = 16  # chunks that are joined at a time


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
) -> HopperLaunches | None:
    """The launches of the Hopper kernels: half precision, head_dim 64 and 128, compute capability
    9.0, Triton 3.6. None elsewhere.
    """
    if capability is None or capability[0] != 9 or itemsize != 2:
        return None
    # Gluon is experimental: these kernels are written for, and tested with, one release of it.
    if not triton.__version__.startswith(HOPPER_TRITON):
        return None
    return HOPPER.get(head_dim)


@lru_cache(maxsize=1024)
def mean_keys(intervals: tuple[int, ...], keys: int) -> float:
    """How many keys a query of any head sees on average.

    Args:
        intervals: `near, far, near, far` of each head, of which `near == far` is none.
        keys: of each row, as many as queries.
    """

    def pairs(width: int) -> int:
        """Of distances below `width`."""
        width = min(width, keys)
        return width * keys - width * (width - 1) // 2

    seen = sum(pairs(far) - pairs(near) for near, far in zip(intervals[::2], intervals[1::2]))
    return seen / (len(intervals) // 4 * keys)


def is_long(intervals: tuple[int, ...], keys: int, head_dim: int) -> bool:
    """Whether queries see so many keys on average that the forward pass for long bands is the
    faster one. Only with head_dim 128 was that measured. Arguments as in `mean_keys`.
    """
    return head_dim == 128 and mean_keys(intervals, keys) >= HOPPER_LONG


def is_apart(intervals: tuple[int, ...], batch: int, keys: int) -> bool:
    """Whether dQ, then dK and dV are better launched by themselves: dQ then brings what dK and dV
    need of each row, for which another kernel would read output and gradient once more. That time
    falls with the steps of a block; the time in which the GPU runs out of work twice, with the
    number of blocks, which must at least fill it. Arguments as in `mean_keys`, batch B.
    """
    blocks = batch * (len(intervals) // 4) * -(-keys // HOPPER_BLOCK)
    steps = mean_keys(intervals, keys) / HOPPER_BLOCK
    return blocks >= max(steps * HOPPER_APART, HOPPER_PLACES)


@lru_cache(maxsize=1024)
def order(intervals: tuple[int, ...], batch: int, keys: int, head_dim: int, itemsize: int) -> int:
    """The order of the blocks of the Hopper kernels: 0 for one head after the other, 1 for heads in
    turn, 2 for heads in pairs, the blocks that the last interval of their head reaches first.

    In turn, the shortest blocks of all heads come last, and the GPU runs out of work at once. But
    the keys and values of all heads are in use at the same time: worth it while the cache holds
    them. Blocks that only one of two intervals reaches are short too; pairs leave them for the end.
    That takes a program longer to begin: worth it in the forward pass alone, where blocks are few,
    and of about the same work in all heads.

    Args:
        intervals: `near, far, near, far` of each head, of which `near == far` is none.
        batch: B.
        keys: of each row of the batch.
        head_dim: D.
        itemsize: bytes of an element.
    """
    rows = batch * (len(intervals) // 4)
    ahead = -(-HOPPER_PLACES // rows) * HOPPER_BLOCK  # queries of a head that are in work at once
    used = 0
    widths = []
    for first in range(0, len(intervals), 4):
        edges = [min(edge, keys) for edge in intervals[first : first + 4]]
        both = (edges[1] - edges[0], edges[3] - edges[2])
        used += min(sum(width + ahead for width in both if width), keys)
        widths.append(sum(both))
    if batch * used * 2 * head_dim * itemsize > HOPPER_CACHE:
        return 0
    few = rows * -(-keys // HOPPER_BLOCK) <= 2 * HOPPER_PLACES
    even = max(widths) * len(widths) < 2 * sum(widths)
    return 2 if few and even and any(intervals[3::4]) else 1


def decode_launch(
    itemsize: int, head_dim: int, rows: int, capability: tuple[int, int] | None
) -> DecodeLaunch:
    """The rule for few queries: they are rows of matrix products, at least 16 at once and at most
    what the table says. Only one row in single precision sums in registers: in half precision the
    tensor cores, though 15 of 16 rows are empty, keep the keys streaming best.

    Args:
        itemsize: bytes of an element, 2 or 4.
        head_dim: 1 to 256.
        rows: queries that share a key/value head.
        capability: CUDA compute capability; None for Triton's interpreter.
    """
    width = block_d(head_dim)
    if rows == 1 and (itemsize == 4 or capability is None):
        return ONE_INTERPRETED if capability is None else ONE_SINGLE[width]
    if capability is None:
        launch = FEW_INTERPRETED
    elif itemsize == 4:
        launch = FEW_SINGLE[width]
    else:
        launch = (FEW_HALF_HOPPER if capability[0] == 9 else FEW_HALF)[width]
    return replace(launch, block_m=min(launch.block_m, block_d(rows)))
