"""The launches of the portable kernels."""

from __future__ import annotations

from typing import Any

import torch

from .. import varlen
from ..arguments import Counts, Form, RowStats, heads
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
    with on_device(call.device):
        _forward(
            slots * call.batch * call.heads,
            _specialization_key(call, *tensors),
            heads(query),
            heads(key),
            heads(value),
            heads(out),
            lse,
            call.bands[0],
            sinks,
            call.positions,
            *_counts(call, slots),
            call.scale,
            FORM=_form(call, launch, HAS_SINKS=sinks is not None, FALLING=call.scale < 0),
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
    slots = varlen.num_slots(call.queries, call.n_documents, launch.block_m)
    with on_device(call.device):
        _query_gradient(
            slots * call.batch * call.heads,
            _specialization_key(call, query, key, value, out, d_out, d_query, *stats),
            heads(query),
            heads(key),
            heads(value),
            heads(out),
            heads(d_out),
            heads(d_query),
            stats,
            call.bands[0],
            call.positions,
            *_counts(call, slots),
            call.scale,
            FORM=_form(call, launch, HAS_D_LSE=stats.d_lse is not None),
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
    with on_device(call.device):
        _key_gradient(
            slots * call.batch * call.key_heads,
            _specialization_key(call, query, key, value, d_out, d_key, d_value, *stats),
            heads(query),
            heads(key),
            heads(value),
            heads(d_out),
            heads(d_key),
            heads(d_value),
            stats,
            call.bands[1],
            call.positions,
            *_counts(call, slots),
            call.scale,
            FORM=_form(call, launch, GROUPED=call.group > 1),
            num_stages=launch.num_stages,
            **launch.options,
        )


def _specialization_key(call: Call, *tensors: torch.Tensor | None) -> tuple[Any, ...]:
    strides = tuple([None if tensor is None else tensor.stride() for tensor in tensors])
    return call.device, specialization(*tensors, *call.positions), strides, call.start_strides


def _counts(call: Call, slots: int) -> Counts:
    return Counts(
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


def _form(call: Call, launch: LaunchConfig, **facts: bool) -> Form:
    query_start, key_start, cu_seqlens_q, _ = call.positions
    return Form(
        HEAD_DIM=call.head_dim,
        BLOCK_D=block_d(call.head_dim),
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        INTERVALS=call.n_intervals,
        PACKED=cu_seqlens_q is not None,
        START_ON_DEVICE=query_start is not None,
        HAS_KEY_START=key_start is not None,
        PRECISE=call.precise,
        **facts,
    )
