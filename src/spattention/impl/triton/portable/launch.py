"""The launches of the portable kernels."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from .. import varlen
from ..arguments import Form, Heads, RowStats, heads
from ..call import BackwardTensors, Call, ForwardTensors, on_device
from ..compiled import CompiledKernelCache, specialization
from ..config import LaunchConfig, Launches, block_d, launches
from .backward import key_gradient_kernel, query_gradient_kernel
from .forward import forward_kernel

_forward = CompiledKernelCache(forward_kernel)
_query_gradient = CompiledKernelCache(query_gradient_kernel)
_key_gradient = CompiledKernelCache(key_gradient_kernel)


def launches_for(call: Call) -> Launches:
    """The launches that the rule chooses for a call."""
    return launches(call.itemsize, call.head_dim, call.capability)


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
            FORM=_form(*_facts(call, launch), **facts),
            num_stages=launch.num_stages,
            **launch.options,
        )


def backward(call: Call, launches: Launches, tensors: BackwardTensors, stats: RowStats) -> None:
    """Launch both gradient kernels; they fill the gradients, `lse_log2` and `delta`."""
    query_gradient(call, launches.query_gradient, tensors, stats)
    key_gradient(call, launches.key_gradient, tensors, stats)


def query_gradient(
    call: Call, launch: LaunchConfig, tensors: BackwardTensors, stats: RowStats
) -> None:
    """Launch the kernel of dQ; fills `d_query`, `lse_log2` and `delta`."""
    query, key, value, out, d_out, d_query, _, _ = tensors
    form = _form(*_facts(call, launch), has_d_lse=stats.d_lse is not None)
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
            FORM=_form(*_facts(call, launch), grouped=call.group > 1),
            num_stages=launch.num_stages,
            **launch.options,
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


def _facts(call: Call, launch: LaunchConfig) -> tuple[Any, ...]:
    """The first arguments of `_form`."""
    query_start, key_start, cu_seqlens_q, _ = call.positions
    return (
        call.head_dim,
        launch.block_m,
        launch.block_n,
        call.n_intervals,
        cu_seqlens_q is not None,
        query_start is not None,
        key_start is not None,
        call.precise,
    )


@lru_cache(maxsize=1024)
def _form(
    head_dim: int,
    block_m: int,
    block_n: int,
    n_intervals: int,
    packed: bool,
    start_on_device: bool,
    has_key_start: bool,
    precise: bool,
    *,
    grouped: bool = False,
    has_sinks: bool = False,
    has_d_lse: bool = False,
    falling: bool = False,
) -> Form:
    """A kernel's `Form`; cached, because it takes longer to make than to look up."""
    return Form(
        HEAD_DIM=head_dim,
        BLOCK_D=block_d(head_dim),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        INTERVALS=n_intervals,
        PACKED=packed,
        START_ON_DEVICE=start_on_device,
        HAS_KEY_START=has_key_start,
        PRECISE=precise,
        GROUPED=grouped,
        HAS_SINKS=has_sinks,
        HAS_D_LSE=has_d_lse,
        FALLING=falling,
    )
