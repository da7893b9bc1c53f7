"""The launches of the portable kernels."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from .. import varlen
from ..arguments import Form, Heads, RowStats, heads
from ..call import BackwardTensors, Call, ForwardTensors, on_device
from ..compiled import CompiledKernelCache, specialization
from ..config import OPTIONS, LaunchConfig, Launches, block_d, launches, prefix_chunk, prefix_launch
from .forward import forward_kernel
from .key_gradient import key_gradient_kernel
from .prefix_gradient import ROWS, PrefixCounts, prefix_gradient_kernel, reduce_kernel
from .query_gradient import query_gradient_kernel

_forward = CompiledKernelCache(forward_kernel)
_query_gradient = CompiledKernelCache(query_gradient_kernel)
_key_gradient = CompiledKernelCache(key_gradient_kernel)
_prefix_gradient = CompiledKernelCache(prefix_gradient_kernel)
_reduce = CompiledKernelCache(reduce_kernel)


def launches_for(call: Call) -> Launches:
    """The launches that the rule chooses for a call."""
    first_keys = call.positions.key_start is not None
    return launches(call.itemsize, call.head_dim, call.capability, first_keys)


def forward(call: Call, launch: LaunchConfig, tensors: ForwardTensors) -> None:
    """Launch the forward kernel; fills `out` and `lse`."""
    query, key, value, out, lse, sinks = tensors
    slots = varlen.num_slots(call.queries, call.n_documents, launch.block_m)
    arguments = (heads(query), heads(key), heads(value), heads(out))
    facts = {"has_sinks": sinks is not None, "falling": call.scale < 0}
    with on_device(call.device):
        _forward(
            slots * call.batch * call.heads,
            _specialization_key(call, arguments, lse, sinks),
            *arguments,
            lse,
            call.bands[0],
            sinks,
            call.positions,
            *_counts(call, slots),
            call.scale,
            FORM=_form(_facts(call, launch), **facts),
            num_stages=launch.num_stages,
            **launch.options,
        )


def backward(call: Call, launches: Launches, tensors: BackwardTensors, stats: RowStats) -> None:
    """Launch the gradient kernels; they fill the gradients, `lse_log2` and `delta`."""
    query_gradient(call, launches.query_gradient, tensors, stats)
    key_gradient(call, launches.key_gradient, tensors, stats)
    if call.prefix:
        prefix_gradient(call, launches.key_gradient, tensors, stats)


def query_gradient(
    call: Call, launch: LaunchConfig, tensors: BackwardTensors, stats: RowStats
) -> None:
    """Launch the kernel of dQ; fills `d_query`, `lse_log2` and `delta`."""
    query, key, value, out, d_out, d_query, _, _ = tensors
    form = _form(_facts(call, launch), has_d_lse=stats.d_lse is not None)
    slots = varlen.num_slots(call.queries, call.n_documents, launch.block_m)
    arguments = (
        heads(query),
        heads(key),
        heads(value),
        heads(out),
        heads(d_out),
        heads(d_query),
    )
    with on_device(call.device):
        _query_gradient(
            slots * call.batch * call.heads,
            _specialization_key(call, arguments, *stats),
            *arguments,
            stats,
            call.bands[0],
            call.positions,
            *_counts(call, slots),
            call.scale,
            FORM=form if call.has_all_keys else form._replace(EXACT_STEPS=0),
            num_stages=launch.num_stages,
            **launch.options,
        )


def key_gradient(
    call: Call, launch: LaunchConfig, tensors: BackwardTensors, stats: RowStats
) -> None:
    """Launch the kernel of dK and dV, after that of dQ; fills `d_key` and `d_value`."""
    query, key, value, _, d_out, _, d_key, d_value = tensors
    stats = RowStats(None, None, stats.lse_log2, stats.delta)
    slots = varlen.num_slots(call.keys, call.n_documents, launch.block_n)
    arguments = (
        heads(query),
        heads(key),
        heads(value),
        heads(d_out),
        heads(d_key),
        heads(d_value),
    )
    with on_device(call.device):
        _key_gradient(
            slots * call.batch * call.key_heads,
            _specialization_key(call, arguments, *stats),
            *arguments,
            stats,
            call.bands[1],
            call.positions,
            *_counts(call, slots),
            call.scale,
            FORM=_form(
                _facts(call, launch),
                grouped=call.group > 1,
                chunk=prefix_chunk(call.capability) if call.prefix else 0,
            ),
            num_stages=launch.num_stages,
            **launch.options,
        )


def prefix_gradient(
    call: Call,
    launch: LaunchConfig,
    tensors: BackwardTensors,
    stats: RowStats,
    *,
    shared: bool = True,
) -> None:
    """Launch the kernels that add the gradients of the prefix to `d_key` and `d_value`, after those
    of dQ and of dK and dV. `stats` may have more rows per head than queries.

    Args:
        shared: the portable kernel of dK and dV ran before, which computes the prefixes of short
            documents itself. Those for Hopper compute none.
    """
    shared = shared and _has_documents(call)
    query, key, value, _, d_out, _, d_key, d_value = tensors
    stats = RowStats(None, None, stats.lse_log2, stats.delta)
    if not shared:  # else these kernels share their blocks with dK and dV
        launch = prefix_launch(launch, call.prefix)
    chunk = prefix_chunk(call.capability)
    slots = varlen.num_slots(call.queries, call.n_documents, chunk)
    blocks = -(-call.prefix // launch.block_n)
    if call.positions.key_start is not None:  # a prefix may start inside of a block
        blocks = (call.prefix - 2) // launch.block_n + 2
    by_query = call.start_strides[2] != 0
    members = (1 + by_query) * blocks
    programs = slots * members * call.batch * call.key_heads
    part = stats.delta.new_empty((programs, 2, launch.block_n, call.head_dim))
    sizes = PrefixCounts(stats.delta.shape[2], blocks, members)
    inputs = (heads(query), heads(key), heads(value), heads(d_out))
    results = (heads(d_key), heads(d_value))
    counts = _counts(call, slots)
    form = _form(_facts(call, launch, shared), grouped=call.group > 1, chunk=chunk)
    with on_device(call.device):
        _prefix_gradient(
            programs,
            _specialization_key(call, inputs, part, *stats),
            *inputs,
            part,
            stats,
            call.bands[1],
            call.positions,
            *counts,
            *sizes,
            call.scale,
            FORM=form,
            num_stages=launch.num_stages,
            **launch.options,
        )
        _reduce(
            programs * launch.block_n // ROWS.value,
            _specialization_key(call, results, part),
            *results,
            part,
            call.bands[1],
            call.positions,
            *counts,
            *sizes,
            FORM=form,
            num_warps=4,
            **OPTIONS,
        )


def _specialization_key(
    call: Call, arguments: tuple[Heads, ...], *rest: torch.Tensor | None
) -> tuple[Any, ...]:
    return (
        call.device,
        call.start_strides,
        specialization(*[each.pointer for each in arguments], *rest, *call.positions),
        *[each[1:] for each in arguments],
    )


def _counts(call: Call, slots: int) -> tuple[int, ...]:
    """The fields of `arguments.Counts`."""
    return (
        *call.start_strides,
        call.heads,
        call.group,
        call.batch,
        call.n_documents,
        slots,
        call.queries,
        call.keys,
        call.query_start,
    )


def _has_documents(call: Call) -> bool:
    """True if a row may hold several documents."""
    return call.positions.cu_seqlens_q is not None or call.start_strides[2] != 0


def _facts(
    call: Call, launch: LaunchConfig, documents: bool | None = None
) -> tuple[tuple[str, Any], ...]:
    """Entries of `Form` that all kernels of a call share; `documents` as in `Form`."""
    query_start, key_start, cu_seqlens_q, _, described = call.positions
    return (
        ("HEAD_DIM", call.head_dim),
        ("BLOCK_D", block_d(call.head_dim)),
        ("BLOCK_M", launch.block_m),
        ("BLOCK_N", launch.block_n),
        ("INTERVALS", call.n_intervals),
        ("PREFIX", call.prefix),
        # Without a prefix no kernel depends on it.
        ("DOCUMENTS", call.prefix > 0 and _has_documents(call) and documents is not False),
        ("PACKED", cu_seqlens_q is not None),
        ("START_ON_DEVICE", query_start is not None),
        ("HAS_KEY_START", key_start is not None),
        ("UNLESS_DESCRIBED", described is not None),
        ("PRECISE", call.precise),
    )


@lru_cache(maxsize=1024)
def _form(
    facts: tuple[tuple[str, Any], ...],
    *,
    grouped: bool = False,
    chunk: int = 0,
    has_sinks: bool = False,
    has_d_lse: bool = False,
    falling: bool = False,
) -> Form:
    """A kernel's `Form`; cached, because it takes longer to make than to look up."""
    return Form(
        **dict(facts),
        GROUPED=grouped,
        CHUNK=chunk,
        HAS_SINKS=has_sinks,
        HAS_D_LSE=has_d_lse,
        FALLING=falling,
    )
