"""From tensors to launched kernels: the table of bands, strides, descriptors and grids."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

from . import tiles
from .compiled import Kernel, kinds
from .config import (
    HopperLaunches,
    LaunchConfig,
    block_d,
    hopper_launches,
    is_apart,
    is_long,
    launches,
    order,
    pitch,
)
from .portable.backward import key_gradient_kernel, query_gradient_kernel
from .portable.forward import forward_kernel

LOG2_E = math.log2(math.e)
MISSING, LONGEST = tiles.MISSING.value, tiles.MAX_POSITION.value
_forward = Kernel(forward_kernel)
_query_gradient = Kernel(query_gradient_kernel)
_key_gradient = Kernel(key_gradient_kernel)
# Pure constants of a pattern, on their device.
_tables: dict[tuple[tuple[int, ...], int, torch.device], torch.Tensor] = {}


def band_table(intervals: Sequence[int], key_heads: int, device: torch.device) -> torch.Tensor:
    """int32 `[2, H, 8]` on the device: rows `head, near, far, near, far, 0, 0, 0`, those with most
    work first.

    `table[0]` is in the order of the query heads' work, `table[1]` in that of the key heads, whose
    query heads stand together. Made once per (pattern, device). Raises RuntimeError if that would
    be inside the capture of a CUDA graph, where the copy is not allowed.
    """
    key = (tuple(intervals), key_heads, device)
    table = _tables.get(key)
    if table is None:
        table = constant(_table(key[0], key_heads), device)
        _tables[key] = table
    return table


def constant(rows: list[Any], device: torch.device) -> torch.Tensor:
    """An int32 tensor that is kept for good.

    Raises RuntimeError inside the capture of a CUDA graph. Compiled code warms up inside the memory
    of the graph that it is about to capture, and takes that memory back: the tensor is made by a
    thread of its own, which does not allocate there.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the first call with a pattern must come before the capture of a CUDA graph: "
            "call once to warm up"
        )
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(torch.tensor, rows, dtype=torch.int32, device=device).result()


def _table(intervals: tuple[int, ...], key_heads: int) -> list[list[list[int]]]:
    rows, work = [], []
    for head in range(len(intervals) // 4):
        row = [head]
        edges = intervals[4 * head : 4 * head + 4]
        for near, far in (edges[:2], edges[2:]):
            if near < far:
                row += [min(near, MISSING), min(far, LONGEST)]
            else:
                row += [MISSING, MISSING]
        rows.append([*row, 0, 0, 0])
        work.append(edges[1] - edges[0] + edges[3] - edges[2])
    group = len(rows) // key_heads
    by_head = sorted(rows, key=lambda row: -work[row[0]])
    members = [range(first, first + group) for first in range(0, len(rows), group)]
    members.sort(key=lambda heads: -sum(work[head] for head in heads))
    return [by_head, [rows[head] for heads in members for head in heads]]


def unit_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied only if a row of head_dim is not contiguous."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _grid_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    return tensor.stride()[:3]


def _describable(*tensors: torch.Tensor) -> bool:
    """Whether the copy engine can read the rows of all: 16-byte aligned starts and strides, no
    expanded dimension.
    """
    rest = 16 // tensors[0].element_size() - 1
    for tensor in tensors:
        if tensor.data_ptr() & 15:
            return False
        for length, stride in zip(tensor.shape[:3], tensor.stride()):
            if length > 1 and (stride == 0 or stride & rest):
                return False
    return True


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """As the current one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@cache
def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """None for the CPU, where Triton's interpreter runs."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def check_start(query_start: int) -> None:
    """Raises ValueError for a position that the kernels, which count in 32 bits, do not know."""
    if query_start > LONGEST:
        raise ValueError(f"`query_start` must be at most {LONGEST} in kernels, got {query_start}")


def start_strides(
    query_starts: torch.Tensor | None, key_start: torch.Tensor | None
) -> tuple[int, int, int]:
    """Strides of `query_starts` `[]` or `[B]` along B, and of `key_start` `[B]` or `[B, Q]` along
    both; 0 where all rows or queries share one.
    """
    row = 0 if query_starts is None or query_starts.dim() == 0 else query_starts.stride(0)
    if key_start is None:
        return row, 0, 0
    return row, key_start.stride(0), key_start.stride(1) if key_start.dim() == 2 else 0


def scaled(scale: float, precise: bool) -> float:
    """In powers of two, or of e if `precise`. A scale of 0 becomes too small to matter, because
    -inf * 0 would be NaN.
    """
    return scale * (1.0 if precise else LOG2_E) if scale else 1e-30


class Call:
    """What the three launches of a call share."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        intervals: Sequence[int],
        query_start: int,
        query_starts: torch.Tensor | None,
        key_start: torch.Tensor | None,
        offsets_q: torch.Tensor | None,
        offsets_k: torch.Tensor | None,
        scale: float,
    ) -> None:
        check_start(query_start)
        batch, heads, queries, head_dim = query.shape
        self.packed = offsets_q is not None
        self.documents = 0 if offsets_q is None else offsets_q.shape[0] - 1
        self.batch, self.heads, self.key_heads = batch, heads, key.shape[1]
        self.queries, self.keys = queries, key.shape[2]
        self.intervals = tuple(intervals)
        self.bands = band_table(self.intervals, self.key_heads, query.device)
        self.positions = (query_starts, key_start, offsets_q, offsets_k)
        self.block_d = block_d(head_dim)
        self.start_strides = start_strides(query_starts, key_start)
        self.query_start = query_start
        precise = query.dtype == torch.float32
        self.scale = scaled(scale, precise)
        capability = compute_capability(query.device)
        self.launches = launches(query.element_size(), head_dim, capability)
        # The copy engine reads whole blocks, which may begin before a range. With queries from
        # position 0 and no first keys, some query sees every key there; otherwise they might hold
        # anything, NaN included, and must not be read.
        open_ranges = (
            offsets_q is None and query_starts is None and key_start is None and query_start == 0
        )
        rows = batch * heads * pitch(queries)
        self.hopper = (
            hopper_launches(query.element_size(), head_dim, capability)
            if open_ranges and rows < 1 << 31
            else None
        )
        self.order = 0
        self.long = self.apart = False
        if self.hopper is not None:
            self.order = order(self.intervals, batch, self.keys, head_dim, 2)
            self.long = self.order == 0 and is_long(self.intervals, self.keys, head_dim)
            self.apart = is_apart(self.intervals, batch, self.keys)
        self.device = query.device
        self.constants = {
            "HEAD_DIM": head_dim,
            "BLOCK_D": self.block_d,
            "INTERVALS": 2 if any(intervals[3::4]) else 1,
            "PACKED": self.packed,
            "START_ON_DEVICE": query_starts is not None,
            "HAS_KEY_START": key_start is not None,
            "PRECISE": precise,
        }

    def depends(self, *tensors: torch.Tensor | None) -> Hashable:
        """What a launch with these tensors depends on, as `Kernel` asks."""
        strides = tuple([None if tensor is None else tensor.stride() for tensor in tensors])
        return (
            self.device,
            kinds(*tensors, *self.positions),
            strides,
            self.start_strides,
        )

    def counts(self, slots: int) -> tuple[int | float, ...]:
        return (
            *self.start_strides,
            self.heads,
            self.heads // self.key_heads,
            self.batch,
            self.documents,
            slots,
            self.queries,
            self.keys,
            self.query_start,
            self.scale,
        )

    def options(self, launch: LaunchConfig) -> dict[str, Any]:
        """The launch as arguments of a kernel."""
        return {
            "BLOCK_M": launch.block_m,
            "BLOCK_N": launch.block_n,
            "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
        }

    def hopper_counts(self, slots: int) -> tuple[int, ...]:
        return (
            self.heads,
            self.heads // self.key_heads,
            self.batch,
            slots,
            self.queries,
            self.keys,
        )

    def hopper_options(self, launch: LaunchConfig) -> dict[str, Any]:
        return {
            "HEAD_DIM": self.block_d,
            "BLOCK_M": launch.block_m,
            "BLOCK_N": launch.block_n,
            "INTERVALS": self.constants["INTERVALS"],
            "num_warps": launch.num_warps,
        }

    def hopper_for(self, *tensors: torch.Tensor) -> HopperLaunches | None:
        """The launches of the Hopper kernels, if they cover the call and can read these tensors."""
        if self.hopper is None or not _describable(*tensors):
            return None
        # Descriptors are encoded before the launch, and in a new thread there would be no CUDA
        # context yet; this asks the driver something harmless, which makes one.
        torch.cuda.is_current_stream_capturing()
        return self.hopper

    @property
    def multiprocessors(self) -> int:
        return torch.cuda.get_device_properties(self.device).multi_processor_count

    def query_slots(self, block: int) -> int:
        return tiles.slots(self.queries, self.documents, block)

    def key_slots(self, block: int) -> int:
        return tiles.slots(self.keys, self.documents, block)


def launch_forward(
    call: Call,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    sinks: torch.Tensor | None,
) -> None:
    """Writes `out` and `lse`."""
    hopper = call.hopper_for(query, key, value)
    if hopper is not None:
        from .hopper.launch import forward

        with on_device(call.device):
            launch = hopper.long if call.long else hopper.forward
            forward(call, launch, query, key, value, out, lse, sinks)
        return
    launch = call.launches.forward
    slots = call.query_slots(launch.block_m)
    with on_device(call.device):
        _forward(
            slots * call.batch * call.heads,
            call.depends(query, key, value, out, lse, sinks),
            query,
            key,
            value,
            out,
            lse,
            call.bands[0],
            sinks,
            *call.positions,
            *_grid_strides(query),
            *_grid_strides(key),
            *_grid_strides(value),
            *_grid_strides(out),
            *call.counts(slots),
            HAS_SINKS=sinks is not None,
            FALLING=call.scale < 0,
            **call.constants,
            **call.options(launch),
        )


def launch_gradients(
    call: Call,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    d_out: torch.Tensor,
    d_query: torch.Tensor,
    d_key: torch.Tensor,
    d_value: torch.Tensor,
    lse: torch.Tensor,
    d_lse: torch.Tensor | None,
    base: torch.Tensor,
    delta: torch.Tensor,
    hopper: HopperLaunches | None,
) -> None:
    """Writes the gradients, `base` and `delta`; `hopper` is what `call.hopper_for` gave."""
    if hopper is None:
        launch_query_gradient(call, query, key, value, out, d_out, d_query, lse, d_lse, base, delta)
        launch_key_gradient(call, query, key, value, d_out, d_key, d_value, base, delta)
        return
    from .hopper.launch import gradients

    with on_device(call.device):
        gradients(
            call,
            hopper.gradient,
            query,
            key,
            value,
            out,
            d_out,
            d_query,
            d_key,
            d_value,
            lse,
            d_lse,
            base,
            delta,
        )


def launch_query_gradient(
    call: Call,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    d_out: torch.Tensor,
    d_query: torch.Tensor,
    lse: torch.Tensor,
    d_lse: torch.Tensor | None,
    base: torch.Tensor,
    delta: torch.Tensor,
) -> None:
    """Writes `d_query`, `base` and `delta`."""
    launch = call.launches.query_gradient
    slots = call.query_slots(launch.block_m)
    with on_device(call.device):
        _query_gradient(
            slots * call.batch * call.heads,
            call.depends(query, key, value, out, d_out, d_query, lse, d_lse, base, delta),
            query,
            key,
            value,
            out,
            d_out,
            d_query,
            lse,
            d_lse,
            base,
            delta,
            call.bands[0],
            *call.positions,
            *_grid_strides(query),
            *_grid_strides(key),
            *_grid_strides(value),
            *_grid_strides(out),
            *_grid_strides(d_out),
            *_grid_strides(d_query),
            *call.counts(slots),
            HAS_D_LSE=d_lse is not None,
            **call.constants,
            **call.options(launch),
        )


def launch_key_gradient(
    call: Call,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    d_out: torch.Tensor,
    d_key: torch.Tensor,
    d_value: torch.Tensor,
    base: torch.Tensor,
    delta: torch.Tensor,
) -> None:
    """Writes `d_key` and `d_value`; `base` and `delta` are those of `launch_query_gradient`."""
    launch = call.launches.key_gradient
    slots = call.key_slots(launch.block_n)
    with on_device(call.device):
        _key_gradient(
            slots * call.batch * call.key_heads,
            call.depends(query, key, value, d_out, d_key, d_value, base, delta),
            query,
            key,
            value,
            d_out,
            d_key,
            d_value,
            base,
            delta,
            call.bands[1],
            *call.positions,
            *_grid_strides(query),
            *_grid_strides(key),
            *_grid_strides(value),
            *_grid_strides(d_out),
            *_grid_strides(d_key),
            *_grid_strides(d_value),
            *call.counts(slots),
            GROUPED=call.heads != call.key_heads,
            **call.constants,
            **call.options(launch),
        )
