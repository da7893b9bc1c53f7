"""The PyTorch operators around the kernels: `spattention::triton_forward` and `spattention::triton_backward`.

They take the bands as a flat `int[]`, near, far, near, far per head, because schemas take no Python objects. Packed calls
(`offsets_q` given) come as `[1, H, T, D]` views.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from ..layout import empty_like_query
from . import tiles
from .backward import key_gradient_kernel, query_gradient_kernel
from .config import LaunchConfig, Launches, block_d, launches
from .forward import forward_kernel

LOG2_E = math.log2(math.e)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
MISSING, LONGEST = tiles.MISSING.value, tiles.MAX_POSITION.value
INTERPRETED = triton.knobs.runtime.interpret
# The one cache of the library: pure constants of a pattern, on their device.
_tables: dict[tuple[tuple[int, ...], int, torch.device], torch.Tensor] = {}


def refusal(query: torch.Tensor, value: torch.Tensor) -> str | None:
    """Why these kernels cannot compute a call, or None if they can."""
    if query.device.type != "cuda" and not INTERPRETED:
        return f"needs CUDA tensors, got {query.device.type}"
    if query.dtype not in DTYPES:
        return f"computes float16, bfloat16 and float32, got {query.dtype}"
    if query.shape[-1] > MAX_HEAD_DIM:
        return f"computes head_dim up to {MAX_HEAD_DIM}, got {query.shape[-1]}"
    if value.shape[-1] != query.shape[-1]:
        return f"needs value's head_dim to be key's, {query.shape[-1]}, got {value.shape[-1]}"
    return None


def band_table(intervals: Sequence[int], key_heads: int, device: torch.device) -> torch.Tensor:
    """int32 `[2, H, 8]` on the device: rows `head, near, far, near, far, 0, 0, 0`, those with most work first.

    `table[0]` is in the order of the query heads' work, `table[1]` in that of the key heads, whose query heads stand
    together. Made once per (pattern, device). Raises RuntimeError if that would be inside the capture of a CUDA graph,
    where the copy is not allowed.
    """
    key = (tuple(intervals), key_heads, device)
    table = _tables.get(key)
    if table is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the first call with a pattern must come before the capture of a CUDA graph: call once to warm up"
            )
        table = torch.tensor(_table(key[0], key_heads), dtype=torch.int32, device=device)
        _tables[key] = table
    return table


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


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied only if a row of head_dim is not contiguous."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _grid_strides(tensor: torch.Tensor) -> tuple[int, int, int]:
    return tensor.stride(0), tensor.stride(1), tensor.stride(2)


def _describable(tensor: torch.Tensor) -> bool:
    """Whether the copy engine can read the rows: 16-byte aligned start and strides."""
    unit = 16 // tensor.element_size()
    return tensor.data_ptr() % 16 == 0 and all(s and s % unit == 0 for s in _grid_strides(tensor))


def _descriptor(tensor: torch.Tensor, rows: int, width: int) -> TensorDescriptor:
    """Of blocks `[rows, width]` of a `[B, H, tokens, D]` tensor; what lies outside reads as 0."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, 1, rows, width])


def _vector_descriptor(tensor: torch.Tensor, rows: int) -> TensorDescriptor:
    """Of `rows` consecutive elements of a contiguous tensor."""
    return TensorDescriptor(tensor, [tensor.numel()], [1], [rows])


def _on_device(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _scaled(scale: float) -> float:
    """In powers of two. A scale of 0 becomes too small to matter, because -inf * 0 would be NaN."""
    return scale * LOG2_E if scale else 1e-30


class _Call:
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
        batch, heads, queries, head_dim = query.shape
        self.packed = offsets_q is not None
        self.documents = 0 if offsets_q is None else offsets_q.shape[0] - 1
        self.batch, self.heads, self.key_heads = batch, heads, key.shape[1]
        self.queries, self.keys = queries, key.shape[2]
        self.bands = band_table(intervals, self.key_heads, query.device)
        self.positions = (query_starts, key_start, offsets_q, offsets_k)
        self.block_d = block_d(head_dim)
        starts_stride = (
            0 if query_starts is None or query_starts.dim() == 0 else query_starts.stride(0)
        )
        key_start_strides = (0, 0)
        if key_start is not None:
            per_query = key_start.dim() == 2
            key_start_strides = (key_start.stride(0), key_start.stride(1) if per_query else 0)
        self.start_strides = (starts_stride, *key_start_strides)
        self.query_start = query_start
        self.scale = _scaled(scale)
        capability = torch.cuda.get_device_capability(query.device) if query.is_cuda else None
        self.launches: Launches = launches(query.element_size(), head_dim, capability)
        # Blocks that the copy engine reads may begin before a range. With queries from position 0 and no first keys, some
        # query sees every key there; otherwise they might hold anything, NaN included, and must not be read.
        self.open_ranges = (
            not self.packed and query_starts is None and key_start is None and query_start == 0
        )
        self.constants = {
            "HEAD_DIM": head_dim,
            "BLOCK_D": self.block_d,
            "INTERVALS": 2 if any(intervals[3::4]) else 1,
            "PACKED": self.packed,
            "START_ON_DEVICE": query_starts is not None,
            "HAS_KEY_START": key_start is not None,
            "PRECISION": "ieee",
        }

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

    def options(self, launch: LaunchConfig, descriptors: bool) -> dict[str, Any]:
        """The launch as arguments of a kernel."""
        return {
            "BLOCK_M": launch.block_m,
            "BLOCK_N": launch.block_n,
            "DESCRIPTORS": descriptors,
            "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
        }

    def query_slots(self, block: int) -> int:
        return tiles.slots(self.queries, self.documents, block)

    def key_slots(self, block: int) -> int:
        return tiles.slots(self.keys, self.documents, block)


@torch.library.custom_op("spattention::triton_forward", mutates_args=())
def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    intervals: Sequence[int],
    scale: float,
    query_start: int,
    query_starts: torch.Tensor | None,
    key_start: torch.Tensor | None,
    sinks: torch.Tensor | None,
    offsets_q: torch.Tensor | None,
    offsets_k: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`out [B, H, Q, D]` and the log-sum-exp, float32 `[B, H, Q]`.

    Args:
        query, key, value: `[B, H, Q, D]`, `[B, Hkv, K, D]` twice; packed calls have B = 1 and `offsets_q`, `offsets_k`.
        intervals: the bands, `BandPattern.flat`.
        scale: factor of the scores.
        query_start: position of the first query; used when `query_starts` is None.
        query_starts: the same as int32 `[]` or `[B]`, read on the device.
        key_start: int32 `[B]` or `[B, Q]`.
        sinks: `[H]`.
        offsets_q, offsets_k: int32 `[documents + 1]`.
    """
    out, lse = _forward_results(query)
    if out.numel() == 0:
        return out, lse
    query, key, value = _rows(query), _rows(key), _rows(value)
    call = _Call(
        query, key, intervals, query_start, query_starts, key_start, offsets_q, offsets_k, scale
    )
    launch = call.launches.forward
    slots = call.query_slots(launch.block_m)
    described = (
        launch.descriptors and call.open_ranges and _describable(key) and _describable(value)
    )
    with _on_device(query):
        forward_kernel[(slots * call.batch * call.heads,)](
            query,
            key,
            value,
            _descriptor(key, launch.block_n, call.block_d) if described else None,
            _descriptor(value, launch.block_n, call.block_d) if described else None,
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
            FALLING=scale < 0,
            **call.constants,
            **call.options(launch, described),
        )
    return out, lse


@forward.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    intervals: Sequence[int],
    scale: float,
    query_start: int,
    query_starts: torch.Tensor | None,
    key_start: torch.Tensor | None,
    sinks: torch.Tensor | None,
    offsets_q: torch.Tensor | None,
    offsets_k: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _forward_results(query)


def _forward_results(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    return empty_like_query(query, query.shape[3]), lse


@torch.library.custom_op("spattention::triton_backward", mutates_args=())
def backward(
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    intervals: Sequence[int],
    scale: float,
    query_start: int,
    query_starts: torch.Tensor | None,
    key_start: torch.Tensor | None,
    sinks: torch.Tensor | None,
    offsets_q: torch.Tensor | None,
    offsets_k: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key, value and sinks (`[0]` without sinks), from those of `out` and (or None) of `lse`."""
    d_query, d_key, d_value, d_sinks = _backward_results(query, key, value, sinks)
    if query.numel() == 0 or key.numel() == 0:
        for gradient in (d_query, d_key, d_value):
            gradient.zero_()
        if sinks is not None and d_lse is not None:
            d_sinks.copy_(d_lse.sum((0, 2)))
        return d_query, d_key, d_value, d_sinks.zero_() if d_lse is None else d_sinks
    query, key, value, d_out = _rows(query), _rows(key), _rows(value), _rows(d_out)
    call = _Call(
        query, key, intervals, query_start, query_starts, key_start, offsets_q, offsets_k, scale
    )
    # Per row: the log-sum-exp in powers of two, and the sum of dO * O less the log-sum-exp's gradient.
    base, delta = torch.empty_like(lse), torch.empty_like(lse)
    d_lse = None if d_lse is None else d_lse.contiguous()
    with _on_device(query):
        _launch_query_gradient(
            call, query, key, value, out, d_out, d_query, lse, d_lse, base, delta
        )
        _launch_key_gradient(call, query, key, value, d_out, d_key, d_value, base, delta)
    if sinks is not None:
        # The sink's weight in a row is exp(sink - lse); a sink of -inf weighs nothing, also in a row without keys.
        weight = torch.exp(sinks.float()[:, None] - lse).masked_fill(
            sinks[:, None] == -torch.inf, 0.0
        )
        d_sinks.copy_(-(weight * delta).sum((0, 2)))
    return d_query, d_key, d_value, d_sinks


def _launch_query_gradient(
    call: _Call,
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
    launch = call.launches.query_gradient
    slots = call.query_slots(launch.block_m)
    described = (
        launch.descriptors and call.open_ranges and _describable(key) and _describable(value)
    )
    query_gradient_kernel[(slots * call.batch * call.heads,)](
        query,
        key,
        value,
        _descriptor(key, launch.block_n, call.block_d) if described else None,
        _descriptor(value, launch.block_n, call.block_d) if described else None,
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
        **call.options(launch, described),
    )


def _launch_key_gradient(
    call: _Call,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    d_out: torch.Tensor,
    d_key: torch.Tensor,
    d_value: torch.Tensor,
    base: torch.Tensor,
    delta: torch.Tensor,
) -> None:
    launch = call.launches.key_gradient
    slots = call.key_slots(launch.block_n)
    described = (
        launch.descriptors
        and not call.packed
        and _describable(query)
        and _describable(d_out)
        and base.numel() < 1 << 31
    )
    key_gradient_kernel[(slots * call.batch * call.key_heads,)](
        query,
        key,
        value,
        d_out,
        _descriptor(query, launch.block_m, call.block_d) if described else None,
        _descriptor(d_out, launch.block_m, call.block_d) if described else None,
        _vector_descriptor(base, launch.block_m) if described else None,
        _vector_descriptor(delta, launch.block_m) if described else None,
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
        **call.options(launch, described),
    )


@backward.register_fake
def _(
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    intervals: Sequence[int],
    scale: float,
    query_start: int,
    query_starts: torch.Tensor | None,
    key_start: torch.Tensor | None,
    sinks: torch.Tensor | None,
    offsets_q: torch.Tensor | None,
    offsets_k: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _backward_results(query, key, value, sinks)


def _backward_results(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        empty_like_query(query, query.shape[3]),
        empty_like_query(key, key.shape[3]),
        empty_like_query(value, value.shape[3]),
        query.new_empty([0]) if sinks is None else torch.empty_like(sinks),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, intervals, scale, query_start, *optional = inputs
    ctx.save_for_backward(query, key, value, *output, *optional)
    ctx.intervals, ctx.scale, ctx.query_start = intervals, scale, query_start
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, d_out: torch.Tensor | None, d_lse: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    query, key, value, out, lse, query_starts, key_start, sinks, offsets_q, offsets_k = (
        ctx.saved_tensors
    )
    d_query, d_key, d_value, d_sinks = backward(
        torch.zeros_like(out) if d_out is None else d_out,
        d_lse,
        query,
        key,
        value,
        out,
        lse,
        ctx.intervals,
        ctx.scale,
        ctx.query_start,
        query_starts,
        key_start,
        sinks,
        offsets_q,
        offsets_k,
    )
    d_sinks = None if sinks is None else d_sinks
    return d_query, d_key, d_value, None, None, None, None, None, d_sinks, None, None


forward.register_autograd(_differentiate, setup_context=_save)
