"""The rules of the Hopper kernels: which calls they cover, and in what form they run.

Gluon, the language of these kernels, is imported only where a plan was made: it is experimental,
and another Triton may lack a part of it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cache, lru_cache

import torch
import triton

from ..call import Call, compute_capability
from ..config import LaunchConfig


class TileOrder(IntEnum):
    """The order of the blocks of all heads."""

    HEAD_MAJOR = 0
    ROUND_ROBIN = 1  # one block of each head after the other
    PAIRED = 2  # as ROUND_ROBIN, with a long and a short head sharing their slots


@dataclass(frozen=True)
class HopperLaunches:
    """The launches of the Hopper kernels; all gradients have one."""

    forward: LaunchConfig
    forward_persistent: LaunchConfig
    backward: LaunchConfig


@dataclass(frozen=True)
class HopperPlan:
    """How the Hopper kernels run a call.

    Args:
        launches: block sizes and warps.
        order: order of the blocks.
        persistent: whether the forward pass is the persistent kernel, for long bands. It takes the
            blocks of one head after the other whatever `order` says.
        split_backward: whether dQ and dK/dV are launched separately.
        fused_backward: whether all gradients come from five products per tile (`fused_backward.py`)
            instead of seven (`backward.py`).
        waves: programs of the persistent kernel per multiprocessor, one after another. With one,
            programs draw their blocks of queries from a counter.
    """

    launches: HopperLaunches
    order: TileOrder
    persistent: bool
    split_backward: bool
    fused_backward: bool = False
    waves: int = 1

    def __str__(self) -> str:
        forward = "persistent forward" if self.persistent else "forward"
        backward = "dQ, then dK and dV" if self.split_backward else "dQ, dK and dV in one launch"
        if self.fused_backward:
            backward = "dQ, dK and dV in five products per tile"
        return f"{forward}; {backward}; heads {self.order.name.lower().replace('_', ' ')}"


TRITON_VERSIONS = ("3.6", "3.7", "3.8", "3.9")
MIN_MEAN_DOCUMENT = 128  # tokens
# Queries of all heads of a call whose documents are looked for. About two thousand tokens of 16
# heads save as much time as that takes.
MIN_ROW_QUERIES = 1 << 15
# What the kernels need, as it stands in docs/backends.md.
NEEDS = {
    "vendor": "an NVIDIA GPU",
    "capability": "a GPU of compute capability 9.0 (Hopper)",
    "dtype": "float16 or bfloat16",
    "head_dim": "head_dim 64 or 128",
    "positions": "packed documents, or queries from position 0 with at most one `key_start` each; "
    "one for every query needs as many keys as queries, a multiple of 64, no prefix, and "
    f"{MIN_ROW_QUERIES:,} queries of all heads",
    "rows": "fewer than 2**31 query rows",
    "pages": "blocks of a paged cache of a multiple of 16 tokens",
    "memory": "inputs aligned to 16 bytes, without expanded dimensions",
    "triton": f"Triton {', '.join(TRITON_VERSIONS[:-1])} or {TRITON_VERSIONS[-1]}",
}
# By head_dim: one warpgroup, two or three programs on a multiprocessor. The plan counts with blocks
# of `BLOCK` queries, the fused backward has blocks of `keys_fused` keys. What the portable kernels
# get on the same GPU is in `triton/config.py`.
LAUNCHES = {
    64: HopperLaunches(LaunchConfig(64, 64, 4), LaunchConfig(128, 128, 4), LaunchConfig(64, 64, 4)),
    # Up to 168 registers, three programs of the forward pass fit on a multiprocessor.
    128: HopperLaunches(
        LaunchConfig(64, 64, 4, max_registers=168),
        LaunchConfig(128, 128, 4),
        LaunchConfig(64, 64, 4),
    ),
}
# By head_dim: registers with which three programs of dQ alone fit on a multiprocessor.
QUERY_GRADIENT_REGISTERS = {64: 168}
BLOCK = 64  # queries or keys
BOX = 16  # the fewest tokens that TMA copies at once
PREFIX_WIDTH = 16  # the longest prefix that has a step of its own (`prefix.py`)
MIN_MEAN_KEYS_PERSISTENT = 1400  # keys per query
MIN_MEAN_KEYS_OF_A_PART = 2000  # the same where blocks are dealt in advance
MIN_MEAN_KEYS_FUSED = 2000  # keys per query
MIN_PROGRAMS_FUSED = 8 * 132  # blocks of keys, of which a multiprocessor runs one at a time
# By head_dim: keys of a block whose dQ is summed in any order, 64 for each consumer.
KEYS_FUSED = {64: 192, 128: 128}
MIN_BLOCKS_PER_STEP_SPLIT = 160  # blocks of queries of a call, per block of keys of each
# Under context parallelism a multiprocessor runs this many shorter programs in sequence: NCCL's
# exchange beside them waits for the end of one alone.
WAVES_OF_A_PART = 8
PROGRAMS = 3 * 132  # programs of the forward pass that an H100 or H200 runs at once
CACHE_BYTES = 30 << 20  # half of an H200's L2 cache


def refusal(call: Call, *tensors: torch.Tensor) -> str | None:
    """The first need that a call on these tensors does not meet, or None if there is none."""
    reason = _refusal_of_shape(call)
    if reason is not None:
        return reason
    if not readable(*tensors):
        return NEEDS["memory"]
    if not triton_is_tested():
        return f"{NEEDS['triton']}, got {triton.__version__}"
    return None


def _refusal_of_shape(call: Call) -> str | None:
    """The same as far as it does not depend on tensors or on Triton."""
    reason = _refusal_of_heads(call.capability, call.dtype, call.head_dim)
    if reason is not None:
        return reason
    # Elsewhere a block may hold keys of two documents, or keys after the last query.
    if not call.has_one_start and not (has_documents(call) and call.prefix == 0):
        return NEEDS["positions"]
    if call.batch * call.heads * pitch(call.queries) >= 1 << 31:
        return NEEDS["rows"]
    if call.page % BOX:
        return f"{NEEDS['pages']}, got {call.page}"
    return None


def _refusal_of_heads(
    capability: tuple[int, int] | None, dtype: torch.dtype, head_dim: int
) -> str | None:
    """The same as far as it does not depend on the shape."""
    if torch.version.hip is not None:
        # ROCm reports capability 9 for MI200 and MI300.
        return f"{NEEDS['vendor']}, got ROCm {torch.version.hip}"
    if capability is None or capability[0] != 9:
        return f"{NEEDS['capability']}, got {capability}"
    if dtype.itemsize != 2:
        return f"{NEEDS['dtype']}, got {dtype}"
    if head_dim not in LAUNCHES:
        return f"{NEEDS['head_dim']}, got {head_dim}"
    return None


def covers(query: torch.Tensor) -> bool:
    """True if no need that depends on queries like this `[..., D]` alone is unmet."""
    capability = compute_capability(query.device)
    refused = _refusal_of_heads(capability, query.dtype, query.shape[-1])
    return refused is None and triton_is_tested()


def has_documents(call: Call) -> bool:
    """True if the documents of each row are looked for in its first keys (`documents.py`). That
    costs two launches more each way: worth it for many tokens. Both suites use the same statistics,
    whose rows must have no pitch of their own.
    """
    large = call.batch * call.heads * call.queries >= MIN_ROW_QUERIES
    return call.has_row_starts and call.queries % BLOCK == 0 and large


def max_documents(queries: int) -> int:
    """Documents that are looked for in a row; rows of shorter ones are left to the portable
    kernels. Every one of them costs a program that may find nothing to do. Their offsets, one more,
    are whole units of 16 bytes.
    """
    return (queries // MIN_MEAN_DOCUMENT + 2) | 3


def has_parts(call: Call) -> bool:
    """True if the programs of dQ compute dK and dV of the prefix, as `prefix.py` says."""
    return 0 < call.prefix <= PREFIX_WIDTH and call.n_documents == 0


def triton_is_tested() -> bool:
    """True if the kernels were tested with this release of Triton."""
    return _release(triton.__version__) in TRITON_VERSIONS


@cache
def _release(version: str) -> str:
    major, minor, *_ = version.split(".")
    return f"{major}.{minor}"


@cache
def warn_untested(version: str) -> None:
    """Warn once that an untested Triton costs speed."""
    warnings.warn(
        f"Triton {version} is not among the versions that the Hopper kernels were tested with "
        f"({', '.join(TRITON_VERSIONS)}). The portable kernels run instead: attention takes 1.5 to "
        "2 times as long.",
        stacklevel=2,
    )


def plan(call: Call, *tensors: torch.Tensor) -> HopperPlan | None:
    """The plan of a call on these tensors, or None if the Hopper kernels do not run it. Warns once
    if Triton's version is the only reason.
    """
    if "hopper plan" not in call.derived:
        call.derived["hopper plan"] = _plan_of_shape(call)
    found: HopperPlan | None = call.derived["hopper plan"]
    if found is None or not readable(*tensors):
        return None
    if triton_is_tested():
        return found
    warn_untested(triton.__version__)
    return None


def _plan_of_shape(call: Call) -> HopperPlan | None:
    if _refusal_of_shape(call) is not None:
        return None
    bounded = any(each is not None for each in call.positions)
    # Packed documents count as a batch of documents of mean length.
    documents = call.n_documents or call.batch
    keys = call.longest or call.keys
    if call.n_documents and not call.page:
        keys = -(-call.keys // call.n_documents)
    queries = keys if call.n_documents else call.queries
    found = _plan(call.intervals, documents, keys, queries, call.head_dim, bounded)
    if not call.has_all_keys:
        many = mean_keys(call.intervals, keys, queries) >= MIN_MEAN_KEYS_OF_A_PART
        found = replace(found, waves=WAVES_OF_A_PART, persistent=found.persistent and many)
    if use_fused(call):
        return replace(found, fused_backward=True)
    # The preprocess kernel reads where documents are before it waits for the kernel before it.
    return found if call.has_one_start else replace(found, split_backward=True)


def readable(*tensors: torch.Tensor) -> bool:
    """True if TMA can read all tensors of half precision: starts and strides aligned to 16 bytes,
    no expanded dimension.
    """
    for tensor in tensors:
        if tensor.data_ptr() & 15 or not _has_aligned_strides(tensor.shape, tensor.stride()):
            return False
    return True


@lru_cache(maxsize=1024)
def _has_aligned_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    return all(
        size < 2 or (stride & 7 == 0 and stride != 0)
        for size, stride in zip(shape[:3], strides[:3])
    )


@lru_cache(maxsize=1024)
def _plan(
    intervals: tuple[int, ...], batch: int, keys: int, queries: int, head_dim: int, bounded: bool
) -> HopperPlan:
    order = tile_order(intervals, batch, keys, head_dim)
    if bounded:  # only the kernels of blocks of 64 know where a sequence ends
        order = min(order, TileOrder.ROUND_ROBIN)
    return HopperPlan(
        launches=LAUNCHES[head_dim],
        order=order,
        persistent=not bounded
        and order == TileOrder.HEAD_MAJOR
        and use_persistent(intervals, keys, head_dim, queries),
        split_backward=split_backward(intervals, batch, keys, queries),
    )


def pitch(queries: int) -> int:
    """Rows of `lse_log2` and `delta` per head: whole blocks, as TMA reads them. The rows of each
    head start at a multiple of 16 bytes.
    """
    return -(-queries // BLOCK) * BLOCK


@lru_cache(maxsize=1024)
def mean_keys(intervals: tuple[int, ...], keys: int, queries: int | None = None) -> float:
    """Number of keys that a query of any head sees on average.

    Args:
        intervals: `near, far, near, far` of each head; `near == far` is an empty interval. Edges
            are negative for keys before the queries.
        keys: keys of each batch entry.
        queries: queries of each batch entry; by default as many.
    """
    rows = keys if queries is None else queries

    def ramp(length: int) -> int:
        """Sum of `min(i, keys)` over `i` from 1 to `length`."""
        within = max(0, min(length, keys))
        return within * (within + 1) // 2 + keys * max(0, length - keys)

    def pairs(near: int) -> int:
        """Pairs at distances from `near` on."""
        return ramp(rows - near) - ramp(-near)

    seen = sum(pairs(near) - pairs(far) for near, far in zip(intervals[::2], intervals[1::2]))
    return seen / (len(intervals) // 4 * max(1, rows))


def use_persistent(
    intervals: tuple[int, ...], keys: int, head_dim: int, queries: int | None = None
) -> bool:
    """True if queries see enough keys on average for the persistent forward pass to be faster. That
    was measured with head_dim 128 only. Arguments as in `mean_keys`.
    """
    return head_dim == 128 and mean_keys(intervals, keys, queries) >= MIN_MEAN_KEYS_PERSISTENT


def keys_fused(call: Call) -> int:
    """Keys of a block of `fused_backward.py`. Beside three consumers there are no registers for the
    warps that keep turns.
    """
    return 2 * BLOCK if call.deterministic else KEYS_FUSED[call.head_dim]


def can_fuse(call: Call) -> bool:
    """True if `fused_backward.py` covers a call that the Hopper kernels run. Elsewhere its blocks
    would hold keys of other sequences.
    """
    bounded = any(each is not None for each in call.positions)
    has_places = call.keys == call.queries or not call.has_all_keys
    return call.prefix == 0 and call.query_start == 0 and has_places and not bounded


def use_fused(call: Call) -> bool:
    """True if five products per tile are faster: where the sums of dQ in memory cost less than two
    products, for long bands, and many blocks of keys share the GPU.
    """
    programs = call.batch * call.key_heads * -(-call.keys // keys_fused(call))
    return (
        can_fuse(call)
        and programs >= MIN_PROGRAMS_FUSED
        and mean_keys(call.intervals, call.keys, call.queries) >= MIN_MEAN_KEYS_FUSED
    )


def split_backward(
    intervals: tuple[int, ...], batch: int, keys: int, queries: int | None = None
) -> bool:
    """True if dQ and dK/dV should be launched separately instead of in one grid.

    Launched separately, dQ computes `delta` itself and the preprocess kernel is not needed, but the
    GPU drains twice. Worth it for many short blocks, at least enough to fill the GPU. Arguments as
    in `mean_keys`, batch B.
    """
    rows = keys if queries is None else queries
    blocks = batch * (len(intervals) // 4) * -(-rows // BLOCK)
    steps = mean_keys(intervals, keys, queries) / BLOCK
    return blocks >= max(steps * MIN_BLOCKS_PER_STEP_SPLIT, PROGRAMS)


def tile_order(intervals: tuple[int, ...], batch: int, keys: int, head_dim: int) -> TileOrder:
    """The order of the blocks, in half precision.

    In round-robin order the shortest blocks of all heads come last, and the GPU runs out of work at
    once. But the keys and values of all heads are in use at the same time: worth it while they fit
    the L2 cache. Blocks that only one of two intervals reaches are short too, and pairs leave them
    for the end. Finding a pair's tile takes a program longer: worth it only in the forward pass,
    with few blocks, and about the same work in all heads.

    Args:
        intervals: `near, far, near, far` of each head; `near == far` is an empty interval.
        batch: B.
        keys: keys of each batch entry.
        head_dim: D.
    """
    head_batches = batch * (len(intervals) // 4)
    in_flight = -(-PROGRAMS // head_batches) * BLOCK  # queries of a head that run at the same time
    used = 0
    widths = []
    for first in range(0, len(intervals), 4):
        edges = [min(edge, keys) for edge in intervals[first : first + 4]]
        both = (edges[1] - edges[0], edges[3] - edges[2])
        used += min(sum(width + in_flight for width in both if width), keys)
        widths.append(sum(both))
    bytes_per_token = 2 * head_dim * 2  # a key and a value
    if batch * used * bytes_per_token > CACHE_BYTES:
        return TileOrder.HEAD_MAJOR
    few = head_batches * -(-keys // BLOCK) <= 2 * PROGRAMS
    even = max(widths) * len(widths) < 2 * sum(widths)
    return TileOrder.PAIRED if few and even and any(intervals[3::4]) else TileOrder.ROUND_ROBIN
